"""Compiled code of the forward kernel at its defaults: resources, instructions, the loop over full tiles,
recompilation.

`lock` and `bound` are TFLOP/s in the cycle model of perf/model/loop_model.py. They rank kernels and catch regressions.
No kernel has run here. The summary of the test run prints them with registers and spills.
"""

import pytest
import torch
from flash_launches import describe, lock_of_all, spills_of_all
from host_cost import ELSEWHERE, bare_launches, compare, python_calls

from perf.model import loop_model
from triton_attn import flash_attention, flash_attention_varlen
from triton_attn._host.call import call_of
from triton_attn._host.options import AttentionOptions
from triton_attn.dense.tiles import FlashCase
from triton_attn.flash import forward
from triton_attn.flash.configs import FlashConfig
from triton_attn.flash.forward import launch_flash_fwd
from triton_attn.toolchain import compile_only, shared_memory_limit

pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True)
def portable(monkeypatch):
    """The kernel of forward.py, even if hopper.py's is the default."""
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "portable")


SEQLEN, BATCH, NUM_HEADS = 2048, 2, 4
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

VARIANTS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (1000, 0)},
    "gqa": {"num_heads_kv": 1},
    "varlen": {"causal": True, "varlen": True},
    "softcap": {"causal": True, "softcap": 30.0},
    "alibi": {"causal": True, "alibi_slopes": torch.ones(NUM_HEADS)},
    "sinks": {"causal": True, "sinks": torch.ones(NUM_HEADS)},
    "dropout": {"causal": True, "dropout_p": 0.1, "dropout_seed": 1},
    "lse": {"return_lse": True},
}


def compile_default(arch, dtype, head_dim, head_dim_v, variant):
    """The launch that one public call makes."""
    options = dict(VARIANTS[variant])
    num_heads_kv = options.pop("num_heads_kv", NUM_HEADS)
    q = torch.empty(BATCH, SEQLEN, NUM_HEADS, head_dim, dtype=dtype)
    k = torch.empty(BATCH, SEQLEN, num_heads_kv, head_dim, dtype=dtype)
    v = torch.empty(BATCH, SEQLEN, num_heads_kv, head_dim_v, dtype=dtype)
    with compile_only(arch) as launches:
        if options.pop("varlen", False):
            cu_seqlens = torch.arange(BATCH + 1, dtype=torch.int32) * SEQLEN
            packed = (x.flatten(0, 1) for x in (q, k, v))
            flash_attention_varlen(*packed, cu_seqlens, cu_seqlens, SEQLEN, SEQLEN, **options)
        else:
            flash_attention(q, k, v, **options)
    (launch,) = launches
    return launch


# Bytes spilled outside the loop, the maximum of Triton 3.6.0 and 3.9.0. On sm_80 tiles without spills in any variant
# have a fifth less `lock`. On sm_90 only 3.6.0 spills, where spare rows are cleared.
KNOWN_SPILLS = {("sm_80", 192, "lse"): 32, ("sm_120", 192, "causal"): 8, ("sm_90", 256, "varlen"): 4}


def check_resources(launch, report, dtype, variant):
    """It fits. Half precision spills nothing in the loop, except past head dim 256 on sm_100 and AMD. Outside the loop
    it spills nothing up to head dim 256, except with dropout, whose random numbers are the bottleneck.
    """
    assert launch.shared_bytes <= shared_memory_limit(launch.arch)
    if dtype == torch.float32:
        return
    head_dim = max(launch.constexprs["HEAD_DIM"], launch.constexprs["HEAD_DIM_V"])
    if head_dim <= 256 and variant != "dropout":
        assert launch.spill_bytes <= KNOWN_SPILLS.get((launch.arch, head_dim, variant), 0)
    if launch.arch in ("sm_80", "sm_90", "sm_100") or (head_dim <= 256 and launch.arch != "gfx942"):
        assert report.hot.spills <= (2 if variant == "dropout" else 0)


def check_instructions(launch, report, dtype):
    """Each architecture's own matrix instructions and asynchronous copies, in the loop over full tiles if it is
    analysed.
    """
    if dtype == torch.float32:
        return
    if launch.arch == "gfx942":
        assert launch.uses_mfma
        return
    by_16_bytes = launch.constexprs["VECTOR"] > 1
    in_pieces = launch.constexprs["CUT_CHAIN"] and not launch.uses_tma
    assert (report.hot.async_copies > 0) == (by_16_bytes and not in_pieces)
    assert launch.uses_tcgen05 == (launch.arch == "sm_100")
    if by_16_bytes:
        assert launch.uses_tma == (launch.arch in ("sm_90", "sm_100"))
        assert launch.uses_wgmma == (launch.arch == "sm_90")
        assert (report.hot.histogram["HGMMA"] > 0) == launch.uses_wgmma


