"""Our kernels in Hugging Face transformers, version 5:

    from triton_attn.interop.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="triton_attn")

Served: causal, sliding window and bidirectional masks, grouped query heads, softcap, sinks, dropout, gradients, padding
on either side, packed sequences, dynamic and static caches. Padding is cut out before the kernel, which spends no time
on it. Arguments that are not served raise NotImplementedError; so does a model that reads the mask by itself.

A model asks `token_mask` for its masks once in a forward pass, and every layer hands one of them to `attention`. What
queries see stands in that mask alone: it is never guessed from the layer.
"""

import inspect
import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, masking_utils

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
    position_ids=None,
    **kwargs,
):
    """The attention of one layer, as transformers calls it.

    Args:
        module: the layer, which errors name; nothing else of it is read.
        query: (batch, num_heads_q, seqlen_q, head_dim). key, value: (batch, num_heads_kv, seqlen_k, head_dim and
            head_dim_v); of a static cache, slots after the last query's may hold anything.
        attention_mask: what `token_mask` made, or None: every key.
        dropout, scaling, softcap: share of the weights dropped, factor on q . k, bound of the scores.
        sliding_window, is_causal: of a layer without a mask: keys that a query sees on each side, its own included, and
            whether none after its own. A mask knows its own window.
        s_aux: (num_heads_q,), one more logit per head in the softmax's sum.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: bounds and longest lengths of sequences that are
            packed into the rows of the batch.
        deterministic: gradients are the same to the bit from run to run.
        position_ids: (1 or batch, seqlen_q); where the mask says nothing of padding or packing, a sequence begins
            wherever its row's least position stands again.

    Returns:
        (batch, seqlen_q, num_heads_q, head_dim_v), 0 where a causal or windowed query is padding; and None for the
        weights, which are nowhere in memory.

    Raises:
        NotImplementedError: attention weights are asked for, a 4-D mask, an additive bias, sparse indices.
    """
    _refuse(module, {name: kwargs.get(name) for name in NOT_SERVED})
    if not (attention_mask is None or isinstance(attention_mask, TokenMask)):
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise NotImplementedError(
            "attention_mask: triton_attn takes the padding mask (batch, seqlen) that the model makes its mask from, "
            f"got {shape} in {type(module).__name__}; {INSTEAD}"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None:
        window, packing = _window_without_mask(is_causal, sliding_window), None
    else:
        attention_mask.check_lengths(q.shape[1], k.shape[1])
        window, packing = attention_mask.window, None
        if attention_mask.num_keys < k.shape[1]:
            k, v = (x[:, : attention_mask.num_keys] for x in (k, v))
    if cu_seq_lens_q is not None:
        if attention_mask is not None and attention_mask.has_padding:
            raise ValueError("cu_seq_lens_q: expected no padding mask beside packed sequences")
        packing = Packing.from_bounds(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    elif attention_mask is not None:
        packing = attention_mask.packing_with(position_ids)

    options = {
        "softmax_scale": scaling,
        "window_size": window,
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.float(),
        "dropout_p": dropout,
        "deterministic": bool(deterministic),
    }
    out = flash_attention(q, k, v, **options) if packing is None else _attend_packed(q, k, v, packing, options)
    return out.contiguous(), None


# Arguments of layers that change the result or ask for more than it.
NOT_SERVED = ("position_bias", "head_mask", "output_attentions", "indices", "block_indices", "block_table")


INSTEAD = "use attn_implementation='eager', or 'sdpa' where the model has it"


def _refuse(module, arguments):
    for name, value in arguments.items():
        if value is not None and value is not False:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise NotImplementedError(
                f"{name}: not served by triton_attn's attention, got {got} in {type(module).__name__}; {INSTEAD}"
            )


def _window_without_mask(is_causal, sliding_window):
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
    """Which keys the queries see, in a word for each token: a tensor of the shape of transformers' own masks,
    (batch, 1, seqlen_q, num_slots), but without values. Whoever reads them gets NotImplementedError.

    Attributes:
        window: (left, right) around each query's own position, -1 unlimited.
        seqlen_q, num_keys, num_slots: the queries are the last of the keys; the cache's slots after those may hold
            anything.
        tokens: (batch, num_keys), 0 for padding, n for a token of the n-th sequence of its row; None where every row is
            one sequence without padding. Layers share the mask, and so what it tells about them.
        config: of the model, for its name in errors.
    """

    @classmethod
    def make(cls, sizes, device, window, tokens, num_keys, config=None):
        mask = torch.empty((), dtype=torch.bool, device=device).expand(sizes).as_subclass(cls)
        mask.window, mask.tokens, mask.config = window, tokens, config
        mask.seqlen_q, mask.num_keys, mask.num_slots = sizes[2], num_keys, sizes[3]
        return mask

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in READS_NO_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        mask = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
        raise NotImplementedError(
            f"{_model_of(mask.config)} reads its attention mask by itself ({getattr(function, '__name__', function)}), "
            f"but triton_attn's mask has no values, only its attention knows it; {INSTEAD}"
        )

    def to(self, *args, **kwargs):
        """On another device. A dtype says nothing here."""
        device = torch.empty((), device=self.device).to(*args, **kwargs).device
        tokens = None if self.tokens is None else self.tokens.to(device)
        return self.make(self.shape, device, self.window, tokens, self.num_keys, self.config)

    def contiguous(self, **kwargs):
        """Asked for by generate()."""
        return self

    def __repr__(self):
        return f"TokenMask({tuple(self.shape)}, window={self.window}, num_keys={self.num_keys}, tokens={self.tokens})"

    def check_lengths(self, seqlen_q, num_slots):
        if (seqlen_q, num_slots) != (self.seqlen_q, self.num_slots):
            raise NotImplementedError(
                f"attention_mask: expected a mask for the layer's {seqlen_q} queries and {num_slots} keys, got one for "
                f"{self.seqlen_q} and {self.num_slots}"
            )

    @property
    def has_padding(self):
        return self.packing is not None and self.packing.rows_k is not None

    @cached_property
    def packing(self):
        """None where every row is one sequence without padding."""
        return None if self.tokens is None else _packing_of(self.tokens, self.window, self.seqlen_q)

    def packing_with(self, position_ids):
        """The packing where the model did not tell `token_mask` its positions, but tells its layers."""
        is_whole = 1 < self.seqlen_q == self.num_keys
        tells = position_ids is not None and is_whole and position_ids.shape[1:] == (self.seqlen_q,)
        if self.packing is not None or not tells:
            return self.packing
        if self.positions is not position_ids:
            starts = position_ids == position_ids.amin(1, keepdim=True)
            tokens = starts.cumsum(1).expand(self.shape[0], -1)
            self.positions, self.packing_of_positions = position_ids, _packing_of(tokens, self.window, self.seqlen_q)
        return self.packing_of_positions

    positions = None


READS_NO_VALUES = {
    torch.Tensor.dim,
    torch.Tensor.size,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "device", "dtype", "requires_grad")),
}


