"""Small calls with real widths for the emulator, and the minimum work of each of their kernels.

Tensors hold only what a call reads: a cache has exactly the pages of its sequences, in random order. So a kernel must
read all of its inputs, each 32-byte sector once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

import triton_attn
from perf.workloads.calls import NOPE, RANK, ROPE, VALUE
from triton_attn.cache import kv_cache_bytes_per_token
from triton_attn.mla.schedule import causal_pairs

SECTOR = 32
SEQLENS = {64: 512, 96: 512, 128: 512, 256: 256, 512: 256}  # of flash, by head dim
CONTEXTS = (512, 256)  # of the two sequences in a cache
CHUNK_CONTEXTS = (256, 128)  # with many queries each
TOKENS = 64  # appended to a cache
SPLITS = 4


class Work(NamedTuple):
    """The minimum work of a kernel: bytes to read and to write, useful FLOP, and a function from its launch to the FLOP
    of its tiles that hold some of them.
    """

    reads: int
    writes: int
    flops: int = 0
    tiles: Callable | None = None


def size(*tensors):
    """Bytes of all tensors, each rounded up to sectors."""
    return sum(-(-x.numel() * x.element_size() // SECTOR) * SECTOR for x in tensors if x is not None)


def visible_tiles(rows, seqlen_k, block_m, block_n, per_position=1, causal=True):
    """The number of tiles with a visible pair. A tile has `rows` rows, `per_position` for each position, and the last
    row is at the last key. Also for transposed tiles.
    """
    total = 0
    for first in range(0, rows, block_m):
        last_position = (min(first + block_m, rows) - 1) // per_position
        keys = seqlen_k - rows // per_position + last_position + 1 if causal else seqlen_k
        total += -(-keys // block_n)
    return total


def _normal(dtype, *shape):
    return torch.randn(shape).to(dtype)


def _flash_inputs(dtype, head_dim):
    """Two query heads and one KV head."""
    seqlen = SEQLENS[head_dim]
    return [_normal(dtype, 1, seqlen, heads, head_dim) for heads in (2, 1, 1)]


def _tile(launch):
    """(rows, keys) of a tile. A kernel of hopper.py has 64 rows per warpgroup."""
    values = launch.constexprs
    return values["BLOCK_M"] if "BLOCK_M" in values else 64 * values["GROUPS"], values["BLOCK_N"]


def _matmuls(heads, seqlen, width, causal=True):
    """FLOP of the tiles of self-attention. Their matmuls have `width` columns in total."""
    return lambda launch: 2 * width * heads * _area(launch, seqlen, seqlen, causal=causal)


def _area(launch, rows, seqlen_k, **options):
    block_m, block_n = _tile(launch)
    return block_m * block_n * visible_tiles(rows, seqlen_k, block_m, block_n, **options)


def flash(dtype, head_dim, causal=True):
    q, k, v = _flash_inputs(dtype, head_dim)
    seqlen, heads = q.shape[1:3]
    flops = 4 * head_dim * heads * int(causal_pairs(seqlen, seqlen, causal))
    work = Work(size(q, k, v), size(q), flops, _matmuls(heads, seqlen, 2 * head_dim, causal))
    return (
        lambda: triton_attn.flash_attention(q, k, v, causal=causal),
        {"_flash_fwd_kernel": work, "_flash_fwd_hopper_kernel": work},
    )


def flash_backward(dtype, head_dim, deterministic=False, causal=True):
    """dQ is two of the five matmuls of a tile in the fused schedule. The split schedule has four and three, since it
    does two of them twice.
    """
    q, k, v = _flash_inputs(dtype, head_dim)
    seqlen, heads = q.shape[1:3]
    stats = torch.empty(1, heads, seqlen)
    inputs = size(q, k, v, q, stats, stats)

    def call():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = triton_attn.flash_attention(*leaves, causal=causal, deterministic=deterministic)
        torch.autograd.grad(out, leaves, q)

    def work(matmuls, reads, writes):
        flops = 2 * matmuls * head_dim * heads * int(causal_pairs(seqlen, seqlen, causal))
        return Work(reads, writes, flops, _matmuls(heads, seqlen, matmuls * head_dim, causal))

    sums = q.float()  # for dq, zeroed before
    return call, {
        "_flash_bwd_delta_kernel": Work(size(q, q), size(stats)),
        "_flash_bwd_dkdv_kernel": work(4, inputs, size(k, v)),
        "_flash_bwd_dkdv_kernel, dk": work(3, inputs, size(k)),
        "_flash_bwd_dkdv_kernel, dv": work(2, inputs - size(v) - size(stats), size(v)),
        "_flash_bwd_dkdv_kernel, fused": work(5, inputs + size(sums), size(k, v, sums)),
        "_flash_bwd_dq_kernel": work(3, inputs, size(q)),
    }


def _table(page_size, seqlens=CONTEXTS):
    """(lengths, pages of each sequence, number of pages). Each page belongs to one sequence."""
    counts = [-(-seqlen // page_size) for seqlen in seqlens]
    pages = torch.randperm(sum(counts)).to(torch.int32)
    table = torch.zeros(len(seqlens), max(counts), dtype=torch.int32)
    for row, of_sequence in zip(table, pages.split(counts)):
        row[: len(of_sequence)] = of_sequence
    return torch.tensor(seqlens, dtype=torch.int32), table, len(pages)


def paged(dtype, num_heads_q, num_heads_kv, head_dim, page_size, seqlen_q=1, num_splits=1):
    """Two sequences with pages in random order."""
    contexts = CONTEXTS if seqlen_q == 1 else CHUNK_CONTEXTS
    seqlens, table, num_pages = _table(page_size, contexts)
    keys, values = (_normal(dtype, num_pages, page_size, num_heads_kv, head_dim) for _ in range(2))
    q = _normal(dtype, len(seqlens), seqlen_q, num_heads_q, head_dim)
    group = num_heads_q // num_heads_kv
    parts = torch.empty(num_splits, *q.shape), torch.empty(num_splits, *q.shape[:3])
    pairs = sum(int(causal_pairs(seqlen_q, seqlen, True)) for seqlen in contexts)

    def tiles(launch):
        area = sum(_area(launch, seqlen_q * group, seqlen, per_position=group) for seqlen in contexts)
        return 4 * head_dim * num_heads_kv * area

    reads, flops = size(keys, values, q, seqlens, table), 4 * head_dim * num_heads_q * pairs
    return (
        lambda: triton_attn.paged_attention(q, keys, values, seqlens, table, num_splits=num_splits),
        {
            "_paged_fwd_kernel": Work(reads, size(*parts) if num_splits > 1 else size(q), flops, tiles),
            "_merge_kernel": Work(size(*parts), size(q)),
        },
    )


def _rope(dtype, width):
    """Angles for each token, in random order."""
    return {
        "rope_cos": _normal(dtype, TOKENS, width // 2),
        "rope_sin": _normal(dtype, TOKENS, width // 2),
        "positions": torch.randperm(TOKENS),
    }


def append(dtype, cache_dtype, num_heads_kv, head_dim, page_size, rope):
    """`rope` is none, halves or interleaved. An fp8 cache has one scale."""
    rows = [_normal(dtype, TOKENS, num_heads_kv, head_dim) for _ in range(2)]
    held = getattr(torch, cache_dtype)
    caches = [torch.zeros(TOKENS // page_size, page_size, num_heads_kv, head_dim, dtype=held) for _ in range(2)]
    slots = torch.randperm(TOKENS)
    options = {} if rope == "none" else _rope(dtype, head_dim) | {"rope_interleaved": rope == "interleaved"}
    if held.itemsize == 1:
        options |= {"k_scale": torch.ones(1), "v_scale": torch.ones(1)}
    read = [value for value in options.values() if isinstance(value, torch.Tensor)]
    work = Work(size(*rows, slots, *read), size(*caches))
    return lambda: triton_attn.append_kv_cache(*rows, *caches, slots, **options), {"_append_kv_cache_kernel": work}


def _latent_cache(dtype, cache_dtype, num_pages, page_size, filled):
    """Rows of an fp8 cache are bytes: values, scales and rotary keys."""
    is_fp8 = cache_dtype == "float8_e4m3fn"
    held = torch.uint8 if is_fp8 else dtype
    widths = {"kv_lora_rank": RANK, "qk_rope_head_dim": ROPE, "dtype": torch.float8_e4m3fn if is_fp8 else dtype}
    row_bytes = kv_cache_bytes_per_token(num_layers=1, **widths)
    cache = torch.zeros(num_pages, page_size, row_bytes // held.itemsize, dtype=held)
    if filled:
        rows = _normal(dtype, num_pages * page_size, RANK), _normal(dtype, num_pages * page_size, ROPE)
        triton_attn.append_latent_cache(*rows, cache, torch.arange(num_pages * page_size))
    return cache


def append_latent(dtype, cache_dtype, page_size, rope):
    rows = _normal(dtype, TOKENS, RANK), _normal(dtype, TOKENS, ROPE)
    cache = _latent_cache(dtype, cache_dtype, TOKENS // page_size, page_size, filled=False)
    slots = torch.randperm(TOKENS)
    options = {} if rope == "none" else _rope(dtype, ROPE) | {"rope_interleaved": rope == "interleaved"}
    read = [value for value in options.values() if isinstance(value, torch.Tensor)]
    work = Work(size(*rows, slots, *read), size(cache))
    return lambda: triton_attn.append_latent_cache(*rows, cache, slots, **options), {
        "_append_latent_cache_kernel": work
    }


def copy(dtype, num_heads_kv, head_dim, page_size):
    """Copy half of the pages to the other half."""
    caches = [_normal(dtype, 8, page_size, num_heads_kv, head_dim) for _ in range(2)]
    pages = torch.randperm(8).to(torch.int32)
    source, target = pages[:4].clone(), pages[4:].clone()
    half = size(*caches) // 2
    return lambda: triton_attn.copy_kv_pages(tuple(caches), source, target), {
        "_copy_kv_pages_kernel": Work(half + size(source, target), half)
    }


def _places(num_tokens, page_size):
    """Two sequences whose pages are all that the cache has, in random order."""
    half = num_tokens // 2
    table = torch.randperm(num_tokens // page_size).view(2, -1).to(torch.int32)
    return table, torch.tensor([0, half, 2 * half], dtype=torch.int32), num_tokens


def gather(dtype, cache_dtype, num_heads_kv, head_dim, page_size):
    """A quantized cache has a scale for each token and head."""
    held = getattr(torch, cache_dtype)
    shape = TOKENS // page_size, page_size, num_heads_kv
    caches, scales = [_normal(dtype, *shape, head_dim).to(held) for _ in range(2)], []
    if held.itemsize == 1:
        scales = [torch.rand(shape[0], num_heads_kv, page_size).transpose(1, 2) for _ in range(2)]
    table, bounds, num_tokens = _places(TOKENS, page_size)
    out = [torch.empty(num_tokens, num_heads_kv, head_dim, dtype=dtype) for _ in range(2)]
    options = dict(zip(("k_scale", "v_scale"), scales))
    work = Work(size(*caches, *scales, table, bounds), size(*out))
    return lambda: triton_attn.gather_kv_cache(*caches, table, bounds, out=out, **options), {
        "_gather_cache_kernel": work
    }


def gather_latent(dtype, cache_dtype, page_size):
    table, bounds, num_tokens = _places(2 * page_size, page_size)
    cache = _latent_cache(dtype, cache_dtype, 2, page_size, filled=True)
    out = [torch.empty(num_tokens, n, dtype=dtype) for n in (RANK, ROPE)]
    work, sizes = Work(size(cache, table, bounds), size(*out)), dict(kv_lora_rank=RANK, qk_rope_head_dim=ROPE)
    return lambda: triton_attn.gather_latent_cache(cache, table, bounds, out=out, **sizes), {
        "_gather_cache_kernel": work
    }


def merge(dtype, num_heads, head_dim, num_parts=SPLITS):
    parts = _normal(dtype, num_parts, 1, TOKENS, num_heads, head_dim)
    lses = torch.randn(num_parts, 1, num_heads, TOKENS)
    work = Work(size(parts, lses), size(parts[0], lses[0]))
    return lambda: triton_attn.merge_attention(parts, lses), {"_merge_kernel": work}


def mla(dtype, num_heads, cache_dtype, page_size, weights=False):
    """With weights, queries are absorbed and outputs projected; otherwise both are latent."""
    seqlens, table, num_pages = _table(page_size)
    cache = _latent_cache(dtype, cache_dtype, num_pages, page_size, filled=True)
    q_nope, q_pe = (_normal(dtype, len(seqlens), 1, num_heads, n) for n in (NOPE if weights else RANK, ROPE))
    projections = [_normal(dtype, num_heads, n, RANK) / RANK**0.5 for n in (NOPE, VALUE)] if weights else []
    q, latents = (torch.empty(len(seqlens), 1, num_heads, n, dtype=dtype) for n in (RANK + ROPE, RANK))
    parts = latents, torch.empty(latents.shape[:3])  # of one split
    out = torch.empty(len(seqlens), 1, num_heads, VALUE, dtype=dtype)
    work = Work(
        size(q, cache, seqlens, table),
        size(*parts),
        2 * (2 * RANK + ROPE) * num_heads * sum(CONTEXTS),
        lambda launch: 2 * (2 * RANK + ROPE) * _latent_area(launch, num_heads),
    )
    flops = [2 * len(seqlens) * num_heads * RANK * n for n in (NOPE, VALUE)]

    def of_projection(flops):
        """A tile has at least 16 rows, the minimum of a matmul."""
        return lambda launch: flops // len(seqlens) * max(16, launch.constexprs["BLOCK_T"])

    return (
        lambda: triton_attn.mla_decode(
            q_nope, q_pe, cache, seqlens, table, *projections, softmax_scale=0.05, num_splits=1
        ),
        {
            "_mla_absorbed_kernel": work,
            "_mla_decode_hopper_kernel": work,
            "_absorb_kernel": Work(
                size(q_nope, q_pe, *projections[:1], seqlens), size(q), flops[0], of_projection(flops[0])
            ),
            "_merge_project_kernel": Work(size(*parts, *projections[1:]), size(out), flops[1], of_projection(flops[1])),
        },
    )


def _latent_area(launch, num_heads):
    """Rows times keys of the tiles of a decode step."""
    values = launch.constexprs
    block_m, block_n = values.get("BLOCK_M", 64), values.get("BLOCK_N", 64)
    return sum(block_m * block_n * visible_tiles(num_heads, x, block_m, block_n, num_heads) for x in CONTEXTS)


def mla_prefill(dtype, num_heads, fused, seqlen=256):
    """Only attention is useful work, as in perf/workloads/problems.py, not the keys and values that a fused tile
    computes.
    """
    rows = (num_heads, NOPE), (num_heads, ROPE), (RANK,), (ROPE,)
    q_nope, q_pe, latents, rotary = (_normal(dtype, 1, seqlen, *row) for row in rows)
    weights = [_normal(dtype, num_heads, n, RANK) / RANK**0.5 for n in (NOPE, VALUE)]
    out = torch.empty(1, seqlen, num_heads, VALUE, dtype=dtype)
    made = [] if fused else [torch.empty(num_heads, seqlen, n, dtype=dtype) for n in (NOPE, VALUE)]
    keys = (latents, *weights) if fused else made
    width = NOPE + ROPE + VALUE

    def tiles(launch):
        block_m, block_n = _tile(launch)
        count = visible_tiles(seqlen, seqlen, block_m, block_n)
        per_tile = block_m * block_n * width + (block_n * RANK * (NOPE + VALUE) if fused else 0)
        return 2 * num_heads * count * per_tile

    flops = 2 * width * num_heads * int(causal_pairs(seqlen, seqlen, True))
    mode = "fused" if fused else "materialized"
    return (
        lambda: triton_attn.mla_prefill(q_nope, q_pe, latents, rotary, *weights, mode=mode),
        {"_mla_prefill_kernel": Work(size(q_nope, q_pe, rotary, *keys), size(out), flops, tiles)},
    )


CALLS = {
    "flash": flash,
    "flash_backward": flash_backward,
    "paged": paged,
    "paged_prefill": paged,
    "append": append,
    "append_latent": append_latent,
    "copy": copy,
    "gather": gather,
    "gather_latent": gather_latent,
    "merge": merge,
    "mla": mla,
    "mla_prefill": mla_prefill,
}
