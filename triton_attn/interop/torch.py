"""Our kernels behind torch's own attention: its flash back end, through its registry, and scaled_dot_product_attention.

    import torch.nn.attention
    from triton_attn.interop.torch import register

    register()
    torch.nn.attention.activate_flash_attention_impl("triton_attn")

From then on torch's flash operators run our kernels. So does everything that calls these operators:
F.scaled_dot_product_attention where torch chooses its flash back end, torch.nn.attention.varlen, causal_lower_right,
context parallelism (ring attention). torch.nn.attention.restore_flash_attention_impl() restores torch's kernels.
Forward and backward run on every GPU from compute capability 8.0, and on ROCm, whose dispatch key is CUDA too.

As in torch, causal masks of the operators are aligned to the bottom right, and those of scaled_dot_product_attention to
the top left. One argument is ignored: num_splits without pages, where keys are never split. What is not supported
raises. The signatures are those of torch 2.13.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.attention
from torch import Tensor
from torch.library import Library
from torch.nn.attention.bias import CausalBias, CausalVariant

from ..flash import backward_pass, flash_attention, forward_pass
from ..paged import paged_attention
from .support import Support

SUPPORT = Support(
    functions=("register", "override", "scaled_dot_product_attention", "route_sdpa"),
    on_cpu='the operators with dispatch_key="CPU", by the references or in the interpreter',
    refused={
        "attn_mask": "a tensor, boolean or additive (a CausalBias is supported)",
        "return_debug_mask": "True",
        "q_descale, k_descale, v_descale": "a tensor, for fp8 queries",
        "dropout_p": "above 0 with seqused_k or block_table",
        "seqused_k, block_table, alibi_slopes": "a tensor where gradients are wanted",
        "query": "a nested tensor, or fp64",
    },
)


def register(name: str = "triton_attn", dispatch_key: str = "CUDA") -> None:
    """Make `torch.nn.attention.activate_flash_attention_impl(name)` call `override(dispatch_key)`.

    Raises: as `override`; RuntimeError where torch has no registry of flash attention implementations.

    Example:
        >>> from triton_attn.interop.torch import register
        >>> register("triton_attn", dispatch_key="CPU")
        >>> torch.nn.attention.activate_flash_attention_impl("triton_attn")
        >>> torch.nn.attention.current_flash_attention_impl()
        'triton_attn'
        >>> torch.nn.attention.restore_flash_attention_impl()
    """
    _check_dispatch_key(dispatch_key)
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(
            "torch: expected a version with torch.nn.attention.register_flash_attention_impl, "
            f"got {torch.__version__}; scaled_dot_product_attention and route_sdpa need none"
        )
    register_fn = functools.partial(override, dispatch_key)
    torch.nn.attention.register_flash_attention_impl(name, register_fn=register_fn)


class Override:
    """Torch's flash operators run our kernels until `remove()`.

    Example:
        >>> from triton_attn.interop.torch import override
        >>> override("CPU").remove()
    """

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        """Restore torch's operators. A second call does nothing."""
        self._library = None


def override(dispatch_key: str = "CUDA") -> Override:
    """Put our kernels behind torch's flash operators on one device type, for as long as the result lives.

    The operators: _flash_attention_forward, its in-place form, _flash_attention_backward,
    _scaled_dot_product_flash_attention, its backward, and the quantized forms.

    Args:
        dispatch_key: "CUDA" for GPUs of NVIDIA and AMD. "CPU" is for tests: torch has no such operators there. Callers
            that name an operator reach it, but torch's scaled_dot_product_attention does not choose it on a CPU.

    Raises:
        ValueError: dispatch_key is another one.

    The newest of several overrides is in force. When it ends, the one before it is again.

    Example:
        >>> from triton_attn.interop.torch import override
        >>> ours = override("CPU")
        >>> q = torch.randn(1, 2, 16, 64)  # (batch, heads, seqlen, head_dim)
        >>> torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)[0].shape
        torch.Size([1, 2, 16, 64])
        >>> ours.remove()
    """
    _check_dispatch_key(dispatch_key)
    library = Library("aten", "IMPL")
    for name, function in _OPERATORS.items():
        packet, _, overload = name.partition(".")
        if (overload or "default") in getattr(getattr(torch.ops.aten, packet, None), "overloads", list)():
            library.impl(name, function, dispatch_key)
    return Override(library)


