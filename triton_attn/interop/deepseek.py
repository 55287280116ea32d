"""DeepSeek-V2 and -V3 of Hugging Face transformers, version 5, over a paged cache of latent vectors:

    from triton_attn.interop.deepseek import PagedDeepseek

    paged = PagedDeepseek(DeepseekV3ForCausalLM.from_pretrained(...), num_pages=4096)
    paged.generate(prompts, max_new_tokens=100)

A token costs kv_lora_rank + qk_rope_head_dim elements per layer, whatever the number of heads. The model is not
modified: all of its modules except the attention are called, and it still works by itself.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, PretrainedConfig

from ..cache import LatentKVCache, append_latent_cache
from ..mla import mla_decode, mla_prefill, mla_softmax_scale
from .rope import rotate
from .support import Support

SUPPORT = Support(
    functions=("PagedDeepseek",),
    on_cpu="all, by the references or in the interpreter",
    refused={"model": 'rope_type "dynamic" or "longrope"'},
)
# With these the angles do not depend on the length of the text.
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")


class PagedDeepseek:
    """A model whose prompts run through `mla_prefill` and whose new tokens through `mla_decode`.

    Args:
        model: DeepseekV2ForCausalLM or DeepseekV3ForCausalLM, in fp16, bf16 or fp32, on one device.
        num_pages, page_size: of the cache.
        dtype: of the cache; None means the model's. torch.float8_e4m3fn is the fp8 layout of `append_latent_cache`.
        prefix_caching: prompts share the pages of a common prefix with earlier prompts.

    Attributes:
        cache: `LatentKVCache`, in which to create, fork, truncate and free sequences.

    Raises:
        TypeError: the model has another class.
        NotImplementedError: the angles change with the length of the text ("dynamic", "longrope").

    Example:
        >>> from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
        >>> from triton_attn.interop.deepseek import PagedDeepseek
        >>> sizes = dict(vocab_size=32, hidden_size=32, num_hidden_layers=1, first_k_dense_replace=1)
        >>> heads = dict(num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
        >>> paged = PagedDeepseek(DeepseekV2ForCausalLM(DeepseekV2Config(**sizes, **heads)), num_pages=4)
        >>> len(paged.generate([[1, 2, 3]], max_new_tokens=2)[0])
        2
    """

    def __init__(
        self,
        model: DeepseekV2ForCausalLM | DeepseekV3ForCausalLM,
        num_pages: int,
        page_size: int = 64,
        *,
        dtype: torch.dtype | None = None,
        prefix_caching: bool = True,
    ) -> None:
        if not isinstance(model, (DeepseekV2ForCausalLM, DeepseekV3ForCausalLM)):
            raise TypeError(
                f"model: expected DeepseekV2ForCausalLM or DeepseekV3ForCausalLM, got {type(model).__name__}"
            )
        config = model.config
        rope_type = config.rope_parameters.get("rope_type", "default")
        if rope_type not in SUPPORTED_ROPE:
            raise NotImplementedError(f"model: expected rope_type {', '.join(SUPPORTED_ROPE)}, got {rope_type}")
        self.model = model
        self.cache = LatentKVCache(
            num_pages,
            page_size,
            num_layers=config.num_hidden_layers,
            kv_lora_rank=config.kv_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            dtype=model.dtype if dtype is None else dtype,
            device=model.device,
            prefix_caching=prefix_caching,
        )
        self.max_seqlen = min(num_pages * page_size, config.max_position_embeddings)
        self.softmax_scale = softmax_scale(config)
        self.rope = rope_tables(model, self.max_seqlen)

    @torch.no_grad()
    def forward(self, seqs: list[Any], new_tokens: list[list[int]]) -> Tensor:
        """Compute the new tokens of each sequence, and write their keys to the cache.

        Args:
            seqs: 1 or more sequences of `cache`. If all are empty they are computed by `mla_prefill`, otherwise by
                `mla_decode`, in which each costs as much as the one with the most new tokens.
            new_tokens: for each sequence a list of 1 or more token ids.

        Returns:
            logits (len(seqs), vocab_size) in fp32, of the token after each sequence's last.

        Raises:
            OutOfPages: the cache has too few pages.
            ValueError: a sequence has no new tokens, or more tokens than the model has positions.
                In both cases nothing has changed.
        """
        step = self._begin(seqs, new_tokens)
        inner, device = self.model.model, self.model.device
        tokens = torch.tensor(list(itertools.chain(*new_tokens)), device=device)
        hidden = inner.embed_tokens(tokens[None])
        for index, layer in enumerate(inner.layers[: self.model.config.num_hidden_layers]):
            hidden = hidden + self._attend(index, layer.self_attn, layer.input_layernorm(hidden)[0], step)[None]
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.cache.commit(seqs)
        last = step.cu_seqlens_q[1:].long() - 1
        return self.model.lm_head(inner.norm(hidden[:, last]))[0].float()

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy decoding: a list of new tokens for each prompt, up to and including its end token.

        Args:
            prompts: lists of 1 or more token ids, of any lengths.
            max_new_tokens: the limit for each prompt. End tokens are those of the model's generation_config.
        """
        eos = self.model.generation_config.eos_token_id
        eos = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
        seqs, outputs = [], [[] for _ in prompts]
        try:
            pending = []
            for prompt in prompts:
                seq, cached = self.cache.create(prompt)
                seqs.append(seq)
                pending.append(prompt[cached:])
            running = list(range(len(prompts))) if max_new_tokens > 0 else []
            while running:
                logits = self.forward([seqs[i] for i in running], pending)
                for i, token in zip(running, logits.argmax(-1).tolist()):
                    outputs[i].append(token)
                running = [i for i in running if outputs[i][-1] not in eos and len(outputs[i]) < max_new_tokens]
                pending = [outputs[i][-1:] for i in running]
        finally:
            for seq in seqs:
                self.cache.free(seq)
        return outputs

    def _begin(self, seqs, new_tokens):
        """Reserve slots for the new tokens, and compute their positions."""
        starts, counts = [len(seq) for seq in seqs], [len(tokens) for tokens in new_tokens]
        if not starts:
            raise ValueError("seqs: expected 1 or more sequences, got none")
        if len(starts) != len(counts):
            raise ValueError(f"new_tokens: expected one list for each of {len(starts)} sequences, got {len(counts)}")
        for i, (start, count) in enumerate(zip(starts, counts)):
            if not count or start + count > self.max_seqlen:
                expected = f"1 to {self.max_seqlen - start} tokens"
                raise ValueError(f"new_tokens[{i}]: expected {expected}, for {self.max_seqlen} positions, got {count}")
        slots = self.cache.extend(seqs, new_tokens)
        device, longest = self.model.device, max(counts)
        positions = [start + i for start, count in zip(starts, counts) for i in range(count)]
        padded_rows = None
        if any(starts) and min(counts) < longest:
            rows = [i * longest + longest - n + j for i, n in enumerate(counts) for j in range(n)]
            padded_rows = torch.tensor(rows, device=device)
        return Step(
            is_prompt=not any(starts),
            slots=slots,
            positions=torch.tensor(positions, device=device),
            cache_seqlens=self.cache.cache_seqlens(seqs),
            block_table=self.cache.block_table(seqs),
            cu_seqlens_q=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device),
            max_seqlen_q=longest,
            padded_rows=padded_rows,
        )

    def _attend(self, index, attention, hidden, step):
        """Attention of a layer: hidden (num_tokens, hidden_size), with the tokens of all sequences concatenated."""
        config, latent_cache = self.model.config, self.cache.latent_cache[index]
        nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        q_nope, q_pe = queries(attention, hidden).unflatten(-1, (-1, nope + rope)).split([nope, rope], dim=-1)
        kv_latent, k_pe = attention.kv_a_proj_with_mqa(hidden).split([rank, rope], dim=-1)
        kv_latent = attention.kv_a_layernorm(kv_latent)
        weights = attention.kv_b_proj.weight.unflatten(0, (-1, nope + config.v_head_dim))
        w_uk, w_uv = weights.split([nope, config.v_head_dim], dim=1)
        append_latent_cache(kv_latent, k_pe, latent_cache, step.slots, positions=step.positions, **self.rope)
        if step.is_prompt:
            cos, sin = (self.rope[name][step.positions] for name in ("rope_cos", "rope_sin"))
            q_pe, k_pe = (rotate(x, cos, sin, self.rope["rope_interleaved"]) for x in (q_pe, k_pe.unsqueeze(1)))
            out = mla_prefill(
                q_nope,
                q_pe,
                kv_latent,
                k_pe.squeeze(1),
                w_uk,
                w_uv,
                cu_seqlens_q=step.cu_seqlens_q,
                cu_seqlens_k=step.cu_seqlens_q,
                max_seqlen_q=step.max_seqlen_q,
                max_seqlen_k=step.max_seqlen_q,
                softmax_scale=self.softmax_scale,
            )
        else:
            out = mla_decode(
                step.by_sequence(q_nope),
                step.by_sequence(q_pe),
                latent_cache,
                step.cache_seqlens,
                step.block_table,
                w_uk,
                w_uv,
                softmax_scale=self.softmax_scale,
                **self.rope,
            )
            out = step.in_a_row(out)
        return attention.o_proj(out.flatten(1))


