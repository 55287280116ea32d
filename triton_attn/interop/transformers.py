"""Our kernels in Hugging Face transformers, version 5:

    from triton_attn.interop.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="triton_attn")

Supported: causal, sliding window and bidirectional masks, grouped query heads, softcap, sinks, dropout, gradients,
padding on either side, packed sequences, dynamic and static caches. Padding is removed before the kernel, which spends
no time on it. Unsupported arguments raise NotImplementedError. So does a model that reads the mask itself.

A model calls `token_mask` for its masks once per forward pass, and every layer passes one of them to `attention`. The
mask alone says what queries see. It is never guessed from the layer.

A decode step has one query per row and runs `paged_attention` over the cache, without a device-to-host sync. If rows
have padding, every key is a page of its own, and the kernel reads keys in place.

torch.compile(fullgraph=True) compiles a model to one graph, also in generate() with a static cache. The graph computes
the positions of padding and sequences. A prompt takes one device-to-host sync per mask for this, a decode step none.

Continuous batching accepts only names that contain "flash". The kernels have a second name for it:

    model.set_attn_implementation(register_for_generate_batch())
    outputs = model.generate_batch(prompts)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PretrainedConfig, __version__

from ..flash import flash_attention
from . import flash_attn
from .mask_functions import UNLIMITED, pattern_of
from .packing import Keys, Packing, attend_one, attend_packed, pack
from .support import Support

SUPPORT = Support(
    functions=("register", "register_for_generate_batch", "attention", "token_mask"),
    on_cpu="all, by the references or in the interpreter",
    refused={
        "attention_mask": "a 4-D mask, or an additive bias",
        "output_attentions": "True",
        "position_bias": "a tensor",
        "indices": "a tensor, for sparse attention",
        "mask_function": "other than a window within the query's sequence",
        "block_table": "a tensor without k_cache and v_cache, or with dropout",
    },
)


def register(name: str = "triton_attn") -> None:
    """Make `attn_implementation=name` known to transformers: the attention and its mask.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from triton_attn.interop.transformers import register
        >>> register()
        >>> sizes = dict(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="triton_attn")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 32])
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, token_mask)


FIRST_BATCHING = (5, 24)  # before, the attention itself had to update the cache of continuous batching
batching_names: set[str] = set()


