"""`append_latent_cache`: argument checks, then the kernel or the reference."""

import torch
from torch import Tensor

from .._host.backend import should_check_values, use_kernel
from .._host.checks import (
    FLOAT8_MANTISSA_BITS,
    KERNEL_DTYPES,
    MAX_HEAD_DIM,
    check_bool,
    check_factor,
    check_last_contiguous,
    check_latent_scales,
    check_rows_aligned,
    check_tensor,
    fail,
)
from .._host.known import Known
from .._host.latent import latent_storage
from .._host.observers import is_observed, number_and_tensor
from . import reference
from .writes import check_append_values, check_index, check_rope, refuse_transforms


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
    key, known = _plans.find_launch((*operands, rope_interleaved), kv_latent, check_values)
    if known is not None:
        plan, alike = known
        k_scale, k_pe_scale = check_factor("k_scale", k_scale), check_factor("k_pe_scale", k_pe_scale)
        if latent_cache.dtype == torch.uint8:
            check_rows_aligned("latent_cache", latent_cache)
        tensors = kv_latent, k_pe, latent_cache, slot_mapping
        plan.launch(*tensors, k_scale, k_pe_scale, rope_cos, rope_sin, positions, alike)
        return
    _check_append_latent(kv_latent, k_pe, latent_cache, slot_mapping)
    scales = check_latent_scales(latent_cache, k_scale, k_pe_scale)
    rope_interleaved = check_bool("rope_interleaved", rope_interleaved)
    check_rope("k_pe", k_pe, rope_cos, rope_sin, positions)
    operands = kv_latent, k_pe, latent_cache, slot_mapping, *scales, rope_cos, rope_sin, positions
    more = rope_interleaved, should_check_values(check_values)
    if is_observed(*[x for x in operands if isinstance(x, Tensor)]):
        _append_latent_observed(operands, *more)
    else:
        _plans.keep_plan(key, _append_latent(operands, *more))


_plans = Known()


def _append_latent(operands, rope_interleaved, check_values):
    """`append_latent_cache` with checked arguments; the plan of its launch, None of the reference."""
    *tensors, k_scale, k_pe_scale, rope_cos, rope_sin, positions = operands
    _, _, latent_cache, slot_mapping = tensors
    if latent_cache.dtype == torch.uint8:
        check_rows_aligned("latent_cache", latent_cache)
    if check_values:
        check_append_values(slot_mapping, latent_cache, rope_cos, positions)
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
    refuse_transforms((*names, "positions"), tensors)
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
    check_index("slot_mapping", slot_mapping, (num_tokens,), (torch.int64,), device)
