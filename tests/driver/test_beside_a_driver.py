"""The emulator in a process that has the driver of a GPU."""

import shutil
import subprocess

import pytest
import torch
from stub_driver import HERE, ROOT, run_python

from triton_attn.toolchain.emulator.launches import Memory

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.oldest,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C++ compiler"),
]


EMULATOR_FIRST = f"""
import runpy, sys
from triton_attn.toolchain.emulator import stub
stub.nvidia_driver().CudaUtils()
sys.argv = ["", "sm_90"]
runpy.run_path("{HERE / "beside_a_driver.py"}")
"""


@pytest.mark.parametrize(
    "arguments", [(HERE / "beside_a_driver.py", "sm_90"), ("-c", EMULATOR_FIRST)], ids=["", "first"]
)
def test_the_emulator_and_a_driver_in_one_process(stub, arguments):
    """Each has its own launches, whichever was loaded first."""
    done = run_python(stub, "sm_90", *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("\n") == [*3 * ["launch _double_kernel 1"], ""]


def test_a_tensor_of_a_gpu_is_refused():
    """meta stands for any device that is not the CPU."""
    tensor = torch.empty(4, device="meta")
    with pytest.raises(ValueError, match=r"x\.ptr: expected a CPU tensor, which the emulator can read, got meta"):
        Memory({"x.ptr": tensor})


def test_make_runs_the_same_tests_on_a_machine_with_a_gpu():
    def commands(gpu):
        make = ["make", "--dry-run", "--old-file", ".venv/installed", "test", f"GPU={gpu}"]
        return subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert "--nbmake tests notebooks" in commands("")
    assert commands("/dev/nvidia0") == commands("")
