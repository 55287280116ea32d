"""Compilation ahead of the first call, into Triton's disk cache."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._host.backend import is_batch_invariant
from .._host.checks import (
    KERNEL_DTYPES,
    QUANTIZED_BITS,
    check_bool,
    check_length,
    check_number,
    check_size,
    check_window,
    fail,
)
from .._host.key_shard import check_interleave
from ..models import model_named

NOT_BY_DEFAULT = ("flash_attention_backward", "mla_prefill_backward", "prefix_tree", "tree_mask")
NEED_PAGES = ("prefix_tree", "append_kv_cache", "copy_kv_pages", "gather_kv_cache")


class WarmupResult(NamedTuple):
    """The number of compiled kernels, of kernels already in Triton's cache, and the seconds for all of them."""

    compiled: int
    cached: int
    seconds: float


def warmup(
    model: str | None = None,
    *,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    tensor_parallel_size: int = 1,
    context_parallel_size: int = 1,
    interleave: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    kv_cache_dtype: torch.dtype | None = None,
    page_size: int | None = None,
    causal: bool = True,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: bool | torch.dtype | None = None,
    alibi: bool = False,
    rotary_dim: int = 0,
    rope_interleaved: bool = False,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    batch_invariant: bool | None = None,
    max_seqlen: int = 16384,
    functions: Sequence[str] | None = None,
    arch: str | None = None,
    num_workers: int = 1,
    report: Callable[[str], object] | None = None,
) -> WarmupResult:
    """Compile the kernels for a model's shapes ahead of time, so that a server's first request does not wait.

    The real calls are made without launching anything. Compiled kernels go to Triton's disk cache (TRITON_CACHE_DIR),
    where this process and later ones find them. The target GPU need not be present. Kernels do not depend on lengths,
    batch size, number of pages or width of a block table, so a few calls cover all.

    Args:
        model: a name of `triton_attn.models`, in any case: "llama-3-8b", "gemma-3-12b", "deepseek-v3". It sets the
            heads, and window_size and sinks if these are None. If only some layers of the model have a window, both
            kinds of layer are compiled. None: the heads are arguments.
        num_heads_q, num_heads_kv, head_dim: override or replace the model's. None: num_heads_kv is num_heads_q.
        head_dim_v: of values; None means head_dim.
        kv_lora_rank, qk_rope_head_dim: for MLA; head_dim is then qk_nope_head_dim + qk_rope_head_dim.
        tensor_parallel_size: GPUs that share the heads. Each has num_heads / tensor_parallel_size, and at least one.
        context_parallel_size: GPUs that share the keys, as in `triton_attn.parallel`. Calls over a cache then have a
            key_shard, of every rank, and flash_attention and mla_prefill, in training too, are also called for the
            parts of a sequence, the first with `shard` and without. The heads are those that a rank attends with: all
            of them for heads="sharded", and for "ulysses" its share, by tensor_parallel_size.
        interleave: of key_shard: keys in a row that a rank holds. It divides page_size.
        dtype: of queries: fp16, bf16 or fp32.
        kv_cache_dtype: None means dtype. Otherwise float8_e4m3fn, float8_e5m2 or int8, with every kind of scale; with
            scales for each token and head as `PagedKVCache` holds them.
        page_size: tokens per page. None means 16, and 64 for MLA. 0 means a contiguous cache, without block tables.
        causal, window_size, softcap: as calls pass them. A window_size of None means the model's window (window - 1
            keys to the left), or none.
        sinks: whether calls pass sinks. True means sinks of dtype, torch.float32 means sinks in fp32.
        alibi: whether calls pass alibi_slopes (num_heads_q,).
        rotary_dim, rope_interleaved: rotary positions in the append kernels and in MLA decode, with angles in fp32 and
            positions in int64. 0 means none.
        dropout_p: of flash_attention. MLA has neither this nor window_size, softcap, sinks and alibi.
        deterministic: of flash_attention; for MLA, that training runs under torch.use_deterministic_algorithms(True).
        batch_invariant: whether calls of paged_attention and mla_decode pass it: they have kernels of their own. None
            follows TRITON_ATTN_BATCH_INVARIANT=1. "prefix_tree" has no such calls.
        max_seqlen: the longest prompt and context, in tokens.
        functions: names of the called functions. None means the functions that serving calls:
            "flash_attention", "flash_attention_varlen", "paged_attention" (decode with up to 8 queries each,
            chunks of prompts), "append_kv_cache", "copy_kv_pages", "gather_kv_cache",
            "merge_attention"; for MLA "mla_prefill", "mla_decode" (with w_uk and w_uv), "append_latent_cache",
            "copy_kv_pages", "gather_latent_cache".
            Also available: for training "flash_attention_backward" and "mla_prefill_backward", which stand for both
            passes with gradients of all tensors, or for MLA of all but the weights; "prefix_tree" and "tree_mask" for
            calls of paged_attention or mla_decode with one of them, and if both are named, with both.
        arch: the target, as in `triton_attn.toolchain.compile_only`: "sm_90", "gfx942", ... None: the present GPU.
        num_workers: processes that compile in parallel. With more than 1, processes are spawned, and a script needs the
            usual `if __name__ == "__main__":`.
        report: called with one line for each finished kernel, e.g. `print`.

    Returns:
        WarmupResult (compiled, cached, seconds).

    Before Triton 3.8 each kernel also has a launcher in C, which is built only if there is a GPU to link it for.

    The first call still compiles for strides that 16 does not divide, tensors that do not begin at multiples of 16
    bytes, and prompts whose keys of one head exceed mla_prefill's default workspace.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was compiled.
        RuntimeError: TRITON_INTERPRET is set, or arch is None and there is no GPU.

    Example:
        >>> heads = dict(num_heads_q=8, num_heads_kv=2, head_dim=64)
        >>> result = triton_attn.warmup(**heads, functions=["merge_attention"], arch="sm_90")
        >>> result.compiled + result.cached > 0
        True
    """
    shape = dict(
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
    )
    windows = [window_size]
    if model is not None:
        known = model_named(model)
        shape = {name: getattr(known, name) if size is None else size for name, size in shape.items()}
        sinks = known.sinks if sinks is None else sinks
        windows = _windows(known) if window_size is None else windows
    options: dict[str, Any] = dict(
        dtype=dtype,
        kv_cache_dtype=dtype if kv_cache_dtype is None else kv_cache_dtype,
        causal=check_bool("causal", causal),
        softcap=check_number("softcap", softcap),
        sinks=_check_sinks(sinks, dtype),
        alibi=check_bool("alibi", alibi),
        rotary_dim=check_length("rotary_dim", rotary_dim),
        rope_interleaved=check_bool("rope_interleaved", rope_interleaved),
        dropout_p=check_number("dropout_p", dropout_p),
        deterministic=check_bool("deterministic", deterministic),
        batch_invariant=is_batch_invariant(batch_invariant),
        max_seqlen=check_size("max_seqlen", max_seqlen),
        context_parallel_size=check_size("context_parallel_size", context_parallel_size),
    )
    shape = _check_shape(tensor_parallel_size, **shape)
    _check_dtypes(**options)
    if shape["kv_lora_rank"] is not None:
        if options["kv_cache_dtype"] == torch.int8:
            fail("kv_cache_dtype", "a dtype of latent caches", torch.int8, TypeError)
        _refuse_of_latent_vectors(options | {"window_size": None if windows == [None] else windows})
    page_size = _check_page_size(shape["kv_lora_rank"] is not None, page_size)
    options["interleave"] = check_interleave("interleave", interleave, page_size or interleave)
    num_workers = check_size("num_workers", num_workers)
    windows = [None if window is None else check_window(window) for window in windows]

    from .compilation import compile_all
    from .workload import OF_ANY_HEADS, OF_LATENT_VECTORS, Workload, call_both_trees

    known = OF_ANY_HEADS if shape["kv_lora_rank"] is None else OF_LATENT_VECTORS
    functions = _check_functions(functions, known, page_size)
    if options["batch_invariant"] and "prefix_tree" in functions:
        fail("functions", "no prefix_tree with batch_invariant", "prefix_tree")
    works = [Workload(**shape, **options, page_size=page_size, window_size=window or (-1, -1)) for window in windows]
    calls = [known[name] for name in functions]
    if {"prefix_tree", "tree_mask"} <= set(functions):
        calls.append(call_both_trees)
    jobs = [(call, work) for work in works for call in calls]
    start = time.monotonic()
    compiled, cached = compile_all(jobs, _arch_here() if arch is None else arch, num_workers, report)
    return WarmupResult(compiled, cached, time.monotonic() - start)


