"""FlashInfer's wrappers for batches. `plan` is called once per step, `run` once per layer."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...flash import flash_attention_varlen
from ...mla import mla_decode
from ...paged import paged_attention
from .arguments import (
    LOG2_E,
    CacheLike,
    DtypeLike,
    attention_options,
    base_2,
    check_layout,
    dtype_of,
    fail,
    number_of,
    refuse,
    refuse_custom_masks,
    refuse_prefill,
    refuse_run,
    scales_of,
    softmax_scale_of,
    tokens_first,
)
from .pages import Bounds, PageLists, get_seq_lens, sizes_of, split_cache


class _Wrapper:
    """What all wrappers have: the device, the layout, a plan."""

    def __init__(self, float_workspace_buffer, kv_layout, use_cuda_graph):
        self.device = float_workspace_buffer.device
        self._kv_layout = check_layout(kv_layout)
        self._use_cuda_graph = bool(use_cuda_graph)
        self._options: Any = None  # of `plan`

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor | None) -> None:
        """Do nothing: our kernels take no workspace."""

    def end_forward(self) -> None:
        """Do nothing, as in FlashInfer."""

    def _kinds(self, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, dtypes):
        """What `run` compares q, and keys and values with. dtypes are those of q, of keys and values, of the output."""
        q_dtype, kv_dtype, o_dtype = dtypes
        q_dtype = dtype_of(q_dtype)
        kv_dtype = q_dtype if kv_dtype is None else dtype_of(kv_dtype)
        if o_dtype is not None and dtype_of(o_dtype) != q_dtype:
            raise NotImplementedError(f"o_data_type: q's dtype {q_dtype} is supported, got {o_dtype}")
        kv_kinds = tuple((page_size, num_kv_heads, dim, kv_dtype) for dim in (head_dim_qk, head_dim_vo))
        return (num_qo_heads, head_dim_qk, q_dtype), kv_kinds

    def _check_planned(self, q):
        if self._options is None:
            raise RuntimeError("run: expected a call of plan before")
        if (*q.shape[1:], q.dtype) != self._q_kind:
            fail("q", f"(tokens, heads, head_dim) and dtype as planned {self._q_kind}", f"{(*q.shape, q.dtype)}")

    def _options_of(self, q_kind, causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale):
        num_heads, head_dim, _ = q_kind
        return dict(
            attention_options(pos_encoding_mode, window_left, logits_soft_cap, causal, num_heads, self.device),
            softmax_scale=softmax_scale_of(sm_scale, head_dim),
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
            fixed = sizes_of(buffers)
        self._pages = PageLists(self.device, fixed)

    def _plan_pages(self, indptr, indices, last_page_len, page_size, block_tables, seq_lens):
        seqlens = get_seq_lens(indptr, last_page_len, page_size) if seq_lens is None else seq_lens.flatten()
        self._pages.fill(indptr, indices, seqlens, page_size, block_tables)

    def _caches(self, paged_kv_cache):
        """Keys and values (num_pages, page_size, num_kv_heads, head_dim), as planned."""
        k_cache, v_cache = split_cache(paged_kv_cache, self._kv_layout)
        k_kind, v_kind = self._kv_kinds
        if (*k_cache.shape[1:], k_cache.dtype) != k_kind or (*v_cache.shape[1:], v_cache.dtype) != v_kind:
            got = tuple((*x.shape, x.dtype) for x in (k_cache, v_cache))
            fail("paged_kv_cache", f"pages of {self._kv_kinds}, as planned", got)
        return k_cache, v_cache

    def _attend(self, q, paged_kv_cache, scales, window_left, **options):
        k_cache, v_cache = self._caches(paged_kv_cache)
        options |= self._options
        if scales != (None, None, None):
            options |= scales_of(options["softmax_scale"], *scales)
        if window_left is not None and window_left != options["window_size"][0]:
            fail("window_left", f"None or what was planned, {options['window_size'][0]}", window_left)
        return paged_attention(q, k_cache, v_cache, self._pages.seqlens, self._pages.block_table, **options)


class BatchDecodeWithPagedKVCacheWrapper(_PagedWrapper):
    """Attention of one query, or q_len_per_req queries, of each sequence over a paged cache.

    Args:
        float_workspace_buffer: any tensor on the device of the cache.
        kv_layout: "NHD", pages (page_size, num_kv_heads, head_dim), or "HND", (num_kv_heads, page_size, head_dim).
        use_cuda_graph: see the module. It needs the buffers, of which only the sizes are read.
            paged_kv_last_page_len_buffer gives the batch size. The block table takes (batch + 2)
            len(paged_kv_indices_buffer) int32.
        use_tensor_cores, backend: not read.
        jit_args: None.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> indptr, indices, last = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 3], [4, 1, 0], [5, 16]))
        >>> decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8))
        >>> decode.plan(indptr, indices, last, 8, 2, 64, page_size=16)
        >>> decode.run(torch.randn(2, 8, 64).half(), torch.randn(6, 2, 16, 2, 64).half()).shape
        torch.Size([2, 8, 64])
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
        refuse(jit_args=jit_args)
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
            indptr: (batch + 1,) int32, where the pages of each sequence begin in indices. If it is on the CPU, the
                block table has its exact width. If it is on the device, the width is len(indices), which costs memory
                but no time.
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
        refuse(fixed_split_size=fixed_split_size, window_right=window_right or None)
        q_data_type = data_type if q_data_type is None else q_data_type
        kv_data_type = data_type if kv_data_type is None else kv_data_type
        if self._use_cuda_graph and self._options is not None and q_len_per_req != self._q_len:
            fail("q_len_per_req", f"what the graph was planned with, {self._q_len}", q_len_per_req)
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
        refuse_run(args, kv_cache_sf, skip_softmax_threshold_scale_factor)
        self._check_planned(q)
        batch, q_len = self._pages.seqlens.shape[0], self._q_len
        if q.shape[0] != batch * q_len or q_len_per_req not in (None, q_len):
            fail("q", f"{batch * q_len} rows, {q_len} for each of {batch} sequences", q.shape[0])
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
        return result.flatten(0, 1), base_2(natural.transpose(1, 2).flatten(0, 1), lse)

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
    """`BatchDecodeWithPagedKVCacheWrapper` with use_cuda_graph=True.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> lists = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 3], [4, 1, 0], [5, 16])]
        >>> decode = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8), *lists)
        >>> decode.plan(*lists, 8, 2, 64, page_size=16)
        >>> decode.run(torch.randn(2, 8, 64).half(), torch.randn(6, 2, 16, 2, 64).half()).shape
        torch.Size([2, 8, 64])
    """

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
    """Attention of any number of queries of each sequence over a paged cache. With causal they are its last tokens.

    Args:
        float_workspace_buffer, kv_layout, backend: as in `BatchDecodeWithPagedKVCacheWrapper`.
        use_cuda_graph: see the module. It needs the four buffers: `plan` writes qo_indptr_buf, and reads only the sizes
            of the others. q has the same number of rows at every replay; rows past qo_indptr[-1] have out = 0.
        custom_mask_buf, mask_indptr_buf, jit_args, jit_kwargs: None.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> lists = [torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 9], [0, 2, 3], [4, 1, 0], [5, 16])]
        >>> prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8))
        >>> prefill.plan(*lists, 8, 2, 64, page_size=16, causal=True)
        >>> prefill.run(torch.randn(9, 8, 64).half(), torch.randn(6, 2, 16, 2, 64).half()).shape
        torch.Size([9, 8, 64])
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
        refuse_custom_masks(custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf)
        refuse(jit_args=jit_args, jit_kwargs=jit_kwargs)
        buffers = dict(
            paged_kv_indptr_buf=paged_kv_indptr_buf,
            paged_kv_indices_buf=paged_kv_indices_buf,
            paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
        )
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self._queries = Bounds("qo_indptr", self.device, use_cuda_graph, qo_indptr_buf)

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
            max_token_per_sequence: the largest number of queries of a sequence, by which tiles are chosen. None:
                computed from a qo_indptr on the CPU, otherwise the rows of q. Under a CUDA graph it is the same for
                every plan.
            seq_lens_q, max_sequence_kv: not read; the indptrs imply them.
            custom_mask, packed_custom_mask, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len,
                max_item_len_ptr, use_fp16_qk_reduction: their defaults.
        """
        refuse_prefill(
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
        refuse_run(args, kv_cache_sf, skip_softmax_threshold_scale_factor, use_fp16_softmax, uses_spcompress)
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
        return result, base_2(natural.T, lse)

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
        refuse(use_fp16_qk_reduction=use_fp16_qk_reduction or None)
        self._check_planned(q)
        options = pos_encoding_mode, window_left, logits_soft_cap, sm_scale
        self._options = self._options_of(self._q_kind, causal, *options)
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    """Packed queries over packed keys and values, without pages, by `triton_attn.flash_attention_varlen`.

    Args:
        float_workspace_buffer, kv_layout, backend: as in `BatchDecodeWithPagedKVCacheWrapper`; "HND" keys are
            (num_kv_heads, total_k, head_dim).
        use_cuda_graph: see the module. It needs qo_indptr_buf and kv_indptr_buf, which `plan` writes.
        custom_mask_buf, mask_indptr_buf, jit_args, jit_kwargs: None.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> indptr = torch.tensor([0, 4, 9], dtype=torch.int32)
        >>> prefill = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(0, dtype=torch.uint8))
        >>> prefill.plan(indptr, indptr, 8, 2, 64, causal=True)
        >>> prefill.run(torch.randn(9, 8, 64).half(), *torch.randn(2, 9, 2, 64).half()).shape
        torch.Size([9, 8, 64])
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
        refuse_custom_masks(custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf)
        refuse(jit_args=jit_args, jit_kwargs=jit_kwargs)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._queries = Bounds("qo_indptr", self.device, use_cuda_graph, qo_indptr_buf)
        self._keys = Bounds("kv_indptr", self.device, use_cuda_graph, kv_indptr_buf)

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

        kv_data_type is q's dtype. max_sequence_kv is for keys what max_token_per_sequence is for queries. Keys are
        never split, whatever disable_split_kv says. seq_lens is not read. v_indptr and o_indptr are None.
        """
        refuse(v_indptr=v_indptr, o_indptr=o_indptr)
        refuse_prefill(
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
        refuse_run(args, kv_cache_sf)
        refuse(o_scale=o_scale)
        self._check_planned(q)
        if self._kv_layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        for name, x, kind in zip(("k", "v"), (k, v), self._kv_kinds):
            if (*x.shape[1:], x.dtype) != kind[1:]:
                fail(name, f"(tokens, heads, head_dim) and dtype as planned {kind[1:]}", f"{(*x.shape, x.dtype)}")
        options = self._options
        if q_scale is not None or k_scale is not None:
            factor = number_of("q_scale", q_scale) * number_of("k_scale", k_scale)
            options = options | dict(softmax_scale=options["softmax_scale"] * factor)
        queries, keys = self._queries, self._keys
        lengths: Any = queries.indptr, keys.indptr, queries.longest_of(q), keys.longest_of(k)
        result: Any = flash_attention_varlen(q, k, v, *lengths, **options, return_lse=return_lse)
        natural = None
        if return_lse:
            result, natural = result
        if v_scale is not None and v_scale != 1:
            result = result * number_of("v_scale", v_scale)
        result = result if out is None else out.copy_(result)
        return result if natural is None else (result, base_2(natural.T, lse))

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
        refuse(use_fp16_qk_reduction=use_fp16_qk_reduction or None)
        self._check_planned(q)
        options = pos_encoding_mode, window_left, logits_soft_cap, sm_scale
        self._options = self._options_of(self._q_kind, causal, *options)
        return self.run(q, k, v, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


class BatchMLAPagedAttentionWrapper(_Wrapper):
    """Attention of absorbed MLA queries, any number of each sequence, over pages of latent vectors and of rotary keys.

    Args:
        float_workspace_buffer: any tensor on the device of the caches.
        use_cuda_graph: see the module. It needs the four buffers: `plan` writes qo_indptr, and reads only the sizes of
            the others.
        backend: not read.

    Example:
        >>> from triton_attn.interop import flashinfer
        >>> lists = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2], [0, 2, 3], [4, 1, 0], [21, 16])]
        >>> mla = flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(0, dtype=torch.uint8))
        >>> mla.plan(*lists, 16, 512, 64, 16, True, 192**-0.5, torch.float16, torch.float16)
        >>> mla.run(*(torch.randn(n, 16, d).half() for n in (2, 6) for d in (512, 64))).shape
        torch.Size([2, 16, 512])
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
            fixed = sizes_of(buffers)
        self._pages = PageLists(self.device, fixed, lengths="kv_len_arr")
        self._queries = Bounds("qo_indptr", self.device, use_cuda_graph, qo_indptr)

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
            sm_scale: based on the width of queries and keys before absorption.
            q_data_type: fp16, bf16 or fp32.
            kv_data_type: the same, float8_e4m3fn or float8_e5m2.
            use_profiler: False.
        """
        refuse(use_profiler=use_profiler or None)
        q_data_type, kv_data_type = dtype_of(q_data_type), dtype_of(kv_data_type)
        if kv_data_type not in (q_data_type, torch.float8_e4m3fn, torch.float8_e5m2):
            kinds = f"q's dtype {q_data_type}, float8_e4m3fn and float8_e5m2 are supported"
            raise NotImplementedError(f"kv_data_type: {kinds}, got {kv_data_type}")
        self._queries.check(qo_indptr, None)
        self._pages.fill(kv_indptr, kv_indices, kv_len_arr, page_size)
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
        ckv_scale: float | Tensor | None = None,
        ckv_scale_arr: None = None,
        kpe_scale: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`triton_attn.mla_decode` of absorbed queries. The caches are not copied.

        Args:
            q_nope, q_pe: (qo_indptr[-1] or more, num_heads, head_dim_ckv) and (..., head_dim_kpe).
            ckv_cache, kpe_cache: (num_pages, page_size, head_dim_ckv) and (num_pages, page_size, head_dim_kpe), which
                may be slices of one tensor.
            out, lse: where to write the results; out takes a copy.
            return_lse_base_on_e: lse is the natural logarithm, not that of base 2.
            ckv_scale, kpe_scale: factors of fp8 caches, a number above 0 or an fp32 tensor (1,). An fp8 cache needs
                both, but kpe_scale may be None without a rotary part. Other caches take none.
            profiler_buffer, kv_len, page_table, o_scale, ckv_scale_arr: None.

        Returns:
            out, q_nope's shape and dtype, and with return_lse lse (tokens, num_heads) fp32; 0 and -inf where a query
            sees no key.
        """
        refuse(profiler_buffer=profiler_buffer, kv_len=kv_len, page_table=page_table, o_scale=o_scale)
        refuse(ckv_scale_arr=ckv_scale_arr)
        self._check_planned(q_nope)
        for name, x, kind in zip(("ckv_cache", "kpe_cache"), (ckv_cache, kpe_cache), self._kv_kinds):
            if (*x.shape[1:], x.dtype) != kind:
                fail(name, f"(num_pages, page_size, head_dim) and dtype as planned {kind}", f"{(*x.shape, x.dtype)}")
        scales = self._scales(ckv_scale, kpe_scale)
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
            **scales,
            **self._options,
        )
        result, natural = result if return_lse else (result, None)
        result = result if out is None else out.copy_(result)
        if natural is None:
            return result
        return result, tokens_first(natural.T, 1.0 if return_lse_base_on_e else LOG2_E, lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def _scales(self, ckv_scale, kpe_scale):
        """Those of `mla_decode`."""
        (*_, dtype), (_, head_dim_kpe, _) = self._kv_kinds
        is_fp8 = dtype.itemsize == 1
        if not is_fp8 and ckv_scale is kpe_scale is None:
            return {}
        for name, scale in (("ckv_scale", ckv_scale), ("kpe_scale", kpe_scale)):
            if not is_fp8 and scale is not None:
                fail(name, f"None with caches in {dtype}", scale)
            if is_fp8 and scale is None and (name == "ckv_scale" or head_dim_kpe):
                fail(name, "a number or a tensor with fp8 caches", None)
            if isinstance(scale, (int, float)) and not 0 < scale < math.inf:
                fail(name, "a finite number above 0", scale)
        return dict(k_scale=ckv_scale, k_pe_scale=kpe_scale)
