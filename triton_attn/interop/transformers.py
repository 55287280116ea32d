"""Our kernels in Hugging Face transformers, version 5:

    from triton_attn.interop.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="triton_attn")

Served: causal, sliding window and bidirectional masks, grouped query heads, softcap, sinks, dropout, gradients, padding
on either side, packed sequences, dynamic and static caches. Padding is cut out before the kernel, which spends no time
on it. Arguments that are not served raise NotImplementedError.
"""

import inspect
import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from triton_attn import flash_attention, flash_attention_varlen

UNLIMITED = math.inf


def register(name="triton_attn"):
    """Make `attn_implementation=name` known to transformers: the attention, and the mask that it takes."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, token_mask)


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    s_aux=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    deterministic=None,
    **kwargs,
):
    """The attention of one layer, as transformers calls it.

    Args:
        module: the layer; `module.is_causal` holds where neither a mask nor is_causal is given.
        query: (batch, num_heads_q, seqlen_q, head_dim). key, value: (batch, num_heads_kv, seqlen_k, head_dim and
            head_dim_v); of a static cache, slots after the last query's may hold anything.
        attention_mask: what `token_mask` made, or None: every key, or the causal ones, within sliding_window.
        dropout, scaling, softcap: share of the weights dropped, factor on q . k, bound of the scores.
        sliding_window: keys that a query sees on each side, its own included; a mask knows its own window.
        s_aux: (num_heads_q,), one more logit per head in the softmax's sum.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: bounds and longest lengths of sequences that are
            packed into the rows of the batch.
        deterministic: gradients are the same to the bit from run to run.

    Returns:
        (batch, seqlen_q, num_heads_q, head_dim_v), 0 where a causal or windowed query is padding; and None for the
        weights, which are nowhere in memory.

    Raises:
        NotImplementedError: attention weights are asked for, a 4-D mask, an additive bias, sparse indices.
    """
    _refuse({name: kwargs.get(name) for name in NOT_SERVED})
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    packing = None
    if attention_mask is None:
        window = _window_of_layer(module, is_causal, sliding_window)
    elif isinstance(attention_mask, TokenMask):
        window, packing = attention_mask.window, attention_mask.packing
        k, v = (x[:, : attention_mask.shape[1]] for x in (k, v))
    else:
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise NotImplementedError(
            f"attention_mask: expected a padding mask (batch, seqlen), which the model makes its mask from, got {shape}"
        )
    if cu_seq_lens_q is not None:
        if packing is not None and packing.rows_k is not None:
            raise ValueError("cu_seq_lens_q: expected no padding mask beside packed sequences")
        packing = Packing.from_bounds(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)

    options = {
        "softmax_scale": scaling,
        "window_size": window,
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.float(),
        "dropout_p": dropout,
        "deterministic": bool(deterministic),
    }
    if packing is None:
        return flash_attention(q, k, v, **options), None
    return _attend_packed(q, k, v, packing, options), None


# Arguments of layers that change the result or ask for more than it.
NOT_SERVED = ("position_bias", "head_mask", "output_attentions", "indices", "block_indices", "block_table")


def _refuse(arguments):
    for name, value in arguments.items():
        if value is not None and value is not False:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise NotImplementedError(f"{name}: not served by triton_attn's attention, got {got}")


def _window_of_layer(module, is_causal, sliding_window):
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    side = -1 if sliding_window is None else sliding_window - 1
    return (side, 0 if is_causal else side)


class Packing(NamedTuple):
    """Where the sequences of a batch lie, without the padding: the arguments of `flash_attention_varlen`.

    `rows_q` and `rows_k` index (batch, position) of the tokens; None takes all of them, one row after the other.
    """

    rows_q: tuple | None
    rows_k: tuple | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def from_lengths(cls, rows_q, rows_k, lengths_q, lengths_k):
        bounds_q, bounds_k = (pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)) for lengths in (lengths_q, lengths_k))
        return cls(rows_q, rows_k, bounds_q, bounds_k, int(lengths_q.max()), int(lengths_k.max()))

    @classmethod
    def from_bounds(cls, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        max_seqlen_q = cu_seqlens_q.diff().max() if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = cu_seqlens_k.diff().max() if max_seqlen_k is None else max_seqlen_k
        return cls(None, None, cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k))


def _attend_packed(q, k, v, packing, options):
    rows_q, rows_k, *bounds = packing
    out = flash_attention_varlen(_take(q, rows_q), _take(k, rows_k), _take(v, rows_k), *bounds, **options)
    if rows_q is None:
        return out.unflatten(0, q.shape[:2])
    padded = out.new_zeros(*q.shape[:3], v.shape[3])
    padded[rows_q] = out
    return padded


def _take(x, rows):
    return x.flatten(0, 1) if rows is None else x[rows]


class TokenMask(torch.Tensor):
    """Which keys the queries see: (batch, num_keys), 0 for padding, n for a token of the n-th sequence of its row.

    `window` is (left, right) around each query's own position, -1 unlimited; the queries are the last `seqlen_q` keys.
    A tensor, since transformers moves masks between devices; all layers share one, and so its `packing`.
    """

    @classmethod
    def make(cls, tokens, window, seqlen_q):
        mask = tokens.as_subclass(cls)
        mask.window, mask.seqlen_q = window, seqlen_q
        return mask

    def to(self, *args, **kwargs):
        return self.make(self.as_subclass(torch.Tensor).to(*args, **kwargs), self.window, self.seqlen_q)

    @cached_property
    def packing(self):
        """None where every row is one sequence without padding."""
        tokens = self.as_subclass(torch.Tensor)
        batch, num_keys = tokens.shape
        real = tokens > 0
        all_real = bool(real.all())
        num_sequences = max(1, int(tokens.max()))
        if all_real and num_sequences == 1:
            return None
        if self.window[0] >= 0 and _has_holes(real):
            raise NotImplementedError("attention_mask: padding between tokens is not served under a sliding window")

        sequence = tokens - 1 + num_sequences * torch.arange(batch, device=tokens.device)[:, None]

        def lengths(part):
            return torch.bincount(sequence[:, part][real[:, part]], minlength=batch * num_sequences)

        rows_k, lengths_k = None if all_real else real.nonzero(as_tuple=True), lengths(slice(None))
        if self.window == (-1, -1):
            # It may be the mask of cross-attention, which says nothing of the queries: they all count.
            rows_q, lengths_q = None, torch.full_like(lengths_k, self.seqlen_q)
        else:
            queries = slice(num_keys - self.seqlen_q, None)
            rows_q, lengths_q = None if all_real else real[:, queries].nonzero(as_tuple=True), lengths(queries)
        return Packing.from_lengths(rows_q, rows_k, lengths_q, lengths_k)


def _has_holes(real):
    """Whether a row has padding between its tokens: without it, they would come closer together."""
    runs = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    return bool((runs > 1).any())


def token_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, **kwargs):
    """The mask of all layers of a kind, as transformers asks for it: a `TokenMask`, or None where it would say nothing.

    Args:
        q_length, q_offset: number of queries, position of the first.
        kv_length, kv_offset: number of the cache's slots that the layers get, position of the first.
        mask_function: what a query sees, a function of transformers.masking_utils.
        attention_mask: (batch, seqlen) bool, False for padding; None is no padding.

    Raises:
        NotImplementedError: the mask function is another than causal, sliding window, bidirectional, packed, or chunked
            with all keys in one chunk.
    """
    pattern = _pattern(mask_function, kv_offset + kv_length)
    num_keys = int(q_offset) + q_length - kv_offset  # up to the last query's
    if pattern.right > 0 and num_keys != kv_length:
        if pattern.left < UNLIMITED or pattern.right < UNLIMITED:
            raise NotImplementedError(
                "mask_function: a window to the right is served where the last query has the last key"
            )
        num_keys = kv_length

    if pattern.sequence_ids is not None:
        tokens = pattern.sequence_ids + 1
    elif attention_mask is None:
        tokens = torch.ones(batch_size, num_keys, dtype=torch.int64, device=device)
    else:
        # generate() may hand in a mask that was made here before, and so begins at kv_offset.
        start = 0 if isinstance(attention_mask, TokenMask) else kv_offset
        tokens = attention_mask.as_subclass(torch.Tensor)[:, start : start + num_keys].to(torch.int64)
        tokens = pad(tokens, (0, num_keys - tokens.shape[1]))
    window = tuple(-1 if side == UNLIMITED else side for side in (pattern.left, pattern.right))
    mask = TokenMask.make(tokens, window, q_length)
    bites = pattern.left < num_keys - 1 or 0 < pattern.right < num_keys - 1 or num_keys < kv_length
    return mask if mask.packing is not None or bites else None


class Pattern(NamedTuple):
    """Keys that a query sees to the left and right of its own position; if packed, the sequence of each token."""

    left: float = UNLIMITED
    right: float = UNLIMITED
    sequence_ids: torch.Tensor | None = None


def _pattern(mask_function, end):
    """The pattern of a mask function over positions below `end`.

    Mask functions are opaque to their callers, but those of transformers are known by name and by what they enclose.
    """
    known = inspect.isfunction(mask_function) and mask_function.__module__ == masking_utils.__name__
    name = mask_function.__qualname__.split(".")[0] if known else None
    enclosed = inspect.getclosurevars(mask_function).nonlocals if known else {}
    match name:
        case "causal_mask_function":
            return Pattern(right=0)
        case "bidirectional_mask_function":
            return Pattern()
        case "sliding_window_overlay":
            return Pattern(left=enclosed["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay":
            return Pattern(enclosed["sliding_window"], enclosed["sliding_window"])
        case "chunked_overlay" if end <= enclosed["chunk_size"]:
            return Pattern()
        case "packed_sequence_mask_function":
            return Pattern(sequence_ids=enclosed["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            # Positions grow by one from token to token of a sequence, so that distances are the same.
            return _pattern(enclosed["mask_function"], end)
        case "and_masks":
            parts = [_pattern(part, end) for part in enclosed["mask_functions"]]
            sequence_ids = next((part.sequence_ids for part in parts if part.sequence_ids is not None), None)
            return Pattern(min(part.left for part in parts), min(part.right for part in parts), sequence_ids)
    raise NotImplementedError(
        "mask_function: expected a causal, sliding window, bidirectional or packed mask, or chunks of which one holds "
        f"all keys, got {getattr(mask_function, '__qualname__', mask_function)}"
    )
