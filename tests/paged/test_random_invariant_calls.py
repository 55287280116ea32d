"""batch_invariant over random calls: each query alone, in chunks, and in other batches."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from invariance import short_splits
from invariance_draws import chunks
from paged_cases import DEVICE, DTYPES, Inputs
from paged_draws import cases

from triton_attn import paged_attention
from triton_attn.paged import forward

WAYS = st.sampled_from([None, True, False])  # of `short_splits`


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.random
@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_bits_of_random_calls(dtype, data):
    case = replace(data.draw(cases(dtype, True)), part=None)
    assume(any(case.seqlens_q) and not (case.key_shard and case.page_size is None))
    inputs = Inputs(case)
    with short_splits(forward, data.draw(WAYS)):
        outs, lses = attend(inputs, [(i, 0, n) for i, n in enumerate(case.seqlens_q)])
    # Drafts of a tree are numbered by the whole.
    chunk = chunks(case.seqlens_q, case.seqlens_k, causal=case.causal, whole=bool(case.tree))
    parts = data.draw(st.lists(chunk, min_size=1, max_size=3))
    counts = {end - first for _, first, end in parts}
    assume(any(counts))
    dense = len(counts) == 1 and data.draw(st.booleans())
    with short_splits(forward, data.draw(WAYS)):
        found = attend(inputs, parts, dense, spare=data.draw(st.sampled_from([0, 3, 90])))
    for (i, first, end), out, lse in zip(parts, *found, strict=True):
        assert torch.equal(out, outs[i][first:end])
        assert torch.equal(lse, lses[i][:, first:end])


def attend(inputs, parts, dense=False, spare=0):
    """(out, lse) of each of the parts. Spare rows follow the queries, and spare columns the table's."""
    case, options = inputs.case, dict(inputs.case.options)
    sequences, counts = [i for i, *_ in parts], [end - first for _, first, end in parts]
    starts = [0, *itertools.accumulate(case.seqlens_q)]
    q = torch.cat([inputs.q[starts[i] + first : starts[i] + end] for i, first, end in parts])
    lengths = [case.seqlens_k[i] - (case.seqlens_q[i] - end) for i, _, end in parts]
    caches, scales, table = [inputs.k_cache, inputs.v_cache], [inputs.k_scale, inputs.v_scale], None
    if case.page_size is None:
        caches = [
            x.view(torch.uint8)[sequences].view(x.dtype) if x.dtype.itemsize == 1 else x[sequences] for x in caches
        ]
        scales = [x[sequences] if getattr(x, "ndim", 0) == 3 else x for x in scales]
    else:
        table = torch.nn.functional.pad(inputs.block_table[sequences], (0, spare), value=2**31 - 1)
    if case.tree:
        options["tree_mask"] = torch.cat([inputs.bits[i] for i in sequences])
    if dense:
        q = q.unflatten(0, (len(parts), -1))
        if case.tree:
            options["tree_mask"] = options["tree_mask"].view(q.shape[:2])
    else:
        q = torch.cat([q, torch.randn(spare, *q.shape[1:]).to(q)])
        if case.tree:
            options["tree_mask"] = torch.cat([options["tree_mask"], options["tree_mask"].new_zeros(spare)])
        bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)
        options |= dict(cu_seqlens_q=bounds, max_seqlen_q=max(counts))
    slopes = inputs.alibi_slopes
    options["alibi_slopes"] = slopes[sequences] if case.alibi == "per sequence" else slopes
    options |= dict(k_scale=scales[0], v_scale=scales[1], sinks=inputs.sinks, key_shard=case.key_shard)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out, lse = paged_attention(q, *caches, lengths, table, batch_invariant=True, return_lse=True, **options)
    if dense:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    return out[: sum(counts)].split(counts), lse[:, : sum(counts)].split(counts, 1)
