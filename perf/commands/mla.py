"""Multi-head latent attention: decode against context and heads, prefill schedules, cache bytes per token.

Decode: TFLOP/s, and GB/s of the cache, q and out, at the widths of DeepSeek-V3 (512 + 64), with pages of 64 and a cache
in bf16 or fp8. Queries are absorbed and outputs are latent vectors, as in FlashMLA. Prefill: time and workspace of the
fused, absorbed and materialized schedules, for whole prompts and chunks, and which of them "auto" chooses.

On a GPU both are measured as in `perf bench`: each provider is checked before it is timed. Without a GPU, decode is
predicted from the compiled kernel (perf/model/predict.py), and prefill by the cost model that "auto" uses (see
`triton_attn.mla_prefill`). CSV, title and note say so.
"""

import inspect
import sys
from dataclasses import astuple
from fractions import Fraction
from functools import partial

from tqdm import tqdm

from perf import results
from perf.commands.sizes import elements_per_token_and_layer
from perf.harness.device import has_gpu
from perf.harness.machine import copy_bandwidth, matmul_rate
from perf.harness.measure import throughput
from perf.model import predict
from perf.model.gpus import RATES
from perf.results import plot
from perf.results.tables import print_table
from perf.workloads.models import DEEPSEEK_V3, FALCON_7B, LLAMA_2_7B, LLAMA_3_70B
from perf.workloads.problems import (
    CONTEXTS,
    LATENT_BATCH,
    LATENT_HEADS,
    PROMPTS,
    latent_decode_grid,
    latent_prefill_grid,
)
from perf.workloads.providers import LATENT_DECODE_PROVIDERS, LATENT_PREFILL_PROVIDERS, SCHEDULES
from triton_attn import mla_prefill
from triton_attn.mla.schedule import choose_schedule, workspace_bytes

DTYPE = "bfloat16"
MAX_WORKSPACE_BYTES = inspect.signature(mla_prefill).parameters["max_workspace_bytes"].default
KINDS = {  # kind of attention: elements per token and layer, and an example model
    "2 n_h d_h": LLAMA_2_7B,
    "2 n_g d_h": LLAMA_3_70B,
    "2 d_h": FALCON_7B,
    "d_c + d_h^R": DEEPSEEK_V3,
}


def add_arguments(parser):
    shape = {"nargs": "+", "type": int}
    parser.add_argument("--heads", metavar="H", default=LATENT_HEADS, **shape, help="decode; default: 16 64 128")
    parser.add_argument("--batch", type=int, default=LATENT_BATCH, help=f"decode; default: {LATENT_BATCH}")
    contexts = f"longest context, a power of two from {CONTEXTS[0]}; default: {CONTEXTS[-1]}"
    parser.add_argument("--seqlen", type=int, default=CONTEXTS[-1], metavar="S", choices=CONTEXTS, help=contexts)
    parser.add_argument("--arch", choices=RATES, default="sm_90", help="target of predictions, without a GPU")


def run(out_dir, heads=LATENT_HEADS, batch=LATENT_BATCH, seqlen=CONTEXTS[-1], arch="sm_90"):
    """Write `mla_decode.csv` and `mla_prefill.csv` row by row, their plots, and `mla_sizes.csv`."""
    contexts, prompts = ([length for length in lengths if length <= seqlen] for lengths in (CONTEXTS, PROMPTS))
    decode, prefill = out_dir / "mla_decode.csv", out_dir / "mla_prefill.csv"
    steps = _rows(
        decode,
        results.Row,
        latent_decode_grid(heads, batch, contexts),
        (LATENT_DECODE_PROVIDERS, copy_bandwidth, predict.latent_decode, arch),
    )
    _print(
        f"decode, batch {batch}, TFLOP/s (GB/s) against context",
        steps,
        lambda row: {"heads": row.num_heads_q, "cache": row.cache_dtype, "provider": row.provider},
        lambda row: f"{row.tflops:.0f} ({row.gbps:.0f})",
    )
    calls = _rows(
        prefill,
        results.LatentPrefillRow,
        latent_prefill_grid(prompts, contexts),
        (LATENT_PREFILL_PROVIDERS, matmul_rate, predict.latent_prefill, arch),
        _of_schedule,
    )
    _print(
        "prefill, ms against context; * is what auto chooses",
        calls,
        lambda row: {
            "queries": "all" if row.seqlen_q == row.seqlen_k else row.seqlen_q,
            "provider": row.provider,
        },
        lambda row: f"{row.ms:.3g}{'*' if row.is_auto else ''}",
    )
    paths = [decode, *plot.draw(decode), prefill, *plot.draw(prefill), _sizes(out_dir)]
    failed = [row for row in steps + calls if row.tflops is None]
    for row in failed:
        print(f"{row.provider}, {row.direction}, {row.num_heads_q} heads, {row.seqlen_q}x{row.seqlen_k}: {row.note}")
    if any(row.provider.startswith(results.OURS) for row in failed):
        sys.exit("our kernel failed, see above")
    return paths


