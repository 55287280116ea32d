"""The folder that Hugging Face's `kernels` loads: complete without triton_attn, and run by transformers if `kernels` is
installed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import is_kernels_available

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
VARIANTS = {"torch-cuda": "cuda", "torch-rocm": "rocm", "torch-cpu": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hf_kernels")
    run_python(ROOT / "packaging/hf_kernels/build.py", out)
    return out


def run_python(script, folder, *arguments, **environment):
    """In the folder, so that the checkout is not on sys.path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_ATTN_", "HF_"))}
    command = [sys.executable, script, folder, *arguments]
    env = kept | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_variant_has_its_metadata_and_files(folder):
    identities = set()
    for name, backend in VARIANTS.items():
        metadata = json.loads((folder / "build" / name / "metadata.json").read_text())
        identities.add(metadata["id"])
        assert metadata["id"].isidentifier()
        assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", metadata["name"])
        assert metadata["backend"] == {"type": backend}
        assert metadata["python-depends"] == []
        assert (folder / "build" / name / "tuned" / "sm_90.json").exists()
    assert len(identities) == len(VARIANTS) == len([*(folder / "build").iterdir()])
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_it_runs_without_triton_attn_and_beside_it(folder):
    run_python(HELPERS / "hf_kernel_alone.py", folder, ROOT, TRITON_INTERPRET="1")


@pytest.mark.skipif(not is_kernels_available(), reason="no version of kernels that transformers accepts is installed")
def test_kernels_loads_it_offline_and_a_llama_runs(folder):
    local = f"somebody/triton-flash-attn2={folder}"
    run_python(
        HELPERS / "hf_kernel_llama.py", folder, LOCAL_KERNELS=local, HF_HUB_OFFLINE="1", TRITON_ATTN_BACKEND="reference"
    )
