"""Every kernel as it is compiled, on CPU tensors: right against fp64, without a fault, in every schedule.

What the interpreter cannot see: layouts, barriers, asynchronous copies, tensor maps and the parameters of a launch.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from emulated_calls import CALL_OF, CALLS, FENCED, MARKS, OLDEST, kernels_of_package, placed, run
from far import far

from triton_attn._jit import workarounds
from triton_attn.toolchain.emulator import SCHEDULES, emulate
from triton_attn.toolchain.emulator.launches import first_schedules

pytestmark = MARKS
ON = [(arch, *call) for call in dict.fromkeys(CALL_OF.values()) for arch in ("sm_80", "sm_90")]
ON = [(arch, call, kernels) for arch, call, kernels in ON if (arch, kernels) != ("sm_80", "hopper")]


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)


@pytest.mark.ci(but_each=11)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CALLS)
def test_portable_kernels(name, arch):
    log = run(name, arch)
    assert all(launch.executed.sum() for launch in log)


@pytest.mark.oldest
@pytest.mark.parametrize("name", [name for name in CALLS if re.search("32.|512", name)])
def test_chains_that_are_cut(name):
    """Heads wider than 256 on sm_90, whose matmuls are each in a loop or a branch of their own."""
    run(name, "sm_90")


@pytest.mark.ci(but_each=7)
@pytest.mark.oldest
@pytest.mark.parametrize("name", FENCED)
def test_the_fence_that_triton_3_6_leaves_out(name, monkeypatch):
    """Ours is compiled where it is needed: without it there is the fault, which other versions have not."""

    lines, first = inspect.getsourcelines(workarounds.fence_copies.fn)
    ours = {f"workarounds.py:{line}" for line in range(first, first + len(lines))}

    def own(program):
        fences = [pc for pc in program.synchronizations() if program.name_of(pc) == "@fence_proxy_async"]
        return [pc for pc in fences if Path(program.where(pc)).name in ours]

    def remove_own(program):
        for pc in own(program):
            program.remove(pc)

    expected = FENCED[name] if OLDEST else set()
    assert {launch.name for launch in run(name, "sm_90") if own(launch.program)} == expected
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "portable")
    with emulate("sm_90", strict=False, edit=remove_own) as log:
        CALLS[name]()
    assert {launch.name for launch in log if launch.faults} == expected
    kinds = {fault.kind for launch in log for fault in launch.faults}
    assert kinds == ({"read by the async proxy without a proxy fence"} if OLDEST else set())


@pytest.mark.parametrize("arch", ["sm_86", "sm_89"])
def test_other_targets(arch):
    (launch,) = run("flash", arch)
    assert launch.arch == arch


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("name", dict.fromkeys(name for name, kernels in CALL_OF.values() if kernels == "portable"))
def test_every_portable_kernel_on_sm_120(name):
    """It multiplies as sm_80 does, copies by TMA, and adds two f32 or compares three in one instruction."""
    assert {launch.arch for launch in run(name, "sm_120")} == {"sm_120"}


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


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize(
    "name",
    [
        "flash 128 full",
        "flash varlen, spare rows",
        "flash of several tiles, the last program with fewer",
        "flash varlen of several tiles, spare rows",
        "mla decode 128 fp16",
        "mla decode 128 fp8 of one rank",
    ],
)
def test_other_calls_of_kernels_of_hopper(name):
    """Without a mask; with several tiles for a program; with spare rows, each of which one program clears; in fp16:
    weights that are not relative to the largest score leave its range, not bf16's.
    """
    run(name, "sm_90", "hopper")


@pytest.mark.ci(but_each=19)
@pytest.mark.oldest
@pytest.mark.parametrize(("schedule", "seed"), first_schedules(20))
@pytest.mark.parametrize(
    "name",
    ["flash 128", "flash 64 full", "flash 96 window", "flash of several tiles", "mla decode 128", "mla decode 128 fp8"],
)
def test_kernels_of_hopper_in_many_schedules(name, schedule, seed):
    """Of two groups and of three, with tiles in two pieces, and with a loop for each kind of partial tile. Tiles that
    wgmma reads are copied by TMA, of fp8 rows they are stored by warps that decode them."""
    log = run(name, "sm_90", "hopper", schedule=schedule, seed=seed)
    assert "hopper" in log[0].name


# Tensors in the order in which the calls make them; of one dimension the last row, head or page lies far off.
FAR_OF_HOPPER = [("flash 128", x, dim) for x in range(3) for dim in (1, 2)]
FAR_OF_HOPPER += [("mla decode 128", 0, 0), ("mla decode 128", 1, 2), ("mla decode 128", 2, 2)]
FAR_OF_HOPPER += [("mla decode 128 fp8", 0, 0)]


@pytest.mark.parametrize(("name", "which", "dim"), FAR_OF_HOPPER)
def test_kernels_of_hopper_reach_past_32_bits(name, which, dim):
    with placed(which, lambda x: far(x, dim)):
        log = run(name, "sm_90", "hopper")
    assert "hopper" in log[0].name


def misaligned(x):
    """x where no 16 bytes begin."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


# (call, how many tensors it makes)
INPUTS = {"flash": 3, "flash varlen": 3, "flash backward": 4, "paged": 3, "mla decode": 3, "mla prefill": 6}
INPUTS_OF_HOPPER = {"flash 128": 3, "mla decode 128": 3}


@pytest.mark.ci(but_each=7)
@pytest.mark.parametrize(
    ("name", "kernels", "which"),
    [
        *((name, "portable", x) for name, count in INPUTS.items() for x in range(count)),
        *((name, "hopper", x) for name, count in INPUTS_OF_HOPPER.items() for x in range(count)),
    ],
)
def test_one_input_is_misaligned(name, kernels, which):
    """What takes vectors or tensor maps must ask every tensor: its driver or its memory refuses it otherwise."""
    with placed(which, misaligned):
        run(name, "sm_90", kernels)