def _check_dispatch_key(dispatch_key):
    if dispatch_key not in ("CUDA", "CPU"):
        raise ValueError(f"dispatch_key: expected 'CUDA' (ROCm too) or 'CPU', got {dispatch_key!r}")


def _forward_into(
    out,
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
    block_table=None,
    num_splits=None,
):
    """(lse, what the operators return behind it), the output in `out`."""
    window = _window(window_size_left, window_size_right)
    options = dict(causal=is_causal, softmax_scale=scale, window_size=window, alibi_slopes=alibi_slopes)
    if seqused_k is not None or alibi_slopes is not None or block_table is not None:
        inputs = query, key, value
        _refuse_gradients(inputs, alibi_slopes=alibi_slopes, seqused_k=seqused_k, block_table=block_table)
    if seqused_k is None and block_table is None:
        lengths = cum_seq_q, cum_seq_k, max_q, max_k
        return _attend_into(out, query, key, value, lengths, dropout_p, return_debug_mask, **options)
    _refuse_debug_mask(return_debug_mask)
    if dropout_p > 0:
        raise NotImplementedError(f"dropout_p: expected 0 with seqused_k or block_table, got {dropout_p}")
    q, k, v = _with_contiguous_rows(query, key, value)
    if seqused_k is None:
        if cum_seq_k is None:
            raise ValueError("seqused_k: expected a tensor with block_table, since cum_seq_k is None too")
        seqused_k = cum_seq_k.diff()
    elif block_table is None and cum_seq_k is not None:
        # Each row is a page of one key: sequence i has those from cum_seq_k[i] on.
        k, v = k.unsqueeze(1), v.unsqueeze(1)
        block_table = cum_seq_k[:-1, None] + torch.arange(max_k, dtype=torch.int32, device=k.device)
    options |= dict(cu_seqlens_q=cum_seq_q, max_seqlen_q=None if cum_seq_q is None else max_q)
    _, lse = paged_attention(
        q, k, v, seqused_k, block_table, **options, num_splits=num_splits or 0, out=out, return_lse=True
    )
    return lse, _unread_outputs(q.dtype, q.device)


def _attend_into(out, q, k, v, lengths, dropout_p, return_debug_mask, **options):
    """`_forward_into` of a dense or packed batch without pages."""
    _refuse_debug_mask(return_debug_mask)
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        q, k, v = _with_contiguous_rows(q, k, v)
    rest = _unread_outputs(q.dtype, q.device)
    if dropout_p > 0:
        rest = _drawn_like(rest[0]), *rest[1:]
        options |= dict(dropout_p=dropout_p, dropout_seed=_seed_of(rest[0]))
    return forward_pass(q, k, v, lengths, out=out, **options), rest


def _flash_forward(query, key, value, *arguments, **options):
    """(batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cum_seq_q."""
    out = _new_out(query, value)
    lse, rest = _forward_into(out, query, key, value, *arguments, **options)
    return out, lse, *rest


def _flash_forward_quantized(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *rest, **options
):
    _refuse_quantized(query, rest)
    lengths = cum_seq_q, cum_seq_k, max_q, max_k
    return _flash_forward(query, key, value, *lengths, dropout_p, is_causal, return_debug_mask, **options)


def _flash_forward_inplace(*arguments, **options):
    return _forward_into(*arguments, **options)[0]


def _flash_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    q, k, v = _with_contiguous_rows(query, key, value)
    lengths = cum_seq_q, cum_seq_k, max_q, max_k
    if cum_seq_q is None:
        lengths = None, None, query.shape[1], key.shape[1]  # of ring attention max_k is that of more keys
    return backward_pass(
        grad_out,
        None,
        out,
        logsumexp,
        q,
        k,
        v,
        lengths,
        causal=is_causal,
        softmax_scale=scale,
        window_size=_window(window_size_left, window_size_right),
        dropout_p=dropout_p,
        dropout_seed=_seed_of(rng_state) if dropout_p > 0 else None,
    )[:3]


