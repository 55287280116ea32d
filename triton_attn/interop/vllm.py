"""vLLM's attention on our kernels: the back ends TRITON_ATTN_PLUS and TRITON_ATTN_PLUS_MLA.

    vllm serve MODEL --attention-backend TRITON_ATTN_PLUS          # TRITON_ATTN_PLUS_MLA for models with MLA

vLLM finds `register` by the package's entry point. The classes of this module have the methods and arguments of vLLM's
classes, but do not import vLLM. vLLM imports `_vllm_backends` when one of the back ends is selected; there they inherit
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import append_kv_cache, append_latent_cache
from ..flash import flash_attention_varlen
from ..merge import merge_attention
from ..mla import mla_decode
from ..paged import paged_attention
from .support import Support

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
FP8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LATENT_FP8_DTYPES = {name: FP8_DTYPES[name] for name in ("fp8", "fp8_e4m3")}  # as vLLM's layer reads its cache
TOKEN_DTYPES = {"int8_per_token_head": torch.int8, "fp8_per_token_head": torch.float8_e4m3fn}
SCALE_BYTES = torch.float32.itemsize
PLAIN_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # "auto" is the model's dtype
SCALE_BLOCK = 128  # elements of a latent vector that share a scale in the fp8_ds_mla layout

# What the classes below take from vLLM, by the names of arguments and fields in vllm.v1.attention.backend.
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
        register_backend(known, f"{__package__}._vllm_backends.{class_name}")


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


def unsupported_cache_dtype(dtype: torch.dtype, kv_cache_dtype: str | None) -> str | None:
    """Why a model of this dtype cannot have this cache, or None. A cache that is not fp8 has the model's dtype."""
    if PLAIN_DTYPES.get(kv_cache_dtype or "auto", dtype) == dtype:
        return None
    return f"kv_cache_dtype: expected the model's dtype {dtype} or fp8, got {kv_cache_dtype}"


