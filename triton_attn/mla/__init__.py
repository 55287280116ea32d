from . import configs  # noqa: F401  tables and users name its families
from .api import mla_decode, mla_prefill
from .scale import mla_softmax_scale

__all__ = ["mla_decode", "mla_prefill", "mla_softmax_scale"]