def _sdpa_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """(batch, heads, seqlen, head_dim); causal to the bottom right, as torch's own operator."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = _new_out(q, v)
    lengths = None, None, q.shape[1], k.shape[1]
    lse, rest = _attend_into(out, q, k, v, lengths, dropout_p, return_debug_mask, causal=is_causal, softmax_scale=scale)
    return out.transpose(1, 2), lse, *lengths, *rest


def _sdpa_forward_quantized(
    query,
    key,
    value,
    q_descale,
    k_descale,
    v_descale,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    _refuse_quantized(query, (q_descale, k_descale, v_descale))
    return _sdpa_forward(query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)


def _sdpa_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    philox_seed,
    philox_offset,
    *,
    scale=None,
):
    dout, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    lengths, dropout = (None, None, max_q, max_k), (dropout_p, is_causal, philox_seed, philox_offset)
    gradients = _flash_backward(dout, q, k, v, o, logsumexp, *lengths, *dropout, scale=scale)
    return tuple(gradient.transpose(1, 2) for gradient in gradients)


# Those that torch's own FA3 and FA4 override.
_OPERATORS = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward.quantized": _flash_forward_quantized,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_inplace,
    "_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention.quantized": _sdpa_forward_quantized,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
}


def _new_out(query, value):
    """With query's strides, as torch's own, where it has query's shape."""
    if value.shape[-1] == query.shape[-1]:
        return torch.empty_like(query)
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _window(left, right):
    return (-1 if left is None else left, -1 if right is None else right)


def _with_contiguous_rows(*tensors):
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _refuse_debug_mask(return_debug_mask):
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask: expected False, got True; no matrix of weights is in memory")


def _refuse_quantized(query, scales):
    for name, scale in zip(("q_descale", "k_descale", "v_descale"), scales):
        if scale is not None:
            raise NotImplementedError(f"{name}: expected None, got a tensor of shape {tuple(scale.shape)}")


