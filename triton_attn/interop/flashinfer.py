"""FlashInfer's attention wrappers and functions on our kernels: the same signatures, defaults and return values.

    from triton_attn.interop import flashinfer      # was: import flashinfer

`plan` turns CSR page lists into a block table on the device, without a device-to-host sync, and `run` is one call of
`paged_attention` or `flash_attention_varlen`. lse has base 2 and shape (tokens, heads), as in FlashInfer. No result
depends on options that choose among FlashInfer's kernels, nor on workspace buffers, of which only the device is read:
backend, use_tensor_cores, enable_pdl, non_blocking. Nothing else is ignored: what is not supported raises
NotImplementedError. Signatures: FlashInfer 0.6.

With use_cuda_graph=True the block table, lengths and indptrs stay where they are, `plan` writes them in place, and a
captured `run` follows each later `plan`. `plan` with device tensors makes no sync, so that it can be captured too.
"""

import functools
import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..cache import append_kv_cache
from ..flash import flash_attention, flash_attention_varlen
from ..merge import merge_attention
from ..mla import mla_decode
from ..paged import paged_attention
from .support import Support

SUPPORT = Support(
    functions=(
        "BatchDecodeWithPagedKVCacheWrapper",
        "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
        "BatchMLAPagedAttentionWrapper",
        "single_decode_with_kv_cache",
        "single_prefill_with_kv_cache",
        "merge_state",
        "merge_states",
        "merge_state_in_place",
        "get_seq_lens",
        "get_batch_indices_positions",
        "append_paged_kv_cache",
        "append_paged_mla_kv_cache",
    ),
    on_cpu="all, by the references or in the interpreter",
    refused={
        "custom_mask": "a tensor",
        "pos_encoding_mode": "ROPE_LLAMA, or ALIBI with a soft cap or without causal",
        "fixed_split_size": "a number",
        "kv_cache_sf": "tensors, for NVFP4 caches",
        "ckv_scale": "a number, for MLA caches in fp8",
    },
)
LOG2_E = math.log2(math.e)
CacheLike = Tensor | tuple[Tensor, Tensor]
DtypeLike = torch.dtype | str


