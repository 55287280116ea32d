"""FlashInfer's attention wrappers and functions on our kernels: the same signatures, defaults and return values.

    from triton_attn.interop import flashinfer      # was: import flashinfer

`plan` turns CSR page lists into a block table on the device, without a device-to-host sync. `run` is one call of
`paged_attention` or `flash_attention_varlen`. lse has base 2 and shape (tokens, heads), as in FlashInfer. Options that
choose among FlashInfer's kernels (backend, use_tensor_cores, enable_pdl, non_blocking) have no effect. A workspace
buffer is not used; only its device is read. No other argument is ignored: unsupported values raise NotImplementedError.
The signatures are those of FlashInfer 0.6.

With use_cuda_graph=True the block table, lengths and indptrs keep their addresses. `plan` writes them in place, and a
replayed `run` uses those of the last `plan`. `plan` with device tensors has no sync, so it can be captured too.
"""

from ..support import Support
from .decode import BatchDecodeWithPagedKVCacheWrapper, CUDAGraphBatchDecodeWithPagedKVCacheWrapper
from .functions import (
    merge_state,
    merge_state_in_place,
    merge_states,
    single_decode_with_kv_cache,
    single_prefill_with_kv_cache,
)
from .mla import BatchMLAPagedAttentionWrapper
from .pages import append_paged_kv_cache, append_paged_mla_kv_cache, get_batch_indices_positions, get_seq_lens
from .prefill import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
]

SUPPORT = Support(
    functions=tuple(__all__),
    on_cpu="all, by the references or in the interpreter",
    refused={
        "custom_mask": "a tensor",
        "pos_encoding_mode": "ROPE_LLAMA, or ALIBI with a soft cap or without causal",
        "fixed_split_size": "a number",
        "kv_cache_sf": "tensors, for NVFP4 caches",
        "ckv_scale_arr": "a tensor, for MLA caches with a scale for every 128 elements",
    },
)
