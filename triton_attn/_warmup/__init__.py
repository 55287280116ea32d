from .api import WarmupResult, warmup

__all__ = ["WarmupResult", "warmup"]