def case(arch, dtype, head_dim, variant, *marks):
    head_dim, head_dim_v = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    name = f"{arch}-{NAMES[dtype]}-{head_dim}-{head_dim_v}-{variant}"
    return pytest.param(arch, dtype, head_dim, head_dim_v, variant, id=name, marks=marks)


def full(param):
    return pytest.param(*param.values, id=param.id, marks=pytest.mark.full)


HEAD_DIMS = (16, 32, 40, 64, 71, 80, 96, 112, 128, 160, 192, (192, 128), 256, 320, 384, 512)
HALF = (torch.float16, torch.bfloat16)
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
SLICE = [
    *(case(arch, torch.float16, d, "causal", pytest.mark.oldest) for arch in ARCHS for d in (64, 128, (192, 128), 256)),
    *(case(arch, torch.float16, 71, "causal") for arch in ARCHS),
    *(case(arch, torch.bfloat16, 128, "varlen") for arch in ARCHS),
    *(case("sm_90", torch.float16, d, "varlen", pytest.mark.oldest) for d in (64, 256)),
    *(case("sm_90", torch.float16, d, "causal") for d in (40, 160, 320, 512)),
    *(case("sm_90", torch.float16, 128, variant) for variant in ("softcap", "alibi", "sinks")),
    *(case(arch, torch.float16, d, "dropout") for arch, d in (("sm_90", 128), ("sm_80", 64))),
    *(case("sm_80", torch.float16, d, "plain") for d in (40, 128)),
    *(case("sm_80", torch.float16, d, "causal", pytest.mark.oldest) for d in (320, 512)),
    *(case("sm_100", torch.float16, d, "plain") for d in (128, 512)),
    *(case(arch, torch.float32, 128, "causal") for arch in ARCHS),
    *(case(arch, torch.float16, 128, "causal") for arch in ("sm_86", "sm_89", "sm_120")),
]
REST = [
    *(case(arch, torch.float16, d, variant) for arch in ARCHS for d in HEAD_DIMS for variant in VARIANTS),
    *(case(arch, torch.bfloat16, d, variant) for arch in ARCHS for d in HEAD_DIMS for variant in ("plain", "causal")),
    *(case(arch, torch.float32, d, variant) for arch in ARCHS for d in HEAD_DIMS for variant in ("plain", "causal")),
    *(case(arch, torch.float16, d, "causal") for arch in ("sm_86", "sm_120") for d in HEAD_DIMS),
]
SLICE_IDS = {param.id for param in SLICE}


@pytest.mark.full(but_each=2)
@pytest.mark.ci(but_each=10)
@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "head_dim_v", "variant"),
    [*SLICE, *(full(param) for param in REST if param.id not in SLICE_IDS)],
)
def test_default(arch, dtype, head_dim, head_dim_v, variant, record_property):
    launch = compile_default(arch, dtype, head_dim, head_dim_v, variant)
    report = loop_model.analyze(launch.kernel)
    record_property("figure", f"{NAMES[dtype]} {describe(launch, report, variant)}")
    check_resources(launch, report, dtype, variant)
    check_instructions(launch, report, dtype)


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("arch", ["sm_103", "sm_121", "gfx950"])
def test_what_has_the_tables_of_another_spills_nothing(arch):
    launch = compile_default(arch, torch.bfloat16, 128, 128, "causal")
    assert (launch.arch, launch.spill_bytes) == (arch, 0)


# TFLOP/s of fp32 at head dimension 512, floors below the values of Triton 3.6.0 and 3.9.0. Whole tiles in registers had
# 12 to 30 with tf32x3, and spilled 5 to 11 KB; 18 and 27 with tf32.
FP32_WIDEST = {("sm_80", "high"): 39, ("sm_90", "high"): 59, ("sm_80", "medium"): 30, ("sm_90", "medium"): 47}


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize(("arch", "precision"), FP32_WIDEST)
def test_fp32_of_the_widest_heads_on_tensor_cores(arch, precision, record_property):
    torch.set_float32_matmul_precision(precision)
    try:
        launch = compile_default(arch, torch.float32, 512, 512, "causal")
    finally:
        torch.set_float32_matmul_precision("highest")
    report = loop_model.analyze(launch.kernel)
    record_property("figure", f"fp32 {describe(launch, report, precision)}")
    assert report.hot.spills == 0
    assert launch.spill_bytes <= 96  # where a program begins and ends
    assert report.lock >= FP32_WIDEST[arch, precision]


