"""append_kv_cache: fp8 rounding, errors, and code without spills. test_random_append.py has random calls."""

import math

import pytest
import torch
from append_cases import DEVICE, FLOAT8

import triton_attn
from triton_attn import append_kv_cache


@pytest.mark.emulated
@pytest.mark.oldest
@pytest.mark.parametrize("cache_dtype", FLOAT8, ids=str)
def test_fp8_of_every_exponent_and_every_tie(cache_dtype):
    """All fp8 values, all midpoints between two of them, and their fp32 neighbours; infinity, NaN, zeros."""
    codes = torch.arange(127, dtype=torch.uint8).view(cache_dtype).float()
    values = codes[codes.isfinite()]
    ties = (values[1:] + values[:-1]) / 2
    exact = torch.cat([values, ties, torch.tensor([math.inf, 1e30, values[-1] * 1.01])])
    numbers = torch.cat([exact, exact.nextafter(torch.tensor(math.inf)), exact.nextafter(torch.tensor(-math.inf))])
    numbers = torch.cat([numbers, -numbers, torch.tensor([math.nan, 1e-45, -1e-45])])
    k = numbers.view(-1, 1, 1).to(DEVICE)
    cache = torch.empty(len(k), 1, 1, 1, device=DEVICE).to(cache_dtype)
    append_kv_cache(k, k, cache, cache.clone(), torch.arange(len(k), device=DEVICE))
    cache = cache.cpu()

    values = torch.cat([-values.flip(0)[:-1], values])  # the nearest value, found by search
    even = torch.arange(len(values)) % 2 == len(values) // 2 % 2
    clamped = numbers.clamp(values[0], values[-1])
    right = torch.searchsorted(values, clamped).clamp(1, len(values) - 1)
    to_left, to_right = clamped - values[right - 1], values[right] - clamped
    take_right = (to_right < to_left) | ((to_right == to_left) & even[right])
    nearest = torch.where(take_right, values[right], values[right - 1])
    nearest = torch.where(numbers.isnan(), numbers, nearest)
    torch.testing.assert_close(cache.float().flatten(), nearest, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(cache.float().flatten().signbit()[:-3], numbers.signbit()[:-3])


@pytest.mark.oldest
def test_keys_and_values_go_to_their_slots(device):
    """Page by page, K beside V, each with a scale of its own; a token without a slot is not written."""
    k, v = torch.randn(2, 3, 2, 8, device=device)
    pages, expected = torch.zeros(2, 3, 2, 4, 2, 8, device=device)  # of four slots
    slots = torch.tensor([6, -1, 1], device=device)
    append_kv_cache(k, v, pages[:, 0], pages[:, 1], slots, k_scale=0.5, v_scale=4.0)
    expected[1, 0, 2], expected[1, 1, 2], expected[0, 0, 1], expected[0, 1, 1] = k[0] * 2, v[0] / 4, k[2] * 2, v[2] / 4
    assert torch.equal(pages, expected)


def arguments():
    return {
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 4),
        "k_cache": torch.zeros(5, 4, 2, 8),
        "v_cache": torch.zeros(5, 4, 2, 4),
        "slot_mapping": torch.arange(3),
    }


