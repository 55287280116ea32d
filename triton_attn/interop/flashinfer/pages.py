"""CSR page lists and indptrs on the device, and functions that append keys and values to pages."""

from typing import Any

import torch
from torch import Tensor

from ...cache import append_kv_cache
from .arguments import CacheLike, check_layout, fail


class PageLists:
    """CSR page lists as `paged_attention` takes them: block_table (batch, max_pages) and seqlens (batch,), int32.

    The table's storage has one more row at each end, for entries of `indices` that belong to no sequence. `fixed` is
    (batch, max_pages) of a table that every `fill` writes in place. `lengths` names the argument that holds lengths.
    """

    def __init__(self, device, fixed=None, lengths="last_page_len"):
        self.device, self.fixed, self.lengths = device, fixed, lengths
        self.block_table: Any = None
        self.seqlens: Any = None
        if fixed is not None:
            batch, max_pages = fixed
            self._storage = torch.empty((batch + 2, max(1, max_pages)), dtype=torch.int32, device=device)
            self.block_table = self._storage[1:-1]
            self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)

    def fill(self, indptr, indices, seqlens, page_size, block_tables=None):
        """From indptr (batch + 1,), indices (indptr[-1] or more,) and the lengths; a given table replaces the lists.

        A length beyond the pages of a sequence counts as their end."""
        batch = len(indptr) - 1
        if len(seqlens) != batch:
            fail(self.lengths, f"shape ({batch},), one less than indptr", f"shape {tuple(seqlens.shape)}")
        if self.fixed is not None:
            self._check_fixed(indptr, indices, block_tables)
        seqlens = seqlens.to(self.device, torch.int32, non_blocking=True)
        if block_tables is None:
            room = indptr.diff() * page_size
            seqlens = torch.minimum(seqlens, room.to(self.device, torch.int32, non_blocking=True))
        if self.fixed is not None:
            self.seqlens.copy_(seqlens)
        else:
            self.seqlens = seqlens.contiguous()
        if block_tables is None:
            self._fill_table(indptr, indices)
        elif self.fixed is None:
            self.block_table = block_tables.to(self.device, torch.int32, non_blocking=True).contiguous()
        else:
            self.block_table[:, : block_tables.shape[1]].copy_(block_tables, non_blocking=True)

    def _check_fixed(self, indptr, indices, block_tables):
        """Before anything is written: a failed `plan` leaves the one before."""
        batch, max_pages = self.block_table.shape
        if len(indptr) != batch + 1:
            fail("indptr", f"shape ({batch + 1},), of the buffers' batch", f"shape {tuple(indptr.shape)}")
        if block_tables is None and len(indices) > max_pages:
            fail("indices", f"at most {max_pages} pages, the length of the buffer", len(indices))
        if block_tables is not None and (len(block_tables) != batch or block_tables.shape[1] > max_pages):
            fail("block_tables", f"shape ({batch}, {max_pages} or fewer)", f"shape {tuple(block_tables.shape)}")

    def _fill_table(self, indptr, indices):
        batch = len(indptr) - 1
        if self.fixed is not None:
            storage = self._storage
        else:
            max_pages = len(indices)  # a bound that takes no sync
            if indptr.device.type == "cpu" and batch > 0:
                first, last, max_pages = int(indptr[0]), int(indptr[-1]), int(indptr.diff().max())
                indptr, indices = indptr - first, indices[first:last]
            storage = torch.empty((batch + 2, max(1, max_pages)), dtype=torch.int32, device=self.device)
            self.block_table = storage[1:-1]
        if batch == 0 or len(indices) == 0:
            return
        stride = storage.shape[1]
        indptr = indptr.to(self.device, torch.int32, non_blocking=True)
        indices = indices.to(self.device, torch.int32, non_blocking=True)
        entries = torch.arange(len(indices), dtype=torch.int32, device=self.device)
        rows = torch.searchsorted(indptr[1:], entries, right=True)  # batch: past the last sequence
        shifts = torch.arange(stride, (batch + 2) * stride, stride, device=self.device) - indptr
        storage.view(-1).scatter_(0, shifts[rows] + entries, indices)


