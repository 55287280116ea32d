"""Memory of the caller's, and what a call allocates besides."""

import os
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
POISON = 0xA5


def allocations(monkeypatch):
    """Functions of torch by which the package allocates from now on; not those of the interpreter."""
    names = []
    for owner, name in [
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_zeros"),
        (torch.Tensor, "contiguous"),
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "zeros"),
    ]:
        function = getattr(owner, name)

        def counted(*args, _function=function, _name=name, **options):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("triton_attn.") and not caller.startswith("triton_attn.toolchain"):
                names.append(_name)
            return _function(*args, **options)

        monkeypatch.setattr(owner, name, counted)
    return names


def poisoned(x):
    return torch.full((x.nbytes,), POISON, dtype=torch.uint8, device=DEVICE).view(x.dtype).view(x.shape)
