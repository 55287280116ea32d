"""Writing to a paged KV cache as users call it: argument checks, then the kernel or the reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._host.backend import should_check_values, use_kernel
from .._host.checks import (
    FLOAT8_MANTISSA_BITS,
    KERNEL_DTYPES,
    MAX_HEAD_DIM,
    QUANTIZED_BITS,
    check_bool,
    check_factor,
    check_kv_scale,
    check_last_contiguous,
    check_latent_scales,
    check_rope_tables,
    check_rows_aligned,
    check_tensor,
    fail,
)
from .._host.known import Known
from .._host.latent import latent_storage
from .._host.observers import is_observed, number_and_tensor, refuse_gradients, refuse_vmap
from . import reference


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
    key, plan = _append_plans.find((*operands, rope_interleaved))
    if plan is not None:
        k_scale, v_scale = check_factor("k_scale", k_scale), check_factor("v_scale", v_scale)
        if not should_check_values(check_values) and use_kernel(k):
            plan.launch(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, rope_cos, rope_sin, positions)
            return
    _check_append(k, v, k_cache, v_cache, slot_mapping)
    scales = check_kv_scale("k_scale", k_scale, k_cache), check_kv_scale("v_scale", v_scale, v_cache)
    rope_interleaved = check_bool("rope_interleaved", rope_interleaved)
    _check_rope("k", k, rope_cos, rope_sin, positions)
    operands = k, v, k_cache, v_cache, slot_mapping, *scales, rope_cos, rope_sin, positions
    more = rope_interleaved, should_check_values(check_values)
    if is_observed(*[x for x in operands if isinstance(x, Tensor)]):
        _append_observed(operands, *more)
    else:
        _append_plans.keep(key, _append(operands, *more))


_append_plans = Known()


def _append(operands, rope_interleaved, check_values):
    """`append_kv_cache` with checked arguments; the plan of its launch, None of the reference."""
    *tensors, k_scale, v_scale, rope_cos, rope_sin, positions = operands
    k, _, k_cache, _, slot_mapping = tensors
    if check_values:
        _check_append_values(slot_mapping, k_cache, rope_cos, positions)
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
    _refuse_transforms(*zip(*((name, x) for name, x in zip(names, tensors) if x is not None)))
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


def append_latent_cache(
    kv_latent: Tensor,
    k_pe: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: float | Tensor | None = None,
    k_pe_scale: float | Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions: Tensor | None = None,
    rope_interleaved: bool = False,
    check_values: bool | None = None,
) -> None:
    """Write the latent vectors and rotary keys of new tokens to their slots of an MLA cache, in place.

        latent_cache[page, offset] = [kv_latent[t] / k_scale, rope(k_pe[t], positions[t]) / k_pe_scale]
        page, offset = divmod(slot_mapping[t], page_size)

    with the rotation of `append_kv_cache`. kv_latent is not rotated. fp8 saturates at the largest finite value. A uint8
    cache has the fp8 layout of FlashMLA and DeepSeek-V3.2, in bytes: kv_lora_rank e4m3 elements x / scale, an fp32
    scale for every 128 of them, and qk_rope_head_dim bf16 elements, not scaled; 656 bytes for 512 + 64. With amax the
    largest magnitude of the 128,

        scale = 2^ceil(log2(max(amax / 448, 1e-4)))

    as in FlashMLA and vLLM, so that no element saturates. Everything is computed in fp32 and rounded once, to nearest
    even. A NaN is stored as NaN and does not count for amax. If an element is infinite, its 128 elements read as NaN.

    Args:
        kv_latent: (num_tokens, kv_lora_rank), fp16, bf16 or fp32; the last dimension contiguous; after its norm.
        k_pe: (num_tokens, qk_rope_head_dim), kv_latent's dtype. Both may be slices of one projection. qk_rope_head_dim
            may be 0, except with a uint8 cache.
        latent_cache: (num_pages, page_size, kv_lora_rank + qk_rope_head_dim) of kv_latent's dtype, float8_e4m3fn or
            float8_e5m2, or uint8 (num_pages, page_size, bytes), for which 128 must divide kv_lora_rank, 2
            qk_rope_head_dim, and 4 the rows' addresses.
        slot_mapping: (num_tokens,) int64, page * page_size + offset, each at most once. A token whose slot is negative
            or beyond the cache is skipped, and its other arguments are not read.
        k_scale: factor of cached elements: a number above 0, or an fp32 tensor (1,). None is 1. A uint8 cache takes
            none.
        k_pe_scale: the factor of rotary keys, if it differs. None is k_scale.
        rope_cos, rope_sin: (num_positions, rotary_dim / 2), both fp32 or both k_pe's dtype; rotary_dim at most
            qk_rope_head_dim.
        positions: (num_tokens,) int32 or int64; required with rope_cos. As in `append_kv_cache`.
        rope_interleaved: pairs are neighbours (DeepSeek's checkpoints), not halves apart.
        check_values: check slots and positions, which costs a device-to-host sync. None follows
            TRITON_ATTN_CHECK=1.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was written. With values checked also: a slot outside of
            the cache or listed twice, a position without an angle.
        NotImplementedError: an argument requires a gradient, has a tangent or is under vmap.

    One operator that writes to the cache under torch.compile and export.

    Example:
        >>> latent_cache = torch.zeros(4, 16, 512 + 64)
        >>> kv_latent, k_pe = torch.ones(2, 576).split([512, 64], dim=1)
        >>> triton_attn.append_latent_cache(kv_latent, k_pe, latent_cache, torch.tensor([0, 40]))
        >>> latent_cache[2, 8].sum().item()
        576.0

    Source: DeepSeek-V2 (2024), arXiv:2405.04434, section 2.1.
    """
    operands = kv_latent, k_pe, latent_cache, slot_mapping, k_scale, k_pe_scale, rope_cos, rope_sin, positions
    key, plan = _append_latent_plans.find((*operands, rope_interleaved))
    if plan is not None:
        k_scale, k_pe_scale = check_factor("k_scale", k_scale), check_factor("k_pe_scale", k_pe_scale)
        if not should_check_values(check_values) and use_kernel(kv_latent):
            if latent_cache.dtype == torch.uint8:
                check_rows_aligned("latent_cache", latent_cache)
            plan.launch(kv_latent, k_pe, latent_cache, slot_mapping, k_scale, k_pe_scale, rope_cos, rope_sin, positions)
            return
    _check_append_latent(kv_latent, k_pe, latent_cache, slot_mapping)
    scales = check_latent_scales(latent_cache, k_scale, k_pe_scale)
    rope_interleaved = check_bool("rope_interleaved", rope_interleaved)
    _check_rope("k_pe", k_pe, rope_cos, rope_sin, positions)
    operands = kv_latent, k_pe, latent_cache, slot_mapping, *scales, rope_cos, rope_sin, positions
    more = rope_interleaved, should_check_values(check_values)
    if is_observed(*[x for x in operands if isinstance(x, Tensor)]):
        _append_latent_observed(operands, *more)
    else:
        _append_latent_plans.keep(key, _append_latent(operands, *more))


_append_latent_plans = Known()


def _append_latent(operands, rope_interleaved, check_values):
    """`append_latent_cache` with checked arguments; the plan of its launch, None of the reference."""
    *tensors, k_scale, k_pe_scale, rope_cos, rope_sin, positions = operands
    _, _, latent_cache, slot_mapping = tensors
    if latent_cache.dtype == torch.uint8:
        check_rows_aligned("latent_cache", latent_cache)
    if check_values:
        _check_append_values(slot_mapping, latent_cache, rope_cos, positions)
    if not use_kernel(latent_cache):
        reference.append_latent_cache(
            *tensors,
            k_scale=k_scale,
            k_pe_scale=k_pe_scale,
            rope_cos=rope_cos,
            rope_sin=rope_sin,
            positions=positions,
            rope_interleaved=rope_interleaved,
        )
        return None
    from .kernels.append_latent import plan_append_latent_cache

    plan = plan_append_latent_cache(operands, rope_interleaved)
    plan.launch(*operands)
    return plan


def _append_latent_observed(operands, rope_interleaved, check_values):
    """The operator takes a scale as a number or as a tensor."""
    *tensors, k_scale, k_pe_scale, rope_cos, rope_sin, positions = operands
    (k_number, k_scale), (k_pe_number, k_pe_scale) = number_and_tensor(k_scale), number_and_tensor(k_pe_scale)
    tensors += k_scale, k_pe_scale, rope_cos, rope_sin, positions
    names = "kv_latent", "k_pe", "latent_cache", "slot_mapping", "k_scale", "k_pe_scale", "rope_cos", "rope_sin"
    _refuse_transforms((*names, "positions"), tensors)
    _append_latent_cache_operator(*tensors, k_number, k_pe_number, rope_interleaved, check_values)


def _append_latent_cache(
    kv_latent: Tensor,
    k_pe: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    k_pe_scale: Tensor | None,
    rope_cos: Tensor | None,
    rope_sin: Tensor | None,
    positions: Tensor | None,
    k_number: float | None,
    k_pe_number: float | None,
    rope_interleaved: bool,
    check_values: bool,
) -> None:
    factors = k_number if k_scale is None else k_scale, k_pe_number if k_pe_scale is None else k_pe_scale
    operands = kv_latent, k_pe, latent_cache, slot_mapping, *factors, rope_cos, rope_sin, positions
    _append_latent(operands, rope_interleaved, check_values)


_append_latent_cache_operator = torch.library.custom_op(
    "triton_attn::append_latent_cache", _append_latent_cache, mutates_args=("latent_cache",)
)


@_append_latent_cache_operator.register_fake
def _(*args):
    pass


def copy_kv_pages(
    caches: Tensor | Sequence[Tensor],
    src_pages: Tensor,
    dst_pages: Tensor,
    *,
    to: Tensor | Sequence[Tensor] | None = None,
    check_values: bool | None = None,
) -> None:
    """Copy whole pages inside a paged cache or to another one: page dst_pages[i] becomes page src_pages[i]. One launch.

    The order of the copies is undefined. A page may be the source of several copies, but not the destination of two,
    nor, inside one cache, both source and destination.

    Args:
        caches: a tensor, or a tuple or list of tensors: keys and values, one or all layers. Each is (num_pages,
            page_size, num_heads_kv, head_dim), (num_layers, num_pages, page_size, num_heads_kv, head_dim), or, of a
            latent cache, (num_pages, page_size, width); of all its layers, cache.unsqueeze(3). All have one dtype and
            equal shapes except for the last dimension, which is contiguous. The packed keys that
            `paged_attention` reads have five dimensions too, but are no layers: they are not for this function.
        src_pages, dst_pages: (num_pairs,) int32 or int64, on the device that copies: the caches', or that of either
            side.
        to: the caches that are written, which share no memory with those that are read: as many, of the same dtype and
            shapes except for num_pages. None writes to `caches` themselves. One side may be in pinned host memory,
            which the GPU then reads or writes in the order of the current stream: pages that were copied to the host
            are there once the stream got so far.
        check_values: check the pages, which costs a device-to-host sync. None follows TRITON_ATTN_CHECK=1.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was written. With values checked also: a page outside of
            the cache, or in a place that the rule above excludes.
        NotImplementedError: as `append_kv_cache`.

    One operator that writes to the caches under torch.compile and export.

    Example:
        >>> k_cache, v_cache = torch.randn(2, 3, 8, 16, 2, 64)  # three layers of eight pages
        >>> src_pages, dst_pages = torch.tensor([[0, 1], [6, 7]], dtype=torch.int32)
        >>> triton_attn.copy_kv_pages((k_cache, v_cache), src_pages, dst_pages)
        >>> torch.equal(v_cache[:, 6:], v_cache[:, :2])
        True
        >>> triton_attn.copy_kv_pages(k_cache, dst_pages, src_pages, to=(host := torch.zeros(3, 2, 16, 2, 64)))
        >>> torch.equal(host, k_cache[:, 6:])
        True
    """
    caches = _as_tuple("caches", caches)
    written = () if to is None else to if isinstance(to, (tuple, list)) else (to,)
    key, plan = _copy_plans.find((*caches, None, src_pages, dst_pages, to is None, *written))
    if plan is not None and not should_check_values(check_values) and use_kernel(src_pages):
        plan.launch(caches, src_pages, dst_pages, written)
        return
    caches = _as_layered("caches", caches)
    device, targets = caches[0].device, ()
    if to is not None:
        targets = _as_layered("to", _as_tuple("to", to))
        device = _check_targets(caches, targets)
    for name, pages in (("src_pages", src_pages), ("dst_pages", dst_pages)):
        _check_index(name, pages, ("num_pairs",), (torch.int32, torch.int64), device)
    if src_pages.shape != dst_pages.shape:
        fail("dst_pages", f"src_pages' shape {tuple(src_pages.shape)}", tuple(dst_pages.shape))
    check_values = should_check_values(check_values)
    if not is_observed(*caches, *targets, src_pages, dst_pages):
        _copy_plans.keep(key, _copy(caches, src_pages, dst_pages, targets, check_values))
        return
    names = [f"{side}[{i}]" for side, tensors in (("caches", caches), ("to", targets)) for i in range(len(tensors))]
    _refuse_transforms([*names, "src_pages", "dst_pages"], [*caches, *targets, src_pages, dst_pages])
    if to is None:
        _copy_kv_pages_operator(caches, src_pages, dst_pages, check_values)
    else:
        _copy_kv_pages_to_operator(caches, src_pages, dst_pages, targets, check_values)


_copy_plans = Known()


def _copy(caches, src_pages, dst_pages, targets, check_values):
    """`copy_kv_pages` with checked arguments, to no targets inside the caches; the plan of its launch, None of the
    reference."""
    if check_values:
        _check_page_pairs(src_pages.tolist(), dst_pages.tolist(), caches, targets)
    if not use_kernel(src_pages):
        reference.copy_kv_pages(caches, src_pages, dst_pages, to=targets or None)
        return None
    from .kernels.copy import plan_copy_kv_pages

    plan = plan_copy_kv_pages(caches, src_pages, targets)
    plan.launch(caches, src_pages, dst_pages, targets)
    return plan


def _copy_kv_pages(caches: Sequence[Tensor], src_pages: Tensor, dst_pages: Tensor, check_values: bool) -> None:
    _copy(caches, src_pages, dst_pages, (), check_values)


def _copy_kv_pages_to(
    caches: Sequence[Tensor], src_pages: Tensor, dst_pages: Tensor, targets: Sequence[Tensor], check_values: bool
) -> None:
    _copy(caches, src_pages, dst_pages, targets, check_values)


_copy_kv_pages_operator = torch.library.custom_op(
    "triton_attn::copy_kv_pages", _copy_kv_pages, mutates_args=("caches",)
)
_copy_kv_pages_to_operator = torch.library.custom_op(
    "triton_attn::copy_kv_pages_to", _copy_kv_pages_to, mutates_args=("targets",)
)


@_copy_kv_pages_to_operator.register_fake
@_copy_kv_pages_operator.register_fake
def _(*args):
    pass


def _refuse_transforms(names, tensors):
    tensors = dict(zip(names, tensors))
    refuse_gradients(**tensors)
    refuse_vmap(**tensors)


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
    _check_index("slot_mapping", slot_mapping, (num_tokens,), (torch.int64,), k.device)


def _check_append_latent(kv_latent, k_pe, latent_cache, slot_mapping):
    check_tensor("kv_latent", kv_latent, ("num_tokens", "kv_lora_rank"), KERNEL_DTYPES, None)
    num_tokens, kv_lora_rank = kv_latent.shape
    device = kv_latent.device
    check_tensor("k_pe", k_pe, (num_tokens, "qk_rope_head_dim"), (kv_latent.dtype,), device)
    qk_rope_head_dim = k_pe.shape[1]
    has_scales = isinstance(latent_cache, torch.Tensor) and latent_cache.dtype == torch.uint8
    for name, x, least in (("kv_latent", kv_latent, 1), ("k_pe", k_pe, int(has_scales))):
        check_last_contiguous(name, x)
        if not least <= x.shape[1] <= MAX_HEAD_DIM:
            fail(name, f"a last dimension of {least} to {MAX_HEAD_DIM}", x.shape[1])
    _, width = latent_storage(kv_lora_rank, qk_rope_head_dim, torch.float8_e4m3fn if has_scales else kv_latent.dtype)
    dtypes = (kv_latent.dtype, *FLOAT8_MANTISSA_BITS, torch.uint8)
    check_tensor("latent_cache", latent_cache, ("num_pages", "page_size", width), dtypes, device)
    check_last_contiguous("latent_cache", latent_cache)
    _check_index("slot_mapping", slot_mapping, (num_tokens,), (torch.int64,), device)


def _check_rope(name, k, rope_cos, rope_sin, positions):
    given = [x is not None for x in (rope_cos, rope_sin, positions)]
    if not any(given):
        return
    if not all(given):
        fail("rope_cos, rope_sin, positions", "all three or none", f"given: {given}", TypeError)
    check_rope_tables(name, k, rope_cos, rope_sin)
    _check_index("positions", positions, (k.shape[0],), (torch.int32, torch.int64), k.device)


def _as_tuple(side, caches):
    caches = (caches,) if isinstance(caches, Tensor) else caches
    if not isinstance(caches, (tuple, list)) or not caches:
        fail(side, "a tensor, or a tuple or list of them", type(caches).__name__, TypeError)
    return caches


def _as_layered(side, caches):
    """The caches as tensors (num_layers, num_pages, page_size, num_heads, head_dim)."""
    layered = tuple(_as_layered_one(f"{side}[{i}]", cache) for i, cache in enumerate(caches))
    first = layered[0]
    for i, cache in enumerate(layered):
        check_tensor(f"{side}[{i}]", cache, (*first.shape[:4], "head_dim"), (first.dtype,), first.device)
        check_last_contiguous(f"{side}[{i}]", cache)
    return layered


def _check_targets(caches, targets):
    """Check the caches that are written against those that are read; the device that copies."""
    if len(targets) != len(caches):
        fail("to", f"{len(caches)} tensors, one for each of caches", len(targets))
    for i, (cache, target) in enumerate(zip(caches, targets)):
        num_layers, _, *rest = cache.shape
        check_tensor(f"to[{i}]", target, (num_layers, "num_pages", *rest), (cache.dtype,), target.device)
    sides = {"caches": caches, "to": targets}
    device = next((x[0].device for x in sides.values() if x[0].is_cuda), caches[0].device)
    for side, tensors in sides.items():
        for i, x in enumerate(tensors):
            if x.device != device and not (x.device.type == "cpu" and x.is_pinned()):
                fail(f"{side}[{i}]", f"a tensor on {device} or in pinned host memory", f"one on {x.device}")
    return device


def _as_layered_one(name, cache):
    if not isinstance(cache, torch.Tensor):
        fail(name, "a tensor", type(cache).__name__, TypeError)
    if cache.ndim == 3:
        return cache[None, :, :, None]
    if cache.ndim == 4:
        return cache[None]
    if cache.ndim != 5:
        fail(name, "3, 4 or 5 dimensions", f"shape {tuple(cache.shape)}")
    return cache


def _check_index(name, x, shape, dtypes, device):
    check_tensor(name, x, shape, dtypes, device)
    if not x.is_contiguous():
        fail(name, "a contiguous tensor", f"stride {x.stride(0)}")


def _check_append_values(slot_mapping, cache, rope_cos, positions):
    _check_slots(slot_mapping, cache.shape[0] * cache.shape[1])
    if positions is not None:
        _check_positions(positions, slot_mapping >= 0, rope_cos.shape[0])


def _check_slots(slot_mapping, num_slots):
    seen = {}
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= num_slots:
            fail(f"slot_mapping[{token}]", f"a slot below {num_slots}", slot)
        if slot >= 0 and seen.setdefault(slot, token) != token:
            fail(f"slot_mapping[{token}]", "a slot of its own", f"slot {slot}, also that of token {seen[slot]}")


def _check_positions(positions, written, num_positions):
    for token, (position, is_written) in enumerate(zip(positions.tolist(), written.tolist())):
        if is_written and not 0 <= position < num_positions:
            fail(f"positions[{token}]", f"0 to {num_positions - 1}", position)


def _check_page_pairs(src_pages, dst_pages, caches, targets):
    read, written = caches[0].shape[1], (targets or caches)[0].shape[1]
    for name, pages, num_pages in (("src_pages", src_pages, read), ("dst_pages", dst_pages, written)):
        for i, page in enumerate(pages):
            if not 0 <= page < num_pages:
                fail(f"{name}[{i}]", f"a page of 0 to {num_pages - 1}", page)
    seen = set(() if targets else src_pages)
    for i, page in enumerate(dst_pages):
        if page in seen:
            fail(f"dst_pages[{i}]", "a page that is no source and no other destination", page)
        seen.add(page)
