"""Facts that several files of the project state agree: supported versions, and its own version."""

import re
from pathlib import Path

import triton_attn

ROOT = Path(__file__).parent.parent
PYPROJECT, WORKFLOW = (ROOT / "pyproject.toml").read_text(), (ROOT / ".github/workflows/ci.yml").read_text()


def matrix(name):
    return re.findall(r'"([\d.]+)"', re.search(rf"^ +{name}: \[(.*)\]$", WORKFLOW, flags=re.MULTILINE)[1])


def test_ci_begins_with_the_oldest_versions_that_are_supported():
    assert f'requires-python = ">={matrix("python")[0]}"' in PYPROJECT
    assert f"triton>={matrix('triton')[0]};" in PYPROJECT
    assert f"triton=={matrix('triton')[0]}.0" in (ROOT / "Makefile").read_text()
    assert f'target-version = "py{matrix("python")[0].replace(".", "")}"' in PYPROJECT


def test_ci_installs_the_torch_of_make():
    torch = re.search(r"torch==[\d.]+", (ROOT / "Makefile").read_text())[0]
    assert set(re.findall(r"torch==[\d.]+", WORKFLOW)) == {torch}


def test_the_version_stands_in_one_place():
    assert 'dynamic = ["version"]' in PYPROJECT
    assert 'version = { attr = "triton_attn.__version__" }' in PYPROJECT
    assert not re.search(rf'"{re.escape(triton_attn.__version__)}"', PYPROJECT)


def test_the_changelog_has_a_place_for_what_comes_next():
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
