"""batch_invariant over random calls of mla_decode: each query alone, in chunks, and in other batches."""

import contextlib
import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from decode_cases import DEVICE, DTYPES, Inputs
from decode_draws import cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from invariance import KEYS
from invariance_draws import chunks

from triton_attn import mla_decode
from triton_attn._host.tuned import forget_plans
from triton_attn.mla import absorbed

ROOMS = st.sampled_from([1, 2**21, 2**28])  # for partial results: of one split at a time, or of more


@contextlib.contextmanager
def short_splits(room):
    """Splits of KEYS keys, and as many bytes for partial results."""
    with mock.patch.object(absorbed, "FIXED_KEYS", KEYS), mock.patch.object(absorbed, "MAX_WORKSPACE_BYTES", room):
        forget_plans()
        yield
    forget_plans()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.random
@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_bits_of_random_calls(dtype, data):
    case = replace(data.draw(cases(dtype)), part=None)
    longer = data.draw(st.sampled_from([0, KEYS, 2 * KEYS + 5]))  # of several splits
    case = replace(case, seqlens_k=tuple(n + longer * (n > 0) for n in case.seqlens_k))
    assume(any(case.lengths_q))
    inputs = Inputs(case)
    whole = [(i, 0, n) for i, n in enumerate(case.lengths_q)]
    outs, lses = zip(*(part for i in whole for part in attend(inputs, [i], True, room=data.draw(ROOMS))))
    # Drafts of a tree are numbered by the whole.
    chunk = chunks(case.lengths_q, case.seqlens_k, causal=case.causal, whole=bool(case.tree))
    parts = data.draw(st.lists(chunk, min_size=1, max_size=3))
    counts = {end - first for _, first, end in parts}
    assume(any(counts))
    dense = len(counts) == 1 and (bool(case.rotary_dim) or data.draw(st.booleans()))
    assume(dense or not case.rotary_dim)  # rotations are of queries that are not packed
    spare = data.draw(st.sampled_from([0, 3, 90]))
    found = attend(inputs, parts, dense, spare, data.draw(ROOMS))
    for (i, first, end), (out, lse) in zip(parts, found, strict=True):
        assert torch.equal(out, outs[i][first:end])
        assert torch.equal(lse, lses[i][:, first:end])


def attend(inputs, parts, dense, spare=0, room=2**28):
    """(out, lse) of each of the parts. Spare rows follow packed queries, and spare columns the table's."""
    case, options = inputs.case, {}
    sequences, counts = [i for i, *_ in parts], [end - first for _, first, end in parts]

    def rows_of(x):
        """(tokens, ...) of the parts."""
        return torch.cat([x[inputs.places[i]][first:end] for i, first, end in parts])

    queries = [rows_of(inputs.q_nope), rows_of(inputs.q_pe)]
    tree_mask = [rows_of(inputs.bits)] if case.tree else []
    if dense:
        queries = [x.unflatten(0, (len(parts), counts[0])) for x in queries]
        tree_mask = [x.view(len(parts), counts[0]) for x in tree_mask]
    else:
        queries = [torch.cat([x, x.new_ones(spare, *x.shape[1:])]) for x in queries]
        tree_mask = [torch.cat([x, x.new_zeros(spare)]) for x in tree_mask]
        bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)
        options |= dict(cu_seqlens_q=bounds, max_seqlen_q=max(counts))
    if tree_mask:
        options["tree_mask"] = tree_mask[0]
    lengths = [case.seqlens_k[i] - (case.lengths_q[i] - end) for i, _, end in parts]
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    table = torch.nn.functional.pad(inputs.block_table[sequences], (0, spare), value=2**31 - 1)
    weights = inputs.w_uk, inputs.w_uv
    options |= dict(causal=case.causal, softmax_scale=inputs.softmax_scale, key_shard=case.key_shard)
    options |= inputs.rope | inputs.scales
    with short_splits(room):
        call = dict(batch_invariant=True, return_lse=True) | options
        out, lse = mla_decode(*queries, inputs.cache, lengths, table, *weights, **call)
    if dense:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    total = sum(counts)
    return list(zip(out[:total].split(counts), lse[:, :total].split(counts, 1)))