def _windows(model):
    """The windows of the model's kinds of layer."""
    windows = [None] if model.num_windowed_layers < model.num_layers else []
    return [*windows, (model.window - 1, 0)] if model.num_windowed_layers else windows


def _check_shape(tensor_parallel_size, num_heads_q, num_heads_kv, head_dim, head_dim_v, kv_lora_rank, qk_rope_head_dim):
    num_heads_kv = num_heads_q if num_heads_kv is None else num_heads_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    if (kv_lora_rank is None) != (qk_rope_head_dim is None):
        fail("kv_lora_rank, qk_rope_head_dim", "both or none", "one of them", TypeError)
    sizes = dict(num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, head_dim=head_dim, head_dim_v=head_dim_v)
    latent = dict(kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim)
    sizes = {name: check_size(name, size) for name, size in sizes.items()}
    if kv_lora_rank is not None:
        latent = {name: check_size(name, size) for name, size in latent.items()}
    tensor_parallel_size = check_size("tensor_parallel_size", tensor_parallel_size)
    if kv_lora_rank is not None and qk_rope_head_dim >= head_dim:
        fail("qk_rope_head_dim", f"less than head_dim, {head_dim}", qk_rope_head_dim)
    for name in ("num_heads_q", "num_heads_kv"):
        if sizes[name] % tensor_parallel_size and sizes[name] > tensor_parallel_size:
            fail("tensor_parallel_size", f"a divisor of {name}, {sizes[name]}", tensor_parallel_size)
        sizes[name] = max(1, sizes[name] // tensor_parallel_size)
    return sizes | latent


def _check_sinks(sinks, dtype):
    """The dtype of the sinks, or None."""
    if not isinstance(sinks, torch.dtype):
        return dtype if sinks is not None and check_bool("sinks", sinks, f"a bool, {dtype} or torch.float32") else None
    if sinks not in (dtype, torch.float32):
        fail("sinks", f"a bool, {dtype} or torch.float32", sinks, TypeError)
    return sinks


def _refuse_of_latent_vectors(options):
    for name in ("window_size", "softcap", "sinks", "alibi", "dropout_p"):
        if options[name]:
            fail(name, "none, since MLA's functions do not take it", options[name])


def _check_dtypes(dtype, kv_cache_dtype, **_):
    if dtype not in KERNEL_DTYPES:
        fail("dtype", "float16, bfloat16 or float32", dtype, TypeError)
    if kv_cache_dtype not in (dtype, *QUANTIZED_BITS):
        fail("kv_cache_dtype", f"{dtype}, float8_e4m3fn, float8_e5m2 or int8", kv_cache_dtype, TypeError)


def _check_page_size(is_mla, page_size):
    """The page size. None for a contiguous cache."""
    if page_size is None:
        return 64 if is_mla else 16
    if page_size == 0 and not is_mla:
        return None
    return check_size("page_size", page_size)


def _check_functions(functions, known, page_size):
    if functions is None:
        without = NOT_BY_DEFAULT if page_size else (*NOT_BY_DEFAULT, *NEED_PAGES)
        return [name for name in known if name not in without]
    if isinstance(functions, str):
        fail("functions", "a list of names", repr(functions), TypeError)
    for name in functions:
        if name not in known:
            fail("functions", f"some of {', '.join(known)}", repr(name))
        if name in NEED_PAGES and page_size is None:
            fail("page_size", f"1 or more, since {name} needs pages", 0)
    return functions


def _arch_here():
    if not torch.cuda.is_available():
        raise RuntimeError('arch: there is no GPU here; name the target, such as "sm_90"')
    from .._host.device import arch_of

    return arch_of(torch.empty(0, device="cuda"))
