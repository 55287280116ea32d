from .scale import mla_softmax_scale

__all__ = ["mla_softmax_scale"]
