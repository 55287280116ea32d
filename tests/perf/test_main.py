import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perf import __main__ as job
from perf import results

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def codes(monkeypatch):
    """Exit codes for the parts, and the parts that were started."""
    codes, started = [], []

    def run(command):
        started.append(" ".join(command[3:]))
        return codes.pop(0)

    monkeypatch.setattr(job, "_run_process", run)
    return codes, started


def test_every_part_of_the_main_job_runs_though_one_fails(codes, capsys):
    left, started = codes
    left += [0, 1, *[0] * (len(job.MAIN_JOB) - 2)]
    assert job.main([]) == 1
    assert started == list(job.MAIN_JOB)
    assert "failed, exit code 1" in capsys.readouterr().out


def test_the_main_job_succeeds_if_every_part_does(codes):
    codes[0].extend([0] * len(job.MAIN_JOB))
    assert job.main([]) == 0


def test_an_interrupted_part_ends_the_main_job(codes, capsys):
    left, started = codes
    left += [0, job.INTERRUPTED]
    assert job.main([]) == 1
    assert started == list(job.MAIN_JOB[:2])
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpu", "part", "mode"), [(False, "verify", "1"), (False, "bench", None), (True, "verify", None)]
)
def test_each_part_has_its_mode_of_triton(monkeypatch, gpu, part, mode):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(job, "has_gpu", lambda: gpu)
    job._set_mode(job.PARTS[part])
    assert os.environ.get("TRITON_INTERPRET") == mode


@pytest.mark.ci
def test_a_part_on_the_command_line(tmp_path):
    command = [sys.executable, "-m", "perf", "sizes", "--out", str(tmp_path), "--bytes-per-element", "1"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert "35,136" in done.stdout, "DeepSeek-V3, bytes per token in fp8"
    assert {path.name for path in tmp_path.iterdir()} == {"kv_cache.csv", "kv_cache.png"}


@pytest.mark.parametrize("name", [name for name, part in job.PARTS.items() if part.folder is not None])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_only_who_asks_for_it_writes_what_is_committed(name, on_gpu, monkeypatch):
    monkeypatch.setattr(job, "has_gpu", lambda: on_gpu)
    monkeypatch.setattr(job, "folder_name", lambda: "a-gpu")
    default, published = (job.default_folder(name, {"arch": "sm_90"}, publish) for publish in (False, True))
    committed = job.PARTS[name].committed
    assert default.is_relative_to(results.ROOT if committed else results.LOCAL)
    assert published.is_relative_to(results.ROOT)
    assert committed == (name == "report")


@pytest.mark.ci
def test_a_run_leaves_the_checkout_as_it_was(tmp_path):
    """The whole way from the command line, in a separate repository."""
    for part in ("perf", "triton_attn", ".gitignore"):
        copy = shutil.copytree if (CHECKOUT / part).is_dir() else shutil.copy
        copy(CHECKOUT / part, tmp_path / part)

    def git(*arguments):
        identity = "-c", "user.name=a", "-c", "user.email=a@b"
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "perf", "sizes"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "perf/out/sizes/kv_cache.csv").exists()
    assert git("status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("argument", "code", "said"),
    [("--help", 0, [f"\n    {part}" for part in job.PARTS]), ("size", 2, ["invalid choice: 'size'"])],
)
def test_help_and_mistakes(argument, code, said, capsys):
    with pytest.raises(SystemExit) as end:
        job.main([argument])
    out, err = capsys.readouterr()
    assert end.value.code == code
    assert all(text in out + err for text in said)
