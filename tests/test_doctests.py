"""The example in the docstring of each public name runs, on a CPU, and is short."""

import doctest
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
import triton
from emulated_calls import MARKS
from reader import at_the_desk_of_a_reader

import triton_attn
from perf.commands import doors
from triton_attn import parallel, testing, toolchain

# In a process that compiles.
COMPILED = ("warmup", "toolchain.compile_only", "toolchain.emulate", "toolchain.record_specializations")
# What is raised, yielded or returned, and described where it is. help() of a module lists its functions.
DESCRIBED_ELSEWHERE = {"reference", *(f"toolchain.{name}" for name in toolchain.__all__ if name[0].isupper())}
DESCRIBED_ELSEWHERE |= {"toolchain.shared_memory_limit"}
# The library is not installed here. The pages of these doors, and their tests, have code that runs.
NEED_A_LIBRARY = ("interop.vllm.", "interop.sglang.")
# Methods that are a subject of their own.
METHODS = "keep", "prefix_groups", "export_pages", "import_pages", "page_hashes"
MOST_LINES = 6


def public_objects():
    found = {name: getattr(triton_attn, name) for name in triton_attn.__all__}
    found["reference.dropout_mask"] = triton_attn.reference.dropout_mask
    found |= {f"PagedKVCache.{name}": getattr(triton_attn.PagedKVCache, name) for name in METHODS}
    for module in (parallel, testing, toolchain):
        prefix = module.__name__.removeprefix("triton_attn.")
        found |= {f"{prefix}.{name}": getattr(module, name) for name in module.__all__}
    for name, support in doors.supports().items():
        module = import_module(f"triton_attn.interop.{name}")
        found |= {f"interop.{name}.{function}": getattr(module, function) for function in support.functions}
    found["interop.torch.Override"] = import_module("triton_attn.interop.torch").Override
    return {
        name: x for name, x in found.items() if name not in DESCRIBED_ELSEWHERE and not name.startswith(NEED_A_LIBRARY)
    }


OBJECTS = public_objects()


@pytest.fixture
def reader(tmp_path):
    """Somebody with a tuned table, in the only rank that torchrun has started."""
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with at_the_desk_of_a_reader(tmp_path):
            yield
    finally:
        dist.destroy_process_group()


def check_example(name):
    test = doctest.DocTestParser().get_doctest(
        OBJECTS[name].__doc__ or "", {"torch": torch, "triton_attn": triton_attn, "__name__": "__main__"}, name, None, 0
    )
    assert test.examples, f"{name} has no example"
    assert sum(len(example.source.splitlines()) for example in test.examples) <= MOST_LINES
    report = []
    assert doctest.DocTestRunner().run(test, out=report.append).failed == 0, "".join(report)


@pytest.mark.parametrize("name", [name for name in OBJECTS if name not in COMPILED])
def test_the_example_of_a_public_name_runs(name, reader):
    if name == "toolchain.guard" and not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    if name == "interop.transformers.register_for_generate_batch":
        from triton_attn.interop.transformers import FIRST_BATCHING, __version__

        if tuple(map(int, __version__.split(".")[:2])) < FIRST_BATCHING:
            pytest.skip("continuous batching needs a newer transformers")
    check_example(name)


class TestCompiled:
    pytestmark = MARKS

    @pytest.mark.parametrize("name", COMPILED)
    def test_the_example_of_a_public_name_runs(self, name, reader):
        check_example(name)
