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


def run_python(stub, arch, *arguments, **environment):
    env = stub_environment(stub, arch) | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
