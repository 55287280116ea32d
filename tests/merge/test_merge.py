"""merge_attention against its definition, and against attention over all keys at once."""

import itertools
import math

import pytest
import torch
from merge_cases import DEVICE, INTERPRETED, in_float64, parts_of

from triton_attn import flash_attention, merge_attention, reference
from triton_attn.testing import assert_close_to_reference
from triton_attn.toolchain import guard

# Inputs contain NaN on purpose, and numpy warns about it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="guards interpreted kernels")


@pytest.mark.oldest
@pytest.mark.parametrize("cuts", [(0, 0, 30), (10,), (1, 2, 3, 29)])
def test_splits_merge_to_attention_over_all_keys(cuts):
    q, k, v = (torch.randn(2, rows, heads, 32, device=DEVICE) for rows, heads in ((5, 4), (30, 2), (30, 2)))
    expected, expected_lse = flash_attention(q, k, v, return_lse=True)
    bounds = [0, *cuts, 30]
    parts = [flash_attention(q, k[:, lo:hi], v[:, lo:hi], return_lse=True) for lo, hi in itertools.pairwise(bounds)]
    out, lse = merge_attention(*map(torch.stack, zip(*parts)))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_more_splits_than_are_loaded_at_once():
    """Each is as heavy as all before it, so that sums of earlier loads shrink."""
    outs, _ = parts_of(0, 70, 1, 2, 3, 24, torch.float32, 0.0, 1.0)
    lses = (math.log(2) * torch.arange(70.0)).view(70, 1, 1, 1).expand(70, 1, 3, 2).to(DEVICE)
    for result, exact in zip(merge_attention(outs, lses), in_float64(outs, lses)):
        assert_close_to_reference(result, exact, floor=1e-5)


@interpreted
def test_strides_may_be_any():
    outs, lses = parts_of(0, 3, 2, 5, 4, 24, torch.float32, 0.3, 1.0)
    expected = merge_attention(outs, lses)
    strided = outs.permute(3, 0, 2, 1, 4).contiguous().permute(1, 3, 2, 0, 4), lses.mT.contiguous().mT
    with guard():
        assert all(map(torch.equal, merge_attention(*strided), expected))


@pytest.mark.emulated
@pytest.mark.parametrize("no_key", [-math.inf, math.inf], ids=["ours", "that of flash-attn"])
def test_the_identity_changes_nothing(no_key):
    outs, lses = parts_of(0, 1, 2, 5, 4, 24, torch.float16, 0.0, 1.0)
    nothing = torch.full_like(outs, math.nan), torch.full_like(lses, no_key)
    out, lse = merge_attention(torch.cat([nothing[0], outs]), torch.cat([nothing[1], lses]))
    assert torch.equal(out, outs[0])
    torch.testing.assert_close(lse, lses[0])
    for out, lse in (merge_attention(*nothing), reference.merge_attention(*nothing)):
        assert (out == 0).all()
        assert (lse == -math.inf).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"outs": None}, TypeError, "outs: expected a tensor, got NoneType"),
        ({"outs": torch.zeros(2, 1, 3, 4)}, ValueError, r"outs: expected shape \(num_splits, batch"),
        ({"outs": torch.zeros(2, 1, 3, 4, 8, dtype=torch.int32)}, TypeError, "outs: expected torch.float16 or"),
        ({"outs": torch.zeros(2, 1, 3, 4, 513)}, ValueError, "outs: expected a head dimension of 1 to 512, got 513"),
        ({"outs": torch.zeros(2, 1, 3, 4, 16)[..., ::2]}, ValueError, "outs: expected a contiguous last dimension"),
        ({"outs": torch.zeros(2, 1, 3, 4, 8, requires_grad=True)}, NotImplementedError, "outs: gradients are"),
        (
            {"lses": torch.zeros(2, 1, 3, 4)},
            ValueError,
            r"lses: expected shape \(2, 1, 4, 3\), got shape",
        ),
        ({"lses": torch.zeros(2, 1, 4, 3).half()}, TypeError, "lses: expected torch.float32, got torch.float16"),
        ({"lses": torch.zeros(2, 1, 4, 3, device="meta")}, ValueError, "lses: expected device cpu, got meta"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"outs": torch.zeros(2, 1, 3, 4, 8), "lses": torch.zeros(2, 1, 4, 3)} | changes
    with pytest.raises(error, match=message):
        merge_attention(**arguments)