class _PageLists:
    """CSR page lists as `paged_attention` takes them: block_table (batch, max_pages) and seqlens (batch,), int32.

    The table's storage has a row more at either end, for entries of `indices` that belong to no sequence. `fixed` is
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

    def fill(self, indptr, indices, seqlens, block_tables=None):
        """From indptr (batch + 1,), indices (indptr[-1] or more,) and the lengths; a given table replaces the lists."""
        batch = len(indptr) - 1
        if len(seqlens) != batch:
            _fail(self.lengths, f"shape ({batch},), one less than indptr", f"shape {tuple(seqlens.shape)}")
        if self.fixed is not None:
            self._check_fixed(indptr, indices, block_tables)
            self.seqlens.copy_(seqlens, non_blocking=True)
        else:
            self.seqlens = seqlens.to(self.device, torch.int32, non_blocking=True).contiguous()
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
            _fail("indptr", f"shape ({batch + 1},), of the buffers' batch", f"shape {tuple(indptr.shape)}")
        if block_tables is None and len(indices) > max_pages:
            _fail("indices", f"at most {max_pages} pages, the length of the buffer", len(indices))
        if block_tables is not None and (len(block_tables) != batch or block_tables.shape[1] > max_pages):
            _fail("block_tables", f"shape ({batch}, {max_pages} or fewer)", f"shape {tuple(block_tables.shape)}")

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


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """(batch,) keys of each sequence: all of its pages are full but the last. A sequence without pages has none."""
    num_pages = kv_indptr.diff()
    return torch.where(num_pages > 0, (num_pages - 1) * page_size + kv_last_page_len.to(num_pages.device), 0)


class _Wrapper:
    """What all wrappers have: the device, the layout, a plan."""

    def __init__(self, float_workspace_buffer, kv_layout, use_cuda_graph):
        self.device = float_workspace_buffer.device
        self._kv_layout = _check_layout(kv_layout)
        self._use_cuda_graph = bool(use_cuda_graph)
        self._options: Any = None  # of `plan`

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor | None) -> None:
        """Nothing: our kernels take no workspace."""

    def end_forward(self) -> None:
        """Nothing, as in FlashInfer."""

    def _kinds(self, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, dtypes):
        """What `run` compares q, and keys and values with. dtypes are those of q, of keys and values, of the output."""
        q_dtype, kv_dtype, o_dtype = dtypes
        q_dtype = _dtype(q_dtype)
        kv_dtype = q_dtype if kv_dtype is None else _dtype(kv_dtype)
        if o_dtype is not None and _dtype(o_dtype) != q_dtype:
            raise NotImplementedError(f"o_data_type: q's dtype {q_dtype} is supported, got {o_dtype}")
        kv_kinds = tuple((page_size, num_kv_heads, dim, kv_dtype) for dim in (head_dim_qk, head_dim_vo))
        return (num_qo_heads, head_dim_qk, q_dtype), kv_kinds

    def _check_planned(self, q):
        if self._options is None:
            raise RuntimeError("run: expected a call of plan before")
        if (*q.shape[1:], q.dtype) != self._q_kind:
            _fail("q", f"(tokens, heads, head_dim) and dtype as planned {self._q_kind}", f"{(*q.shape, q.dtype)}")

    def _options_of(self, q_kind, causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale):
        num_heads, head_dim, _ = q_kind
        return dict(
            _attention_options(pos_encoding_mode, window_left, logits_soft_cap, causal, num_heads, self.device),
            softmax_scale=_sm_scale(sm_scale, head_dim),
        )

    def _set_plan(self, kinds, options):
        """The last step of `plan`: one that fails leaves the plan before."""
        self._q_kind, self._kv_kinds = kinds
        self._options = options


class _PagedWrapper(_Wrapper):
    """What the two wrappers over a paged cache share."""

    def __init__(self, float_workspace_buffer, kv_layout, use_cuda_graph, buffers):
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        fixed = None
        if use_cuda_graph:
            fixed = _sizes_of(buffers)
        self._pages = _PageLists(self.device, fixed)

    def _plan_pages(self, indptr, indices, last_page_len, page_size, block_tables, seq_lens):
        seqlens = get_seq_lens(indptr, last_page_len, page_size) if seq_lens is None else seq_lens.flatten()
        self._pages.fill(indptr, indices, seqlens, block_tables)

    def _caches(self, paged_kv_cache):
        """Keys and values (num_pages, page_size, num_kv_heads, head_dim), as planned."""
        k_cache, v_cache = _split_cache(paged_kv_cache, self._kv_layout)
        k_kind, v_kind = self._kv_kinds
        if (*k_cache.shape[1:], k_cache.dtype) != k_kind or (*v_cache.shape[1:], v_cache.dtype) != v_kind:
            got = tuple((*x.shape, x.dtype) for x in (k_cache, v_cache))
            _fail("paged_kv_cache", f"pages of {self._kv_kinds}, as planned", got)
        return k_cache, v_cache

    def _attend(self, q, paged_kv_cache, scales, window_left, **options):
        k_cache, v_cache = self._caches(paged_kv_cache)
        options |= self._options
        if scales != (None, None, None):
            options |= _scales(options["softmax_scale"], *scales)
        if window_left is not None and window_left != options["window_size"][0]:
            _fail("window_left", f"None or what was planned, {options['window_size'][0]}", window_left)
        return paged_attention(q, k_cache, v_cache, self._pages.seqlens, self._pages.block_table, **options)


class BatchDecodeWithPagedKVCacheWrapper(_PagedWrapper):
    """One query, or q_len_per_req of them, of each sequence over a paged cache: `plan` per step, `run` per layer.

    Args:
        float_workspace_buffer: any tensor on the device of the cache.
        kv_layout: "NHD", pages (page_size, num_kv_heads, head_dim), or "HND", (num_kv_heads, page_size, head_dim).
        use_cuda_graph: see the module. The buffers, of which only the sizes are read, are needed then: the batch is
            that of paged_kv_last_page_len_buffer, and the table takes (batch + 2) len(paged_kv_indices_buffer) int32.
        use_tensor_cores, backend: not read.
        jit_args: None.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: None = None,
    ) -> None:
        _refuse(jit_args=jit_args)
        buffers = dict(
            paged_kv_indptr_buffer=paged_kv_indptr_buffer,
            paged_kv_indices_buffer=paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
        )
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self._use_tensor_cores = bool(use_tensor_cores)

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: DtypeLike | None = "float16",
        kv_data_type: DtypeLike | None = None,
        o_data_type: DtypeLike | None = None,
        data_type: DtypeLike | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
    ) -> None:
        """Take the page lists and options of the next `run` calls.

        Args:
            indptr: (batch + 1,) int32, where the pages of each sequence begin in indices. On the CPU it gives the
                block table its exact width; on the device the width is len(indices), which takes memory, not time.
            indices: (indptr[-1],) int32 or more, the pages.
            last_page_len: (batch,) int32, keys in the last page of each sequence.
            pos_encoding_mode: "NONE" or "ALIBI", with FlashInfer's slopes. "ROPE_LLAMA" raises NotImplementedError:
                `triton_attn.append_kv_cache` rotates keys as it writes them.
            window_left: keys before the query's own that it sees; -1 is all.
            logits_soft_cap: as softcap of `paged_attention`; None is 0, none. Not with ALIBI.
            q_data_type, kv_data_type, o_data_type, data_type: what `run` expects; kv_data_type q's dtype or fp8,
                o_data_type q's dtype. data_type stands for the first two where they are None.
            sm_scale: None is head_dim ** -0.5.
            rope_scale, rope_theta, non_blocking: not read.
            block_tables: (batch, max_pages), taken in place of indptr and indices.
            seq_lens: (batch,), taken in place of last_page_len.
            fixed_split_size: None. disable_split_kv=True makes results independent of the batch.
            disable_split_kv: one split of the keys.
            q_len_per_req: queries of each sequence, under a causal mask.
            window_right: 0.
        """
        _refuse(fixed_split_size=fixed_split_size, window_right=window_right or None)
        q_data_type = data_type if q_data_type is None else q_data_type
        kv_data_type = data_type if kv_data_type is None else kv_data_type
        if self._use_cuda_graph and self._options is not None and q_len_per_req != self._q_len:
            _fail("q_len_per_req", f"what the graph was planned with, {self._q_len}", q_len_per_req)
        dtypes = q_data_type, kv_data_type, o_data_type
        kinds = self._kinds(num_qo_heads, num_kv_heads, head_dim, head_dim, page_size, dtypes)
        options = self._options_of(kinds[0], True, pos_encoding_mode, window_left, logits_soft_cap, sm_scale)
        self._plan_pages(indptr, indices, last_page_len, page_size, block_tables, seq_lens)
        self._q_len = q_len_per_req
        self._num_splits = int(disable_split_kv)
        self._set_plan(kinds, options)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: CacheLike,
        *args: Any,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: None = None,
        kv_cache_sf: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`triton_attn.paged_attention` of q (batch * q_len_per_req, num_qo_heads, head_dim).

        Args:
            paged_kv_cache: one tensor (num_pages, 2, *page) or a pair of (num_pages, *page), page as kv_layout says; a
                page of one key may leave its dimension out.
            args: none, as without a JIT module.
            q_scale, k_scale, v_scale: factors of queries, keys and values: numbers, or fp32 tensors of one element or,
                of k_scale and v_scale, of one for each KV head.
            out, lse: where to write the results.
            window_left, q_len_per_req: None, or what was planned.
            sinks: (num_qo_heads,), as in `paged_attention`.
            skip_softmax_threshold_scale_factor, kv_cache_sf: None.

        Returns:
            out, q's shape and dtype, and with return_lse lse (batch * q_len_per_req, num_qo_heads) fp32, base 2. A
            sequence without keys has out = 0 and lse = -inf. With ALIBI lse counts distances from the query's position.
        """
        _refuse_run(args, kv_cache_sf, skip_softmax_threshold_scale_factor)
        self._check_planned(q)
        batch, q_len = self._pages.seqlens.shape[0], self._q_len
        if q.shape[0] != batch * q_len or q_len_per_req not in (None, q_len):
            _fail("q", f"{batch * q_len} rows, {q_len} for each of {batch} sequences", q.shape[0])
        result = self._attend(
            q.unsqueeze(1) if q_len == 1 else q.unflatten(0, (batch, q_len)),
            paged_kv_cache,
            (q_scale, k_scale, v_scale),
            window_left,
            sinks=sinks,
            num_splits=self._num_splits,
            out=None if out is None else out.unflatten(0, (batch, q_len)),
            return_lse=return_lse,
        )
        if not return_lse:
            return result.squeeze(1) if q_len == 1 else result.flatten(0, 1)
        result, natural = result
        return result.flatten(0, 1), _base_2(natural.transpose(1, 2).flatten(0, 1), lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: CacheLike,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`run` with other options than were planned; FlashInfer's older name."""
        self._check_planned(q)
        options = pos_encoding_mode, window_left, logits_soft_cap, sm_scale
        self._options = self._options_of(self._q_kind, True, *options)
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` with use_cuda_graph=True."""

    def __init__(
        self,
        workspace_buffer: Tensor,
        indptr_buffer: Tensor,
        indices_buffer: Tensor,
        last_page_len_buffer: Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        buffers = indptr_buffer, indices_buffer, last_page_len_buffer
        super().__init__(workspace_buffer, kv_layout, True, use_tensor_cores, *buffers)


class BatchPrefillWithPagedKVCacheWrapper(_PagedWrapper):
    """Any number of queries of each sequence, the last of its tokens or, not causal, any, over a paged cache.

    Args:
        float_workspace_buffer, kv_layout, backend: as in `BatchDecodeWithPagedKVCacheWrapper`.
        use_cuda_graph: see the module. The four buffers are needed then: `plan` writes qo_indptr_buf, and of the others
            only the sizes are read. `run` takes as many rows of q at every replay; those past qo_indptr[-1] are 0.
        custom_mask_buf, mask_indptr_buf, jit_args, jit_kwargs: None.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: None = None,
        mask_indptr_buf: None = None,
        backend: str = "auto",
        jit_args: None = None,
        jit_kwargs: None = None,
    ) -> None:
        _refuse_custom_masks(custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf)
        _refuse(jit_args=jit_args, jit_kwargs=jit_kwargs)
        buffers = dict(
            paged_kv_indptr_buf=paged_kv_indptr_buf,
            paged_kv_indices_buf=paged_kv_indices_buf,
            paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
        )
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self._queries = _Bounds("qo_indptr", self.device, use_cuda_graph, qo_indptr_buf)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: None = None,
        packed_custom_mask: None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: DtypeLike = "float16",
        kv_data_type: DtypeLike | None = None,
        o_data_type: DtypeLike | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: None = None,
        token_pos_in_items_ptr: None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """As `BatchDecodeWithPagedKVCacheWrapper.plan`, with these of its own.

        Args:
            qo_indptr: (batch + 1,) int32 from 0, where the queries of each sequence begin in q.
            head_dim_vo: of values and outputs; None is head_dim_qk.
            causal: query i sees no key after its own position, aligned to the bottom right. False with ALIBI raises
                NotImplementedError: FlashInfer's bias grows with keys after the query, ours falls with any distance.
            max_token_per_sequence: the most queries of a sequence; by it tiles are chosen. None is read from a
                qo_indptr on the CPU, and is otherwise the rows of q. Under a CUDA graph every plan has the same.
            seq_lens_q, max_sequence_kv: not read; the indptrs say it.
            custom_mask, packed_custom_mask, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len,
                max_item_len_ptr, use_fp16_qk_reduction: their defaults.
        """
        _refuse_prefill(
            custom_mask,
            packed_custom_mask,
            use_fp16_qk_reduction,
            prefix_len_ptr,
            token_pos_in_items_ptr,
            token_pos_in_items_len,
            max_item_len_ptr,
            fixed_split_size,
        )
        head_dim_vo = head_dim_qk if head_dim_vo is None else head_dim_vo
        dtypes = q_data_type, kv_data_type, o_data_type
        kinds = self._kinds(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, dtypes)
        options = self._options_of(kinds[0], causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale)
        self._queries.check(qo_indptr, max_token_per_sequence)
        indices = paged_kv_indices
        self._plan_pages(paged_kv_indptr, indices, paged_kv_last_page_len, page_size, block_tables, seq_lens)
        self._queries.fill(qo_indptr, max_token_per_sequence)
        self._num_splits = int(disable_split_kv)
        self._set_plan(kinds, options)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: CacheLike,
        *args: Any,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: None = None,
        skip_softmax_threshold_scale_factor: None = None,
        use_fp16_softmax: None = None,
        uses_spcompress: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`triton_attn.paged_attention` of q (qo_indptr[-1] or more, num_qo_heads, head_dim_qk).

        Arguments and results as those of `BatchDecodeWithPagedKVCacheWrapper.run`; use_fp16_softmax and
        uses_spcompress are None. Rows of q past qo_indptr[-1] have out = 0 and lse = -inf.
        """
        _refuse_run(args, kv_cache_sf, skip_softmax_threshold_scale_factor, use_fp16_softmax, uses_spcompress)
        self._check_planned(q)
        result = self._attend(
            q,
            paged_kv_cache,
            (q_scale, k_scale, v_scale),
            window_left,
            cu_seqlens_q=self._queries.indptr,
            max_seqlen_q=self._queries.longest_of(q),
            sinks=sinks,
            num_splits=self._num_splits,
            out=out,
            return_lse=return_lse,
        )
        if not return_lse:
            return result
        result, natural = result
        return result, _base_2(natural.T, lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: CacheLike,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`run` with other options than were planned; FlashInfer's older name."""
        _refuse(use_fp16_qk_reduction=use_fp16_qk_reduction or None)
        self._check_planned(q)
        options = pos_encoding_mode, window_left, logits_soft_cap, sm_scale
        self._options = self._options_of(self._q_kind, causal, *options)
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    """Queries over keys and values that are packed too, without pages; `triton_attn.flash_attention_varlen`.

    Args:
        float_workspace_buffer, kv_layout, backend: as in `BatchDecodeWithPagedKVCacheWrapper`; "HND" keys are
            (num_kv_heads, total_k, head_dim).
        use_cuda_graph: see the module. qo_indptr_buf and kv_indptr_buf are needed then, and written by `plan`.
        custom_mask_buf, mask_indptr_buf, jit_args, jit_kwargs: None.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
        custom_mask_buf: None = None,
        mask_indptr_buf: None = None,
        backend: str = "auto",
        jit_args: None = None,
        jit_kwargs: None = None,
    ) -> None:
        _refuse_custom_masks(custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf)
        _refuse(jit_args=jit_args, jit_kwargs=jit_kwargs)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._queries = _Bounds("qo_indptr", self.device, use_cuda_graph, qo_indptr_buf)
        self._keys = _Bounds("kv_indptr", self.device, use_cuda_graph, kv_indptr_buf)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: None = None,
        packed_custom_mask: None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: DtypeLike = "float16",
        kv_data_type: DtypeLike | None = None,
        o_data_type: DtypeLike | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: None = None,
        token_pos_in_items_ptr: None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: None = None,
        fixed_split_size: None = None,
        disable_split_kv: bool = False,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: None = None,
        o_indptr: None = None,
    ) -> None:
        """As `BatchPrefillWithPagedKVCacheWrapper.plan`, with kv_indptr (batch + 1,), where keys begin in k and v.

        kv_data_type is q's dtype, max_sequence_kv for keys what max_token_per_sequence is for queries; keys are never
        split, whatever disable_split_kv says; seq_lens is not read, v_indptr and o_indptr are None.
        """
        _refuse(v_indptr=v_indptr, o_indptr=o_indptr)
        _refuse_prefill(
            custom_mask,
            packed_custom_mask,
            use_fp16_qk_reduction,
            prefix_len_ptr,
            token_pos_in_items_ptr,
            token_pos_in_items_len,
            max_item_len_ptr,
            fixed_split_size,
        )
        head_dim_vo = head_dim_qk if head_dim_vo is None else head_dim_vo
        dtypes = q_data_type, kv_data_type, o_data_type
        kinds = self._kinds(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, None, dtypes)
        options = self._options_of(kinds[0], causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale)
        self._queries.check(qo_indptr, max_token_per_sequence)
        self._keys.check(kv_indptr, max_sequence_kv)
        self._queries.fill(qo_indptr, max_token_per_sequence)
        self._keys.fill(kv_indptr, max_sequence_kv)
        self._set_plan(kinds, options)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`triton_attn.flash_attention_varlen` of q (qo_indptr[-1], num_qo_heads, head_dim_qk), k and v.

        Args:
            k, v: (kv_indptr[-1], num_kv_heads, head_dim), or with the first two dimensions swapped as "HND".
            q_scale, k_scale, v_scale: numbers. v_scale other than 1 takes one more kernel.
            out, lse: where to write the results, which takes a copy.
            o_scale, kv_cache_sf: None.

        Returns:
            out (qo_indptr[-1], num_qo_heads, head_dim_vo), and with return_lse lse (qo_indptr[-1], num_qo_heads) fp32,
            base 2; 0 and -inf where a query sees no key.
        """
        _refuse_run(args, kv_cache_sf)
        _refuse(o_scale=o_scale)
        self._check_planned(q)
        if self._kv_layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        for name, x, kind in zip(("k", "v"), (k, v), self._kv_kinds):
            if (*x.shape[1:], x.dtype) != kind[1:]:
                _fail(name, f"(tokens, heads, head_dim) and dtype as planned {kind[1:]}", f"{(*x.shape, x.dtype)}")
        options = self._options
        if q_scale is not None or k_scale is not None:
            factor = _number("q_scale", q_scale) * _number("k_scale", k_scale)
            options = options | dict(softmax_scale=options["softmax_scale"] * factor)
        queries, keys = self._queries, self._keys
        lengths: Any = queries.indptr, keys.indptr, queries.longest_of(q), keys.longest_of(k)
        result: Any = flash_attention_varlen(q, k, v, *lengths, **options, return_lse=return_lse)
        natural = None
        if return_lse:
            result, natural = result
        if v_scale is not None and v_scale != 1:
            result = result * _number("v_scale", v_scale)
        result = result if out is None else out.copy_(result)
        return result if natural is None else (result, _base_2(natural.T, lse))

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`run` with other options than were planned; FlashInfer's older name."""
        _refuse(use_fp16_qk_reduction=use_fp16_qk_reduction or None)
        self._check_planned(q)
        options = pos_encoding_mode, window_left, logits_soft_cap, sm_scale
        self._options = self._options_of(self._q_kind, causal, *options)
        return self.run(q, k, v, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


class BatchMLAPagedAttentionWrapper(_Wrapper):
    """Absorbed MLA queries, any number of each sequence, over latent vectors and rotary keys in pages of two tensors.

    Args:
        float_workspace_buffer: any tensor on the device of the caches.
        use_cuda_graph: see the module. The four buffers are needed then: `plan` writes qo_indptr, and of the others
            only the sizes are read.
        backend: not read.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(float_workspace_buffer, "NHD", use_cuda_graph)
        fixed = None
        if use_cuda_graph:
            buffers = dict(kv_indptr=kv_indptr, kv_indices=kv_indices, kv_len_arr=kv_len_arr)
            fixed = _sizes_of(buffers)
        self._pages = _PageLists(self.device, fixed, lengths="kv_len_arr")
        self._queries = _Bounds("qo_indptr", self.device, use_cuda_graph, qo_indptr)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        """Take the page lists and options of the next `run` calls.

        Args:
            qo_indptr: (batch + 1,) int32 from 0, where the queries of each sequence begin.
            kv_indptr, kv_indices: as indptr and indices of `BatchDecodeWithPagedKVCacheWrapper.plan`.
            kv_len_arr: (batch,) int32, keys of each sequence.
            num_heads, head_dim_ckv, head_dim_kpe, page_size: those of `run`'s tensors. head_dim_kpe may be 0.
            causal: query i sees no key after its own position, aligned to the bottom right.
            sm_scale: of the width of queries and keys before absorption.
            q_data_type, kv_data_type: fp16, bf16 or fp32, the same.
            use_profiler: False.
        """
        _refuse(use_profiler=use_profiler or None)
        q_data_type, kv_data_type = _dtype(q_data_type), _dtype(kv_data_type)
        if kv_data_type != q_data_type:
            raise NotImplementedError(f"kv_data_type: q's dtype {q_data_type} is supported, got {kv_data_type}")
        self._queries.check(qo_indptr, None)
        self._pages.fill(kv_indptr, kv_indices, kv_len_arr)
        self._queries.fill(qo_indptr, None)
        kv_kinds = tuple((page_size, dim, kv_data_type) for dim in (head_dim_ckv, head_dim_kpe))
        kinds = (num_heads, head_dim_ckv, q_data_type), kv_kinds
        self._set_plan(kinds, dict(causal=bool(causal), softmax_scale=sm_scale))

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: None = None,
        kv_len: None = None,
        page_table: None = None,
        return_lse_base_on_e: bool = False,
        o_scale: None = None,
        *,
        ckv_scale: None = None,
        ckv_scale_arr: None = None,
        kpe_scale: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`triton_attn.mla_decode` of queries that are absorbed already. The caches are not copied.

        Args:
            q_nope, q_pe: (qo_indptr[-1] or more, num_heads, head_dim_ckv) and (..., head_dim_kpe).
            ckv_cache, kpe_cache: (num_pages, page_size, head_dim_ckv) and (num_pages, page_size, head_dim_kpe), which
                may be slices of one tensor.
            out, lse: where to write the results; out takes a copy.
            return_lse_base_on_e: lse is the natural logarithm, not that of base 2.
            profiler_buffer, kv_len, page_table, o_scale, ckv_scale, ckv_scale_arr, kpe_scale: None.

        Returns:
            out, q_nope's shape and dtype, and with return_lse lse (tokens, num_heads) fp32; 0 and -inf where a query
            sees no key.
        """
        _refuse(profiler_buffer=profiler_buffer, kv_len=kv_len, page_table=page_table, o_scale=o_scale)
        _refuse(ckv_scale=ckv_scale, ckv_scale_arr=ckv_scale_arr, kpe_scale=kpe_scale)
        self._check_planned(q_nope)
        for name, x, kind in zip(("ckv_cache", "kpe_cache"), (ckv_cache, kpe_cache), self._kv_kinds):
            if (*x.shape[1:], x.dtype) != kind:
                _fail(name, f"(num_pages, page_size, head_dim) and dtype as planned {kind}", f"{(*x.shape, x.dtype)}")
        result: Any = mla_decode(
            q_nope,
            q_pe,
            ckv_cache,
            self._pages.seqlens,
            self._pages.block_table,
            rope_cache=kpe_cache,
            cu_seqlens_q=self._queries.indptr,
            max_seqlen_q=self._queries.longest_of(q_nope),
            return_lse=return_lse,
            **self._options,
        )
        result, natural = result if return_lse else (result, None)
        result = result if out is None else out.copy_(result)
        if natural is None:
            return result
        return result, _tokens_first(natural.T, 1.0 if return_lse_base_on_e else LOG2_E, lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One query (num_qo_heads, head_dim) over a contiguous cache k, v (kv_len, num_kv_heads, head_dim), or "HND".

    Options as those of `BatchDecodeWithPagedKVCacheWrapper`; k and v of q's dtype or fp8. Returns out, q's shape, and
    with return_lse lse (num_qo_heads,) fp32, base 2.
    """
    _check_ndim("q", q, 2)
    options = _attention_options(pos_encoding_mode, window_left, logits_soft_cap, True, q.shape[0], q.device)
    scales = q_scale, k_scale, v_scale
    result = _attend_to_one(q[None], k, v, kv_layout, scales, sm_scale, options, return_lse)
    return (result[0][0], result[1][0]) if return_lse else result[0]


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: None = None,
    scale_k: None = None,
    scale_v: None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: None = None,
    packed_custom_mask: None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Queries (qo_len, num_qo_heads, head_dim_qk) over k, v (kv_len, num_kv_heads, head_dim), or "HND".

    Options as those of `BatchPrefillWithPagedKVCacheWrapper`; k and v of q's dtype or fp8, o_dtype q's. scale_q,
    scale_k and scale_v, which belong to fp8 queries, are None.

    Returns out (qo_len, num_qo_heads, head_dim_vo), and with return_lse lse (qo_len, num_qo_heads) fp32, base 2; 0 and
    -inf where a query sees no key.
    """
    _check_ndim("q", q, 3)
    _refuse_custom_masks(custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
    _refuse(scale_q=scale_q, scale_k=scale_k, scale_v=scale_v, kv_cache_sf=kv_cache_sf)
    _refuse(use_fp16_qk_reduction=use_fp16_qk_reduction or None, o_dtype=None if o_dtype == q.dtype else o_dtype)
    options = _attention_options(pos_encoding_mode, window_left, logits_soft_cap, causal, q.shape[1], q.device)
    if k.dtype == q.dtype and k_scale is None and v_scale is None:
        k, v = _as_nhd("k", k, kv_layout), _as_nhd("v", v, kv_layout)
        scale = _sm_scale(sm_scale, q.shape[2])
        result = flash_attention(q[None], k[None], v[None], softmax_scale=scale, **options, return_lse=return_lse)
        return (result[0][0], _base_2(result[1][0].T, None)) if return_lse else result[0]
    return _attend_to_one(q, k, v, kv_layout, (None, k_scale, v_scale), sm_scale, options, return_lse)


def _attend_to_one(q, k, v, kv_layout, scales, sm_scale, options, return_lse):
    """`paged_attention` of queries (seqlen_q, heads, dim) of one sequence over its contiguous cache."""
    k, v = _as_nhd("k", k, kv_layout), _as_nhd("v", v, kv_layout)
    seqlens = torch.full((1,), k.shape[0], dtype=torch.int32, device=q.device)
    options = dict(options, softmax_scale=_sm_scale(sm_scale, q.shape[2]))
    options |= _scales(options["softmax_scale"], *scales)
    result = paged_attention(q[None], k[None], v[None], seqlens, **options, return_lse=return_lse)
    return (result[0][0], _base_2(result[1][0].T, None)) if return_lse else result[0]


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two parts of the keys from that over each, by `triton_attn.merge_attention`.

    Args:
        v_a, v_b: (tokens, num_heads, head_dim), attention over a part.
        s_a, s_b: (tokens, num_heads) fp32, its log-sum-exp, base 2; -inf where a query sees no key of the part.

    Returns: v and s over both parts, of these shapes.
    """
    return merge_states(torch.stack((v_a, v_b), dim=1), torch.stack((s_a, s_b), dim=1))


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_state` of any number of parts: v (tokens, num_parts, num_heads, head_dim), s (tokens, num_parts,
    num_heads)."""
    _check_ndim("v", v, 4)
    _check_ndim("s", s, 3)
    natural = (s.float() / LOG2_E).permute(1, 2, 0)
    out, lse = merge_attention(v.transpose(0, 1)[:, None], natural[:, None])
    return out[0], _base_2(lse[0].T, None)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """`merge_state` into v and s, of the tokens where mask (tokens,) is True; None is all."""
    merged_v, merged_s = merge_state(v, s, v_other, s_other)
    if mask is not None:
        merged_v = torch.where(mask[:, None, None].bool(), merged_v, v)
        merged_s = torch.where(mask[:, None].bool(), merged_s, s)
    v.copy_(merged_v)
    s.copy_(merged_s)


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sequence and position of each of nnz new tokens, (nnz,) int32 both; -1 and 0 past append_indptr[-1].

    The new tokens of a sequence, append_indptr[i + 1] - append_indptr[i] of them, are the last of its seq_lens[i].
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
        batch_indices, positions: (nnz,), as `get_batch_indices_positions` gives them; a token with a sequence below 0
            is skipped.
        paged_kv_cache, kv_indices, kv_indptr, kv_layout: as in `BatchDecodeWithPagedKVCacheWrapper`.
        kv_last_page_len: not read; positions say it.
    """
    k_cache, v_cache = _split_cache(paged_kv_cache, _check_layout(kv_layout))
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
    """`append_paged_kv_cache` of latent vectors (nnz, head_dim_ckv) and rotary keys (nnz, head_dim_kpe), whose caches
    are those of `BatchMLAPagedAttentionWrapper`."""
    keys, values = append_ckv[:, None], append_kpe[:, None]
    cache = ckv_cache.unsqueeze(2), kpe_cache.unsqueeze(2)
    append_paged_kv_cache(keys, values, batch_indices, positions, cache, kv_indices, kv_indptr, kv_last_page_len)


