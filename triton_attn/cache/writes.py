"""Checks that the functions which write to a cache share."""

import torch

from .._host.checks import (
    check_rope_tables,
    check_tensor,
    fail,
)
from .._host.observers import refuse_gradients, refuse_vmap


def refuse_transforms(names, tensors):
    tensors = dict(zip(names, tensors))
    refuse_gradients(**tensors)
    refuse_vmap(**tensors)


def check_index(name, x, shape, dtypes, device):
    check_tensor(name, x, shape, dtypes, device)
    if not x.is_contiguous():
        fail(name, "a contiguous tensor", f"stride {x.stride(0)}")


def check_rope(name, k, rope_cos, rope_sin, positions):
    given = [x is not None for x in (rope_cos, rope_sin, positions)]
    if not any(given):
        return
    if not all(given):
        fail("rope_cos, rope_sin, positions", "all three or none", f"given: {given}", TypeError)
    check_rope_tables(name, k, rope_cos, rope_sin)
    check_index("positions", positions, (k.shape[0],), (torch.int32, torch.int64), k.device)


def check_append_values(slot_mapping, cache, rope_cos, positions):
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
