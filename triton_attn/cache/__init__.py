from .append import append_kv_cache
from .append_latent import append_latent_cache
from .copy import copy_kv_pages
from .gather import gather_kv_cache, gather_latent_cache
from .latent_kv_cache import LatentKVCache
from .paged_kv_cache import PagedKVCache
from .pool import BlockPool, OutOfPages
from .sizes import kv_cache_bytes_per_token

__all__ = [
    "BlockPool",
    "LatentKVCache",
    "OutOfPages",
    "PagedKVCache",
    "append_kv_cache",
    "append_latent_cache",
    "copy_kv_pages",
    "gather_kv_cache",
    "gather_latent_cache",
    "kv_cache_bytes_per_token",
]
