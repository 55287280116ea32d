"""batch_invariant in mla_decode: a query's bits do not depend on what else is in the batch."""

from unittest import mock

import pytest
import torch
from decode_cases import DEVICE, Case, Inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from invariance import KEYS, packed
from invariance_draws import batches

from triton_attn import mla_decode, reference
from triton_attn._host.tuned import forget_plans
from triton_attn.mla import absorbed

LENGTHS = 3 * KEYS + 21, KEYS, 40
CASES = {
    "weights": {},
    "latent vectors": dict(with_uk=False, with_uv=False, softmax_scale=0.1),
    "fp8": dict(is_fp8=True, kv_lora_rank=128, page_size=64),
    "a rank": dict(key_shard=(1, 2, 8)),
    "numbers as scales": dict(cache_dtype=torch.float8_e4m3fn, k_scale=0.5, k_pe_scale=2.0),
    "tensors as scales": dict(cache_dtype=torch.float8_e5m2, k_scale=0.5, k_pe_scale=2.0, scale_tensors=True),
    "fp8 of a rank": dict(is_fp8=True, kv_lora_rank=128, page_size=64, key_shard=(2, 3, 4)),
}


@pytest.fixture
def short_splits(monkeypatch):
    """Splits of KEYS keys; room for the partial results of two at a time, or of one."""
    monkeypatch.setattr(absorbed, "FIXED_KEYS", KEYS)
    forget_plans()
    yield
    forget_plans()


class Pool:
    """Queries and cached rows of whole prompts."""

    def __init__(self, **options):
        self.inputs = Inputs(Case(seqlens_k=LENGTHS, seqlen_q=max(LENGTHS), num_heads=20, **options))
        self.outs, self.lses = zip(*(self.attend([(i, 0, n)]) for i, n in enumerate(LENGTHS)))

    def call(self, function, parts, spare=0, **options):
        inputs = self.inputs
        queries, cu_seqlens, longest, lengths, table = packed(
            parts, inputs.block_table, (inputs.q_nope, inputs.q_pe), DEVICE, spare
        )
        cache = inputs.cache, lengths, table, inputs.w_uk, inputs.w_uv
        options |= dict(cu_seqlens_q=cu_seqlens, max_seqlen_q=longest, softmax_scale=inputs.softmax_scale)
        options |= dict(key_shard=inputs.case.key_shard, **inputs.scales)
        return function(*queries, *cache, return_lse=True, **options)

    def attend(self, parts, spare=0):
        return self.call(mla_decode, parts, spare, batch_invariant=True)


@pytest.mark.random
@pytest.mark.ci(but_each=3)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_batch(name, short_splits):
    pool = Pool(**CASES[name])

    @settings(settings(), deadline=None, max_examples=4)
    @given(batches(LENGTHS), st.sampled_from([1, 2**21, 2**28]))
    def run(batch, workspace):
        parts, spare = batch
        with mock.patch.object(absorbed, "MAX_WORKSPACE_BYTES", workspace):
            out, lse = pool.attend(parts, spare)
        assert torch.equal(out, torch.cat([pool.outs[i][first:end] for i, first, end in parts]))
        assert torch.equal(lse, torch.cat([pool.lses[i][:, first:end] for i, first, end in parts], 1))

    run()
    out, lse = pool.call(reference.mla_decode, parts=[(i, 0, n) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(torch.cat(pool.outs), out, atol=8e-3, rtol=8e-3)
    torch.testing.assert_close(torch.cat(pool.lses, 1), lse, atol=1e-3, rtol=1e-3)


def test_rotated_bits_do_not_depend_on_the_batch(short_splits):
    """Rotations are of queries that are not packed."""
    inputs = Inputs(Case(seqlens_k=LENGTHS, seqlen_q=3, num_heads=20, rotary_dim=16))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)

    def attend(rows):
        of_rows = (x[rows] for x in (inputs.q_nope, inputs.q_pe, inputs.block_table, lengths))
        q_nope, q_pe, table, seqlens = of_rows
        cache = inputs.cache, seqlens, table, inputs.w_uk, inputs.w_uv
        return mla_decode(q_nope, q_pe, *cache, **inputs.rope, batch_invariant=True, return_lse=True)

    wanted = attend([0, 1, 2])
    for rows in ([1], [2, 0], [0, 0, 1, 2, 1]):
        for found, whole in zip(attend(rows), wanted):
            assert torch.equal(found, whole[rows])


def test_a_table_without_pages():
    """Whose sequences have no key."""
    q_nope, q_pe = (torch.randn(2, 3, 4, dim, device=DEVICE) for dim in (64, 16))
    cache = torch.randn(5, 16, 80, device=DEVICE)
    lengths, table = (
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
        torch.zeros(2, 0, dtype=torch.int32, device=DEVICE),
    )
    options = dict(softmax_scale=0.1, batch_invariant=True, return_lse=True)
    out, lse = mla_decode(q_nope, q_pe, cache, lengths, table, **options)
    assert not out.any()
    assert (lse == float("-inf")).all()
