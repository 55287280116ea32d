"""Launches and what belongs to them."""

from unittest import mock

import torch

from triton_attn._host.device import hold_pinned


def test_what_is_elsewhere_is_held_by_a_transfer():
    """Of one element of each tensor that has any, on the device's stream."""
    device, moved = torch.device("meta"), []
    to = torch.Tensor.to
    elsewhere = torch.zeros(4, 6)[1:, ::2]
    tensors = elsewhere, torch.zeros(0, 3), torch.zeros(3, device=device), torch.zeros(2, dtype=torch.float8_e4m3fn)

    def record(x, *args, **options):
        moved.append((x.shape, x.data_ptr(), args, options))
        return to(x, *args, **options)

    with mock.patch.object(torch.Tensor, "to", record):
        hold_pinned(tensors, device)
    assert moved == [((1,), x.data_ptr(), (device,), dict(non_blocking=True)) for x in (elsewhere, tensors[3])]
