"""docs/guides/errors.md: every error of the package is on the page, as a text with which its message can be found."""

import re
from pathlib import Path

import pytest
import torch

import triton_attn
from docs import error_pages
from triton_attn import models
from triton_attn.interop import flash_attn, flash_mla
from triton_attn.parallel import shard_sequence

ROOT = Path(__file__).parent.parent
RAISES = re.compile(r"^\s*raise (?=\S)|(?<!def )(?<![.\w])_?fail\(")
# They pass on an exception, or make one whose text stands where they call.
WITHOUT_TEXT = re.compile(
    r"raise (_\w+\(|\w+ from|error\(f\"\{name\}: expected|(self|nearest)\.error|NotImplementedError$"
    r"|AttributeError\(name\)|EmulationError\()"
)


@pytest.fixture(scope="module")
def errors():
    return error_pages.errors_of_package()


def lines_that_raise():
    """{(path, line number): line} of the package, found without its syntax tree."""
    found = {}
    for path in (ROOT / "triton_attn").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if RAISES.search(line) and not WITHOUT_TEXT.search(line.strip()):
                found[path.relative_to(ROOT / "triton_attn").as_posix(), number] = line.strip()
    return found


def matches(error, message):
    return any(re.fullmatch(re.escape(text).replace("…", ".*"), message, re.DOTALL) for text in error.full_texts)


def test_every_line_that_raises_is_on_the_page(errors):
    lines, collected = lines_that_raise(), {(error.path, error.line) for error in errors}
    assert len(lines) > 300
    assert {place: line for place, line in lines.items() if place not in collected} == {}


def test_every_error_is_in_a_family_and_on_the_page(errors):
    assert [error for error in errors if error_pages.family_of(error) is None] == []
    page = error_pages.page_of(errors)
    assert [error for error in errors if f"{error.text}`" not in page] == []
    assert all(f"## {family.title}\n" in page for family in error_pages.FAMILIES)


def test_a_text_has_a_word_to_search_for(errors):
    texts = {text for error in errors for text in error.full_texts}
    vague = sorted(text for text in texts if {*re.findall(r"\w+", text)} <= {"expected", "got"})
    fields = [text for text in vague if re.fullmatch(r"(…, )+…: expected …, got …", text)]  # of a table: its path, ...
    assert vague == fields


def some_calls():
    q = torch.zeros(1, 4, 2, 16)
    cache = triton_attn.PagedKVCache(2, 16, num_layers=1, num_kv_heads=2, head_dim=16, device="cpu")
    lengths, table = torch.tensor([40], dtype=torch.int32), torch.tensor([[0, 7]], dtype=torch.int32)
    pages = torch.zeros(2, 16, 2, 16)
    flash, paged = triton_attn.flash_attention, triton_attn.paged_attention
    return {
        "head dimensions": lambda: flash(q, q[..., :8], q),
        "sinks' shape": lambda: flash(q, q, q, sinks=torch.zeros(3)),
        "a flag": lambda: flash(q, q, q, causal=1),
        "a scale": lambda: flash(q, q, q, softmax_scale=-1.0),
        "a seed's dtype": lambda: flash(q, q, q, dropout_p=0.5, dropout_seed=torch.zeros(1)),
        "a checked length": lambda: paged(q, pages, pages, lengths, table, check_values=True),
        "a checked page": lambda: paged(q, pages, pages, lengths - 20, table, check_values=True),
        "gradients": lambda: paged(q.requires_grad_(), pages, pages, lengths, table),
        "a full cache": lambda: cache.extend([cache.create([])[0]], [range(33)]),
        "a freed sequence": lambda: cache.free(cache.free(cache.create([])[0])),
        "a config": lambda: triton_attn.override_config("no family").__enter__(),
        "a model": lambda: models.model_named("llama-9"),
        "a door": lambda: flash_attn.flash_attn_func(q, q, q[:, :2]),
        "a refusing door": lambda: flash_mla.get_mla_metadata(lengths, 4, 1, topk=4),
        "a mesh": lambda: shard_sequence(q, "no mesh", 1),
    }


@pytest.mark.parametrize("name", some_calls())
def test_a_message_is_found_on_the_page(name, errors):
    with pytest.raises(Exception, match=r"\w") as raised:
        some_calls()[name]()
    assert [error for error in errors if matches(error, str(raised.value))], str(raised.value)
