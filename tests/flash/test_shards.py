"""Parts of a longer self-attention: with their positions they mask, bias and drop as the whole call does."""

from dataclasses import replace

import attention_cases
import backward_cases
import pytest
import torch
from attention_cases import DEVICE

import triton_attn as ta
from triton_attn import reference

# Query after key, key after query, equal, and key positions at which no group of four keys begins.
SHARDS = [(60, 0, 0), (0, 13, 2), (31, 31, 5), (70, 22, 1)]
MASKS = [
    {"causal": False},
    {"causal": True},
    {"causal": False, "window_size": (9, 4)},
    {"causal": True, "window_size": (20, -1), "alibi": "per sequence", "softcap": 3.0, "sinks": torch.float32},
    {"causal": True, "dropout_p": 0.3},
]


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: ", ".join(mask))
def test_forward(mask, varlen):
    lengths = {"seqlens_q": (33,) * 4, "seqlens_k": (50,) * 4}
    if varlen:
        lengths = {"seqlens_q": (33, 1, 0, 40), "seqlens_k": (47, 0, 9, 65), "spare_rows": 5}
    attention_cases.check(replace(attention_cases.PLAIN, varlen=varlen, shards=tuple(SHARDS), **lengths, **mask))


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: ", ".join(mask))
def test_backward(mask, varlen, deterministic):
    lengths = {"seqlens_q": (33,) * 4, "seqlens_k": (50,) * 4}
    if varlen:
        lengths = {"seqlens_q": (33, 1, 0, 40), "seqlens_k": (47, 0, 9, 65), "spare_rows": 5}
    case = replace(backward_cases.PLAIN, varlen=varlen, deterministic=deterministic, **mask)
    backward_cases.check(replace(case, shards=tuple(SHARDS), **lengths))


def whole_call(**options):
    """q, k, v of 2 sequences of 96 rows, 4 heads and 2 KV heads, options, and the whole call's out."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 96, heads, 32, generator=generator).to(DEVICE) for heads in (4, 2, 2))
    return (q, k, v), reference.flash_attention(q, k, v, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window_size": (32, -1)},
        {"window_size": (30, 5)},
        pytest.param({"window_size": (32, 6), "dropout_p": 0.4, "dropout_seed": 7}, marks=pytest.mark.emulated),
    ],
    ids=", ".join,
)
def test_rows_and_heads_of_a_whole_call(options):
    """One shard has all keys that its queries see, and half of the heads."""
    (q, k, v), whole = whole_call(**options)
    rows, keys, heads = slice(37, 64), slice(5, 70), slice(2, 4)
    shard = torch.tensor([[37, 5, 0 * 4 + 2], [37, 5, 1 * 4 + 2]], dtype=torch.int32, device=DEVICE)
    part = ta.flash_attention(q[:, rows, heads], k[:, keys, 1:], v[:, keys, 1:], shard=shard, **options)
    torch.testing.assert_close(part, whole[:, rows, heads], atol=2e-5, rtol=2e-5)
    same = reference.flash_attention(q[:, rows, heads], k[:, keys, 1:], v[:, keys, 1:], shard=shard, **options)
    torch.testing.assert_close(same, whole[:, rows, heads], atol=2e-5, rtol=2e-5)


def test_keys_in_three_parts_merge_to_the_whole():
    options = {"causal": True, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4], device=DEVICE)}
    (q, k, v), whole = whole_call(**options)
    parts = []
    for start, end in ((0, 31), (31, 34), (34, 96)):
        shard = torch.tensor([[0, start, 0]] * 2, dtype=torch.int32, device=DEVICE)
        keys = k[:, start:end], v[:, start:end]
        parts.append(ta.flash_attention(q, *keys, shard=shard, return_lse=True, **options))
    merged, _ = ta.merge_attention(*(torch.stack(part) for part in zip(*parts)))
    torch.testing.assert_close(merged, whole, atol=2e-5, rtol=2e-5)


def test_positions_at_the_end_of_the_longest_sequence():
    """Positions near 10**9 with windows: their sums fit 32 bits."""
    shard = torch.tensor([[10**9 - 40, 10**9 - 60, 0]], dtype=torch.int32, device=DEVICE)
    at_start = torch.tensor([[20, 0, 0]], dtype=torch.int32, device=DEVICE)
    q, k, v = (torch.randn(1, 40, 2, 32, device=DEVICE) for _ in range(3))
    for window_size in ((-1, -1), (7, 3), (2**31 - 1, 2**31 - 1), (2**31 - 1, 0)):
        far = ta.flash_attention(q, k, v, shard=shard, window_size=window_size)
        near = ta.flash_attention(q, k, v, shard=at_start, window_size=window_size)
        torch.testing.assert_close(far, near, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("shard", "error", "said"),
    [
        ([[0, 0, 0]], TypeError, "shard: expected a tensor or None, got list"),
        (torch.zeros(1, 3), TypeError, "shard: expected dtype torch.int32, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int32), ValueError, r"shard: expected shape \(batch, 3\) = \(1, 3\)"),
        (torch.zeros(3, 1, dtype=torch.int32).T.expand(1, 3), None, ""),
        (torch.zeros(1, 6, dtype=torch.int32)[:, ::2], ValueError, "shard: expected a contiguous tensor"),
    ],
)
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "packed"])
def test_errors(shard, error, said, varlen):
    shard = shard.to(DEVICE) if isinstance(shard, torch.Tensor) else shard
    x = torch.randn(1, 5, 2, 16, device=DEVICE)
    offsets = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)

    def call():
        if varlen:
            return ta.flash_attention_varlen(x[0], x[0], x[0], offsets, offsets, 5, 5, shard=shard)
        return ta.flash_attention(x, x, x, shard=shard)

    if error is None:
        call()
    else:
        with pytest.raises(error, match=said):
            call()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("grads", [False, True], ids=["plain", "differentiated"])
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[0, 0, 0], [-1, 0, 0]], r"shard\[1\], first query: expected 0 to 1000000000, got -1"),
        ([[0, 10**9 + 1, 0], [0, 0, 0]], r"shard\[0\], first key: expected 0 to 1000000000, got 1000000001"),
        ([[0, 0, -5], [0, 0, 0]], r"shard\[0\], first head: expected 0 to 2147483647, got -5"),
    ],
)
def test_values_are_checked_where_that_is_wanted(values, said, varlen, grads, backend, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    shard = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    x = torch.randn(2, 5, 2, 16, device=DEVICE, requires_grad=grads)
    offsets = torch.tensor([0, 5, 10], dtype=torch.int32, device=DEVICE)
    inputs, function = [x] * 3, ta.flash_attention
    if varlen:
        inputs, function = [*[x.flatten(0, 1)] * 3, offsets, offsets, 5, 5], ta.flash_attention_varlen
    with pytest.raises(ValueError, match=said):
        function(*inputs, shard=shard)
