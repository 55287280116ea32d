"""Each barrier, arrival, wait, commit and fence that a kernel executes, removed alone: reported, or listed below.

A test of the emulator's checks, on the package's own kernels as they are by default on sm_90. What is redundant is so
by the order of all accesses to shared memory in each schedule, and the results are right without it. The calls have so
many keys that every ring of buffers wraps.
"""

from collections import Counter

import emulated_calls as calls
import pytest
import torch
import triton

from triton_attn.testing.emulator import emulate

pytestmark = [
    *calls.MARKS,
    pytest.mark.skipif(not triton.__version__.startswith("3.9."), reason="how many are redundant is the compiler's"),
]

# Kernels whose redundant instructions were read; those of copies alone have none to remove.
CALLS = {
    "_flash_fwd_hopper_kernel": lambda: calls.flash(128, (130, 700), (1, 1)),
    "_append_latent_cache_kernel": lambda: calls.append_latent(torch.uint8),
    "_merge_kernel": calls.merge,
}

BETWEEN_BARRIERS = "the compiler's, by buffer: another barrier, or a warp that reads what it wrote, orders the same"
# {kernel: {instruction: [(how many, why)]}}
REDUNDANT = {
    "_flash_fwd_hopper_kernel": {
        "@bar": [
            (4, "before k_free in _step: the loader has waited for v_free, which comes after a later barrier"),
            (2, "after the last store: the end of the partition is a barrier"),
        ],
        "@wgmma_fence": [(2, "the scores of a masked tile but the last: no one has touched their registers")],
    },
    "_merge_kernel": {"@bar": [(2, BETWEEN_BARRIERS)]},
}  # fmt: skip
SCHEDULES = ("late", "random")


def launched(kernel, schedule, removed=None, limit=100_000_000):
    """(launches of the kernel, results of the call)"""

    def edit(program):
        if program.name == kernel and removed is not None:
            program.remove(removed)

    torch.manual_seed(0)
    with emulate("sm_90", schedule=schedule, strict=False, limit=limit, edit=edit) as log:
        computed, _ = CALLS[kernel]()
    return [launch for launch in log if launch.name == kernel], computed


@pytest.mark.parametrize("kernel", [pytest.param(next(iter(CALLS)), marks=pytest.mark.ci), *list(CALLS)[1:]])
def test_each_synchronization_is_reported_when_it_is_removed(kernel, monkeypatch, record_property):
    monkeypatch.setenv("TRITON_ATTN_KERNELS", calls.CALL_OF[kernel][1])
    launches, right = launched(kernel, "late")
    assert not any(launch.faults for launch in launches)
    program, limit = launches[0].program, 8 * max(launch.instructions for launch in launches) + 100_000
    executed = [pc for pc in program.synchronizations() if any(launch.executed[pc] for launch in launches)]
    unreported = []
    for pc in executed:
        for schedule in SCHEDULES:
            changed, computed = launched(kernel, schedule, pc, limit)
            if any(launch.faults for launch in changed):
                break
            assert all(map(same, computed, right)), f"{program.where(pc)}: {program.text[pc]}: wrong without a report"
        else:
            unreported.append(pc)
    record_property("figure", f"mutations: {kernel}: {len(executed)} removed, {len(unreported)} unreported")
    listed = {name: sum(count for count, _ in entries) for name, entries in REDUNDANT.get(kernel, {}).items()}
    found = Counter(program.name_of(pc) for pc in unreported)
    places = "\n".join(f"{program.where(pc)}: {program.text[pc]}" for pc in unreported)
    assert found == listed, f"unreported, each to be read and listed with its reason:\n{places}"


def same(a, b):
    return torch.equal(a.nan_to_num(), b.nan_to_num())
