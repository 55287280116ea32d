"""`python -m perf parallel`: predictions, their plots and the report, and measurements over two processes."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perf import results
from perf.commands import parallel
from perf.harness import ranks
from perf.model import context_parallel
from perf.model.context_parallel import PUBLISHED, predict, sizes_of
from perf.results import plot, report
from perf.workloads.models import DEEPSEEK_V3, LLAMA_3_8B, LLAMA_3_70B
from triton_attn.parallel import cost

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "commit", lambda: "7789948")  # a number to those who do not know better
    path, *pictures = parallel.run(tmp_path / "predicted", seqlens=(2**15, 2**17, 2**20))
    assert [picture.name for picture in pictures] == ["parallel.png", "parallel_time.png", "parallel_memory.png"]
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    return path


def rows_of(path):
    return list(csv.DictReader(path.open()))


def test_predictions_are_those_of_the_cost_model(table, capsys):
    rows = rows_of(table)
    calls = {(row["model"], int(row["num_gpus"]), int(row["seqlen"])) for row in rows if row["gpu"].startswith("H100")}
    assert len(calls) == 3 * len(context_parallel.GPUS) * 3
    for row in rows:
        if row["model"] != LLAMA_3_70B.name:
            continue
        method, *inner = row["method"].split("+")
        sizes = sizes_of(LLAMA_3_70B, int(row["num_gpus"]), int(row["seqlen"]), by_node=bool(inner))
        forward, backward = cost.costs(sizes)[method]
        assert float(row["forward_ms"]) == pytest.approx(1e3 * forward.seconds)
        assert float(row["both_ms"]) == pytest.approx(1e3 * (forward.seconds + backward.seconds))
        assert int(row["both_received"]) == forward.bytes + backward.bytes
        assert (row["is_auto"] == "True") == (cost.choose(sizes) == method)
        assert 0 < float(row["forward_share"]) < 1
        assert row["source"] == results.MODELLED_PARALLEL


def test_nodes_that_exchange_heads():
    """A node receives what a GPU of as many nodes would, of its heads; heads that 8 do not divide have no such rows."""
    methods = {row.method for row in predict(LLAMA_3_8B, 64, 2**20)}
    assert methods >= {"ring", "ring+ulysses", "all_gather+ulysses"}
    assert "ring+ulysses" not in {row.method for row in predict(LLAMA_3_8B, 8, 2**20)}
    sizes = sizes_of(LLAMA_3_8B, 64, 2**20, by_node=True)
    assert (sizes.num_ranks, sizes.ranks_per_node, sizes.rows, sizes.inner) == (8, 1, 2**17, ((8, 8), 2**14))
    inside = 7 / 8 * 2**20 * 2 * 128 * 2  # one KV head in bf16
    exchanged = 7 / 8 * 2**17 * ((32 + 8) * 2 * 128 * 2 + 32 * 4) / 8
    assert cost.costs(sizes)["ring"].forward.bytes == inside + exchanged


def test_memory_holds_rows_and_workspace():
    ring = next(row for row in predict(LLAMA_3_8B, 8, 65536) if row.method == "ring")
    rows = 8192 * (32 + 32 + 2 * 8) * 128 * 2 + 8192 * 32 * 4  # q, out, k, v, lse
    forward, backward = cost.costs(sizes_of(LLAMA_3_8B, 8, 65536))["ring"]
    assert ring.forward_memory == rows + forward.workspace
    assert ring.both_memory == 2 * rows - 8192 * 32 * 4 + backward.workspace


def test_sizes_of_latent_vectors():
    sizes = sizes_of(DEEPSEEK_V3, 64, 2**16)
    assert (sizes.keys, sizes.ranks_per_node, sizes.key_flops) == (576, 8, 2 * 512 * 128 * 256)
    methods = {"all_gather", "ring", "ulysses", "all_gather+ulysses", "ring+ulysses"}
    assert {row.method for row in predict(DEEPSEEK_V3, 64, 2**16)} == methods


def test_the_model_is_near_what_others_have_measured():
    """Given the speed of one GPU alone and its links: shares of all eight, in points."""
    for published in PUBLISHED:
        measured, predicted = published.rows()
        assert (measured.source, predicted.source) == (results.PUBLISHED, results.MODELLED_PARALLEL)
        assert measured.forward_share == pytest.approx(predicted.forward_share, abs=0.04)
        assert measured.both_share == pytest.approx(predicted.both_share, abs=0.03)
        assert measured.forward_ms == pytest.approx(predicted.forward_ms, rel=0.05)
        assert measured.both_ms == pytest.approx(predicted.both_ms, rel=0.05)


def test_the_report_says_what_is_predicted_and_what_others_measured(table):
    text = report.section(table.parents[1], table.parents[1], table.parents[1] / "tuned")
    assert "## Many GPUs\n" in text
    assert "## Many GPUs, measured" not in text
    assert f"*{results.MODELLED_PARALLEL}: H100 in nodes of 8" in text
    chosen = next(row for row in predict(LLAMA_3_8B, 64, 2**20) if row.is_auto)
    line = next(line for line in text.splitlines() if line.startswith("| Llama-3-8B, 64 GPUs"))
    assert f"{chosen.method}, {chosen.both_ms / 1000:.3g} s, {chosen.both_share * 100:.0f} %" in line
    said = " ".join(text.split())
    assert "measured by its authors: 85.2% forward and 90.2% of both passes" in said
    assert "![share of a GPU's speed, predicted](predicted/parallel.png)" in text


def test_the_report_shows_measurements_as_such(table):
    root = table.parents[1]
    about = dict(gpu="NVIDIA H200", driver="580.1", torch="2.11.0", triton="3.6.0", commit="1e34567")
    rows = [
        replace(row, both_ms=2 * row.both_ms, both_share=row.both_share / 2) for row in predict(LLAMA_3_8B, 8, 2**17)
    ]
    rows = [replace(row, source=results.MEASURED, **about) for row in rows]
    parallel._write(root / "nvidia-h200" / "parallel-measured.csv", rows)
    report.draw(root, redraw=False)
    text = report.section(root, root, root / "tuned")
    measured, predicted = text[text.index("## Many GPUs, measured") :].split("## Many GPUs\n")
    for row in rows:
        line = next(x for x in measured.splitlines() if x.startswith(f"| Llama-3-8B, 8 NVIDIA H200, {row.method} "))
        said = f"{row.both_ms:.3g} ms, {100 * row.both_share:.0f} %{' *' if row.is_auto else ''}"
        assert [cell.strip() for cell in line.split("|")[2:-1]] == [said]
    assert "*measured: NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, commit 1e34567*" in measured
    assert "H200" not in predicted
    pictures = [root / "nvidia-h200" / f"parallel-measured{end}.png" for end in ("", "_time", "_memory")]
    assert all(f"({picture.relative_to(root)})" in measured and picture.exists() for picture in pictures)
    assert not [path for path in pictures if path.name in predicted]


def test_a_table_of_one_model_is_plotted(tmp_path):
    path, *_ = parallel.run(tmp_path, models=["deepseek-v3"], seqlens=(2**15, 2**17))
    assert len(plot.draw(path, tmp_path / "again")) == 3


@pytest.mark.parametrize(("model", "of_keys"), [(LLAMA_3_70B, 0), (DEEPSEEK_V3, 2 * 512 * 128 * (128 + 128))])
def test_shares_count_the_keys_of_latent_vectors_once(model, of_keys, monkeypatch):
    """Two ranks with 4096 rows each have twice the pairs of one GPU with 4096, and as many keys to compute."""
    monkeypatch.setattr(ranks, "_time", lambda function, mesh: 1.0)
    mesh, rows = SimpleNamespace(size=lambda: 2), torch.empty(1, 4096, 1)
    found = ranks._time_of_part(model, 8192, mesh, None, [rows])
    dim, dim_v = model.head_dim, model.head_dim_v or model.head_dim
    for name, matmuls, of_latents in (("forward", dim + dim_v, 1), ("both", 4 * dim + 3 * dim_v, 4)):
        part, alone = (
            2 * model.num_heads_q * matmuls * pairs + of_latents * of_keys * 4096
            for pairs in (8192 * 8193 // 2 // 2, 4096 * 4097 // 2)
        )
        assert found[name] == pytest.approx(part / alone)


def torchrun(out, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "perf",
        "parallel",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_ATTN_BACKEND": "reference"}
    command += ["--model", "llama-3-8b", "deepseek-v3", "--seqlen", "64", *out, *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True)


@pytest.mark.ci
def test_two_processes_measure(tmp_path):
    done = torchrun(["--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["parallel-measured.csv"]
    rows = rows_of(tmp_path / "parallel-measured.csv")
    assert [(row["model"], row["num_gpus"], row["method"]) for row in rows] == [
        *(("Llama-3-8B", "2", method) for method in ("all_gather", "ring", "ulysses")),
        *(("DeepSeek-V3", "2", method) for method in ("all_gather", "ring", "ulysses")),
    ]
    models = {model.name: model for model in (LLAMA_3_8B, DEEPSEEK_V3)}
    for row in rows:
        forward, backward = cost.costs(sizes_of(models[row["model"]], 2, 64))[row["method"]]
        assert int(row["forward_received"]) == forward.bytes
        of_model, received = forward.bytes + backward.bytes, int(row["both_received"])
        if row["method"] == "all_gather":  # gradients return of the keys that are seen alone
            assert forward.bytes < received <= of_model
        else:
            assert received == of_model
        assert 0 < float(row["forward_ms"]) < float(row["both_ms"])
        assert float(row["both_share"]) > 0
        assert (row["gpu"], row["source"], row["both_memory"]) == ("CPU", results.MEASURED, "")
    assert "measured" in done.stdout
    assert done.stdout.count("parallel-measured.csv") == 1, "one rank writes"


@pytest.mark.ci
def test_times_of_a_cpu_are_not_published():
    done = torchrun(["--publish"])
    assert done.returncode
    assert "publish: expected GPUs, got processes on a CPU" in done.stderr
