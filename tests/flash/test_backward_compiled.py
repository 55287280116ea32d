"""Compiled code of the backward kernels at their defaults: resources, and `lock` of the loops over full tiles on sm_90.

`lock` is TFLOP/s in the cycle model of perf/model/loop_model.py, which ranks kernels and catches regressions. No kernel
has run here. A schedule's figure counts five matmuls per tile. The summary of the test run prints it with registers and
spills.
"""

import itertools

import pytest
import torch
import triton
from flash_launches import describe, lock_of_all, spills_of_all

from perf.model import loop_model
from triton_attn._host.call import Lengths, call_of
from triton_attn._host.options import AttentionOptions
from triton_attn.dense.backward import launch_flash_bwd, launch_row_sums
from triton_attn.toolchain import compile_only, shared_memory_limit

pytestmark = pytest.mark.compiled

OLDEST = triton.__version__ == "3.6.0"
SEQLEN, BATCH, NUM_HEADS = 2048, 2, 4
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
WINDOWS = {"plain": (None, None), "causal": (None, 0), "window": (1000, 0)}

# TFLOP/s on sm_90 by (schedule, head dim): floors below the values of Triton 3.6.0 and 3.9.0. At 128 the default has
# only the split schedule, with the fastest tiles on an H100.
WIDE = {320: 398, 328: 364, 384: 415, 392: 400, 512: 436}  # of 392 times 392 / 512: columns past it are counted
LOCK = {("split", 64): 400, ("split", 128): 470, ("fused", 64): 560, ("fused", 128): 470}
LOCK |= {(schedule, head_dim): floor for schedule in ("split", "fused") for head_dim, floor in WIDE.items()}
MATMULS = {"fused": 5, "dkdv": 4, "dk": 3, "dv": 2, "dq": 3}

# Bytes spilled, and spill loads and stores per trip of the loop over full tiles, by (arch, head dims, kernel): the
# maximum of Triton 3.6.0 and 3.9.0. Tiles without spills would cost 6 % of `lock` and more, or a quarter if the loop
# spills.
KNOWN_SPILLS = {
    ("sm_80", (96, 96), "dkdv"): (16, 0),
    ("sm_80", (96, 96), "dq"): (8, 0),
    ("sm_90", (64, 64), "dkdv"): (4, 0),
    ("sm_90", (64, 64), "fused"): (16, 0),
    ("sm_90", (71, 71), "dkdv"): (12, 0),
    ("sm_90", (160, 160), "dkdv"): (4, 0),
    ("sm_90", (160, 160), "fused"): (36, 4),
    ("sm_90", (192, 128), "fused"): (96, 12),
    ("sm_90", (192, 192), "dkdv"): (8, 0),
    ("sm_90", (328, 328), "dkdv"): (940, 3),
    ("sm_90", (384, 384), "dkdv"): (20, 0),
    ("gfx942", (48, 48), "fused"): (36, 0),
    ("gfx942", (64, 256), "fused"): (8, 0),
    ("gfx942", (160, 160), "fused"): (8, 0),
    ("gfx942", (192, 128), "fused"): (4, 0),
    ("gfx942", (192, 192), "fused"): (4, 0),
    ("gfx942", (256, 256), "fused"): (4, 0),
}


def compile_default(arch, dtype, head_dims, window, schedule):
    """{"dkdv", "dk", "dv", "dq" or "fused": launch} of one backward pass, without the kernel of delta."""
    head_dim, head_dim_v = head_dims
    q, k = (torch.empty(BATCH, SEQLEN, NUM_HEADS, head_dim, dtype=dtype) for _ in range(2))
    v, out, dout = (torch.empty(BATCH, SEQLEN, NUM_HEADS, head_dim_v, dtype=dtype) for _ in range(3))
    lse = torch.empty(BATCH, NUM_HEADS, SEQLEN)
    options = AttentionOptions(head_dim**-0.5, WINDOWS[window], None, None, None)
    with compile_only(arch) as launches:
        launch_flash_bwd(call_of(q, k, v, options), dout, None, out, lse, deterministic=schedule == "split")
    names = {1: ("fused",), 2: ("dkdv", "dq"), 3: ("dk", "dv", "dq")}
    return dict(zip(names[len(launches) - 1], launches[1:], strict=True))


