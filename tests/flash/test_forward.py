"""The forward kernel against its definition, one readable example for each convention."""

import itertools
import math
from dataclasses import replace

import hopper_cases
import pytest
import torch
from attention_cases import (
    BIT_OF_EVERYTHING,
    DEVICE,
    DTYPES,
    HEAD_DIMS,
    INTERPRETED,
    PLAIN,
    WIDE_BIT_OF_EVERYTHING,
    check,
    far_apart,
    lying_far_apart,
    using,
)

from triton_attn import flash_attention, flash_attention_varlen
from triton_attn._host.gpu import repeats_rows
from triton_attn.flash import forward
from triton_attn.flash.configs import HOPPER_HEAD_DIMS, FlashConfig
from triton_attn.toolchain import guard

# Inputs contain NaN and infinity on purpose, and numpy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts the accesses of interpreted kernels")


@pytest.mark.oldest
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim):
    check(replace(PLAIN, head_dim=head_dim, head_dim_v=head_dim))


@pytest.mark.ci(but_each=5)
@pytest.mark.emulated
@pytest.mark.oldest
@pytest.mark.parametrize("use_tma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bit_of_everything(dtype, use_tma):
    check(
        replace(
            PLAIN,
            **BIT_OF_EVERYTHING,
            dtype=dtype,
            sinks=dtype,
            config=replace(PLAIN.config, use_tma=use_tma),
            out_layout="sliced",
        )
    )


@pytest.mark.ci(but_each=4)
@pytest.mark.emulated
@pytest.mark.parametrize("num_warps", [4, 8], ids=["", "cut"])
@pytest.mark.parametrize("head_dims", [(512, 512), (512, 256), (256, 512), (320, 128), (257, 300), (16, 511)], ids=str)
def test_wide_heads_with_a_bit_of_everything(head_dims, num_warps):
    """With 8 warps keys and values are loaded in pieces."""
    assert repeats_rows("interpreter", 64, num_warps) == (num_warps == 8)
    check(
        replace(
            PLAIN,
            **WIDE_BIT_OF_EVERYTHING,
            head_dim=head_dims[0],
            head_dim_v=head_dims[1],
            dropout_p=0.2,
            config=FlashConfig(64, 32, num_warps, 1),
        )
    )


@pytest.mark.oldest
@pytest.mark.emulated
@pytest.mark.parametrize("use_tma", [False, True], ids=["", "tma"])
@pytest.mark.parametrize("head_dims", [(512, 257), (300, 40), (24, 384)], ids=str)
def test_wide_heads_in_fp32(head_dims, use_tma):
    """Operands of matmuls are loaded in chunks of columns, of which the last may reach past the head dimension. TMA is
    not used, since it loads whole tiles."""
    case = replace(PLAIN, **WIDE_BIT_OF_EVERYTHING, head_dim=head_dims[0], head_dim_v=head_dims[1], dropout_p=0.2)
    check(replace(case, dtype=torch.float32, config=FlashConfig(16, 32, 8, 1, use_tma)))


OPTIONS_OF_HOPPER = {
    "plain": {"softmax_scale": 1.0},  # maxima move so far that some rows of a warp are rescaled
    "window": {"window_size": (130, -1), "sinks": torch.bfloat16, "out_layout": "heads first"},
    "all": {
        "window_size": (40, 30),
        "softcap": 20.0,
        "alibi": "per sequence",
        "sinks": torch.float32,
        "out_layout": "sliced and aligned",
    },
    "parts": {"window_size": (90, -1), "shards": ((120, 60, 0), (5, 0, 0), (0, 9, 0), (0, 60, 0)), "alibi": "per head"},
}


@pytest.mark.emulated
@pytest.mark.parametrize("options", OPTIONS_OF_HOPPER)
@pytest.mark.parametrize(
    "head_dim", [pytest.param(64, marks=pytest.mark.ci), 96, 128, pytest.param(192, marks=pytest.mark.ci)]
)
@pytest.mark.usefixtures("emulated_hopper", "no_tables")
def test_the_kernel_of_hopper(head_dim, options):
    """An empty sequence, rows that see nothing, rows after the last sequence, a sequence of NaN."""
    lengths = {"seqlens_q": (70, 0, 5, 133), "seqlens_k": (100, 40, 0, 390)}
    heads = {"num_heads_kv": 2, "group_size": 3, "head_dim": head_dim, "head_dim_v": HOPPER_HEAD_DIMS[head_dim]}
    case = replace(PLAIN, varlen=True, dtype=torch.bfloat16, poisoned_sequence=1, spare_rows=9, **lengths, **heads)
    with hopper_cases.launched(forward, "launch_flash_fwd_hopper"):
        check(replace(case, **OPTIONS_OF_HOPPER[options]))


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
    check(replace(PLAIN, config=FlashConfig(64, 64, 4, 1), **shape | options))


def weights(seqlen_q, seqlen_k, **options):
    """The weight of each key (seqlen_q, seqlen_k) for equal scores; the values are one-hot."""
    q = torch.zeros(1, seqlen_q, 1, 16, dtype=torch.float16, device=DEVICE)
    k = torch.zeros(1, seqlen_k, 1, 16, dtype=torch.float16, device=DEVICE)
    v = torch.eye(seqlen_k, dtype=torch.float16, device=DEVICE)[None, :, None]
    return flash_attention(q, k, v, **options)[0, :, 0]


def assert_sees(weights, pattern):
    """Row by row, x where a query sees a key. Visible keys have equal weights."""
    visible = torch.tensor([[mark == "x" for mark in row] for row in pattern.split()], device=weights.device)
    expected = visible / visible.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(weights.float(), expected.float(), rtol=1e-3, atol=0)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("shape", "options", "pattern"),
    [
        ((3, 5), {}, "xxxxx xxxxx xxxxx"),
        ((3, 5), {"causal": True}, "xxx.. xxxx. xxxxx"),
        ((5, 3), {"causal": True}, "... ... x.. xx. xxx"),
        ((3, 5), {"window_size": (1, 0)}, ".xx.. ..xx. ...xx"),
        ((3, 5), {"window_size": (1, 1)}, ".xxx. ..xxx ...xx"),
        ((3, 5), {"window_size": (-1, 0)}, "xxx.. xxxx. xxxxx"),
        ((3, 5), {"window_size": (0, -1)}, "..xxx ...xx ....x"),
        ((3, 5), {"window_size": (1, 1), "causal": True}, ".xx.. ..xx. ...xx"),
        ((5, 3), {"window_size": (0, 1)}, "... x.. xx. .xx ..x"),
        ((3, 3), {"window_size": (2**31 - 1, 2**31 - 1)}, "xxx xxx xxx"),
        ((3, 3), {"window_size": (2**62, 0)}, "x.. xx. xxx"),
    ],
)
def test_masks_are_aligned_to_the_bottom_right(shape, options, pattern):
    assert_sees(weights(*shape, **options), pattern)


