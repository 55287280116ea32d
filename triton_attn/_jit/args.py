"""NamedTuples that kernels and their helper functions take as arguments.

Triton specialises each element of a tuple, and no option turns that off. Lengths, and values computed from them, are
therefore arguments of their own: a new length must not cause a compilation. TMA descriptors are arguments of their own
too, because launchers before Triton 3.8 do not expand them inside tuples. A function may return a NamedTuple only of
tensors: Triton 3.6 turns returned constants into tensors and cannot do that with None. On 3.6 a string in a constexpr
NamedTuple must also be assigned to a constexpr before it is passed on.
"""

from typing import NamedTuple


class Strides(NamedTuple):
    """Strides in elements. A packed tensor has batch stride 0. In a cache: of pages or sequences, slots, heads."""

    batch: int
    row: int
    head: int


class View(NamedTuple):
    """A tensor (batch, rows, heads, dim), or (rows, heads, dim), whose last dimension is contiguous."""

    ptr: object
    strides: Strides


class Splits(NamedTuple):
    """Results of the splits of the keys: the View of the first split's, and the stride from split to split."""

    view: View
    split_stride: int


class Sequences(NamedTuple):
    """Pointers to the offsets (batch + 1,) at which the sequences of a packed batch start; None in a dense batch.

    shard_ptr points to (batch, 3): where a part of a longer sequence starts, see `load_shard`. None: whole sequences.
    """

    cu_seqlens_q_ptr: object
    cu_seqlens_k_ptr: object
    shard_ptr: object


class Heads(NamedTuple):
    """Number of query heads, and query heads per KV head."""

    num: int
    group_size: int


class Window(NamedTuple):
    """How many keys a query sees left and right of its own position. None is no limit, and no code is generated."""

    left: int | None
    right: int | None


class ShardWindow(NamedTuple):
    """A Window over the keys of one rank, which takes turns with others: see `KeyShard`."""

    left: int | None
    right: int | None
    rank: int
    num_ranks: int
    interleave: int


class Dropout(NamedTuple):
    """A weight whose 31 random bits are at least threshold is kept and multiplied by scale; the others become 0."""

    seed_ptr: object
    threshold: int
    scale: float


class Scores(NamedTuple):
    """Options of the scores: q . k is multiplied by scale_log2 = softmax_scale * log2(e), capped, biased and masked.

    softcap is in natural units, or None. alibi is the View of the ALiBi slopes, (batch, 0, head), or None.
    """

    scale_log2: float
    softcap: float | None
    alibi: View | None
    window: Window | ShardWindow


class Scale(NamedTuple):
    """A factor: a number, or a pointer to one factor per head. With head_stride 0 all heads share one.

    No field is None: Triton 3.6 cannot compare a tuple that contains None with None.
    """

    value: object
    head_stride: int


class Scales(NamedTuple):
    """Factors of a cache's keys and values; None is 1. Of each, one of the two is None: k or k_tokens, v or v_tokens.

    k_tokens and v_tokens are Views of a factor for each slot and head.
    """

    k: Scale | None
    v: Scale | None
    k_tokens: View | None = None
    v_tokens: View | None = None


NO_SCALES = Scales(None, None)


def view_of(x):
    """The View of a tensor (batch, rows, heads, dim), or (rows, heads, dim)."""
    strides = x.stride()
    return View(x, Strides(*strides[:-1]) if len(strides) == 4 else Strides(0, *strides[:-1]))


def window_of(window, key_shard):
    """The Window (left, right) of all keys, or the ShardWindow of a KeyShard."""
    return Window(*window) if key_shard is None else ShardWindow(*window, *key_shard)


def scales_of(k_scale, v_scale):
    """The Scales of two numbers or tensors, or None. Tensors with three dimensions have a factor for each slot."""
    if k_scale is None and v_scale is None:
        return NO_SCALES
    (k, k_tokens), (v, v_tokens) = _scale_and_view(k_scale), _scale_and_view(v_scale)
    return Scales(k, v, k_tokens, v_tokens)


def _scale_and_view(scale):
    """(Scale, View), of which at most one is not None."""
    if type(scale) is float:  # hasattr and getattr with a default are slow where the attribute is missing
        return Scale(scale, 0), None
    if getattr(scale, "ndim", 0) == 3:
        return None, View(scale, Strides(*scale.stride()))
    return scale_of(scale), None


def scale_of(scale):
    """The Scale of a number, or of a tensor of one element or one per head; None of None."""
    if scale is None:
        return None
    return Scale(scale, min(1, scale.numel() - 1) if hasattr(scale, "numel") else 0)
