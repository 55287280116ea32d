"""append_kv_cache: the kernel against the reference, the reference against the formula written as loops."""

import contextlib
import math

import pytest
import torch
from append_cases import DEVICE, DTYPES, INTERPRETED, LAYOUTS, bits, draw_rope, draw_slots, strided
from hypothesis import given
from hypothesis import strategies as st

import triton_attn
from triton_attn import append_kv_cache, reference
from triton_attn.testing import guard

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@st.composite
def problems(draw):
    """(positional arguments, keyword arguments) of append_kv_cache."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    cache_dtype = draw(st.sampled_from([dtype, *FLOAT8]))
    num_tokens, num_heads = draw(st.integers(0, 40)), draw(st.integers(1, 5))
    head_dim, head_dim_v = draw(st.integers(2, 160)), draw(st.integers(1, 160))
    page_size = draw(st.sampled_from([1, 5, 8, 16]))
    num_pages = draw(st.integers(1, 4)) + num_tokens // page_size

    def tensor(*shape, dtype=dtype):
        return strided(shape, dtype, draw(st.sampled_from(LAYOUTS)), generator)

    k, v = tensor(num_tokens, num_heads, head_dim), tensor(num_tokens, num_heads, head_dim_v)
    k_cache = tensor(num_pages, page_size, num_heads, head_dim, dtype=cache_dtype)
    v_cache = tensor(num_pages, page_size, num_heads, head_dim_v, dtype=cache_dtype)
    slots, skipped = draw_slots(draw, num_tokens, num_pages * page_size, generator)
    options = {}
    for name in ("k_scale", "v_scale"):
        number = (torch.rand(num_heads, generator=generator) + 0.01).to(DEVICE)
        options[name] = draw(st.sampled_from([None, 0.5, float(number[0]), number[:1], number]))
    if draw(st.booleans()):
        options |= draw_rope(draw, skipped, head_dim, dtype, generator)
    return (k, v, k_cache, v_cache, slots), options


def written_by(function, args, options):
    """Copies, laid out as they are, of the caches after a call."""
    k, v, *caches, slots = args
    buffers = [cache._base if cache._base is not None else cache for cache in caches]
    copies = [
        buffer.clone().as_strided(cache.shape, cache.stride(), cache.storage_offset())
        for buffer, cache in zip(buffers, caches)
    ]
    function(k, v, *copies, slots, **options)
    return copies


@pytest.mark.oldest
@given(problems())
def test_kernel_writes_what_the_reference_writes(problem):
    args, options = problem
    expected = written_by(reference.append_kv_cache, args, options)
    with guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        actual = written_by(append_kv_cache, args, options | {"check_values": True})
    for ours, theirs in zip(actual, expected):
        if INTERPRETED or "rope_cos" not in options:
            assert torch.equal(bits(ours), bits(theirs))
        else:  # a GPU fuses the multiplication and the addition of a rotation, which moves a rounding
            eps = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=eps, atol=1e-5 * eps, equal_nan=True)
    if INTERPRETED:
        assert accesses.launches == (len(args[0]) > 0)


@given(problems())
def test_reference_is_the_formula(problem):
    (k, v, k_cache, v_cache, slots), options = problem
    num_tokens, num_heads = k.shape[:2]
    expected_k, expected_v = k_cache.float().clone(), v_cache.float().clone()
    page_size = k_cache.shape[1]
    half = options["rope_cos"].shape[1] if "rope_cos" in options else 0
    for t in range(num_tokens):
        if slots[t] < 0:
            continue
        page, offset = divmod(slots[t].item(), page_size)
        for h in range(num_heads):
            rotated = k[t, h].float().clone()
            for i in range(half):
                a, b = (2 * i, 2 * i + 1) if options["rope_interleaved"] else (i, i + half)
                cos, sin = (options[name][options["positions"][t], i].float() for name in ("rope_cos", "rope_sin"))
                x, y = k[t, h, a].float(), k[t, h, b].float()
                rotated[a], rotated[b] = x * cos - y * sin, y * cos + x * sin
            expected_k[page, offset, h] = rounded(rotated / scale_of(options["k_scale"], h), k_cache.dtype)
            expected_v[page, offset, h] = rounded(v[t, h].float() / scale_of(options["v_scale"], h), v_cache.dtype)
    actual_k, actual_v = written_by(reference.append_kv_cache, (k, v, k_cache, v_cache, slots), options)
    torch.testing.assert_close(actual_k.float(), expected_k, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(actual_v.float(), expected_v, rtol=0, atol=0, equal_nan=True)


def scale_of(scale, head):
    if isinstance(scale, torch.Tensor):
        return scale[head % len(scale)]
    return 1.0 if scale is None else scale


def rounded(x, dtype):
    limit = torch.finfo(dtype).max if dtype in FLOAT8 else math.inf
    return x.clamp(-limit, limit).to(dtype).float()


@pytest.mark.oldest
@pytest.mark.parametrize("cache_dtype", FLOAT8, ids=str)
def test_fp8_of_every_exponent_and_every_tie(cache_dtype):
    """All fp8 numbers, all numbers halfway between two of them, and their fp32 neighbours; infinity, NaN, zeros."""
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

    values = torch.cat([-values.flip(0)[:-1], values])  # the nearest, found by search
    even = torch.arange(len(values)) % 2 == len(values) // 2 % 2
    clamped = numbers.clamp(values[0], values[-1])
    right = torch.searchsorted(values, clamped).clamp(1, len(values) - 1)
    to_left, to_right = clamped - values[right - 1], values[right] - clamped
    take_right = (to_right < to_left) | ((to_right == to_left) & even[right])
    nearest = torch.where(take_right, values[right], values[right - 1])
    nearest = torch.where(numbers.isnan(), numbers, nearest)
    torch.testing.assert_close(cache.float().flatten(), nearest, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(cache.float().flatten().signbit()[:-3], numbers.signbit()[:-3])


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


@pytest.mark.compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *FLOAT8], ids=str)
def test_compiles_without_spills(arch, dtype):
    k = torch.zeros(64, 8, 128, dtype=torch.bfloat16)
    caches = [torch.zeros(8, 16, 8, 128, dtype=torch.bfloat16).to(dtype) for _ in range(2)]
    rope = {"rope_cos": torch.ones(99, 64), "rope_sin": torch.ones(99, 64), "positions": torch.arange(64)}
    with triton_attn.testing.compile_only(arch) as launches:
        append_kv_cache(k, k, *caches, torch.arange(64), k_scale=0.5, v_scale=torch.ones(8), **rope)
    (launch,) = launches
    assert launch.spill_bytes == 0
