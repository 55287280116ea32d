"""Our kernels as an attention back end of SGLang:

    python -m sglang.launch_server --model-path ... --attention-backend triton_attn

The package's entry point in the group `sglang.srt.plugins` registers it. Experimental: it is written against the
abstract class of SGLang 0.5.23 and tested against a double of that class. It has not run in SGLang yet.

Supported: models with MHA, GQA or MQA; prompts, chunks of prompts, mixed batches and decode, with CUDA graphs for
decode; pools of any --page-size, slot by slot or by heads (SGLANG_USE_HND_KVCACHE), 16 bit or fp8 with scales, and
hybrid pools with slots of their own for window layers; windows, soft cap, sinks, values with another head dimension.
Everything else raises NotImplementedError: speculative decoding, MLA, cross attention, context parallelism, unified and
quantized pools, CUDA graphs of prompts.

This module does not import SGLang. `register` and `create_backend`, which SGLang calls, do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..paged import paged_attention
from .support import Support

SUPPORT = Support(
    functions=("register", "create_backend"),
    on_cpu="against a double of SGLang's class; experimental",
    refused={
        "runner": "MLA models, decode context parallelism, a unified or quantized pool",
        "forward_mode": "speculative decoding, diffusion LLMs, prompts in a CUDA graph",
        "is_cross_attention": "True",
        "attn_type": "DECODER_BIDIRECTIONAL",
        "logit_capping_method": 'other than "tanh"',
        "xai_temperature_len": "above 0",
        "return_lse": "True",
        "score_mod": "a value, and so does any other keyword of a layer's call but sinks",
        "key_buffer": "neither by slots nor by heads",
    },
)
NAME = "triton_attn"
MODES = ("EXTEND", "DECODE", "MIXED", "IDLE", "SPLIT_PREFILL")


def register() -> None:
    """Make `--attention-backend triton_attn` known to SGLang. The entry point calls it in each of its processes."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(create_backend)


def create_backend(runner: Any) -> Any:
    """The back end of a model runner: an `AttentionBackend` of SGLang.

    Raises:
        NotImplementedError: the runner's model or pool is not supported.
    """
    from sglang.srt.runtime_context import get_parallel

    _refuse(
        "runner",
        {
            "an MLA model": runner.use_mla_backend,
            "decode context parallelism": get_parallel().dcp_enabled,
            "a unified pool": getattr(runner.kv_index_translator, "is_translating", False),
            "a quantized pool": getattr(runner.token_to_kv_pool, "is_quantized_kv_cache", False),
        },
    )
    return _backend_class()(runner)


@functools.cache
def _backend_class():
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    return type("TritonAttnPlusBackend", (PagedBackend, AttentionBackend), {})


@dataclass
class Metadata:
    """What all layers of a forward pass share.

    Attributes:
        seqlens: (batch,) int32, keys of each request, new ones included.
        block_table: (batch, max_pages) int32.
        window_table: the same in the pool of window layers, None if they share the pool.
        window_slots: (num_tokens,) the slots of new tokens there, or None.
        cu_seqlens_q, max_seqlen_q: the new tokens of each request. None and 1 if each has one.
    """

    seqlens: Tensor
    block_table: Tensor
    window_table: Tensor | None
    window_slots: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int


