"""batch_invariant in compiled code: alone, in a batch, in a chunk and in a longer one a query has the same bits.

The interpreter adds in one order whatever the tile is. Compiled code does not: instructions for matmuls follow from the
tile, and a multiplication and an addition become one instruction or two.
"""

from unittest import mock

import pytest
import torch
from emulated_calls import MARKS, int32, normal
from invariance import KEYS, packed, short_splits

from triton_attn import mla_decode, paged_attention
from triton_attn._host.tuned import forget_plans
from triton_attn.mla import absorbed
from triton_attn.paged import forward
from triton_attn.toolchain.emulator import emulate

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
LENGTHS = 2 * KEYS + 21, KEYS + 5
# (sequence, first query, end of its keys)
CHUNK = [(0, 250, 277)]
BATCHES = [[(0, 276, 277)], [(0, 259, 262)], [(1, 132, 133)], [(1, 60, 61), (0, 276, 277), (1, 131, 133)]]


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)


def check_same_bits(attend, batches):
    """Each query has in all batches what it has in the first."""
    seen = {}
    for parts in batches:
        out, lse = attend(parts)
        queries = [(sequence, query) for sequence, first, end in parts for query in range(first, end)]
        for query, result in zip(queries, zip(out, lse.T, strict=True), strict=True):
            first = seen.setdefault(query, result)
            assert torch.equal(result[0], first[0]), query
            assert torch.equal(result[1], first[1]), query


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("options", [{}, {"window_size": (150, 0), "sinks": torch.randn(4)}], ids=["plain", "window"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_paged_attention(arch, options):
    num_pages = 2 * (LENGTHS[0] // 16 + 1)
    caches = [normal(num_pages, 16, 2, 64) for _ in range(2)]
    tables, q = torch.randperm(num_pages).to(torch.int32).view(2, -1), normal(2, LENGTHS[0], 4, 64)

    def attend(parts):
        (rows,), cu_seqlens, longest, lengths, table = packed(parts, tables, [q], "cpu", spare=len(parts) - 1)
        queries = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": longest}
        more = {"batch_invariant": True, "return_lse": True} | options
        results = []
        for in_turn in (False, True):
            with short_splits(forward, in_turn), emulate(arch) as log:
                results.append(paged_attention(rows, *caches, lengths, table, **queries, **more))
            assert [launch.name for launch in log] == ["_paged_fwd_kernel", "_merge_kernel"][: 1 if in_turn else 2]
        (out, lse), (same_out, same_lse) = results
        assert torch.equal(out, same_out)
        assert torch.equal(lse, same_lse)
        return out, lse

    check_same_bits(attend, [CHUNK, *BATCHES])


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_mla_decode(arch, monkeypatch):
    """With room for all results of splits, and for those of one at a time."""
    monkeypatch.setattr(absorbed, "FIXED_KEYS", KEYS)
    num_pages = 2 * (LENGTHS[0] // 64 + 1)
    cache, tables = normal(num_pages, 64, 192), int32(*torch.randperm(num_pages)).view(2, -1)
    q_nope, q_pe = normal(2, LENGTHS[0], 16, 64), normal(2, LENGTHS[0], 16, 64)
    weights = [normal(16, 64, 128) / 128**0.5 for _ in range(2)]

    def attend(parts):
        queries, cu_seqlens, longest, lengths, table = packed(parts, tables, [q_nope, q_pe], "cpu", len(parts) - 1)
        options = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": longest, "return_lse": True}
        results = []
        for room in (1, 2**28):
            with mock.patch.object(absorbed, "MAX_WORKSPACE_BYTES", room), emulate(arch):
                forget_plans()
                results.append(mla_decode(*queries, cache, lengths, table, *weights, batch_invariant=True, **options))
        (out, lse), (same_out, same_lse) = results
        assert torch.equal(out, same_out)
        assert torch.equal(lse, same_lse)
        return out, lse

    check_same_bits(attend, [[(0, 270, 277)], *BATCHES])
    forget_plans()
