"""Random calls of paged_attention."""

from draft_trees import KINDS
from hypothesis import strategies as st
from paged_cases import HEAD_DIMS, LAYOUTS, PAGE_SIZES, QUANTIZED, Case
from prefix_trees import WHOLE
from scores import draw_key_shard, draw_scores

from triton_attn._host.options import MAX_DRAFTS
from triton_attn.paged.configs import PagedConfig


@st.composite
def cases(draw, dtype, varlen):
    config = PagedConfig(
        block_m=draw(st.sampled_from([16, 32, 64, 128])),
        block_n=draw(st.sampled_from([32, 64, 128, 16])),
        num_warps=draw(st.sampled_from([4, 8])),
        num_stages=1,
    )
    group_size = draw(st.sampled_from([1, 2, 3, 5, 8, 16]))
    batch = draw(st.sampled_from([1, 2, 3, 5, 0, 7]))
    # Few tiles, since the interpreter is slow.
    lengths_q = st.sampled_from([1, 1, 0, 2, 5]) | st.integers(0, max(2, 2 * config.block_m // group_size))
    lengths_k = st.sampled_from([0, 1, config.block_n, config.block_n + 1]) | st.integers(0, 4 * config.block_n)
    seqlens_q = draw(st.tuples(*[lengths_q] * batch)) if varlen else (draw(lengths_q),) * batch
    page_size = draw(st.sampled_from([*PAGE_SIZES, None]))
    cache_dtype = draw(st.sampled_from([dtype, dtype, *QUANTIZED]))
    head_dim = draw(st.sampled_from(HEAD_DIMS) | st.integers(1, 512))
    packed = page_size is not None and draw(st.booleans())
    if packed:
        head_dim = round_up(head_dim, 16 // cache_dtype.itemsize)
    seqlens_k = draw(st.tuples(*[lengths_k] * batch))
    forks, part = (), None
    if page_size and draw(st.booleans()):
        forks = tuple(draw_fork(draw, i, 120 // page_size + 1) for i in range(batch))
        part = draw(st.sampled_from([None, WHOLE, 1, 2, 5]))
    key_shard = draw_key_shard(draw, page_size or 1)
    tree = None
    if key_shard is None and max(seqlens_q, default=0) <= MAX_DRAFTS:
        tree = draw(st.sampled_from([None, None, *KINDS]))
    scale = st.sampled_from([None, 0.5, "one", "per head", "per token", "per token"])
    return Case(
        varlen=varlen,
        dtype=dtype,
        cache_dtype=cache_dtype,
        page_size=page_size,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        num_heads_kv=draw(st.integers(1, 2)),
        group_size=group_size,
        head_dim=head_dim,
        packed=packed,
        head_dim_v=draw(st.sampled_from(HEAD_DIMS) | st.integers(1, 512)),
        **draw_scores(draw, dtype),
        scales=draw(st.tuples(scale, scale)),
        num_splits=draw(st.sampled_from([1, 1, 0, 2, 3, 7])),
        forks=forks,
        part=part,
        q_layout=draw(st.sampled_from(list(LAYOUTS))),
        cache_layout=draw(st.sampled_from(list(LAYOUTS))),
        spare_rows=draw(st.sampled_from([0, 1, 40])) if varlen else 0,
        spare_entries=draw(st.integers(0, 3)),
        gives_out=draw(st.booleans()),
        config=config,
        seed=draw(st.integers(0, 2**16)),
        key_shard=key_shard,
        tree=tree,
    )


def round_up(number, multiple):
    return -(-number // multiple) * multiple


def draw_fork(draw, i, most):
    """An earlier sequence whose first pages sequence i has, and how many; None for the first ones and some others."""
    if i == 0 or draw(st.integers(0, 4)) == 0:
        return None
    return draw(st.integers(0, i - 1)), draw(st.integers(0, most))
