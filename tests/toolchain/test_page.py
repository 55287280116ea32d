"""docs/testing-without-a-gpu.md is true: its code is the example's, and its output what the example prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from emulated_calls import MARKS

from examples import without_a_gpu as example

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/testing-without-a-gpu.md").read_text()
# The compiler's: registers, instructions and the PTX in reports.
IS_OF_THIS_TRITON = triton.__version__.startswith("3.9.")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def assert_shown(printed):
    """Of what is printed the page has all, in blocks that follow each other."""
    printed = re.sub(r"\S*(?=without_a_gpu\.py)", "", printed)  # where it lies
    parts = [block for block in blocks("text") if block in printed]
    assert "".join(parts) == re.sub(r"\n\w+ without .*:\n", "", printed), printed


def test_its_code_is_the_examples():
    of_tests = [block for block in blocks("python") if block.startswith("# ")]
    shown = [block for block in blocks("python") if block not in of_tests]
    assert len(shown) == 5
    assert len(of_tests) == 2
    code = Path(example.__file__).read_text()
    assert [block for block in shown if block not in code] == []


def test_what_it_links_to_exists():
    links = [link for link in re.findall(r"\]\((\S+\.\w+)\)", PAGE) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_interpreted(capsys):
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    example.interpret()
    assert_shown(capsys.readouterr().out)


class TestCompiled:
    pytestmark = MARKS

    @pytest.mark.oldest
    def test_compiled_and_emulated(self, capsys):
        example.compile_for_gpus()
        example.run_in_the_emulator()
        printed = capsys.readouterr().out
        if IS_OF_THIS_TRITON:
            assert_shown(printed)
        assert printed.count(": right; ") == 3
        _, rotate, full, free = re.split(r"\n\w+ without .*:\n", printed)
        lines = Path(example.__file__).read_text().splitlines()

        def line_of(text):
            return f"without_a_gpu.py:{1 + next(i for i, line in enumerate(lines) if text in line)}"

        load, store = line_of("partner = tl.load"), line_of("tl.store(")
        assert re.match(rf"\S*{load}: race: read after write at x_ptr\[.*against \S*{store}\)", rotate)
        copy, read = line_of("tma_load(x_desc"), line_of("sums += tiles")
        assert re.match(rf"\S*{read}: use of shared memory that nobody has written", full)
        assert re.match(rf"\S*{copy}: race: write after write \(.*against \S*{copy}\)", free)

    @pytest.mark.ci
    def test_pytest_emulates(self, tmp_path):
        for block in blocks("python"):
            if name := re.match(r"# (\w+\.py)\n", block):
                (tmp_path / name[1]).write_text(block)
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulate", "sm_90"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True).stdout
        assert "1 failed, 1 passed" in done
        assert re.search(r"EmulationError: \S*without_a_gpu.py:\d+: race: read after write at x_ptr", done)
        if IS_OF_THIS_TRITON:
            assert [block for block in blocks("text") if block in done] == [blocks("text")[-1]], done

    @pytest.mark.ci
    def test_each_test_in_several_schedules(self, tmp_path):
        """Each is a test of its own: also of a parametrized function, and of one in a class."""
        (tmp_path / "conftest.py").write_text(next(b for b in blocks("python") if b.startswith("# conftest.py")))
        (tmp_path / "test_schedules.py").write_text(
            "import pytest\nfrom without_a_gpu import check, rotate\n"
            "@pytest.mark.parametrize('barrier', [True, False])\n"
            "def test_function(barrier): check(*rotate(barrier=barrier))\n"
            "class TestClass:\n    def test_method(self, tmp_path): check(*rotate(barrier=True))\n"
        )
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--emulate", "sm_90"]
        command += ["--emulate-schedules", "8"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True).stdout
        assert "8 failed, 16 passed" in done, done
        assert re.search(r"test_function\[shuffled-1-False\] FAILED|test_function\[False-shuffled-1\] FAILED", done)
        assert "emulated sm_90, 8 schedules: 24 launches" in done
        command[-1] = "0"
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True).stderr
        assert "--emulate-schedules: expected at least 1, got 0" in done

    @pytest.mark.ci
    def test_tests_that_launch_nothing(self, tmp_path):
        """They are counted; those that are marked fail."""
        (tmp_path / "conftest.py").write_text(next(b for b in blocks("python") if b.startswith("# conftest.py")))
        text = "import pytest\ndef test_a(): pass\n@pytest.mark.emulated\ndef test_b(): pass\n"
        (tmp_path / "test_nothing.py").write_text(text)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulate", "sm_90"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
        assert "1 failed, 1 passed" in done
        assert "expected a launch of a test marked emulated, got none" in done
        assert "0 launches, 0 warp instructions; 2 of 2 tests launched nothing" in done
