"""FlashInfer's wrappers for one query, or a few, of each sequence over a paged cache."""

import functools
from typing import Any

from torch import Tensor

from .arguments import CacheLike, DtypeLike, base_2, fail, refuse, refuse_run
from .wrapper import PagedWrapper


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
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
