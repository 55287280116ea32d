"""Plans of calls that are like earlier ones: their arguments need no check, and their launches no computation."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import tuned
from .observers import is_observed

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_BY_VALUE = frozenset({bool, np.bool_, int, torch.dtype})


class Plans:
    """Plans of calls that passed their checks, by all that checks of types and layouts depend on.

    Of a tensor that is its shape, strides, dtype and device, and whether autograd has to see it. Of None, a bool, an
    int and a dtype it is type and value, of anything else the type: a scale is checked at each call. No tensor is held.
    """

    most = 1024

    def __init__(self):
        self._plans = {}

    def find(self, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        """(key, plan) of a call, whose plan is None if it is new. Both are None where an observer has to see it."""
        if is_observed():
            return None, None
        has_grad = torch.is_grad_enabled()
        layouts = [
            None
            if x is None
            else (x.shape, x.stride(), x.dtype, x.device, has_grad and x.requires_grad)
            if type(x) in _PLAIN
            else (type(x), x)
            if type(x) in _BY_VALUE
            else type(x)
            for x in arguments
        ]
        key = (tuned.generation(), *layouts)
        return key, self._plans.get(key)

    def keep(self, key: Any, plan: Any) -> None:
        """Remember the plan of a call that passed its checks. Not if its tensors are no plain ones, or without a plan,
        as the reference has none."""
        if plan is None or any(isinstance(x, type) and issubclass(x, Tensor) for x in key):
            return
        if len(self._plans) >= self.most:
            self._plans.clear()
        self._plans[key] = plan
