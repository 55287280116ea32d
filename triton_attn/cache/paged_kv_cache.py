"""The KV cache of a model whose layers keep keys and values per head: MHA, GQA, MQA."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .._host.checks import QUANTIZED_BITS, check_bool, check_size, fail
from .layers import group_layers
from .sequences import PagedSequences
from .sharding import shard_pages

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class PagedKVCache(PagedSequences):
    """Keys and values of many sequences, on pages that sequences share.

        seq, cached = cache.create(prompt)                     # the first `cached` tokens need no computing
        slots = cache.extend([seq], [prompt[cached:]])
        for each layer:
            append_kv_cache(k, v, cache.k_cache[layer], cache.v_cache[layer], slots)
            paged_attention(q, cache.k_cache[layer], cache.v_cache[layer], cache.cache_seqlens([seq]),
                            cache.block_table([seq]))

    A page is written only by the one sequence that holds it alone: `extend` copies a shared page before it gives out
    slots on it. A full page can be found by `create` once it is written: from its owner's next `extend` on, or its
    `commit`. An operation happens whole, or raises with nothing changed. Sequences must be freed: one that
    is merely dropped keeps its pages.

    Args:
        num_pages: pages in every layer. Over a mesh, the smallest number of all ranks counts. With layer_windows, pages
            of all groups together.
        page_size: tokens on a page.
        num_layers, num_kv_heads, head_dim: of the model.
        head_dim_v: of values; None is head_dim.
        dtype: of what is stored; with torch.float8_e4m3fn, float8_e5m2 or int8 `append_kv_cache` quantises.
        device: where; None is torch's default device.
        prefix_caching: False: `create` finds nothing.
        mesh: a DeviceMesh of one dimension, whose ranks share the keys: the token at position t is on rank
            t // interleave % ranks, as with vLLM's decode context parallelism. Each rank makes its part of the cache.
            All ranks make the same calls with the same tokens, and append all tokens: those of other ranks have slot
            -1. A page then has page_size tokens of each rank, and its number is the same on all. Attend with
            `parallel.context_parallel_paged_attention`. None: this process has all keys.
        interleave: tokens in a row that a rank holds. It divides page_size.
        layer_windows: an entry for each layer: the keys before a query that it sees, as in window_size (left, 0) of
            `paged_attention`; -1 if it sees all; None if it keeps nothing, as layers that use another layer's keys.
            Layers are put into groups of one window and one size. A sequence has pages of its own for each group, all
            from one pool: a page has the bytes of page_size tokens in the layers of a group. `extend` gives back the
            pages that are wholly behind the window of the tokens before the call, so that tokens of that call may
            still be truncated. Others find a prefix as long as the pages are there that the next token sees. None: all
            layers see all keys, and tables and slots have no dimension of groups.
        record_events: keep what `take_events` returns.
        token_scales: of a cache in fp8 or int8: keep a scale for each token and head of the keys and of the values.

    Attributes:
        k_cache: (num_layers, num_pages, page_size, num_kv_heads, head_dim); k_cache[layer] is what kernels take.
        v_cache: (num_layers, num_pages, page_size, num_kv_heads, head_dim_v). Slots that were never written hold
            anything, NaN included.
        k_scale, v_scale: with token_scales (num_layers, num_pages, page_size, num_kv_heads) fp32, otherwise None;
            k_scale[layer] is what `append_kv_cache` writes, and what `paged_attention` and `gather_kv_cache` read.
            They move with their pages.
        page_size: tokens on a page, those of all ranks together.
        layers: a `LayerPlace` (group, cache_layer, window) for each layer, None where it keeps nothing; None without
            layer_windows. Then `k_cache[place.cache_layer]` is what kernels take, with the slots and the block table of
            place.group. Group 0 is one that sees all keys, if there is any.
        key_shard: (rank, ranks, interleave) as `paged_attention` takes it; None if this process has all keys.

    Raises:
        TypeError, ValueError: an argument is wrong; on every rank, ranks differ in an argument other than num_pages.

    Example:
        >>> cache = triton_attn.PagedKVCache(8, num_layers=1, num_kv_heads=2, head_dim=64, device="cpu")
        >>> seq, found = cache.create(range(20))
        >>> slots = cache.extend([seq], [range(20)])  # two pages of 16 tokens; their keys are to be written
        >>> other = cache.fork(seq)
        >>> len(other), cache.stats().pages_shared
        (20, 2)

    Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention (2023),
    arXiv:2309.06180.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 16,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
        prefix_caching: bool = True,
        mesh: "DeviceMesh | None" = None,
        interleave: int = 1,
        layer_windows: Sequence[int | None] | None = None,
        record_events: bool = False,
        token_scales: bool = False,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "head_dim_v": head_dim_v}
        num_layers, num_kv_heads, head_dim, head_dim_v = (check_size(*item) for item in sizes.items())
        num_pages, key_shard, self._group = shard_pages(
            mesh,
            interleave,
            num_pages,
            page_size,
            **sizes,
            dtype=dtype,
            layer_windows=layer_windows,
            token_scales=token_scales,
        )
        if check_bool("token_scales", token_scales) and dtype not in QUANTIZED_BITS:
            fail("dtype", "int8, float8_e4m3fn or float8_e5m2 with token_scales", dtype, TypeError)
        groups = None if layer_windows is None else group_layers(layer_windows, num_layers)
        super().__init__(num_pages, page_size, device, prefix_caching, key_shard, groups, record_events)
        shape = (num_layers if groups is None else groups.num_cache_layers, num_pages, self._page_slots, num_kv_heads)
        self.k_cache = torch.empty((*shape, head_dim), dtype=dtype, device=self.device)
        self.v_cache = torch.empty((*shape, head_dim_v), dtype=dtype, device=self.device)
        self.k_scale = self._new_scales(shape) if token_scales else None
        self.v_scale = self._new_scales(shape) if token_scales else None

    def _new_scales(self, shape):
        """A kernel reads those of one head: on a page they follow each other."""
        *pages, slots, heads = shape
        return torch.empty(*pages, heads, slots, dtype=torch.float32, device=self.device).transpose(2, 3)

    def _tree_shape(self):
        num_kv_heads = self.k_cache.shape[-2]
        token_bytes = sum(num_kv_heads * x.shape[-1] * x.dtype.itemsize for x in self._page_tensors())
        return num_kv_heads, self.v_cache.shape[-1], token_bytes

    def _page_tensors(self):
        """Scales as the bytes of a last dimension, so that they are copied with the elements."""
        caches = self.k_cache, self.v_cache
        if self.k_scale is None or self.v_scale is None:
            return caches
        dtype = self.k_cache.dtype
        return *caches, *(x.unsqueeze(4).view(dtype) for x in (self.k_scale, self.v_scale))
