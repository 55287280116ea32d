"""vLLM's attention of one MLA layer over its cache of latent vectors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache import append_latent_cache
from ...flash import flash_attention_varlen
from ...merge import merge_attention
from ...mla import mla_decode
from .caches import LATENT_FP8_DTYPES, PLAIN_DTYPES, SCALE_BLOCK, as_fp8


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
        num_tokens, (kv_cache, scale) = slots.shape[0], as_fp8(kv_cache, kv_cache_dtype, k_scale)
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
        cache, scale = as_fp8(kv_c_and_k_pe_cache, self.kv_cache_dtype, layer._k_scale)
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
        cache, scale = as_fp8(kv_c_and_k_pe_cache, self.kv_cache_dtype, k_scale)
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


def _merge(*parts):
    """(out (num_tokens, num_heads, head_size), lse (num_heads, num_tokens)) of all keys, merged from those of parts."""
    outs, lses = (torch.stack(tensors).unsqueeze(1) for tensors in zip(*parts))
    out, lse = merge_attention(outs, lses)
    return out[0], lse[0]