def _rows(path, row_type, problems, how, more_columns=lambda problem, row: {}):
    """Rows of row_type, written to disk as soon as they are known: measured, or predicted without a GPU.

    how is (providers, measured roof, prediction, arch). more_columns(problem, row) are columns beside those of a
    `results.Row`.
    """
    providers, measure_roof, prediction, arch = how
    if has_gpu():
        does, rows_of = "measuring", partial(throughput, dtype=DTYPE, providers=providers, roof=measure_roof())
    else:
        does, rows_of = f"predicting for {arch}", partial(prediction, dtype=DTYPE, arch=arch)
    rows = []
    with results.Table(path, results.columns_of(row_type)) as table:
        for problem in tqdm(problems, desc=does, unit="shape"):
            for row in rows_of(problem):
                rows.append(row_type(**vars(row), **more_columns(problem, row)))
                table.append(astuple(rows[-1]))
    return rows


def _of_schedule(problem, row):
    mode = SCHEDULES.get(row.provider)
    columns = {
        "schedule": mode,
        "ms": row.tflops and problem.flops / row.tflops / 1e9,
        "workspace_bytes": None,
        "all_heads_bytes": None,
        "is_auto": False,
    }
    if mode is None:
        return columns
    sizes = problem.sizes(element_size=2)
    chunk, auto = (choose_schedule(sizes, x, MAX_WORKSPACE_BYTES, wants_grad=False) for x in (mode, "auto"))
    per_head = workspace_bytes(sizes, mode)
    return columns | {
        "workspace_bytes": min(chunk.heads_each * per_head, MAX_WORKSPACE_BYTES),
        "all_heads_bytes": sizes.num_heads * per_head,
        "is_auto": auto.mode == mode,
    }


def _print(title, rows, line, cell):
    """A row per kind of call and provider, a column per context."""
    lines = {}
    for row in rows:
        head = line(row)
        columns = lines.setdefault(tuple(head.values()), head | {n: None for n in sorted({r.seqlen_k for r in rows})})
        columns[row.seqlen_k] = None if row.tflops is None else cell(row)
    print(f"MLA {title}, {DTYPE}, {rows[0].gpu}, {rows[0].source}")
    print_table(list(lines.values()))
    notes = {
        results.PREDICTED: "bound: matmuls and softmax overlap fully. lock: they never overlap. "
        "The model leaves out launches, latency, and memory below its data sheet.\n",
        results.MODELLED: f"{rows[0].note}\n",
    }
    print(notes.get(rows[0].source, ""))


def kinds():
    """Cache elements per token and layer of each kind of attention, for a real model; also in units of d_h."""
    rows = []
    for formula, model in KINDS.items():
        elements = elements_per_token_and_layer(model)
        head_dim = model.head_dim_v or model.head_dim
        rows.append(
            {
                "attention": model.attention,
                "elements/token/layer": formula,
                "model": model.name,
                "n_h": model.num_heads_q,
                "n_g": None if model.attention == "MLA" else model.num_heads_kv,
                "d_h": head_dim,
                "in d_h": str(Fraction(elements, head_dim)),
                "elements": elements,
                "layers": model.num_layers,
                "bytes/token in bf16": 2 * elements * model.num_layers,
            }
        )
    return rows


def _sizes(out_dir):
    path, rows = out_dir / "mla_sizes.csv", kinds()
    print("KV cache per token; d_h is the width of a head, and DeepSeek's MLA has d_c = 4 d_h and d_h^R = d_h / 2")
    print_table(rows)
    with results.Table(path, rows[0]) as table:
        for row in rows:
            table.append(row.values())
    return path
