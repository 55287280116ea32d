"""docs/guides/new-family.md is true: its code is the example's, and its output what the example prints."""

import re
from pathlib import Path

import pytest
import triton
from emulated_calls import MARKS

from examples import new_family as example

PAGE = (Path(__file__).parents[2] / "docs/guides/new-family.md").read_text()
IS_OF_THIS_TRITON = triton.__version__.startswith("3.9.")  # registers are


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_its_code_is_the_examples():
    code = Path(example.__file__).read_text()
    assert len(blocks("python")) == 2
    assert [block for block in blocks("python") if block not in code] == []


def test_interpreted(capsys):
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    example.main()
    assert capsys.readouterr().out == blocks("text")[0]


class TestCompiled:
    pytestmark = MARKS

    def test_compiled_and_emulated(self, capsys):
        example.main()
        printed = capsys.readouterr().out
        assert printed.count(" 0 bytes spilled") == 3
        assert not IS_OF_THIS_TRITON or printed == blocks("text")[1]
