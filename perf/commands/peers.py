"""Our paged kernel beside vLLM's: both compiled for the same calls, and compared by the loop model. Needs no GPU.

The calls are a decode step and a chunk of a prompt, at three head dims: 32 query heads, 8 KV heads, pages of 16 tokens.
Ours is a call of `paged_attention` at its default config. The peer is vLLM's Triton kernel with the config that its
function `unified_attention` chooses. `lock` is explained in perf/model/loop_model.py: TFLOP/s of the loop over full
tiles, without overlap of matmuls and softmax. It leaves out memory, and no figure is measured.

vLLM is taken from the present environment, from that of `make .venv-engines/installed`, or from --vllm.
"""

import sys
from pathlib import Path

import torch
import triton

from perf import results
from perf.harness.device import versions
from perf.harness.progress import tqdm
from perf.model import compiled, loop_model
from perf.model.gpus import RATES
from perf.results.tables import print_table, tile_name
from perf.workloads import vllm_attention
from perf.workloads.problems import ChunkProblem, DecodeProblem

DTYPE = "bfloat16"
HEAD_DIMS = (128, 256, 512)
SEQLENS_Q = (1, ChunkProblem.seqlen_q)
OURS, PEER = "ours", "vLLM"


def add_arguments(parser):
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help="folder that contains the package vllm")
    parser.add_argument("--arch", dest="archs", nargs="+", choices=RATES, default=tuple(RATES), help="default: all")
    parser.add_argument("--head-dim", dest="head_dims", type=int, nargs="+", metavar="D", default=HEAD_DIMS)


def run(out_dir, vllm=None, archs=tuple(RATES), head_dims=HEAD_DIMS):
    """Print the table, and write it to a file named after the Triton version."""
    try:
        function, version = vllm_attention.load(vllm_attention.find(vllm))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    cases = [(arch, shape) for arch in archs for shape in shapes(head_dims)]
    about = {"vllm": version} | versions() | {"source": results.PREDICTED}
    path = out_dir / f"peers-{triton.__version__}.csv"
    rows = []
    for arch, shape in tqdm(cases, "compiling", len(cases), unit="shape"):
        ours = compiled.paged_decode(arch, getattr(torch, DTYPE), **shape)
        peer = compiled.unified_attention(function, arch, getattr(torch, DTYPE), **shape)
        rows.append({"device": RATES[arch].name, "arch": arch, "dtype": DTYPE} | shape | compare(ours, peer))
    with results.Table(path, [*rows[0], *about]) as table:
        for row in rows:
            table.append([*row.values(), *about.values()])
    print(f"lock, TFLOP/s, {results.PREDICTED}. triton {triton.__version__}, vLLM {version}.")
    print_table([summary(row) for row in rows])
    return [path]


def shapes(head_dims=HEAD_DIMS):
    """A decode step and a chunk of a prompt at each head dim."""
    model = DecodeProblem(1, 1)
    heads = {name: getattr(model, name) for name in ("num_heads_q", "num_heads_kv", "page_size")}
    return [heads | {"head_dim": dim, "seqlen_q": seqlen_q} for seqlen_q in SEQLENS_Q for dim in head_dims]


def compare(ours, peer):
    """Columns of two launches: config, spill instructions and `lock` of each, and our `lock` over theirs."""
    row = _figures(OURS, ours) | _figures(PEER, peer)
    return row | {"ratio": row[f"{OURS} lock"] / row[f"{PEER} lock"]}


def _figures(name, launch):
    report, values = loop_model.analyze(launch.kernel), launch.constexprs
    tile = values["BLOCK_M"], values.get("BLOCK_N", values.get("TILE_SIZE")), launch.num_warps, launch.num_stages
    return {
        f"{name} config": tile_name(*tile),
        f"{name} spills": report.static_spills,
        f"{name} lock": report.lock,
    }


def summary(row):
    """The columns that are printed."""
    queries = "decode" if row["seqlen_q"] == 1 else f"{row['seqlen_q']} queries"
    figures = [f"{name} {figure}" for name in (OURS, PEER) for figure in ("config", "spills", "lock")]
    return {"calls": queries} | {name: row[name] for name in ("head_dim", "arch", *figures, "ratio")}
