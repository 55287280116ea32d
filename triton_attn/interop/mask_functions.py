"""The pattern of a transformers mask function: it is called once, with stand-ins for its indices.

A mask function says whether the query at q_idx of row batch_idx sees the key at kv_idx. Its comparisons are recorded as
a window around the query and a table of sequences. Other patterns are refused. The function is called rather than
inspected, because torch.compile traces calls but not closures.
"""

import math
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

UNLIMITED = math.inf


class Pattern(NamedTuple):
    """The keys that a query sees to the left and right of its own position. If packed, also an integer for each token,
    which distinguishes the sequences of a row. Or: it sees no keys.
    """

    left: float = UNLIMITED
    right: float = UNLIMITED
    sequence_ids: torch.Tensor | None = None
    shows_nothing: bool = False


def pattern_of(mask_function, end):
    """The pattern of a mask function over positions below `end`.

    Raises:
        NotImplementedError: it is not a window around the query within the query's sequence.
    """
    try:
        with _Tables():
            shown = mask_function(_Row(), _Row(), _Index(False, end), _Index(True, end))
    except (TypeError, AttributeError, IndexError) as error:
        raise _refusal(error) from None
    if not isinstance(shown, _Shown):
        raise _refusal(f"a result of type {type(shown).__name__}")
    if shown.nearest > shown.farthest:  # a window of 0: Qwen2-MoE makes this mask, but no layer uses it
        return Pattern(right=0, shows_nothing=True)
    if not shown.nearest <= 0 <= shown.farthest:
        raise _refusal("a window without the query's own position")
    if shown.positions is not None and shown.sequence_ids is None:
        raise _refusal("positions that restart without sequences")
    return Pattern(shown.farthest, -shown.nearest, shown.sequence_ids)


def _refusal(got):
    return NotImplementedError(
        "mask_function: triton_attn supports causal, sliding window, bidirectional and packed masks, and chunks if "
        f"one chunk holds all keys, got {got}"
    )


class _Shown:
    """Keys with nearest <= q_idx - kv_idx <= farthest. The distance is taken between `positions` if they are given. If
    sequence_ids is given, only keys of the query's own sequence.
    """

    device = None

    def __init__(self, nearest=-UNLIMITED, farthest=UNLIMITED, positions=None, sequence_ids=None):
        self.nearest, self.farthest, self.positions, self.sequence_ids = nearest, farthest, positions, sequence_ids

    def to(self, device):
        return self

    def __and__(self, other):
        if not isinstance(other, _Shown):
            raise _refusal(f"`&` with {type(other).__name__}")
        nearest, farthest = max(self.nearest, other.nearest), min(self.farthest, other.farthest)
        positions = _the_one(self.positions, other.positions)
        return _Shown(nearest, farthest, positions, _the_one(self.sequence_ids, other.sequence_ids))

    def __or__(self, other):
        """The union of two windows, which must be one window."""
        if not isinstance(other, _Shown) or self.sequence_ids is not None or other.sequence_ids is not None:
            raise _refusal("`|` of masks that are not windows")
        for one, both in ((self, other), (other, self)):
            if one.nearest > one.farthest:
                return both
        if max(self.nearest, other.nearest) > min(self.farthest, other.farthest) + 1:
            raise _refusal("a window with a gap")
        nearest, farthest = min(self.nearest, other.nearest), max(self.farthest, other.farthest)
        return _Shown(nearest, farthest, _the_one(self.positions, other.positions))

    def __bool__(self):
        raise _refusal("a branch on visibility")


def _the_one(table, other):
    if table is not None and other is not None and table is not other:
        raise _refusal("two tables")
    return other if table is None else table


