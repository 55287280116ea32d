from ..dense import backward_configs  # noqa: F401  tables and users name their families
from . import configs  # noqa: F401
from .api import flash_attention, flash_attention_varlen

__all__ = ["flash_attention", "flash_attention_varlen"]
