"""gather_kv_cache and gather_latent_cache read what the append functions wrote, in every dtype of a cache."""

from functools import partial

import pytest
import torch
from append_cases import DEVICE, DTYPES, FLOAT8

from triton_attn import append_kv_cache, append_latent_cache, gather_kv_cache, gather_latent_cache, reference
from triton_attn._host.latent import latent_storage, read_latent_cache
from triton_attn.toolchain import compile_only

PAGE, TABLE = 4, [[5, 0, 3], [2, 7, 0], [1, 6, 4]]
LENGTHS, STARTS = [12, 0, 9], [2, 3, 0]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, dtype) for dtype in FLOAT8]


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def bounds(lengths):
    return int32([0, *torch.tensor(lengths).cumsum(0).tolist()])


def slots_of(lengths, starts=(0, 0, 0)):
    """Slots of each sequence's tokens, from lists alone."""
    return [
        TABLE[b][p // PAGE] * PAGE + p % PAGE
        for b, (n, start) in enumerate(zip(lengths, starts))
        for p in range(start, start + n)
    ]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@pytest.fixture(params=["kernel", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("dtype", "cache_dtype"), PAIRS)
def test_keys_and_values_come_back(dtype, cache_dtype, per_head):
    """Whole and in chunks, from a cache whose other slots hold NaN. Rows without a token are 0."""
    scales = {}
    if cache_dtype in FLOAT8:  # powers of two: the only rounding is that to fp8
        scales = dict(k_scale=torch.tensor([0.5, 2.0], device=DEVICE) if per_head else 0.5, v_scale=0.25)
    slots = slots_of(LENGTHS)
    k, v = randn(21, 2, 16, dtype=dtype), randn(21, 2, 8, dtype=dtype)
    memory = torch.full((8, 2, PAGE, 2, 16), torch.nan, device=DEVICE).to(cache_dtype)  # page by page, K beside V
    k_cache, v_cache = memory[:, 0], memory[:, 1, :, :, :8]
    append_kv_cache(k, v, k_cache, v_cache, torch.tensor(slots, device=DEVICE), **scales)

    def stored(x, scale):
        scale = scale.view(-1, 1) if isinstance(scale, torch.Tensor) else scale
        return ((x.float() / scale).to(cache_dtype).float() * scale).to(dtype)

    expected = [stored(x, scales.get(name, 1.0)) for x, name in ((k, "k_scale"), (v, "v_scale"))]
    for num_tokens in (21, 24, None):
        table = int32(TABLE)
        got = gather_kv_cache(k_cache, v_cache, table, bounds(LENGTHS), num_tokens, check_values=True, **scales)
        for x, y in zip(got, expected):
            assert x.dtype == dtype
            assert x.shape[0] == (num_tokens or 21)
            assert torch.equal(x[:21], y)
            assert not x[21:].any()
    lengths = [n - start if n else 0 for n, start in zip(LENGTHS, STARTS)]
    rows = [slots.index(slot) for slot in slots_of(lengths, STARTS)]
    chunks = gather_kv_cache(k_cache, v_cache, table, bounds(lengths), seq_starts=int32(STARTS), **scales)
    assert all(torch.equal(x, y[rows]) for x, y in zip(chunks, expected))
    full, _ = gather_kv_cache(k_cache, v_cache, table, bounds(LENGTHS), dtype=torch.float32, **scales)
    assert full.dtype == torch.float32
    assert torch.equal(full.to(dtype), expected[0])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "cache_dtype"), [*PAIRS, (torch.bfloat16, torch.uint8)])
def test_latents_come_back(dtype, cache_dtype):
    has_rows = cache_dtype == torch.uint8
    _, width = latent_storage(128, 16, torch.float8_e4m3fn if has_rows else dtype)
    cache = torch.zeros(8, PAGE, width, device=DEVICE).to(cache_dtype)
    kv_latent, k_pe = 3 * randn(21, 128, dtype=dtype), randn(21, 16, dtype=dtype)
    scales = {} if has_rows or cache_dtype == dtype else dict(k_scale=0.5, k_pe_scale=0.25)
    slots = torch.tensor(slots_of(LENGTHS), device=DEVICE)
    append_latent_cache(kv_latent, k_pe, cache, slots, **scales)
    sizes = dict(kv_lora_rank=128, qk_rope_head_dim=16)
    latents, rope_keys = gather_latent_cache(cache, int32(TABLE), bounds(LENGTHS), 22, **sizes, **scales)
    rows = read_latent_cache(cache, 128, 16).flatten(0, 1)[slots]
    for x, y, scale in zip((latents, rope_keys), rows.split([128, 16], dim=1), (0.5, 0.25)):
        assert x.is_contiguous()
        assert torch.equal(x[:21], (y * scale if scales else y).to(dtype))
        assert not x[21:].any()
    # Against what was written: fp8 has 2 or 3 bits of mantissa.
    torch.testing.assert_close(latents[:21], kv_latent, rtol=0.14, atol=0.02)
    torch.testing.assert_close(rope_keys[:21], k_pe, rtol=0.14, atol=0.02)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("table", [[[5, 8]], [[5, -1]], [[5]]])
