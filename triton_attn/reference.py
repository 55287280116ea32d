"""The reference of every public function, under its public name: the same arguments, the same result, plain torch."""

from .cache.reference import (
    append_kv_cache,
    append_latent_cache,
    copy_kv_pages,
    gather_kv_cache,
    gather_latent_cache,
)
from .flash.reference import dropout_mask, flash_attention, flash_attention_varlen
from .merge.reference import merge_attention
from .mla.reference import mla_decode, mla_prefill
from .paged.reference import paged_attention

__all__ = [
    "append_kv_cache",
    "append_latent_cache",
    "copy_kv_pages",
    "dropout_mask",
    "flash_attention",
    "flash_attention_varlen",
    "gather_kv_cache",
    "gather_latent_cache",
    "merge_attention",
    "mla_decode",
    "mla_prefill",
    "paged_attention",
]
