"""Every kernel as it is compiled, on CPU tensors: right against fp64, without a fault, in every schedule.

What the interpreter cannot see: layouts, barriers, asynchronous copies, tensor maps and the parameters of a launch.
"""

import pytest
import torch
from emulated_calls import CALL_OF, CALLS, MARKS, check, flash, kernels_of_package, mla_decode, run
from far import far

from triton_attn.testing.emulator import SCHEDULES, emulate

pytestmark = MARKS
ON = [(arch, *call) for call in dict.fromkeys(CALL_OF.values()) for arch in ("sm_80", "sm_90")]
ON = [(arch, call, kernels) for arch, call, kernels in ON if (arch, kernels) != ("sm_80", "hopper")]


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)


@pytest.mark.ci(but_each=7)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CALLS)
def test_portable_kernels(name, arch):
    log = run(name, arch)
    assert all(launch.executed.sum() for launch in log)


@pytest.mark.oldest
def test_the_missing_fence_of_triton_3_6():
    """It fails once the fault is gone, and on other versions if it comes."""
    run("flash of expanded heads", "sm_90")


@pytest.mark.parametrize("arch", ["sm_86", "sm_89"])
def test_other_targets(arch):
    (launch,) = run("flash", arch)
    assert launch.arch == arch


def test_every_kernel_has_a_call():
    assert sorted(CALL_OF) == kernels_of_package()


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize(("arch", "name", "kernels"), ON)
def test_every_kernel_in_every_schedule(arch, name, kernels):
    """Those of Hopper have no interpreter: their mbarriers, tensor copies and warp specialization run here alone."""
    launched = {kernel for kernel in CALL_OF if CALL_OF[kernel][0] == name}
    for schedule in SCHEDULES:
        assert launched <= {launch.name for launch in run(name, arch, kernels, schedule=schedule, seed=1)}


@pytest.mark.oldest
def test_a_call_of_hopper_without_a_mask():
    run("flash 128 full", "sm_90", "hopper")


@pytest.mark.parametrize(
    ("call", "which", "dim"),
    [
        *((lambda place: flash(128, place=place), which, dim) for which in range(3) for dim in (1, 2)),
        *((lambda place: mla_decode(128, place=place), which, 2 - which) for which in (0, 2)),
    ],
)
def test_kernels_of_hopper_reach_past_32_bits(call, which, dim, monkeypatch):
    """A tensor whose last row, head or page lies past 2^31 elements; where queries are given as such."""

    def place(*tensors):
        return [far(x, dim) if i == which else x for i, x in enumerate(tensors)]

    monkeypatch.setenv("TRITON_ATTN_KERNELS", "hopper")
    with emulate("sm_90") as log:
        check(lambda: call(place))
    assert "hopper" in log[0].name