def _slots(batch_indices, positions, kv_indices, kv_indptr, page_size):
    """The slots of tokens, int64; -1 of those that are no sequence's."""
    sequences, positions = batch_indices.long(), positions.long()
    entries = kv_indptr[sequences.clamp(min=0)] + positions // page_size
    pages = kv_indices[entries.clamp(0, len(kv_indices) - 1)].long()
    return torch.where(sequences < 0, -1, pages * page_size + positions % page_size)


class _Bounds:
    """An indptr of packed sequences on the device, and the longest length where the host knows it."""

    def __init__(self, name, device, use_cuda_graph, buffer):
        self.name, self.device, self.use_cuda_graph = name, device, use_cuda_graph
        self.indptr: Any = None
        self.longest, self.is_filled = None, False
        if use_cuda_graph:
            _check_buffers({f"{name}_buf": buffer})
            self.indptr = buffer

    def check(self, indptr, longest):
        """Before anything is written."""
        if self.use_cuda_graph:
            if indptr.shape != self.indptr.shape:
                _fail(self.name, f"the buffer's shape {tuple(self.indptr.shape)}", f"shape {tuple(indptr.shape)}")
            if self.is_filled and longest != self.longest:
                _fail(f"longest of {self.name}", f"what the graph was planned with, {self.longest}", longest)

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