def test_a_page_that_is_not_there_gives_zeros_or_an_error(table):
    cache = torch.ones(8, PAGE, 1, 4, device=DEVICE)
    arguments = cache, cache, int32(table), bounds([6])
    k, _ = gather_kv_cache(*arguments, 7)
    assert k[:, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0]
    with pytest.raises(
        ValueError, match=r"block_table, sequence 0: expected a page|sequence 0: expected a length of 0 to"
    ):
        gather_kv_cache(*arguments, 7, check_values=True)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("start", [-1, 8, 2**30])
def test_a_start_beyond_the_table_gives_zeros_or_an_error(start):
    cache = torch.ones(8, PAGE, 1, 4, device=DEVICE)
    arguments = cache, cache, int32([[5, 2, 3]])[:, :2], bounds([1]), 1
    assert not gather_kv_cache(*arguments, seq_starts=int32([start]))[0].any()
    with pytest.raises(ValueError, match="block_table, sequence 0: expected a page of the cache for each token"):
        gather_kv_cache(*arguments, seq_starts=int32([start]), check_values=True)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("batch", "pages", "width"), [(0, 8, 2), (2, 0, 2), (2, 8, 0)])
def test_nothing_is_there(batch, pages, width):
    cache = torch.ones(pages, PAGE, 1, 4, device=DEVICE)
    table = torch.zeros(batch, width, dtype=torch.int32, device=DEVICE)
    k, v = gather_kv_cache(cache, cache, table, bounds([0] * batch), 3)
    assert k.shape == v.shape == (3, 1, 4)
    assert not k.any()


