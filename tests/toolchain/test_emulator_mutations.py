"""Each barrier, arrival, wait, commit and fence that a kernel executes, removed: reported, or listed below.

A test of the emulator's checks, on the package's own kernels as they are by default on sm_90. What no schedule reports
and no result shows stays removed, so that of several that order the same accesses one is left, and that one must be
reported: what is listed is redundant together. The calls have so many keys that every ring of buffers wraps.
"""

from collections import Counter
from pathlib import Path

import emulated_calls as calls
import pytest
import torch
import triton

from examples import without_a_gpu as example
from triton_attn.toolchain.emulator import emulate

pytestmark = [
    *calls.MARKS,
    pytest.mark.skipif(
        not triton.__version__.startswith(("3.6.", "3.9.")), reason="how many are redundant is the compiler's"
    ),
]

# By the name of a kernel, and of a variant of it.
CALLS = {
    "_flash_fwd_hopper_kernel": lambda: calls.flash(128, (130, 700), (1, 1)),
    "_flash_fwd_hopper_kernel spare rows": lambda: calls.flash_varlen(150, (700,), (1, 1), 128),
    "_flash_fwd_hopper_kernel several tiles": lambda: calls.several_tiles(calls.flash, 128, (300, 700), (1, 1)),
    "_append_latent_cache_kernel": lambda: calls.append_latent(torch.uint8),
    "_gather_cache_kernel": calls.gather,
    "_gather_cache_kernel packed": calls.gather_packed,
    "_merge_kernel": lambda: calls.merge(40),
    "_flash_fwd_kernel": lambda: calls.flash(64, (130, 700), (1, 1)),
    "_paged_fwd_kernel": lambda: calls.paged((430,), num_splits=1),
    "_absorb_kernel": lambda: calls.mla_decode(with_weights=True, num_splits=2),
    "_mla_absorbed_kernel": lambda: calls.mla_decode(seqlen=500, num_splits=1),
    "_merge_project_kernel": lambda: calls.mla_decode(with_weights=True, num_splits=2),
    "_flash_bwd_delta_kernel": lambda: calls.backward(True, 100, 1),
    "_flash_bwd_dkdv_kernel": lambda: calls.backward(False, 400, 1),
    "_flash_bwd_dq_kernel": lambda: calls.backward(True, 400, 1),
    "_mla_prefill_kernel": lambda: calls.mla_prefill(seqlen=300, heads=1),
    "_mla_decode_hopper_kernel": lambda: calls.mla_decode(64, 330, num_splits=1),
    "_mla_decode_hopper_kernel fp8": lambda: calls.mla_decode(64, 330, cache_dtype=torch.uint8, num_splits=1),
}

