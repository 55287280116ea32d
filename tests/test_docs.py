"""The README and the pages under docs/ are true: their code runs, they contain every public name, links are valid.

docs/testing-without-a-gpu.md, docs/many-gpus.md and the figures of docs/performance.md have separate tests. Notebooks
run as tests of their own (--nbmake).
"""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from reader import at_the_desk_of_a_reader

import triton_attn
from triton_attn.interop.transformers import FIRST_BATCHING

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
NOT_IN_GIT = ("perf/out/",)
README, TOUR, API = ROOT / "README.md", ROOT / "docs/tour.md", sorted(ROOT.glob("docs/api/*.md"))


def code_of(page):
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))


def cells_of(notebook, kind):
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


DOORS = [page for page in sorted(ROOT.glob("docs/doors/*.md")) if code_of(page)]
GUIDES = sorted(ROOT.glob("docs/guides/*.md"))
OF_AN_EXAMPLE = ROOT / "docs/guides/new-family.md"  # its code is in examples/, and has a test there


def names_of(page, device):
    """The names that the page's code defines."""
    names = {}
    exec(code_of(page).replace('device = "cuda"', f'device = "{device}"'), names)
    return names


def test_the_code_of_the_readme_runs(device):
    names = names_of(README, device)
    assert all(names[tensor].grad.isfinite().all() for tensor in ("q", "k", "v"))


@pytest.fixture
def reader(tmp_path):
    with at_the_desk_of_a_reader(tmp_path):
        yield


def test_the_code_of_the_tour_runs(device, reader):
    names = names_of(TOUR, device)
    assert all(names[tensor].grad.isfinite().all() for tensor in ("q", "k", "v", "sinks"))
    assert names["model"].config._attn_implementation == "triton_attn"


@pytest.mark.parametrize("page", DOORS, ids=lambda page: page.stem)
def test_the_code_of_a_door_runs(device, page):
    if page.stem == "transformers" and tuple(map(int, transformers.__version__.split(".")[:2])) < FIRST_BATCHING:
        pytest.skip("continuous batching needs a newer transformers")
    names = names_of(page, device)
    assert names["out"].isfinite().all()


@pytest.mark.parametrize("page", [page for page in GUIDES if page != OF_AN_EXAMPLE], ids=lambda page: page.stem)
def test_the_code_of_a_guide_runs(device, page, reader, capsys):
    """Comments behind `print` are what it prints."""
    names = names_of(page, device)
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", code_of(page))
    assert page.stem not in RESULTS or RESULTS[page.stem](names)


def same_as_generate(names, outputs=None):
    """The tokens of the guide's paged decode are those of transformers, five of each sequence or all of outputs."""
    model, prompts = names["model"], names["prompts"]
    outputs = names["outputs"] if outputs is None else outputs
    most = max(map(len, outputs))
    model.set_attn_implementation("sdpa")
    prompts = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    texts = [model.generate(prompt, max_new_tokens=most, do_sample=False, eos_token_id=-1) for prompt in prompts]
    new = [text[0, prompt.shape[1] :].tolist() for text, prompt in zip(texts, prompts)]
    return [own[: len(output)] for own, output in zip(new, outputs)] == outputs


def same_in_fewer_steps(names):
    """Verified trees give the tokens of plain decode, and several a step."""
    outputs = [text[len(prompt) :] for text, prompt in zip(names["texts"], names["prompts"])]
    return same_as_generate(names, outputs) and names["num_steps"] < 40


RESULTS = {
    "serve-a-llama": same_as_generate,
    "speculative-decoding": same_in_fewer_steps,
    "packed-documents": lambda names: names["loss"].isfinite() and names["q"].grad.isfinite().all(),
    "deepseek-fp8": lambda names: names["out"].isfinite().all() and list(map(len, names["outputs"])) == [4, 4],
}


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_begins_with_code(page):
    """Or with a list or a table of what to type."""
    before = re.split(r"^```|^\||^- ", page.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    assert len(before.split()) < 70


def test_the_site_lists_the_guides():
    listed = re.findall(r": guides/(\S+)\.md$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == [page.stem for page in GUIDES]


def test_the_tour_shows_every_public_name():
    assert [name for name in triton_attn.__all__ if not re.search(rf"\b{name}\b", code_of(TOUR))] == []


def test_the_api_pages_show_every_public_name():
    """`reference` has the same functions. Its dropout_mask is documented only here."""
    shown = set(re.findall(r"^::: triton_attn\.([\w.]+)$", "\n".join(map(Path.read_text, API)), flags=re.MULTILINE))
    assert {*triton_attn.__all__} - shown == {"reference"}
    assert "reference.dropout_mask" in shown


def test_no_other_page_has_python_that_nothing_runs():
    run = README, TOUR, ROOT / "docs/testing-without-a-gpu.md", ROOT / "docs/many-gpus.md", *DOORS, *GUIDES
    assert [page.name for page in PAGES if page not in run and code_of(page)] == []


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page):
    text = "\n".join(cells_of(page, "markdown")) if page in NOTEBOOKS else page.read_text()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "docs/design.md"], ids=lambda page: page.name)
def test_a_file_that_a_page_names_exists(page):
    """Resolve a path from the root, from triton_attn/ or, for a bare name, anywhere."""
    named = set(re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|md)|(?:\w+/)+)`", page.read_text()))
    roots = ROOT, ROOT / "triton_attn", ROOT / "tests/helpers"
    there = {name for name in named if any((root / name).exists() for root in roots) or next(ROOT.rglob(name), None)}
    assert len(named) > 8
    assert named - there <= set(NOT_IN_GIT)  # make perf may have created them


def test_the_site_and_the_readme_list_the_notebooks_in_the_same_order():
    listed = [
        re.findall(pattern, (ROOT / page).read_text(), flags=re.MULTILINE)
        for page, pattern in (
            ("mkdocs.yml", r"^ +- .*: notebooks/(\w+)\.md$"),
            ("README.md", r"\]\(notebooks/(\w+)\.ipynb\)"),
        )
    ]
    assert listed[0] == listed[1]
    assert sorted(listed[0]) == [notebook.stem for notebook in NOTEBOOKS]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_uses_public_names(notebook):
    used = names_from_the_package("\n".join(cells_of(notebook, "code")))
    assert used
    assert [name for name in used if not is_public(*name)] == []


def is_public(module, name):
    if module == "triton_attn":
        return name in {*triton_attn.__all__, "interop", "models", "testing", "toolchain"}
    names = getattr(importlib.import_module(module), "__all__", [name])
    return name in names and not re.search(r"(^|\.)_", f"{module}.{name}")


def names_from_the_package(code):
    """{(module, name)} that the code imports from triton_attn, or writes behind `triton_attn.`."""
    used = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "triton_attn":
            used |= {(node.module, alias.name) for alias in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "triton_attn":
            used.add(("triton_attn", node.attr))
    return used


def test_figures_that_a_notebook_quotes_are_on_the_performance_page():
    quoted = re.findall(r"\d+ \(\d+ % of the roof\)", "\n".join(map(Path.read_text, NOTEBOOKS)))
    assert len(quoted) == 3
    assert [figure for figure in quoted if figure not in (ROOT / "docs/performance.md").read_text()] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_has_no_outputs(notebook):
    """The site has them. A diff has none."""
    cells = json.loads(notebook.read_text())["cells"]
    assert [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150
