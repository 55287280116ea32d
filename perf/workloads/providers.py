"""Our kernels and their peers with one signature per family.

A provider of `PROVIDERS` takes a `Problem` and a device and returns a function of q, k and v. All tensors are (batch,
seqlen, heads, head_dim). A provider of `DECODE_PROVIDERS` takes a `DecodeProblem`, q and the contiguous caches and
returns a decode step: a function without arguments. Everything that a serving loop has at hand is prepared beforehand.
`LATENT_DECODE_PROVIDERS` are the same for a `LatentDecodeProblem`, q and the rows of the cache. A provider of
`LATENT_PREFILL_PROVIDERS` takes the six tensors of `mla_prefill` and returns its result.

A peer from another package is listed if the package is installed, and its provider imports it.
"""

import math
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from perf.results import OURS
from triton_attn import (
    append_kv_cache,
    append_latent_cache,
    flash_attention,
    mla_decode,
    mla_prefill,
    paged_attention,
)
from triton_attn._host.latent import latent_storage
from triton_attn.mla.schedule import MODES

WORKSPACE_BYTES = 2**27  # as FlashInfer recommends


def _installed(providers):
    """{name: provider} of {name: (package, provider)} for the installed packages."""
    return {name: provider for name, (package, provider) in providers.items() if _is_installed(package)}


def _is_installed(package):
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is not installed
        return False


def _ours(problem, device):
    return partial(flash_attention, causal=problem.causal)


def _sdpa(backend):
    def provider(problem, device):
        def attention(q, k, v):
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(*_heads_first(q, k, v), is_causal=problem.causal)
            return out.transpose(1, 2)

        return attention

    return provider


def _flex(problem, device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # dynamo keeps only a few shapes per function
    length = problem.seqlen
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device) if problem.causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*_heads_first(q, k, v), block_mask=mask).transpose(1, 2)


def _tutorial(problem, device):
    from perf.workloads.tutorial import attention, supports

    if not supports(problem.seqlen, problem.head_dim):
        raise NotImplementedError("the tutorial's kernel needs head_dim 64 or 128 and seqlen a multiple of 128")
    return lambda q, k, v: attention(*_heads_first(q, k, v), problem.causal).transpose(1, 2)


def _naive(problem, device):
    """Scores in memory, in the dtype of the input."""
    shape = problem.seqlen, problem.seqlen
    hidden = torch.ones(shape, dtype=torch.bool, device=device).triu(1) if problem.causal else None

    def attention(q, k, v):
        q, k, v = _heads_first(q, k, v)
        scores = q @ k.transpose(2, 3) / math.sqrt(problem.head_dim)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    return attention


def _heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def _flash_attn(module):
    """`flash_attn_func` of a version of FlashAttention. Some versions also return the log-sum-exp."""

    def provider(problem, device):
        function = import_module(module).flash_attn_func

        def attention(q, k, v):
            out = function(q, k, v, causal=problem.causal)
            return out[0] if isinstance(out, tuple) else out

        return attention

    return provider


def _flashinfer(problem, device):
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    if problem.direction != "forward":
        raise NotImplementedError("FlashInfer has no backward pass")
    if problem.head_dim_v != problem.head_dim:
        raise NotImplementedError("planned for values as wide as keys")
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD")
    bounds = torch.arange(problem.batch + 1, dtype=torch.int32, device=device) * problem.seqlen
    heads = problem.num_heads, problem.num_heads, problem.head_dim
    plan = cache(lambda dtype: wrapper.plan(bounds, bounds, *heads, causal=problem.causal, q_data_type=dtype))

    def attention(q, k, v):
        plan(q.dtype)
        return wrapper.run(*(x.flatten(0, 1) for x in (q, k, v))).view_as(q)

    return attention


def _workspace(device):
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


PROVIDERS = {
    OURS: _ours,
    "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "FlexAttention": _flex,
    "Triton tutorial": _tutorial,
    "naive torch": _naive,
} | _installed(
    {
        "FlashAttention-2": ("flash_attn_2_cuda", _flash_attn("flash_attn")),
        "FlashAttention-3": ("flash_attn_interface", _flash_attn("flash_attn_interface")),
        "FlashAttention-4": ("flash_attn.cute", _flash_attn("flash_attn.cute")),
        "FlashInfer": ("flashinfer", _flashinfer),
    }
)


def paged_step(problem, q, k_cache, v_cache):
    """Over pages in random order, mixed across sequences."""
    pages, cache_seqlens, block_table = _kv_pages(problem, k_cache, v_cache)
    return partial(paged_attention, q, *pages, cache_seqlens, block_table, out=torch.empty_like(q))