def _model_of(config):
    """The class of the model, as far as its configuration tells it."""
    return MODEL_MAPPING.get(type(config), type(config)).__name__


def _packing_of(tokens, window, seqlen_q):
    """The packing of tokens (batch, num_keys) as `TokenMask` has them; None for whole rows."""
    batch, num_keys = tokens.shape
    if tokens.numel() == 0:
        return None
    real = tokens > 0
    all_real = bool(real.all())
    num_sequences = max(1, int(tokens.max()))
    if all_real and num_sequences == 1:
        return None
    if window[0] >= 0 and _has_holes(real):
        raise NotImplementedError("attention_mask: padding between tokens is not served under a sliding window")

    sequence = tokens - 1 + num_sequences * torch.arange(batch, device=tokens.device)[:, None]

    def lengths(part):
        return torch.bincount(sequence[:, part][real[:, part]], minlength=batch * num_sequences)

    rows_k, lengths_k = None if all_real else real.nonzero(as_tuple=True), lengths(slice(None))
    if window == (-1, -1) and num_sequences == 1:
        # It may be the mask of cross-attention, which says nothing of the queries: they all count.
        rows_q, lengths_q = None, torch.full_like(lengths_k, seqlen_q)
    else:
        queries = slice(num_keys - seqlen_q, None)
        rows_q, lengths_q = None if all_real else real[:, queries].nonzero(as_tuple=True), lengths(queries)
    return Packing.from_lengths(rows_q, rows_k, lengths_q, lengths_k)


def _has_holes(real):
    """Whether a row has padding between its tokens: without it, they would come closer together."""
    runs = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    return bool((runs > 1).any())


def token_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset,
    kv_offset,
    mask_function,
    attention_mask,
    device,
    config=None,
    **kwargs,
):
    """The mask of all layers of a kind, as transformers asks for it: a `TokenMask`, always.

    Args:
        q_length, q_offset: number of queries, position of the first.
        kv_length, kv_offset: number of the cache's slots that the layers get, position of the first.
        mask_function: what a query sees, a function of transformers.masking_utils.
        attention_mask: (batch, seqlen) bool, False for padding; None is no padding.
        config: of the model, which errors name.

    Raises:
        NotImplementedError: the mask function is another than causal, sliding window, bidirectional, packed, or chunked
            with all keys in one chunk.
    """
    try:
        pattern = _pattern(mask_function, kv_offset + kv_length)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}, for {_model_of(config)}; {INSTEAD}") from None
    num_keys = int(q_offset) + q_length - kv_offset  # up to the last query's
    if pattern.right > 0 and num_keys != kv_length:
        if pattern.left < UNLIMITED or pattern.right < UNLIMITED:
            raise NotImplementedError(
                "mask_function: a window to the right is served where the last query has the last key"
            )
        num_keys = kv_length

    tokens = None
    if attention_mask is not None:
        tokens = attention_mask[:, kv_offset : kv_offset + num_keys].to(torch.int64)
        tokens = pad(tokens, (0, num_keys - tokens.shape[1]))
    if pattern.sequence_ids is not None:
        sequences = pattern.sequence_ids.to(torch.int64) + 1
        tokens = sequences if tokens is None else sequences * tokens
    window = tuple(-1 if side == UNLIMITED else side for side in (pattern.left, pattern.right))
    return TokenMask.make((batch_size, 1, q_length, kv_length), device, window, tokens, num_keys, config)


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
        "mask_function: triton_attn serves causal, sliding window, bidirectional and packed masks, and chunks of which "
        f"one holds all keys, got {getattr(mask_function, '__qualname__', mask_function)}"
    )
