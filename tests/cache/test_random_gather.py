"""Random calls of gather_kv_cache and gather_latent_cache: one launch that reads each byte of a token once, and nothing
else of the cache; out, and the memory around it."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from append_cases import DEVICE, DTYPES, FLOAT8, INTERPRETED, QUANTIZED, bits
from hypothesis import given
from hypothesis import strategies as st
from paged_cases import pack

from triton_attn import gather_kv_cache, gather_latent_cache
from triton_attn._host.latent import latent_parts
from triton_attn.testing import padded
from triton_attn.toolchain import guard

pytestmark = [pytest.mark.random, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
NAN, DEAD_ENTRY = float("nan"), 2147480000


@dataclass(frozen=True)
class Batch:
    """Chunks of sequences: lengths, and where they begin. Tables have pages for these tokens, otherwise DEAD_ENTRY."""

    page_size: int
    lengths: list
    starts: list | None
    spare_rows: int
    seed: int

    @property
    def num_rows(self):
        return sum(self.lengths) + self.spare_rows

    def places(self):
        """(block_table, cu_seqlens_k, seq_starts), number of pages, and (page, slot) of each token."""
        generator = torch.Generator().manual_seed(self.seed)
        starts = [0] * len(self.lengths) if self.starts is None else self.starts
        ends = [start + n for start, n in zip(starts, self.lengths)]
        width = max([-(-end // self.page_size) for end in ends], default=0) + 1
        table = torch.full((len(ends), width), DEAD_ENTRY, dtype=torch.int32)
        num_pages = sum(-(-end // self.page_size) for end in ends) + 2
        pages, tokens = torch.randperm(num_pages, generator=generator).tolist(), []
        for i, (start, end) in enumerate(zip(starts, ends)):
            for column in range(start // self.page_size, -(-end // self.page_size)) if start < end else ():
                table[i, column] = pages.pop()
            tokens += [(table[i, p // self.page_size].item(), p % self.page_size) for p in range(start, end)]
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
        starts = None if self.starts is None else torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        places = table.to(DEVICE), cu_seqlens.to(DEVICE), starts
        return places, num_pages, torch.tensor(tokens, dtype=torch.long).view(-1, 2).T.to(DEVICE)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.sampled_from([0, 1, 3, 16, 17, 40]), max_size=5))
    starts = draw(st.none() | st.lists(st.integers(0, 50), min_size=len(lengths), max_size=len(lengths)))
    return Batch(
        draw(st.sampled_from([1, 5, 16, 64])), lengths, starts, draw(st.integers(0, 3)), draw(st.integers(0, 9))
    )


def poison(values, tokens):
    """NaN in all slots without a token; int8 has none."""
    is_unused = torch.ones(values.shape[:2], dtype=torch.bool, device=DEVICE)
    is_unused[tokens[0], tokens[1]] = False
    if values.dtype.itemsize == 1:
        values.view(torch.uint8)[is_unused] = 0x7F
    else:
        values[is_unused] = NAN
    return values


def call(function, *arguments, gives_out, rows, num_rows, dtype, **options):
    """The results, and what the kernel read; out is in poisoned memory."""
    checks = []
    if gives_out:
        outs = [padded((num_rows, *row), dtype, DEVICE) for row in rows]
        options["out"], checks = tuple(x for x, _ in outs), [check for _, check in outs]
    else:
        options |= dict(num_tokens=num_rows, dtype=dtype)
    with guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        results = function(*arguments, check_values=True, **options)
    for check in checks:
        check()
    if INTERPRETED:
        assert accesses.launches <= 1
    if gives_out:
        assert all(x is y for x, y in zip(results, options["out"]))
    return results, accesses


@pytest.mark.emulated
@pytest.mark.oldest
@given(
    batch=batches(),
    cache_dtype=st.sampled_from([*DTYPES, *QUANTIZED]),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 8, 24, 64, 96]), st.sampled_from([1, 16, 40])),
    scale=st.sampled_from([None, 0.5, "one", "per head", "per token"]),
    layout=st.sampled_from(["contiguous", "one layer", "packed", "packed, every second page"]),
    gives_out=st.booleans(),
)
def test_keys_and_values(batch, cache_dtype, dtype, shape, scale, layout, gives_out):
    places, num_pages, tokens = batch.places()
    num_heads, dim, dim_v = shape
    generator = torch.Generator().manual_seed(batch.seed)
    x = 16 // cache_dtype.itemsize
    if layout.startswith("packed"):
        dim = -(-dim // x) * x
    slots = num_pages, batch.page_size
    clean = [(8 * torch.randn(*slots, num_heads, n, generator=generator)).to(DEVICE, cache_dtype) for n in (dim, dim_v)]
    caches = [poison(one.clone(), tokens) for one in clean]
    if layout == "one layer":
        caches = [
            torch.stack([one.view(torch.uint8), one.view(torch.uint8)], 1)[:, 1].view(cache_dtype) for one in caches
        ]
    elif layout != "contiguous":
        kind = "contiguous" if layout == "packed" else "heads first"
        caches = [pack(one, together, kind) for one, together in zip(caches, (x, None))]
    factors = [scale, scale]
    if isinstance(scale, str):
        sizes = {"one": (1,), "per head": (num_heads,), "per token": (*slots, num_heads)}
        if scale == "per token" and cache_dtype not in QUANTIZED:
            return
        factors = [(torch.rand(sizes[scale], generator=generator) + 0.1).to(DEVICE) for _ in range(2)]
        if scale == "per token":
            factors = [poison(one, tokens) for one in factors]
    options = dict(gives_out=gives_out, rows=[(num_heads, dim), (num_heads, dim_v)], num_rows=batch.num_rows)
    table, cu_seqlens, starts = places
    options |= dict(dtype=dtype, seq_starts=starts, k_scale=factors[0], v_scale=factors[1])
    results, accesses = call(gather_kv_cache, *caches, table, cu_seqlens, **options)
    num_tokens = tokens.shape[1]
    for result, one, factor in zip(results, clean, factors):
        expected = one[tokens[0], tokens[1]].float()
        if scale == "per token":
            expected = expected * factor[tokens[0], tokens[1]].unsqueeze(2)
        elif scale is not None:
            expected = expected * (factor.view(-1, 1) if isinstance(scale, str) else scale)
        assert torch.equal(bits(result[:num_tokens]), bits(expected.to(dtype)))
        assert not result[num_tokens:].any()
    if INTERPRETED and num_tokens:
        for name, one in (("first", clean[0]), ("second", clean[1])):
            assert accesses.bytes_loaded[f"{name}.cache.ptr"] == num_tokens * num_heads * one.shape[3] * one.itemsize


@pytest.mark.emulated
@pytest.mark.oldest
@given(
    batch=batches(),
    cache_dtype=st.sampled_from([*DTYPES, *FLOAT8, torch.uint8]),
    dtype=st.sampled_from(DTYPES),
    sizes=st.sampled_from([(128, 16), (512, 64), (256, 2)]),
    scales=st.sampled_from([(None, None), (0.5, None), (0.25, 2.0)]),
    has_gaps=st.booleans(),
    gives_out=st.booleans(),
)
def test_latent_vectors(batch, cache_dtype, dtype, sizes, scales, has_gaps, gives_out):
    """One slice of longer rows has out, as a workspace of joined rows."""
    places, num_pages, tokens = batch.places()
    generator = torch.Generator().manual_seed(batch.seed)
    rank, rope = sizes
    width = rank + rank // 128 * 4 + 2 * rope if cache_dtype == torch.uint8 else rank + rope
    shape = num_pages, batch.page_size, width
    if cache_dtype == torch.uint8:
        clean, scales = torch.zeros(shape, dtype=torch.uint8, device=DEVICE), (None, None)
        latents, block_scales, rope_keys = latent_parts(clean, *sizes)
        values = torch.randn(latents.shape, generator=generator).to(DEVICE)
        latents.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))
        block_scales.copy_(torch.rand(block_scales.shape, generator=generator))
        rope_keys.copy_(torch.randn(rope_keys.shape, generator=generator))
        read = latents.view(torch.float8_e4m3fn).float() * block_scales.repeat_interleave(128, -1), rope_keys.float()
        cache = clean.clone()
        is_unused = torch.ones(shape[:2], dtype=torch.bool, device=DEVICE)
        is_unused[tokens[0], tokens[1]] = False
        cache[is_unused] = 0xFF
    else:
        clean = torch.randn(shape, generator=generator).to(DEVICE, cache_dtype)
        read, cache = clean.float().split(sizes, -1), poison(clean.clone(), tokens)
    if has_gaps:
        cache = torch.stack([cache.view(torch.uint8), cache.view(torch.uint8)], 1)[:, 1].view(cache.dtype)
    options = dict(gives_out=gives_out, rows=[(n,) for n in sizes], num_rows=batch.num_rows, dtype=dtype)
    table, cu_seqlens, starts = places
    options |= dict(kv_lora_rank=rank, qk_rope_head_dim=rope, seq_starts=starts)
    options |= dict(k_scale=scales[0], k_pe_scale=scales[1])
    results, accesses = call(gather_latent_cache, cache, table, cu_seqlens, **options)
    num_tokens = tokens.shape[1]
    factors = scales[0] or 1.0, scales[1] or scales[0] or 1.0
    for result, one, factor in zip(results, read, factors):
        expected = (one[tokens[0], tokens[1]] * factor).to(dtype)
        assert torch.equal(bits(result[:num_tokens]), bits(expected))
        assert not result[num_tokens:].any()
    if INTERPRETED and num_tokens:
        parts = "first.cache.ptr", "second.cache.ptr"
        assert sum(accesses.bytes_loaded[name] for name in parts) == num_tokens * width * cache.itemsize