class PagedBackend:
    """The methods of the back end. `create_backend` makes a class of it and of SGLang's `AttentionBackend`, whose
    `forward` calls these methods. Of a layer's keywords only sinks (num_heads,) is supported, and not score_mod.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any):
        super().__init__()
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.pool = runner.token_to_kv_pool
        self.page_size = runner.page_size
        self.is_hybrid = hasattr(self.pool, "translate_loc_from_full_to_swa")
        self.max_pages = -(-self.req_to_token.shape[1] // self.page_size)
        self.forward_metadata: Metadata | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Called once per eager forward pass. There is no device-to-host sync."""
        mode = forward_batch.forward_mode
        _refuse("forward_mode", {mode.name: mode.name not in MODES})
        if mode.is_idle():
            return
        num_pages, cu_seqlens_q, max_seqlen_q = self.max_pages, None, 1
        if not mode.is_decode():
            lengths, prefixes = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
            num_pages = -(-max(map(sum, zip(lengths, prefixes)), default=0) // self.page_size)
            max_seqlen_q = max(lengths, default=0)
            cu_seqlens_q = torch.nn.functional.pad(forward_batch.extend_seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        tables = self._tables(forward_batch.req_pool_indices, num_pages)
        window_slots = self._window_slots(forward_batch.out_cache_loc)
        seqlens = forward_batch.seq_lens.int()
        self.forward_metadata = Metadata(seqlens, *tables, window_slots, cu_seqlens_q, max_seqlen_q)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured decode steps read, for up to max_bs requests."""
        device = self.req_to_token.device
        table = torch.zeros(max_bs, self.max_pages, dtype=torch.int32, device=device)
        self.graph_metadata = Metadata(
            seqlens=torch.ones(max_bs, dtype=torch.int32, device=device),
            block_table=table,
            window_table=torch.zeros_like(table) if self.is_hybrid else None,
            window_slots=torch.zeros(max_num_tokens, dtype=torch.int64, device=device) if self.is_hybrid else None,
            cu_seqlens_q=None,
            max_seqlen_q=1,
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Called before a decode step is captured and before each replay: write the tensors that the graph reads."""
        mode = forward_batch.forward_mode
        _refuse("forward_mode", {f"{mode.name} in a CUDA graph": mode.name not in ("DECODE", "IDLE")})
        batch, graph = forward_batch.batch_size, self.graph_metadata
        block_table, window_table = self._tables(forward_batch.req_pool_indices[:batch], self.max_pages)
        graph.block_table[:batch].copy_(block_table)
        graph.seqlens[:batch].copy_(forward_batch.seq_lens[:batch])
        window_slots = None
        if self.is_hybrid:
            graph.window_table[:batch].copy_(window_table)
            slots = forward_batch.out_cache_loc
            window_slots = graph.window_slots[: len(slots)]
            window_slots.copy_(self._window_slots(slots))
            window_table = graph.window_table[:batch]
        self.forward_metadata = Metadata(
            graph.seqlens[:batch], graph.block_table[:batch], window_table, window_slots, None, 1
        )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of a request that pads a captured batch."""
        return 1

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """One new token of each request: q (batch, num_heads * head_dim). Returns (batch, num_heads * v_head_dim)."""
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """New tokens of all requests, concatenated: q (num_tokens, num_heads * head_dim). Returns (num_tokens,
        num_heads * v_head_dim), with 0 for tokens after the last request.
        """
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def support_triton(self) -> bool:
        return True

    def _attend(self, q, k, v, layer, forward_batch, save_kv_cache, options):
        sinks = options.pop("sinks", None)
        _check_layer(layer, forward_batch, options)
        metadata = self.forward_metadata
        if save_kv_cache and k is not None:
            self._write(k, v, layer, forward_batch)
        buffers = self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)
        widths = layer.qk_head_dim, layer.v_head_dim
        k_cache, v_cache = (self._pages(x, layer.tp_k_head_num, width) for x, width in zip(buffers, widths))
        in_window_pool = self.is_hybrid and self.pool.layers_mapping[layer.layer_id][1]
        is_causal = layer.attn_type.name == "DECODER"
        side = layer.sliding_window_size  # keys before the query's own; -1 for all
        is_scaled = k_cache.dtype != q.dtype
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = paged_attention(
            q if metadata.cu_seqlens_q is not None else q.unsqueeze(1),
            k_cache,
            v_cache,
            metadata.seqlens,
            metadata.window_table if in_window_pool else metadata.block_table,
            cu_seqlens_q=metadata.cu_seqlens_q,
            max_seqlen_q=None if metadata.cu_seqlens_q is None else metadata.max_seqlen_q,
            causal=is_causal,
            softmax_scale=layer.scaling,
            window_size=(side, 0 if is_causal else side),
            softcap=layer.logit_cap or 0.0,
            sinks=None if sinks is None else sinks.float(),
            k_scale=layer.k_scale_float if is_scaled else None,
            v_scale=layer.v_scale_float if is_scaled else None,
        )
        return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _write(self, k, v, layer, forward_batch):
        """The pool writes, since it knows its layout and its dtype."""
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        location = KVWriteLoc.for_batch(forward_batch, swa_loc=self.forward_metadata.window_slots)
        k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        self.pool.set_kv_buffer(layer, location, k, v, layer.k_scale, layer.v_scale)

    def _tables(self, requests, num_pages):
        """(block table, table of window layers or None). Page j of a request has its token j * page_size."""
        slots = self.req_to_token[requests, : num_pages * self.page_size : self.page_size]
        table = slots.int() // self.page_size
        if not self.is_hybrid:
            return table, None
        return table, self.pool.translate_loc_from_full_to_swa(slots).int() // self.page_size

    def _window_slots(self, slots):
        return self.pool.translate_loc_from_full_to_swa(slots) if self.is_hybrid else None

    def _pages(self, buffer, num_heads, width):
        """A view (num_pages, page_size, num_heads, width) of a pool by slots (num_slots, num_heads, width) or by heads
        (num_pages, num_heads, page_size, width).
        """
        if buffer.shape[1:] == (num_heads, width):
            return buffer.unflatten(0, (-1, self.page_size))
        if buffer.shape[1:] == (num_heads, self.page_size, width):
            return buffer.transpose(1, 2)
        raise NotImplementedError(
            f"key_buffer, value_buffer: expected (num_slots, {num_heads}, {width}) or (num_pages, {num_heads}, "
            f"{self.page_size}, {width}), got {tuple(buffer.shape)}"
        )


def _check_layer(layer, forward_batch, options):
    _refuse("is_cross_attention", {"True": layer.is_cross_attention or forward_batch.encoder_lens is not None})
    _refuse("attn_type", {layer.attn_type.name: layer.attn_type.name not in ("DECODER", "ENCODER_ONLY")})
    method = layer.logit_capping_method
    _refuse("logit_capping_method", {method: bool(layer.logit_cap) and method != "tanh"})
    _refuse("xai_temperature_len", {layer.xai_temperature_len: layer.xai_temperature_len > 0})
    _refuse("return_lse", {"True": options.pop("return_lse", False) or forward_batch.mha_return_lse})
    for name, value in options.items():
        _refuse(name, {type(value).__name__: value is not None and value is not False})


def _refuse(name, cases):
    found = [str(case) for case, is_found in cases.items() if is_found]
    if found:
        raise NotImplementedError(f"{name}: not supported by triton_attn's SGLang back end, got {', '.join(found)}")
