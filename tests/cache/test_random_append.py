"""Random calls of append_kv_cache: the kernel against the reference, the reference against the formula as loops."""

import contextlib

import pytest
import torch
from append_cases import DEVICE, DTYPES, FLOAT8, INTERPRETED, LAYOUTS, assert_rotated, bits, rounded, strided
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
    """Copies of the caches after a call, in the same layout."""
    k, v, *caches, slots = args
    buffers = [cache._base if cache._base is not None else cache for cache in caches]
    copies = [
        buffer.clone().as_strided(cache.shape, cache.stride(), cache.storage_offset())
        for buffer, cache in zip(buffers, caches)
    ]
    function(k, v, *copies, slots, **options)
    return copies


@pytest.mark.emulated
@pytest.mark.oldest
@settings(max_examples=3 * settings.default.max_examples)  # they take milliseconds
@given(problems())
def test_kernel_writes_what_the_reference_writes(problem):
    args, options = problem
    expected = written_by(reference.append_kv_cache, args, options)
    with guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        actual = written_by(append_kv_cache, args, options | {"check_values": True})
    k, _, k_cache, _, slots = args
    rope = {name: x for name, x in options.items() if name.startswith(("rope", "positions"))}
    rotary_dim = 2 * rope["rope_cos"].shape[1] if rope else 0
    written = slots >= 0
    places = slots[written] // k_cache.shape[1], slots[written] % k_cache.shape[1]
    if rope:
        scale = options["k_scale"]
        scale = 1 if scale is None else torch.as_tensor(scale, device=k.device).double().view(-1, 1)
        rope["positions"] = rope["positions"][written]
        assert_rotated(actual[0].float()[places], k[written], scale, k_cache.dtype, **rope)
    (k_bits, v_bits), (expected_k, expected_v) = (map(bits, caches) for caches in (actual, expected))
    for cache in (k_bits, expected_k):
        cache[(*places, slice(None), slice(rotary_dim))] = 0
    assert torch.equal(k_bits, expected_k)
    assert torch.equal(v_bits, expected_v)
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
