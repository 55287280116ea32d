"""The public surface has types, and the wheel declares it (py.typed). `make lint` checks them."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import triton_attn

ROOT = Path(__file__).parent.parent
MODULES = (
    "interop.torch",
    "interop.flash_attn",
    "interop.flash_mla",
    "interop.flashinfer",
    "interop.transformers",
    "interop.deepseek",
    "models",
)


def defined_in(module):
    """Public functions and classes that a module defines."""
    for name, value in vars(module).items():
        is_ours = inspect.isfunction(value) or inspect.isclass(value)
        if is_ours and not name.startswith("_") and value.__module__ == module.__name__:
            yield name, value


def public():
    """(name, function) of every public function and method."""
    named = [(name, getattr(triton_attn, name)) for name in triton_attn.__all__]
    for module in MODULES:
        named += defined_in(importlib.import_module(f"triton_attn.{module}"))
    for name, value in named:
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and not issubclass(value, (tuple, Exception)):
            for attribute, method in inspect.getmembers(value):
                method = method.fget if isinstance(method, property) else inspect.unwrap(method)
                is_ours = inspect.isfunction(method) and method.__module__.startswith("triton_attn")
                if is_ours and (attribute == "__init__" or not attribute.startswith("_")):
                    yield f"{name}.{attribute}", method


FUNCTIONS = dict(public())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_is_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    assert bare == []
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_names_the_parameters_that_there_are(name):
    _, _, entries = (inspect.getdoc(FUNCTIONS[name]) or "").partition("\nArgs:\n")
    entries, _, _ = entries.partition("\n\n")
    named = re.findall(r"(?:^ {4}|\. )([a-z]\w*(?:, [a-z]\w*)*): ", entries, flags=re.MULTILINE)
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert [x for names in named for x in names.split(", ") if x not in parameters] == []


@pytest.mark.parametrize("name", [name for name in triton_attn.reference.__all__ if name in triton_attn.__all__])
def test_a_reference_has_the_signature_of_its_function(name):
    assert inspect.signature(getattr(triton_attn.reference, name)) == inspect.signature(getattr(triton_attn, name))


def test_these_are_all():
    assert {"flash_attention", "PagedKVCache.extend", "BlockPool.num_shared", "register", "warmup"} <= set(FUNCTIONS)


def test_the_wheel_says_that_it_has_types():
    assert (ROOT / "triton_attn/py.typed").exists()
    assert re.search(r"^triton_attn = \[.*\"py\.typed\"", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
