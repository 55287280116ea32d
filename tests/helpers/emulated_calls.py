"""Small calls of every family with fp64 results, and which of them launches each kernel of the package."""

import ast
import contextlib
import itertools
import os
import shutil
from pathlib import Path
from unittest import mock

import hopper_cases
import pytest
import torch
import triton

import triton_attn as ta
from triton_attn import reference
from triton_attn.interop.vllm import inline_scales
from triton_attn.toolchain.emulator import emulate

# Decorators of a file that opens `emulate` itself.
MARKS = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C++ compiler"),
]
OLDEST = triton.__version__.startswith("3.6.")
BF16 = torch.bfloat16
# The scale of an error: bf16 has 8 bits of precision, and a gradient sums many terms.
BOUND = 0.03


def normal(*shape, dtype=BF16):
    return torch.randn(*shape).to(dtype)


@contextlib.contextmanager
def placed(which, place):
    """The n-th tensor of `normal` is placed by `place`."""
    numbers, make = itertools.count(), normal

    def normal_there(*shape, **options):
        x = make(*shape, **options)
        return place(x) if next(numbers) == which else x

    with mock.patch.dict(globals(), normal=normal_there):
        yield


def in_fp64(values):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def flash(head_dim=64, seqlens=(70, 150), num_heads=(4, 2), **options):
    """Causal, with more keys than queries and a partial tile at the end of each."""
    (seqlen_q, seqlen_k), (num_heads_q, num_heads_kv) = seqlens, num_heads
    q, k, v = (
        normal(1, seqlen, heads, head_dim)
        for seqlen, heads in ((seqlen_q, num_heads_q), (seqlen_k, num_heads_kv), (seqlen_k, num_heads_kv))
    )
    options = {"causal": True, "return_lse": True, **options}
    computed = ta.flash_attention(q, k, v, **options)
    return computed, reference.flash_attention(*in_fp64((q, k, v)), **options)


def several_tiles(call, *args):
    """Programs of Hopper's forward kernel have three tiles: queries and results pass through one buffer each."""
    with hopper_cases.several_tiles(3):
        return call(*args)


def flash_of_expanded_heads():
    """Rows allow copies of 16 bytes but no tensor map, since a stride is 0."""
    q, k, v = (normal(1, 140, 1, 128).expand(1, 140, 2, 128) for _ in range(3))
    computed = ta.flash_attention(q, k, v, causal=True)
    return [computed], [reference.flash_attention(*in_fp64((q, k, v)), causal=True)]


def flash_varlen(spare_rows=0, seqlens=(90, 0, 50), num_heads=(4, 2), head_dim=64):
    num_heads_q, num_heads_kv = num_heads
    q, k, v = (
        normal(sum(seqlens) + spare_rows, heads, head_dim) for heads in (num_heads_q, num_heads_kv, num_heads_kv)
    )
    bounds = int32(0, *itertools.accumulate(seqlens))
    lengths = bounds, bounds, max(seqlens), max(seqlens)
    options = {"causal": True, "return_lse": True}
    computed = ta.flash_attention_varlen(q, k, v, *lengths, **options)
    return computed, reference.flash_attention_varlen(*in_fp64((q, k, v)), *lengths, **options)


def backward(deterministic, seqlen=100, num_heads=2, expanded=False, head_dim=64, **more):
    """Expanded heads allow no tensor map, as in `flash_of_expanded_heads`."""
    heads = 1 if expanded else num_heads, 1, 1
    inputs = [normal(1, seqlen, each, head_dim) for each in heads]
    out_grad = normal(1, seqlen, num_heads, head_dim)

    def gradients(function, dtype, **options):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        heads = num_heads if expanded else -1
        out = function(*(x.expand(-1, -1, heads, -1) for x in leaves), causal=True, **options, **more)
        out.backward(out_grad.to(dtype))
        return [out.detach(), *(x.grad for x in leaves)]

    computed = gradients(ta.flash_attention, BF16, deterministic=deterministic)
    return computed, gradients(reference.flash_attention, torch.float64)


