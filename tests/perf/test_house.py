"""The structure of the package stays within its limits, and `python -m perf house` reports violations."""

import pytest

from perf.commands import house as command
from perf.model import house


@pytest.mark.parametrize("function", house.jit_functions(), ids=lambda function: f"{function.file}-{function.name}")
def test_device_code_keeps_its_limits(function):
    assert function.excesses() == {}
    assert function.has_docstring


@pytest.fixture
def package(tmp_path):
    """A function that writes the files of a separate package."""

    def write(files):
        for name, source in files.items():
            path = tmp_path / "triton_attn" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return tmp_path / "triton_attn"

    return write


SOURCE = '''
@triton.jit(do_not_specialize=["c"])
def kernel(
    a,
    b,
    *,
    c,
    D: tl.constexpr,
):
    """What it computes.

    In two sentences.
    """
    helper(a)


@gluon.jit
def helper(a):
    return a


def launch(a, b, c, d, e):
    kernel[(1,)](a, b, c, d)
'''


def test_kernels_and_helpers_are_measured(package):
    kernel, helper = house.jit_functions(package({"flash/forward.py": SOURCE}))
    assert kernel == house.JitFunction("kernel", "flash/forward.py", 4, 5, has_docstring=True, is_kernel=True)
    assert helper == house.JitFunction("helper", "flash/forward.py", 1, 1, has_docstring=False, is_kernel=False)


@pytest.mark.parametrize(
    ("name", "is_kernel", "arguments", "lines", "excesses"),
    [
        ("_flash_fwd_kernel", True, 24, 110, {}),
        ("_flash_fwd_kernel", True, 25, 111, {"arguments": (25, 24), "lines": (111, 110)}),
        ("_paged_fwd_kernel", True, 28, 1, {}),
        ("_new_kernel", True, 29, 1, {"arguments": (29, 28)}),
        ("helper", False, 7, 1, {}),
        ("helper", False, 8, 1, {"arguments": (8, 7)}),
    ],
)
def test_what_is_past_a_limit_is_said(name, is_kernel, arguments, lines, excesses):
    assert house.JitFunction(name, "", arguments, lines, True, is_kernel).excesses() == excesses


@pytest.mark.parametrize(
    ("module", "source", "is_allowed"),
    [
        ("flash/api.py", "from .._host import checks", True),
        ("mla/api.py", "from ..merge import splits", True),
        ("flash/api.py", "def f():\n    from ..mla import api", False),
        ("_host/checks.py", "from .._jit.tiles import x", False),
        ("_host/checks.py", "import triton_attn", False),
        ("_jit/tiles.py", "import triton", True),
        ("_jit/tiles.py", "from triton_attn._host import checks", False),
        ("interop/flash_attn.py", "from ..flash import flash_attention", True),
        ("interop/flash_attn.py", "from ..flash import _plan", False),
        ("interop/flash_attn.py", "from ..flash.api import flash_attention", False),
    ],
)
def test_the_import_law(package, module, source, is_allowed):
    files = ["__init__.py", "flash/api.py", "mla/api.py", "merge/splits.py", "_host/checks.py", "_jit/tiles.py"]
    folder = package(dict.fromkeys(files, "") | {module: source})
    assert (house.exceptions_to_the_law(folder) == []) == is_allowed


def test_the_command_prints_the_figures_and_fails_past_a_limit(monkeypatch, capsys):
    within = house.JitFunction("kernel", "flash/forward.py", 20, 100, True, True)
    helper = house.JitFunction("helper", "_jit/tiles.py", 7, 9, False, False)
    monkeypatch.setattr(house, "exceptions_to_the_law", list)
    monkeypatch.setattr(house, "jit_functions", lambda: [within, helper])
    command.run(None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["kernel", "flash/forward.py", "20", "28", "100"] in lines
    assert ["jit", "functions", "without", "docstring", "1"] in lines

    too_many = house.JitFunction("wide", "_jit/tiles.py", 8, 9, True, False)
    monkeypatch.setattr(house, "jit_functions", lambda: [within, too_many])
    monkeypatch.setattr(house, "exceptions_to_the_law", lambda: ["triton_attn.a imports triton_attn"])
    with pytest.raises(SystemExit, match=r"wide: expected at most 7 arguments, got 8\ntriton_attn.a imports"):
        command.run(None)