CACHE, LATENTS = torch.zeros(8, PAGE, 2, 16), torch.zeros(8, PAGE, 144)
ARGUMENTS = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32)
WRONG = [
    (lambda: gather_kv_cache(CACHE.double(), CACHE, *ARGUMENTS), TypeError, "k_cache: expected torch.float16"),
    (lambda: gather_kv_cache(CACHE, CACHE[:4], *ARGUMENTS), ValueError, "v_cache: expected shape"),
    (lambda: gather_kv_cache(CACHE, CACHE, ARGUMENTS[0][:1], ARGUMENTS[1]), ValueError, "block_table: expected shape"),
    (lambda: gather_kv_cache(CACHE, CACHE, ARGUMENTS[0], ARGUMENTS[1].long()), TypeError, "cu_seqlens_k: expected"),
    (lambda: gather_kv_cache(CACHE, CACHE, *ARGUMENTS, -1), ValueError, "num_tokens: expected"),
    (lambda: gather_kv_cache(CACHE, CACHE, *ARGUMENTS, dtype=torch.int8), TypeError, "dtype: expected float16"),
    (lambda: gather_kv_cache(CACHE, CACHE, *ARGUMENTS, out=CACHE), TypeError, "out: expected a tuple of two tensors"),
    (
        lambda: gather_kv_cache(CACHE, CACHE, *ARGUMENTS, out=(CACHE[0], CACHE[1, :3])),
        ValueError,
        r"out\[1\]: expected",
    ),
    (
        lambda: gather_kv_cache(CACHE, CACHE, *ARGUMENTS, dtype=torch.float16, out=(CACHE[0], CACHE[1])),
        TypeError,
        r"out\[0\]: expected torch.float16",
    ),
    (lambda: gather_kv_cache(CACHE, CACHE, *ARGUMENTS, 5, out=(CACHE[0], CACHE[1])), ValueError, r"out\[0\]: expected"),
    (
        lambda: gather_kv_cache(CACHE[None], CACHE, *ARGUMENTS),
        ValueError,
        r"k_cache: expected shape \(num_pages, num_h",
    ),
    (
        lambda: gather_kv_cache(CACHE.view(8, 2, 4, 4, 4), CACHE.view(8, 2, 4, 16).mT, *ARGUMENTS),
        ValueError,
        "v_cache: expected a packed cache that is contiguous",
    ),
    (lambda: gather_kv_cache(CACHE, CACHE, *ARGUMENTS, k_scale=0), ValueError, "k_scale: expected a number above 0"),
    (lambda: gather_kv_cache(CACHE, CACHE, *ARGUMENTS, seq_starts=ARGUMENTS[1]), ValueError, "seq_starts: expected"),
    (
        lambda: gather_kv_cache(CACHE, CACHE, *ARGUMENTS, 3, check_values=True),
        ValueError,
        r"cu_seqlens_k\[2\]: expected at most the 3 rows",
    ),
    (
        lambda: gather_latent_cache(LATENTS, *ARGUMENTS, kv_lora_rank=128, qk_rope_head_dim=8),
        ValueError,
        "latent_cache: expected shape",
    ),
    (
        lambda: gather_latent_cache(
            LATENTS[..., :140].byte(), *ARGUMENTS, kv_lora_rank=128, qk_rope_head_dim=4, k_scale=2.0
        ),
        ValueError,
        "k_scale: expected None with a uint8 cache",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.usefixtures("backend")
def test_packed_pages():
    """What vLLM's layout of the same cache gives; of keys 16 bytes lie together."""
    caches, x = (randn(8, PAGE, 2, 16), randn(8, PAGE, 2, 8)), 4
    packed = caches[0].unflatten(3, (-1, x)).permute(0, 2, 3, 1, 4).contiguous(), caches[1].permute(0, 2, 3, 1)
    packed, places = (packed[0], packed[1].contiguous()), (int32(TABLE), bounds(LENGTHS), 22)
    for y, z in zip(gather_kv_cache(*packed, *places), gather_kv_cache(*caches, *places)):
        assert torch.equal(y, z)
    for y, z in zip(reference.gather_kv_cache(*packed, *places), gather_kv_cache(*caches, *places)):
        assert torch.equal(y, z)


@pytest.mark.usefixtures("backend")
def test_the_stride_of_a_dimension_of_one_element_does_not_count():
    caches = randn(8, PAGE, 2, 16), randn(8, PAGE, 2, 2)[..., ::2]
    for cache in caches:
        k, v = gather_kv_cache(cache, caches[1], int32(TABLE), bounds(LENGTHS), 21)
        assert torch.equal(k, cache.flatten(0, 1)[slots_of(LENGTHS)])
        assert torch.equal(v, caches[1].flatten(0, 1)[slots_of(LENGTHS)])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("of_latents", [False, True])
def test_out_is_a_slice_of_a_workspace(of_latents):
    """Rows of two tensors in one, whose number need not be given; what is not theirs stays."""
    workspace = torch.full((23, 2, 40), -1.0, device=DEVICE)
    if of_latents:
        gather = partial(gather_latent_cache, randn(8, PAGE, 24), kv_lora_rank=16, qk_rope_head_dim=8)
        workspace = workspace[:, 0]
    else:
        gather = partial(gather_kv_cache, randn(8, PAGE, 2, 16), randn(8, PAGE, 2, 8))
    out = workspace[:22, ..., :16], workspace[:22, ..., 16:24]
    results = gather(int32(TABLE), bounds(LENGTHS), out=out)
    assert all(x is y for x, y in zip(results, out))
    expected = gather(int32(TABLE), bounds(LENGTHS), 22)
    assert all(torch.equal(x, y) for x, y in zip(out, expected))
    assert (workspace[22:] == -1).all()
    assert (workspace[..., 24:] == -1).all()


@pytest.mark.compiled
@pytest.mark.oldest
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(arch):
    """16 bytes at a time, in layouts of models."""
    table, lengths, scales = torch.zeros(4, 9).int(), torch.zeros(5).int(), torch.ones(9, 8, 16).transpose(1, 2)
    places, sizes = (table, lengths, 99), dict(kv_lora_rank=512, qk_rope_head_dim=64)
    plain, packed = torch.zeros(9, 16, 8, 128), (torch.zeros(9, 8, 16, 16, 8), torch.zeros(9, 8, 128, 16))
    with compile_only(arch) as launches:
        gather_kv_cache(plain.bfloat16(), plain.bfloat16(), *places)
        for dtype, scale in ((torch.float8_e4m3fn, 0.5), (torch.float8_e5m2, torch.ones(8)), (torch.int8, scales)):
            gather_kv_cache(plain.to(dtype), plain.to(dtype), *places, k_scale=scale, v_scale=scale)
        gather_kv_cache(*(x.bfloat16() for x in packed), *places)
        gather_latent_cache(torch.zeros(9, 64, 576).bfloat16(), *places, **sizes)
        gather_latent_cache(torch.zeros(9, 64, 656).byte(), *places, **sizes)
    assert [launch.spill_bytes for launch in launches] == [0] * 7
    if not arch.startswith("gfx"):
        assert all(launch.registers <= 40 for launch in launches)
        assert all("ld.global.v4.b32" in launch.kernel.asm["ptx"] for launch in launches)
        assert all("st.global.v4.b32" in launch.kernel.asm["ptx"] for launch in launches)