def paged(seqlens=(230, 133), seqlen_q=1, head_dim=64, shard=None, **options):
    """shard: options that the reference needs too."""
    num_pages = len(seqlens) * (max(seqlens) // 16 + 1)
    keys, values = (normal(num_pages, 16, 2, head_dim) for _ in range(2))
    q = normal(len(seqlens), seqlen_q, 8, head_dim)
    where = int32(*seqlens), torch.randperm(num_pages).to(torch.int32).view(len(seqlens), -1)
    same = {"causal": True, "return_lse": True} | (shard or {})
    computed = ta.paged_attention(q, keys, values, *where, **options, **same)
    return computed, reference.paged_attention(*in_fp64((q, keys, values)), *where, **same)


def paged_per_token(dtype, **shape):
    """A cache of integers, exact in each dtype; in int8 with scales in the rows of elements, as vLLM's."""
    seqlens, num_pages = (230, 133), 30
    memory = torch.randint(-8, 9, (num_pages, 2, 16, 2 * 64 + 8), dtype=torch.int8)
    scales = torch.rand(2, num_pages, 2, 16) / 4
    views = inline_scales(memory)
    for view, scale in zip(views[2:], scales):
        view.copy_(scale.transpose(1, 2))
    caches = [view.float().to(dtype) for view in views[:2]]
    scales = [scale.transpose(1, 2) for scale in scales]
    given = views if dtype == torch.int8 else (*caches, *scales)
    q = normal(2, shape.get("seqlen_q", 1), 8, 64)
    where = int32(*seqlens), torch.randperm(num_pages).to(torch.int32).view(2, -1)

    def attend(function, q, k, v, k_scale, v_scale):
        return function(q, k, v, *where, k_scale=k_scale, v_scale=v_scale, causal=True, return_lse=True)

    exact = in_fp64((q, *(x.float() for x in caches), *scales))
    return attend(ta.paged_attention, q, *given), attend(reference.paged_attention, *exact)


def append_per_token(dtype):
    rows, slots = (normal(20, 2, 64), normal(20, 2, 48)), torch.randperm(64)[:20]

    def written(function):
        caches = [torch.zeros(4, 16, 2, dim).to(dtype) for dim in (64, 48)]
        scales = [torch.zeros(4, 2, 16).transpose(1, 2) for _ in caches]
        function(*rows, *caches, slots, k_scale=scales[0], v_scale=scales[1])
        return [x.float() for x in (*caches, *scales)]

    return written(ta.append_kv_cache), written(reference.append_kv_cache)


def append():
    rows, slots = (normal(20, 2, 64), normal(20, 2, 64)), torch.randperm(64)[:20]

    def caches(function):
        pools = [torch.zeros(4, 16, 2, 64, dtype=BF16) for _ in range(2)]
        function(*rows, *pools, slots)
        return pools

    return caches(ta.append_kv_cache), caches(reference.append_kv_cache)


def append_latent(dtype=BF16, **scales):
    rows, slots = (normal(20, 512), normal(20, 64)), torch.randperm(64)[:20]

    def cache(function):
        pool = torch.zeros(4, 16, 656 if dtype == torch.uint8 else 576, dtype=dtype)
        function(*rows, pool, slots, **scales)
        return [pool.float() if dtype.itemsize == 1 and dtype.is_floating_point else pool]

    return cache(ta.append_latent_cache), cache(reference.append_latent_cache)


def copy():
    """The pointers of the caches are a tuple that the program indexes."""
    pools, of_pages = (normal(2, 8, 16, 2, 64), normal(2, 8, 16, 2, 64)), (int32(0, 1), int32(6, 7))

    def copied(function):
        pair = [pool.clone() for pool in pools]
        function(tuple(pair), *of_pages)
        return pair

    return copied(ta.copy_kv_pages), copied(reference.copy_kv_pages)


def gather(dtype=BF16, scale=None):
    """Chunks of three sequences, one of them empty; pages without a token are NaN."""
    caches = [normal(6, 16, 2, 64).to(dtype) for _ in range(2)]
    for cache in caches:
        cache[5].view(torch.uint8).fill_(0x7F)
    table, starts = torch.tensor([[1, 0], [5, 5], [4, 2]], dtype=torch.int32), int32(3, 0, 16)
    factor = torch.rand(6, 2, 16).transpose(1, 2) if scale == "per token" else scale
    options = dict(seq_starts=starts, k_scale=factor, v_scale=factor, dtype=BF16)
    arguments = *caches, table, int32(0, 20, 20, 30), 33
    return ta.gather_kv_cache(*arguments, **options), reference.gather_kv_cache(*arguments, **options)


def gather_packed():
    caches = normal(6, 2, 8, 16, 8), normal(6, 2, 64, 16)
    arguments = *caches, torch.tensor([[1, 0], [4, 2]], dtype=torch.int32), int32(0, 20, 30), 33
    return ta.gather_kv_cache(*arguments), reference.gather_kv_cache(*arguments)


def gather_latent(dtype=BF16, **scales):
    cache = float8_rows(2) if dtype == torch.uint8 else normal(2, 64, 576).to(dtype)
    arguments = cache, torch.tensor([[1, 0]], dtype=torch.int32), int32(0, 70), 72
    options = dict(kv_lora_rank=512, qk_rope_head_dim=64, **scales)
    return ta.gather_latent_cache(*arguments, **options), reference.gather_latent_cache(*arguments, **options)


def merge(num_parts=3):
    parts, lse = normal(num_parts, 1, 20, 4, 64), torch.randn(num_parts, 1, 4, 20)
    return ta.merge_attention(parts, lse), reference.merge_attention(parts.double(), lse.double())


def float8_rows(num_pages):
    """A cache of rows of 656 bytes. Its scales are no powers of two, so that rounded ones are seen."""
    rows, slots = normal(num_pages, 64, 656, dtype=torch.uint8), torch.arange(64 * num_pages)
    reference.append_latent_cache(normal(len(slots), 512), normal(len(slots), 64), rows, slots)
    rows[..., 512:528].view(torch.float32).mul_(1 + torch.rand(num_pages, 64, 4))
    return rows


def mla_decode(heads=16, seqlen=200, with_weights=False, dtype=BF16, cache_dtype=None, scales=(), **options):
    """With weights, queries are absorbed and outputs projected. A cache_dtype of uint8 stands for fp8 rows. Slots past
    the end are NaN."""
    num_pages = seqlen // 64 + 1
    if cache_dtype == torch.uint8:
        cache = float8_rows(num_pages)
    else:
        cache = normal(num_pages, 64, 576, dtype=dtype).to(cache_dtype or dtype)
    if options.get("key_shard") is None:
        cache[seqlen // 64, seqlen % 64 :].view(torch.uint8).fill_(0xFF)
    where = int32(seqlen), torch.arange(num_pages, dtype=torch.int32)[None]
    queries = (normal(1, 1, heads, dim, dtype=dtype) for dim in (128 if with_weights else 512, 64))
    inputs = [*queries, cache, *where]
    if with_weights:
        inputs += [normal(heads, 128, 512) / 512**0.5 for _ in range(2)]
    same = {"softmax_scale": 0.04, "return_lse": True, "key_shard": options.pop("key_shard", None)} | dict(scales)
    return ta.mla_decode(*inputs, **same, **options), reference.mla_decode(*in_fp64(inputs), **same)


def mla_decode_scaled(heads=16, seqlens=(200, 33), scale=1.0, dtype=BF16, **options):
    """Rows with scales of their own: those of each token and group of columns differ by powers of two."""
    magnitudes = 2.0 ** torch.randint(-8, 3, (8 * 64, 4)).repeat_interleave(128, 1)
    rows = normal(8 * 64, 512) * magnitudes.to(BF16) * scale, normal(8 * 64, 64)
    cache = torch.zeros(8, 64, 656, dtype=torch.uint8)
    reference.append_latent_cache(*rows, cache, torch.arange(8 * 64))
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    inputs = *(normal(2, 1, heads, dim, dtype=dtype) for dim in (512, 64)), cache, int32(*seqlens), table
    same = {"softmax_scale": 0.01 / scale, "return_lse": True}
    return ta.mla_decode(*inputs, **same, **options), reference.mla_decode(*in_fp64(inputs), **same)


def mla_decode_packed(rope=64, dtype=BF16, **scales):
    """Programs find their sequence. A row follows the last one, and rotary keys have a cache of their own."""
    (q_nope, q_pe), (cache, rope_cache) = ([normal(*rows, dim) for dim in (512, rope)] for rows in ((6, 16), (6, 64)))
    cache, rope_cache = cache.to(dtype), rope_cache.to(dtype)
    inputs = q_nope, q_pe, cache, int32(70, 9, 100), torch.arange(6, dtype=torch.int32).view(3, 2)
    same = {"softmax_scale": 0.04, "return_lse": True, "cu_seqlens_q": int32(0, 2, 2, 5), "max_seqlen_q": 6} | scales
    computed = ta.mla_decode(*inputs, rope_cache=rope_cache, **same)
    return computed, reference.mla_decode(*in_fp64(inputs), rope_cache=rope_cache.double(), **same)


def mla_prefill(mode="auto", seqlen=70, heads=2):
    q_nope, q_pe, latents, rope = (normal(1, seqlen, *rest) for rest in ((heads, 128), (heads, 64), (512,), (64,)))
    inputs = q_nope, q_pe, latents, rope, *(normal(heads, 128, 512) / 512**0.5 for _ in range(2))
    return [ta.mla_prefill(*inputs, mode=mode)], [reference.mla_prefill(*in_fp64(inputs))]


CALLS = {
    "flash": flash,
    "flash of expanded heads": flash_of_expanded_heads,
    "flash varlen": flash_varlen,
    "flash backward": lambda: backward(False),
    "flash backward of expanded heads": lambda: backward(True, expanded=True),
    "flash backward deterministic": lambda: backward(True),
    "flash backward 512": lambda: backward(False, head_dim=512),  # dk and dv apart
    "flash backward 512 with dropout": lambda: backward(False, head_dim=512, dropout_p=0.3, dropout_seed=1),
    "flash backward 328": lambda: backward(False, head_dim=328),  # dk and dv in one launch, of 384 columns
    "flash backward 320 with dropout": lambda: backward(
        True, expanded=True, head_dim=320, dropout_p=0.3, dropout_seed=1
    ),
    "paged": paged,
    "paged splits": lambda: paged(num_splits=3),
    "paged chunk": lambda: paged(seqlen_q=40),
    "paged of one rank": lambda: paged(seqlen_q=40, shard={"key_shard": (1, 2, 4), "window_size": (60, -1)}),
    "paged 512": lambda: paged(head_dim=512),
    "paged 512 chunk": lambda: paged((110, 77), seqlen_q=20, head_dim=512),
    "paged int8 per token": lambda: paged_per_token(torch.int8),
    "paged e4m3 per token, chunk": lambda: paged_per_token(torch.float8_e4m3fn, seqlen_q=40),
    "paged e5m2 per token": lambda: paged_per_token(torch.float8_e5m2),
    "append": append,
    "append int8 per token": lambda: append_per_token(torch.int8),
    "append e4m3 per token": lambda: append_per_token(torch.float8_e4m3fn),
    "append latent": append_latent,
    "append latent fp8": lambda: append_latent(torch.uint8),
    "append latent plain fp8": lambda: append_latent(torch.float8_e4m3fn, k_scale=0.3, k_pe_scale=torch.tensor([0.7])),
    "copy": copy,
    "gather": gather,
    "gather packed": gather_packed,
    "gather fp8": lambda: gather(torch.float8_e4m3fn, 0.5),
    "gather int8 per token": lambda: gather(torch.int8, "per token"),
    "gather latent": gather_latent,
    "gather latent fp8": lambda: gather_latent(torch.uint8),
    "gather latent plain fp8": lambda: gather_latent(torch.float8_e5m2, k_scale=0.3, k_pe_scale=torch.tensor([0.7])),
    "merge": merge,
    "mla decode": mla_decode,
    "mla decode of 64 heads": lambda: mla_decode(64),
    "mla decode with weights": lambda: mla_decode(with_weights=True, num_splits=2),
    "mla decode plain fp8": lambda: mla_decode(cache_dtype=torch.float8_e4m3fn, scales={"k_scale": 0.5}),
    "mla decode plain fp8 of 64 heads": lambda: mla_decode(
        64, cache_dtype=torch.float8_e5m2, scales={"k_scale": torch.tensor([0.5]), "k_pe_scale": 0.25}
    ),
    "mla decode scaled fp8": mla_decode_scaled,
    "mla decode scaled fp8 of 64 heads": lambda: mla_decode_scaled(64),
    "mla decode scaled fp8, fp16": lambda: mla_decode_scaled(3, dtype=torch.float16, num_splits=3),
    "mla decode packed": mla_decode_packed,
    "mla decode packed plain fp8": lambda: mla_decode_packed(dtype=torch.float8_e4m3fn, k_pe_scale=torch.tensor([2.0])),
    "mla decode packed without rope": lambda: mla_decode_packed(0),
    "mla prefill": mla_prefill,
    "mla prefill fused": lambda: mla_prefill("fused"),
    "mla prefill absorbed": lambda: mla_prefill("absorbed"),
}
# sm_90 has kernels of its own for these.
CALLS_OF_HOPPER = {
    # Each buffer of a ring is used three times, so that a wait for the wrong phase is seen.
    "flash 128": lambda: flash(128, (70, 700)),
    "flash 128 full": lambda: flash(128, causal=False, return_lse=False),
    "flash 64 full": lambda: flash(64, (70, 700), (2, 1), causal=False),  # three groups
    "flash 96 window": lambda: flash(96, (70, 700), (2, 1), window_size=(300, -1), softcap=20.0),
    "flash varlen, spare rows": lambda: flash_varlen(400),
    "flash of several tiles": lambda: several_tiles(flash, 128, (300, 700), (1, 1)),
    "flash of several tiles, the last program with fewer": lambda: several_tiles(flash, 64, (500, 330), (2, 1)),
    "flash varlen of several tiles, spare rows": lambda: several_tiles(flash_varlen, 800, (300, 0, 150), (2, 1)),
    "mla decode 128": lambda: mla_decode(128, seqlen=330, num_splits=1),
    "mla decode 128 fp16": lambda: mla_decode(128, dtype=torch.float16),
    "mla decode 128 of one rank": lambda: mla_decode(128, seqlen=300, key_shard=(1, 3, 4)),
    "mla decode 128 fp8": lambda: mla_decode(128, seqlen=330, cache_dtype=torch.uint8, num_splits=1),
    "mla decode 128 fp8 of one rank": lambda: mla_decode(128, seqlen=300, cache_dtype=torch.uint8, key_shard=(1, 3, 4)),
}
# Kernels whose wgmma on sm_90 reads tiles copied by cp.async. Triton 3.6 omits the proxy fence between them (triton PR
# 9610, pytorch issue 181248), and _jit/workarounds.py adds it.
FENCED = {
    "flash of expanded heads": {"_flash_fwd_kernel"},
    "flash backward of expanded heads": {"_flash_fwd_kernel", "_flash_bwd_dkdv_kernel", "_flash_bwd_dq_kernel"},
    "paged chunk": {"_paged_fwd_kernel"},
    "paged 512 chunk": {"_paged_fwd_kernel"},
    "mla decode of 64 heads": {"_mla_absorbed_kernel"},
    "mla prefill": {"_mla_prefill_kernel"},
    "mla prefill fused": {"_mla_prefill_kernel"},
    "mla prefill absorbed": {"_absorb_kernel", "_mla_absorbed_kernel"},
}
# For each kernel a call that launches it, and the value of TRITON_ATTN_KERNELS that selects it.
CALL_OF = {
    "_flash_fwd_kernel": ("flash backward deterministic", "portable"),
    "_flash_bwd_delta_kernel": ("flash backward deterministic", "portable"),
    "_flash_bwd_dkdv_kernel": ("flash backward deterministic", "portable"),
    "_flash_bwd_dq_kernel": ("flash backward deterministic", "portable"),
    "_paged_fwd_kernel": ("paged splits", "portable"),
    "_merge_kernel": ("paged splits", "portable"),
    "_append_kv_cache_kernel": ("append", "portable"),
    "_append_latent_cache_kernel": ("append latent fp8", "portable"),
    "_copy_kv_pages_kernel": ("copy", "portable"),
    "_gather_cache_kernel": ("gather", "portable"),
    "_absorb_kernel": ("mla decode with weights", "portable"),
    "_mla_absorbed_kernel": ("mla decode with weights", "portable"),
    "_merge_project_kernel": ("mla decode with weights", "portable"),
    "_mla_prefill_kernel": ("mla prefill", "portable"),
    "_flash_fwd_hopper_kernel": ("flash 128", "hopper"),
    "_mla_decode_hopper_kernel": ("mla decode 128", "hopper"),
}


def kernels_of_package():
    """Names of the package's jit functions that no other one uses: the kernels."""
    compiled, used = set(), set()
    for path in Path(ta.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(".jit" in ast.unparse(x) for x in node.decorator_list):
                compiled.add(node.name)
                used |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return sorted(compiled - used)


def run(name, arch, kernels="portable", **options):
    """The launches of a call whose result is right, without a fault."""
    with mock.patch.dict(os.environ, TRITON_ATTN_KERNELS=kernels), emulate(arch, **options) as log:
        check((CALLS | CALLS_OF_HOPPER)[name])
    assert log
    return log


def check(call):
    computed, expected = call()
    for got, right in zip(computed, expected):
        torch.testing.assert_close(got.double(), right.double(), atol=BOUND, rtol=BOUND, equal_nan=True)
