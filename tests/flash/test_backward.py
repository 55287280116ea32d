"""The backward kernels against fp64 autograd of the definition, one example for each edge case."""

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_cases import (
    BIT_OF_EVERYTHING,
    DEVICE,
    HEAD_DIMS,
    INTERPRETED,
    WIDE_BIT_OF_EVERYTHING,
    far_apart,
    lying_far_apart,
    using,
)
from backward_cases import PLAIN, TILE, BackwardInputs, alike, check, gradients
from triton.runtime import interpreter

from triton_attn import flash_attention, reference
from triton_attn._host.gpu import repeats_rows
from triton_attn.dense.backward_configs import BackwardConfig
from triton_attn.flash.configs import FlashConfig
from triton_attn.testing import assert_close_to_reference

# Inputs contain NaN and infinity on purpose, and numpy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


both_schedules = pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@both_schedules
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim, deterministic):
    check(replace(PLAIN, head_dim=head_dim, head_dim_v=head_dim, deterministic=deterministic))


@pytest.mark.ci(but_each=6)
@pytest.mark.parametrize("use_tma", [False, True])
@pytest.mark.parametrize("num_warps", [4, 8], ids=["", "cut"])
@pytest.mark.parametrize(
    "head_dims",
    [(512, 512), (512, 256), (256, 512), (384, 384), (320, 128), (257, 300), (330, 352), (16, 511)],
    ids=str,
)
def test_wide_heads_with_a_bit_of_everything(head_dims, num_warps, use_tma):
    """dk and dv in launches of their own, or in one; with 8 warps in pieces that take the same shared memory."""
    case = replace(
        PLAIN,
        **WIDE_BIT_OF_EVERYTHING,
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
        dropout_p=0.2,
        tiles=alike(replace(TILE, block_m=64, block_n=64, num_warps=num_warps, use_tma=use_tma)),
        deterministic=False,
        dlse_layout="contiguous",
    )
    assert repeats_rows("interpreter", 64, num_warps) == (num_warps == 8)
    check(case)


@pytest.mark.oldest
@pytest.mark.emulated
@pytest.mark.parametrize("use_tma", [False, True], ids=["", "tma"])
@pytest.mark.parametrize("head_dims", [(512, 257), (300, 40), (24, 384)], ids=str)
def test_wide_heads_in_fp32(head_dims, use_tma):
    """Operands of matmuls are loaded in chunks of columns, never by TMA; dk and dv in one launch, or in two."""
    case = replace(PLAIN, **WIDE_BIT_OF_EVERYTHING, head_dim=head_dims[0], head_dim_v=head_dims[1], dropout_p=0.2)
    tiles = alike(replace(TILE, block_m=16, block_n=16, num_warps=8, use_tma=use_tma))
    check(replace(case, dtype=torch.float32, tiles=tiles, deterministic=False))


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.emulated
@pytest.mark.parametrize("head_dims", [(392, 392), (384, 264)], ids=str)
def test_tiles_whose_halves_are_loaded_twice(head_dims):
    """The default tiles of wide heads on sm_90."""
    rows, columns = (replace(TILE, block_m=m, block_n=n, num_warps=8, use_tma=True) for m, n in ((128, 64), (64, 128)))
    case = replace(PLAIN, **WIDE_BIT_OF_EVERYTHING, head_dim=head_dims[0], head_dim_v=head_dims[1], dropout_p=0.2)
    check(replace(case, dtype=torch.bfloat16, tiles=BackwardConfig(rows, columns, None)))


@pytest.mark.ci(but_each=5)
@pytest.mark.oldest
@both_schedules
@pytest.mark.parametrize("use_tma", [False, True])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.emulated), torch.bfloat16], ids=str)
def test_a_bit_of_everything(dtype, use_tma, deterministic):
    check(
        replace(
            PLAIN,
            **BIT_OF_EVERYTHING,
            dtype=dtype,
            sinks=dtype,
            dropout_p=0.2,
            tiles=alike(replace(TILE, use_tma=use_tma)),
            deterministic=deterministic,
            dlse_layout="contiguous",
        )
    )