class Step(NamedTuple):
    """The new tokens of a batch, concatenated, as the layers need them.

    Tokens are written to `slots` and have `positions`. The sequences have `cache_seqlens` keys on the pages of
    `block_table`. `is_prompt`: no sequence had keys before. `padded_rows`: if the sequences differ in their number of
    new tokens, the row of each token in (batch, max_seqlen_q). A sequence takes the last of its rows.
    """

    is_prompt: bool
    slots: torch.Tensor
    positions: torch.Tensor
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int
    padded_rows: torch.Tensor | None

    def by_sequence(self, x):
        """(num_tokens, ...) as (batch, max_seqlen_q, ...)."""
        if self.padded_rows is not None:
            padded = x.new_zeros(len(self.cache_seqlens) * self.max_seqlen_q, *x.shape[1:])
            padded[self.padded_rows] = x
            x = padded
        return x.unflatten(0, (-1, self.max_seqlen_q))

    def in_a_row(self, x):
        """(batch, max_seqlen_q, ...) as (num_tokens, ...)."""
        x = x.flatten(0, 1)
        return x if self.padded_rows is None else x[self.padded_rows]


def queries(attention: torch.nn.Module, hidden: Tensor) -> Tensor:
    """(num_tokens, num_heads * (qk_nope_head_dim + qk_rope_head_dim)), through the low-rank projections if there are
    any.
    """
    if attention.q_lora_rank is None:
        return attention.q_proj(hidden)
    return attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden)))


