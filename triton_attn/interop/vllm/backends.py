"""The back ends of `interop.vllm` as classes of vLLM, which imports this module when one of them is selected."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_dcp_group, get_dcp_world_size_and_rank
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.attention.ops.dcp import cp_lse_ag_out_rs, dcp_a2a_lse_reduce
from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

from .caches import (
    FP8_DTYPES,
    LATENT_FP8_DTYPES,
    PLAIN_DTYPES,
    SCALE_BYTES,
    TOKEN_DTYPES,
    unsupported_cache_dtype,
)
from .latent import LatentAttention, LatentMetadataBuilder
from .paged import PagedAttention, PagedMetadata, PagedMetadataBuilder

TOKEN_MODES = KVQuantMode.INT8_PER_TOKEN_HEAD, KVQuantMode.FP8_PER_TOKEN_HEAD


class AttentionPlusBuilder(PagedMetadataBuilder, AttentionMetadataBuilder[PagedMetadata]):
    """Full CUDA graphs of any batch: launches depend on shapes alone."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        world_size, rank = get_dcp_world_size_and_rank(kv_cache_spec.dcp_sharded)
        self.supports_draft_decode_metadata_update = True
        if world_size > 1:
            self.key_shard = rank, world_size, vllm_config.parallel_config.cp_kv_cache_interleave_size
        if envs.VLLM_BATCH_INVARIANT:
            self.fixed_query_len = vllm_config.scheduler_config.max_num_batched_tokens


class AttentionPlusImpl(PagedAttention, AttentionImpl[PagedMetadata]):
    """Neither queries nor outputs are quantized."""

    can_return_lse_for_decode = True
    lse_base_on_e = True
    supports_dcp = True
    supports_mtp_with_cp_non_trivial_interleave_size = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        PagedAttention.__init__(self, *args, **kwargs)
        self.batch_invariant = True if envs.VLLM_BATCH_INVARIANT else None
        if self.dcp_world_size > 1:
            config = get_current_vllm_config_or_none()
            is_a2a = config is not None and config.parallel_config.dcp_comm_backend == "a2a"
            self.dcp_group, self.dcp_combine = get_dcp_group(), dcp_a2a_lse_reduce if is_a2a else cp_lse_ag_out_rs


class _PlusFacts:
    """What both back ends support."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(1)]

    @classmethod
    def supports_non_causal(cls):
        return True

    @classmethod
    def supports_compute_capability(cls, capability):
        return capability.major >= 8

    @classmethod
    def supports_combination(cls, head_size, dtype, kv_cache_dtype, *others, **more):
        return unsupported_cache_dtype(dtype, kv_cache_dtype)


class AttentionPlusBackend(_PlusFacts, AttentionBackend):
    """TRITON_ATTN_PLUS."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *PLAIN_DTYPES, *FP8_DTYPES, *TOKEN_DTYPES]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name():
        return "TRITON_ATTN_PLUS"

    @staticmethod
    def get_impl_cls():
        return AttentionPlusImpl

    @staticmethod
    def get_builder_cls():
        return AttentionPlusBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Room for the scales of a cache with one for each token and head, see `inline_scales`."""
        if spec.state_content_bytes is not None or spec.kv_quant_mode not in TOKEN_MODES:
            return spec
        content = (spec.head_size + spec.head_size_v) * spec.dtype.itemsize + 2 * SCALE_BYTES
        return replace(spec, state_content_bytes=content)

    @classmethod
    def supports_head_size(cls, head_size):
        return 32 <= head_size <= 512

    @classmethod
    def supports_sink(cls):
        return True

    @classmethod
    def supports_sliding_window(cls):
        return True

    @classmethod
    def supports_per_head_quant_scales(cls):
        return True

    @classmethod
    def supports_batch_invariance(cls):
        return True

    @classmethod
    def supports_attn_type(cls, attn_type):
        return attn_type in [*AttentionType]


class LatentPlusBuilder(LatentMetadataBuilder, MLACommonMetadataBuilder[MLACommonMetadata]):
    """Full CUDA graphs of decodes. With decode context parallelism only single tokens are decodes, since a rank does
    not know the positions of its keys.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN
    supports_non_causal_multi_token_decode: ClassVar[bool] = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = self.dcp_world_size == 1
        self.varlen_graphs = getattr(vllm_config.speculative_config, "enable_adaptive_verification", False)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config, kv_cache_spec):
        if vllm_config.parallel_config.decode_context_parallel_size > 1:
            return None
        return max_decode_query_len(vllm_config)

    def update_draft_decode_metadata(self, metadata: MLACommonMetadata) -> None:
        """Nothing to do: its tensors are those that vLLM updates."""


class LatentPlusImpl(LatentAttention, MLACommonImpl[MLACommonMetadata]):
    """With decode context parallelism, prefill is vLLM's own."""

    can_return_lse_for_decode = True
    lse_base_on_e = True
    supports_dcp = True
    supports_pcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        options = alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name
        MLACommonImpl.__init__(self, num_heads, head_size, scale, num_kv_heads, *options, **mla_args)
        self.check_arguments(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
        )
        self.supports_quant_query_input = False
        dtype = LATENT_FP8_DTYPES.get(kv_cache_dtype)
        if self.dcp_world_size > 1 and dtype not in (None, current_platform.fp8_dtype()):
            raise NotImplementedError(
                f"kv_cache_dtype: expected no fp8 with decode_context_parallel_size > 1, where vLLM's prefill reads "
                f"{current_platform.fp8_dtype()}, got {kv_cache_dtype}"
            )

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def forward_mha(self, *args: Any, **kwargs: Any) -> None:
        owner = LatentAttention if self.dcp_world_size == 1 else MLACommonImpl
        owner.forward_mha(self, *args, **kwargs)


class LatentPlusBackend(_PlusFacts, MLACommonBackend):
    """TRITON_ATTN_PLUS_MLA."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *PLAIN_DTYPES, *LATENT_FP8_DTYPES, "fp8_ds_mla"]

    @staticmethod
    def get_name():
        return "TRITON_ATTN_PLUS_MLA"

    @staticmethod
    def get_impl_cls():
        return LatentPlusImpl

    @staticmethod
    def get_builder_cls():
        return LatentPlusBuilder

    @classmethod
    def get_supported_head_sizes(cls):
        return []  # the dimensions are checked one by one, when a layer is made
