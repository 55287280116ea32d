"""append_latent_cache: written bytes, fp8 precision, errors. test_random_append_latent.py has random calls."""

import math

import pytest
import torch
from append_cases import DEVICE, DTYPES, INTERPRETED, Cache, bits

import triton_attn
from triton_attn import append_latent_cache, reference
from triton_attn._host.latent import latent_row, read_latent_cache
from triton_attn.toolchain import guard

BACKENDS = [append_latent_cache, reference.append_latent_cache]


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
@pytest.mark.parametrize(
    "append",
    [pytest.param(BACKENDS[0], marks=pytest.mark.emulated, id="kernel"), pytest.param(BACKENDS[1], id="reference")],
)
def test_fp8_of_what_has_no_scale(append):
    """NaN affects one element, infinity its block. Blocks of zeros and of the smallest values become zeros."""
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
def test_fp8_rounds_to_half_a_step(dtype):
    """In e4m3 at the block's scale: 2^-4 of a value, and 2^-10 of the scale below 2^-6 of it."""
    kv_latent = torch.randn(50, 512, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    cache = torch.zeros(1, 50, 656, dtype=torch.uint8, device=DEVICE)
    append_latent_cache(kv_latent, kv_latent[:, :64], cache, torch.arange(50, device=DEVICE))
    exact = kv_latent.double()
    scales = exact.view(50, 4, 128).abs().amax(dim=2).div(448).log2().ceil().exp2().repeat_interleave(128, dim=1)
    error = (read_latent_cache(cache, 512, 64, torch.float64)[0, :, :512] - exact).abs()
    assert (error <= torch.maximum(exact.abs() * 2.0**-4, scales * 2.0**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=["fp8", "bf16"])
def test_offsets_past_32_bits(dtype):
    """Pages and tokens that lie far apart, with strides beyond 32 bits, in memory that is never touched."""
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
    ({"k_pe": torch.zeros(3, 513)}, ValueError, "k_pe: expected a last dimension of 0 to 512, got 513"),
    ({"latent_cache": 1}, TypeError, "latent_cache: expected a tensor"),
    ({"latent_cache": torch.zeros(5, 4, 128)}, ValueError, r"latent_cache: expected shape \(num_pages, page_size, 136"),
    (
        {"latent_cache": torch.zeros(5, 4, 136).half()},
        TypeError,
        "latent_cache: expected torch.float32 or .*torch.uint8",
    ),
    ({"latent_cache": torch.zeros(5, 4, 272)[..., ::2]}, ValueError, "latent_cache: expected a contiguous last"),
    (fp8(width=136), ValueError, r"latent_cache: expected shape \(num_pages, page_size, 148\)"),
    (fp8(kv_lora_rank=96), ValueError, "kv_lora_rank: expected a multiple of 128.*got 96"),
    (fp8(rope_dim=0, width=132), ValueError, "k_pe: expected a last dimension of 1 to 512, got 0"),
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


@pytest.mark.ci(but_each=3)
@pytest.mark.compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=["bf16", "fp8"])
def test_compiles_without_spills(arch, dtype):
    kv_latent, k_pe = torch.zeros(64, 576, dtype=torch.bfloat16).split([512, 64], dim=1)
    cache = torch.zeros(8, 64, 656 if dtype == torch.uint8 else 576, dtype=dtype)
    rope = {"rope_cos": torch.ones(99, 32), "rope_sin": torch.ones(99, 32), "positions": torch.arange(64)}
    with triton_attn.toolchain.compile_only(arch) as launches:
        append_latent_cache(kv_latent, k_pe, cache, torch.arange(64), **rope, rope_interleaved=True)
    (launch,) = launches
    assert launch.spill_bytes == 0
    if not arch.startswith("gfx"):
        stores = launch.kernel.asm["ptx"]
        assert "st.global.v4.b32" in stores  # the latent vector, 16 bytes a thread
        assert "st.global.b16" not in stores  # the rotary key, whose rows are aligned to 8 elements
