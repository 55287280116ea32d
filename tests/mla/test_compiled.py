"""Compiled code of MLA at its defaults: resources, instructions, and the rate of the loop.

`lock` and `bound` are TFLOP/s of perf/model/loop_model.py, counting useful matmuls only. `TB/s` are the cache bytes
that the loop consumes per second in that model, which does not include memory. A decode step whose TB/s exceed the
memory bandwidth waits for memory.
"""

import re
import sys

import pytest
import torch
from prefix_trees import tree_of_all

from perf.model import loop_model
from perf.model.gpus import RATES
from triton_attn import mla_decode, mla_prefill, override_config
from triton_attn.mla.projections import plan_merge_project
from triton_attn.mla.schedule import MODES
from triton_attn.toolchain import compile_only, shared_memory_limit

pytestmark = pytest.mark.compiled

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
BATCH, MAX_PAGES, NOPE, ROPE, RANK, VALUE = 4, 16, 128, 64, 512, 128  # DeepSeek-V3
SCALES = "k_scale", "k_pe_scale"
VARIANTS = {
    "bf16": {},
    "fp16": {"dtype": torch.float16},
    "fp8": {"is_fp8": True},
    "pages of 16": {"page_size": 16},
    "pages of 1": {"page_size": 1},
    "fp8, pages of 1": {"page_size": 1, "is_fp8": True},
    "plain fp8": {"plain_fp8": torch.float8_e4m3fn, "k_scale": 0.5},
    "plain fp8, scales on the device": {"plain_fp8": torch.float8_e5m2} | dict.fromkeys(SCALES, torch.empty(1)),
    "plain fp8, pages of 1": {"plain_fp8": torch.float8_e4m3fn, "page_size": 1},
    "draft": {"seqlen_q": 4},
    "shard": {"seqlen_q": 4, "key_shard": (2, 4, 1)},
    "lse": {"return_lse": True},
    "latent": {"weights": False, "num_splits": 1},
    "latent, splits": {"weights": False},
    "fp32": {"dtype": torch.float32},
}


def compile_decode(
    arch,
    num_heads,
    *,
    dtype=torch.bfloat16,
    is_fp8=False,
    page_size=64,
    seqlen_q=1,
    num_splits=4,
    weights=True,
    return_lse=False,
    plain_fp8=None,
    **scales,
):
    """The launches of a call. With weights: absorption, attention, merge and projection."""
    q_nope = torch.empty(BATCH, seqlen_q, num_heads, NOPE if weights else RANK, dtype=dtype)
    q_pe = torch.empty(BATCH, seqlen_q, num_heads, ROPE, dtype=dtype)
    cache = torch.empty(BATCH * MAX_PAGES, page_size, 656 if is_fp8 else RANK + ROPE, dtype=dtype)
    cache = cache.to(torch.uint8) if is_fp8 else cache.to(plain_fp8 or dtype)
    block_table = torch.empty(BATCH, MAX_PAGES, dtype=torch.int32)
    weight = torch.empty(num_heads, NOPE + VALUE, RANK, dtype=dtype)
    options = {"softmax_scale": 0.1, "num_splits": num_splits, "return_lse": return_lse} | scales
    if weights:
        options["w_uk"], options["w_uv"] = weight.split([NOPE, VALUE], dim=1)
    with compile_only(arch) as launches:
        mla_decode(q_nope, q_pe, cache, block_table[:, 0].contiguous(), block_table, **options)
    return launches


# Of the GPUs with some 100 KB of shared memory, sm_120 represents sm_86 and sm_89 in the smaller levels.
SLICE = {(arch, num_heads, "bf16") for arch in ARCHS[:1] + ARCHS[3:] for num_heads in (16, 128)}
SLICE |= {("sm_90", num_heads, variant) for num_heads in (16, 128) for variant in VARIANTS}
SLICE |= {(arch, 16, "plain fp8") for arch in ("sm_80", "sm_100", "sm_120", "gfx942")}
SLICE |= {("sm_80", 128, "fp8"), ("sm_100", 128, "fp8"), ("gfx942", 128, "fp8"), ("gfx942", 16, "fp32")}
SLICE |= {("sm_80", 16, "lse"), ("gfx942", 16, "lse")}


