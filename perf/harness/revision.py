"""The package at another commit."""

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
    """Within this context, new processes (perf/harness/parallel.py) import triton_attn from `revision`, and everything
    else from the checkout.

    Only the commit's package is written, to a temporary folder. The checkout is not changed.

    Raises:
        ValueError: the commit is unknown to git, or has no triton_attn.
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
