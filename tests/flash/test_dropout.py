"""Dropout: the mask, inferred from the kernels' results, equals `reference.dropout_mask` in every weight."""

import itertools
import math

import pytest
import torch
from attention_cases import DEVICE, using

from triton_attn import flash_attention, flash_attention_varlen, reference
from triton_attn._host.definition import visible_keys
from triton_attn.flash.configs import FlashConfig
from triton_attn.flash.reference import _philox

P = 0.3
SEED = 12345
TILES = [FlashConfig(m, n, 4, 1, use_tma) for m, n, use_tma in ((16, 64, False), (64, 16, True), (128, 32, False))]
MASKS = [{"causal": True}, {"window_size": (13, 5)}]


def one_hot(batch, seqlen, num_heads):
    return torch.eye(seqlen, device=DEVICE)[None, :, None].repeat(batch, 1, num_heads, 1)


def even_inputs(seqlen_q, seqlen_k, batch=1, num_heads_q=1, num_heads_kv=1):
    """q, k, v with equal scores and one-hot values: out is the row of weights."""
    q = torch.ones(batch, seqlen_q, num_heads_q, seqlen_k, device=DEVICE)
    return q, one_hot(batch, seqlen_k, num_heads_kv), one_hot(batch, seqlen_k, num_heads_kv)


def expected_weights(seed, p, batch, num_heads, seqlen_q, seqlen_k, causal=False, window_size=(-1, -1)):
    """The weights (batch, seqlen_q, num_heads, seqlen_k) for equal scores."""
    keep = reference.dropout_mask(seed, p, batch, num_heads, seqlen_q, seqlen_k).to(DEVICE)
    visible, _ = visible_keys(seqlen_q, seqlen_k, causal, window_size, DEVICE)
    weights = visible / visible.sum(1, keepdim=True).clamp(min=1) / (1 - p)
    return (keep * weights).transpose(1, 2)


def assert_same_mask(out, weights):
    assert torch.equal(out != 0, weights != 0)
    torch.testing.assert_close(out, weights)


@pytest.mark.ci(but_each=7)
@pytest.mark.oldest
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("options", MASKS, ids=str)
def test_every_kernel_sees_the_mask_of_the_reference(tile, options):
    q, k, v = (x.requires_grad_() for x in even_inputs(40, 70, batch=2, num_heads_q=4, num_heads_kv=2))
    weights = expected_weights(SEED, P, 2, 4, 40, 70, **options)
    dout = torch.rand_like(weights) + 1
    # The gradient of a score is weights * (dout - delta), and this gradient of lse cancels delta.
    dlse = (weights * dout).sum(-1).transpose(1, 2)
    ds = weights * dout * 70**-0.5
    for deterministic in (False, True):
        with using(tile):
            out, lse = flash_attention(
                q, k, v, dropout_p=P, dropout_seed=SEED, deterministic=deterministic, return_lse=True, **options
            )
            dq, dk, dv = torch.autograd.grad([out, lse], [q, k, v], [dout, dlse])
        assert_same_mask(out, weights)
        torch.testing.assert_close(dq, ds)
        of_group = torch.einsum("bihgj,bihgd->bjhd", ds.unflatten(2, (2, 2)), torch.ones_like(q).unflatten(2, (2, 2)))
        torch.testing.assert_close(dk, of_group)
        of_group = torch.einsum("bihgj,bihgd->bjhd", weights.unflatten(2, (2, 2)), dout.unflatten(2, (2, 2)))
        torch.testing.assert_close(dv, of_group)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_packed_sequences_count_their_own_queries_and_keys(tile):
    seqlens = ((20, 33), (0, 7), (31, 5), (50, 50))
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE) for lengths in zip(*seqlens)
    )
    q = torch.ones(101, 2, 50, device=DEVICE)
    k = torch.cat([torch.eye(50, device=DEVICE)[:seqlen_k, None] for _, seqlen_k in seqlens])
    with using(tile):
        out = flash_attention_varlen(
            q, k, k, cu_seqlens_q, cu_seqlens_k, 50, 50, window_size=(9, 9), dropout_p=P, dropout_seed=SEED
        )
    for i, (seqlen_q, seqlen_k) in enumerate(seqlens):
        rows = slice(cu_seqlens_q[i], cu_seqlens_q[i + 1])
        weights = expected_weights(SEED, P, i + 1, 2, seqlen_q, seqlen_k, window_size=(9, 9))[i]
        assert_same_mask(out[rows, :, :seqlen_k], weights)
        assert (out[rows, :, seqlen_k:] == 0).all()


