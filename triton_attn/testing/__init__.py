"""Assertions and poisoned tensors for tests of kernels, for CPU and GPU tensors.

`poisoned_empty`, `padded`   make unwritten outputs and writes beside a tensor visible `assert_close_to_reference`  the
error against fp64, judged by the error that torch makes in the same dtype
"""

from .tensors import Closeness, assert_close_to_reference, padded, poisoned_empty

__all__ = ["Closeness", "assert_close_to_reference", "padded", "poisoned_empty"]
