"""Which tests run in this process, and how many examples hypothesis draws.

Triton interprets or compiles, for a whole process. With TRITON_INTERPRET=1 everything runs but the tests marked
`compiled`; without it those alone run, and the others too where there is a GPU for their kernels. With --emulate sm_90
the others run on compiled code without a GPU.
TRITON_ATTN_TESTS is how much of them: `quick`, where it is not said; `ci` adds the tests marked so; `full` the whole
matrix, and draws of hypothesis that are new each time. A GPU runs what is marked `ci` anyway.
"""

import contextlib
import itertools

import pytest
import torch
from levels import DRAWS, FULL, INTERPRETED, LEVEL, without

pytest_plugins = ["triton_attn.toolchain.emulator.plugin"]

torch.set_num_threads(1)
with contextlib.suppress(ModuleNotFoundError):  # tests/gpu draws nothing: it runs where only pytest is
    from hypothesis import settings

    settings.register_profile("triton_attn", max_examples=DRAWS[LEVEL], derandomize=not FULL, deadline=None)
    settings.load_profile("triton_attn")


def pytest_configure(config):
    if INTERPRETED:
        from triton_attn.toolchain import fix_interpreter

        fix_interpreter()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """After -k and -m: what they name alone is not thinned out."""
    chosen = [item for item in items if _runs_here(item, config.getoption("--emulate"))]
    if not FULL:
        chosen = without("full", chosen)
    if LEVEL == "quick" and not torch.cuda.is_available():
        chosen = without("ci", chosen)
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def _runs_here(item, emulate):
    compiled = item.get_closest_marker("compiled") is not None
    if emulate:
        return not compiled
    return compiled != INTERPRETED or (not INTERPRETED and torch.cuda.is_available())


def pytest_terminal_summary(terminalreporter):
    """The figures that tests recorded: what was measured, besides that it passed."""
    reports = itertools.chain.from_iterable(terminalreporter.stats.get(kind, ()) for kind in ("passed", "failed"))
    figures = [value for report in reports for name, value in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(sorted(figures)))


@pytest.fixture(scope="session", autouse=not INTERPRETED)
def float8_conversions_of_sm_80(request):
    """Triton 3.6.0 keeps a process's first conversions of fp8 for all its targets, and sm_80 has not those of sm_90.

    Where no test compiles for a GPU that is not there, the one that is has its own.
    """
    if not any(item.get_closest_marker("compiled") for item in request.session.items):
        return
    import triton

    from triton_attn import paged_attention
    from triton_attn.toolchain import compile_only

    q, cache = torch.empty(1, 1, 1, 16, dtype=torch.float16), torch.empty(1, 16, 1, 16, dtype=torch.float8_e5m2)
    indices = torch.zeros(1, 1, dtype=torch.int32)
    config = triton.knobs.compilation
    with compile_only("sm_80"), config.scope():
        config.always_compile = True  # one that is in the cache on disk is not compiled
        paged_attention(q, cache, cache, indices[0], indices)


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors live: the GPU when there is one and kernels are compiled, otherwise the CPU."""
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
