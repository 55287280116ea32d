"""Attention kernels in Triton: MHA, MQA, GQA; dense and varlen. See `help(triton_attn.flash_attention)`."""

from . import reference
from .cache import BlockPool, OutOfPages, PagedKVCache, append_kv_cache, copy_kv_pages, kv_cache_bytes_per_token
from .flash import flash_attention, flash_attention_varlen

__all__ = [
    "BlockPool",
    "OutOfPages",
    "PagedKVCache",
    "append_kv_cache",
    "copy_kv_pages",
    "flash_attention",
    "flash_attention_varlen",
    "kv_cache_bytes_per_token",
    "reference",
]
__version__ = "0.1.0"
