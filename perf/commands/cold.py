"""Cold-start cost: imports, first and later calls of each function, and the number of kernels that a call compiles.

`cold_import.csv` has the seconds of imports, each in its own process. `cold_calls.csv` has the seconds of a function's
first call in its own process, with Triton's disk cache empty and then warm, and the host time of later calls in
microseconds. Values are medians over several processes. Shapes are those of Llama-3-8B and DeepSeek-V3, in bf16.

Without a GPU, calls go through `compile_only`, which compiles and launches nothing. The driver's time to load and
launch a kernel is then missing, as the column `launched` says. Operations of torch run on the CPU.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import triton
from tqdm import tqdm

import triton_attn
from perf import results
from perf.commands.cache import cpu_name
from perf.harness.device import gpu_arch, gpu_name, has_gpu, versions
from perf.results.tables import print_table
from perf.workloads.models import DEEPSEEK_V3, LLAMA_3_8B
from triton_attn.toolchain import compile_only

IMPORTS = ("torch", "torch, triton", "torch, triton_attn")
LATER_CALLS = 50
MACHINE = ["cpu", "gpu", "driver", "torch", "triton", "commit", "source"]
IMPORT_COLUMNS = ["imports", "processes", "seconds", *MACHINE]
CALL_COLUMNS = [
    "function",
    "arch",
    "launched",
    "processes",
    "empty_cache_s",
    "warm_cache_s",
    "later_call_us",
    "kernels",
    "compiled_empty",
    "compiled_warm",
    *MACHINE,
]


def run(out_dir, arch="sm_90", processes=3):
    """Print both tables and write them as CSV files."""
    arch = gpu_arch() or arch
    about = versions()
    machine = [cpu_name(), gpu_name(), *(about[name] for name in MACHINE[2:6]), results.MEASURED]
    progress = tqdm(total=len(IMPORTS) + len(CALLS), desc="cold start")
    import_path, call_path = out_dir / "cold_import.csv", out_dir / "cold_calls.csv"
    imports, calls = [], []
    with results.Table(import_path, IMPORT_COLUMNS) as table:
        for modules in IMPORTS:
            imports.append([modules, processes, statistics.median(import_seconds(modules) for _ in range(processes))])
            table.append(imports[-1] + machine)
            progress.update()
    with results.Table(call_path, CALL_COLUMNS) as table:
        for name in CALLS:
            calls.append([name, arch, "yes" if has_gpu() else "no", processes, *cold_and_warm(name, arch, processes)])
            table.append(calls[-1] + machine)
            progress.update()
    progress.close()
    print_table([dict(zip(IMPORT_COLUMNS, row)) for row in imports])
    print_table([dict(zip(CALL_COLUMNS, row)) for row in calls])
    if not has_gpu():
        print("No GPU: calls were compiled and not launched.")
    return [import_path, call_path]


def import_seconds(modules):
    source = f"import time; start = time.perf_counter(); import {modules}; print(time.perf_counter() - start)"
    return float(_output([sys.executable, "-c", source], os.environ))


def cold_and_warm(name, arch, processes):
    """The columns from empty_cache_s to compiled_warm."""
    runs = {"empty": [], "warm": []}
    for _ in range(processes):
        with tempfile.TemporaryDirectory() as cache:
            env = os.environ | {"TRITON_CACHE_DIR": cache}
            for found in runs.values():
                found.append(json.loads(_output([sys.executable, "-m", "perf.commands.cold", name, arch], env)))
    empty, warm = ({key: statistics.median(x[key] for x in found) for key in found[0]} for found in runs.values())
    kernels = empty["compiled"] + empty["found"]
    return [empty["first_s"], warm["first_s"], warm["later_us"], kernels, empty["compiled"], warm["compiled"]]


def _output(command, env):
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def time_here(name, arch):
    """{first_s, later_us, compiled, found} of the function in this process."""
    hits = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    with torch.device("cuda" if has_gpu() else "cpu"):
        call = CALLS[name]()
    with contextlib.nullcontext() if has_gpu() else compile_only(arch, every_launch=False):
        first = _seconds(call)
        compiled = len(hits) - sum(hits)
        later = statistics.median(_seconds(call, wait=False) for _ in range(LATER_CALLS))
    return {"first_s": first, "later_us": 1e6 * later, "compiled": compiled, "found": sum(hits)}


def _seconds(call, wait=True):
    """Seconds of a call. With `wait`, the time of the kernels it launched is included."""
    start = time.perf_counter()
    call()
    if wait and has_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _tensor(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def _qkv(*rows):
    model = LLAMA_3_8B
    return [_tensor(*rows, n, model.head_dim) for n in (model.num_heads_q, model.num_heads_kv, model.num_heads_kv)]


def _index(*shape, dtype=torch.int32):
    return _tensor(*shape, dtype=dtype)


def _flash_attention():
    q, k, v = _qkv(1, 512)
    return lambda: triton_attn.flash_attention(q, k, v, causal=True)


def _flash_attention_varlen():
    q, k, v = _qkv(512)
    cu_seqlens = torch.tensor([0, 512], dtype=torch.int32)
    return lambda: triton_attn.flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 512, 512, causal=True)


def _flash_attention_backward():
    inputs = [x.requires_grad_() for x in _qkv(1, 512)]

    def call():
        out = triton_attn.flash_attention(*inputs, causal=True)
        torch.autograd.grad(out, inputs, out.detach())

    return call


def _paged_attention(seqlen_q):
    batch = 8 if seqlen_q == 1 else 1
    q = _qkv(batch, seqlen_q)[0]
    cache = _tensor(64, 16, LLAMA_3_8B.num_heads_kv, LLAMA_3_8B.head_dim)
    lens, table = _index(batch) + 512, _index(batch, 64)
    return lambda: triton_attn.paged_attention(q, cache, cache, lens, table)


def _append_kv_cache():
    _, k, v = _qkv(8)
    cache = _tensor(64, 16, LLAMA_3_8B.num_heads_kv, LLAMA_3_8B.head_dim)
    slots = torch.arange(8)
    return lambda: triton_attn.append_kv_cache(k, v, cache, cache, slots)


def _copy_kv_pages():
    cache = _tensor(64, 16, LLAMA_3_8B.num_heads_kv, LLAMA_3_8B.head_dim)
    src_pages, dst_pages = _index(1), _index(1) + 1
    return lambda: triton_attn.copy_kv_pages(cache, src_pages, dst_pages)


def _merge_attention():
    outs = _tensor(2, 8, 1, LLAMA_3_8B.num_heads_q, LLAMA_3_8B.head_dim)
    lses = _tensor(2, 8, LLAMA_3_8B.num_heads_q, 1, dtype=torch.float32)
    return lambda: triton_attn.merge_attention(outs, lses)


def _latent_inputs(*rows):
    """(q_nope, q_pe, w_uk, w_uv)."""
    model = DEEPSEEK_V3
    nope, heads = model.head_dim - model.qk_rope_head_dim, model.num_heads_q
    weights = [_tensor(heads, dim, model.kv_lora_rank) for dim in (nope, model.head_dim_v)]
    return _tensor(*rows, heads, nope), _tensor(*rows, heads, model.qk_rope_head_dim), *weights


def _latents(*rows):
    widths = [DEEPSEEK_V3.kv_lora_rank, DEEPSEEK_V3.qk_rope_head_dim]
    return _tensor(*rows, sum(widths)).split(widths, dim=-1)


def _mla_decode():
    q_nope, q_pe, w_uk, w_uv = _latent_inputs(8, 1)
    cache = _tensor(64, 64, DEEPSEEK_V3.kv_lora_rank + DEEPSEEK_V3.qk_rope_head_dim)
    lens, table = _index(8) + 512, _index(8, 64)
    return lambda: triton_attn.mla_decode(q_nope, q_pe, cache, lens, table, w_uk, w_uv)


def _mla_prefill(mode):
    q_nope, q_pe, *weights = _latent_inputs(1, 64)
    latents = _latents(1, 64)
    return lambda: triton_attn.mla_prefill(q_nope, q_pe, *latents, *weights, mode=mode)


def _append_latent_cache():
    latents, cache = _latents(8), _tensor(64, 64, DEEPSEEK_V3.kv_lora_rank + DEEPSEEK_V3.qk_rope_head_dim)
    slots = torch.arange(8)
    return lambda: triton_attn.append_latent_cache(*latents, cache, slots)


# Each function makes its tensors and returns the call.
CALLS = {
    "flash_attention": _flash_attention,
    "flash_attention_varlen": _flash_attention_varlen,
    "flash_attention, both passes": _flash_attention_backward,
    "paged_attention, decode": lambda: _paged_attention(1),
    "paged_attention, chunk": lambda: _paged_attention(256),
    "append_kv_cache": _append_kv_cache,
    "copy_kv_pages": _copy_kv_pages,
    "merge_attention": _merge_attention,
    "mla_decode": _mla_decode,
    "mla_prefill, fused": lambda: _mla_prefill("fused"),
    "mla_prefill, absorbed": lambda: _mla_prefill("absorbed"),
    "append_latent_cache": _append_latent_cache,
}


def add_arguments(parser):
    parser.add_argument("--arch", default="sm_90", help="compilation target, without a GPU (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=3, help="processes for each measurement (default: %(default)s)"
    )


if __name__ == "__main__":
    print(json.dumps(time_here(*sys.argv[1:])))