BETWEEN_BARRIERS = "the compiler's, by buffer: another barrier, or a warp that reads what it wrote, orders the same"
COMMITS = "the commit of the next takes it along, and no wait tells them apart"
UNTOUCHED = "no one has touched the product's registers since the last fence, or ever"
FENCED = "what it stands for was stored before another fence"
FIRST_OF_TWO = "of the first of two products: no one reads it before the second is waited for"
AFTER_LOOP = "after a loop whose last trip has waited"
BEFORE_START = "between the first values of mbarriers: the groups start after another barrier"
BEFORE_WAIT = "before a wait for an mbarrier, which each thread of the group does itself"
BEFORE_K_FREE = "before k_free in _step: the loader has waited for v_free, which comes after a later barrier"
AFTER_STORE = "after the last store: the end of the partition is a barrier"
OF_LOADER = "of the loader: the lane that copies has waited itself, the others touch nothing"
# {kernel: {instruction: [(how many of Triton 3.9, of 3.6, why)]}}
REDUNDANT = {
    "_flash_fwd_hopper_kernel": {
        "@bar": [
            (0, 5, BEFORE_START),
            (0, 6, BEFORE_WAIT),
            (4, 4, BEFORE_K_FREE),
            (2, 2, AFTER_STORE),
        ],
        "@warp_sync": [(8, 5, OF_LOADER)],
        "@wgmma_fence": [(2, 2, UNTOUCHED)],
    },
    "_flash_fwd_hopper_kernel spare rows": {
        "@bar": [
            (0, 5, BEFORE_START),
            (0, 4, BEFORE_WAIT),
            (2, 2, BEFORE_K_FREE),
            (2, 2, AFTER_STORE),
            (0, 1, "between zeros for the buffers of two groups: another barrier comes before the first copy"),
            (1, 1, "after the copies of zeros, which their thread has waited for: the groups start after a barrier"),
        ],
        "@bulk_commit": [(1, 1, COMMITS)],
        "@warp_sync": [(8, 5, OF_LOADER)],
    },
    "_flash_fwd_hopper_kernel several tiles": {
        "@bar": [
            (0, 6, BEFORE_START),
            (0, 6, BEFORE_WAIT),
            (4, 4, BEFORE_K_FREE),
            (2, 2, "before q_free: the group has passed a barrier since the products that read the queries"),
            (2, 2, AFTER_STORE),
        ],
        "@warp_sync": [(8, 6, OF_LOADER)],
        "@wgmma_fence": [(2, 2, UNTOUCHED)],
    },
    "_flash_fwd_kernel": {
        "@bar": [
            (14, 19, "before a loop, around each thing that one thread does for a copy: the last one is enough"),
            (5, 3, "in the loop over masked tiles: of at most three trips, and there are three buffers"),
            (4, 2, "in the loop over whole tiles: of those between a product and a copy to its buffer one is enough"),
            (1, 0, BETWEEN_BARRIERS),
            (0, 5, "after the last loop, where mbarriers end: one of six is enough"),
        ],
        "@fence_proxy_async": [(1, 1, FENCED)],
        "@wgmma_fence": [(1, 1, UNTOUCHED)],
    },
    "_paged_fwd_kernel": {
        "@cp_commit": [(8, 8, COMMITS)],
        "@bar": [(1, 1, "between the loops: all warps have read what the second overwrites before others in both")],
    },
    "_absorb_kernel": {"@cp_commit": [(2, 2, COMMITS)]},
    "_mla_absorbed_kernel": {"@cp_commit": [(4, 4, COMMITS)]},
    "_merge_project_kernel": {"@bar": [(1, 0, BETWEEN_BARRIERS)]},
    "_flash_bwd_dkdv_kernel": {
        "@bar": [(16, 19, BETWEEN_BARRIERS)],
        "@bulk_wait": [(1, 1, AFTER_LOOP)],
        "@cp_wait": [(1, 1, AFTER_LOOP)],
        "@fence_proxy_async": [(1, 1, FENCED)],
        "@wgmma_commit": [(4, 4, COMMITS)],
        "@wgmma_fence": [(1, 1, UNTOUCHED)],
        "@wgmma_wait": [(2, 2, AFTER_LOOP)],
    },
    "_flash_bwd_dq_kernel": {
        "@bar": [(15, 17, BETWEEN_BARRIERS)],
        "@fence_proxy_async": [(1, 1, FENCED)],
        "@wgmma_commit": [(2, 2, COMMITS)],
        "@wgmma_fence": [(3, 3, UNTOUCHED)],
        "@wgmma_wait": [(2, 2, FIRST_OF_TWO)],
    },
    "_mla_prefill_kernel": {
        "@bar": [(3, 0, BETWEEN_BARRIERS)],
        "@cp_commit": [(8, 8, COMMITS)],
        "@fence_proxy_async": [(4, 6, FENCED)],
        "@wgmma_commit": [(0, 2, COMMITS)],
        "@wgmma_fence": [(6, 6, UNTOUCHED)],
        "@wgmma_wait": [(0, 2, FIRST_OF_TWO)],
    },
    "_mla_decode_hopper_kernel": {
        "@bar": [
            (0, 8, BEFORE_START),
            (0, 7, BEFORE_WAIT),
            (10, 6, "of the loader: around each thing that one of its threads does"),
            (2, 2, "before free_pe in _step: the loader has waited for values, which are free after a later barrier"),
            (2, 6, BETWEEN_BARRIERS),
        ],
        "@mbarrier_arrive": [(2, 2, "that frees rotary keys: nothing waits for it, see below")],
        "@mbarrier_try_wait": [
            (2, 2, "for the other group's values: that group has waited for them when it passes on its weights"),
            (1, 1, "of group 1, for the queries: group 0 has waited for them when it passes on its first weights"),
            (1, 1, "of the loader, for rotary keys: it has waited for values, which their group frees later"),
        ],
        "@wgmma_commit": [(4, 4, COMMITS)],
        "@wgmma_fence": [(6, 6, UNTOUCHED)],
    },
    "_mla_decode_hopper_kernel fp8": {
        "@bar": [
            (0, 8, BEFORE_START),
            (0, 9, BEFORE_WAIT),
            (0, 6, "of the loader: between parts of a tile, which it stores one beside the other"),
            (6, 4, "of the loader: around each thing that one of its threads does for a copy"),
            (2, 6, BETWEEN_BARRIERS),
        ],
        "@fence_proxy_async": [(1, 1, FENCED)],
        "@mbarrier_try_wait": [
            (2, 2, "for the other group's values: that group has waited for them when it passes on its weights"),
            (1, 1, "of group 1, for the queries: group 0 has waited for them when it passes on its first weights"),
        ],
        "@warp_sync": [(8, 8, "orders instructions for ptxas, and no accesses: see _in_order")],
        "@wgmma_commit": [(4, 4, COMMITS)],
        "@wgmma_fence": [(6, 6, UNTOUCHED)],
    },
}  # fmt: skip
QUICK = ("_append_latent_cache_kernel", "_gather_cache_kernel", "_gather_cache_kernel packed", "_merge_kernel")
SCHEDULES = ("late", "random")


