from .api import append_kv_cache, copy_kv_pages

__all__ = ["append_kv_cache", "copy_kv_pages"]
