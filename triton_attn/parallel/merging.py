"""Merge the results over each rank's keys: one collective, then a merge by log-sum-exps."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._host.checks import fail
from ..merge import merge_attention

# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
HEADS = ("replicated", "scattered", "sharded")
ALIGNMENT = 64  # bytes: multiples of 16 elements from rank to rank, so that the merge is the same kernel for any batch


def check_heads(heads: str, num_heads: int, num_ranks: int) -> None:
    """Check who has which heads, where num_heads are those of all ranks."""
    if heads not in HEADS:
        fail("heads", " or ".join(map(repr, HEADS)), repr(heads))
    if heads == "scattered" and num_heads % num_ranks:
        fail("q", f"heads in multiples of {num_ranks} ranks with heads='scattered'", num_heads)


def gather_heads(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """(..., heads of all ranks, dim) from this rank's (..., heads, dim), in the order of the ranks."""
    return _gather(x, mesh).movedim(0, -3).flatten(-3, -2)


def merge_ranks(out: Tensor, lse: Tensor, mesh: DeviceMesh, heads: str) -> tuple[Tensor, Tensor]:
    """out (..., rows, heads, dim) and lse (..., heads, rows) over the keys of all ranks, from those over each rank's.

    Of all heads if they are replicated, by an all-gather; otherwise of this rank's, by an all-to-all.
    """
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    num_shares = 1 if heads == "replicated" else mesh.size()
    if out.ndim == 3:
        out, lse = merge_ranks(out[None], lse[None], mesh, heads)
        return out[0], lse[0]
    # (shares, batch, heads, rows) and (shares, batch, rows, heads, dim)
    lses, outs = lse.unflatten(1, (num_shares, -1)).movedim(1, 0), out.unflatten(2, (num_shares, -1)).movedim(2, 0)
    message = _pack(lses, outs)
    received = _gather(message[0], mesh) if num_shares == 1 else _transpose(message, mesh)
    lses, outs = _unpack(received, lses, outs)
    return merge_attention(outs, lses)


def _pack(*tensors):
    """(shares, bytes): what tensors (shares, ...) have of each share, with room for aligned loads from the next."""
    parts = [x.flatten(1).contiguous().view(torch.uint8) for x in tensors]
    size = sum(part.shape[1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(len(parts[0]), -size % ALIGNMENT)], 1)


def _unpack(received, *like):
    """Tensors (ranks, ...) with the shapes and dtypes of like (shares, ...), from the bytes of each rank."""
    found, first = [], 0
    for x in like:
        size = x[0].numel() * x.dtype.itemsize
        found.append(received[:, first : first + size].view(x.dtype).view(len(received), *x.shape[1:]))
        first += size
    return found


def _gather(x, mesh):
    """(ranks, ...) from x of each rank."""
    received = x.new_empty((mesh.size(), *x.shape))
    _all_gather(received.flatten(0, 1), x.contiguous(), group=mesh.get_group())
    return received


def _transpose(x, mesh):
    """(ranks, ...): row r is this rank's row of rank r's x (ranks, ...)."""
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=mesh.get_group())
    return received