@pytest.mark.full
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_fp32_on_tensor_cores_fits(arch, head_dim, precision, record_property):
    torch.set_float32_matmul_precision(precision)
    try:
        launch = compile_default(arch, torch.float32, head_dim, head_dim, "causal")
    finally:
        torch.set_float32_matmul_precision("highest")
    report = loop_model.analyze(launch.kernel)
    record_property("figure", f"fp32 {describe(launch, report, precision)}")
    assert report.hot.mma_instructions > 0


@pytest.mark.oldest
@pytest.mark.parametrize("head_dim", [256, 320, 384, 512])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_fp32_of_wide_heads_spills_little(arch, head_dim):
    """Of rows whose products are fused multiply-adds; a tile of twice the rows spills kilobytes."""
    assert compile_default(arch, torch.float32, head_dim, head_dim, "causal").spill_bytes <= 48


# fp16 on sm_90, TFLOP/s: the minimum for the loop over full tiles; the units allow at most 949.
BARS = {64: (460, 900), 128: (600, 949), 256: (640, 949)}


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize("head_dim", BARS)
def test_loop_over_full_tiles_on_hopper(head_dim, record_property):
    lock, bound = BARS[head_dim]
    loops = {}
    for variant in ("plain", "causal", "gqa", "window"):
        launch = compile_default("sm_90", torch.float16, head_dim, head_dim, variant)
        report = loop_model.analyze(launch.kernel)
        record_property("figure", f"fp16 {describe(launch, report, variant)}")
        check_resources(launch, report, torch.float16, variant)
        check_instructions(launch, report, torch.float16)
        loops[variant] = report
    plain = loops["plain"]
    assert plain.lock >= lock
    assert round(plain.bound) >= bound
    # A mask, a group or a window only affects other tiles.
    for report in loops.values():
        for opcode in ("HGMMA", "MUFU", "F2FP", "FMNMX", "UTMALDG"):
            assert report.hot.histogram[opcode] == plain.hot.histogram[opcode], opcode
        assert report.hot.instructions == pytest.approx(plain.hot.instructions, rel=0.05)
        assert report.lock == pytest.approx(plain.lock, rel=0.03)


# TFLOP/s at head dimension 512, floors below the values of Triton 3.6.0 and 3.9.0, and the most bytes spilled: where a
# program begins and ends.
WIDEST = {"sm_80": (105, 0), "sm_90": (480, 16)}


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize("arch", WIDEST)
def test_the_widest_heads(arch, record_property):
    lock, spilled = WIDEST[arch]
    launch = compile_default(arch, torch.bfloat16, 512, 512, "causal")
    report = loop_model.analyze(launch.kernel)
    record_property("figure", f"bf16 {describe(launch, report, 'causal')}")
    assert report.lock >= lock
    assert report.hot.spills == 0
    assert launch.spill_bytes <= spilled


EVERYTHING = {"softcap": 30.0, "alibi_slopes": torch.ones(NUM_HEADS), "sinks": torch.ones(NUM_HEADS)}


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, EVERYTHING], ids=["dropout", "softcap", "everything"])
def test_dropout_of_the_widest_heads(options, record_property):
    """On sm_80 its mask is drawn in a loop of one trip: the tile of plain calls otherwise spills on Triton 3.6.0, and
    has 94 to 98 TFLOP/s there; a tile of 32 queries, which does not spill, has 85 to 95."""
    q = torch.empty(BATCH, SEQLEN, NUM_HEADS, 512, dtype=torch.bfloat16)
    with compile_only("sm_80") as launches:
        flash_attention(q, q, q, causal=True, dropout_p=0.1, dropout_seed=1, **options)
    report = loop_model.analyze(launches[0].kernel)
    record_property("figure", f"bf16 {describe(launches[0], report, 'dropout')}, {lock_of_all(report):.0f} of all")
    # With all options and without lse Triton 3.6.0 spills one register.
    assert launches[0].spill_bytes <= (4 if "sinks" in options else 0)
    assert spills_of_all(report) <= (1 if "sinks" in options else 0)
    assert lock_of_all(report) >= 100


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize(("arch", "head_dim", "spills"), [("sm_80", 64, 0), ("sm_90", 128, 13)])
def test_softcap_and_dropout_together(arch, head_dim, spills, record_property):
    """They have the tile of dropout. With that of plain calls the kernel spilled 36 instructions in the loop at 64, and
    had too little shared memory on sm_90."""
    q = torch.empty(BATCH, SEQLEN, NUM_HEADS, head_dim, dtype=torch.float16)
    with compile_only(arch) as launches:
        flash_attention(q, q, q, causal=True, softcap=30.0, dropout_p=0.1, dropout_seed=1)
    report = loop_model.analyze(launches[0].kernel)
    record_property("figure", f"fp16 {describe(launches[0], report, 'both')}")
    assert launches[0].shared_bytes <= shared_memory_limit(arch)
    assert report.hot.spills <= spills