def _kv_pages(problem, k_cache, v_cache):
    """(pages of K and of V, cache_seqlens, block_table) with the contents of the contiguous caches."""
    block_table, slots, cache_seqlens = _pages(problem, k_cache.device)
    pages = [x.new_empty(block_table.numel(), problem.page_size, *x.shape[2:]) for x in (k_cache, v_cache)]
    append_kv_cache(k_cache.flatten(0, 1), v_cache.flatten(0, 1), *pages, slots)
    return pages, cache_seqlens, block_table


def _pages(problem, device):
    """(block_table, slots of all tokens, cache_seqlens) of sequences with pages in random order."""
    pages_each = -(-problem.seqlen_k // problem.page_size)
    block_table = torch.randperm(problem.batch * pages_each, device=device).view(problem.batch, pages_each)
    tokens = torch.arange(problem.seqlen_k, device=device)
    slots = block_table[:, tokens // problem.page_size] * problem.page_size + tokens % problem.page_size
    cache_seqlens = torch.full((problem.batch,), problem.seqlen_k, dtype=torch.int32, device=device)
    return block_table.int(), slots.flatten(), cache_seqlens


def _sdpa_decode(backend):
    def provider(problem, q, k_cache, v_cache):
        q, k, v = _heads_first(q, k_cache, v_cache)

        def step():
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        return step

    return provider


def _flex_decode(problem, q, k_cache, v_cache):
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    q, k, v = _heads_first(q, k_cache, v_cache)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, enable_gqa=True).transpose(1, 2)


def _flash_attn_decode(module):
    """Over the contiguous cache, since FlashAttention-2 needs pages of at least 256 tokens."""

    def provider(problem, q, k_cache, v_cache):
        function = import_module(module).flash_attn_with_kvcache
        cache_seqlens = torch.full((problem.batch,), problem.seqlen_k, dtype=torch.int32, device=q.device)
        return partial(function, q, k_cache, v_cache, cache_seqlens=cache_seqlens, causal=True)

    return provider


def _flashinfer_decode(problem, q, k_cache, v_cache):
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    pages, _, block_table = _kv_pages(problem, k_cache, v_cache)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "NHD", use_tensor_cores=True)
    last = torch.full_like(block_table[:, 0], (problem.seqlen_k - 1) % problem.page_size + 1)
    heads = problem.num_heads_q, problem.num_heads_kv, problem.head_dim
    dtypes = {"q_data_type": q.dtype, "kv_data_type": q.dtype}
    wrapper.plan(_page_bounds(block_table), block_table.flatten(), last, *heads, problem.page_size, **dtypes)
    return lambda: wrapper.run(q.squeeze(1), tuple(pages)).unsqueeze(1)


def _page_bounds(block_table):
    """Start and end of each sequence's pages in the flattened table."""
    batch, pages_each = block_table.shape
    return torch.arange(batch + 1, dtype=torch.int32, device=block_table.device) * pages_each


def _vllm_flash(problem, q, k_cache, v_cache):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    args, options = _vllm_call(problem, q, k_cache, v_cache)
    return lambda: flash_attn_varlen_func(*args, **options).unsqueeze(1)


def _vllm_triton(problem, q, k_cache, v_cache):
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    args, options = _vllm_call(problem, q, k_cache, v_cache)
    out = torch.empty_like(args[0])
    options |= {"out": out, "window_size": (-1, -1), "softcap": 0.0, "softmax_scale": problem.head_dim**-0.5}
    options |= dict.fromkeys(("q_descale", "k_descale", "v_descale"))

    def step():
        unified_attention(*args, **options)
        return out.unsqueeze(1)

    return step


def _vllm_call(problem, q, k_cache, v_cache):
    """(q and the pages, options) in the form that both functions of vLLM take."""
    pages, cache_seqlens, block_table = _kv_pages(problem, k_cache, v_cache)
    cu_seqlens_q = torch.arange(problem.batch + 1, dtype=torch.int32, device=q.device)
    lengths = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": 1, "seqused_k": cache_seqlens}
    lengths["max_seqlen_k"] = problem.seqlen_k
    return (q.squeeze(1), *pages), lengths | {"block_table": block_table, "causal": True}


