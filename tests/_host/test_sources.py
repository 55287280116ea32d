"""The digest of a kernel's code: what changes it, and that it covers all device code of the kernel."""

import inspect
import shutil
import types

import pytest
from triton.runtime.jit import JITCallable

from triton_attn._host.config import FAMILIES
from triton_attn._host.sources import PACKAGE, kernel_digest
from triton_attn.flash.configs import HopperConfig
from triton_attn.mla.configs import MlaHopperConfig

KERNELS = [config.kernel for config in FAMILIES.values() if config.kernel is not None]


@pytest.fixture
def package(tmp_path):
    """A copy of the package."""
    return shutil.copytree(PACKAGE, tmp_path / "triton_attn", ignore=shutil.ignore_patterns("__pycache__"))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def digest(package, kernel="flash/hopper.py"):
    return kernel_digest.__wrapped__(kernel, package)


def test_two_kernels_replace_portable_ones():
    assert KERNELS == [HopperConfig.kernel, MlaHopperConfig.kernel] == ["flash/hopper.py", "mla/hopper.py"]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("flash/hopper.py", "gl.constexpr(64)", "gl.constexpr(32)"),
        ("_jit/softmax.py", "LOG2_E", "LOG_E"),
        ("_jit/heads.py", "return ", "return 0 + "),
        (
            "_jit/args.py",
            "class View(NamedTuple)",
            "class View(tuple)",
        ),  # heads.py does not import it, tiles.py imports workarounds.py, which does
    ],
)
def test_code_changes_it(package, file, old, new):
    before = digest(package)
    edit(package / file, old, new)
    assert digest(package) != before


def test_words_layout_and_other_code_do_not(package):
    before = digest(package)
    kernel = package / "flash/hopper.py"
    kernel.write_text("# Another reason.\n" + kernel.read_text().replace('"""Forward kernel', '\n\n"""The kernel'))
    edit(kernel, "GROUP_ROWS: gl.constexpr = gl.constexpr(64)", "GROUP_ROWS: gl.constexpr = (\n    gl.constexpr(64)\n)")
    edit(package / "_jit/softmax.py", '"""', '"""Say more. ')
    for other in ("_jit/dropout.py", "_jit/paging.py", "flash/forward.py", "mla/hopper.py", "_host/tuned.py"):
        edit(package / other, "import", "import string\nimport")
    assert digest(package) == before == kernel_digest("flash/hopper.py")


def device_code(module):
    """Files of the package with functions that the kernels of a module call, directly or not."""
    left = [value for value in vars(module).values() if isinstance(value, JITCallable)]
    seen = set()
    while left:
        function = left.pop()
        if id(function) not in seen:
            seen.add(id(function))
            used = _names(function.fn.__code__) & function.fn.__globals__.keys()
            left += [value for name in used if isinstance(value := function.fn.__globals__[name], JITCallable)]
            yield inspect.getfile(function.fn)


def _names(code):
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*nested)


@pytest.mark.compiled
@pytest.mark.oldest
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_device_code_is_covered(kernel, package):
    from triton_attn.flash import hopper as flash
    from triton_attn.mla import hopper as mla

    module = {"flash/hopper.py": flash, "mla/hopper.py": mla}[kernel]
    files = {file for file in device_code(module) if file.startswith(str(PACKAGE))}
    assert len(files) > 2
    for file in files:
        path = package / file.removeprefix(f"{PACKAGE}/")
        before = digest(package, kernel)
        path.write_text(path.read_text() + "\nCHANGED = 1\n")
        assert digest(package, kernel) != before, file