@pytest.mark.ci
@pytest.mark.parametrize(
    ("num_heads_kv", "group_size", "head_dim", "options"),
    [
        pytest.param(1, 71, 64, {}, id="Falcon-7B"),
        pytest.param(2, 16, 128, {}, id="Qwen3-235B-A22B, two of four KV heads"),
        pytest.param(1, 2, 256, {"window_size": (20, -1)}, id="Gemma-3, one of four KV heads"),
        pytest.param(1, 8, 64, {"window_size": (20, -1), "sinks": torch.float16}, id="gpt-oss, one of eight KV heads"),
        pytest.param(4, 1, 192, {"head_dim_v": 128}, id="DeepSeek-V3, four of 128 heads"),
    ],
)
def test_heads_of_real_models(num_heads_kv, group_size, head_dim, options):
    shape = {"num_heads_kv": num_heads_kv, "group_size": group_size, "head_dim": head_dim, "head_dim_v": head_dim}
    check(replace(PLAIN, **shape | options))


@both_schedules
def test_rows_without_a_partner_have_no_gradient(deterministic):
    """Causal with more queries than keys, and a window that hides the first keys from all queries."""
    q, k, v = (torch.randn(1, rows, 2, 16, device=DEVICE, requires_grad=True) for rows in (5, 2, 2))
    out = flash_attention(q, k, v, causal=True, deterministic=deterministic)
    dq, _, _ = torch.autograd.grad(out, (q, k, v), torch.full_like(out, 1e30))
    assert (dq[:, :3] == 0).all()

    q, k, v = (torch.randn(1, rows, 2, 16, device=DEVICE, requires_grad=True) for rows in (2, 9, 9))
    out = flash_attention(q, k, v, window_size=(1, 0), deterministic=deterministic)
    _, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dk[:, :6] == 0).all()
    assert (dv[:, :6] == 0).all()
    assert (dv[:, 6:] != 0).all()


def test_a_sink_without_weight_has_no_gradient():
    """A sink of -inf, as where a model has none for a head: rows that see no key then have no weights at all."""
    q, k, v = (torch.randn(1, rows, 2, 16, device=DEVICE, requires_grad=True) for rows in (5, 2, 2))
    sinks = torch.tensor([float("-inf"), 0.5], device=DEVICE, requires_grad=True)
    out, lse = flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (lse[0, 0, :3] == float("-inf")).all()
    *_, dsinks = gradients = torch.autograd.grad(out.sum(), (q, k, v, sinks))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert dsinks[0] == 0
    assert dsinks[1] != 0


def gradients_at_scores(scores, deterministic, **options):
    """Gradients of q, k and v and the exact ones, for 33 queries with score scores[j] for key j. v and dout are
    random."""
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 33, 1, 16)
    q[..., 0] = 1
    k = torch.zeros(1, len(scores), 1, 16)
    k[0, :, 0, 0] = scores
    k[..., 1:] = torch.randn(1, len(scores), 1, 15, generator=generator)
    v = torch.randn(1, len(scores), 1, 16, generator=generator)
    dout = torch.randn(1, 33, 1, 16, generator=generator)
    leaves = [x.to(DEVICE).requires_grad_() for x in (q, k, v)]
    exact_leaves = [x.double().requires_grad_() for x in (q, k, v)]
    with using(TILE):
        out = flash_attention(*leaves, softmax_scale=1.0, deterministic=deterministic, **options)
        results = torch.autograd.grad(out, leaves, dout.to(DEVICE))
    exact = reference.flash_attention(*exact_leaves, softmax_scale=1.0, **options)
    return results, torch.autograd.grad(exact, exact_leaves, dout.double())


@pytest.mark.oldest
@both_schedules
@pytest.mark.parametrize("use_window", [False, True])
@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(torch.linspace(-500, -499, 47), id="far below 0"),
        pytest.param(torch.linspace(499, 500, 47), id="far above 0"),
        pytest.param(torch.linspace(-1e4, 1e4, 47), id="far apart"),
    ],
)
def test_large_scores_leave_no_nan(scores, use_window, deterministic):
    """The last tile extends beyond the last key, where a score of 0 would have the weight exp(500)."""
    options = {"window_size": (20, 3)} if use_window else {}
    for result, exact in zip(*gradients_at_scores(scores, deterministic, **options)):
        floor = 1e-4 * exact.abs().max().item() + 1e-6 * scores.abs().max().item()
        assert_close_to_reference(result, exact, floor=floor)