@pytest.mark.parametrize("p", [1e-12, 0.01, 0.5, 0.999, 1 - 2**-24])
def test_rates(p):
    out = flash_attention(*even_inputs(40, 100), dropout_p=p, dropout_seed=SEED)
    assert_same_mask(out, expected_weights(SEED, p, 1, 1, 40, 100))


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1, 2**32, SEED])
def test_seeds(seed):
    q, k, v = even_inputs(30, 50)
    out = flash_attention(q, k, v, dropout_p=P, dropout_seed=seed)
    assert_same_mask(out, expected_weights(seed, P, 1, 1, 30, 50))
    for shape in ((), (1,), (1, 1)):
        as_tensor = torch.full(shape, seed, dtype=torch.int64, device=DEVICE)
        assert torch.equal(flash_attention(q, k, v, dropout_p=P, dropout_seed=as_tensor), out)
        assert torch.equal(
            reference.dropout_mask(as_tensor, P, 1, 1, 30, 50), reference.dropout_mask(seed, P, 1, 1, 30, 50)
        )


def test_both_words_of_the_seed_count():
    masks = [reference.dropout_mask(seed, P, 1, 1, 30, 50) for seed in (0, 1, 2**32, -1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


def test_without_a_seed_torch_draws_one():
    q, k, v = even_inputs(30, 50)

    def masks():
        torch.manual_seed(7)
        return [flash_attention(q, k, v, dropout_p=P) != 0 for _ in range(3)]

    first, second, third = masks()
    assert all(map(torch.equal, (first, second, third), masks()))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_torch_draws_nothing_that_is_not_needed():
    q, k, v = even_inputs(30, 50)
    torch.manual_seed(7)
    expected = torch.rand(1, device=DEVICE)
    torch.manual_seed(7)
    flash_attention(q, k, v)
    flash_attention(q, k, v, dropout_p=P, dropout_seed=SEED)
    assert torch.equal(torch.rand(1, device=DEVICE), expected)


def test_kernel_and_reference_draw_the_same_seed(monkeypatch):
    outs = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
        torch.manual_seed(7)
        outs.append(flash_attention(*even_inputs(30, 50), dropout_p=P))
    assert_same_mask(*outs)


def test_a_seed_tensor_is_read_by_the_kernel():
    """A CUDA graph draws a new mask at replay if the graph changes the seed."""
    q, k, v = even_inputs(30, 50)
    seed = torch.tensor([SEED], device=DEVICE)
    flash_attention(q, k, v, dropout_p=P, dropout_seed=seed)
    seed += 1
    out = flash_attention(q, k, v, dropout_p=P, dropout_seed=seed)
    assert_same_mask(out, expected_weights(SEED + 1, P, 1, 1, 30, 50))


def test_lse_is_that_of_the_undropped_softmax():
    q, k, v = (torch.randn(1, 70, 2, 16, device=DEVICE) for _ in range(3))
    out, lse = flash_attention(q, k, v, return_lse=True)
    dropped_out, dropped_lse = flash_attention(q, k, v, dropout_p=P, dropout_seed=SEED, return_lse=True)
    torch.testing.assert_close(dropped_lse, lse, atol=1e-5, rtol=0)  # of another kernel, with other fused ops
    assert not torch.equal(dropped_out, out)


def test_no_dropout_whatever_the_seed():
    q, k, v = (torch.randn(1, 70, 2, 16, device=DEVICE) for _ in range(3))
    assert torch.equal(flash_attention(q, k, v, dropout_p=0, dropout_seed=SEED), flash_attention(q, k, v))


def test_a_query_that_loses_all_its_keys():
    p, seqlen = 0.9, 4
    q, k, v = (torch.randn(1, seqlen, 8, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    lost = ~reference.dropout_mask(SEED, p, 1, 8, seqlen, seqlen).any(3).transpose(1, 2).to(DEVICE)
    assert lost.any()
    out = flash_attention(q, k, v, dropout_p=p, dropout_seed=SEED)
    gradients = torch.autograd.grad(out.sum(), [q, k, v])
    assert (out[lost] == 0).all()
    assert (gradients[0][lost] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("shard", [None, [[0, 0, 0]]], ids=["whole", "shard"])
def test_a_word_that_equals_the_threshold_keeps_its_weight(shard):
    """And one that is below by 1 does not: p is that of the word of key 0, and the next larger one."""
    (word,) = [int(word) >> 1 for word in _philox(SEED, *map(torch.tensor, (0, 0, 0, 0)))[:1]]
    q, k, v = even_inputs(1, 1)
    shard = None if shard is None else torch.tensor(shard, dtype=torch.int32, device=DEVICE)
    for threshold, is_kept in ((word, True), (word + 1, False)):
        p = threshold / 2**31
        assert reference.dropout_mask(SEED, p, 1, 1, 1, 1).item() == is_kept
        out = flash_attention(q, k, v, dropout_p=p, dropout_seed=SEED, shard=shard)
        torch.testing.assert_close(out.item(), 1 / (1 - p) if is_kept else 0.0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_weights_are_dropped_at_their_rate_and_independently(p):
    keep = reference.dropout_mask(SEED, p, 2, 8, 128, 128).double()
    assert_mean_of_bernoulli(keep, 1 - p)
    # The product of two independent draws has the product of their means: neighbours in each of the four directions,
    # and the words of one Philox call.
    for dim in range(4):
        size = keep.shape[dim]
        assert_mean_of_bernoulli(keep.narrow(dim, 0, size - 1) * keep.narrow(dim, 1, size - 1), (1 - p) ** 2)
    words = keep.unflatten(3, (-1, 4))
    for a, b in itertools.combinations(range(4), 2):
        assert_mean_of_bernoulli(words[..., a] * words[..., b], (1 - p) ** 2)
    other = reference.dropout_mask(SEED + 1, p, 2, 8, 128, 128)
    assert_mean_of_bernoulli(keep * other, (1 - p) ** 2)


def assert_mean_of_bernoulli(draws, mean):
    """Within five standard deviations. Neighbouring products share a factor, which at most doubles the variance."""
    deviation = math.sqrt(2 * mean * (1 - mean) / draws.numel())
    assert abs(draws.mean().item() - mean) < 5 * deviation


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_words_that_its_authors_published(counter, key, words):
    assert tuple(int(word) for word in _philox(key, *map(torch.tensor, counter))) == words


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": -0.1}, ValueError, r"dropout_p: expected 0 <= dropout_p < 1, got -0.1"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected 0 <= dropout_p < 1, got 1.0"),
        ({"dropout_p": 17}, ValueError, r"dropout_p: .* got 17"),
        ({"dropout_p": math.nan}, ValueError, r"dropout_p: expected a finite number, got nan"),
        ({"dropout_p": math.inf}, ValueError, r"dropout_p: expected a finite number, got inf"),
        ({"dropout_p": "0.1"}, TypeError, r"dropout_p: expected a number, got str"),
        ({"dropout_p": None}, TypeError, r"dropout_p: expected a number, got NoneType"),
        ({"dropout_seed": 1.0}, TypeError, r"dropout_seed: expected an int or a tensor, got float"),
        ({"dropout_seed": True}, TypeError, r"dropout_seed: expected an int or a tensor, got bool"),
        ({"dropout_seed": 2**63}, ValueError, r"dropout_seed: expected a 64-bit integer, got 9223372036854775808"),
        ({"dropout_seed": torch.tensor([1], dtype=torch.int32)}, TypeError, r"dropout_seed: .*int64, got torch.int32"),
        ({"dropout_seed": torch.tensor([1.0])}, TypeError, r"dropout_seed: .*int64, got torch.float32"),
        ({"dropout_seed": torch.tensor([1, 2])}, ValueError, r"dropout_seed: expected one element, got shape \(2,\)"),
        ({"dropout_seed": torch.zeros(0).long()}, ValueError, r"dropout_seed: expected one element, got shape \(0,\)"),
        (
            {"dropout_seed": torch.zeros(1, device="meta").long()},
            ValueError,
            r"dropout_seed: expected q's device .* meta",
        ),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message):
    q = torch.randn(1, 3, 2, 16, device=DEVICE)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    with pytest.raises(error, match=message):
        flash_attention(q, q, q, **options)
    with pytest.raises(error, match=message):
        flash_attention_varlen(q[0], q[0], q[0], cu_seqlens, cu_seqlens, 3, 3, **options)
