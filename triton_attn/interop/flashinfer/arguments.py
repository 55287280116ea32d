"""FlashInfer's arguments, translated to those of our functions. Unsupported values are refused."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
CacheLike = Tensor | tuple[Tensor, Tensor]
DtypeLike = torch.dtype | str


def attention_options(pos_encoding_mode, window_left, logits_soft_cap, causal, num_heads, device):
    """Options of our functions but for the scale."""
    options: dict[str, Any] = dict(
        causal=bool(causal), window_size=(max(window_left, -1), -1), softcap=logits_soft_cap or 0.0
    )
    if pos_encoding_mode == "ALIBI":
        if not causal or options["softcap"]:
            raise NotImplementedError("pos_encoding_mode: ALIBI is supported with causal=True and without a soft cap")
        options["alibi_slopes"] = _alibi_slopes(num_heads, device)
    elif pos_encoding_mode == "ROPE_LLAMA":
        raise NotImplementedError("pos_encoding_mode: ROPE_LLAMA is not supported; rotate q and k before")
    elif pos_encoding_mode != "NONE":
        fail("pos_encoding_mode", "NONE or ALIBI", pos_encoding_mode)
    return options


def _alibi_slopes(num_heads, device):
    """2^(-8 i / n) for the power of two n at or below num_heads, then every other one of 2 n. arXiv:2108.12409.

    Made on the device at each call: a tensor that is kept would be a fake one after a call with fake tensors.
    """
    n = 1 << (num_heads.bit_length() - 1)
    own = torch.arange(1, n + 1, dtype=torch.float32, device=device) * (-8 / n)
    others = torch.arange(1, 2 * n, 2, dtype=torch.float32, device=device) * (-4 / n)
    return torch.cat([own, others])[:num_heads].exp2()


def softmax_scale_of(sm_scale, head_dim):
    return head_dim**-0.5 if sm_scale is None else sm_scale


def scales_of(softmax_scale, q_scale, k_scale, v_scale):
    """The scales of `paged_attention`: a number that queries are multiplied with is the softmax's, a tensor k's."""
    k_scale, v_scale = (x.reshape(-1) if isinstance(x, torch.Tensor) else x for x in (k_scale, v_scale))
    if isinstance(q_scale, torch.Tensor):
        k_scale = q_scale.reshape(-1) * (1.0 if k_scale is None else k_scale)
    elif q_scale is not None:
        softmax_scale = softmax_scale * q_scale
    return dict(softmax_scale=softmax_scale, k_scale=k_scale, v_scale=v_scale)


def base_2(natural, lse):
    """A log-sum-exp (tokens, heads) in base 2, contiguous, or in lse where that is given."""
    return tokens_first(natural, LOG2_E, lse)


def tokens_first(natural, factor, lse):
    """`base_2` with any factor."""
    if lse is None:
        return (natural * factor).contiguous()
    if lse.shape != natural.shape:
        fail("lse", f"shape {tuple(natural.shape)}", f"shape {tuple(lse.shape)}")
    return torch.mul(natural, factor, out=lse)


def as_nhd(name, x, kv_layout):
    check_ndim(name, x, 3)
    return x if check_layout(kv_layout) == "NHD" else x.transpose(0, 1)


def dtype_of(dtype):
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def number_of(name, scale):
    if isinstance(scale, torch.Tensor):
        raise NotImplementedError(f"{name}: a number is supported, got a tensor")
    return 1.0 if scale is None else float(scale)


def check_layout(kv_layout):
    if kv_layout not in ("NHD", "HND"):
        fail("kv_layout", "NHD or HND", kv_layout)
    return kv_layout


def check_ndim(name, x, ndim):
    if x.ndim != ndim:
        fail(name, f"{ndim} dimensions", f"shape {tuple(x.shape)}")


def refuse(**arguments):
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: only its default is supported, got {value}")


def refuse_custom_masks(**masks):
    for name, mask in masks.items():
        if mask is not None:
            raise NotImplementedError(f"{name}: causal and sliding-window masks are supported, custom masks are not")


def refuse_prefill(
    custom_mask,
    packed_custom_mask,
    use_fp16_qk_reduction,
    prefix_len_ptr,
    token_pos_in_items_ptr,
    token_pos_in_items_len,
    max_item_len_ptr,
    fixed_split_size,
):
    refuse_custom_masks(custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
    refuse(
        use_fp16_qk_reduction=use_fp16_qk_reduction or None,
        prefix_len_ptr=prefix_len_ptr,
        token_pos_in_items_ptr=token_pos_in_items_ptr,
        token_pos_in_items_len=token_pos_in_items_len or None,
        max_item_len_ptr=max_item_len_ptr,
        fixed_split_size=fixed_split_size,
    )


def refuse_run(args, kv_cache_sf=None, skip_softmax=None, use_fp16_softmax=None, uses_spcompress=None):
    if args or not (kv_cache_sf is skip_softmax is use_fp16_softmax is uses_spcompress is None):
        refuse(
            args=args or None,
            kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax,
            use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
        )


def fail(name: str, expected: object, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    got = got.__name__ if isinstance(got, type) else got
    raise error(f"{name}: expected {expected}, got {got}")
