"""Memory for what the kernels of a call pass to each other."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .checks import check_tensor, fail
from .layout import contiguous_strides
from .observers import PLAIN, is_observed

ALIGNMENT = 256  # bytes, as of tensors that torch allocates


class Workspace:
    """Pieces of a caller's memory, or a count of the bytes that they would need: then nothing is launched.

    Attributes:
        memory: (bytes,) uint8, or None: only count.
        used: bytes, with those that align the pieces.
    """

    def __init__(self, memory=None):
        self.memory = memory
        self.used = 0
        self._typed = {}  # {dtype: the memory as elements of it}

    def take(self, like, wanted):
        """A tensor of the Memory that is wanted, on the device of `like`."""
        shape, strides, dtype = wanted
        first = -(-self.used // ALIGNMENT) * ALIGNMENT
        self.used = first + math.prod(shape) * dtype.itemsize
        if self.memory is None:
            return like.new_empty(shape, dtype=dtype)
        if self.used > self.memory.numel():
            expected = f"the bytes that workspace_bytes returns for this call, {self.used} or more"
            fail("workspace", expected, self.memory.numel())
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = _elements(self.memory, dtype)
        return typed.as_strided(shape, strides, typed.storage_offset() + first // dtype.itemsize)


def _elements(memory, dtype):
    """Bytes as elements, without those at the end that are no whole element."""
    rest = memory.numel() % dtype.itemsize
    return (memory[:-rest] if rest else memory).view(dtype)


class Memory(NamedTuple):
    """Memory of a contiguous tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, shape, dtype):
        return cls(shape, contiguous_strides(shape), dtype)

    def new(self, like, workspace=None):
        """An uninitialised tensor on the device of `like`, from the Workspace if there is one."""
        if workspace is None:
            return like.new_empty_strided(self.shape, self.strides, dtype=self.dtype)
        return workspace.take(like, self)


def only_counts(workspace):
    return workspace is not None and workspace.memory is None


def check_lse(lse, shape, return_lse, device):
    """The kernels compute the strides of the caller's lse."""
    if not return_lse:
        fail("lse", "None without return_lse", "a tensor")
    check_tensor("lse", lse, shape, (torch.float32,), device)
    _check_contiguous("lse", lse)


def check_out(out, shape, dtype, device):
    check_tensor("out", out, shape, (dtype,), device)
    _check_contiguous("out", out)


def check_workspace(workspace: Any, device: torch.device) -> None:
    """A caller's tensor but for its address, or the Workspace that `workspace_bytes` gives."""
    if type(workspace) is not Workspace:
        check_tensor("workspace", workspace, ("bytes",), (torch.uint8,), device)
        _check_contiguous("workspace", workspace)


def as_workspace(workspace: Any) -> Workspace | None:
    """The Workspace of what `check_workspace` has checked. None of None, and of a traced tensor, which has no
    address."""
    if workspace is None or type(workspace) is Workspace:
        return workspace
    if type(workspace) not in PLAIN and is_observed(workspace):
        return None
    if workspace.data_ptr() % 16:
        fail("workspace", "an address that is a multiple of 16", f"{workspace.data_ptr():#x}")
    return Workspace(workspace)


def _check_contiguous(name, x):
    if not x.is_contiguous():
        fail(name, "a contiguous tensor", f"strides {x.stride()}")


def workspace_bytes(function: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Bytes of workspace that a call of `paged_attention` or `mla_decode` needs. Nothing is launched or written.

        workspace = torch.empty(workspace_bytes(paged_attention, *args, **options), dtype=torch.uint8, device="cuda")
        paged_attention(*args, **options, out=out, workspace=workspace)

    The shapes, strides and dtypes of the arguments decide, not what they hold: any later call with the same ones, and
    the same options, needs as much. It is 0 where a call passes nothing between kernels, and for the references.

    Args:
        function: `paged_attention` or `mla_decode`.
        args, options: those of the call.

    Raises:
        TypeError, ValueError, NotImplementedError: as the call.

    Example:
        >>> q, cache = torch.randn(2, 1, 8, 64), torch.randn(4, 16, 2, 64)
        >>> lengths, table = torch.tensor([20, 9], dtype=torch.int32), torch.arange(4, dtype=torch.int32).view(2, 2)
        >>> call = triton_attn.paged_attention, q, cache, cache, lengths, table
        >>> workspace = torch.empty(triton_attn.workspace_bytes(*call, num_splits=4), dtype=torch.uint8)
        >>> out = triton_attn.paged_attention(*call[1:], num_splits=4, workspace=workspace)
    """
    workspace = Workspace()
    function(*args, **options, workspace=workspace)
    return workspace.used
