"""Checks of arguments that are not repeated: most calls are like an earlier one."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import tuned

Result = TypeVar("Result")
MOST_KNOWN = 1024


def check_once(check: Callable[[tuple[Any, ...], tuple[Any, ...]], Result]) -> Callable[..., Result]:
    """Decorator of a check(tensors, options), whose result is remembered for all calls that are alike.

    Calls are alike if their tensors have the same shapes, strides, dtypes and devices, or are given at the same places,
    and their options have the same values and types. On nothing else may the check depend: not on an address, a value
    on the device, or an environment variable. Its result holds no tensor and is not None. What it raises is not
    remembered.

    tensors: tensors, or what the caller has given in their place: None, a number or a mistake.
    options: whatever else the check depends on. Types within a tuple do not count: `sides_of` gives those of a window.
    """
    known = {}
    tuned.forget_with_plans(known.clear)

    @functools.wraps(check)
    def check_unless_known(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Result:
        if torch.compiler.is_compiling():  # sizes may be symbols
            return check(tensors, options)
        kinds = [
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x if x is None else (type(x), x)
            for x in tensors
        ]
        key = (*kinds, *options, *map(type, options))
        try:
            result = known.get(key)
        except TypeError:  # not hashable: a symbol, a list, a mistake
            return check(tensors, options)
        if result is None:
            result = check(tensors, options)
            if len(known) >= MOST_KNOWN:
                known.clear()
            known[key] = result
        return result

    return check_unless_known


def sides_of(window_size: Any) -> tuple[Any, ...]:
    """A window_size, right or wrong, as options of `check_once`."""
    return (type(window_size), *window_size) if isinstance(window_size, (tuple, list)) else (None, window_size)


def window_of(sides: list[Any]) -> Any:
    """The window_size that `sides_of` was given."""
    kind, *pair = sides
    if kind is None:
        return pair[0]
    return pair if kind is list else tuple(pair)
