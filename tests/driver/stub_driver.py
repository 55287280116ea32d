"""Processes over the stub driver."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def stub_environment(stub, arch):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"LD_LIBRARY_PATH": str(stub), "TRITON_LIBCUDA_PATH": str(stub), "STUB_ARCH": arch.removeprefix("sm_")}
    return env | {"TRITON_ATTN_BACKEND": "triton", "PYTHONPATH": f"{ROOT}:{HERE}"}


def launches_of(stub, arch, *pattern, **environment):
    """{call: [kernels that it launched]} of public_calls.py. Fails if a launch failed."""
    done = run_python(stub, arch, HERE / "public_calls.py", arch, *pattern, **environment)
    launches = {}
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word == "call":
            of_call = launches[rest] = []
        elif word == "launch":
            of_call.append(rest.split()[0])
    assert done.returncode == 0, done.stderr[-4000:]
    return launches


def run_python(stub, arch, *arguments, **environment):
    env = stub_environment(stub, arch) | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