def register_for_generate_batch(name: str = "triton_attn_flash_2") -> str:
    """`register(name)` for continuous batching too: `model.set_attn_implementation(name)`, `model.generate_batch(...)`.

    Continuous batching accepts a name that contains "flash". On a GPU it decodes over block tables if the name has a 2
    or a 3 after that. transformers loads the functions behind such a name by load_and_register_attn_kernel of its
    integrations.hub_kernels. This function is replaced by one that returns `triton_attn.interop.flash_attn` for `name`
    and calls the replaced function for any other. `generate` and the forward pass are the same as under `register`.

    Returns:
        name.

    Raises:
        ImportError: transformers is older than 5.24, or has no such function.
        ValueError: continuous batching would refuse the name, or decode without block tables.

    Example:
        >>> from triton_attn.interop.transformers import register_for_generate_batch
        >>> register_for_generate_batch()
        'triton_attn_flash_2'
    """
    if tuple(map(int, __version__.split(".")[:2])) < FIRST_BATCHING:
        raise ImportError(f"transformers: expected 5.24 or later for continuous batching, got {__version__}")
    from transformers.integrations import hub_kernels

    if re.fullmatch(r"[^/:|]*flash[^/:|]*[23][^/:|]*", name) is None:
        raise ValueError(f'name: expected "flash" with a 2 or a 3 after it, and none of "/:|", got {name!r}')
    register(name)
    if name not in batching_names:
        load = hub_kernels.load_and_register_attn_kernel

        @functools.wraps(load)
        def load_ours(attn_implementation, *args, **kwargs):
            return flash_attn if attn_implementation == name else load(attn_implementation, *args, **kwargs)

        hub_kernels.load_and_register_attn_kernel = load_ours
        batching_names.add(name)
    return name


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    deterministic: bool | None = None,
    position_ids: Tensor | None = None,
    block_table: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it.

    Args:
        module: the layer, used only for its name in errors.
        query: (batch, num_heads_q, seqlen_q, head_dim). key, value: (batch, num_heads_kv, seqlen_k, head_dim and
            head_dim_v). In a static cache, slots after the last query's position may contain anything.
        attention_mask: the result of `token_mask`, or None, which means every key.
        dropout, scaling, softcap: share of the weights dropped, factor on q . k, bound of the scores.
        sliding_window, is_causal: for a layer without a mask: the keys that a query sees on each side, including its
            own, and whether it sees none after its own. A mask has a window of its own.
        s_aux: (num_heads_q,), one more logit per head in the sum of the softmax.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: offsets and longest lengths of sequences that are
            packed into the rows of the batch. Padding beside them is refused, and a padding mask in a traced call.
        deterministic: gradients repeat bitwise.
        position_ids: (1 or batch, seqlen_q). If the mask has no padding and no packing, a sequence begins wherever the
            smallest position of the row occurs again.
        block_table, k_cache, v_cache: the pages of each sequence (num_sequences, max_pages), -1 for none, and the
            cache (num_pages, page_size, num_heads_kv, head_dim). Continuous batching gives them when each sequence
            has one query. query, key and value are then (1, heads, num_sequences, head_dim), and the new key is
            written in the cache first. cu_seq_lens_k are the offsets with the new keys included.

    Returns:
        (batch, seqlen_q, num_heads_q, head_dim_v), with 0 for causal or windowed queries that are padding; and None for
        the weights, which are never in memory.

    Raises:
        NotImplementedError: the call requests attention weights, a 4-D mask, an additive bias or sparse indices; or
            dropout with a block table, or a block table without a cache.

    Example:
        >>> from triton_attn.interop.transformers import attention
        >>> q, (k, v) = torch.randn(1, 8, 16, 64), torch.randn(2, 1, 2, 16, 64)  # (batch, heads, seqlen, head_dim)
        >>> attention(torch.nn.Module(), q, k, v, None, is_causal=True)[0].shape
        torch.Size([1, 16, 8, 64])
    """
    _refuse(module, {name: kwargs.get(name) for name in UNSUPPORTED})
    if not (attention_mask is None or isinstance(attention_mask, TokenMask)):
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise NotImplementedError(
            "attention_mask: triton_attn takes the padding mask (batch, seqlen) that the model makes its mask from, "
            f"got {shape} in {type(module).__name__}; {INSTEAD}"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if block_table is not None:
        if k_cache is None or v_cache is None or cu_seq_lens_k is None or dropout > 0:
            raise NotImplementedError(
                "block_table: expected k_cache, v_cache, cu_seq_lens_k and no dropout beside it in "
                f"{type(module).__name__}; {INSTEAD}"
            )
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (num_sequences, 1, heads, head_dim)
        out = flash_attn.flash_attn_with_kvcache(
            *(q, k_cache, v_cache, k, v),
            cache_seqlens=cu_seq_lens_k[: len(q) + 1].diff().int() - 1,  # -1 for padding, which is written nowhere
            block_table=block_table,
            softmax_scale=scaling,
            causal=True,
            window_size=_window_without_mask(True, sliding_window),
            softcap=softcap or 0.0,
            s_aux=s_aux,
        )
        return out.transpose(0, 1), None
    options = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.float(),
    }
    packing = None
    if attention_mask is None:
        window = _window_without_mask(is_causal, sliding_window)
    else:
        attention_mask.check_lengths(q.shape[1], k.shape[1])
        keys, window = attention_mask.keys, attention_mask.window
        if keys is not None and cu_seq_lens_q is None and _is_decode(q, k, v, s_aux, dropout):
            return attend_one(q, k, v, keys, window, options), None
        attention_mask = attention_mask.at_known_position()
        if attention_mask.num_keys < k.shape[1]:
            k, v = (x[:, : attention_mask.num_keys] for x in (k, v))
    if cu_seq_lens_q is not None:
        if attention_mask is not None and attention_mask.has_padding():
            raise ValueError("cu_seq_lens_q: expected no padding mask beside packed sequences")
        packing = Packing.from_bounds(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    elif attention_mask is not None:
        packing = attention_mask.packing_with(position_ids)

    options |= {"window_size": window, "dropout_p": dropout, "deterministic": bool(deterministic)}
    out = flash_attention(q, k, v, **options) if packing is None else attend_packed(q, k, v, packing, options)
    return out.contiguous(), None


# Arguments of layers that change the result, or request more than it.
UNSUPPORTED = ("position_bias", "head_mask", "output_attentions", "indices", "block_indices")


INSTEAD = "use attn_implementation='eager', or 'sdpa' where the model has it"


def _refuse(module, arguments):
    for name, value in arguments.items():
        if value is not None and value is not False:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise NotImplementedError(
                f"{name}: not supported by triton_attn's attention, got {got} in {type(module).__name__}; {INSTEAD}"
            )


def _is_decode(q, k, v, sinks, dropout):
    """Whether `paged_attention` computes the call: it neither trains nor casts."""
    device = q.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if casts or dropout > 0 or not q.dtype == k.dtype == v.dtype:
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)))


def _window_without_mask(is_causal, sliding_window):
    side = -1 if sliding_window is None else sliding_window - 1
    return (side, 0 if is_causal else side)


class TokenMask(torch.Tensor):
    """The keys that queries see, from an integer per token. It is a tensor with the shape of transformers' own masks,
    (batch, 1, seqlen_q, num_slots), but without values. Reading them raises NotImplementedError.

    Attributes:
        window: (left, right) around each query's own position, -1 unlimited.
        seqlen_q, num_keys, num_slots: the queries are at the last of the keys. Later slots of the cache may contain
            anything.
        first_query: its position among the keys: an int, or a tensor of one if the cache is static. None if the
            queries are not among the keys; all of them count then.
        is_padded: an attention mask was given.
        is_whole: every row is one sequence without padding. Tokens then only say which slots are written.
        keys: the keys of each row's query, if it is one. None otherwise.
        tokens: (batch, num_keys), 0 for padding, n for a token of the n-th sequence of its row. None if every row is
            one sequence without padding. Layers share the mask, and with it the packing computed from the tokens.
            A static cache at a position in a tensor: num_keys is num_slots, and slots that are not written are 0.
        config: the model's, for its name in errors.
    """

    @classmethod
    def make(cls, sizes, device, window, tokens, num_keys, first_query, config=None):
        mask = torch.empty((), dtype=torch.bool, device=device).expand(sizes).as_subclass(cls)
        mask.window, mask.tokens, mask.first_query, mask.config = window, tokens, first_query, config
        mask.seqlen_q, mask.num_keys, mask.num_slots = sizes[2], num_keys, sizes[3]
        mask.is_padded, mask.is_whole, mask.keys, mask.known = False, False, None, None
        mask.is_packed, mask.packing_of_tokens, mask.positions, mask.packing_of_positions = False, None, None, None
        return mask

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in READS_NO_VALUES or _torch_describes_an_input():
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        mask = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
        raise NotImplementedError(
            f"{_model_of(mask.config)} reads its attention mask by itself ({getattr(function, '__name__', function)}), "
            f"but triton_attn's mask has no values, only its attention knows it; {INSTEAD}"
        )

    def to(self, *args: Any, **kwargs: Any) -> TokenMask:
        """Move to another device. A dtype has no effect."""
        device = torch.empty((), device=self.device).to(*args, **kwargs).device
        tokens = None if self.tokens is None else self.tokens.to(device)
        mask = self.make(self.shape, device, self.window, tokens, self.num_keys, self.first_query, self.config)
        mask.is_padded, mask.is_whole = self.is_padded, self.is_whole
        if self.keys is not None:
            mask.keys = Keys(*(None if x is None else x.to(device) for x in self.keys))
        return mask

    def contiguous(self, **kwargs: Any) -> TokenMask:
        """Called by generate()."""
        return self

    def __repr__(self):
        return f"TokenMask({tuple(self.shape)}, window={self.window}, num_keys={self.num_keys}, tokens={self.tokens})"

    def check_lengths(self, seqlen_q: int, num_slots: int) -> None:
        if (seqlen_q, num_slots) != (self.seqlen_q, self.num_slots):
            raise NotImplementedError(
                f"attention_mask: expected a mask for the layer's {seqlen_q} queries and {num_slots} keys, got one for "
                f"{self.seqlen_q} and {self.num_slots}"
            )

    def at_known_position(self) -> TokenMask:
        """The mask whose first_query is an int, which costs a device-to-host sync per mask. Itself in a traced call."""
        if not isinstance(self.first_query, torch.Tensor) or torch.compiler.is_compiling():
            return self
        if self.known is None:
            first = int(self.first_query)
            num_keys = first + self.seqlen_q
            tokens = None if self.is_whole else self.tokens[:, :num_keys]
            self.known = self.make(self.shape, self.device, self.window, tokens, num_keys, first, self.config)
            self.known.is_padded = self.is_padded
        return self.known

    def keys_of_one_query(self) -> Keys:
        """The keys that the only query of each row sees."""
        first, left, device = self.first_query, self.window[0], self.device
        if self.is_whole:
            num_keys = first + 1 if isinstance(first, torch.Tensor) else self.num_keys
            return Keys((torch.zeros(self.shape[0], dtype=torch.int32, device=device) + num_keys).to(torch.int32), None)
        own = self._queries(self.tokens)
        seen = self.tokens > 0 if own is None else (self.tokens == own) & (own > 0)
        if left >= 0:  # cut here: between keys that padding separates the window would be too wide
            seen &= torch.arange(self.num_keys, device=device) >= first - left
        return Keys.of(seen)

    def has_padding(self) -> bool:
        if torch.compiler.is_compiling():
            return self.is_padded  # unknown
        packing = self.packing()
        return packing is not None and packing.rows_k is not None

    def packing(self) -> Packing | None:
        """None if every row is one sequence without padding."""
        if self.tokens is not None and not self.is_packed:
            self.is_packed, self.packing_of_tokens = True, self._pack(self.tokens)
        return self.packing_of_tokens

    def _pack(self, tokens):
        first, left = self.first_query, self.window[0]
        if self.seqlen_q == 1 and left >= 0 and torch.compiler.is_compiling():
            # The window can be cut out for a single query, so padding inside it is allowed.
            tokens = tokens * (torch.arange(self.num_keys, device=tokens.device) >= first - left)
        return pack(tokens, self._queries(tokens), self.seqlen_q, self.window)

    def _queries(self, tokens):
        first = self.first_query
        if first is None:
            return None
        if isinstance(first, torch.Tensor):
            return tokens.index_select(1, first + torch.arange(self.seqlen_q, device=tokens.device))
        return tokens[:, first : first + self.seqlen_q]

    def packing_with(self, position_ids: Tensor | None) -> Packing | None:
        """The packing if the model passes positions to its layers and not to `token_mask`."""
        traced = torch.compiler.is_compiling()
        is_whole = self.seqlen_q > 1 and (self.seqlen_q == self.num_keys or isinstance(self.first_query, torch.Tensor))
        tells = position_ids is not None and is_whole and position_ids.shape[1:] == (self.seqlen_q,)
        if not tells or (not traced and self.packing() is not None):
            return self.packing()
        if self.positions is not position_ids:
            starts = position_ids == position_ids.amin(1, keepdim=True)
            queries = starts.cumsum(1).expand(self.shape[0], -1)
            tokens = pad(queries, (0, self.num_keys - self.seqlen_q))
            if traced and self.tokens is not None:
                first = 0 if self.first_query is None else self.first_query
                says_nothing = (self.tokens[:, : self.seqlen_q] == 1).all() & (first == 0)
                given = self._queries(self.tokens)
                queries = torch.where(says_nothing, queries, torch.ones_like(queries) if given is None else given)
                tokens = torch.where(says_nothing, tokens, self.tokens)
            self.positions = position_ids
            self.packing_of_positions = pack(tokens, queries, self.seqlen_q, self.window)
        return self.packing_of_positions


def _torch_describes_an_input():
    """Whether torch.compile, and not the model that it traces, calls a function of a mask: the mask was made outside of
    the graph, as generate() makes it.
    """
    return not torch.compiler.is_dynamo_compiling() and TracingContext.try_get() is not None


READS_NO_VALUES = {
    torch.Tensor.dim,
    torch.Tensor.size,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "device", "dtype", "requires_grad")),
}


def _model_of(config):
    """The class name of the model, as far as its configuration has it."""
    return MODEL_MAPPING.get(type(config), type(config)).__name__


def token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None,
    device: torch.device | str,
    config: PretrainedConfig | None = None,
    **kwargs: object,
) -> TokenMask:
    """The mask of all layers of one kind, in the interface of transformers. Always a `TokenMask`.

    Args:
        q_length, q_offset: number of queries, position of the first, an int or a tensor of one.
        kv_length, kv_offset: number of cache slots that the layers get, position of the first.
        mask_function: a mask function of transformers.masking_utils.
        attention_mask: (batch, seqlen) bool, False for padding; None is no padding.
        config: the model's, for its name in errors.

    Raises:
        NotImplementedError: the mask function is not a window around the query within the query's sequence.

    Example:
        >>> from triton_attn.interop.transformers import token_mask
        >>> from transformers.masking_utils import causal_mask_function
        >>> padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
        >>> token_mask(2, 3, 3, 0, 0, causal_mask_function, padding, device="cpu").shape
        torch.Size([2, 1, 3, 3])
    """
    try:
        pattern = pattern_of(mask_function, kv_offset + kv_length)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}, for {_model_of(config)}; {INSTEAD}") from None
    is_unlimited = pattern.left == pattern.right == UNLIMITED
    if isinstance(q_offset, torch.Tensor) and pattern.right > 0 and not torch.compiler.is_compiling():
        q_offset = int(q_offset)
    first_query = q_offset - kv_offset
    num_keys = kv_length if isinstance(first_query, torch.Tensor) else first_query + q_length  # up to the last query
    if pattern.right > 0 and (isinstance(first_query, torch.Tensor) or num_keys != kv_length):
        if not is_unlimited:
            raise NotImplementedError(
                "mask_function: expected no window to the right unless the last query is at the last key"
            )
        num_keys = kv_length

    tokens = None
    if attention_mask is not None:
        tokens = attention_mask[:, kv_offset : kv_offset + num_keys].to(torch.int64)
        tokens = pad(tokens, (0, num_keys - tokens.shape[1]))
    if pattern.shows_nothing:
        tokens = torch.zeros(batch_size, num_keys, dtype=torch.int64, device=device)
    if pattern.sequence_ids is not None:
        sequences = pattern.sequence_ids.to(torch.int64) + 1
        if sequences.shape != (batch_size, num_keys):
            raise NotImplementedError(
                f"mask_function: expected the sequence of each token ({batch_size}, {num_keys}), got "
                f"{tuple(sequences.shape)}"
            )
        tokens = sequences if tokens is None else sequences * tokens
    is_whole = tokens is None
    if isinstance(first_query, torch.Tensor) and pattern.right == 0:
        is_written = torch.arange(num_keys, device=device) < first_query + q_length
        tokens = is_written.expand(batch_size, -1).long() if tokens is None else is_written * tokens
    if is_unlimited and pattern.sequence_ids is None:
        first_query = None
    window = tuple(-1 if side == UNLIMITED else side for side in (pattern.left, pattern.right))
    sizes = (batch_size, 1, q_length, kv_length)
    mask = TokenMask.make(sizes, device, window, tokens, num_keys, first_query, config)
    mask.is_padded, mask.is_whole = attention_mask is not None, is_whole
    if q_length == 1:
        mask.keys = mask.keys_of_one_query()
    return mask