def _refuse_gradients(inputs, **options):
    """Autograd calls torch's backward operator, which does not take these options."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        name = next(name for name, value in options.items() if value is not None)
        raise NotImplementedError(f"{name}: expected None where gradients are wanted, got a tensor; use torch.no_grad")


# torch's operators return two words of the generator's state as rng_state. Ours are a seed, drawn from torch's
# generator, and an unused word. So the backward pass has the mask of the forward pass, and torch.utils.checkpoint draws
# the same mask.


@functools.cache
def _unread_outputs(dtype, device):
    """rng_state and its offset where nothing is dropped, and the matrix of weights: outputs that nobody reads, the same
    in all calls. Three allocations would take a seventh of a call's time.
    """
    if torch.version.hip:  # as the operators' meta functions say
        size, of_state = (), torch.int64
    else:
        size, of_state = (2,), torch.uint64
    with torch.inference_mode(False):  # autograd saves rng_state, and takes no tensor of inference mode
        new = functools.partial(torch.empty, device=device)
        return new(size, dtype=of_state), new((), dtype=of_state), new((0,), dtype=dtype)


def _drawn_like(rng_state):
    seed = torch.randint(-(2**63), 2**63 - 1, rng_state.shape, dtype=torch.int64, device=rng_state.device)
    return seed.view(rng_state.dtype)


def _seed_of(rng_state):
    return rng_state.view(torch.int64).view(-1)[:1]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: CausalBias | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, computed by `triton_attn.flash_attention` on every device.

    Args:
        query: (..., num_heads_q, seqlen_q, head_dim), or (seqlen_q, head_dim); fp16, bf16, fp32.
        key, value: (..., num_heads_kv, seqlen_k, head_dim and head_dim_v).
        attn_mask: None, or a CausalBias: torch.nn.attention.bias.causal_upper_left, causal_lower_right.
        dropout_p: the mask comes from torch's generator, so torch.utils.checkpoint replays it.
        is_causal: query i sees the keys 0 to i, aligned to the top left. flash_attention aligns to the bottom right.
        scale: None is head_dim ** -0.5; above 0.
        enable_gqa: num_heads_kv may be any divisor of num_heads_q. Otherwise they are equal.

    Returns: (..., num_heads_q, seqlen_q, head_dim_v), a transposed view of (batch, seqlen_q, num_heads_q, head_dim_v).
    Differentiable as `flash_attention`.

    Raises:
        NotImplementedError: attn_mask is a tensor, boolean or additive; an input is a nested tensor.
        TypeError, ValueError: as `flash_attention`; is_causal beside attn_mask.

    Example:
        >>> from triton_attn.interop.torch import scaled_dot_product_attention
        >>> q, (k, v) = torch.randn(1, 8, 16, 64), torch.randn(2, 1, 2, 16, 64)  # (batch, heads, seqlen, head_dim)
        >>> scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).shape
        torch.Size([1, 8, 16, 64])
    """
    if query.dim() != 4:
        return _sdpa_of_other_shape(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    is_lower_right = False
    if attn_mask is not None:
        is_lower_right = _check_mask(query, key, attn_mask, is_causal)
        is_causal = True
    if query.is_nested:
        raise NotImplementedError("query: expected a plain tensor, got a nested one; use flash_attention_varlen")
    if not enable_gqa and key.dim() == 4 and key.shape[1] != query.shape[1]:
        raise ValueError(f"key: expected query's {query.shape[1]} heads without enable_gqa, got {key.shape[1]}")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        q, k, v = _with_contiguous_rows(q, k, v)
    window = (-1, -1)
    if is_causal and not is_lower_right:
        missing = query.shape[2] - key.shape[2]
        if missing > 0:  # the last queries see all keys
            is_causal, window = False, (-1, missing)
        elif missing < 0:  # the last keys are seen by no query
            k, v = k[:, :missing], v[:, :missing]
    out = flash_attention(q, k, v, causal=is_causal, softmax_scale=scale, window_size=window, dropout_p=dropout_p)
    return out.transpose(1, 2)


def _check_mask(query, key, attn_mask, is_causal):
    """Whether a CausalBias is aligned to the lower right."""
    if not isinstance(attn_mask, CausalBias):
        got = f"a {attn_mask.dtype} tensor {tuple(attn_mask.shape)}" if isinstance(attn_mask, Tensor) else attn_mask
        raise NotImplementedError(
            "attn_mask: expected None or a torch.nn.attention.bias.CausalBias, got "
            f"{got}; is_causal, flash_attention's window_size and alibi_slopes and flash_attention_varlen need no mask"
        )
    if is_causal:
        raise ValueError("is_causal: expected False beside attn_mask, got True")
    lengths, own = (attn_mask.seq_len_q, attn_mask.seq_len_kv), (query.shape[-2], key.shape[-2])
    if lengths != own:
        raise ValueError(f"attn_mask: expected a CausalBias of {own} queries and keys, got {lengths}")
    return attn_mask.variant == CausalVariant.LOWER_RIGHT


def _sdpa_of_other_shape(query, key, value, *options):
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key, value: expected equally many dimensions, two or more, got {shapes}")
    if query.dim() < 4:
        q, k, v = (x.reshape(1, -1, *x.shape[-2:]) for x in (query, key, value))
    else:
        q, k, v = (x.flatten(0, -4) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, *options)
    return out.reshape(*query.shape[:-1], value.shape[-1])


_route_lock, _route_depth, _route_before = threading.Lock(), 0, None


@contextmanager
def route_sdpa() -> Iterator[None]:
    """A context in which torch.nn.functional.scaled_dot_product_attention is the function of the same name in this
    module.

    It holds for the whole process and not for one thread, because autograd recomputes checkpointed layers in its own
    threads. Run the backward pass of a checkpointed model within it, too. It can be nested, and entered by several
    threads: torch's function is restored when the last one leaves, also after an exception. Code that has imported
    torch's function under a name of its own is not affected. A call with a mask raises and does not fall back.

    Example:
        >>> from triton_attn.interop.torch import route_sdpa
        >>> q = torch.randn(1, 2, 16, 64)
        >>> with route_sdpa():
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    """
    global _route_depth, _route_before
    functional = torch.nn.functional
    with _route_lock:
        if _route_depth == 0:
            _route_before = functional.scaled_dot_product_attention
            functional.scaled_dot_product_attention = scaled_dot_product_attention
        _route_depth += 1
    try:
        yield
    finally:
        with _route_lock:
            _route_depth -= 1
            if _route_depth == 0:
                functional.scaled_dot_product_attention = _route_before