ROPE = {"rope_cos": torch.ones(7, 4), "rope_sin": torch.zeros(7, 4), "positions": torch.arange(3)}
WRONG = [
    ({"k": [1.0]}, TypeError, "k: expected a tensor"),
    ({"k": torch.zeros(3, 2)}, ValueError, "k: expected shape"),
    ({"k": torch.zeros(3, 2, 8, dtype=torch.float64)}, TypeError, "k: expected torch.float16"),
    ({"k": torch.zeros(3, 2, 16)[..., ::2]}, ValueError, "k: expected a contiguous last"),
    ({"v": torch.zeros(3, 1, 4)}, ValueError, r"v: expected shape \(3, 2, head_dim_v\)"),
    ({"v": torch.zeros(3, 2, 4).half()}, TypeError, "v: expected torch.float32"),
    ({"k_cache": torch.zeros(5, 4, 2, 4)}, ValueError, r"k_cache: expected shape \(num_pages, page_size, 2, 8\)"),
    ({"k_cache": torch.zeros(5, 2, 2, 4, 4)}, ValueError, r"k_cache: expected shape .*got shape \(5, 2, 2, 4, 4\)"),
    ({"k_cache": torch.zeros(5, 4, 2, 8).half()}, TypeError, "k_cache: expected torch.float32 or"),
    ({"v_cache": torch.zeros(5, 2, 2, 4)}, ValueError, r"v_cache: expected shape \(5, 4, 2, 4\)"),
    ({"v_cache": torch.zeros(5, 4, 2, 4).to(FLOAT8[0])}, TypeError, "v_cache: expected torch.float32"),
    ({"slot_mapping": torch.arange(4)}, ValueError, r"slot_mapping: expected shape \(3\)"),
    ({"slot_mapping": torch.arange(3, dtype=torch.int32)}, TypeError, "slot_mapping: expected torch.int64"),
    ({"slot_mapping": torch.arange(6)[::2]}, ValueError, "slot_mapping: expected a contiguous"),
    ({"k_scale": "1"}, TypeError, "k_scale: expected a number"),
    ({"k_scale": 0.0}, ValueError, "k_scale: expected a number above 0"),
    ({"v_scale": math.inf}, ValueError, "v_scale: expected a finite number"),
    ({"v_scale": torch.ones(3)}, ValueError, "v_scale: expected shape"),
    ({"v_scale": torch.ones(2).half()}, TypeError, "v_scale: expected torch.float32"),
    ({"positions": torch.arange(3)}, TypeError, "rope_cos, rope_sin, positions: expected all three or none"),
    (ROPE | {"rope_cos": torch.ones(7, 5)}, ValueError, "rope_sin: expected shape"),
    (ROPE | {"rope_sin": torch.ones(7, 4).half()}, TypeError, "rope_sin: expected torch.float32"),
    (ROPE | {"rope_cos": torch.ones(7, 5), "rope_sin": torch.ones(7, 5)}, ValueError, "rope_cos: expected 1 to 4"),
    (ROPE | {"positions": torch.zeros(3)}, TypeError, "positions: expected torch.int32"),
    (ROPE | {"rope_interleaved": 1}, TypeError, "rope_interleaved: expected a bool"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        append_kv_cache(**arguments() | change)


BAD_VALUES = [
    ({"slot_mapping": torch.tensor([0, 20, 1])}, r"slot_mapping\[1\]: expected a slot below 20, got 20"),
    ({"slot_mapping": torch.tensor([7, -1, 7])}, r"slot_mapping\[2\].*also that of token 0"),
    (ROPE | {"positions": torch.tensor([0, 6, 7])}, r"positions\[2\]: expected 0 to 6, got 7"),
    (ROPE | {"positions": torch.tensor([0, -1, 6])}, r"positions\[1\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD_VALUES)
def test_values_are_checked_when_asked(change, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        append_kv_cache(**arguments() | change, check_values=True)
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        append_kv_cache(**arguments() | change)


@pytest.mark.ci(but_each=3)
@pytest.mark.compiled
@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.oldest), "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *FLOAT8], ids=str)
def test_compiles_without_spills(arch, dtype):
    k = torch.zeros(64, 8, 128, dtype=torch.bfloat16)
    caches = [torch.zeros(8, 16, 8, 128, dtype=torch.bfloat16).to(dtype) for _ in range(2)]
    rope = {"rope_cos": torch.ones(99, 64), "rope_sin": torch.ones(99, 64), "positions": torch.arange(64)}
    with triton_attn.toolchain.compile_only(arch) as launches:
        append_kv_cache(k, k, *caches, torch.arange(64), k_scale=0.5, v_scale=torch.ones(8), **rope)
    (launch,) = launches
    assert launch.spill_bytes == 0


@pytest.mark.oldest
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_rotated_is_stored_as_it_is(value, interleaved, device):
    """Also beside an infinite or NaN element; 8 of 16 dimensions are rotated."""
    k = torch.randn(1, 1, 16, device=device)
    k[..., 9] = k[..., 12] = value
    k_cache, v_cache = (torch.zeros(1, 4, 1, 16, device=device) for _ in range(2))
    angles = {"rope_cos": torch.rand(4, 4, device=device), "rope_sin": torch.rand(4, 4, device=device)}
    where = {"positions": torch.ones(1, dtype=torch.int32, device=device), "rope_interleaved": interleaved}
    append_kv_cache(k, k, k_cache, v_cache, torch.zeros(1, dtype=torch.int64, device=device), **where, **angles)
    assert k_cache[0, 0, 0, :8].isfinite().all()
    torch.testing.assert_close(k_cache[0, 0, 0, 8:], k[0, 0, 8:], rtol=0, atol=0, equal_nan=True)