DECODE_PROVIDERS = {
    OURS: paged_step,
    "SDPA flash": _sdpa_decode(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": _sdpa_decode(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": _flex_decode,
} | _installed(
    {
        "FlashAttention-2": ("flash_attn_2_cuda", _flash_attn_decode("flash_attn")),
        "FlashAttention-3": ("flash_attn_interface", _flash_attn_decode("flash_attn_interface")),
        "FlashInfer": ("flashinfer", _flashinfer_decode),
        "vLLM flash": ("vllm", _vllm_flash),
        "vLLM Triton": ("vllm", _vllm_triton),
    }
)


def latent_pages(problem, rows):
    """(latent_cache, cache_seqlens, block_table) with the contents of rows (batch, seqlen_k, dim)."""
    widths = problem.kv_lora_rank, problem.qk_rope_head_dim
    block_table, slots, cache_seqlens = _pages(problem, rows.device)
    dtype, width = latent_storage(*widths, _cache_dtype(problem, rows))
    cache = rows.new_empty(block_table.numel(), problem.page_size, width, dtype=dtype)
    append_latent_cache(*rows.flatten(0, 1).split(widths, dim=1), cache, slots)
    return cache, cache_seqlens, block_table


def _cache_dtype(problem, rows):
    dtype = getattr(torch, problem.cache_dtype)
    return dtype if dtype.itemsize == 1 else rows.dtype


def latent_step(problem, q, rows):
    q_nope, q_pe = q.split([problem.kv_lora_rank, problem.qk_rope_head_dim], dim=3)
    return partial(mla_decode, q_nope, q_pe, *latent_pages(problem, rows), softmax_scale=problem.head_dim**-0.5)


def _flash_mla(problem, q, rows):
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    if problem.cache_dtype != "bfloat16":
        raise NotImplementedError("FlashMLA supports bf16 caches without a mask only")
    cache, cache_seqlens, block_table = latent_pages(problem, rows)
    metadata = get_mla_metadata(cache_seqlens, problem.num_heads_q, 1)
    args = q, cache.unsqueeze(2), block_table, cache_seqlens, problem.kv_lora_rank, *metadata
    return lambda: flash_mla_with_kvcache(*args, softmax_scale=problem.head_dim**-0.5)[0]


def _flashinfer_mla(problem, q, rows):
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    if problem.cache_dtype != "bfloat16":
        raise NotImplementedError("FlashInfer's fp8 cache has another layout")
    cache, cache_seqlens, block_table = latent_pages(problem, rows)
    widths = problem.kv_lora_rank, problem.qk_rope_head_dim
    wrapper = BatchMLAPagedAttentionWrapper(_workspace(q.device))
    queries = torch.arange(problem.batch + 1, dtype=torch.int32, device=q.device)
    wrapper.plan(
        queries,
        _page_bounds(block_table),
        block_table.flatten(),
        cache_seqlens,
        problem.num_heads_q,
        *widths,
        problem.page_size,
        True,  # causal
        problem.head_dim**-0.5,
        q.dtype,
        cache.dtype,
    )
    args = *q.squeeze(1).split(widths, dim=2), *cache.split(widths, dim=2)
    return lambda: wrapper.run(*args).unsqueeze(1)


FLASH_MLA = "FlashMLA"
LATENT_DECODE_PROVIDERS = {OURS: latent_step} | _installed(
    {FLASH_MLA: ("flash_mla", _flash_mla), "FlashInfer": ("flashinfer", _flashinfer_mla)}
)


def _sdpa_expanded(backend):
    """Keys and values of every head in memory, then attention."""

    def attention(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv):
        from torch.nn.attention.bias import causal_lower_right  # imports much of torch's compiler, which takes seconds

        num_heads, v_head_dim, _ = w_uv.shape
        k_nope, v = (torch.einsum("bjc,hdc->bhjd", kv_latent, w) for w in (w_uk, w_uv))
        q = torch.cat([q_nope, q_pe], dim=3).transpose(1, 2)
        k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, num_heads, -1, -1)], dim=3)
        v = pad(v, (0, q.shape[3] - v_head_dim))  # the flash kernel has one width
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))
        return out[..., :v_head_dim].transpose(1, 2)

    return attention


FLEX = "FlexAttention"
LEFT_OUT = {FLEX, "naive torch"}  # slow to compile, and slow: they run only where a target needs them
COMPILED_PEERS = {FLEX, "Triton tutorial", "vLLM Triton"}


def peers_of(providers):
    """The providers of others that a kernel is timed beside."""
    return {name: provider for name, provider in providers.items() if name != OURS and name not in LEFT_OUT}


SCHEDULES = {f"{OURS}, {mode}": mode for mode in MODES}
LATENT_PREFILL_PROVIDERS = {name: partial(mla_prefill, mode=mode) for name, mode in SCHEDULES.items()} | {
    "SDPA flash, expanded heads": _sdpa_expanded(SDPBackend.FLASH_ATTENTION)
}