class Bounds:
    """An indptr of packed sequences on the device, and the longest length where the host knows it."""

    def __init__(self, name, device, use_cuda_graph, buffer):
        self.name, self.device, self.use_cuda_graph = name, device, use_cuda_graph
        self.indptr: Any = None
        self.longest, self.is_filled = None, False
        if use_cuda_graph:
            check_buffers({f"{name}_buf": buffer})
            self.indptr = buffer

    def check(self, indptr, longest):
        """Before anything is written."""
        if self.use_cuda_graph:
            if indptr.shape != self.indptr.shape:
                fail(self.name, f"the buffer's shape {tuple(self.indptr.shape)}", f"shape {tuple(indptr.shape)}")
            if self.is_filled and longest != self.longest:
                fail(f"longest of {self.name}", f"what the graph was planned with, {self.longest}", longest)

    def fill(self, indptr, longest):
        """From an indptr that `check` has seen."""
        if self.use_cuda_graph:
            self.indptr.copy_(indptr, non_blocking=True)
        else:
            if longest is None and indptr.device.type == "cpu":
                longest = int(indptr.diff().max()) if len(indptr) > 1 else 0
            self.indptr = indptr.to(self.device, torch.int32, non_blocking=True).contiguous()
        self.longest, self.is_filled = longest, True

    def longest_of(self, x):
        """A bound of the lengths of sequences in x."""
        return x.shape[0] if self.longest is None else self.longest


def sizes_of(buffers):
    """(batch, max_pages) of buffers of an indptr, indices and a length of each sequence."""
    check_buffers(buffers)
    (name, indptr), (_, indices), (_, lengths) = buffers.items()
    if len(indptr) != len(lengths) + 1:
        fail(name, f"a buffer of shape ({len(lengths) + 1},)", tuple(indptr.shape))
    return len(lengths), len(indices)


def check_buffers(buffers):
    for name, buffer in buffers.items():
        if not isinstance(buffer, torch.Tensor):
            fail(name, "a tensor with use_cuda_graph=True", type(buffer), TypeError)