@both_schedules
def test_softcap_saturates(deterministic):
    scores = torch.cat([torch.linspace(-1e5, 1e5, 40), torch.linspace(-1, 1, 7)])
    results, exact = gradients_at_scores(scores, deterministic, softcap=3.0)
    for result, exact_there in zip(results, exact):
        assert_close_to_reference(result, exact_there, floor=1e-5 * exact_there.abs().max().item())
    _, dk, _ = results
    assert (dk[:, :19] == 0).all()


@pytest.mark.ci(but_each=3)
@both_schedules
@pytest.mark.parametrize("use_tma", [False, True])
def test_schedules_and_tiles_agree(use_tma, deterministic):
    q, k, v = (torch.randn(1, rows, 2, 48, device=DEVICE, requires_grad=True) for rows in (100, 130, 130))

    def gradients_with(block_m, block_n):
        with using(FlashConfig(block_m, block_n, 4, 1, use_tma)):
            out = flash_attention(q, k, v, causal=True, deterministic=deterministic)
            return torch.autograd.grad(out.square().sum(), (q, k, v))

    with using(TILE):
        out = flash_attention(q, k, v, causal=True, deterministic=True)
        expected = torch.autograd.grad(out.square().sum(), (q, k, v))
    for blocks in ((16, 128), (128, 16), (64, 64)):
        for gradient, gradient_there in zip(gradients_with(*blocks), expected):
            torch.testing.assert_close(gradient, gradient_there)


@contextlib.contextmanager
def programs_in_reverse():
    """On a GPU programs run in any order; the interpreter runs them in sequence."""
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx
    with mock.patch.object(builder, "set_grid_idx", lambda x, y, z: set_grid_idx(builder.grid_dim[0] - 1 - x, y, z)):
        yield


@pytest.mark.ci(but_each=2)
@both_schedules
def test_deterministic_repeats_bitwise(deterministic):
    q, k, v = (torch.randn(1, 200, heads, 32, device=DEVICE, requires_grad=True) for heads in (4, 2, 2))

    def gradients_again():
        with using(TILE):
            out = flash_attention(q, k, v, causal=True, deterministic=deterministic)
            return torch.autograd.grad(out.square().sum(), (q, k, v))

    expected = gradients_again()
    with programs_in_reverse() if INTERPRETED else contextlib.nullcontext():
        results = gradients_again()
    if deterministic:
        assert all(map(torch.equal, results, expected))
    elif INTERPRETED:
        assert not torch.equal(results[0], expected[0])  # the order of atomics matters, so the test can fail


@both_schedules
def test_gradients_are_contiguous_and_of_their_tensors_dtype(deterministic):
    case = replace(PLAIN, dtype=torch.bfloat16, layouts=("heads first", "sliced", "expanded"), sinks=torch.float32)
    inputs = BackwardInputs(replace(case, deterministic=deterministic))
    outputs, leaves = inputs.forward()
    for leaf, gradient in zip(leaves, gradients(outputs, leaves, (inputs.dout, None))):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        assert gradient.is_contiguous()


@pytest.mark.ci
@both_schedules
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@far_apart
def test_offsets_past_32_bits(which, dim, size, stride, deterministic):
    shape = [1, 3, 1, 16]
    shape[dim] = size
    names = ("q", "k", "v", "dout")
    tensors = {name: torch.randn(shape, dtype=torch.float32).to(DEVICE, torch.float16) for name in names}

    def gradients_of(q, k, v, dout):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(flash_attention(*leaves, deterministic=deterministic), leaves, dout)

    with using(replace(TILE, block_m=64, block_n=64)):
        expected = gradients_of(**tensors)
        tensors[which] = lying_far_apart(tensors[which].detach(), dim, stride)
        assert all(map(torch.equal, gradients_of(**tensors), expected))