def inline_scales(kv_cache: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views (k_cache, v_cache, k_scale, v_scale) of a cache in int8_per_token_head or fp8_per_token_head.

    A row of the cache is [key, its scale, value, its scale]: head_size elements of a byte, an fp32 number, and the same
    again. Nothing is copied: `append_kv_cache`, `paged_attention` and `gather_kv_cache` take the views.

    Args:
        kv_cache: (num_blocks, num_kv_heads, block_size, 2 * (head_size + 4)), int8, or uint8 for fp8 (e4m3), of any
            strides that are multiples of 4, the last dimension contiguous. head_size is a multiple of 4.

    Returns:
        k_cache, v_cache (num_blocks, block_size, num_kv_heads, head_size) in int8 or float8_e4m3fn; k_scale, v_scale
        (num_blocks, block_size, num_kv_heads) in float32.

    Raises:
        TypeError, ValueError: kv_cache is no such tensor.

    Example:
        >>> from triton_attn.interop.vllm import inline_scales
        >>> k_cache, v_cache, k_scale, v_scale = inline_scales(torch.zeros(8, 2, 16, 2 * (64 + 4), dtype=torch.int8))
        >>> v_cache.shape, v_scale.shape, v_scale.stride()
        (torch.Size([8, 16, 2, 64]), torch.Size([8, 16, 2]), (1088, 34, 544))
    """
    if not isinstance(kv_cache, Tensor) or kv_cache.dtype not in (torch.int8, torch.uint8):
        got = kv_cache.dtype if isinstance(kv_cache, Tensor) else type(kv_cache).__name__
        raise TypeError(f"kv_cache: expected an int8 or uint8 tensor, got {got}")
    if kv_cache.ndim != 4 or kv_cache.shape[3] <= 2 * SCALE_BYTES or kv_cache.shape[3] % (2 * SCALE_BYTES):
        raise ValueError(
            "kv_cache: expected (num_blocks, num_kv_heads, block_size, 2 * (head_size + 4)) with a head_size that 4 "
            f"divides, got shape {tuple(kv_cache.shape)}"
        )
    if kv_cache.stride(3) != 1 or any(n % SCALE_BYTES for n in (kv_cache.data_ptr(), *kv_cache.stride()[:3])):
        raise ValueError(
            f"kv_cache: expected rows at multiples of {SCALE_BYTES} bytes, got address {kv_cache.data_ptr():#x}, "
            f"strides {kv_cache.stride()}"
        )
    width = kv_cache.shape[3] // 2 - SCALE_BYTES
    rows = kv_cache.transpose(1, 2)
    elements = rows if kv_cache.dtype == torch.int8 else rows.view(torch.float8_e4m3fn)
    numbers = rows.view(torch.float32)
    v_start, k_end = width + SCALE_BYTES, width // SCALE_BYTES
    return elements[..., :width], elements[..., v_start : v_start + width], numbers[..., k_end], numbers[..., -1]


@dataclass
class PagedMetadata:
    """A batch, for all layers of a group. Tensors are vLLM's persistent ones, so that captured graphs follow them.

    key_shard: with decode context parallelism, which keys this rank holds, as `paged_attention` takes it.
    has_context: whether a request may have keys before the batch's, as all ranks know it.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    causal: bool
    key_shard: tuple[int, int, int] | None = None
    has_context: bool = True


class PagedMetadataBuilder:
    """Makes PagedMetadata of vLLM's batches. No tensor is copied or read on the host, and nothing is computed.

    fixed_query_len stands in for the longest query, where results must not depend on the batch.
    """

    fixed_query_len: int | None = None
    key_shard: tuple[int, int, int] | None = None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> PagedMetadata:
        common = common_attn_metadata
        if not isinstance(common.causal, bool):
            raise NotImplementedError(f"causal: expected True or False, got {type(common.causal).__name__}")
        if common.mm_req_doc_ranges is not None:
            raise NotImplementedError("mm_req_doc_ranges: expected None, got ranges of tokens that see both ways")
        return PagedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=max(common.max_query_len, self.fixed_query_len or 0),
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            key_shard=self.key_shard,
            has_context=self.key_shard is None or _has_context(common),
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> PagedMetadata:
        """A graph is replayed for requests with context, also if none has any when it is captured."""
        metadata = self.build(0, common_attn_metadata)
        metadata.has_context = True
        return metadata

    def update_draft_decode_metadata(self, metadata: PagedMetadata) -> None:
        """Nothing to do: its tensors are those that vLLM updates."""


def _has_context(common):
    """Whether a request has keys from before this batch. All ranks decide alike, since all must join an exchange."""
    if common.seq_lens_cpu_upper_bound is None:
        return True
    starts = common.query_start_loc_cpu
    return bool((common.seq_lens_cpu_upper_bound > starts[1:] - starts[:-1]).any())


class PagedAttention:
    """One layer of vLLM: `forward` and `do_kv_cache_update` by `paged_attention` and `append_kv_cache`.

    batch_invariant as in `paged_attention`.

    With decode context parallelism, dcp_world_size ranks share one KV head and hold its keys in turn. dcp_group gathers
    the queries of all ranks. dcp_combine is a function of vLLM that merges results over the keys of each rank. It takes
    out (num_tokens, heads of all ranks, head_size), lse (num_tokens, heads of all ranks), dcp_group and
    return_lse=True. It returns out and lse of this rank's heads over all keys.
    """

    batch_invariant: bool | None = None
    dcp_world_size = 1
    dcp_group: Any = None
    dcp_combine: Callable[..., tuple[Tensor, Tensor]]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        for name, value in others.items():  # use_alibi_sqrt, chunk_lookback, and what later versions add
            if value not in (None, False, -1):
                raise NotImplementedError(f"{name}: not supported by TRITON_ATTN_PLUS, got {value}")
        if kv_cache_dtype not in ("auto", *PLAIN_DTYPES, *FP8_DTYPES, *TOKEN_DTYPES):
            known = ", ".join(("auto", *PLAIN_DTYPES, *FP8_DTYPES, *TOKEN_DTYPES))
            raise NotImplementedError(f"kv_cache_dtype: expected {known}, got {kv_cache_dtype}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype, self.fp8_dtype = kv_cache_dtype, FP8_DTYPES.get(kv_cache_dtype)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.attn_type, self.is_encoder = attn_type, attn_type in ("encoder", "encoder_only")
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sinks = sinks
        self._all_slopes: Tensor | None = None
        self._viewed: tuple[Any, Any, dict[str, Tensor]] = (None, None, {})  # scales of the layer, and their views
        self.softcap = logits_soft_cap or 0.0
        self.reach = -1 if sliding_window is None else sliding_window - 1
        if self.dcp_world_size > 1 and not self.is_encoder:
            self._check_context_parallelism()

    def _check_context_parallelism(self):
        if self.attn_type == "encoder_decoder":
            raise NotImplementedError("attn_type: expected no cross attention with decode_context_parallel_size > 1")
        if self.num_kv_heads > 1:
            raise NotImplementedError(
                f"num_kv_heads: expected 1 on a rank with decode_context_parallel_size > 1, got {self.num_kv_heads}"
            )
        if self.head_size & (self.head_size - 1):
            raise NotImplementedError(
                "head_size: expected a power of two with decode_context_parallel_size > 1, as vLLM's exchange needs, "
                f"got {self.head_size}"
            )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the rows of the batch's tokens in output (num_tokens, num_heads, head_size), and return it. vLLM's
        profiling runs have no metadata and get zeros.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale, output_block_scale: expected None; outputs are not quantized")
        if attn_metadata is None:
            return output.fill_(0)
        num_tokens, written = attn_metadata.num_actual_tokens, output
        if num_tokens != query.shape[0]:  # views cost the host time
            query, written = query[:num_tokens], output[:num_tokens]
        if self.is_encoder:
            new = query, key[:num_tokens], value[:num_tokens]
            self._attend_to_new(*new, attn_metadata, causal=False, out=written)
        elif attn_metadata.key_shard is not None:
            new = query, key[:num_tokens], value[:num_tokens]
            written.copy_(self._attend_across_ranks(layer, new, kv_cache, attn_metadata))
        else:
            causal = attn_metadata.causal
            options = self._options(query, causal)
            self._attend_to_cache(
                layer, query, kv_cache, attn_metadata, attn_metadata.seq_lens, causal=causal, **options, out=written
            )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Padding is not written: tokens after the end of slot_mapping, and those with slot -1."""
        if self.is_encoder:
            return
        num_tokens = slot_mapping.shape[0]
        caches, scales = self._split(layer, kv_cache)
        append_kv_cache(key[:num_tokens], value[:num_tokens], *caches, slot_mapping, **scales)

    def _attend_to_new(self, query, key, value, metadata, causal, **options):
        """Attention of the batch's tokens to each other."""
        starts, longest = metadata.query_start_loc, metadata.max_query_len
        options |= dict(causal=causal, **self._options(query, causal))
        return flash_attention_varlen(query, key, value, starts, starts, longest, longest, **options)

    def _attend_to_cache(self, layer, query, kv_cache, metadata, lengths, **options):
        """Attention to the first lengths[i] keys of each request i in the cache."""
        caches, scales = self._split(layer, kv_cache)
        return paged_attention(
            query,
            *caches,
            lengths,
            metadata.block_table,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            batch_invariant=self.batch_invariant,
            **options,
            **scales,
        )

    def _attend_across_ranks(self, layer, new, kv_cache, metadata):
        """Each rank attends with the heads of all to its keys, and gets its heads' attention to all keys.

        A batch without context attends to its own keys, which all ranks have, without an exchange.
        """
        query, key, value = new
        if not metadata.has_context and self.kv_sharing_target_layer_name is None:
            return self._attend_to_new(query, key, value, metadata, metadata.causal)
        queries = self.dcp_group.all_gather(query.contiguous(), dim=1)
        options = self._options(query, metadata.causal)
        sinks = options.pop("sinks", None)
        if "alibi_slopes" in options:
            options["alibi_slopes"] = self._slopes_of_all_ranks()
        options |= dict(causal=metadata.causal, key_shard=metadata.key_shard, return_lse=True)
        out, lse = self._attend_to_cache(layer, queries, kv_cache, metadata, metadata.seq_lens, **options)
        out, lse = self.dcp_combine(out, lse.T, self.dcp_group, return_lse=True)
        if sinks is not None:  # once, and of this rank's heads
            out = out * torch.sigmoid(lse - sinks.float()).unsqueeze(-1)
        return out

    def _slopes_of_all_ranks(self):
        """Gathered at the first call, a profiling or warm-up run of vLLM's."""
        if self._all_slopes is None:
            self._all_slopes = self.dcp_group.all_gather(self.alibi_slopes, dim=0)
        return self._all_slopes

    def _options(self, query, causal):
        """Without causality a window extends to the right as far as to the left."""
        window = (self.reach, 0 if causal else self.reach) if self.reach >= 0 else (-1, -1)
        options = dict(softmax_scale=self.scale, window_size=window, softcap=self.softcap)
        if self.alibi_slopes is not None:
            if self.alibi_slopes.device != query.device:
                self.alibi_slopes = self.alibi_slopes.to(query.device)
            options["alibi_slopes"] = self.alibi_slopes
        if self.sinks is not None:  # a parameter, which is loaded after __init__
            sinks = self.sinks.detach()
            options["sinks"] = sinks if sinks.dtype == query.dtype else sinks.float()
        return options

    def _split(self, layer, kv_cache):
        """Views (num_blocks, block_size, num_kv_heads, head_size) of the keys and of the values, and their scales."""
        if self.kv_cache_dtype in TOKEN_DTYPES:
            *caches, k_scale, v_scale = inline_scales(kv_cache)
            return caches, dict(k_scale=k_scale, v_scale=v_scale)
        if self.fp8_dtype is not None:
            kv_cache = kv_cache.view(self.fp8_dtype)
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1), self._scales(layer)

    def _scales(self, layer):
        """The layer's scales, (1,) or (num_kv_heads,), of an fp8 cache. The views are kept: making them takes time."""
        if self.fp8_dtype is None:
            return {}
        k_scale, v_scale = layer._k_scale, layer._v_scale
        if self._viewed[0] is not k_scale or self._viewed[1] is not v_scale:
            self._viewed = k_scale, v_scale, dict(k_scale=k_scale.view(-1), v_scale=v_scale.view(-1))
        return self._viewed[2]


def _merge(*parts):
    """(out (num_tokens, num_heads, head_size), lse (num_heads, num_tokens)) of all keys, merged from those of parts."""
    outs, lses = (torch.stack(tensors).unsqueeze(1) for tensors in zip(*parts))
    out, lse = merge_attention(outs, lses)
    return out[0], lse[0]


def _as_fp8(latent_cache, kv_cache_dtype, k_scale):
    """(cache, its scale (1,)) of fp8 with a scale per tensor; other caches as they are, and None."""
    dtype = LATENT_FP8_DTYPES.get(kv_cache_dtype)
    return (latent_cache, None) if dtype is None else (latent_cache.view(dtype), k_scale.view(1))


@dataclass
class LatentDecodeMetadata:
    """The decodes of a batch. query_start_loc is None where all have max_query_len queries, also when a graph is
    replayed; otherwise they have up to max_query_len.
    """

    block_table: Tensor
    seq_lens: Tensor
    dcp_tot_seq_lens: Tensor | None
    query_start_loc: Tensor | None
    max_query_len: int


class LatentMetadataBuilder:
    """What vLLM's builder of MLA asks of a back end. varlen_graphs: graphs of decodes with max_query_len queries are
    replayed for decodes with fewer.
    """

    varlen_graphs = False

    def _build_decode(
        self,
        block_table_tensor: Tensor,
        seq_lens_device: Tensor,
        max_seq_len: int,
        query_start_loc_cpu: Tensor,
        query_start_loc_device: Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: Tensor | None,
    ) -> LatentDecodeMetadata:
        is_uniform = num_decode_tokens == max_query_len * seq_lens_device.shape[0]
        if self.varlen_graphs and max_query_len > 1:
            is_uniform = False
        return LatentDecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            query_start_loc=None if is_uniform else query_start_loc_device,
            max_query_len=max_query_len,
        )


