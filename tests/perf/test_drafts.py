"""The price of a tree of drafts, as the command prints it."""

import pytest

from perf.commands import drafts

pytestmark = pytest.mark.compiled


@pytest.mark.oldest
@pytest.mark.parametrize("name", drafts.CALLS)
@pytest.mark.parametrize("arch", drafts.ARCHS)
def test_a_tree_costs_a_tenth_more_than_a_chain_at_most(arch, name, record_property):
    shares = drafts.prices(name, arch)
    record_property("figure", f"tree {arch} {name:15} " + ", ".join(f"{x:.3f} at {n}" for n, x in shares.items()))
    assert min(shares.values()) >= 0.9
    assert max(shares.values()) <= 1.1


def test_the_loop_over_full_tiles_has_no_bits():
    """Its cycles are those of a chain but for the order of instructions."""
    for name in ("paged, plain", "paged, window"):
        (full, _), (full_of_tree, masked) = map(drafts.trip_cycles, drafts.compile_both(drafts.CALLS[name][0], "sm_90"))
        assert full_of_tree <= 1.02 * full < masked
