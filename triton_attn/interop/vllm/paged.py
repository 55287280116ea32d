"""vLLM's attention of one layer over its cache of keys and values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache import append_kv_cache
from ...flash import flash_attention_varlen
from ...paged import paged_attention
from .caches import FP8_DTYPES, PLAIN_DTYPES, TOKEN_DTYPES, inline_scales


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
