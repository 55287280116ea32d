"""`append_kv_cache`: argument checks, then the kernel or the reference."""

import torch
from torch import Tensor

from .._host.backend import should_check_values, use_kernel
from .._host.checks import (
    KERNEL_DTYPES,
    MAX_HEAD_DIM,
    QUANTIZED_BITS,
    check_bool,
    check_factor,
    check_kv_scale,
    check_last_contiguous,
    check_tensor,
    fail,
)
from .._host.known import Known
from .._host.observers import is_observed, number_and_tensor
from . import reference
from .writes import check_append_values, check_index, check_rope, refuse_transforms


def append_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions: Tensor | None = None,
    rope_interleaved: bool = False,
    check_values: bool | None = None,
) -> None:
    """Write the keys and values of new tokens to their slots of a paged cache, in place.

        k_cache[page, offset, h] = rope(k[t, h], positions[t]) / k_scale[h]
        v_cache[page, offset, h] = v[t, h] / v_scale[h],  page, offset = divmod(slot_mapping[t], page_size)

    computed in fp32 and rounded once, to nearest even; fp8 saturates at the largest finite value, int8 at both ends.
    Where a scale has three dimensions, it is written too, in the slots of the tokens, from the row after its rotation:

        k_scale[page, offset, h] = max(max |rope(k[t, h])| / largest, 1e-6)

    with the largest number of the dtype, 127, 448 (e4m3) or 57344 (e5m2). A row with NaN or infinity then reads as NaN.
    In other int8 caches NaN is 0.

    With rope_cos and rope_sin, the pair of dimensions (i, i + rotary_dim / 2) of k, or (2 i, 2 i + 1) with
    rope_interleaved, is rotated by the angle in row positions[t], column i: (a, b) -> (a cos - b sin, b cos + a sin).
    Dimensions from rotary_dim on stay as they are.

    Args:
        k: (num_tokens, num_heads_kv, head_dim), fp16, bf16 or fp32; the last dimension contiguous.
        v: (num_tokens, num_heads_kv, head_dim_v), k's dtype.
        k_cache: (num_pages, page_size, num_heads_kv, head_dim), of k's dtype, float8_e4m3fn, float8_e5m2 or int8.
        v_cache: (num_pages, page_size, num_heads_kv, head_dim_v), k_cache's dtype.
        slot_mapping: (num_tokens,) int64, page * page_size + offset, each at most once. A token whose slot is negative
            or beyond the cache is skipped, and its other arguments are not read.
        k_scale, v_scale: factors of cached elements: a number above 0, or fp32 tensors (1,) or (num_heads_kv,), or of a
            cache in fp8 or int8 (num_pages, page_size, num_heads_kv), of any strides, which are written. None is 1.
        rope_cos, rope_sin: (num_positions, rotary_dim / 2), both fp32 or both k's dtype; rotary_dim at most head_dim.
        positions: (num_tokens,) int32 or int64; required with rope_cos. A position past the end of the table uses its
            last row.
        rope_interleaved: pairs are neighbours (GPT-J), not halves apart (GPT-NeoX, Llama).
        check_values: check slots and positions, which costs a device-to-host sync. None follows
            TRITON_ATTN_CHECK=1.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was written. With values checked also: a slot outside of
            the cache or listed twice, a position without an angle.
        NotImplementedError: an argument requires a gradient, has a tangent or is under vmap.

    One operator that writes to the cache under torch.compile and export.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 8, 16, 2, 64)  # eight pages of 16 tokens
        >>> k = v = torch.ones(3, 2, 64)
        >>> slots = torch.tensor([16, 17, 64])  # page 1, page 1, page 4
        >>> triton_attn.append_kv_cache(k, v, k_cache, v_cache, slots)
        >>> k_cache[4, 0].sum().item()
        128.0

    Source of the rotation: Su et al., RoFormer (2021), arXiv:2104.09864.
    """
    operands = k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, rope_cos, rope_sin, positions
    key, known = _plans.find_launch((*operands, rope_interleaved), k, check_values)
    if known is not None:
        plan, alike = known
        k_scale, v_scale = check_factor("k_scale", k_scale), check_factor("v_scale", v_scale)
        plan.launch(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, rope_cos, rope_sin, positions, alike)
        return
    _check_append(k, v, k_cache, v_cache, slot_mapping)
    scales = check_kv_scale("k_scale", k_scale, k_cache), check_kv_scale("v_scale", v_scale, v_cache)
    rope_interleaved = check_bool("rope_interleaved", rope_interleaved)
    check_rope("k", k, rope_cos, rope_sin, positions)
    operands = k, v, k_cache, v_cache, slot_mapping, *scales, rope_cos, rope_sin, positions
    more = rope_interleaved, should_check_values(check_values)
    if is_observed(*[x for x in operands if isinstance(x, Tensor)]):
        _append_observed(operands, *more)
    else:
        _plans.keep_plan(key, _append(operands, *more))