@pytest.mark.oldest
def test_a_query_that_sees_no_key():
    q, k, v = (torch.randn(1, rows, 2, 16, device=DEVICE) for rows in (5, 2, 2))
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :3] == 0).all()
    assert (lse[:, :, :3] == -math.inf).all()
    assert lse[:, :, 3:].isfinite().all()

    sinks = torch.tensor([0.5, -2.0], device=DEVICE)
    out, lse = flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (out[:, :3] == 0).all()
    torch.testing.assert_close(lse[:, :, :3], sinks[None, :, None].expand(1, 2, 3))


@pytest.mark.oldest
def test_lse_is_the_natural_log_and_counts_the_sink():
    q, k, v = (torch.zeros(1, rows, 1, 16, device=DEVICE) for rows in (1, 7, 7))
    _, lse = flash_attention(q, k, v, return_lse=True)
    assert lse.item() == pytest.approx(math.log(7))
    _, lse = flash_attention(q, k, v, sinks=torch.zeros(1, device=DEVICE), return_lse=True)
    assert lse.item() == pytest.approx(math.log(8))


@pytest.mark.oldest
def test_a_sink_takes_weight_and_gives_no_value():
    q, k = (torch.zeros(1, rows, 2, 16, device=DEVICE) for rows in (1, 3))
    v = torch.ones(1, 3, 2, 16, device=DEVICE)
    sinks = torch.tensor([0.0, math.log(6)], device=DEVICE)
    out = flash_attention(q, k, v, sinks=sinks)
    torch.testing.assert_close(out[0, 0, :, 0].cpu(), torch.tensor([3 / 4, 3 / 9]))


@pytest.mark.oldest
def test_scale_then_softcap_then_alibi_then_mask():
    q = torch.full((1, 1, 1, 16), 1.0, device=DEVICE)
    k = torch.tensor([3.0, 1.0, 2.0], device=DEVICE).view(1, 3, 1, 1).repeat(1, 1, 1, 16)
    v = torch.eye(3, device=DEVICE).view(1, 3, 1, 3)
    scale, softcap, slope = 0.25, 5.0, 0.3
    out = flash_attention(
        q,
        k,
        v,
        softmax_scale=scale,
        softcap=softcap,
        alibi_slopes=torch.tensor([slope], device=DEVICE),
        window_size=(1, 0),
    )
    scores = [softcap * math.tanh(scale * 16 * key / softcap) - slope * distance for key, distance in ((1, 1), (2, 0))]
    expected = torch.tensor([-math.inf, *scores]).softmax(0)
    torch.testing.assert_close(out.flatten().cpu(), expected)


