"""Random calls of mla_decode."""

import torch
from decode_cases import LAYOUTS, PAGE_SIZES, Case
from draft_trees import KINDS
from hypothesis import strategies as st
from paged_draws import draw_fork
from prefix_trees import WHOLE
from scores import draw_key_shard

from triton_attn.mla.configs import MlaDecodeConfig


@st.composite
def cases(draw, dtype):
    tile = draw(st.sampled_from([16, 64, 32])), draw(st.sampled_from([32, 64, 16]))
    num_warps, num_stages = draw(st.sampled_from([8, 4])), draw(st.sampled_from([3, 1]))
    config = MlaDecodeConfig(*tile, num_warps, num_stages)
    is_fp8 = draw(st.booleans())
    scales = st.none() | st.floats(0.01, 8)
    batch = draw(st.sampled_from([1, 2, 3, 5, 0]))
    # Few tiles, since the interpreter is slow.
    lengths = st.sampled_from([0, 1, config.block_n, config.block_n + 1]) | st.integers(0, 3 * config.block_n)
    with_uk = draw(st.sampled_from([True, True, False]))
    rope_dim = draw(st.sampled_from([16, 64, 2, 24, 8]))
    page_size = draw(st.sampled_from(PAGE_SIZES))
    key_shard = draw_key_shard(draw, page_size)
    forks, part = (), None
    if draw(st.booleans()):
        forks = tuple(draw_fork(draw, i, 96 // page_size + 1) for i in range(batch))
        part = draw(st.sampled_from([None, WHOLE, 1, 3]))
    tree = draw(st.sampled_from([None, None, *KINDS])) if key_shard is None else None
    seqlens_q, seqlen_q = None, draw(st.sampled_from([1, 1, 2, 3, 8, 0] if tree is None else [3, 8, 64, 1]))
    if (tree or part) and batch and draw(st.booleans()):
        seqlens_q = draw(st.tuples(*[st.sampled_from([1, 0, 8, 23])] * batch))
    rank = draw(st.sampled_from([128, 384, 128, 512] if is_fp8 else [64, 16, 40, 100, 300, 512]))
    return Case(
        dtype=dtype,
        is_fp8=is_fp8,
        cache_dtype=None if is_fp8 else draw(st.sampled_from([None, torch.float8_e4m3fn, torch.float8_e5m2])),
        k_scale=None if is_fp8 else draw(scales),
        k_pe_scale=None if is_fp8 else draw(scales),
        scale_tensors=draw(st.booleans()),
        page_size=page_size,
        seqlen_q=seqlen_q,
        seqlens_q=seqlens_q,
        seqlens_k=draw(st.tuples(*[lengths] * batch)),
        num_heads=draw(st.sampled_from([1, 3, 9, 16])),
        qk_nope_head_dim=draw(st.sampled_from([32, 16, 1, 71, 128])),
        qk_rope_head_dim=rope_dim,
        kv_lora_rank=rank,
        v_head_dim=draw(st.sampled_from([32, 16, 1, 71, 128, 160])),
        with_uk=with_uk,
        with_uv=draw(st.sampled_from([True, True, False])),
        causal=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from([1e-9, 0.07, 0.2] + [None] * with_uk)),
        rotary_dim=2 * draw(st.integers(0, rope_dim // 2)) if with_uk and not tree and seqlens_q is None else 0,
        rope_interleaved=draw(st.booleans()),
        num_splits=draw(st.sampled_from([1, 1, 0, 2, 3, 7])),
        q_layout=draw(st.sampled_from(list(LAYOUTS))) if seqlens_q is None else "contiguous",
        one_layer=draw(st.booleans()),
        config=config,
        seed=draw(st.integers(0, 2**16)),
        key_shard=key_shard,
        tree=tree,
        forks=forks,
        part=part,
    )
