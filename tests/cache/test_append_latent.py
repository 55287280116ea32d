"""append_latent_cache: the kernel against the reference, the reference against rows unpacked byte by byte."""

import contextlib
import math
import struct

import pytest
import torch
from append_cases import DEVICE, DTYPES, INTERPRETED, LAYOUTS, bits, draw_rope, draw_slots, strided
from hypothesis import given
from hypothesis import strategies as st

import triton_attn
from triton_attn import append_latent_cache, reference
from triton_attn._host.latent import latent_row, read_latent_cache
from triton_attn.testing import guard

BACKENDS = [append_latent_cache, reference.append_latent_cache]
# (shape of the memory around a cache, the cache in it), of the cache's (num_pages, page_size, width).
CACHE_LAYOUTS = {
    "contiguous": lambda pages, size, width: ((pages, size, width), lambda memory: memory),
    "one layer": lambda pages, size, width: ((3, pages, size, width), lambda memory: memory[1]),
    "every other page": lambda pages, size, width: ((2 * pages, size, width), lambda memory: memory[::2]),
    "slot by slot": lambda pages, size, width: ((size, pages, width), lambda memory: memory.transpose(0, 1)),
    "inside of rows": lambda pages, size, width: ((pages, size, width + 12), lambda memory: memory[..., 4:-8]),
}


class Cache:
    """Poisoned memory, every byte 0xFF, and the cache that lies in it."""

    def __init__(self, layout, dtype, *sizes):
        shape, cache_in = CACHE_LAYOUTS[layout](*sizes)
        self.memory = torch.full((math.prod(shape) * dtype.itemsize,), 0xFF, dtype=torch.uint8, device=DEVICE)
        self.cache = cache_in(self.memory.view(dtype).view(shape))