def five_products(reports):
    """`lock` of a schedule. The split one does seven matmuls for the work of five, or eight with dk apart from dv."""
    return 5 / sum(MATMULS[kernel] / report.lock for kernel, report in reports.items())


def case(arch, dtype, head_dims, window, schedule, *marks):
    head_dims = head_dims if isinstance(head_dims, tuple) else (head_dims, head_dims)
    name = f"{arch}-{NAMES[dtype]}-{head_dims[0]}-{head_dims[1]}-{window}-{schedule}"
    return pytest.param(arch, dtype, head_dims, window, schedule, id=name, marks=marks)


ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 160, 192, (192, 128), (128, 64), (64, 256), 256, 320, 384, (512, 256), 512)
SCHEDULES = ("split", "fused")
SLICE = [
    *(case("sm_90", torch.float16, d, "causal", s, pytest.mark.oldest) for d in (64, 128) for s in SCHEDULES),
    *(case("sm_90", torch.bfloat16, d, "plain", "fused") for d in (64, 128)),
    case("sm_90", torch.float16, 256, "causal", "split"),
    *(case(arch, torch.float16, 512, "causal", "split", pytest.mark.oldest) for arch in ("sm_80", "sm_90")),
    *(case("sm_90", torch.float16, d, "causal", "split", pytest.mark.oldest) for d in (320, 328, 384, 392)),
    *(case(arch, torch.float16, 128, "causal", "fused") for arch in ("sm_80", "sm_100", "gfx942", "sm_120")),
    *(
        case("sm_80", torch.float16, d, w, "split", pytest.mark.oldest)
        for d in (64, 96, 160)
        for w in ("plain", "causal")
    ),
]
REST = [
    *(case(arch, torch.float16, d, "causal", s) for arch in ARCHS for d in HEAD_DIMS for s in SCHEDULES),
    *(case(arch, torch.float16, d, "plain", s) for arch in ARCHS for d in (16, 64, 128, 160, 192) for s in SCHEDULES),
    *(case("sm_90", torch.float16, d, "window", s) for d in (64, 128) for s in SCHEDULES),
    *(case("sm_90", torch.bfloat16, d, w, s) for d in (64, 128) for w in ("plain", "causal") for s in SCHEDULES),
    *(case(arch, torch.float16, 71, "causal", s) for arch in ARCHS for s in SCHEDULES),
    *(case(arch, torch.float32, d, "causal", "fused") for arch in ARCHS for d in (64, 128, 256)),
    *(
        case(arch, torch.float16, d, "causal", s)
        for arch in ("sm_86", "sm_89")
        for d in (64, 128, 256)
        for s in SCHEDULES
    ),
]
SLICE_IDS = {param.id for param in SLICE}


def full(param):
    return pytest.param(*param.values, id=param.id, marks=pytest.mark.full)


@pytest.mark.full(but_each=2)
@pytest.mark.ci(but_each=5)
@pytest.mark.parametrize(
    ("arch", "dtype", "head_dims", "window", "schedule"),
    [*SLICE, *(full(param) for param in REST if param.id not in SLICE_IDS)],
)
def test_default(arch, dtype, head_dims, window, schedule, record_property):
    launches = compile_default(arch, dtype, head_dims, window, schedule)
    reports = {kernel: loop_model.analyze(launch.kernel) for kernel, launch in launches.items()}
    lines = [f"{NAMES[dtype]} {window} {describe(launches[kernel], reports[kernel], kernel)}" for kernel in launches]
    figure = "\n".join(lines)
    if arch == "sm_90" and dtype != torch.float32:
        figure += f"\n  {'+'.join(launches)} counting five matmuls: {five_products(reports):.0f}"
    record_property("figure", figure)

    for kernel, launch in launches.items():
        assert launch.shared_bytes <= shared_memory_limit(arch)
        if dtype == torch.float32:
            continue
        spilled, spilled_in_loop = KNOWN_SPILLS.get((arch, head_dims, kernel), (0, 0))
        assert launch.spill_bytes <= spilled
        if arch != "gfx942":
            assert reports[kernel].hot.spills <= spilled_in_loop
            # No warp repeats another's matmuls.
            assert reports[kernel].hot.useful == 1 or head_dims == (256, 256)
    floor = LOCK.get((schedule, head_dims[0])) if arch == "sm_90" and head_dims[0] == head_dims[1] else None
    if floor is not None and dtype != torch.float32:
        assert five_products(reports) >= floor


