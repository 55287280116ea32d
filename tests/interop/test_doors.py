"""The table of doors in the docs: `python -m perf doors` prints it, its functions are there, its errors are tested."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from perf.commands import doors

ROOT = Path(__file__).parent.parent.parent
SHOWN = re.findall(r"^\| `interop\.\w+` \| `.*$", (ROOT / "docs/support.md").read_text(), flags=re.MULTILINE)
ROWS = {re.search(r"interop\.(\w+)", row)[1]: row for row in SHOWN}


def test_the_docs_show_the_doors():
    assert {"torch", "flash_attn", "flash_mla", "flashinfer", "transformers", "deepseek", "vllm", "sglang"} <= {*ROWS}


def test_a_row_of_the_docs_is_what_the_command_prints(capsys):
    doors.run(None)
    printed = capsys.readouterr().out.splitlines()
    assert [row for row in ROWS.values() if row not in printed] == []


@pytest.mark.parametrize("name", ROWS)
def test_a_door_has_the_functions_of_its_table(name):
    module = import_module(f"triton_attn.interop.{name}")
    assert [function for function in module.SUPPORT.functions if not callable(getattr(module, function, None))] == []


def sources_of(module):
    """The text of a module, and of the modules in it if it is a package."""
    path = Path(module.__file__)
    return "".join(x.read_text() for x in (path.parent.glob("*.py") if path.name == "__init__.py" else [path]))


@pytest.mark.parametrize("name", ROWS)
def test_a_test_of_the_door_raises_each_error_of_its_table(name):
    """By the name of the argument, which the tests of the module contain beside `pytest.raises`."""
    module = import_module(f"triton_attn.interop.{name}")
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob(f"test_{name}*.py"))
    refused = [argument for arguments in module.SUPPORT.refused for argument in arguments.split(", ")]
    assert "pytest.raises(" in tests
    assert refused
    for argument in refused:
        assert len(re.findall(rf"\b{argument}\b", sources_of(module))) > 1, argument
        assert re.search(rf"\b{argument}\b", tests), f"{argument}: no test names it"
