"""The KV cache of a model whose layers keep one latent vector per token for all heads: MLA."""

from typing import TYPE_CHECKING

import torch

from .._host.checks import check_size
from .._host.latent import latent_storage
from .sequences import PagedSequences
from .sharding import shard_pages

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class LatentKVCache(PagedSequences):
    """Latent vectors and rotary keys of many sequences, on pages that sequences share; used as `PagedKVCache` is.

    It has all methods of `PagedKVCache`, but no `layer_windows`: `mla_decode` has no window, so that all layers see all
    keys.

        for each layer:
            append_latent_cache(kv_latent, k_pe, cache.latent_cache[layer], slots)

    Args:
        num_pages: pages in every layer.
        page_size: tokens on a page.
        num_layers, kv_lora_rank, qk_rope_head_dim: of the model.
        dtype: fp16, bf16 or fp32, as the model computes, or torch.float8_e4m3fn for the fp8 layout of
            `append_latent_cache`, stored as uint8.
        device: where; None is torch's default device.
        prefix_caching: False: `create` finds nothing.
        mesh, interleave: as in `PagedKVCache`. Attend with `parallel.context_parallel_mla_decode`.
        record_events: as in `PagedKVCache`.

    Attributes:
        latent_cache: (num_layers, num_pages, page_size, kv_lora_rank + qk_rope_head_dim), or the bytes of an fp8 row as
            the last dimension; latent_cache[layer] is what kernels take. Slots that were never written hold anything,
            NaN included.
        page_size, key_shard: as in `PagedKVCache`.

    Raises:
        TypeError, ValueError: a size or the dtype is not supported; ranks differ, as in `PagedKVCache`.

    Example:
        >>> size = dict(num_layers=1, kv_lora_rank=512, qk_rope_head_dim=64)
        >>> cache = triton_attn.LatentKVCache(4, **size, dtype=torch.float8_e4m3fn, device="cpu")
        >>> cache.latent_cache.shape
        torch.Size([1, 4, 64, 656])

    Source: DeepSeek-V2 (2024), arXiv:2405.04434; of the pages, see `PagedKVCache`.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 64,
        *,
        num_layers: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
        prefix_caching: bool = True,
        mesh: "DeviceMesh | None" = None,
        interleave: int = 1,
        record_events: bool = False,
    ) -> None:
        sizes = {"num_layers": num_layers, "kv_lora_rank": kv_lora_rank, "qk_rope_head_dim": qk_rope_head_dim}
        num_layers, kv_lora_rank, qk_rope_head_dim = (check_size(*item) for item in sizes.items())
        self._kv_lora_rank = kv_lora_rank
        dtype, width = latent_storage(kv_lora_rank, qk_rope_head_dim, dtype)
        num_pages, key_shard, self._group = shard_pages(mesh, interleave, num_pages, page_size, **sizes, dtype=dtype)
        super().__init__(num_pages, page_size, device, prefix_caching, key_shard, record_events=record_events)
        shape = (num_layers, num_pages, self._page_slots, width)
        self.latent_cache = torch.empty(shape, dtype=dtype, device=self.device)

    def _tree_shape(self):
        return 1, self._kv_lora_rank, self.latent_cache.shape[-1] * self.latent_cache.dtype.itemsize

    def _page_tensors(self):
        return (self.latent_cache.unsqueeze(3),)
