"""Training over two processes has the losses of one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/long_context.py"


def losses(num_ranks):
    """The first and last loss, and the output."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--standalone", EXAMPLE]
    result = subprocess.run([*command, "--steps=3", "--seqlen=101"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return re.search(r"loss: (\S+) -> (\S+) nats", result.stdout).groups(), result.stdout


def test_two_processes_train_as_one_does(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one, _ = losses(1)
    two, said = losses(2)
    assert one == two
    found = re.findall(r"rank (\d): (\d+) of 101 rows, their loss (\S+) nats", said)
    assert [(rank, rows) for rank, rows, _ in found] == [("0", "51"), ("1", "50")]
    assert sum(int(rows) * float(loss) for _, rows, loss in found) / 101 == pytest.approx(float(two[1]), abs=1e-3)
