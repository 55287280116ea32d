"""FlashInfer's wrappers for any number of queries of each sequence, over a paged cache or packed keys and values."""

import functools
from typing import Any

import torch
from torch import Tensor

from ...flash import flash_attention_varlen
from .arguments import (
    CacheLike,
    DtypeLike,
    base_2,
    fail,
    number_of,
    refuse,
    refuse_custom_masks,
    refuse_prefill,
    refuse_run,
)
from .pages import Bounds
from .wrapper import PagedWrapper, Wrapper


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
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


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
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
            out, lse: where to write the results.
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
        result: Any = flash_attention_varlen(q, k, v, *lengths, **options, out=out, return_lse=return_lse)
        natural = None
        if return_lse:
            result, natural = result
        if v_scale is not None and v_scale != 1:
            result = torch.mul(result, number_of("v_scale", v_scale), out=out)
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
