"""The import law, checked in the source; and the modules that importing the package loads."""

import os
import re
import subprocess
import sys
import textwrap

import pytest

from perf.model.house import ROOT, exceptions_to_the_law, imports_of, modules_of, part_of

MODULES = modules_of()


def test_a_part_imports_only_what_it_may():
    assert exceptions_to_the_law() == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part_of(m) == "_jit"))
def test_device_code_imports_triton_only(module):
    for imported, _ in imports_of(module, MODULES):
        assert imported.split(".")[0] in ("triton", "triton_attn", "typing"), f"{module} imports {imported}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_with_kernels_never_imports_a_reference(module):
    imported = {name for name, _ in imports_of(module, MODULES)}
    if "triton" in imported:
        assert not any(name.endswith(".reference") for name in imported)


def test_the_package_needs_nothing_but_torch_triton_and_numpy():
    allowed = {"torch", "triton", "numpy", "triton_attn", *sys.stdlib_module_names}
    for module in MODULES:
        if part_of(module) in ("interop", "testing", "toolchain"):
            continue
        for imported, _ in imports_of(module, MODULES):
            assert imported.split(".")[0] in allowed, f"{module} imports {imported}"


def test_only_random_tests_need_hypothesis():
    """Random tests are in separate files, so that the rest of a folder takes seconds and needs only pytest."""
    imports = re.compile(r"^(?:import|from) (?:hypothesis|\w+_draws)\b", re.MULTILINE)
    drawing = [path for path in (ROOT / "tests").rglob("*.py") if imports.search(path.read_text())]
    tests = [path for path in drawing if not path.stem.endswith("_draws")]
    assert tests
    for path in tests:
        assert "pytest.mark.random" in path.read_text(), f"{path} draws: expected `pytestmark = pytest.mark.random`"
        assert "random" in path.stem or "state_machine" in path.stem, f"{path} draws: expected the name test_random*.py"


def run_python(source):
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-c", textwrap.dedent(source)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_without_triton_the_reference_runs():
    result = run_python("""
        import sys

        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NoTriton())
        import torch
        import triton_attn

        q = torch.randn(1, 5, 2, 16)
        out, lse = triton_attn.flash_attention(q, q, q, causal=True, return_lse=True)
        expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True)
        torch.testing.assert_close(out, expected.transpose(1, 2))
        cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
        assert triton_attn.flash_attention_varlen(*[q[0]] * 3, cu_seqlens, cu_seqlens, 3, 3).shape == (5, 2, 16)
    """)
    assert result.returncode == 0, result.stderr


def test_the_import_loads_no_kernel_and_no_compiler():
    result = run_python("""
        import sys

        import torch

        before = set(sys.modules)
        import triton_attn

        loaded = set(sys.modules) - before
        assert not [name for name in loaded if name.split(".")[0] == "triton" or "_jit" in name], loaded
        assert "torch._dynamo" not in loaded  # torch's compiler takes as long as all the rest
    """)
    assert result.returncode == 0, result.stderr


@pytest.mark.ci
def test_every_module_can_be_imported_first():
    """After importing only the package, which Python does before any of its modules.

    vLLM alone imports its backends: tests/engines.
    """
    result = run_python(f"""
        import importlib, os, sys, traceback

        import pytest, torch, triton, triton_attn
        from transformers import MODEL_MAPPING, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM  # once for all children

        for name in {sorted({*MODULES} - {"triton_attn.interop.vllm.backends"})}:
            child = os.fork()
            if child == 0:
                try:
                    importlib.import_module(name)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            if os.waitpid(child, 0)[1]:
                print(name, flush=True)
    """)
    assert (result.stdout, result.returncode) == ("", 0), result.stderr
