"""Argument checks. Each raises TypeError or ValueError with the argument's name and the expected and the given value.

Checks of scalars return a plain bool, int or float: the JIT and torch's operators take no others.
"""

import math
import numbers
from typing import Any, NoReturn

import numpy as np
import torch

from .observers import is_observed

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT8_MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}  # further dtypes of caches
QUANTIZED_BITS = FLOAT8_MANTISSA_BITS | {torch.int8: 7}  # those of keys and values; int8 has no exponent
MAX_HEAD_DIM = 512
# Rows of a tensor, or keys of a sequence. Kernels add two positions and a window size in 32 bits.
MAX_ROWS = 10**9


def largest_of(dtype):
    """The largest finite number of a dtype."""
    return (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max


def fail(name: str, expected: object, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: expected {expected}, got {got}")


def check_bool(name: str, value: Any, expected: str = "a bool") -> bool:
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        fail(name, expected, type(value).__name__, TypeError)
    return bool(value)


def check_number(name: str, value: Any) -> float:
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            fail(name, "a number", type(value).__name__, TypeError)
        try:
            value = float(value)
        except OverflowError:
            fail(name, "a number that a float can hold", value)
    if not -math.inf < value < math.inf:  # math.isfinite cannot be traced for a symbolic value
        fail(name, "a finite number", value)
    return value


def check_int(name: str, value: Any, expected: str = "an int") -> int:
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        fail(name, expected, type(value).__name__, TypeError)
    return int(value)


def check_length(name: str, value: Any) -> int:
    if type(value) is not int:
        value = check_int(name, value)
    if not 0 <= value < 2**31:
        fail(name, "0 to 2**31 - 1", value)
    return value


def check_size(name: str, value: Any) -> int:
    value = check_length(name, value)
    if value == 0:
        fail(name, "1 or more", value)
    return value


def check_max_seqlen(name: str, value: Any) -> Any:
    """A length, or a tensor with one length, whose reading costs a device-to-host sync. A traced tensor is not read."""
    if not isinstance(value, torch.Tensor):
        return check_length(name, value)
    if value.dtype not in (torch.int32, torch.int64) or value.numel() != 1:
        got = f"{value.dtype} of shape {tuple(value.shape)}"
        fail(name, "an int, or a tensor of one int32 or int64", got, TypeError)
    return value if is_observed(value) else read_length(name, value)


def read_length(name: str, value: torch.Tensor) -> int:
    return check_length(name, value.item())


def check_window(window_size: Any) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        fail("window_size", "a pair (left, right)", window_size, TypeError)
    left, right = (check_int("window_size", side, "a pair of ints") for side in window_size)
    if min(left, right) < -1:
        fail("window_size", "-1 (unlimited) or more on each side", window_size)
    return left, right


def check_same_kind(q, k, v):
    """Three tensors of one dtype and device."""
    if not isinstance(q, torch.Tensor):
        fail("q", "a tensor", type(q).__name__, TypeError)
    dtype, device = q.dtype, q.device
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            fail(name, "a tensor", type(x).__name__, TypeError)
        if x.dtype != dtype:
            fail(name, f"q's dtype {dtype}", x.dtype, TypeError)
        if x.device != device:
            fail(name, f"q's device {device}", x.device)


def check_rows(name, num_rows):
    if num_rows > MAX_ROWS:
        fail(name, "at most 10**9 rows", num_rows)


def layout_of(x, y, z):
    """(shape, strides) of each of three tensors. Checks and plans are cached by it."""
    return (x.shape, x.stride()), (y.shape, y.stride()), (z.shape, z.stride())  # a loop takes 1.3 times as long


def check_qkv_layout(ndim, q, k, v):
    """Check (shape, strides) of q, k and v. ndim is 4 for a dense batch, 3 for a packed one."""
    for name, (shape, strides) in (("q", q), ("k", k), ("v", v)):
        if len(shape) != ndim:
            layout = "(batch, seqlen, heads, head_dim)" if ndim == 4 else "(total, heads, head_dim)"
            fail(name, layout, f"shape {tuple(shape)}")
        if strides[-1] != 1 and shape[-1] != 1:
            fail(name, "a contiguous last dimension (stride 1)", f"stride {strides[-1]}")
        if not 1 <= shape[-1] <= MAX_HEAD_DIM:
            fail(name, f"a head dimension of 1 to {MAX_HEAD_DIM}", shape[-1])
        check_rows(name, shape[-3])
    *rows_q, num_heads_q, head_dim = q[0]
    *rows_k, num_heads_kv, head_dim_k = k[0]
    if k[0][:-1] != v[0][:-1]:
        fail("v", f"k's shape except for the last dimension, {tuple(k[0][:-1])}", tuple(v[0][:-1]))
    if head_dim_k != head_dim:
        fail("k", f"q's head dimension {head_dim}", head_dim_k)
    if ndim == 4 and rows_k[0] != rows_q[0]:
        fail("k", f"q's batch size {rows_q[0]}", rows_k[0])
    if num_heads_kv == 0 or num_heads_q % num_heads_kv:
        fail("k", f"a number of heads that divides q's {num_heads_q}", num_heads_kv)


def check_tensor(name, x, shape, dtypes, device):
    """A tensor of one of the dtypes. A name in shape stands for any size, and None for any device."""
    if not isinstance(x, torch.Tensor):
        fail(name, "a tensor", type(x).__name__, TypeError)
    sizes = x.shape
    is_right = len(sizes) == len(shape)
    for size, expected in zip(sizes, shape):  # faster than all()
        if not isinstance(expected, str) and size != expected:
            is_right = False
    if not is_right:
        fail(name, f"shape ({', '.join(map(str, shape))})", f"shape {tuple(sizes)}")
    if x.dtype not in dtypes:
        fail(name, " or ".join(str(dtype) for dtype in dtypes), x.dtype, TypeError)
    if device is not None and x.device != device:
        fail(name, f"device {device}", x.device)


def check_last_contiguous(name, x):
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        fail(name, "a contiguous last dimension (stride 1)", f"stride {x.stride(-1)}")


def check_packed_pages(name, shape, strides):
    """Of a packed cache, the elements of a page and head lie side by side. Strides of dimensions of size 1 do not
    count."""
    inner = 1
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:])):
        if size != 1 and stride != inner:
            fail(name, "a packed cache that is contiguous from its third dimension on", f"strides {tuple(strides)}")
        inner *= size


