"""Matmuls on tiles that cp.async copied. On sm_90, Triton 3.6 needs our fence for them (_jit/workarounds.py).

Without it the values are right until a copy arrives late. So each call is repeated often: correct once, then the same.
"""

import pytest
import torch
from attention_cases import DEVICE
from scale import at_scale

from triton_attn import flash_attention, mla_decode, mla_prefill, paged_attention, reference
from triton_attn.mla.schedule import MODES

REPEATS = at_scale(300, 1)
SEQLEN = at_scale(1021, 20)
HEADS = at_scale(8, 2)


def normal(*shape):
    return torch.randn(shape, device=DEVICE).bfloat16()


def repeated(function, expected, *inputs):
    first = function(*inputs)
    in_fp64 = [x.double() if x.is_floating_point() else x for x in inputs]
    for got, right in zip(first, expected(*in_fp64), strict=True):
        torch.testing.assert_close(got.double(), right, atol=0.03, rtol=0.03)
    for _ in range(REPEATS):
        assert all(map(torch.equal, function(*inputs), first))


def test_flash_of_expanded_heads():
    """A stride of 0 cannot be in a tensor map."""

    def forward_and_backward(function, **options):
        def call(*inputs):
            *leaves, out_grad = (x.detach().requires_grad_() for x in inputs)
            out = function(*(x.expand(-1, -1, HEADS, -1) for x in leaves), causal=True, **options)
            return out, *torch.autograd.grad(out, leaves, out_grad)

        return call

    inputs = [normal(1, SEQLEN, 1, 128) for _ in range(3)]
    ours = forward_and_backward(flash_attention, deterministic=True)
    repeated(ours, forward_and_backward(reference.flash_attention), *inputs, normal(1, SEQLEN, HEADS, 128) / HEADS)


def paged_inputs(batch, page_size, *row):
    """(a cache, lengths, table)"""
    pages_each = -(-SEQLEN // page_size)
    table = torch.randperm(batch * pages_each, device=DEVICE).int().view(batch, -1)
    lengths = torch.full((batch,), SEQLEN, dtype=torch.int32, device=DEVICE)
    return normal(batch * pages_each, page_size, *row), lengths, table


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_chunk_over_pages(head_dim):
    keys, lengths, table = paged_inputs(3, 16, 2, head_dim)
    q = normal(3, at_scale(300, 5), 2 * HEADS, head_dim)

    def of(function):
        return lambda *inputs: [function(*inputs, causal=True)]

    repeated(of(paged_attention), of(reference.paged_attention), q, keys, torch.randn_like(keys), lengths, table)


@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_mla_decode_of_128_heads(seqlen_q):
    cache, lengths, table = paged_inputs(3, 64, 576)
    heads = at_scale(128, 2)
    q_nope, q_pe = normal(3, seqlen_q, heads, 512), normal(3, seqlen_q, heads, 64)

    def of(function):
        return lambda *inputs: [function(*inputs, softmax_scale=0.04, causal=True)]

    repeated(of(mla_decode), of(reference.mla_decode), q_nope, q_pe, cache, lengths, table)


@pytest.mark.parametrize("mode", MODES)
def test_mla_prefill(mode):
    inputs = [normal(1, SEQLEN, *rest) for rest in ((HEADS, 128), (HEADS, 64), (512,), (64,))]
    weights = [normal(HEADS, 128, 512) / 512**0.5 for _ in range(2)]
    right = lambda *inputs: [reference.mla_prefill(*inputs)]  # noqa: E731
    repeated(lambda *inputs: [mla_prefill(*inputs, mode=mode)], right, *inputs, *weights)
