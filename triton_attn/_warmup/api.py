"""Compiling ahead of the first call, into Triton's cache on disk."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._host.checks import (
    FLOAT8_MANTISSA_BITS,
    KERNEL_DTYPES,
    check_bool,
    check_length,
    check_number,
    check_size,
    check_window,
    fail,
)
from ..models import model_named

NOT_BY_DEFAULT = ("flash_attention_backward", "shared_prefix")
NEED_PAGES = ("shared_prefix", "append_kv_cache", "copy_kv_pages")


class WarmupResult(NamedTuple):
    """Kernels that were compiled, that Triton's cache had already, and the seconds that all took."""

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
    max_seqlen: int = 16384,
    functions: Sequence[str] | None = None,
    arch: str | None = None,
    num_workers: int = 1,
    report: Callable[[str], object] | None = None,
) -> WarmupResult:
    """Compile ahead what calls of a model's shape need, so that a server's first request does not pay.

    The calls are made as they will be, nothing is launched, and what the compiler makes goes to Triton's cache on disk
    (TRITON_CACHE_DIR), where this process and later ones find it, also for a GPU that is not here. A kernel does not
    depend on lengths, batch size, number of pages or width of a block table, so that a few calls stand for all.

    Args:
        model: a name of `triton_attn.models`, in any case: "llama-3-8b", "gemma-3-12b", "deepseek-v3". It gives the
            heads, and window_size and sinks where these are None: of a model some of whose layers see a window both
            kinds of layer are compiled. None: the heads are given.
        num_heads_q, num_heads_kv, head_dim: of the model, or in place of one. None: num_heads_kv is num_heads_q.
        head_dim_v: of values; None is head_dim.
        kv_lora_rank, qk_rope_head_dim: of MLA; head_dim is then qk_nope_head_dim + qk_rope_head_dim.
        tensor_parallel_size: GPUs that share the heads: each has num_heads / tensor_parallel_size, one at the least.
        dtype: of queries: fp16, bf16 or fp32.
        kv_cache_dtype: None is dtype; float8_e4m3fn or float8_e5m2 otherwise, with every kind of scale.
        page_size: tokens on a page; None is 16, for MLA 64; 0 is a contiguous cache, without block tables.
        causal, window_size, softcap: as calls give them; None is the model's window (window - 1 keys to the left), or
            none.
        sinks: whether calls give sinks, of dtype; torch.float32 for those of fp32.
        alibi: whether calls give alibi_slopes (num_heads_q,).
        rotary_dim, rope_interleaved: of rotary positions that the append kernels, and MLA decode, apply, angles in fp32
            and positions in int64; 0 is none.
        dropout_p, deterministic: of flash_attention. MLA has neither these nor window_size, softcap, sinks and alibi.
        max_seqlen: the longest prompt and context, in tokens.
        functions: names of what is called; None is what serving calls:
            "flash_attention", "flash_attention_varlen", "paged_attention" (decode with up to 8 queries a sequence,
            chunks of prompts), "append_kv_cache", "copy_kv_pages", "merge_attention";
            of MLA "mla_prefill", "mla_decode" (with w_uk and w_uv), "append_latent_cache", "copy_kv_pages".
            Besides: "flash_attention_backward" for training, "shared_prefix" for paged_attention's shared_prefix_len.
        arch: the GPU's, as `triton_attn.toolchain.compile_only` takes it: "sm_90", "gfx942", ... None: the GPU here.
        num_workers: processes that compile side by side. More than 1 starts them anew: a script then needs the usual
            `if __name__ == "__main__":`.
        report: called with one line per kernel as it is done, `print` for example.

    Returns:
        WarmupResult (compiled, cached, seconds).

    On Triton before 3.8 each kernel has a launcher in C too, which is made where there is a GPU to link it for.

    What is left to the first call: strides that 16 does not divide, tensors that do not begin at multiples of 16
    bytes, MLA's backward pass, and prompts whose keys of one head exceed mla_prefill's default workspace.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was compiled.
        RuntimeError: TRITON_INTERPRET is set, or arch is None and there is no GPU.
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
        max_seqlen=check_size("max_seqlen", max_seqlen),
    )
    shape = _check_shape(tensor_parallel_size, **shape)
    _check_dtypes(**options)
    if shape["kv_lora_rank"] is not None:
        _refuse_of_latent_vectors(options | {"window_size": None if windows == [None] else windows})
    page_size = _check_page_size(shape["kv_lora_rank"] is not None, page_size)
    num_workers = check_size("num_workers", num_workers)
    windows = [None if window is None else check_window(window) for window in windows]

    from .compilation import compile_all
    from .workload import OF_ANY_HEADS, OF_LATENT_VECTORS, Workload

    served = OF_ANY_HEADS if shape["kv_lora_rank"] is None else OF_LATENT_VECTORS
    functions = _check_functions(functions, served, page_size)
    works = [Workload(**shape, **options, page_size=page_size, window_size=window or (-1, -1)) for window in windows]
    jobs = [(served[name], work) for work in works for name in functions]
    start = time.monotonic()
    compiled, cached = compile_all(jobs, _arch_here() if arch is None else arch, num_workers, report)
    return WarmupResult(compiled, cached, time.monotonic() - start)


def _windows(model):
    """Of the model's kinds of layer."""
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
    """The dtype of sinks, or None."""
    if not isinstance(sinks, torch.dtype):
        return dtype if sinks is not None and check_bool("sinks", sinks, f"a bool, {dtype} or torch.float32") else None
    if sinks not in (dtype, torch.float32):
        fail("sinks", f"a bool, {dtype} or torch.float32", sinks, TypeError)
    return sinks


def _refuse_of_latent_vectors(options):
    for name in ("window_size", "softcap", "sinks", "alibi", "dropout_p", "deterministic"):
        if options[name]:
            fail(name, "none, since MLA's functions do not take it", options[name])


def _check_dtypes(dtype, kv_cache_dtype, **_):
    if dtype not in KERNEL_DTYPES:
        fail("dtype", "float16, bfloat16 or float32", dtype, TypeError)
    if kv_cache_dtype not in (dtype, *FLOAT8_MANTISSA_BITS):
        fail("kv_cache_dtype", f"{dtype}, float8_e4m3fn or float8_e5m2", kv_cache_dtype, TypeError)


def _check_page_size(is_mla, page_size):
    """The page size, None for a contiguous cache."""
    if page_size is None:
        return 64 if is_mla else 16
    if page_size == 0 and not is_mla:
        return None
    return check_size("page_size", page_size)


def _check_functions(functions, served, page_size):
    if functions is None:
        without = NOT_BY_DEFAULT if page_size else (*NOT_BY_DEFAULT, *NEED_PAGES)
        return [name for name in served if name not in without]
    if isinstance(functions, str):
        fail("functions", "a list of names", repr(functions), TypeError)
    for name in functions:
        if name not in served:
            fail("functions", f"some of {', '.join(served)}", repr(name))
        if name in NEED_PAGES and page_size is None:
            fail("page_size", f"1 or more, since {name} is of pages", 0)
    return functions


def _arch_here():
    if not torch.cuda.is_available():
        raise RuntimeError('arch: there is no GPU here; name one to compile for, such as "sm_90"')
    from .._host.device import arch_of

    return arch_of(torch.empty(0, device="cuda"))