_plans = Known()


def _append(operands, rope_interleaved, check_values):
    """`append_kv_cache` with checked arguments; the plan of its launch, None of the reference."""
    *tensors, k_scale, v_scale, rope_cos, rope_sin, positions = operands
    k, _, k_cache, _, slot_mapping = tensors
    if check_values:
        check_append_values(slot_mapping, k_cache, rope_cos, positions)
    if not use_kernel(k):
        reference.append_kv_cache(
            *tensors,
            k_scale=k_scale,
            v_scale=v_scale,
            rope_cos=rope_cos,
            rope_sin=rope_sin,
            positions=positions,
            rope_interleaved=rope_interleaved,
        )
        return None
    # Imported at the first call, so that the package can be imported without triton.
    from .kernels.append import plan_append_kv_cache

    plan = plan_append_kv_cache(operands, rope_interleaved)
    plan.launch(*operands)
    return plan


def _append_observed(operands, rope_interleaved, check_values):
    """The operator takes each scale as a number, a tensor that it reads, or one that it writes."""
    *tensors, k_scale, v_scale, rope_cos, rope_sin, positions = operands
    (k_number, k_scale, k_token_scales), (v_number, v_scale, v_token_scales) = map(_scale_operands, (k_scale, v_scale))
    tensors += k_scale, v_scale, k_token_scales, v_token_scales, rope_cos, rope_sin, positions
    names = "k", "v", "k_cache", "v_cache", "slot_mapping", "k_scale", "v_scale", "k_scale", "v_scale"
    names += "rope_cos", "rope_sin", "positions"
    refuse_transforms(*zip(*((name, x) for name, x in zip(names, tensors) if x is not None)))
    _append_kv_cache_operator(*tensors, k_number, v_number, rope_interleaved, check_values)


def _scale_operands(scale):
    """(number, tensor that is read, tensor that is written), of which at most one is not None."""
    number, scale = number_and_tensor(scale)
    return (number, None, scale) if scale is not None and scale.ndim == 3 else (number, scale, None)


def _append_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_token_scales: Tensor | None,
    v_token_scales: Tensor | None,
    rope_cos: Tensor | None,
    rope_sin: Tensor | None,
    positions: Tensor | None,
    k_number: float | None,
    v_number: float | None,
    rope_interleaved: bool,
    check_values: bool,
) -> None:
    k_factor = k_number if k_number is not None else k_token_scales if k_scale is None else k_scale
    v_factor = v_number if v_number is not None else v_token_scales if v_scale is None else v_scale
    rope = rope_cos, rope_sin, positions
    _append((k, v, k_cache, v_cache, slot_mapping, k_factor, v_factor, *rope), rope_interleaved, check_values)


_append_kv_cache_operator = torch.library.custom_op(
    "triton_attn::append_kv_cache",
    _append_kv_cache,
    mutates_args=("k_cache", "v_cache", "k_token_scales", "v_token_scales"),
)


@_append_kv_cache_operator.register_fake
def _(*args):
    pass


def _check_append(k, v, k_cache, v_cache, slot_mapping):
    check_tensor("k", k, ("num_tokens", "num_heads_kv", "head_dim"), KERNEL_DTYPES, None)
    num_tokens, num_heads_kv, head_dim = k.shape
    check_tensor("v", v, (num_tokens, num_heads_kv, "head_dim_v"), (k.dtype,), k.device)
    cache_dtypes = (k.dtype, *QUANTIZED_BITS)
    check_tensor("k_cache", k_cache, ("num_pages", "page_size", num_heads_kv, head_dim), cache_dtypes, k.device)
    check_tensor("v_cache", v_cache, (*k_cache.shape[:3], v.shape[2]), (k_cache.dtype,), k.device)
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_last_contiguous(name, x)
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            fail(name, f"a head dimension of 1 to {MAX_HEAD_DIM}", x.shape[-1])
    check_index("slot_mapping", slot_mapping, (num_tokens,), (torch.int64,), k.device)
