"""Token ids as callers give them, as arrays."""

from collections.abc import Iterable
from itertools import chain
from numbers import Integral

import numpy as np
import torch

from .._host.checks import check_length, fail
from .arrays import from_list

ONE_EACH = np.ones(1, np.int64)
ONE_EACH.flags.writeable = False
ALL_LISTS = {list}


def as_ids(token_ids, name="token_ids"):
    """Ids of one sequence, a flat list or array: int64, (n,)."""
    if type(token_ids) is not list:
        if isinstance(token_ids, torch.Tensor) and token_ids.device.type != "cpu":
            fail(name, "numbers on the host", f"a tensor on {token_ids.device}")
        if hasattr(token_ids, "dtype"):
            ids = np.asarray(token_ids)
            if ids.ndim == 1 and np.can_cast(ids.dtype, np.int64):
                return ids.astype(np.int64)
            token_ids = ids.tolist()
        if not isinstance(token_ids, Iterable):
            fail(name, "a flat list of int64 numbers", type(token_ids).__name__, TypeError)
        token_ids = list(token_ids)
    try:
        return from_list(token_ids)
    except (TypeError, OverflowError) as error:
        got = f"a list with other entries ({error})"
    fail(name, "a flat list of int64 numbers", got, TypeError)


def as_batch(token_ids, batch):
    """What `extend` takes, as (numbers of new tokens, all ids in a row, mask of sequences without ids).

    The numbers are (batch,), or ONE_EACH if all are 1. ids are those of the sequences that have any, None if none has;
    the mask is None if all have ids. What it takes of memory is what it is given, whatever the numbers are.
    """
    lists = ids = unknown = None
    if _is_list_of_lists(token_ids):  # the form of most calls
        lists, counts = token_ids, [*map(len, token_ids)]
    elif isinstance(token_ids, Integral):
        count = check_length("token_ids", token_ids)
        counts, unknown = [count] * batch, np.full(batch, count > 0)
    elif hasattr(token_ids, "dtype"):
        if token_ids.ndim != 2:
            fail("token_ids", f"shape ({batch}, n)", f"shape {tuple(token_ids.shape)}")
        counts, ids = [token_ids.shape[1]] * len(token_ids), as_ids(token_ids.reshape(-1))
    else:
        if not isinstance(token_ids, Iterable):
            fail("token_ids", f"one entry for each of {batch} sequences", type(token_ids).__name__, TypeError)
        items = [check_length("token_ids", x) if isinstance(x, Integral) else as_ids(x).tolist() for x in token_ids]
        unknown = np.array([type(item) is int and item > 0 for item in items], bool)
        lists = [item for item in items if type(item) is list]
        counts = [len(item) if isinstance(item, list) else item for item in items]
    if len(counts) != batch:
        fail("token_ids", f"one entry for each of {batch} sequences", len(counts))
    one_each = counts.count(1) == batch
    if lists:
        if len(lists) == 1:
            (in_a_row,) = lists
        elif one_each:  # twice as fast as a chain
            in_a_row = [token_id for (token_id,) in lists]
        else:
            in_a_row = list(chain.from_iterable(lists))
        ids = as_ids(in_a_row)
    return ONE_EACH if one_each else from_list(counts), ids, unknown


def _is_list_of_lists(x):
    return type(x) is list and {*map(type, x)} == ALL_LISTS
