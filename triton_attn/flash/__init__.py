from . import backward_configs, configs  # noqa: F401  tables and users name their families
from .api import flash_attention, flash_attention_varlen

__all__ = ["flash_attention", "flash_attention_varlen"]
