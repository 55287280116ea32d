"""Batches with padding. Their sequences are concatenated for `flash_attention_varlen`. If each row has one query, every
key is a page of its own for `paged_attention`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..flash import flash_attention_varlen
from ..paged import paged_attention


class Packing(NamedTuple):
    """The sequences of a batch without the padding: the arguments of `flash_attention_varlen`.

    `rows_q` and `rows_k` are the indices (batch, position) of the tokens; padding may follow. None takes all tokens,
    one row after the other.
    """

    rows_q: tuple | None
    rows_k: tuple | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int | Tensor
    max_seqlen_k: int | Tensor

    @classmethod
    def from_bounds(cls, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        max_seqlen_q = cu_seqlens_q.diff().max() if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = cu_seqlens_k.diff().max() if max_seqlen_k is None else max_seqlen_k
        return cls(None, None, cu_seqlens_q.int(), cu_seqlens_k.int(), max_seqlen_q, max_seqlen_k)


class Keys(NamedTuple):
    """The keys of a single query for each row of a batch.

    `lengths` (batch,) int32 is their number. `slots` (batch, num_slots) int32 are their slots in the row, followed by
    the other slots. None: they are the first ones.
    """

    lengths: Tensor
    slots: Tensor | None

    @classmethod
    def of(cls, seen):
        """From seen (batch, num_slots), bool."""
        slots = (~seen).to(torch.int8).argsort(dim=1, stable=True)
        return cls(seen.sum(1, dtype=torch.int32), slots.to(torch.int32))


def attend_one(q, k, v, keys, window, options):
    """Queries (batch, 1, heads, head_dim) over their `Keys`. The window is used if these are the first slots."""
    if keys.slots is None:
        return paged_attention(q, k, v, keys.lengths, window_size=window, **options)
    attend = _attend_slots_operator if torch.compiler.is_compiling() else _attend_slots
    return attend(q, k, v, *keys, options["sinks"], options["softmax_scale"], options["softcap"])


def _attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    softmax_scale: float | None,
    softcap: float,
) -> Tensor:
    """`paged_attention` with a page for each slot of k and v (batch, num_slots, heads, dim), which are not copied."""
    batch, num_slots = k.shape[:2]
    apart = _slots_apart(k)
    if apart is None or _slots_apart(v) != apart:
        k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
        apart = num_slots
    # In memory (batch, heads, slots, dim) the slots of a row follow those of all heads of the row before. Pages between
    # them overlap, and are not in the table.
    num_pages = max(0, batch - 1) * apart + num_slots
    k, v = (x.as_strided((num_pages, 1, *x.shape[2:]), (*[x.stride(1)] * 2, *x.stride()[2:])) for x in (k, v))
    first_pages = apart * torch.arange(batch, dtype=torch.int32, device=k.device).unsqueeze(1)
    options = {"sinks": sinks, "softmax_scale": softmax_scale, "softcap": softcap}
    return paged_attention(q, k, v, lengths, slots + first_pages, **options)


# torch.compile may lay out k and v in another way than with the strides that it traces.
_attend_slots_operator = torch.library.custom_op("triton_attn::attend_slots", _attend_slots, mutates_args=())


@_attend_slots_operator.register_fake
def _(q, k, v, *rest):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _slots_apart(x):
    """The distance in memory of two rows of the batch, in slots. None if it is no whole number, or the number of a page
    would not fit in int32.
    """
    batch, num_slots = x.shape[:2]
    if batch <= 1:
        return num_slots
    row, slot = x.stride()[:2]
    fits = slot > 0 and row % slot == 0 and batch * (row // slot) < 2**31
    return row // slot if fits else None


def attend_packed(q, k, v, packing, options):
    rows_q, rows_k, *bounds = packing
    out = flash_attention_varlen(_take(q, rows_q), _take(k, rows_k), _take(v, rows_k), *bounds, **options)
    if rows_q is None:
        return out.unflatten(0, q.shape[:2])
    padded = out.new_zeros(*q.shape[:3], v.shape[3])
    padded[rows_q] = out
    return padded


def _take(x, rows):
    return x.flatten(0, 1) if rows is None else x[rows]


def pack(tokens, queries, seqlen_q, window):
    """The packing of a batch. None if all rows are whole.

    Args:
        tokens: (batch, num_keys), 0 for padding, n for a token of the n-th sequence of its row.
        queries: (batch, seqlen_q), the entries of the tokens that are queries. None: the queries are other tokens,
            without padding.
    """
    if torch.compiler.is_compiling():
        return _pack_traced(tokens, queries, seqlen_q, window)
    if tokens.numel() == 0:
        return None
    batch, real = tokens.shape[0], tokens > 0
    all_real = bool(real.all())
    num_sequences = max(1, int(tokens.max()))
    if all_real and num_sequences == 1:
        return None
    if window[0] >= 0 and _has_holes(real):
        raise NotImplementedError("attention_mask: expected no padding between tokens under a sliding window")
    if num_sequences > 1 and bool((real & (tokens < tokens.cummax(1).values)).any()):
        raise NotImplementedError("mask_function: expected sequences one after the other")

    first_sequence = num_sequences * torch.arange(batch, device=tokens.device)[:, None] - 1

    def lengths(part):
        return torch.bincount((part + first_sequence)[part > 0], minlength=batch * num_sequences)

    def rows(part):
        return None if all_real else (part > 0).nonzero(as_tuple=True)

    lengths_k = lengths(tokens)
    if queries is None:
        rows_q, lengths_q = None, torch.full_like(lengths_k, seqlen_q)
    else:
        rows_q, lengths_q = rows(queries), lengths(queries)
    longest = int(lengths_q.max()), int(lengths_k.max())
    return Packing(rows_q, rows(tokens), _bounds(lengths_q), _bounds(lengths_k), *longest)


def _has_holes(real):
    """Whether a row has padding between its tokens. Without the padding they would be closer together."""
    runs = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    return bool((runs > 1).any())


def _bounds(lengths):
    return pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


# In a traced graph values are unknown. They are computed in the graph, or by an operator if they decide a shape or an
# error.


def _pack_traced(tokens, queries, seqlen_q, window):
    rows_q = None if queries is None else _real_first(queries)
    if seqlen_q == 1:  # a decode step, which CUDA graphs can capture: one sequence per row, no device-to-host sync
        lengths_k = (tokens > 0).sum(1)
        lengths_q = torch.ones_like(lengths_k) if queries is None else (queries > 0).sum(1)
        bounds = _bounds(lengths_q), _bounds(lengths_k), 1, tokens.shape[1]
    else:
        bounds = _pack_bounds(tokens, queries, seqlen_q, *window)
    return Packing(rows_q, _real_first(tokens), *bounds)


def _real_first(tokens):
    """(batch, position) of all tokens, followed by those of the padding."""
    order = (tokens == 0).flatten().to(torch.int8).argsort(stable=True)
    return order // tokens.shape[1], order % tokens.shape[1]


@torch.library.custom_op("triton_attn::pack_bounds", mutates_args=())
def _pack_bounds(
    tokens: Tensor, queries: Tensor | None, seqlen_q: int, window_left: int, window_right: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last four values of `pack`. The longest lengths are in host memory, where every layer reads them."""
    packing = pack(tokens, queries, seqlen_q, (window_left, window_right))
    if packing is None:
        each = torch.ones(tokens.shape[0], dtype=torch.int32, device=tokens.device)
        bounds = _bounds(each * seqlen_q), _bounds(each * tokens.shape[1])
        return *bounds, torch.tensor(seqlen_q), torch.tensor(tokens.shape[1])
    *_, bounds_q, bounds_k, longest_q, longest_k = packing
    return bounds_q, bounds_k, torch.tensor(longest_q), torch.tensor(longest_k)


@_pack_bounds.register_fake
def _(tokens, *rest):
    num_bounds = torch.library.get_ctx().new_dynamic_size(min=1)
    bounds = [tokens.new_empty(num_bounds, dtype=torch.int32) for _ in range(2)]
    return *bounds, *[torch.empty((), dtype=torch.int64, device="cpu") for _ in range(2)]