def test_query_heads_read_the_kv_head_of_their_group():
    q = torch.randn(2, 3, 6, 16, device=DEVICE)
    k = torch.randn(2, 5, 2, 16, device=DEVICE)
    v = torch.tensor([0.0, 1.0], device=DEVICE).view(1, 1, 2, 1).repeat(2, 5, 1, 4)
    out = flash_attention(q, k, v)
    torch.testing.assert_close(out[0, 0, :, 0].cpu(), torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_logits_far_apart_leave_no_nan():
    k = torch.tensor([-1e4, 0, 1e4], device=DEVICE).view(1, 3, 1, 1).repeat(1, 1, 1, 16)
    v = torch.eye(3, device=DEVICE).view(1, 3, 1, 3)
    out, lse = flash_attention(torch.ones_like(k), k, v, softmax_scale=1.0, causal=True, return_lse=True)
    torch.testing.assert_close(out[0, :, 0].cpu(), torch.eye(3))
    torch.testing.assert_close(lse[0, 0].cpu(), torch.tensor([-16e4, 0, 16e4]))


def test_without_return_lse_only_out_comes_back():
    q = torch.randn(1, 3, 2, 16, device=DEVICE)
    out, lse = flash_attention(q, q, q, return_lse=True)
    assert torch.equal(flash_attention(q, q, q), out)
    assert lse.dtype == torch.float32
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    packed, packed_lse = flash_attention_varlen(q[0], q[0], q[0], cu_seqlens, cu_seqlens, 3, 3, return_lse=True)
    assert torch.equal(flash_attention_varlen(q[0], q[0], q[0], cu_seqlens, cu_seqlens, 3, 3), packed)
    # From another kernel, with other fused multiply-adds.
    torch.testing.assert_close((packed, packed_lse), (out[0], lse[0]), atol=1e-5, rtol=0)


def test_queries_past_max_seqlen_are_not_computed():
    q = torch.randn(40, 1, 16, device=DEVICE)
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)
    with using(PLAIN.config):
        whole = flash_attention_varlen(q, q, q, cu_seqlens, cu_seqlens, 40, 40)
        part = flash_attention_varlen(q, q, q, cu_seqlens, cu_seqlens, 32, 40)
    assert torch.equal(part[:32], whole[:32])


@interpreted
def test_causal_and_window_do_the_work_that_is_visible():
    seqlen, head_dim, block = 256, 16, 32
    q = torch.randn(1, seqlen, 1, head_dim, dtype=torch.float16)

    def tiles(**options):
        with using(FlashConfig(block, block, 4, 1)), guard() as accesses:
            flash_attention(q, q, q.clone(), **options)
        return accesses.bytes_loaded["v.ptr"] // (block * head_dim * 2)

    assert tiles() == 8 * 8
    assert tiles(causal=True) == 8 * 9 // 2
    # 32 keys back span two tiles; the first rows have no keys before them.
    assert tiles(causal=True, window_size=(32, -1)) == 1 + 7 * 2
    assert tiles(window_size=(0, 0)) == 8


@pytest.mark.parametrize("which", ["q", "k", "v"])
@far_apart
def test_offsets_past_32_bits(which, dim, size, stride):
    shape = [1, 3, 1, 16]
    shape[dim] = size
    tensors = {name: torch.randn(shape, dtype=torch.float32).to(DEVICE, torch.float16) for name in "qkv"}
    with using(FlashConfig(64, 64, 4, 1)):
        expected = flash_attention(*tensors.values())
        tensors[which] = lying_far_apart(tensors[which], dim, stride)
        assert torch.equal(flash_attention(*tensors.values()), expected)


def test_varlen_offsets_past_32_bits():
    x = torch.randn(3, 1, 16, dtype=torch.float32).to(DEVICE, torch.float16)
    far = lying_far_apart(x, 0, 2**30 + 64)
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE)
    expected = flash_attention_varlen(x, x, x, cu_seqlens, cu_seqlens, 2, 2)
    assert torch.equal(flash_attention_varlen(far, far, far, cu_seqlens, cu_seqlens, 2, 2), expected)


def test_configs_agree():
    q, k, v = (torch.randn(1, rows, 2, 48, device=DEVICE) for rows in (100, 130, 130))
    results = []
    for block_m, block_n, use_tma in itertools.product((16, 128), (16, 128), (False, True)):
        with using(FlashConfig(block_m, block_n, 4, 1, use_tma)):
            results.append(flash_attention(q, k, v, causal=True))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
