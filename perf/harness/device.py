"""The device and versions that figures depend on.

Imports triton only after its mode (interpreter or compiler) has been chosen.
"""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch


def has_gpu():
    return torch.cuda.is_available()


def gpu_name():
    """The GPU's name; None without a GPU."""
    return torch.cuda.get_device_name() if has_gpu() else None


def gpu_arch():
    """The GPU's architecture in the form of `triton_attn.toolchain.compile_only`; None without a GPU."""
    if not has_gpu():
        return None
    from triton_attn._host import gpu  # not at the top: another commit's package may be compiled

    return gpu.gpu_arch(torch.cuda.current_device())


def folder_name():
    """The GPU's name in the form of a folder name: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name().lower()).strip("-")


@cache
def driver_version():
    """The driver's version; None without a GPU or without nvidia-smi."""
    if not has_gpu():
        return None
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]


@cache
def commit():
    """The commit of the checkout, with a plus if its code has changed. None outside a git checkout or without git."""
    if shutil.which("git") is None:
        return None

    def git(*args):
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True)

    revision = git("rev-parse", "--short", "HEAD")
    if revision.returncode:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py").stdout
    return revision.stdout.strip() + ("+" if changed else "")


def versions():
    """The columns of a result that say what it depends on besides the GPU."""
    import triton

    return {"driver": driver_version(), "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}


def provenance():
    """The columns of a result that is not a speed: the device and the versions."""
    return {"device": gpu_name() or "CPU, Triton's interpreter", **versions()}
