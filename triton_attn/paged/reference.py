"""Definition of attention over a KV cache, in plain torch."""

import torch
from torch import Tensor

from .._host.definition import attend_tree, packed_bounds
from .._host.key_shard import check_key_shard, num_ranks_of
from .._host.layout import slots_of_packed
from .._host.observers import without_autocast
from .._host.prefix_tree import PrefixTree


@without_autocast
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    num_splits: int = 0,
    prefix_tree: PrefixTree | None = None,
    batch_invariant: bool | None = None,
    key_shard: tuple[int, int, int] | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `triton_attn.paged_attention`; rows that belong to no sequence are 0, their lse -inf. A
    prefix_tree does not change the result, and is not read."""
    if k_cache.ndim == 5:
        k_cache, v_cache = slots_of_packed(k_cache, v_cache)
        k_cache = k_cache.flatten(3)
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    result = q.new_zeros(*q.shape[:-1], v_cache.shape[-1]) if out is None else out.zero_()
    if lse is None:
        lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=compute_dtype)
    lse.fill_(float("-inf"))
    bounds = None if cu_seqlens_q is None else packed_bounds(cu_seqlens_q, len(q))
    shard = check_key_shard(key_shard, k_cache.shape[1])
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1]) * num_ranks_of(shard)
    for i, seqlen in enumerate(cache_seqlens.clamp(max=capacity).tolist()):
        rows = i if bounds is None else slice(*bounds[i : i + 2])
        bits = None if tree_mask is None else tree_mask[rows]
        first, places = _first_seen(seqlen - q[rows].shape[0], window_size[0], bits), {}
        keys = slice(first, seqlen)
        if shard is not None:
            keys = slice(shard.num_keys(first), shard.num_keys(seqlen))
            places = shard.places(seqlen, q[rows].shape[0], q.device)
            places["key_positions"] = places["key_positions"][keys]
        out_i, lse_i = attend_tree(
            q[rows][None],
            _cached(k_cache, i, keys, block_table, k_scale, compute_dtype)[None],
            _cached(v_cache, i, keys, block_table, v_scale, compute_dtype)[None],
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes,
            sinks=sinks,
            compute_dtype=compute_dtype,
            tree_mask=bits,
            **places,
        )
        result[rows] = out_i[0]
        lse[rows if bounds is None else (slice(None), rows)] = lse_i[0]
    return (result, lse) if return_lse else result


def _first_seen(first_position, left, tree_mask):
    """The first key that queries from this position on see; pages before it may be gone."""
    if left < 0:
        return 0
    if tree_mask is not None:
        drafts = torch.arange(len(tree_mask), device=tree_mask.device)
        sees_drafts = (tree_mask[:, None] >> drafts & 1).any(1)
        first_position -= 0 if sees_drafts.all() else 1  # a query that does not even see itself
    return max(0, first_position - left)


def _cached(cache, i, keys, block_table, scale, dtype):
    """(keys, heads, dim) of sequence i."""
    rows = _rows_of(cache, i, keys, block_table).to(dtype)
    if scale is None:
        return rows
    if isinstance(scale, Tensor) and scale.ndim == 3:
        return rows * _rows_of(scale, i, keys, block_table).to(dtype).unsqueeze(2)
    return rows * torch.as_tensor(scale, dtype=dtype, device=cache.device).reshape(-1, 1)


def _rows_of(cache, i, keys, block_table):
    """(keys, heads, ...) of sequence i, as they are cached."""
    if block_table is None:
        return cache[i, keys]
    page_size = cache.shape[1]
    first_page, end_page = keys.start // page_size, -(-keys.stop // page_size)
    bits = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
    rows = bits[block_table[i, first_page:end_page].long()].view(cache.dtype).flatten(0, 1)
    return rows[keys.start - first_page * page_size : keys.stop - first_page * page_size]