@st.composite
def problems(draw):
    """(kv_latent, k_pe, what makes a poisoned cache, slots, keyword arguments)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype, is_fp8 = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    num_tokens = draw(st.integers(0, 40))
    if is_fp8:
        kv_lora_rank, rope_dim = 128 * draw(st.integers(1, 4)), 2 * draw(st.integers(1, 40))
    else:
        kv_lora_rank, rope_dim = draw(st.integers(1, 512)), draw(st.integers(2, 80))
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
    options = draw_rope(draw, skipped, rope_dim, dtype, generator) if draw(st.booleans()) else {}
    new_cache = (layout, torch.uint8 if is_fp8 else dtype, num_pages, page_size, width)
    return kv_latent, k_pe, new_cache, slots, options


@pytest.mark.oldest
@given(problems())
def test_kernel_writes_what_the_reference_writes(problem):
    kv_latent, k_pe, new_cache, slots, options = problem
    ours, theirs = Cache(*new_cache), Cache(*new_cache)
    reference.append_latent_cache(kv_latent, k_pe, theirs.cache, slots, **options)
    with guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        append_latent_cache(kv_latent, k_pe, ours.cache, slots, **options, check_values=True)
    if INTERPRETED or not options:
        assert torch.equal(ours.memory, theirs.memory)
    else:  # a GPU fuses the multiplication and the addition of a rotation, which moves a rounding
        dtype = torch.bfloat16 if ours.cache.dtype == torch.uint8 else ours.cache.dtype
        eps = torch.finfo(dtype).eps
        actual, expected = (read_latent_cache(x.cache, kv_latent.shape[1], k_pe.shape[1]) for x in (ours, theirs))
        torch.testing.assert_close(actual, expected, rtol=eps, atol=1e-5 * eps, equal_nan=True)
    if INTERPRETED:
        assert accesses.launches == (len(slots) > 0)


@given(problems())
def test_reference_is_the_documented_row(problem):
    """Each row from its bytes, scales and numbers one by one; and `read_latent_cache` reads the same."""
    kv_latent, k_pe, new_cache, slots, options = problem
    kv_lora_rank, rope_dim = kv_latent.shape[1], k_pe.shape[1]
    cache = Cache(*new_cache).cache
    reference.append_latent_cache(kv_latent, k_pe, cache, slots, **options)
    # The row is taken apart on the CPU.
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
            expected = torch.cat([kv_latent[t], key.to(cache.dtype)])
            assert torch.equal(rows[slot], expected)
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
    assert (bits(rows[untouched]) == (255 if cache.dtype == torch.uint8 else -1)).all()


def rotated(t, k_pe, rope_cos=None, rope_sin=None, positions=None, rope_interleaved=False):
    key = k_pe[t].float()
    result = key.clone()
    half = 0 if rope_cos is None else rope_cos.shape[1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope_interleaved else (i, i + half)
        cos, sin = rope_cos[positions[t], i].float(), rope_sin[positions[t], i].float()
        result[a], result[b] = key[a] * cos - key[b] * sin, key[b] * cos + key[a] * sin
    return result


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts bytes")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16], ids=["fp8", "fp16"])
@pytest.mark.parametrize("kv_lora_rank", [128, 384, 512])
def test_each_byte_of_a_row_is_written_once(dtype, kv_lora_rank):
    width = latent_row(kv_lora_rank, 6)[2] if dtype == torch.uint8 else kv_lora_rank + 6
    cache = Cache("contiguous", dtype, 2, 16, width).cache
    slots = torch.arange(20)
    slots[3] = -1
    with guard() as accesses:
        append_latent_cache(torch.ones(20, kv_lora_rank).half(), torch.ones(20, 6).half(), cache, slots)
    assert accesses.bytes_stored.total() == 19 * width * dtype.itemsize


def test_the_rows_of_deepseek():
    assert latent_row(512, 64) == (512, 528, 656)


@pytest.mark.oldest
@pytest.mark.parametrize("append", BACKENDS, ids=["kernel", "reference"])
def test_fp8_of_what_has_no_scale(append):
    """NaN stays one number's, an infinity costs its block, blocks of zeros and of the smallest numbers are zeros."""
    kv_latent = torch.ones(3, 256, device=DEVICE)
    kv_latent[0, 3] = math.nan
    kv_latent[0, 4] = -2.0
    kv_latent[1, 130] = -math.inf
    kv_latent[2, :128] = 0.0
    kv_latent[2, 128:] = 1e-45
    kv_latent[2, 255] = math.nan
    cache = torch.zeros(1, 3, latent_row(256, 2)[2], dtype=torch.uint8, device=DEVICE)
    append(kv_latent, torch.ones(3, 2, device=DEVICE), cache, torch.arange(3, device=DEVICE))
    actual = read_latent_cache(cache, 256, 2)[0, :, :256]
    expected = kv_latent.clone()
    expected[1, 128:] = math.nan
    expected[2, 128:255] = 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_keeps_numbers_to_half_a_step(dtype):
    """Of e4m3 at the block's scale: 2^-4 of a number, and 2^-10 of the scale below 2^-6 of it."""
    kv_latent = torch.randn(50, 512, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    cache = torch.zeros(1, 50, 656, dtype=torch.uint8, device=DEVICE)
    append_latent_cache(kv_latent, kv_latent[:, :64], cache, torch.arange(50, device=DEVICE))
    exact = kv_latent.double()
    scales = exact.view(50, 4, 128).abs().amax(dim=2).div(448).log2().ceil().exp2().repeat_interleave(128, dim=1)
    error = (read_latent_cache(cache, 512, 64, torch.float64)[0, :, :512] - exact).abs()
    assert (error <= torch.maximum(exact.abs() * 2.0**-4, scales * 2.0**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=["fp8", "bf16"])
def test_offsets_past_32_bits(dtype):
    """Pages and tokens that lie far apart, by strides of 32 bits, on memory that is never touched."""
    width = 656 if dtype == torch.uint8 else 576
    stride = 2**30 + 64
    cache = torch.empty(2 * stride + 4 * width, dtype=dtype, device=DEVICE)
    cache = cache.as_strided((3, 4, width), (stride, width, 1))
    tokens = torch.empty(2 * stride + 576, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 576), (stride, 1))
    tokens.copy_(torch.randn(3, 576, generator=torch.Generator().manual_seed(0)))
    slots = torch.tensor([1, 6, 10], device=DEVICE)
    append_latent_cache(*tokens.split([512, 64], dim=1), cache, slots)
    expected = torch.zeros(3, 4, width, dtype=dtype, device=DEVICE)
    reference.append_latent_cache(*tokens.clone().split([512, 64], dim=1), expected, slots)
    places = slots // 4, slots % 4
    assert torch.equal(bits(cache[places]), bits(expected[places]))


def arguments():
    return {
        "kv_latent": torch.zeros(3, 128),
        "k_pe": torch.zeros(3, 8),
        "latent_cache": torch.zeros(5, 4, 136),
        "slot_mapping": torch.arange(3),
    }


def fp8(kv_lora_rank=128, rope_dim=8, width=148, **others):
    return {
        "kv_latent": torch.zeros(3, kv_lora_rank),
        "k_pe": torch.zeros(3, rope_dim),
        "latent_cache": torch.zeros(5, 4, width, dtype=torch.uint8),
        **others,
    }


MISALIGNED = torch.zeros(5 * 4 * 148 + 4, dtype=torch.uint8)
ROPE = {"rope_cos": torch.ones(7, 4), "rope_sin": torch.zeros(7, 4), "positions": torch.arange(3)}
WRONG = [
    ({"kv_latent": [1.0]}, TypeError, "kv_latent: expected a tensor"),
    ({"kv_latent": torch.zeros(3, 1, 128)}, ValueError, "kv_latent: expected shape"),
    ({"kv_latent": torch.zeros(3, 128, dtype=torch.float64)}, TypeError, "kv_latent: expected torch.float16"),
    ({"kv_latent": torch.zeros(3, 256)[:, ::2]}, ValueError, "kv_latent: expected a contiguous last"),
    ({"kv_latent": torch.zeros(3, 513)}, ValueError, "kv_latent: expected a last dimension of 1 to 512, got 513"),
    ({"k_pe": torch.zeros(2, 8)}, ValueError, r"k_pe: expected shape \(3, qk_rope_head_dim\)"),
    ({"k_pe": torch.zeros(3, 8).half()}, TypeError, "k_pe: expected torch.float32"),
    ({"k_pe": torch.zeros(3, 16)[:, ::2]}, ValueError, "k_pe: expected a contiguous last"),
    ({"k_pe": torch.zeros(3, 0)}, ValueError, "k_pe: expected a last dimension of 1 to 512, got 0"),
    ({"latent_cache": 1}, TypeError, "latent_cache: expected a tensor"),
    ({"latent_cache": torch.zeros(5, 4, 128)}, ValueError, r"latent_cache: expected shape \(num_pages, page_size, 136"),
    ({"latent_cache": torch.zeros(5, 4, 136).half()}, TypeError, "latent_cache: expected torch.float32 or torch.uint8"),
    ({"latent_cache": torch.zeros(5, 4, 272)[..., ::2]}, ValueError, "latent_cache: expected a contiguous last"),
    (fp8(width=136), ValueError, r"latent_cache: expected shape \(num_pages, page_size, 148\)"),
    (fp8(kv_lora_rank=96), ValueError, "kv_lora_rank: expected a multiple of 128.*got 96"),
    (fp8(rope_dim=7), ValueError, "qk_rope_head_dim: expected an even number.*got 7"),
    (fp8(latent_cache=MISALIGNED[1:-3].view(5, 4, 148)), ValueError, "latent_cache: expected rows that begin"),
    (fp8(latent_cache=MISALIGNED.as_strided((5, 4, 148), (593, 148, 1))), ValueError, r"rows that.*\(593, 148, 1\)"),
    ({"slot_mapping": torch.arange(4)}, ValueError, r"slot_mapping: expected shape \(3\)"),
    ({"slot_mapping": torch.arange(3, dtype=torch.int32)}, TypeError, "slot_mapping: expected torch.int64"),
    ({"slot_mapping": torch.arange(6)[::2]}, ValueError, "slot_mapping: expected a contiguous"),
    ({"positions": torch.arange(3)}, TypeError, "rope_cos, rope_sin, positions: expected all three or none"),
    (ROPE | {"rope_cos": torch.ones(7, 5), "rope_sin": torch.ones(7, 5)}, ValueError, "rope_cos: expected 1 to 4.*pe"),
    (ROPE | {"rope_interleaved": 1}, TypeError, "rope_interleaved: expected a bool"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        append_latent_cache(**arguments() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mapping": torch.tensor([0, 20, 1])}, r"slot_mapping\[1\]: expected a slot below 20, got 20"),
        ({"slot_mapping": torch.tensor([7, -1, 7])}, r"slot_mapping\[2\].*also that of token 0"),
        (ROPE | {"positions": torch.tensor([0, 6, 7])}, r"positions\[2\]: expected 0 to 6, got 7"),
    ],
)
def test_values_are_checked_when_asked(change, message, monkeypatch):
    args = arguments() | change
    with pytest.raises(ValueError, match=message):
        append_latent_cache(**args, check_values=True)
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        append_latent_cache(**args)
    assert not args["latent_cache"].any()


@pytest.mark.compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=["bf16", "fp8"])
def test_compiles_without_spills(arch, dtype):
    kv_latent, k_pe = torch.zeros(64, 576, dtype=torch.bfloat16).split([512, 64], dim=1)
    cache = torch.zeros(8, 64, 656 if dtype == torch.uint8 else 576, dtype=dtype)
    rope = {"rope_cos": torch.ones(99, 32), "rope_sin": torch.ones(99, 32), "positions": torch.arange(64)}
    with triton_attn.testing.compile_only(arch) as launches:
        append_latent_cache(kv_latent, k_pe, cache, torch.arange(64), **rope, rope_interleaved=True)
    (launch,) = launches
    assert launch.spill_bytes == 0
    if not arch.startswith("gfx"):
        stores = launch.kernel.asm["ptx"]
        assert "st.global.v4.b32" in stores  # the latent vector, 16 bytes a thread
        assert "st.global.b16" not in stores  # the rotary key, whose rows begin at multiples of 8 numbers
