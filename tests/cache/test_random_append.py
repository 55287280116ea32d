"""Random calls of append_kv_cache: the kernel against the reference, the reference against the formula as loops."""

import contextlib

import pytest
import torch
from append_cases import DEVICE, DTYPES, INTERPRETED, LAYOUTS, QUANTIZED, assert_rotated, bits, rounded, strided
from append_draws import draw_rope, draw_slots
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_attn import append_kv_cache, reference
from triton_attn.toolchain import guard

pytestmark = pytest.mark.random


@st.composite
def problems(draw):
    """(positional arguments, keyword arguments) of append_kv_cache."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    cache_dtype = draw(st.sampled_from([dtype, *QUANTIZED]))
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
        scales = [None, 0.5, float(number[0]), number[:1], number]
        if cache_dtype in QUANTIZED:
            own = torch.full((num_pages, num_heads, page_size), torch.nan, device=DEVICE)
            scales += [own.transpose(1, 2), own.view(num_pages, page_size, num_heads)]
        options[name] = draw(st.sampled_from(scales))
    if draw(st.booleans()):
        options |= draw_rope(draw, skipped, head_dim, dtype, generator)
    return (k, v, k_cache, v_cache, slots), options


def is_written(scale):
    return getattr(scale, "ndim", 0) == 3


def written_by(function, args, options):
    """Copies of the caches after a call, in the same layout, and of the scales for each token."""
    k, v, *caches, slots = args
    scales = {name: options[name].clone() for name in ("k_scale", "v_scale") if is_written(options[name])}
    options = options | scales
    buffers = [cache._base if cache._base is not None else cache for cache in caches]
    copies = [
        buffer.clone().as_strided(cache.shape, cache.stride(), cache.storage_offset())
        for buffer, cache in zip(buffers, caches)
    ]
    function(k, v, *copies, slots, **options)
    return copies, scales


@pytest.mark.emulated
@pytest.mark.oldest
@settings(max_examples=3 * settings.default.max_examples)  # they take milliseconds
@given(problems())
def test_kernel_writes_what_the_reference_writes(problem):
    args, options = problem
    expected, expected_scales = written_by(reference.append_kv_cache, args, options)
    with guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        actual, scales = written_by(append_kv_cache, args, options | {"check_values": True})
    k, _, k_cache, _, slots = args
    rope = {name: x for name, x in options.items() if name.startswith(("rope", "positions"))}
    rotary_dim = 2 * rope["rope_cos"].shape[1] if rope else 0
    written = slots >= 0
    places = slots[written] // k_cache.shape[1], slots[written] % k_cache.shape[1]
    if rope and "k_scale" in scales:  # by rotated elements, whose last bits differ, and all that is divided by it
        torch.testing.assert_close(scales["k_scale"], expected_scales["k_scale"], rtol=2**-21, atol=0, equal_nan=True)
        codes, expected_codes = (bits(cache).short()[places] for cache in (actual[0], expected[0]))
        assert ((codes - expected_codes).abs() % 255 <= 1).all()  # 255: from 0 to -1 in int8
        rotary_dim = k.shape[2]
        del scales["k_scale"]
    elif rope:
        scale = options["k_scale"]
        scale = 1 if scale is None else torch.as_tensor(scale, device=k.device).double().view(-1, 1)
        rope["positions"] = rope["positions"][written]
        assert_rotated(actual[0].float()[places], k[written], scale, k_cache.dtype, **rope)
    (k_bits, v_bits), (expected_k, expected_v) = (map(bits, caches) for caches in (actual, expected))
    for cache in (k_bits, expected_k):
        cache[(*places, slice(None), slice(rotary_dim))] = 0
    assert torch.equal(k_bits, expected_k)
    assert torch.equal(v_bits, expected_v)
    for name, scale in scales.items():
        assert torch.equal(bits(scale), bits(expected_scales[name]))
    if INTERPRETED:
        assert accesses.launches == (len(args[0]) > 0)


@settings(max_examples=3 * settings.default.max_examples)  # they take milliseconds
@given(problems())
def test_reference_is_the_formula(problem):
    (k, v, k_cache, v_cache, slots), options = problem
    num_tokens, num_heads = k.shape[:2]
    expected_k, expected_v = k_cache.float().clone(), v_cache.float().clone()
    page_size = k_cache.shape[1]
    half = options["rope_cos"].shape[1] if "rope_cos" in options else 0
    scales = {name: options[name].clone() for name in ("k_scale", "v_scale") if is_written(options[name])}
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
            for x, name, cache in ((rotated, "k_scale", expected_k), (v[t, h].float(), "v_scale", expected_v)):
                if name in scales:
                    scale = scales[name][page, offset, h] = token_scale(x, k_cache.dtype)
                else:
                    scale = scale_of(options[name], h)
                cache[page, offset, h] = rounded(x / scale, k_cache.dtype)
    (actual_k, actual_v), actual = written_by(reference.append_kv_cache, (k, v, k_cache, v_cache, slots), options)
    for name, scale in scales.items():
        torch.testing.assert_close(actual[name], scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(actual_k.float(), expected_k, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(actual_v.float(), expected_v, rtol=0, atol=0, equal_nan=True)


def token_scale(x, dtype):
    largest = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}[dtype]
    return torch.tensor(max(max(abs(element) for element in x.tolist()), 0.0)).div(largest).clamp(min=1e-6)


def scale_of(scale, head):
    if isinstance(scale, torch.Tensor):
        return scale[head % len(scale)]
    return 1.0 if scale is None else scale