def check_rows_aligned(name, latent_cache):
    """Rows of an fp8 latent cache contain fp32 scales, so they must be aligned. A traced tensor has no address."""
    if any(n % 4 for n in (latent_cache.data_ptr(), *latent_cache.stride()[:2])):
        got = f"address {latent_cache.data_ptr():#x}, strides {latent_cache.stride()}"
        fail(name, "rows that begin at multiples of 4 bytes", got)


def check_cache_scale(name, scale, num_heads_kv, device):
    """A factor of cached elements: None, a number above 0, or a tensor of one element or one per KV head.

    Returns it; a number as a float."""
    if isinstance(scale, torch.Tensor):
        check_per_head(name, scale, ((1,),) if num_heads_kv == 1 else ((1,), (num_heads_kv,)), device, (torch.float32,))
        check_last_contiguous(name, scale)
    return check_factor(name, scale)


def check_factor(name: str, scale: Any) -> Any:
    """A factor that is None, a number above 0, which is returned as a float, or a tensor that is known to be right."""
    if scale is None or isinstance(scale, torch.Tensor):
        return scale
    scale = check_number(name, scale)
    if scale <= 0:
        fail(name, "a number above 0", scale)
    return scale


def check_kv_scale(name, scale, cache):
    """A factor of a cache (pages, slots, heads, dim), as `check_cache_scale` has it or, of a quantized cache, an fp32
    tensor (pages, slots, heads) of one for each token and head."""
    if type(scale) is float and 0 < scale < math.inf:
        return scale  # as most are, in little time
    if not isinstance(scale, torch.Tensor) or scale.ndim != 3:
        return check_cache_scale(name, scale, cache.shape[2], cache.device)
    if cache.dtype not in QUANTIZED_BITS:
        fail(name, f"no scales per token with a cache of {cache.dtype}", f"shape {tuple(scale.shape)}")
    check_tensor(name, scale, tuple(cache.shape[:3]), (torch.float32,), cache.device)
    return scale


def check_latent_scales(latent_cache, k_scale, k_pe_scale):
    """Both, as `check_cache_scale` returns them, of a latent cache that has been checked."""
    checked = []
    for name, scale in (("k_scale", k_scale), ("k_pe_scale", k_pe_scale)):
        if scale is not None and latent_cache.dtype == torch.uint8:
            fail(name, "None with a uint8 cache, whose rows hold scales", type(scale).__name__)
        checked.append(check_cache_scale(name, scale, 1, latent_cache.device))
    return tuple(checked)


def check_kernel_dtype(q):
    if q.dtype not in KERNEL_DTYPES:
        fail("q", "float16, bfloat16 or float32", q.dtype, TypeError)


def check_per_head(name, x, shapes, device, dtypes):
    """A tensor with an element per head, in one of the shapes and dtypes."""
    if not isinstance(x, torch.Tensor):
        fail(name, "a tensor", type(x).__name__, TypeError)
    if tuple(x.shape) not in shapes:
        fail(name, " or ".join(f"shape {shape}" for shape in shapes), f"shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        fail(name, " or ".join(str(dtype) for dtype in dtypes), x.dtype, TypeError)
    if x.device != device:
        fail(name, f"q's device {device}", x.device)


def check_cu_seqlens(name, cu_seqlens, device):
    if not isinstance(cu_seqlens, torch.Tensor):
        fail(name, "a tensor", type(cu_seqlens).__name__, TypeError)
    if cu_seqlens.dtype != torch.int32:
        fail(name, "dtype torch.int32", cu_seqlens.dtype, TypeError)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0 or not cu_seqlens.is_contiguous():
        fail(name, "a contiguous tensor of shape (batch + 1,)", f"shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        fail(name, f"q's device {device}", cu_seqlens.device)


def check_cu_seqlens_values(name, cu_seqlens, total, max_seqlen):
    """cu_seqlens starts at 0, does not decrease or exceed total, and no sequence is longer than max_seqlen. Syncs."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        fail(f"{name}[0]", "0", bounds[0])
    for i in range(len(bounds) - 1):
        length = bounds[i + 1] - bounds[i]
        if not 0 <= length <= max_seqlen:
            fail(f"{name}, sequence {i}", f"a length of 0 to {max_seqlen}", length)
        if bounds[i + 1] > total:
            fail(f"{name}[{i + 1}]", f"at most the {total} rows of the tensor", bounds[i + 1])


def check_rope_tables(name, x, rope_cos, rope_sin):
    """Tables of cosines and sines for the last dimension of x, which is the argument `name`."""
    check_tensor("rope_cos", rope_cos, ("num_positions", "rotary_dim / 2"), (torch.float32, x.dtype), x.device)
    check_tensor("rope_sin", rope_sin, rope_cos.shape, (rope_cos.dtype,), x.device)
    check_last_contiguous("rope_cos", rope_cos)
    check_last_contiguous("rope_sin", rope_sin)
    if not 2 <= 2 * rope_cos.shape[1] <= x.shape[-1]:
        fail("rope_cos", f"1 to {x.shape[-1] // 2} columns, half of {name}'s last dimension", rope_cos.shape[1])