def marks(*case):
    return (() if case in SLICE else (pytest.mark.full,)) + ((pytest.mark.oldest,) if case in SLICE else ())


@pytest.mark.full(but_each=2)
@pytest.mark.ci(but_each=7)
@pytest.mark.parametrize(
    ("arch", "num_heads", "variant"),
    [pytest.param(a, h, v, marks=marks(a, h, v)) for a in ARCHS for h in (16, 128) for v in VARIANTS],
)
def test_decode(arch, num_heads, variant, record_property):
    launches = compile_decode(arch, num_heads, **VARIANTS[variant])
    expected = ["_absorb_kernel", "_mla_absorbed_kernel", "_merge_project_kernel"]
    if variant.startswith("latent"):
        expected = ["_mla_absorbed_kernel"] + ["_merge_kernel"] * (variant == "latent, splits")
    assert [x.name for x in launches] == expected
    for launch in launches:
        assert launch.shared_bytes <= shared_memory_limit(arch)
        assert launch.spill_bytes <= (8 if variant == "latent" else 0)
        if arch == "gfx942" and variant != "fp32" and launch.name != "_merge_kernel":
            assert launch.uses_mfma
    decode = launches[expected.index("_mla_absorbed_kernel")]
    constants, report = decode.constexprs, loop_model.analyze(decode.kernel)
    tile = f"{constants['BLOCK_M']}x{constants['BLOCK_N']} w{decode.num_warps} s{decode.num_stages}"
    figure = f"mla decode {arch:7} {num_heads:3} heads {variant:15} {tile:13} {decode.registers:4} registers "
    figure += f"{decode.shared_bytes:7} B shared"
    if arch in RATES and report.lock:
        row_bytes = 656 if constants["SCALE_BLOCK"] else (1 if constants["FLOAT8"] else 2) * (RANK + ROPE)
        bytes_per_flop = row_bytes / (2 * constants["BLOCK_M"] * (2 * RANK + ROPE))
        figure += f"  lock {report.lock:.0f} bound {report.bound:.0f} TFLOP/s"
        figure += f"  {report.lock * bytes_per_flop:.2f} TB/s of {RATES[arch].memory_gbps / 1000:.2f}"
        assert report.hot.spills == 0
        waits_for_memory = ("bf16", "fp16", "fp8", "plain fp8") if arch == "sm_90" else ("bf16", "fp16")
        if num_heads == 16 and variant in waits_for_memory and arch in ("sm_80", "sm_90"):
            assert report.lock * bytes_per_flop >= RATES[arch].memory_gbps / 1000
    record_property("figure", figure)
    if arch != "gfx942" and variant != "fp32":
        assert decode.uses_cp_async
    if arch == "sm_90" and num_heads == 128 and variant != "fp32":
        assert decode.uses_wgmma
        assert report.hot.useful == 1  # no warpgroup repeats the other's scores
        assert report.hot.histogram["WARPGROUP"] < 12  # matmuls do not wait for each other
        assert report.lock >= (360 if "fp8" in variant else 510 if "pages" not in variant else 450)


# TFLOP/s of fp32 latents, floors below the values of Triton 3.6.0 and 3.9.0, and spills in the loop. Pieces of 256
# columns had 8 and 22 with tf32x3, with 4600 spills in the loop; 17 and 26 with tf32, with 140 and 177.
FP32 = {
    ("sm_80", "high"): (33, 60),
    ("sm_90", "high"): (50, 70),
    ("sm_80", "medium"): (19, 0),
    ("sm_90", "medium"): (30, 0),
}


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize(("arch", "precision"), FP32)
def test_fp32_latents_on_tensor_cores(arch, precision, record_property):
    torch.set_float32_matmul_precision(precision)
    try:
        launch, *_ = compile_decode(arch, 128, dtype=torch.float32, weights=False, num_splits=1)
    finally:
        torch.set_float32_matmul_precision("highest")
    report = loop_model.analyze(launch.kernel)
    record_property(
        "figure", f"mla fp32 {arch} {precision}: lock {report.lock:.0f}, {report.hot.spills} spills in the loop"
    )
    least, spills = FP32[arch, precision]
    assert report.lock >= least
    assert report.hot.spills <= spills


