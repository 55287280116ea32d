"""TMA descriptors as kernel arguments."""

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def describe(base: Tensor, geometry: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Two kernel arguments: a descriptor for each piece of the head dimension, None where there is no second.

    geometry is that of `tma_geometry`. They are no tuple in one argument: launchers before Triton 3.8 expand no
    descriptor in a tuple.
    """
    first = unchecked_descriptor(TensorDescriptor, base, geometry[0])
    return first, None if len(geometry) == 1 else unchecked_descriptor(TensorDescriptor, base, geometry[1])


def unchecked_descriptor(of_class: type, base: Tensor, fields: dict[str, Any]) -> Any:
    """A descriptor without the checks of its constructor, a third of a call's cost: `strides_suit_tma` has made them.

    Triton 3.6 to 3.9 check a descriptor in its __post_init__ and offer no way around it.
    """
    descriptor = object.__new__(of_class)
    descriptor.__dict__ = {"base": base, **fields}
    return descriptor
