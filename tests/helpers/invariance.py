"""Batches of the same sequences, which differ in everything that a batch-invariant result must not depend on."""

import contextlib
import itertools
from unittest import mock

import torch

from triton_attn._host.tuned import forget_plans
from triton_attn.merge import splits

KEYS = 128  # of a split, so that short sequences have several


@contextlib.contextmanager
def short_splits(launcher, in_turn):
    """Splits of KEYS keys, computed in turn by one program, each by its own, or as the cost model says (None)."""
    fixed_splits = splits.fixed_splits

    def chosen(work, num_keys):
        count, by_cost = fixed_splits(work, num_keys)
        return count, by_cost if in_turn is None else in_turn and count > 1

    with (
        mock.patch.object(splits, "FIXED_KEYS", KEYS),
        mock.patch.object(launcher, "FIXED_KEYS", KEYS),
        mock.patch.object(launcher, "fixed_splits", chosen),
    ):
        forget_plans()
        yield
    forget_plans()


def packed(parts, tables, tensors, device, spare):
    """The rows of tensors (sequence, query, ...) that parts have, cu_seqlens_q, the longest, lengths and the table."""
    counts = [end - first for _, first, end in parts]
    rows = [torch.cat([x[i, first:end] for i, first, end in parts]) for x in tensors]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
    lengths = torch.tensor([end for *_, end in parts], dtype=torch.int32, device=device)
    table = torch.nn.functional.pad(tables[[i for i, *_ in parts]], (0, spare), value=2**31 - 1)
    return rows, cu_seqlens, max(counts), lengths, table