class _Index:
    """The position of a query or a key below `end`, plus shift. With a table (batch, end): its entry, plus shift."""

    device = None

    def __init__(self, is_key, end, table=None, shift=0):
        self.is_key, self.end, self.table, self.shift = is_key, end, table, shift

    def new_ones(self, size, dtype=None):
        return _Shown()

    def new_zeros(self, size, dtype=None):
        return _Shown(UNLIMITED, -UNLIMITED)

    def __add__(self, number):
        if not isinstance(number, int):
            raise _refusal(f"an index plus {type(number).__name__}")
        return _Index(self.is_key, self.end, self.table, self.shift + number)

    def __sub__(self, other):
        if isinstance(other, _Row):
            return _IndexInRow(self.end)
        if not isinstance(other, _Index):
            return self + -other
        if self.is_key == other.is_key or self.table is not other.table:
            raise _refusal("a difference that is not between a query's and a key's position")
        return _Distance(-1 if self.is_key else 1, self.shift - other.shift, self.table)

    def __le__(self, other):
        return self - _an_index(other) <= 0

    def __lt__(self, other):
        return self - _an_index(other) < 0

    def __ge__(self, other):
        if isinstance(other, int) and other == 0 and self.shift == 0 and self.table is None:
            return _Shown()  # always true, since no position is negative
        return self - _an_index(other) >= 0

    def __gt__(self, other):
        return self - _an_index(other) > 0

    def __eq__(self, other):
        other = _an_index(other)
        of_a_query_and_a_key = self.is_key != other.is_key
        if not of_a_query_and_a_key or self.table is None or self.table is not other.table or self.shift != other.shift:
            raise _refusal("`==` between values other than a query's and a key's sequence")
        return _Shown(sequence_ids=self.table)


def _an_index(x):
    if not isinstance(x, _Index):
        raise _refusal(f"an index compared with {type(x).__name__}")
    return x


class _Distance:
    """sign * (q_idx - kv_idx) + shift, between the positions of a table if it is given."""

    def __init__(self, sign, shift, table):
        self.sign, self.shift, self.table = sign, shift, table

    def __neg__(self):
        return _Distance(-self.sign, -self.shift, self.table)

    def __abs__(self):
        return _Size(self)

    def __le__(self, number):
        if not isinstance(number, int):
            raise _refusal(f"a distance compared with {type(number).__name__}")
        bound = number - self.shift
        nearest, farthest = (-UNLIMITED, bound) if self.sign > 0 else (-bound, UNLIMITED)
        return _Shown(nearest, farthest, self.table)

    def __lt__(self, number):
        return self <= number - 1

    def __ge__(self, number):
        return -self <= -number

    def __gt__(self, number):
        return -self <= -number - 1


class _Size:
    """The absolute value of a distance."""

    def __init__(self, distance):
        self.distance = distance

    def __le__(self, number):
        return (self.distance <= number) & (self.distance >= -number)

    def __lt__(self, number):
        return self <= number - 1


class _Row:
    """The index of a row or a head, or the entry of a table (batch,) for it."""


class _IndexInRow:
    """A position minus the row's left padding, or the chunk that contains the position."""

    def __init__(self, end, chunk_size=None):
        self.end, self.chunk_size = end, chunk_size

    def __floordiv__(self, chunk_size):
        return _IndexInRow(self.end, chunk_size)

    def __eq__(self, other):
        if self.chunk_size is None or not isinstance(other, _IndexInRow) or other.chunk_size != self.chunk_size:
            raise _refusal("`==` between values other than a query's and a key's chunk")
        if self.end > self.chunk_size:
            raise _refusal(f"chunks of {self.chunk_size} for {self.end} keys")
        return _Shown()


class _Tables(TorchFunctionMode):
    """Tensors that are indexed with stand-ins."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            table, index = args
            if isinstance(index, _Row) and table.ndim == 1:
                return index
            if isinstance(index, tuple) and len(index) == 2 and isinstance(index[0], _Row) and table.ndim == 2:
                _, position = index
                if isinstance(position, _Index) and position.table is None and position.shift == 0:
                    return _Index(position.is_key, position.end, table)
        return function(*args, **(kwargs or {}))
