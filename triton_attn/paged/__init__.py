from . import configs  # noqa: F401  tables and users name its families
from .api import paged_attention

__all__ = ["paged_attention"]