OPTIONS = {
    "softcap": dict(softcap=50.0),
    "alibi": dict(alibi_slopes=torch.empty(NUM_HEADS)),
    "dropout": dict(dropout_p=0.1, dropout_seed=torch.empty(1, dtype=torch.int64)),
}
OPTIONS["both"] = OPTIONS["softcap"] | OPTIONS["dropout"]


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize(
    ("option", "head_dim"), [*itertools.product(["softcap", "alibi", "dropout"], [320, 384, 512]), ("both", 512)]
)
def test_options_of_wide_heads(option, head_dim, record_property):
    q, out = (torch.empty(BATCH, SEQLEN, NUM_HEADS, head_dim, dtype=torch.float16) for _ in range(2))
    options = AttentionOptions(head_dim**-0.5, WINDOWS["causal"], None, None, None)._replace(**OPTIONS[option])
    with compile_only("sm_90") as launches:
        launch_flash_bwd(call_of(q, q, q, options), out, None, out, torch.empty(BATCH, NUM_HEADS, SEQLEN))
    _, *kernels = launches
    names = ("dkdv", "dq") if len(kernels) == 2 else ("dk", "dv", "dq")
    reports = {name: loop_model.analyze(x.kernel) for name, x in zip(names, kernels, strict=True)}
    figure = 5 / sum(MATMULS[name] / lock_of_all(report) for name, report in reports.items())
    spilled = {name: launch.spill_bytes for name, launch in zip(names, kernels)}
    record_property("figure", f"sm_90 fp16 causal {head_dim} {option}: {spilled} B spilled, {figure:.0f}")
    assert all(spills_of_all(report) == 0 for report in reports.values())
    # Also in the loop over partial tiles. At 512 dropout spilled in dk, and with softcap in dq.
    if head_dim == 512 and option in ("dropout", "both"):
        assert not any(spilled.values())
    assert figure >= 300


@pytest.mark.oldest
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_row_sums_do_not_spill(arch, dtype):
    """A program has whole rows of out and dout, also of the widest heads, and of those that 16 does not divide. Triton
    3.6.0 spills a register."""
    lse = torch.empty(2, 4, 2048)
    for head_dim in (128, 248, 256, 264, 384, 512):
        out = torch.empty(2, 2048, 4, head_dim, dtype=dtype)
        with compile_only(arch) as launches:
            launch_row_sums(out, None, out, lse, Lengths(None, None, 2048, 2048), torch.ones(4))
        (launch,) = launches
        assert launch.spill_bytes <= 4 * OLDEST, head_dim


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("head_dim", [320, 512])
@pytest.mark.parametrize("arch", ["sm_86", "sm_90"])
def test_fp32_gradients_of_wide_heads_fit(arch, head_dim, precision, record_property):
    """Operands pass in chunks: in whole tiles 16 rows spilled up to 1 KB, 35 KB with tf32x3, which now spills where
    parts of a chunk are computed; and sm_86 had too little shared memory."""
    torch.set_float32_matmul_precision(precision)
    try:
        launches = compile_default(arch, torch.float32, (head_dim, head_dim), "causal", "split")
    finally:
        torch.set_float32_matmul_precision("highest")
    for kernel, launch in launches.items():
        report = loop_model.analyze(launch.kernel)
        record_property("figure", f"fp32 {describe(launch, report, kernel)} {precision}")
        assert launch.shared_bytes <= shared_memory_limit(arch)
        assert launch.spill_bytes <= (32 if precision == "highest" else 320)
        if arch == "sm_90" and precision == "high":
            assert report.hot.spills == 0
