"""TMA descriptors as kernel arguments."""

from typing import Any

from torch import Tensor


def unchecked_descriptor(of_class: type, base: Tensor, fields: dict[str, Any]) -> Any:
    """A descriptor without the checks of its constructor, a third of a call's cost: `strides_suit_tma` has made them.

    Triton 3.6 to 3.9 check a descriptor in its __post_init__ and offer no way around it.
    """
    descriptor = object.__new__(of_class)
    descriptor.__dict__ = {"base": base, **fields}
    return descriptor
