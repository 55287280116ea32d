"""What travels through kernels by name: NamedTuples as kernel arguments, and as arguments of the functions they call.

Triton specialises the elements of a tuple one by one and cannot be told not to. So lengths, and what follows from them,
are arguments of their own: a new length must not mean a new compilation. TMA descriptors are too, because launchers
before Triton 3.8 expand them nowhere else. A function may return a NamedTuple of tensors alone: Triton 3.6 turns
constants that are returned into tensors, and has none for None. There a string in a constexpr NamedTuple also needs a
constexpr of its own before it is passed on.
"""

from typing import NamedTuple


class Strides(NamedTuple):
    """In elements. A packed tensor has batch stride 0; a cache has pages or sequences, slots and heads."""

    batch: int
    row: int
    head: int


class View(NamedTuple):
    """A tensor (batch, rows, heads, dim), or (rows, heads, dim), whose last dimension is contiguous."""

    ptr: object
    strides: Strides


class Splits(NamedTuple):
    """Results of one split of the keys after the other: the View of the first, and the stride to the next."""

    view: View
    split_stride: int


class Sequences(NamedTuple):
    """Where the sequences of a packed batch start; None and None in a dense batch."""

    cu_seqlens_q_ptr: object
    cu_seqlens_k_ptr: object


class Heads(NamedTuple):
    """Heads of one sequence, and query heads per KV head."""

    num: int
    group_size: int


class Window(NamedTuple):
    """Keys that a query sees to the left and to the right of its own position; None is no limit and costs nothing."""

    left: int | None
    right: int | None


class Dropout(NamedTuple):
    """Weights whose 31 random bits reach the threshold are kept, and multiplied with scale."""

    seed_ptr: object
    threshold: int
    scale: float


class Scores(NamedTuple):
    """What is done to q . k before the softmax: times scale_log2 = softmax_scale * log2(e), capped, less ALiBi, masked.

    softcap is in natural units. alibi is the View of the slopes, (batch, 0, head). None is none.
    """

    scale_log2: float
    softcap: float | None
    alibi: View | None
    window: Window


class Scale(NamedTuple):
    """A factor: a number, or a pointer to one for each head, with head_stride 0 to one for all.

    No field is None: Triton 3.6 cannot compare a tuple that holds None with None.
    """

    value: object
    head_stride: int


class Scales(NamedTuple):
    """Of a cache's keys and values; None is 1."""

    k: Scale | None
    v: Scale | None


def view_of(x):
    """The View of a tensor (batch, rows, heads, dim), or (rows, heads, dim)."""
    strides = x.stride()
    return View(x, Strides(*strides[:-1]) if len(strides) == 4 else Strides(0, *strides[:-1]))


def scale_of(scale):
    """The Scale of a number, or of a tensor of one element or one per head; None of None."""
    if scale is None:
        return None
    return Scale(scale, min(1, scale.numel() - 1) if hasattr(scale, "numel") else 0)
