"""Assertions and poisoned tensors, for tests of kernels on CPU and GPU tensors.

`poisoned_empty`, `padded`   outputs nobody wrote, and writes beside a tensor, made visible
`assert_close_to_reference`  error against fp64, judged by the error that torch makes in the same dtype
"""

from .tensors import Closeness, assert_close_to_reference, padded, poisoned_empty

__all__ = ["Closeness", "assert_close_to_reference", "padded", "poisoned_empty"]
