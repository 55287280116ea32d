"""Both forms of latent attention are equal, and a paged cache does not change the result."""

import pytest
import torch

from triton_attn import mla_softmax_scale
from triton_attn._host.definition import rotate
from triton_attn.mla import reference

HEADS, NOPE, ROPE, RANK, VALUE = 3, 8, 4, 16, 6


def inputs(batch, seqlen_q, seqlen_k):
    torch.manual_seed(0)
    shapes = [(batch, seqlen_q, HEADS, NOPE), (batch, seqlen_q, HEADS, ROPE), (batch, seqlen_k, RANK)]
    shapes += [(batch, seqlen_k, ROPE), (HEADS, NOPE, RANK), (HEADS, VALUE, RANK)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 9), (7, 7), (4, 2), (3, 0)])
def test_absorbed_is_the_definition(seqlen_q, seqlen_k, causal):
    tensors = inputs(2, seqlen_q, seqlen_k)
    out, lse = reference.mla_prefill(*tensors, causal=causal, return_lse=True)
    absorbed, absorbed_lse = reference.mla_prefill(*tensors, causal=causal, mode="absorbed", return_lse=True)
    torch.testing.assert_close(absorbed, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(absorbed_lse, lse, rtol=0, atol=1e-12)


def test_packed_sequences_are_dense_ones():
    tensors = inputs(1, 8, 12)
    bounds_q, bounds_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 8], [0, 5, 6, 12]))
    packed = [x[0] for x in tensors[:4]]
    out, lse = reference.mla_prefill(
        *packed, *tensors[4:], cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k, return_lse=True
    )
    q_nope, q_pe, latent, k_pe = tensors[:4]
    alone = reference.mla_prefill(q_nope[:, 3:8], q_pe[:, 3:8], latent[:, 6:12], k_pe[:, 6:12], *tensors[4:])
    torch.testing.assert_close(out[3:8], alone[0], rtol=0, atol=1e-12)
    assert lse.shape == (HEADS, 8)


@pytest.mark.parametrize("weights", [True, False], ids=["with weights", "latent"])
def test_decode_reads_the_pages_of_each_sequence(weights):
    q_nope, q_pe, latent, k_pe, w_uk, w_uv = inputs(2, 2, 9)
    cache = torch.full((8, 4, RANK + ROPE), float("nan"), dtype=torch.float64)
    table = torch.tensor([[5, 0, 7], [2, 6, 2147480000]], dtype=torch.int32)
    seqlens = torch.tensor([9, 6], dtype=torch.int32)
    for i, seqlen in enumerate(seqlens.tolist()):
        for j in range(seqlen):
            cache[table[i, j // 4], j % 4] = torch.cat([latent[i, j], k_pe[i, j]])
    scale = mla_softmax_scale(NOPE, ROPE)
    if weights:
        out = reference.mla_decode(q_nope, q_pe, cache, seqlens, table, w_uk, w_uv)
    else:
        absorbed = torch.einsum("bihn,hnc->bihc", q_nope, w_uk)
        out = reference.mla_decode(absorbed, q_pe, cache, seqlens, table, softmax_scale=scale)
        out = torch.einsum("bihc,hvc->bihv", out, w_uv)
    for i, seqlen in enumerate(seqlens.tolist()):
        rows = slice(i, i + 1)
        dense = q_nope[rows], q_pe[rows], latent[rows, :seqlen], k_pe[rows, :seqlen], w_uk, w_uv
        torch.testing.assert_close(out[rows], reference.mla_prefill(*dense), rtol=0, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_lengths_and_depends_on_distance_alone(interleaved):
    x = torch.randn(1, 1, ROPE, dtype=torch.float64).expand(6, 1, ROPE)
    angles = torch.arange(6, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    rotated = rotate(x, angles.cos()[:, None], angles.sin()[:, None], interleaved)[:, 0]
    products = rotated @ rotated.T
    torch.testing.assert_close(products.diagonal(), x.square().sum(-1)[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(products.diagonal(1), products[0, 1].expand(5), rtol=0, atol=1e-12)
    assert not torch.allclose(products[0, 1], products[0, 0])


@pytest.mark.parametrize(
    ("arguments", "scale"),
    [
        ((128, 64, 40, 1), 0.135234),
        ((128, 64, 40, 0.707), 0.114721),
        ((128, 64), 192**-0.5),
        ((128, 64, 1, 1), 192**-0.5),
    ],
)
def test_scale(arguments, scale):
    assert mla_softmax_scale(*arguments) == pytest.approx(scale, abs=5e-7)


def test_scale_names_what_is_wrong():
    with pytest.raises(TypeError, match="qk_rope_head_dim"):
        mla_softmax_scale(128, 64.0)
    with pytest.raises(ValueError, match="rope_factor"):
        mla_softmax_scale(128, 64, float("nan"))
    with pytest.raises(ValueError, match="qk_nope_head_dim"):
        mla_softmax_scale(0, 0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_decode_rotates_queries_to_their_places_at_the_end(interleaved):
    q_nope, q_pe, latent, k_pe, w_uk, w_uv = inputs(1, 2, 9)
    angles = torch.randn(9, ROPE // 2, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    cache = torch.cat([latent, k_pe], dim=-1)  # one page of 9 tokens
    seqlens, table = torch.tensor([9], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    arguments = cache, seqlens, table, w_uk, w_uv
    angles_given = {"rope_cos": cos, "rope_sin": sin, "rope_interleaved": interleaved}
    out = reference.mla_decode(q_nope, q_pe, *arguments, **angles_given)
    rotated = rotate(q_pe[0], cos[7:, None], sin[7:, None], interleaved)[None]
    torch.testing.assert_close(out, reference.mla_decode(q_nope, rotated, *arguments), rtol=0, atol=1e-12)