LENGTHS = (1, 2, 15, 16, 17, 31, 64, 127, 128, 129, 1000, 1024, 2047, 4096, 4097)


@pytest.mark.ci(but_each=2)
@pytest.mark.oldest
@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (100, -1), "return_lse": True}])
def test_a_call_compiles_one_kernel_and_its_length_no_other(options):
    with compile_only("sm_90") as launches:
        for seqlen in LENGTHS:
            q = torch.empty(2, seqlen, 8, 128, dtype=torch.float16)
            flash_attention(q, q[:, :, :2], q[:, :, :2], **options)
            flash_attention(q[:, :1], q, q, **options)
    assert len(launches) == 2 * len(LENGTHS)
    # Heads with and without groups are two kernels, since an argument of 1 is specialized.
    assert len({launch.kernel.hash for launch in launches}) == 2


def test_varlen_lengths_compile_no_other_kernel():
    with compile_only("sm_90") as launches:
        for total in LENGTHS:
            q = torch.empty(total, 8, 128, dtype=torch.float16)
            cu_seqlens = torch.tensor([0, total // 3, total], dtype=torch.int32)
            flash_attention_varlen(q, q, q, cu_seqlens, cu_seqlens, total, total, causal=True)
    assert len(launches) == len(LENGTHS)
    assert len({launch.kernel.hash for launch in launches}) == 1


@pytest.mark.ci
def test_an_odd_head_dim_compiles_two_kernels_over_all_lengths():
    # The stride between sequences is a multiple of 16 only if the length is.
    with compile_only("sm_80") as launches:
        for seqlen in LENGTHS:
            q = torch.empty(2, seqlen, 3, 71, dtype=torch.float16)
            flash_attention(q, q, q)
    assert len({launch.kernel.hash for launch in launches}) == 2


@pytest.mark.full
def test_prune_agrees_with_the_compiler():
    """Configs refused for shared memory do not fit, and accepted ones do."""
    for arch, tile in {
        "sm_80": FlashConfig(128, 64, 8, 4),
        "sm_86": FlashConfig(128, 64, 8, 2),
        "sm_90": FlashConfig(128, 128, 8, 3, use_tma=True),
        "gfx942": FlashConfig(128, 64, 8, 1),
    }.items():
        for head_dim in (128, 256):
            reason = tile.objection(FlashCase(arch, torch.float16, head_dim, head_dim, False))
            fits = compiles(arch, head_dim, tile)
            assert fits == (reason is None or "shared memory" not in reason), (arch, head_dim, reason)


def compiles(arch, head_dim, tile):
    q = torch.empty(1, 256, 4, head_dim, dtype=torch.float16)
    options = AttentionOptions(1.0, (None, None), None, None, None)
    with compile_only(arch) as launches:
        try:
            launch_flash_fwd(call_of(q, q, q, options), torch.empty_like(q), None, tile)
        except forward.triton.runtime.errors.OutOfResources:
            return False
    return len(launches) == 1


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_host_cost(varlen, record_property):
    """The cost of a known call beside the bare launch of its kernel with prepared arguments.

    Python calls repeat exactly; a repeated launch makes fewer than the JIT. tests/driver measures other calls, with
    Triton's launcher.
    """
    q, k, v = (torch.empty(4, 512, heads, 128, dtype=torch.float16) for heads in (32, 8, 8))
    if varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu_seqlens = torch.arange(5, dtype=torch.int32) * 512
    with compile_only("sm_90", every_launch=False), torch.no_grad():

        def call():
            if varlen:
                return flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 512, 512, causal=True)
            return flash_attention(q, k, v, causal=True)

        launch = bare_launches(call, [forward])
        cost, cost_of_launch, ratio = compare(call, launch)
        extra_calls = python_calls(call) - python_calls(launch)
    figure = f"{cost:.0f} us a call of {'flash_attention_varlen' if varlen else 'flash_attention'}, "
    figure += f"{cost_of_launch:.0f} us the bare launch of its kernel, {extra_calls} more Python calls"
    record_property("figure", figure)
    assert extra_calls <= (19 if varlen else 10)
    assert ratio <= 1.5 * ELSEWHERE