def _split_cache(paged_kv_cache, kv_layout):
    """Views (num_pages, page_size, num_kv_heads, head_dim) of keys and values."""
    if isinstance(paged_kv_cache, torch.Tensor):
        if paged_kv_cache.ndim not in (4, 5) or paged_kv_cache.shape[1] != 2:
            shape = "(num_pages, 2, *page), or a pair of tensors"
            _fail("paged_kv_cache", shape, f"shape {tuple(paged_kv_cache.shape)}")
        k_cache, v_cache = paged_kv_cache.unbind(1)
    elif isinstance(paged_kv_cache, (tuple, list)) and len(paged_kv_cache) == 2:
        k_cache, v_cache = paged_kv_cache
    else:
        _fail("paged_kv_cache", "a tensor or a pair of tensors", type(paged_kv_cache), TypeError)
    if k_cache.ndim == 3:  # pages of one key
        return k_cache.unsqueeze(1), v_cache.unsqueeze(1)
    if kv_layout == "HND":
        return k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return k_cache, v_cache


def _as_nhd(name, x, kv_layout):
    _check_ndim(name, x, 3)
    return x if _check_layout(kv_layout) == "NHD" else x.transpose(0, 1)


def _attention_options(pos_encoding_mode, window_left, logits_soft_cap, causal, num_heads, device):
    """Options of our functions but for the scale."""
    options: dict[str, Any] = dict(
        causal=bool(causal), window_size=(max(window_left, -1), -1), softcap=logits_soft_cap or 0.0
    )
    if pos_encoding_mode == "ALIBI":
        if not causal or options["softcap"]:
            raise NotImplementedError("pos_encoding_mode: ALIBI is supported with causal=True and without a soft cap")
        options["alibi_slopes"] = _alibi_slopes(num_heads, device)
    elif pos_encoding_mode == "ROPE_LLAMA":
        raise NotImplementedError("pos_encoding_mode: ROPE_LLAMA is not supported; rotate q and k before")
    elif pos_encoding_mode != "NONE":
        _fail("pos_encoding_mode", "NONE or ALIBI", pos_encoding_mode)
    return options


