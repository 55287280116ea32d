from .api import mla_decode
from .scale import mla_softmax_scale

__all__ = ["mla_decode", "mla_softmax_scale"]
