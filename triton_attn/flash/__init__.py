from ..dense import backward_configs  # noqa: F401  tables and users name their families
from . import configs  # noqa: F401
from .api import flash_attention, flash_attention_varlen
from .passes import backward_pass, forward_pass, gradients_pass, row_sums_pass

__all__ = [
    "backward_pass",
    "flash_attention",
    "flash_attention_varlen",
    "forward_pass",
    "gradients_pass",
    "row_sums_pass",
]