@functools.cache
def _alibi_slopes(num_heads, device):
    """2^(-8 i / n) for the power of two n at or below num_heads, then every other one of 2 n. arXiv:2108.12409."""
    n = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)] + [2 ** (-4 * i / n) for i in range(1, 2 * n, 2)]
    return torch.tensor(slopes[:num_heads], dtype=torch.float32, device=device)


def _sm_scale(sm_scale, head_dim):
    return head_dim**-0.5 if sm_scale is None else sm_scale


def _scales(softmax_scale, q_scale, k_scale, v_scale):
    """The scales of `paged_attention`: a number that queries are multiplied with is the softmax's, a tensor k's."""
    k_scale, v_scale = (x.reshape(-1) if isinstance(x, torch.Tensor) else x for x in (k_scale, v_scale))
    if isinstance(q_scale, torch.Tensor):
        k_scale = q_scale.reshape(-1) * (1.0 if k_scale is None else k_scale)
    elif q_scale is not None:
        softmax_scale = softmax_scale * q_scale
    return dict(softmax_scale=softmax_scale, k_scale=k_scale, v_scale=v_scale)


def _base_2(natural, lse):
    """A log-sum-exp (tokens, heads) in base 2, contiguous, or in lse where that is given."""
    return _tokens_first(natural, LOG2_E, lse)


