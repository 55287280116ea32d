"""Plant one fault at a time in a copy of the checkout and see which tests catch it.

    python tests/mutants/mutants.py [NAME ...] [--limit SECONDS]

Names are those of faults or of groups of tests: F01, PAGED. A fault survives where all its tests pass: then a test is
missing. The readable tests of a group come first, its random ones only for what those let through.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import FAULTS, GROUPS

ROOT = Path(__file__).parents[2]
CAUGHT, SURVIVED, NOT_DECIDED, GONE = "caught", "SURVIVED", "not decided in time", "no longer applies"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
PASSED, TESTS_FAILED, NO_TESTS = 0, 1, 5  # exit codes of pytest


def copy_checkout(folder):
    """The files that git tracks, in their present state."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run_tests(folder, tests, limit):
    """(exit code of pytest, or None after a timeout; the first failed test)"""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TRITON_ATTN_TESTS": "ci"}
    env.pop("TRITON_INTERPRET", None)
    if not tests.compiled:
        env["TRITON_INTERPRET"] = "1"
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-profile", "first_failure"]
    command = [sys.executable, "-m", "pytest", *options, *tests.arguments]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, ""
    if process.returncode < 0:  # a kernel with a wrong address ends the interpreter
        return process.returncode, signal.Signals(-process.returncode).name
    failed = FAILED.search(said)
    return process.returncode, failed[1] if failed else said.strip().splitlines()[-1]


def try_fault(folder, fault, limit):
    """(outcome, the test that caught it)"""
    path = folder / fault.file
    source = path.read_text()
    if source.count(fault.old) != 1:
        return GONE, ""
    path.write_text(source.replace(fault.old, fault.new))
    outcome = SURVIVED
    try:
        for tests in GROUPS[fault.group]:
            code, test = run_tests(folder, tests, limit)
            if code is None:
                outcome = NOT_DECIDED
            elif code not in (PASSED, NO_TESTS):
                return CAUGHT, test
    finally:
        path.write_text(source)
    return outcome, ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each run of pytest; default: 300")
    options = parser.parse_args()
    known = {fault.name for fault in FAULTS} | set(GROUPS)
    if unknown := set(options.names) - known:
        parser.error(f"NAME: expected faults or groups, got {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if not options.names or {fault.name, fault.group} & set(options.names)]
    counts = dict.fromkeys((CAUGHT, SURVIVED, NOT_DECIDED, GONE), 0)
    with tempfile.TemporaryDirectory() as name:
        copy_checkout(Path(name))
        for fault in chosen:
            start = time.monotonic()
            outcome, test = try_fault(Path(name), fault, options.limit)
            counts[outcome] += 1
            print(f"{fault.name} {fault.file:28} {outcome:20} {time.monotonic() - start:5.0f} s  {test}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts[SURVIVED] or counts[GONE] else 0


if __name__ == "__main__":
    sys.exit(main())
