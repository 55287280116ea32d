"""Memory layout of tensors (batch, rows, heads, dim) and (rows, heads, dim), as kernels need it."""

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_rows

# Names of kernel arguments whose values must not cause a compilation: slices of index tensors may start at any address.
INDICES = ["cache_seqlens_ptr", "block_table_ptr", "table_stride", "slot_mapping_ptr", "positions_ptr"]
# Keys and values that stay in the L2 cache together; an H100 has 50 MB, an A100 40 MB.
L2_BUDGET_BYTES = 32 << 20


def without_dim(strides):
    """Strides (batch, row, head) from those of a tensor; the batch stride of a packed tensor is 0."""
    return strides[:-1] if len(strides) == 4 else (0, *strides[:-1])


def slots_of_packed(k_cache, v_cache):
    """Views of a packed cache with the order of dimensions of others: keys (num_pages, page_size, heads, dim / x, x),
    values (num_pages, page_size, heads, dim)."""
    return k_cache.permute(0, 3, 1, 2, 4), v_cache.permute(0, 3, 1, 2)


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """(..., heads, rows) for q (..., rows, heads, dim)."""
    *batch, rows, heads, _ = q.shape
    return *batch, heads, rows


def new_outputs(
    q: Tensor, v: Tensor, wants_lse: bool = True, out: Tensor | None = None, lse: Any = None
) -> tuple[Tensor, Any]:
    """Uninitialised out (..., rows, heads, v's head dim) and lse (..., heads, rows), or those given; lse may be None.

    out has q's dtype. lse is fp32; fp64 for a reference in fp64.
    """
    shape = q.shape
    if out is None:
        like_q = v.shape[-1] == shape[-1] and q.is_contiguous()
        out = torch.empty_like(q) if like_q else q.new_empty((*shape[:-1], v.shape[-1]))
    if lse is not None or not wants_lse:
        return out, lse
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((*shape[:-3], shape[-2], shape[-3]), dtype=dtype)


class Outputs(NamedTuple):
    """Memory of contiguous results: (shape, strides). new_empty_strided takes two thirds of the time of new_empty."""

    out: tuple[tuple[int, ...], tuple[int, ...]]  # (..., rows, heads, head_dim_v)
    lse: tuple[tuple[int, ...], tuple[int, ...]]  # (..., heads, rows)
    lse_dtype: torch.dtype

    def new(self, q: Tensor, wants_lse: bool, out: Any = None, lse: Any = None) -> tuple[Tensor, Any]:
        """Uninitialised out, as q, and lse, or those given; lse may be None."""
        if out is None:
            out = q.new_empty_strided(*self.out)
        if lse is None and wants_lse:
            lse = q.new_empty_strided(*self.lse, dtype=self.lse_dtype)
        return out, lse


def outputs_of(shape: tuple[int, ...], head_dim_v: int, dtype: torch.dtype) -> Outputs:
    """The Outputs for q of this shape (..., rows, heads, dim)."""
    *batch, rows, heads, _ = shape
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32  # the reference computes in it
    shapes = (*batch, rows, heads, head_dim_v), (*batch, heads, rows)
    return Outputs(*((one, contiguous_strides(one)) for one in shapes), lse_dtype)


known_outputs = functools.lru_cache(maxsize=1024)(outputs_of)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod([max(1, size) for size in shape[i + 1 :]]) for i in range(len(shape)))


class Layout(NamedTuple):
    """What of a tensor a plan may depend on, besides its address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Layouts:
    """The Layout of each tensor of a call by its name, None where none is given.

    All calls that are alike share one, which checks have found: so it is compared by identity, and to find plans by it
    takes no time.
    """

    def __init__(self, arguments: dict[str, Any]):
        for name, x in arguments.items():
            layout = Layout(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else None
            setattr(self, name, layout)

    def of(self, names):
        return [getattr(self, name) for name in names]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def clear_outputs(out, lse):
    """Store what rows without a sequence hold, where no program runs: out 0, lse -inf."""
    out.zero_()
    if lse is not None:
        lse.fill_(float("-inf"))


def tiles_each(longest, num_rows, batch, block):
    """Tiles of each sequence: enough for the longest, which cannot be longer than num_rows.

    num_rows are the rows of the packed tensor, or of one sequence of a dense batch. There are more tiles where the host
    knows that a packed batch has rows after its last sequence, see `spare_rows`.
    """
    check_rows("q", num_rows)
    return -(-max(min(longest, num_rows), -(-num_rows // batch)) // block) if batch else 0


def batch_head_strides(x):
    """Strides of (batch, head) of a tensor (batch, heads), or (heads,) for every batch."""
    return x.stride() if x.ndim == 2 else (0, x.stride(0))


def heads_of_lse(lse):
    """How many heads the contiguous log-sum-exp (batch, heads, rows) has of which lse has all or some heads."""
    return lse.stride(0) // max(1, lse.shape[-1])


def lse_strides(lse):
    """Strides of (batch, row, head) of a tensor (batch, heads, rows) or (heads, rows)."""
    return (lse.stride(0), lse.stride(2), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(1), lse.stride(0))


def strides_are_wide(num_rows, *strides):
    """Whether num_rows rows span 2^31 elements or more, so that 32-bit offsets do not suffice."""
    return any(num_rows * s[-3] >= 2**31 for s in strides)


def vector_elements(element_size, *strides):
    """Elements that a thread loads at once: 16 bytes if all strides but the last are multiples of that, otherwise 1."""
    vector = 16 // element_size
    return vector if all(stride % vector == 0 for s in strides for stride in s[:-1]) else 1


def aligned_elements(element_size, base, *strides):
    """Elements of at most 16 bytes together whose size divides all strides but the last, and base in bytes."""
    return max(1, math.gcd(16, base, *(stride * element_size for s in strides for stride in s[:-1])) // element_size)


def heads_in_l2(bytes_per_head_kv, group_size, num_heads):
    """Number of query heads whose keys and values fit in the L2 cache together.

    At least the group of one KV head. At most num_heads, the heads of all sequences: tiles * heads then stays within
    the number of programs, which has 32 bits in a kernel.
    """
    return max(1, min(max(1, L2_BUDGET_BYTES // max(1, bytes_per_head_kv)) * group_size, num_heads))