def _tokens_first(natural, factor, lse):
    """`_base_2` with any factor."""
    if lse is None:
        return (natural * factor).contiguous()
    if lse.shape != natural.shape:
        _fail("lse", f"shape {tuple(natural.shape)}", f"shape {tuple(lse.shape)}")
    return torch.mul(natural, factor, out=lse)


def _dtype(dtype):
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _number(name, scale):
    if isinstance(scale, torch.Tensor):
        raise NotImplementedError(f"{name}: a number is supported, got a tensor")
    return 1.0 if scale is None else float(scale)


def _check_layout(kv_layout):
    if kv_layout not in ("NHD", "HND"):
        _fail("kv_layout", "NHD or HND", kv_layout)
    return kv_layout


def _check_buffers(buffers):
    for name, buffer in buffers.items():
        if not isinstance(buffer, torch.Tensor):
            _fail(name, "a tensor with use_cuda_graph=True", type(buffer), TypeError)


def _sizes_of(buffers):
    """(batch, max_pages) of buffers of an indptr, indices and a length of each sequence."""
    _check_buffers(buffers)
    (name, indptr), (_, indices), (_, lengths) = buffers.items()
    if len(indptr) != len(lengths) + 1:
        _fail(name, f"a buffer of shape ({len(lengths) + 1},)", tuple(indptr.shape))
    return len(lengths), len(indices)


