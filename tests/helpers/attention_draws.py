"""Random calls of flash_attention and flash_attention_varlen."""

from attention_cases import GROUP_SIZES, HEAD_DIMS, LAYOUTS, NAN, Case
from hypothesis import strategies as st
from scores import draw_scores

from triton_attn.flash.configs import FlashConfig


def _shards(draw, batch):
    """Starts of shards: all equal, key after query, query after key, far away, unaligned."""
    start = st.sampled_from([0, 1, 4, 50, 63]) | st.integers(0, 120)
    return draw(st.tuples(*[st.tuples(start, start, st.sampled_from([0, 1, 7]))] * batch))


def _lengths(block, limit):
    return st.sampled_from([0, 1, block - 1, block, block + 1]) | st.integers(0, limit)


@st.composite
def cases(draw, dtype, varlen):
    config = FlashConfig(
        block_m=draw(st.sampled_from([16, 32, 64, 128])),
        block_n=draw(st.sampled_from([16, 32, 64, 128])),
        num_warps=4,
        num_stages=1,
        use_tma=draw(st.booleans()),
    )
    group_size = draw(st.sampled_from(GROUP_SIZES))
    many_heads = group_size > 7
    lengths_q = _lengths(config.block_m, config.block_m + 9 if many_heads else min(3 * config.block_m, 200))
    lengths_k = _lengths(config.block_n, min(4 * config.block_n, 200))
    batch = draw(st.sampled_from([1, 1, 1, 0] if many_heads else [1, 2, 3, 2, 1, 2, 3, 0]))
    if varlen:
        seqlens_q = draw(st.tuples(*[lengths_q] * batch))
        seqlens_k = draw(st.tuples(*[lengths_k] * batch))
    else:
        seqlens_q, seqlens_k = (draw(lengths_q),) * batch, (draw(lengths_k),) * batch
    return Case(
        varlen=varlen,
        dtype=dtype,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        num_heads_kv=draw(st.integers(1, 1 if many_heads else 2)),
        group_size=group_size,
        head_dim=draw(st.sampled_from(HEAD_DIMS) | st.integers(1, 512)),
        head_dim_v=draw(st.sampled_from(HEAD_DIMS) | st.integers(1, 512)),
        **draw_scores(draw, dtype),
        layouts=draw(st.tuples(*[st.sampled_from(list(LAYOUTS))] * 3)),
        poison=draw(st.sampled_from([NAN, float("inf")])),
        poisoned_sequence=draw(st.integers(0, batch - 1)) if varlen and batch > 1 else None,
        spare_rows=draw(st.sampled_from([0, 1, 40])) if varlen else 0,
        config=config,
        seed=(number := draw(st.integers(0, 2**16))),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        shards=_shards(draw, batch) if draw(st.sampled_from([False, False, True])) else None,
        out_layout=(None, None, "contiguous", "heads first", "sliced", "sliced and aligned")[number % 6],
    )
