"""The tensors among the arguments of a launch."""

import torch


def tensors_in(name, value):
    """(name, tensor) of every tensor in a kernel argument: `descs[0]` and `pair.key` inside tuples."""
    value = unwrapped(value)
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", None)
        for i, item in enumerate(value):
            yield from tensors_in(f"{name}.{fields[i]}" if fields else f"{name}[{i}]", item)


def unwrapped(value):
    """The tensor of a descriptor, of Triton or Gluon, or of a reinterpreted tensor; other values as they are."""
    base = getattr(value, "base", None)
    return base if isinstance(base, torch.Tensor) else value
