"""The package as of another commit."""

import io
import subprocess
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


@contextmanager
def package_of(revision, checkout=CHECKOUT):
    """Inside it, processes that are started (perf/harness/parallel.py) import triton_attn as of `revision`, all else
    from here.

    The commit's package alone is written to a folder that is removed in any case; the checkout is not touched.

    Raises:
        ValueError: git knows no such commit, or it has no triton_attn.
    """
    with tempfile.TemporaryDirectory(prefix="triton_attn-") as folder:
        with tarfile.open(fileobj=io.BytesIO(_archive(revision, checkout))) as archive:
            archive.extractall(folder, filter="data")
        sys.path.insert(0, folder)
        try:
            yield Path(folder)
        finally:
            sys.path.remove(folder)


def _archive(revision, checkout):
    commit = _git(checkout, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit.returncode:
        raise ValueError(f"expected a commit that git knows in {checkout}; got {revision!r}")
    archive = _git(checkout, "archive", "--format=tar", commit.stdout.decode().strip(), "triton_attn")
    if archive.returncode:
        raise ValueError(f"commit {revision!r} has no package: {archive.stderr.decode().strip()}")
    return archive.stdout


def _git(checkout, *args):
    return subprocess.run(["git", "-C", checkout, *args], capture_output=True)
