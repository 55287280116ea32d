"""FlashInfer's wrapper for absorbed MLA queries over a paged cache of latent vectors."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...mla import mla_decode
from .arguments import LOG2_E, dtype_of, fail, refuse, tokens_first
from .pages import Bounds, PageLists, sizes_of
from .wrapper import Wrapper


class BatchMLAPagedAttentionWrapper(Wrapper):
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
            out, lse: where to write the results. An out that is not contiguous takes a copy.
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
        direct = out if out is None or out.is_contiguous() else None
        result: Any = mla_decode(
            q_nope,
            q_pe,
            ckv_cache,
            self._pages.seqlens,
            self._pages.block_table,
            rope_cache=kpe_cache,
            cu_seqlens_q=self._queries.indptr,
            max_seqlen_q=self._queries.longest_of(q_nope),
            out=direct,
            return_lse=return_lse,
            **scales,
            **self._options,
        )
        result, natural = result if return_lse else (result, None)
        if out is not None and direct is None:
            result = out.copy_(result)
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