def launched(kernel, schedule, removed=(), limit=100_000_000):
    """(launches of the kernel, results of the call)"""
    name = kernel.split()[0]

    def edit(program):
        if program.name == name:
            for pc in removed:
                program.remove(pc)

    torch.manual_seed(0)
    with emulate("sm_90", schedule=schedule, strict=False, limit=limit, edit=edit) as log:
        computed, _ = CALLS[kernel]()
    return [launch for launch in log if launch.name == name], computed


def marked(kernel):
    level = pytest.mark.ci if kernel in ("_paged_fwd_kernel", "_flash_fwd_kernel") else pytest.mark.full
    return pytest.param(kernel, marks=[] if kernel in QUICK else level)


@pytest.mark.oldest
@pytest.mark.parametrize("kernel", [marked(kernel) for kernel in CALLS])
def test_each_synchronization_is_reported_when_it_is_removed(kernel, monkeypatch, record_property):
    monkeypatch.setenv("TRITON_ATTN_KERNELS", calls.CALL_OF[kernel.split()[0]][1])
    launches, right = launched(kernel, "late")
    assert [fault for launch in launches for fault in launch.faults] == []
    program, limit = launches[0].program, 8 * max(launch.instructions for launch in launches) + 100_000
    executed = [pc for pc in program.synchronizations() if any(launch.executed[pc] for launch in launches)]
    redundant = []
    for pc in executed:
        for schedule in SCHEDULES:
            changed, computed = launched(kernel, schedule, [*redundant, pc], limit)
            if any(launch.faults for launch in changed):
                break
            assert all(map(same, computed, right)), f"{program.where(pc)}: {program.text[pc]}: wrong without a report"
        else:
            redundant.append(pc)
    record_property("figure", f"mutations: {kernel}: {len(executed)} removed, {len(redundant)} redundant")
    entries = REDUNDANT.get(kernel, {})
    listed = Counter({name: sum(numbers[calls.OLDEST] for *numbers, _ in entries[name]) for name in entries})
    found = Counter(program.name_of(pc) for pc in redundant)
    places = "\n".join(f"{program.where(pc)}: {program.text[pc]}" for pc in redundant)
    assert found == listed, f"redundant, each to be read and listed with its reason:\n{places}"


@pytest.mark.oldest
def test_kernels_without_a_call_here_have_nothing_to_remove():
    """Every other kernel of the package is in CALLS."""
    for kernel in set(calls.CALL_OF) - set(CALLS):
        (launch,) = calls.run(calls.CALL_OF[kernel][0], "sm_90")
        assert launch.name == kernel
        assert launch.program.synchronizations() == []


@pytest.mark.parametrize("forgotten", ["full", "free"])
def test_a_removed_wait_is_as_one_that_was_forgotten(forgotten):
    """Of an mbarrier: its removal says that the phase is over. What follows differs, the first fault does not."""
    lines = Path(example.__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if f"mbarrier.wait({forgotten}." in text)

    def edit(program):
        for pc in program.synchronizations():
            if program.name_of(pc) == "@mbarrier_try_wait" and program.where(pc).endswith(f"py:{line}"):
                program.remove(pc)

    with emulate("sm_90", schedule="late", strict=False, edit=edit) as removed:
        example.column_sums()
    with emulate("sm_90", schedule="late", strict=False) as omitted:
        example.column_sums(forget=forgotten)
    first = [log[0].faults[0] for log in (removed, omitted)]
    assert first[0].kind == first[1].kind
    assert first[0].where == first[1].where


def same(a, b):
    return torch.equal(a.nan_to_num(), b.nan_to_num())
