"""vLLM's attention on our kernels: the back ends TRITON_ATTN_PLUS and TRITON_ATTN_PLUS_MLA.

    vllm serve MODEL --attention-backend TRITON_ATTN_PLUS          # TRITON_ATTN_PLUS_MLA for models with MLA

vLLM finds `register` by the package's entry point. The classes of this module have the methods and arguments of vLLM's
classes, but do not import vLLM. vLLM imports `backends` when one of the back ends is selected; there they inherit
from its abstract classes. The interface is that of vLLM 0.33. With another version `register` warns and registers
nothing.

The cache of attention is (num_blocks, num_kv_heads, block_size, 2 * head_size), a key and its value side by side. Any
physical layout is supported, HND and NHD among them. With a scale for each token and head, `inline_scales` says what
it holds. The cache of MLA is (num_blocks, block_size, kv_lora_rank +
qk_rope_head_dim), or uint8 with 656 bytes for each token ("fp8_ds_mla"). A cache in fp8 with one scale per tensor is
passed as uint8 or as fp8.
"""

import inspect
import warnings

from ..support import Support
from .caches import inline_scales, unsupported_cache_dtype
from .latent import LatentAttention, LatentDecodeMetadata, LatentMetadataBuilder
from .paged import PagedAttention, PagedMetadata, PagedMetadataBuilder

__all__ = [
    "LatentAttention",
    "LatentDecodeMetadata",
    "LatentMetadataBuilder",
    "PagedAttention",
    "PagedMetadata",
    "PagedMetadataBuilder",
    "inline_scales",
    "interface_differences",
    "register",
    "unsupported_cache_dtype",
]

SUPPORT = Support(
    functions=("register", "inline_scales"),
    on_cpu="the classes without vLLM, by the references or in the interpreter",
    refused={
        "output_scale": "a tensor, for fused output quantization",
        "causal": "a tensor, one mask per request",
        "mm_req_doc_ranges": "ranges, for prefixes that see both ways",
        "use_alibi_sqrt": "True",
        "chunk_lookback": "a number of chunks",
        "kv_cache_dtype": "int4, other plain dtypes than the model's; for MLA e5m2, and scales per token",
        "logits_soft_cap": "a number, for MLA",
        "sliding_window": "a number, for MLA",
        "qk_rope_head_dim": "0, for MLA with fp8_ds_mla",
        "decode_context_parallel_size": "2 or more, for cross attention, several KV heads, a head_size that is no "
        "power of two",
    },
)

VERSION = "0.33"
BACKENDS = {"TRITON_ATTN_PLUS": "AttentionPlusBackend", "TRITON_ATTN_PLUS_MLA": "LatentPlusBackend"}

# What the classes of this package take from vLLM, by the names of arguments and fields in vllm.v1.attention.backend.
INTERFACE = {
    "AttentionImpl.forward": "self layer query key value kv_cache attn_metadata output output_scale output_block_scale",
    "AttentionImpl.__init__": "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype "
    "logits_soft_cap attn_type kv_sharing_target_layer_name",
    "AttentionMetadataBuilder.__init__": "self kv_cache_spec layer_names vllm_config device",
    "AttentionMetadataBuilder.build": "self common_prefix_len common_attn_metadata fast_build",
    "AttentionMetadataBuilder.build_for_cudagraph_capture": "self common_attn_metadata",
    "MLAAttentionImpl.forward_mha": "self q kv_c_normed k_pe kv_c_and_k_pe_cache attn_metadata k_scale output "
    "output_scale",
    "MLAAttentionImpl.forward_mqa": "self q kv_c_and_k_pe_cache attn_metadata layer",
    "MLAAttentionImpl.do_kv_cache_update": "self kv_c_normed k_pe kv_cache slot_mapping kv_cache_dtype k_scale "
    "skip_scale",
}
COMMON_FIELDS = (
    "query_start_loc",
    "query_start_loc_cpu",
    "seq_lens",
    "seq_lens_cpu_upper_bound",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "block_table_tensor",
    "slot_mapping",
    "causal",
    "mm_req_doc_ranges",
)


def register() -> None:
    """Register both back ends with vLLM. If vLLM's interface differs from that of VERSION, warn and register neither.

    vLLM calls it in each of its processes. Repeated calls change nothing. The RuntimeWarning names the differences.
    """
    differences = interface_differences()
    if differences:
        warnings.warn(
            f"vllm: expected the attention interface of version {VERSION}, got {'; '.join(differences)}. "
            f"{' and '.join(BACKENDS)} are not registered",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, class_name in BACKENDS.items():
        known = AttentionBackendEnum.__members__.get(name, name)  # a name can be added once
        register_backend(known, f"{__package__}.backends.{class_name}")


def interface_differences() -> list[str]:
    """Differences between the installed vLLM and the interface of VERSION."""
    try:
        import vllm
        from vllm.v1.attention import backend
        from vllm.v1.attention.backends import registry
    except ImportError as error:
        return [f"an import error ({error})"]
    found = []
    if vllm.__version__.split(".")[:2] != VERSION.split("."):
        found.append(f"version {vllm.__version__}")
    for path, arguments in INTERFACE.items():
        class_name, method = path.split(".")
        function = getattr(getattr(backend, class_name, None), method, None)
        there = "nothing" if function is None else " ".join(inspect.signature(function).parameters)
        if there != arguments:
            found.append(f"{path} with {there}")
    fields = getattr(getattr(backend, "CommonAttentionMetadata", None), "__dataclass_fields__", {})
    missing = [name for name in COMMON_FIELDS if name not in fields]
    if missing:
        found.append(f"CommonAttentionMetadata without {', '.join(missing)}")
    if not hasattr(registry, "register_backend"):
        found.append("no register_backend")
    return found
