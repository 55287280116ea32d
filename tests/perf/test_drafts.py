"""The price of a tree of drafts, as the command prints it."""

import pytest
import triton

from perf.commands import drafts

pytestmark = pytest.mark.compiled


@pytest.mark.oldest
@pytest.mark.parametrize("name", drafts.CALLS)
@pytest.mark.parametrize("arch", drafts.ARCHS)
def test_a_tree_costs_a_tenth_more_than_a_chain_at_most(arch, name, record_property):
    shares = drafts.prices(name, arch)
    record_property("figure", f"tree {arch} {name:15} " + ", ".join(f"{x:.3f} at {n}" for n, x in shares.items()))
    assert min(shares.values()) >= 0.9
    # Distances cost 1.112 at 1k on sm_90 with Triton 3.6.
    most = 1.12 if (arch, name) == ("sm_90", "paged, alibi") and triton.__version__.startswith("3.6.") else 1.1
    assert max(shares.values()) <= most


def test_the_loop_over_full_tiles_has_no_bits():
    """Its cycles are those of a chain but for the order of instructions."""
    for name in ("paged, plain", "paged, window"):
        (full, _), (full_of_tree, masked) = map(drafts.trip_cycles, drafts.compile_both(drafts.CALLS[name][0], "sm_90"))
        assert full_of_tree <= 1.02 * full < masked
