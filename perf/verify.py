"""Every public function against its reference at the shapes of real models: errors beside their bounds.

The error is the largest absolute one against fp64; the bound is twice the error that torch makes in the same dtype,
plus a floor of one rounding (`triton_attn.testing.assert_close_to_reference`). Without a GPU the kernels run in
Triton's interpreter, sequences are short, and windows that would not fit them are cut to a quarter of the sequence.
"""

import sys
from itertools import accumulate

import torch
from tqdm import tqdm

import triton_attn
from perf import results
from perf.checks import by_torch
from perf.device import has_gpu
from perf.models import DEEPSEEK_V3, FALCON_7B, GEMMA_3_12B, GPT_OSS_120B, LLAMA_3_8B, QWEN3_32B
from perf.parallel import map_in_processes
from perf.tables import print_table
from triton_attn.flash.configs import default_config
from triton_attn.testing import assert_close_to_reference

MODELS = LLAMA_3_8B, QWEN3_32B, GEMMA_3_12B, FALCON_7B, GPT_OSS_120B, DEEPSEEK_V3
COLUMNS = ["model", "function", "heads", "head_dim", "seqlens", "window", "sinks", "dtype", "output"]
COLUMNS += ["error", "torch_error", "bound", "verdict"]


def add_arguments(parser):
    where = "2048 on a GPU, one and a half tiles in the interpreter, so that both of a kernel's loops run"
    parser.add_argument("--seqlen", type=int, help=f"longest sequence (default: {where})")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")


def run(out_dir, seqlen=None, dtype="bfloat16", models=MODELS):
    """Write `errors-<dtype>.csv` row by row and print it; exits with an error if a bound is broken."""
    dtype = getattr(torch, dtype)
    calls = [
        (model, function, seqlen or _default_seqlen(model, dtype), dtype) for model in models for function in CALLS
    ]
    path = out_dir / f"errors-{_name(dtype)}.csv"
    rows, failures = [], []
    with results.Table(path, COLUMNS) as table:
        outcomes = map(verify, calls) if has_gpu() else map_in_processes(verify, calls)
        for outcome in tqdm(outcomes, total=len(calls), desc="verifying", unit="call"):
            for row, failure in outcome:
                table.append(row.values())
                rows.append(row)
                failures += failure
    print_table([{name: value for name, value in row.items() if name != "dtype"} for row in rows])
    if failures:
        sys.exit("\n".join([*failures, f"{len(failures)} of {len(rows)} results are outside their bounds"]))
    return [path]


def verify(call):
    """[(row, [what is wrong])] of each output of one call (model, function, seqlen, dtype)."""
    model, function, seqlen, dtype = call
    args, options, torch_results, seqlens = CALLS[function](model, seqlen, dtype)
    ours = getattr(triton_attn, function)(*args, return_lse=True, **options)
    exact = getattr(triton_attn.reference, function)(*map(_double, args), return_lse=True, **options)
    left, _ = options["window_size"]
    about = {
        "model": model.name,
        "function": function,
        "heads": f"{model.num_heads_q}/{model.num_heads_kv}",
        "head_dim": f"{model.head_dim}/{model.head_dim_v}" if model.head_dim_v else str(model.head_dim),
        "seqlens": seqlens,
        "window": left + 1 if left >= 0 else None,
        "sinks": "yes" if model.sinks else None,
        "dtype": _name(dtype),
    }
    outcome = []
    for output, out, ref64, torch_out in zip(("out", "lse"), ours, exact, torch_results):
        try:
            closeness = assert_close_to_reference(out, ref64, torch_out=torch_out, name=output)._asdict()
            verdict, wrong = "ok", []
        except AssertionError as error:
            closeness = dict.fromkeys(("error", "torch_error", "bound"))
            verdict, wrong = "WRONG", [f"{model.name}, {function}: {error}"]
        outcome.append((about | {"output": output} | closeness | {"verdict": verdict}, wrong))
    return outcome


def _dense(model, seqlen, dtype):
    """A prompt."""
    q, k, v = (x[None] for x in _tensors(model, seqlen, seqlen, dtype))
    options = _options(model, seqlen)
    return (q, k, v), options, by_torch(q, k, v, **options), str(seqlen)


def _varlen(model, seqlen, dtype):
    """The second half of a prompt, a shorter prompt, and one token after a long context."""
    lengths = ((seqlen // 2, seqlen), (seqlen // 3, seqlen // 3), (1, seqlen - 1))
    lengths_q, lengths_k = zip(*lengths)
    q, k, v = _tensors(model, sum(lengths_q), sum(lengths_k), dtype)
    options = _options(model, seqlen)
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    outs, lses = zip(*(by_torch(*(x[None] for x in sequence), **options) for sequence in sequences))
    torch_results = torch.cat(outs, dim=1)[0], torch.cat(lses, dim=2)[0]
    cu_seqlens = (torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=q.device) for x in (lengths_q, lengths_k))
    args = q, k, v, *cu_seqlens, max(lengths_q), max(lengths_k)
    return args, options, torch_results, ", ".join(f"{a}x{b}" for a, b in lengths)


CALLS = {"flash_attention": _dense, "flash_attention_varlen": _varlen}


def _default_seqlen(model, dtype):
    if has_gpu():
        return 2048
    head_dim_v = model.head_dim_v or model.head_dim
    return default_config("interpreter", dtype, model.head_dim, head_dim_v, causal=True).block_m * 3 // 2


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _tensors(model, seqlen_q, seqlen_k, dtype):
    """Seeded q (seqlen_q, num_heads_q, head_dim), k and v (seqlen_k, num_heads_kv, head_dim and head_dim_v)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (seqlen_q, model.num_heads_q, model.head_dim),
        (seqlen_k, model.num_heads_kv, model.head_dim),
        (seqlen_k, model.num_heads_kv, model.head_dim_v or model.head_dim),
    )
    device = "cuda" if has_gpu() else "cpu"
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _options(model, seqlen):
    left = -1
    if model.window:
        left = (model.window if model.window < seqlen else seqlen // 4) - 1
    sinks = torch.linspace(-1, 1, model.num_heads_q, device="cuda" if has_gpu() else "cpu") if model.sinks else None
    return {"causal": True, "window_size": (left, -1), "sinks": sinks}


def _double(value):
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value
