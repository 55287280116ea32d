"""Which tests run in this process, and how many examples hypothesis draws.

Triton interprets or compiles for a whole process. With TRITON_INTERPRET=1 all tests run except those marked `compiled`.
Without it only these run, and the others too if there is a GPU for their kernels. With --emulate sm_90 the others run
on compiled code without a GPU. TRITON_ATTN_TESTS is the level: `quick` is the default, `ci` adds the tests marked so,
and `full` is the whole matrix, with new draws of hypothesis each time. On a GPU the tests marked `ci` always run.
"""

import contextlib
import itertools
import os

import pytest
import torch
from levels import DRAWS, FULL, INTERPRETED, LEVEL, without

pytest_plugins = ["triton_attn.toolchain.emulator.plugin"]

torch.set_num_threads(1)
with contextlib.suppress(ModuleNotFoundError):  # tests/gpu draws nothing, and runs where only pytest is installed
    from hypothesis import Phase, settings

    settings.register_profile("triton_attn", max_examples=DRAWS[LEVEL], derandomize=not FULL, deadline=None)
    settings.load_profile("triton_attn")
    # For tests/mutants: that a test fails is all it asks, not for the smallest example.
    phases = set(Phase) - {Phase.shrink, Phase.explain}
    settings.register_profile("first_failure", settings.get_profile("triton_attn"), phases=phases)


def pytest_configure(config):
    if config.getoption("--emulate") and LEVEL == "ci":  # each draw compiles a kernel or more
        settings.register_profile("emulated", settings.get_profile("triton_attn"), max_examples=DRAWS["quick"])
        settings.load_profile("emulated")
    if INTERPRETED:
        from triton_attn.toolchain import fix_interpreter

        fix_interpreter()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Runs after -k and -m, so that tests which these name are not left out."""
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
    """Print the figures that tests recorded."""
    reports = itertools.chain.from_iterable(terminalreporter.stats.get(kind, ()) for kind in ("passed", "failed"))
    figures = [value for report in reports for name, value in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(sorted(figures)))


@pytest.fixture(autouse=True)
def process_as_before():
    """Fails a test that leaves variables or settings of its process other than they were: what later tests see would
    depend on their order."""
    before = _settings()
    yield
    assert _settings() == before, "the test has changed its process"


def _settings():
    return {
        "environment": {name: value for name, value in os.environ.items() if "TRITON" in name},
        "default dtype": torch.get_default_dtype(),
        "precision of fp32 matmuls": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(scope="session", autouse=not INTERPRETED)
def float8_conversions_of_sm_80(request):
    """Triton 3.6.0 keeps a process's first fp8 conversions for all its targets, and those of sm_90 do not exist on
    sm_80.

    If no test compiles for an absent GPU, the present one has its own conversions.
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
        config.always_compile = True  # also compile kernels that are in the disk cache
        paged_attention(q, cache, cache, indices[0], indices)


@pytest.fixture(scope="session", autouse=not INTERPRETED)
def alike(request):
    """In the emulator each launch that says it is alike to an earlier one is compared with it."""
    if not request.config.getoption("--emulate"):
        yield
        return
    from alike import checked_alike

    with checked_alike():
        yield


@pytest.fixture
def emulated_hopper(request):
    """The test needs --emulate sm_90: Gluon, in which the kernels of hopper.py are written, has no interpreter."""
    if request.config.getoption("--emulate") != "sm_90":
        pytest.skip("needs --emulate sm_90")


@pytest.fixture
def no_tables(monkeypatch):
    """Without the package's tuned tables and the environment's."""
    from triton_attn._host import tuned

    monkeypatch.setattr(tuned, "_shipped", lambda arch: {})
    tuned.use_tuned(None)
    yield
    monkeypatch.undo()
    tuned.use_tuned(None)


@pytest.fixture
def traced():
    """torch.compile without a graph break. The tracer's cache is reset."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda f, **options: torch.compile(f, fullgraph=True, **{"backend": "aot_eager"} | options)
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def device() -> str:
    """The device of tensors: the GPU if there is one and kernels are compiled, otherwise the CPU."""
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