def softmax_scale(config: PretrainedConfig) -> float:
    """`mla_softmax_scale` for a transformers config."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        rope = {}
    return mla_softmax_scale(
        config.qk_nope_head_dim, config.qk_rope_head_dim, rope.get("factor", 1.0), rope.get("mscale_all_dim") or 0.0
    )


def rope_tables(model: DeepseekV2ForCausalLM | DeepseekV3ForCausalLM, num_positions: int) -> dict[str, Any]:
    """rope_cos, rope_sin (num_positions, qk_rope_head_dim / 2) in fp32, with YaRN's factor, and the convention.

    V2 multiplies neighbours as complex numbers. V3 rotates neighbours or halves, depending on its config.
    """
    positions = torch.arange(num_positions, device=model.device)[None]
    angles = model.model.rotary_emb(torch.empty(0, dtype=torch.float32, device=model.device), positions)
    if isinstance(model, DeepseekV2ForCausalLM):
        cos, sin = angles.real, angles.imag
        interleaved = True
    else:
        cos, sin = (table[..., : table.shape[-1] // 2] for table in angles)
        interleaved = bool(model.config.rope_interleave)
    return {"rope_cos": cos[0].contiguous(), "rope_sin": sin[0].contiguous(), "rope_interleaved": interleaved}
