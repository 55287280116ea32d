"""Who may import whom, read off the source; and what importing the package itself loads."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "triton_attn"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
FAMILIES = ("flash", "paged", "mla", "merge", "cache")
# What each part may import from the package, besides itself; a family may also import merge.
ALLOWED = {
    "_jit": set(),
    "_host": {"_jit", "toolchain"},  # an interpreting process repairs the interpreter
    "testing": set(),
    "toolchain": {"_host"},  # the table of GPUs
    "reference": set(FAMILIES),
    "interop": {*FAMILIES, "reference"},  # the public names alone
    "": {*FAMILIES, "reference", "_host", "_warmup"},
    "models": {"_host"},
    "_warmup": {*FAMILIES, "_host", "models", "toolchain"},
    "__main__": {"_warmup", "models"},
    **{family: {"_jit", "_host", "merge"} for family in FAMILIES},
    # Where keys and values of the heads are made once more, the backward pass is that of flash attention.
    "mla": {"_jit", "_host", "merge", "flash"},
}


def imports_of(module):
    """(imported module, name or None) for every import in a module, those inside functions included."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inside = f"{source}.{alias.name}"
                yield (inside, None) if inside in MODULES else (source, alias.name)


def part_of(module):
    """The first folder or module under triton_attn; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_part_imports_only_what_it_may(module):
    part = part_of(module)
    for imported, name in imports_of(module):
        if imported.split(".")[0] == "triton_attn":
            assert part_of(imported) in ALLOWED[part] | {part}, f"{module} imports {imported}"
            if part == "interop" and part_of(imported) in FAMILIES:
                assert imported.count(".") == 1, f"{module} imports {imported}, which is not public"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part_of(m) == "_jit"))
def test_device_code_imports_triton_only(module):
    for imported, _ in imports_of(module):
        assert imported.split(".")[0] in ("triton", "triton_attn"), f"{module} imports {imported}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_with_kernels_never_imports_a_reference(module):
    imported = {name for name, _ in imports_of(module)}
    if "triton" in imported:
        assert not any(name.endswith(".reference") for name in imported)


def test_the_package_needs_nothing_but_torch_and_triton():
    allowed = {"torch", "triton", "triton_attn", *sys.stdlib_module_names}
    for module in MODULES:
        if part_of(module) in ("interop", "testing", "toolchain"):
            continue
        for imported, _ in imports_of(module):
            assert imported.split(".")[0] in allowed, f"{module} imports {imported}"


def test_only_random_tests_need_hypothesis():
    """They stand in files of their own, so that the rest of a folder's tests take seconds and pytest alone."""
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


def test_without_triton_the_reference_serves():
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


def test_the_import_loads_no_kernel():
    result = run_python("""
        import sys

        import torch

        before = set(sys.modules)
        import triton_attn

        loaded = set(sys.modules) - before
        assert not [name for name in loaded if name.split(".")[0] == "triton" or "_jit" in name], loaded
    """)
    assert result.returncode == 0, result.stderr