def _check_ndim(name, x, ndim):
    if x.ndim != ndim:
        _fail(name, f"{ndim} dimensions", f"shape {tuple(x.shape)}")


def _refuse(**arguments):
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: only its default is supported, got {value}")


def _refuse_custom_masks(**masks):
    for name, mask in masks.items():
        if mask is not None:
            raise NotImplementedError(f"{name}: causal and sliding-window masks are supported, custom masks are not")


def _refuse_prefill(
    custom_mask,
    packed_custom_mask,
    use_fp16_qk_reduction,
    prefix_len_ptr,
    token_pos_in_items_ptr,
    token_pos_in_items_len,
    max_item_len_ptr,
    fixed_split_size,
):
    _refuse_custom_masks(custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
    _refuse(
        use_fp16_qk_reduction=use_fp16_qk_reduction or None,
        prefix_len_ptr=prefix_len_ptr,
        token_pos_in_items_ptr=token_pos_in_items_ptr,
        token_pos_in_items_len=token_pos_in_items_len or None,
        max_item_len_ptr=max_item_len_ptr,
        fixed_split_size=fixed_split_size,
    )


def _refuse_run(args, kv_cache_sf=None, skip_softmax=None, use_fp16_softmax=None, uses_spcompress=None):
    if args or not (kv_cache_sf is skip_softmax is use_fp16_softmax is uses_spcompress is None):
        _refuse(
            args=args or None,
            kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax,
            use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
        )


def _fail(name: str, expected: object, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    got = got.__name__ if isinstance(got, type) else got
    raise error(f"{name}: expected {expected}, got {got}")