def split_cache(paged_kv_cache, kv_layout):
    """Views (num_pages, page_size, num_kv_heads, head_dim) of keys and values."""
    if isinstance(paged_kv_cache, torch.Tensor):
        if paged_kv_cache.ndim not in (4, 5) or paged_kv_cache.shape[1] != 2:
            shape = "(num_pages, 2, *page), or a pair of tensors"
            fail("paged_kv_cache", shape, f"shape {tuple(paged_kv_cache.shape)}")
        k_cache, v_cache = paged_kv_cache.unbind(1)
    elif isinstance(paged_kv_cache, (tuple, list)) and len(paged_kv_cache) == 2:
        k_cache, v_cache = paged_kv_cache
    else:
        fail("paged_kv_cache", "a tensor or a pair of tensors", type(paged_kv_cache), TypeError)
    if k_cache.ndim == 3:  # pages of one key
        return k_cache.unsqueeze(1), v_cache.unsqueeze(1)
    if kv_layout == "HND":
        return k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return k_cache, v_cache


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """(batch,) keys of each sequence: all of its pages are full but the last. A sequence without pages has none.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> kv_indptr, kv_last_page_len = torch.tensor([0, 3, 4]), torch.tensor([5, 16])
        >>> flashinfer.get_seq_lens(kv_indptr, kv_last_page_len, page_size=16)
        tensor([37, 16])
    """
    num_pages = kv_indptr.diff()
    return torch.where(num_pages > 0, (num_pages - 1) * page_size + kv_last_page_len.to(num_pages.device), 0)


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sequence and position of each of nnz new tokens, (nnz,) int32 both; -1 and 0 past append_indptr[-1].

    The new tokens of a sequence, append_indptr[i + 1] - append_indptr[i] of them, are the last of its seq_lens[i].

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> append_indptr, seq_lens = torch.tensor([0, 1, 3]), torch.tensor([9, 2])  # one and two new tokens
        >>> flashinfer.get_batch_indices_positions(append_indptr, seq_lens, nnz=3)
        (tensor([0, 1, 1], dtype=torch.int32), tensor([8, 0, 1], dtype=torch.int32))
    """
    batch = len(append_indptr) - 1
    tokens = torch.arange(nnz, dtype=append_indptr.dtype, device=append_indptr.device)
    sequences = torch.searchsorted(append_indptr[1:], tokens, right=True)
    ends = torch.nn.functional.pad(seq_lens.to(append_indptr.device) - append_indptr[1:], (0, 1))
    inside = sequences < batch
    sequences, tokens = torch.where(inside, sequences, -1).int(), torch.where(inside, tokens + ends[sequences], 0).int()
    return (
        sequences if batch_indices is None else batch_indices.copy_(sequences),
        tokens if positions is None else positions.copy_(tokens),
    )


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: CacheLike,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """`triton_attn.append_kv_cache` of new keys and values (nnz, num_kv_heads, head_dim), in place.

    Args:
        append_key, append_value: of the cache's dtype, or fp16, bf16 or fp32 for an fp8 cache.
        batch_indices, positions: (nnz,), as `get_batch_indices_positions` gives them. A token is skipped if its
            sequence is below 0, or if its position is beyond the pages of its sequence.
        paged_kv_cache, kv_indices, kv_indptr, kv_layout: as in `BatchDecodeWithPagedKVCacheWrapper`.
        kv_last_page_len: not read; positions imply it.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> cache, k = torch.zeros(4, 2, 16, 2, 64), torch.ones(1, 2, 64)  # the ninth token of a sequence, on page 3
        >>> indptr, indices, last = torch.tensor([[0, 1], [3, 0], [9, 0]], dtype=torch.int32)
        >>> token = torch.tensor([0], dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
        >>> flashinfer.append_paged_kv_cache(k, k, *token, cache, indices[:1], indptr, last[:1])
        >>> cache[3, 0, 8].sum().item()
        128.0
    """
    k_cache, v_cache = split_cache(paged_kv_cache, check_layout(kv_layout))
    if append_key.shape[0] == 0 or len(kv_indices) == 0:
        return
    slots = _slots(batch_indices, positions, kv_indices, kv_indptr, k_cache.shape[1])
    if append_key.dtype.itemsize == 1:  # every fp8 number is one of bf16, and comes back from it
        append_key, append_value = append_key.bfloat16(), append_value.bfloat16()
    append_kv_cache(append_key, append_value, k_cache, v_cache, slots)


def append_paged_mla_kv_cache(
    append_ckv: Tensor,
    append_kpe: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """`append_paged_kv_cache` of latent vectors (nnz, head_dim_ckv) and rotary keys (nnz, head_dim_kpe). The caches are
    those of `BatchMLAPagedAttentionWrapper`. Values for fp8 caches must already be divided by the scales; they
    saturate.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> indptr, indices, last = torch.tensor([[0, 1], [3, 0], [9, 0]], dtype=torch.int32)
        >>> token = torch.tensor([0], dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
        >>> new, cache = (torch.ones(1, 512), torch.ones(1, 64)), (torch.zeros(4, 16, 512), torch.zeros(4, 16, 64))
        >>> flashinfer.append_paged_mla_kv_cache(*new, *token, *cache, indices[:1], indptr, last[:1])
        >>> cache[0][3, 8].sum().item()
        512.0
    """
    keys, values = append_ckv[:, None], append_kpe[:, None]
    cache = ckv_cache.unsqueeze(2), kpe_cache.unsqueeze(2)
    append_paged_kv_cache(keys, values, batch_indices, positions, cache, kv_indices, kv_indptr, kv_last_page_len)


def _slots(batch_indices, positions, kv_indices, kv_indptr, page_size):
    """The slots of tokens, int64; -1 of those that are no sequence's, or beyond the pages of theirs."""
    sequences, positions = batch_indices.long(), positions.long()
    own = sequences.clamp(min=0)
    entries = kv_indptr[own] + positions // page_size
    is_inside = (sequences >= 0) & (positions >= 0) & (entries < kv_indptr[own + 1])
    pages = kv_indices[entries.clamp(0, len(kv_indices) - 1)].long()
    return torch.where(is_inside, pages * page_size + positions % page_size, -1)
