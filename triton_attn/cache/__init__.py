from .api import append_kv_cache, copy_kv_pages
from .pool import BlockPool, OutOfPages

__all__ = ["BlockPool", "OutOfPages", "append_kv_cache", "copy_kv_pages"]