@pytest.mark.ci
@pytest.mark.oldest
@pytest.mark.parametrize(("precision", "spilled"), {"highest": 36, "high": 416, "medium": 0}.items())
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_fp32_queries_are_absorbed(arch, precision, spilled, monkeypatch, record_property):
    """64 tokens at a time. `spilled`: bytes, nothing on sm_90; 10,920 and 9,292 with blocks of 64 columns."""
    monkeypatch.setattr(sys.modules[__name__], "BATCH", 64)
    torch.set_float32_matmul_precision(precision)
    try:
        absorb, *_ = compile_decode(arch, 16, dtype=torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert absorb.name == "_absorb_kernel"
    record_property("figure", f"absorption in fp32, {arch}, {precision}: {absorb.spill_bytes} B spilled")
    assert absorb.spill_bytes <= (0 if arch == "sm_90" else spilled)


# Bytes, around the loop, of the worse of the two Tritons.
SPILLED_BY_NODES = {("sm_90", "fp8"): 12, ("sm_80", "fp8"): 36}


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("variant", ["bf16", "fp8", "plain fp8", "pages of 16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_prefix_tree(arch, variant, record_property):
    """A node of 128 beams with 16 heads, and the keys that each has alone, in two launches whatever the tree."""
    tree = tree_of_all(128, 4)._replace(batch=BATCH, total_q=BATCH)
    launches = compile_decode(arch, 16, num_splits=1, prefix_tree=tree, **VARIANTS[variant])
    assert [x.name for x in launches] == ["_absorb_kernel", *2 * ["_mla_absorbed_kernel"], "_merge_project_kernel"]
    for name, launch in zip(("nodes", "own"), launches[1:3]):
        figure = f"mla {arch:7} {variant:11} {name:5} {launch.constexprs['BLOCK_M']:3} rows"
        record_property("figure", f"{figure} {launch.registers} registers, {launch.spill_bytes} B spilled")
        assert launch.spill_bytes <= (SPILLED_BY_NODES.get((arch, variant), 8) if name == "nodes" else 8)
        hot = None if arch == "gfx942" else loop_model.analyze(launch.kernel).hot
        if hot is None:  # in what ptxas of Triton 3.9 makes of nodes on sm_90, the model finds no loop
            assert arch == "gfx942" or (arch, name) == ("sm_90", "nodes")
        else:
            assert hot.spills == 0
        assert launch.shared_bytes <= shared_memory_limit(arch)


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("variant", ["bf16", "fp8", "plain fp8", "pages of 16"])
@pytest.mark.parametrize(("num_heads", "num_drafts"), [(16, 8), (128, 64)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tree_of_drafts(arch, num_heads, num_drafts, variant, record_property):
    tree_mask = torch.empty(BATCH, num_drafts, dtype=torch.int64)
    options = VARIANTS[variant] | dict(seqlen_q=num_drafts, num_splits=1, tree_mask=tree_mask)
    _, launch, _ = compile_decode(arch, num_heads, **options)
    assert launch.constexprs["TREE"]
    figure = f"mla {arch} {variant:11} {num_heads:3} heads, {num_drafts:2} drafts {launch.registers} registers"
    record_property("figure", f"{figure}, {launch.spill_bytes} B spilled")
    assert loop_model.analyze(launch.kernel).hot.spills == 0
    assert launch.shared_bytes <= shared_memory_limit(arch)


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("variant", ["bf16", "fp8", "plain fp8", "pages of 16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tree_of_drafts_with_a_shared_prefix(arch, variant, record_property):
    """The launch over nodes has no bits."""
    num_drafts = 8
    tree = tree_of_all(128, 4)._replace(batch=BATCH, total_q=BATCH * num_drafts)
    options = dict(seqlen_q=num_drafts, tree_mask=torch.empty(BATCH, num_drafts, dtype=torch.int64), prefix_tree=tree)
    _, nodes, own, _ = compile_decode(arch, 16, num_splits=1, **options, **VARIANTS[variant])
    assert [launch.constexprs["TREE"] for launch in (nodes, own)] == [False, True]
    for name, launch in (("nodes", nodes), ("own", own)):
        figure = f"mla {arch} {variant:11} {num_drafts} drafts, {name:5} {launch.registers} registers"
        record_property("figure", f"{figure}, {launch.spill_bytes} B spilled")
        assert launch.spill_bytes <= SPILLED_BY_NODES.get((arch, variant), 8) or name == "own"
        hot = loop_model.analyze(launch.kernel).hot
        assert (arch, name) == ("sm_90", "nodes") if hot is None else hot.spills == 0


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("page_size", [64, 1])
@pytest.mark.parametrize("variant", ["bf16", "fp8"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_next_tile_is_copied_while_one_is_multiplied(arch, variant, page_size):
    """With three stages the wait of a trip leaves the copies of a whole tile of keys in flight."""
    options = VARIANTS[variant] | {"page_size": page_size, "weights": False, "num_splits": 1}
    with override_config("mla", block_n=32, num_stages=3):
        (launch,) = compile_decode(arch, 16, **options)
    found = re.findall(r"cp\.async\.(commit_group|wait_group\s+\d+)", launch.kernel.asm["ptx"])
    commits, waits = found.count("commit_group"), [int(x.split()[1]) for x in found if x != "commit_group"]
    # Two tiles before the loop and one in a trip; no wait before the loop, and one after it for what was not needed.
    assert commits % 3 == 0
    assert waits == [commits // 3, 0]


@pytest.mark.oldest
@pytest.mark.parametrize("variant", ["fp8", "plain fp8"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_fp8_is_decoded_where_matmuls_have_it(arch, variant):
    """Shared memory has the pairs of the cache, which are copied 16 bytes at a time and loaded as both operands."""
    (launch,) = compile_decode(arch, 16, weights=False, num_splits=1, **VARIANTS[variant])
    hot = loop_model.analyze(launch.kernel).hot
    tile = launch.constexprs["BLOCK_N"] * (launch.constexprs["KV_LORA_RANK"] + ROPE * (2 if variant == "fp8" else 1))
    assert sum(n for name, n in hot.histogram.items() if name == "LDGSTS") >= tile / 16 / 128
    ptx = launch.kernel.asm["ptx"]
    assert len(re.findall(r"ldmatrix\S*trans", ptx)) > 0
    assert len(re.findall(r"ld\.shared\S*\.[bu]8 ", ptx)) == 0
    assert hot.histogram["LDG"] <= 1  # the page of a later tile


# How many splits a call has, their dtype, and that of weights and output.
SPLITS = {"one": (1, torch.bfloat16, torch.bfloat16), "a few": (4, torch.float32, torch.bfloat16)}
SPLITS |= {"many": (32, torch.float32, torch.bfloat16), "fp32": (4, torch.float32, torch.float32)}
# Programs of 4 warps that the registers of an SM have room for, by tokens; many splits of 4 tokens leave room for 3.
PROGRAMS_PER_SM = {1: 4, 4: 4, 16: 2, 64: 2}


@pytest.mark.full(but_each=3)
@pytest.mark.ci(but_each=5)
@pytest.mark.oldest
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("num_tokens", PROGRAMS_PER_SM)
def test_merge_and_projection(arch, num_tokens, splits, record_property):
    """A program of any number of tokens keeps its tiles in registers."""
    num_heads, (num_splits, split_dtype, dtype) = 128, SPLITS[splits]
    parts = torch.empty(num_splits, num_tokens, 1, num_heads, RANK, dtype=split_dtype)
    lse_parts = torch.empty(num_splits, num_tokens, num_heads, 1)
    w_uv = torch.empty(num_heads, NOPE + VALUE, RANK, dtype=dtype)[:, NOPE:]
    out = torch.empty(num_tokens, 1, num_heads, VALUE, dtype=dtype)
    with compile_only(arch) as launches:
        plan = plan_merge_project(parts.shape, (w_uv.shape, w_uv.stride()), out.stride(), dtype, "ieee")
        plan.launch(parts, lse_parts, w_uv, out, lse_parts[0])
    (launch,) = launches
    figure = f"merge and projection {arch} {num_tokens:2} tokens {splits:5} {launch.registers:4} registers"
    record_property("figure", figure)
    assert launch.spill_bytes == 0
    programs = PROGRAMS_PER_SM[num_tokens] - ((num_tokens, splits) == (4, "many"))
    assert launch.registers <= 65536 // (programs * 32 * launch.num_warps)


@pytest.mark.oldest
@pytest.mark.full(but_each=12)
@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rope", [ROPE, 0])
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("arch", ["sm_90", "sm_86", "sm_100", "sm_80", "sm_120", "gfx942"])
def test_packed_decode_over_two_caches(arch, num_heads, rope, cache_dtype):
    """As FlashInfer's users call it: one query of 16 heads each, or of 128 heads a number that is not known, so that
    programs find their sequence."""
    longest, around_the_loop = 1, {}
    if num_heads == 128:
        longest = 32
        around_the_loop = {"sm_86": 40, "sm_90": 8} if cache_dtype == torch.bfloat16 else {"sm_90": 68}
    queries = (torch.empty(32, num_heads, width, dtype=torch.bfloat16) for width in (RANK, rope))
    latents, rope_cache = (torch.empty(64, 64, width, dtype=cache_dtype) for width in (RANK, rope))
    cache_seqlens, table = torch.empty(8, dtype=torch.int32), torch.empty(8, 64, dtype=torch.int32)
    packed = dict(cu_seqlens_q=torch.empty(9, dtype=torch.int32), max_seqlen_q=longest)
    with compile_only(arch) as launches:
        options = dict(rope_cache=rope_cache, softmax_scale=1.0, num_splits=1, k_scale=0.5, k_pe_scale=2.0)
        if cache_dtype == torch.bfloat16:
            del options["k_scale"], options["k_pe_scale"]
        mla_decode(*queries, latents, cache_seqlens, table, **packed, **options)
    (launch,) = launches
    assert launch.constexprs["SEARCH"] == (longest > 1)
    assert launch.shared_bytes <= shared_memory_limit(arch)
    assert launch.spill_bytes <= around_the_loop.get(arch, 0)
    if arch in RATES:
        assert loop_model.analyze(launch.kernel).hot.spills == 0


def compile_prefill(arch, mode, dtype=torch.bfloat16, dim=NOPE, packed=False, return_lse=False):
    """The launches of a call, and of its backward pass if there is one."""
    outer = (1024,) if packed else (1, 1024)
    shapes = [(*outer, 4, dim), (*outer, 4, ROPE), (*outer, RANK), (*outer, ROPE), (4, dim, RANK), (4, dim, RANK)]
    options = {"return_lse": return_lse}
    if packed:
        cu_seqlens = torch.empty(3, dtype=torch.int32)
        options |= dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=512, max_seqlen_k=512)
    with compile_only(arch) as launches:
        mla_prefill(*(torch.empty(shape, dtype=dtype) for shape in shapes), mode=mode, **options)
    return launches


PREFILL_ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
WIDE = {"256": {"dim": 256}, "512": {"dim": 512}}
PREFILL_VARIANTS = {"bf16": {}, "packed": {"packed": True}, "fp32": {"dtype": torch.float32}, **WIDE}
PREFILL_VARIANTS |= {"lse": {"return_lse": True}}
# Bytes spilled around the loop over latent elements, which runs once per tile of keys, at DeepSeek's widths.
FUSED_SPILLS = {"sm_80": 52, "sm_86": 16, "sm_90": 140, "sm_100": 16, "sm_120": 56, "gfx942": 0}
PREFILL_SLICE = {(arch, mode, "bf16") for arch in set(PREFILL_ARCHS) - {"sm_86"} for mode in ("fused", "materialized")}
PREFILL_SLICE |= {(arch, "absorbed", "bf16") for arch in ("sm_80", "sm_86")}
PREFILL_SLICE |= {("sm_90", mode, variant) for mode in MODES for variant in ("packed", "lse")}


@pytest.mark.full(but_each=2)
@pytest.mark.ci(but_each=6)
@pytest.mark.parametrize(
    ("arch", "mode", "variant"),
    [
        pytest.param(a, m, v, marks=[pytest.mark.oldest] if (a, m, v) in PREFILL_SLICE else [pytest.mark.full])
        for a in PREFILL_ARCHS
        for m in MODES
        for v in PREFILL_VARIANTS
    ],
)
def test_prefill(arch, mode, variant, record_property):
    launches = compile_prefill(arch, mode, **PREFILL_VARIANTS[variant])
    for launch in launches:
        assert launch.shared_bytes <= shared_memory_limit(arch)
    if mode == "absorbed":
        assert [x.name for x in launches] == ["_absorb_kernel", "_mla_absorbed_kernel", "_merge_project_kernel"]
        most = 0 if variant == "fp32" else 64 if arch == "sm_86" else 44
        assert variant in WIDE or sum(x.spill_bytes for x in launches) <= most
        if arch in RATES and variant != "fp32":
            assert loop_model.analyze(launches[1].kernel).hot.spills == 0
        return
    (launch,) = launches
    assert launch.name == "_mla_prefill_kernel"
    constants, report = launch.constexprs, loop_model.analyze(launch.kernel)
    tile = f"{constants['BLOCK_M']}x{constants['BLOCK_N']} w{launch.num_warps} s{launch.num_stages}"
    figure = f"mla prefill {mode:12} {arch:7} {variant:6} {tile:13} {launch.registers:4} registers "
    figure += f"{launch.spill_bytes:5} B spilled {launch.shared_bytes:7} B shared"
    if arch in RATES and report.lock:
        figure += f"  lock {report.lock:.0f} bound {report.bound:.0f} TFLOP/s"
    record_property("figure", figure)
    if variant in ("bf16", "packed"):
        assert launch.spill_bytes <= (FUSED_SPILLS[arch] if mode == "fused" else 0)
        if arch != "gfx942" and report.hot:
            assert report.hot.spills == 0
        if arch == "sm_90":
            assert launch.uses_wgmma
            assert report.lock >= 550


def test_a_new_length_is_no_new_compilation():
    """Only powers of two matter: a tile of the last kernel holds that many tokens and splits."""
    first, second = (
        compile_decode("sm_90", 128, seqlen_q=seqlen_q, num_splits=num_splits)
        for seqlen_q, num_splits in ((3, 3), (4, 4))
    )
    assert [x.kernel.hash for x in first] == [x.kernel.hash for x in second]


@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize(("mode", "bound"), [("fused", 0), ("absorbed", 6_700_000), ("materialized", 1_600_000)])
def test_a_new_length_of_a_prompt_is_no_new_compilation(mode, bound):
    """A chunk has room for 9 or 10 of the 16 heads, and takes 8 at any of these lengths."""
    compiled = set()
    for seqlen in (302, 304, 330):  # odd lengths have strides that 16 does not divide: one more compilation
        shapes = [(1, seqlen, 16, NOPE), (1, seqlen, 16, ROPE), (1, seqlen, RANK), (1, seqlen, ROPE)]
        shapes += [(16, NOPE, RANK), (16, VALUE, RANK)]
        with compile_only("sm_90") as launches:
            tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
            mla_prefill(*tensors, mode=mode, max_workspace_bytes=bound)
        compiled |= {(launch.name, launch.kernel.hash) for launch in launches}
    assert len(compiled) == (3 if mode == "absorbed" else 1)
