"""What is known of calls that are like earlier ones: their arguments need no check, and their launches no plan."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import tuned
from .backend import should_check_values, use_kernel
from .observers import PLAIN, is_observed

Result = TypeVar("Result")
_BY_VALUE = frozenset({bool, np.bool_, int, torch.dtype})


class Known:
    """Results of calls that passed their checks, by all that checks of types and layouts depend on.

    tensors: tensors, or what the caller has given in their place. Of a tensor that is its shape, strides, dtype and
    device, and whether autograd has to see it. Of None, a bool, an int and a dtype it is type and value, of anything
    else the type: a scale is checked at each call.

    options: whatever else a result depends on, by type and value. Types within a tuple do not count: `sides_of` gives
    those of a window.

    On nothing else may a result depend but on tuned tables: not on an address, a value on the device, or an environment
    variable. It holds no tensor and is not None, and is forgotten at the latest when there are `most`.
    """

    most = 1024

    def __init__(self):
        self._results = {}

    def find(self, tensors: tuple[Any, ...], options: tuple[Any, ...] = ()) -> tuple[Any, Any]:
        """(key, result) of a call; the result is None if the call is new. Both are None if nothing may be known of it:
        an observer has to see it, for whom sizes may be symbols, or an option has no hash."""
        if is_observed():
            return None, None
        has_grad = torch.is_grad_enabled()
        kinds = [
            None
            if x is None
            else (x.shape, x.stride(), x.dtype, x.device, has_grad and x.requires_grad)
            if type(x) in PLAIN
            else (type(x), x)
            if type(x) in _BY_VALUE
            else type(x)
            for x in tensors
        ]
        key = (tuned.generation, *kinds, *options, *map(type, options))
        try:
            return key, self._results.get(key)
        except TypeError:
            return None, None

    def find_launch(
        self, tensors: tuple[Any, ...], computed: Tensor, check_values: bool | None, options: tuple[Any, ...] = ()
    ) -> tuple[Any, Any]:
        """(key, result) as `find` of calls that launch a kernel; no result where a call checks values, or the reference
        computes it, which `use_kernel` of a tensor says."""
        key, result = self.find(tensors, options)
        if result is not None and (should_check_values(check_values) or not use_kernel(computed)):
            return key, None
        return key, result

    def keep_plan(self, key: Any, plan: Any) -> None:
        """Remember (plan, what only its launches of such calls share: `alike` of `launch`); nothing without a plan."""
        self.keep(key, None if plan is None else (plan, object()))

    def keep(self, key: Any, result: Any) -> None:
        """Remember the result of a new call. Not where nothing may be known of it, a tensor is of another class, whose
        layout may be another matter, or there is no result: the reference has no plan."""
        if key is None or result is None or any(isinstance(x, type) and issubclass(x, Tensor) for x in key):
            return
        if len(self._results) >= self.most:
            self._results.clear()
        self._results[key] = result


def check_once(check: Callable[[tuple[Any, ...], tuple[Any, ...]], Result]) -> Callable[..., Result]:
    """Decorator of a check(tensors, options), whose result is `Known` after the first call. What it raises is not."""
    known = Known()

    @functools.wraps(check)
    def check_unless_known(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Result:
        key, result = known.find(tensors, options)
        if result is None:
            result = check(tensors, options)
            known.keep(key, result)
        return result

    return check_unless_known


def sides_of(window_size: Any) -> tuple[Any, ...]:
    """A window_size, right or wrong, as options of `Known`."""
    return (type(window_size), *window_size) if isinstance(window_size, (tuple, list)) else (None, window_size)


def window_of(sides: list[Any]) -> Any:
    """The window_size that `sides_of` was given."""
    kind, *pair = sides
    if kind is None:
        return pair[0]
    return pair if kind is list else tuple(pair)
