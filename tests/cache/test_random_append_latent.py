"""Random calls of append_latent_cache: kernel against reference, the reference against rows unpacked byte by byte."""

import contextlib
import math
import struct

import pytest
import torch
from append_cases import (
    CACHE_LAYOUTS,
    DEVICE,
    DTYPES,
    FLOAT8,
    INTERPRETED,
    LAYOUTS,
    Cache,
    assert_rotated,
    bits,
    rounded,
    strided,
)
from append_draws import draw_rope, draw_slots
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_attn import append_latent_cache, reference
from triton_attn._host.latent import latent_parts, latent_row, read_latent_cache
from triton_attn.toolchain import guard

pytestmark = pytest.mark.random


@st.composite
def problems(draw):
    """(kv_latent, k_pe, function that makes a poisoned cache, slots, options of the rotation, scales)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype, is_fp8 = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    num_tokens = draw(st.integers(0, 40))
    if is_fp8:
        kv_lora_rank, rope_dim = 128 * draw(st.integers(1, 4)), 2 * draw(st.integers(1, 40))
    else:
        kv_lora_rank, rope_dim = draw(st.integers(1, 512)), draw(st.sampled_from([0, *range(2, 81)]))
    kv_latent, k_pe = (
        strided((num_tokens, dim), dtype, draw(st.sampled_from(LAYOUTS)), generator) for dim in (kv_lora_rank, rope_dim)
    )
    # Blocks of zeros, and of all magnitudes of the dtype.
    limits = torch.finfo(dtype)
    magnitudes = torch.empty(num_tokens, 4).uniform_(math.log2(limits.tiny), math.log2(limits.max), generator=generator)
    magnitudes = (torch.exp2(magnitudes) * (torch.rand(num_tokens, 4, generator=generator) > 0.1)).to(DEVICE)
    magnitudes = magnitudes.repeat_interleave(128, dim=1)[:, :kv_lora_rank]
    kv_latent.copy_((kv_latent * magnitudes).clamp(limits.min, limits.max))
    page_size = draw(st.sampled_from([1, 5, 16, 64]))
    num_pages = draw(st.integers(1, 4)) + num_tokens // page_size
    width = latent_row(kv_lora_rank, rope_dim)[2] if is_fp8 else kv_lora_rank + rope_dim
    layout = draw(st.sampled_from(sorted(CACHE_LAYOUTS)))
    slots, skipped = draw_slots(draw, num_tokens, num_pages * page_size, generator)
    options = draw_rope(draw, skipped, rope_dim, dtype, generator) if rope_dim and draw(st.booleans()) else {}
    cache_dtype = torch.uint8 if is_fp8 else draw(st.sampled_from([dtype, *FLOAT8]))
    new_cache = (layout, cache_dtype, num_pages, page_size, width)
    return kv_latent, k_pe, new_cache, slots, options, {} if is_fp8 else draw_scales(draw)


def draw_scales(draw):
    """k_scale and k_pe_scale: none, numbers or tensors."""
    names = draw(st.sampled_from([(), ("k_scale",), ("k_pe_scale",), ("k_scale", "k_pe_scale")]))
    scales = {name: draw(st.sampled_from([0.25, 0.3, 7.0])) for name in names}
    as_tensors = draw(st.booleans())
    return {name: torch.tensor([scale], device=DEVICE) if as_tensors else scale for name, scale in scales.items()}


def factors_of(scales):
    """(k_scale, k_pe_scale) as numbers of fp32."""
    k_scale = scales.get("k_scale", 1.0)
    return [torch.as_tensor(x, dtype=torch.float32).item() for x in (k_scale, scales.get("k_pe_scale", k_scale))]


@pytest.mark.emulated
@pytest.mark.oldest
@settings(max_examples=3 * settings.default.max_examples)  # they take milliseconds
@given(problems())
def test_kernel_writes_what_the_reference_writes(problem):
    kv_latent, k_pe, new_cache, slots, options, scales = problem
    ours, theirs = Cache(*new_cache), Cache(*new_cache)
    reference.append_latent_cache(kv_latent, k_pe, theirs.cache, slots, **options, **scales)
    with guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        append_latent_cache(kv_latent, k_pe, ours.cache, slots, **options, **scales, check_values=True)
    if options:
        written = slots >= 0
        places = slots[written] // ours.cache.shape[1], slots[written] % ours.cache.shape[1]
        rope_keys, expected = (latent_parts(x.cache, kv_latent.shape[1], k_pe.shape[1])[2] for x in (ours, theirs))
        rope, dtype = options | {"positions": options["positions"][written]}, rope_keys.dtype
        stored = rope_keys.view(torch.uint8)[places].view(dtype) if dtype.itemsize == 1 else rope_keys[places]
        assert_rotated(stored[:, None], k_pe[written][:, None], factors_of(scales)[1], dtype, **rope)
        for keys in (rope_keys, expected):
            keys = keys.view(torch.uint8) if dtype.itemsize == 1 else keys
            keys[(*places, slice(2 * options["rope_cos"].shape[1]))] = 0
    assert torch.equal(ours.memory, theirs.memory)
    if INTERPRETED:
        assert accesses.launches == (len(slots) > 0)


@settings(max_examples=3 * settings.default.max_examples)  # they take milliseconds
@given(problems())
def test_reference_is_the_documented_row(problem):
    """Each row decoded from its bytes, scales and elements one by one; `read_latent_cache` gives the same."""
    kv_latent, k_pe, new_cache, slots, options, scales = problem
    kv_lora_rank, rope_dim = kv_latent.shape[1], k_pe.shape[1]
    cache = Cache(*new_cache).cache
    reference.append_latent_cache(kv_latent, k_pe, cache, slots, **options, **scales)
    # The row is decoded on the CPU.
    kv_latent, k_pe, cache, slots = (x.cpu() for x in (kv_latent, k_pe, cache, slots))
    options = {name: x.cpu() if torch.is_tensor(x) else x for name, x in options.items()}
    decoded = read_latent_cache(cache, kv_lora_rank, rope_dim, torch.float64).flatten(0, 1)
    rows = cache.reshape(-1, cache.shape[2])
    untouched = torch.ones(len(rows), dtype=torch.bool)
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        untouched[slot] = False
        key = rotated(t, k_pe, **options)
        if cache.dtype != torch.uint8:
            expected = [x.float() / factor for x, factor in zip((kv_latent[t], key), factors_of(scales))]
            expected = rounded(torch.cat(expected), cache.dtype).to(cache.dtype)
            assert torch.equal(bits(rows[slot]), bits(expected))
            assert torch.equal(decoded[slot], expected.double())
            continue
        packed = bytes(rows[slot].tolist())
        latents, scales, keys = struct.unpack(f"<{kv_lora_rank}s{4 * kv_lora_rank // 128}s{2 * rope_dim}s", packed)
        scales = torch.tensor(struct.unpack(f"<{kv_lora_rank // 128}f", scales))
        for block, scale in zip(kv_latent[t].float().split(128), scales):
            amax = block.abs().max()
            least = max(amax.nan_to_num(0.0, posinf=math.inf).item() / 448, 1e-4)
            assert scale == (least if math.isinf(least) else 2.0 ** math.ceil(math.log2(least)))
        numbers = torch.frombuffer(bytearray(latents), dtype=torch.float8_e4m3fn)
        exact = kv_latent[t].float().cpu() / scales.repeat_interleave(128)
        assert torch.equal(bits(numbers), bits(exact.clamp(-448, 448).to(torch.float8_e4m3fn)))
        keys = torch.frombuffer(bytearray(keys), dtype=torch.bfloat16)
        assert torch.equal(keys, key.to(torch.bfloat16))
        values = numbers.double() * scales.double().repeat_interleave(128)
        assert torch.equal(decoded[slot], torch.cat([values, keys.double()]))
    assert (bits(rows[untouched]) == (255 if cache.dtype.itemsize == 1 else -1)).all()


def rotated(t, k_pe, rope_cos=None, rope_sin=None, positions=None, rope_interleaved=False):
    key = k_pe[t].float()
    result = key.clone()
    half = 0 if rope_cos is None else rope_cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope_interleaved else (i, i + half)
        cos, sin = rope_cos[positions[t], i].float(), rope_sin[positions[t], i].float()
        result[a], result[b] = key[a] * cos - key[b] * sin, key[b] * cos + key[a] * sin
    return result
