"""Attention kernels in Triton: MHA, MQA, GQA, MLA; dense, varlen, paged. See `help(triton_attn.flash_attention)`."""

from . import reference
from ._host.tuned import override_config, use_tuned
from ._host.workspace import workspace_bytes
from ._warmup import warmup
from .cache import (
    BlockPool,
    LatentKVCache,
    OutOfPages,
    PagedKVCache,
    append_kv_cache,
    append_latent_cache,
    copy_kv_pages,
    gather_kv_cache,
    gather_latent_cache,
    kv_cache_bytes_per_token,
)
from .flash import flash_attention, flash_attention_varlen
from .merge import PrefixTree, merge_attention, prefix_tree
from .mla import mla_decode, mla_prefill, mla_softmax_scale
from .paged import paged_attention

__all__ = [
    "BlockPool",
    "LatentKVCache",
    "OutOfPages",
    "PagedKVCache",
    "PrefixTree",
    "append_kv_cache",
    "append_latent_cache",
    "copy_kv_pages",
    "flash_attention",
    "flash_attention_varlen",
    "gather_kv_cache",
    "gather_latent_cache",
    "kv_cache_bytes_per_token",
    "merge_attention",
    "mla_decode",
    "mla_prefill",
    "mla_softmax_scale",
    "override_config",
    "paged_attention",
    "prefix_tree",
    "reference",
    "use_tuned",
    "warmup",
    "workspace_bytes",
]
__version__ = "0.1.0"
