"""What FlashInfer's wrappers for batches share. `plan` is called once per step, `run` once per layer."""

from typing import Any

from torch import Tensor

from ...paged import paged_attention
from .arguments import attention_options, check_layout, dtype_of, fail, scales_of, softmax_scale_of
from .pages import PageLists, get_seq_lens, sizes_of, split_cache


class Wrapper:
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


class PagedWrapper(Wrapper):
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