class LatentAttention:
    """One MLA layer of vLLM: decode, prefill and cache updates by `mla_decode`, `flash_attention_varlen` and
    `append_latent_cache`.
    """

    # Set by vLLM's own __init__.
    num_heads: int
    scale: float
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_b_proj: Any
    kv_cache_dtype: str
    dcp_world_size: int

    def check_arguments(self, **given: Any) -> None:
        """alibi_slopes, sliding_window, logits_soft_cap and attn_type of `__init__`, and what it set."""
        for name, value in given.items():
            if value not in (None, 0, "decoder"):
                raise NotImplementedError(f"{name}: not supported by TRITON_ATTN_PLUS_MLA, got {value}")
        if self.qk_rope_head_dim == 0 and self.kv_cache_dtype == "fp8_ds_mla":
            raise NotImplementedError("qk_rope_head_dim: expected 1 or more with fp8_ds_mla, got 0")
        known = ("auto", *PLAIN_DTYPES, *LATENT_FP8_DTYPES, "fp8_ds_mla")
        if self.kv_cache_dtype not in known:
            raise NotImplementedError(f"kv_cache_dtype: expected {', '.join(known)}, got {self.kv_cache_dtype}")

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
        skip_scale: bool = False,
    ) -> None:
        """kv_c_normed (num_tokens, kv_lora_rank), k_pe (num_tokens, 1, qk_rope_head_dim). k_scale is a tensor of
        one for fp8 caches, but not fp8_ds_mla, which has scales in its rows.
        """
        if kv_cache.numel() == 0:  # a profiling run
            return
        slots = slot_mapping.flatten()
        num_tokens, (kv_cache, scale) = slots.shape[0], _as_fp8(kv_cache, kv_cache_dtype, k_scale)
        append_latent_cache(kv_c_normed[:num_tokens], k_pe[:num_tokens].flatten(1), kv_cache, slots, k_scale=scale)

    def forward_mqa(
        self, q: Tensor | tuple[Tensor, Tensor], kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(out (num_tokens, heads, kv_lora_rank), lse (num_tokens, heads) with context parallelism) of decodes,
        speculative tokens among them. q is absorbed.
        """
        q_nope, q_pe = q if isinstance(q, tuple) else q.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        decode, return_lse = attn_metadata.decode, self.dcp_world_size > 1
        is_uniform, lengths = decode.query_start_loc is None, {}
        if is_uniform:
            shape = decode.seq_lens.shape[0], decode.max_query_len
            q_nope, q_pe = q_nope.unflatten(0, shape), q_pe.unflatten(0, shape)
        else:
            lengths = dict(cu_seqlens_q=decode.query_start_loc, max_seqlen_q=decode.max_query_len)
        cache, scale = _as_fp8(kv_c_and_k_pe_cache, self.kv_cache_dtype, layer._k_scale)
        result = mla_decode(
            q_nope,
            q_pe,
            cache,
            decode.seq_lens,
            decode.block_table,
            k_scale=scale,
            **lengths,
            causal=attn_metadata.causal,
            softmax_scale=self.scale,
            return_lse=return_lse,
        )
        out, lse = result if return_lse else (result, None)
        if is_uniform:
            return out.flatten(0, 1), None if lse is None else lse.transpose(1, 2).flatten(0, 1)
        return out, None if lse is None else lse.T

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: Any,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """Prefill: new tokens attend to each other, and to the chunks of cached context that vLLM's builder planned.
        The parts are merged by their log-sum-exp.
        """
        if output_scale is not None:
            raise NotImplementedError("output_scale: expected None; outputs are not quantized")
        prefill = attn_metadata.prefill
        k, v = self._keys_and_values(kv_c_normed, k_pe.flatten(1))
        starts, longest = prefill.query_start_loc, prefill.max_query_len
        options = dict(softmax_scale=self.scale, return_lse=True)
        cache, scale = _as_fp8(kv_c_and_k_pe_cache, self.kv_cache_dtype, k_scale)
        out = output.view(-1, self.num_heads, self.v_head_dim)
        lengths = starts, starts, longest, longest
        _, lse = flash_attention_varlen(q, k, v, *lengths, causal=True, out=out, **options)
        for chunk in () if prefill.chunked_context is None else prefill.chunked_context.chunks:
            tokens = chunk.token_slice
            rows = self._read_context(cache, scale, prefill.block_table[chunk.request_slice], chunk, q.dtype)
            k, v = self._keys_and_values(*rows.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1))
            lengths = chunk.query_start_loc, chunk.cu_seq_lens, chunk.max_query_len, chunk.max_seq_len
            part = flash_attention_varlen(q[tokens], k, v, *lengths, causal=False, **options)
            out[tokens], lse[:, tokens] = _merge((out[tokens], lse[:, tokens]), part)

    def _keys_and_values(self, latents, k_pe):
        """(num_tokens, num_heads, nope + rope) and (num_tokens, num_heads, v_head_dim) by the model's projection."""
        projected = self.kv_b_proj(latents)[0].unflatten(-1, (self.num_heads, -1))
        k_nope, v = projected.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        if self.qk_rope_head_dim == 0:
            return k_nope, v
        return torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, self.num_heads, -1)], dim=-1), v

    def _read_context(self, cache, scale, block_table, chunk, dtype):
        """(num_context_tokens, kv_lora_rank + qk_rope_head_dim): a chunk's rows of the cache, without a sync."""
        requests = chunk.token_to_seq.long()
        rows = torch.arange(chunk.num_context_tokens, device=cache.device)
        positions = rows - chunk.cu_seq_lens[requests] + chunk.starts[requests]
        pages = block_table[requests, positions // cache.shape[1]]
        found = cache.view(torch.uint8)[pages.long(), positions % cache.shape[1]]  # torch does not index fp8 everywhere
        if scale is not None:
            return (found.view(cache.dtype).float() * scale).to(dtype)
        if cache.dtype != torch.uint8:
            return found.view(cache.dtype)
        num_scales = self.kv_lora_rank // SCALE_BLOCK
        sizes = [
            self.kv_lora_rank,
            num_scales * torch.float32.itemsize,
            self.qk_rope_head_dim * torch.bfloat16.itemsize,
        ]
        latents, scales, k_pe = found.split(sizes, dim=-1)
        latents = latents.view(torch.float8_e4m3fn).float().unflatten(-1, (num_scales, SCALE_BLOCK))
        latents = (latents * scales.view(torch.float32).unsqueeze(-1)).flatten(-2)
        return torch.cat([latents.to(dtype), k_pe.view(torch.bfloat16).to(dtype)], dim=-1)
