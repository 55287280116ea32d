"""Compiled code of attention over a cache at its defaults: resources, instructions, recompilation, host cost.

`TB/s` are the bytes of keys and values that the loop over full tiles consumes per second, in the cycle model of
perf/model/loop_model.py, which does not include memory. A decode step whose TB/s exceed the memory bandwidth waits only
for memory.
"""

import math

import pytest
import torch
from host_cost import ELSEWHERE, bare_launches, compare, python_calls
from instruments import Instrument
from prefix_trees import tree_of_all

from perf.model import loop_model
from perf.model.gpus import RATES
from triton_attn import paged_attention
from triton_attn.interop.vllm import inline_scales
from triton_attn.merge import kernel as merge
from triton_attn.paged import forward
from triton_attn.toolchain import compile_only, shared_memory_limit

pytestmark = pytest.mark.compiled

BATCH, NUM_HEADS, NUM_HEADS_KV, MAX_PAGES = 4, 32, 8, 64
ROWS = {"decode": 1, "draft": 8, "prefill": 128}  # new tokens
VARIANTS = {
    "plain": {},
    "window": {"window_size": (1000, 0)},
    "everything": {"alibi_slopes": torch.ones(NUM_HEADS), "softcap": 30.0, "sinks": torch.ones(NUM_HEADS)},
    "fp8": {"cache_dtype": torch.float8_e4m3fn},
    "fp8_e5m2": {"cache_dtype": torch.float8_e5m2},
    "fp8, token": {"cache_dtype": torch.float8_e4m3fn, "per_token": "apart"},
    "int8, token": {"cache_dtype": torch.int8, "per_token": "apart"},
    "int8, inline": {"cache_dtype": torch.int8, "per_token": "inline"},
    "splits": {"num_splits": 4},
    "varlen": {"varlen": True},
    "contiguous": {"contiguous": True},
    "packed": {"packed": True},
    "packed, fp8": {"packed": True, "cache_dtype": torch.float8_e4m3fn},
    "shard": {"key_shard": (2, 4, 1)},
    "shard, everything": {
        "key_shard": (2, 4, 1),
        "window_size": (1000, 0),
        "alibi_slopes": torch.ones(NUM_HEADS),
        "softcap": 30.0,
        "sinks": torch.ones(NUM_HEADS),
    },
}
# Bytes spilled, by (arch, head dim, rows, variant): the maximum of Triton 3.6.0 and 3.9.0. Tiles without spills would
# cost the other variants 5 to 30 % of `lock`.
KNOWN_SPILLS = {
    ("sm_80", 40, "decode", "fp8_e5m2"): 4,
    ("sm_80", 40, "prefill", "contiguous"): 24,
    ("sm_80", 64, "prefill", "everything"): 12,
    ("sm_80", 80, "prefill", "fp8"): 48,
    ("sm_90", 40, "decode", "int8, inline"): 4,
    ("sm_90", 512, "decode", "packed"): 32,
    ("sm_100", 16, "prefill", "fp8"): 4,
    ("sm_100", 16, "prefill", "fp8_e5m2"): 4,
    ("gfx942", 128, "prefill", "fp8"): 64,
    ("gfx942", 128, "prefill", "fp8_e5m2"): 112,
}


# On sm_80 tiles of drafts and chunks fill the registers, which takes up to so many bytes outside the loop. Those that
# spill nothing have 60 to 80 % of their `lock`.
OUTSIDE_THE_LOOP = 150


def loop_rate(launch):
    """TB/s of keys and values in the loop over full tiles: with full overlap, and without overlap of matmuls and
    softmax.
    """
    report, constants = loop_model.analyze(launch.kernel), launch.constexprs
    bytes_per_flop = (1 if constants["MANTISSA_BITS"] else 2) / (2 * constants["BLOCK_M"])
    return report.bound * bytes_per_flop, report.lock * bytes_per_flop


def arguments(
    head_dim,
    seqlen_q,
    dtype=torch.float16,
    cache_dtype=None,
    page_size=16,
    varlen=False,
    contiguous=False,
    per_token=None,
    packed=False,
):
    """per_token: where scales for each token are, as in `PagedKVCache` ("apart") or as in vLLM's rows ("inline")."""
    q = torch.empty(BATCH, seqlen_q, NUM_HEADS, head_dim, dtype=dtype)
    cache = torch.empty(BATCH * MAX_PAGES, page_size, NUM_HEADS_KV, head_dim, dtype=cache_dtype or dtype)
    given = {"cache_seqlens": torch.empty(BATCH, dtype=torch.int32)}
    if varlen:
        q = q.flatten(0, 1)
        given |= {"cu_seqlens_q": torch.empty(BATCH + 1, dtype=torch.int32), "max_seqlen_q": seqlen_q}
    if contiguous:
        cache = cache.view(BATCH, -1, NUM_HEADS_KV, head_dim)
    else:
        given["block_table"] = torch.empty(BATCH, MAX_PAGES, dtype=torch.int32)
    caches = {"k_cache": cache, "v_cache": cache}
    if packed:
        rows = cache.permute(0, 2, 3, 1).contiguous()
        x = 16 // cache.element_size()
        keys = rows.view(*rows.shape[:2], head_dim // x, page_size, x)
        caches = {"k_cache": keys, "v_cache": rows}
    if per_token == "apart":
        scales = torch.empty(len(cache), NUM_HEADS_KV, page_size).transpose(1, 2)
        caches |= {"k_scale": scales, "v_scale": scales}
    elif per_token == "inline":
        rows = torch.empty(len(cache), NUM_HEADS_KV, page_size, 2 * head_dim + 8, dtype=cache_dtype)
        caches = dict(zip(("k_cache", "v_cache", "k_scale", "v_scale"), inline_scales(rows)))
    return given | {"q": q} | caches


def compile_default(arch, head_dim, rows, variant, **changes):
    """rows: new tokens of a sequence, or their name in ROWS."""
    options = {"num_splits": 1} | VARIANTS[variant] | changes
    names = "dtype", "cache_dtype", "varlen", "contiguous", "per_token", "packed", "page_size"
    shape = {name: options.pop(name) for name in names if name in options}
    with compile_only(arch) as launches:
        paged_attention(**arguments(head_dim, ROWS.get(rows, rows), **shape), **options)
    return launches


def case(arch, head_dim, rows, variant="plain", *marks):
    return pytest.param(arch, head_dim, rows, variant, id=f"{arch}-{head_dim}-{rows}-{variant}", marks=marks)


ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
SLICE = [
    *(case(arch, d, "decode", "plain", pytest.mark.oldest) for arch in ARCHS for d in (64, 128, 256)),
    *(case(arch, 128, "decode", variant) for arch in ("sm_80", "sm_90") for variant in ("everything", "fp8", "varlen")),
    *(case(arch, 128, "decode", "fp8_e5m2") for arch in ("sm_80", "sm_90", "gfx942")),
    # Triton 3.6 does not compile all code beside tcgen05: `decode` has to differ there.
    *(case("sm_100", 128, "prefill", variant, pytest.mark.oldest) for variant in ("fp8", "fp8, token", "packed, fp8")),
    *(
        case(arch, 128, rows, variant, pytest.mark.oldest)
        for arch in ("sm_80", "sm_90")
        for rows in ("decode", "prefill")
        for variant in ("fp8, token", "int8, token", "int8, inline")
    ),
    *(
        case("sm_80", 256, rows, variant, pytest.mark.oldest)
        for rows in (16, "prefill")
        for variant in ("fp8", "fp8, token", "int8, token", "int8, inline")
    ),
    *(case("sm_80", 128, 16, variant, pytest.mark.oldest) for variant in ("plain", "everything", "fp8")),
    case("sm_90", 64, "decode", "fp8", pytest.mark.oldest),
    *(case(arch, 512, rows) for arch in ARCHS for rows in ("decode", "prefill")),
    *(case(arch, 128, "prefill", "varlen", pytest.mark.oldest) for arch in ARCHS),
    *(case(arch, 128, "decode") for arch in ("sm_86", "sm_89", "sm_120")),
    *(case("sm_80", d, "prefill", "plain", pytest.mark.oldest) for d in (192, 256)),
    case("sm_90", 128, "draft"),
    case("sm_90", 128, "decode", "contiguous"),
    *(case(arch, 128, "draft", "shard", pytest.mark.oldest) for arch in ("sm_80", "sm_90")),
    case("sm_90", 128, "decode", "shard, everything", pytest.mark.oldest),
    *(
        case(arch, 128, rows, variant, pytest.mark.oldest)
        for arch in ("sm_80", "sm_90")
        for rows in ("decode", "prefill")
        for variant in ("packed", "packed, fp8")
    ),
]
SLICE_IDS = {param.id for param in SLICE}
HEAD_DIMS = (16, 40, 64, 71, 80, 96, 128, 160, 192, 256, 512)
REST = [case(arch, d, rows, v) for arch in ARCHS for d in HEAD_DIMS for rows in ROWS for v in VARIANTS]
REST = [param for param in REST if "packed" not in param.values[3] or param.values[1] % 16 == 0]


@pytest.mark.oldest
def test_two_programs_of_a_chunk_fit_on_an_sm():
    """At head dimension 64, where each has 128 rows and 8 warps."""
    q = torch.empty(BATCH, 512, 71, 64, dtype=torch.bfloat16)
    given = arguments(64, 512, torch.bfloat16) | {"q": q}
    cache = given["k_cache"][:, :, :1]
    with compile_only("sm_90") as launches:
        paged_attention(**given | {"k_cache": cache, "v_cache": cache}, num_splits=1)
    (launch,) = launches
    assert 2 * launch.num_warps * 32 * launch.registers <= 65536


def full(param):
    return pytest.param(*param.values, id=param.id, marks=pytest.mark.full)


@pytest.mark.full(but_each=2)
@pytest.mark.ci(but_each=10)
@pytest.mark.parametrize(
    ("arch", "head_dim", "rows", "variant"), [*SLICE, *(full(param) for param in REST if param.id not in SLICE_IDS)]
)
def test_default(arch, head_dim, rows, variant, record_property):
    launch, *_ = compile_default(arch, head_dim, rows, variant)
    constants = launch.constexprs
    tile = f"{constants['BLOCK_M']}x{constants['BLOCK_N']} w{launch.num_warps} s{launch.num_stages}"
    figure = f"paged {arch:7} {head_dim:4} {rows!s:8} {variant:10} {tile:13} {launch.registers:4} registers "
    figure += f"{launch.spill_bytes:5} B spilled {launch.shared_bytes:7} B shared"
    if rows == "decode" and arch in RATES:
        bound, lock = loop_rate(launch)
        memory = RATES[arch].memory_gbps / 1000
        figure += f"  {lock:.2f} to {bound:.2f} TB/s of {memory:.2f}"
        assert "8" in variant or "everything" in variant or head_dim % 16 or lock >= memory
    record_property("figure", figure)
    assert launch.shared_bytes <= shared_memory_limit(arch)
    if rows == "decode" or head_dim <= 256 or variant == "plain":
        fills_registers = arch == "sm_80" and rows != "decode" and head_dim >= 128
        known = OUTSIDE_THE_LOOP if fills_registers else KNOWN_SPILLS.get((arch, head_dim, rows, variant), 0)
        assert launch.spill_bytes <= known
        assert not fills_registers or loop_model.analyze(launch.kernel).hot.spills == 0
    if rows in (16, "prefill") and arch in ("sm_80", "sm_90"):
        assert loop_model.analyze(launch.kernel).hot.useful == 1  # no warp repeats another's matmuls
    size = 1 if constants["MANTISSA_BITS"] else 2
    assert constants["VECTOR_CACHE"] == math.gcd(16, 4 if "inline" in variant else 16, head_dim * size) // size
    if arch == "gfx942":
        assert launch.uses_mfma
    elif head_dim * size % 4 == 0:  # otherwise nothing is prefetched
        assert launch.uses_cp_async
        assert rows != "prefill" or arch != "sm_90" or launch.uses_wgmma


@pytest.mark.ci
@pytest.mark.oldest
def test_chunks_of_the_widest_heads(record_property):
    """TFLOP/s at head dimension 512 on sm_90: a floor below the values of Triton 3.6.0 and 3.9.0."""
    launch, *_ = compile_default("sm_90", 512, "prefill", "plain")
    report = loop_model.analyze(launch.kernel)
    record_property("figure", f"paged sm_90 512 prefill: lock {report.lock:.0f}, {launch.spill_bytes} B spilled")
    assert report.lock >= 240
    assert report.hot.spills == 0


@pytest.mark.oldest
@pytest.mark.parametrize("page_size", [16, 64])
def test_packed_values_are_copied_in_vectors(page_size):
    """The compiler knows which slots follow each other, in pages that a tile divides and in those that divide it."""
    copies = []
    for variant in ("contiguous", "packed"):
        launch, *_ = compile_default("sm_90", 128, "decode", variant, page_size=page_size)
        copies.append(loop_model.analyze(launch.kernel).hot.async_copies)
    assert copies[1] >= copies[0] > 0


@pytest.mark.oldest
@pytest.mark.parametrize("rows", ["decode", "prefill"])
def test_scales_of_tokens_are_copied_once(rows):
    """A thread copies one scale of keys, one of values, and one more page number for their addresses."""
    copies = {}
    for variant in ("fp8", "fp8, token"):
        launch, *_ = compile_default("sm_90", 128, rows, variant)
        copies[variant] = loop_model.analyze(launch.kernel).hot.async_copies
    assert copies["fp8"] > 0
    assert copies["fp8, token"] <= copies["fp8"] + 3


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize("variant", ["plain", "varlen", "fp8", "everything"])
@pytest.mark.parametrize("arch", ARCHS)
def test_prefix_tree(arch, variant, record_property):
    """A node of 128 beams, and the keys that each has alone, in two launches whatever the tree."""
    tree = tree_of_all(128, 4)._replace(batch=BATCH, total_q=BATCH)
    nodes, own, merge = compile_default(arch, 128, "decode", variant, prefix_tree=tree)
    assert [launch.name for launch in (nodes, own, merge)] == 2 * ["_paged_fwd_kernel"] + ["_merge_kernel"]
    for name, launch in (("nodes", nodes), ("own", own)):
        rows = launch.constexprs["BLOCK_M"]
        figure = f"paged {arch:7} {variant:10} {name:5} {rows:3} rows {launch.registers} registers"
        record_property("figure", f"{figure}, {launch.spill_bytes} B spilled")
        assert launch.spill_bytes <= (OUTSIDE_THE_LOOP if name == "nodes" else 0)
        assert loop_model.analyze(launch.kernel).hot.spills == 0 if arch in ("sm_80", "sm_90") else True
    assert nodes.constexprs["BLOCK_M"] >= 64


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize("variant", ["plain", "varlen", "fp8", "everything"])
@pytest.mark.parametrize("num_drafts", [8, 64])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tree_of_drafts(arch, num_drafts, variant, record_property):
    """Bits take registers around the loop over full tiles, and none in it: it has no drafts."""
    shape = (BATCH * num_drafts,) if variant == "varlen" else (BATCH, num_drafts)
    tree_mask = torch.empty(shape, dtype=torch.int64)
    launch, *_ = compile_default(arch, 128, num_drafts, variant, tree_mask=tree_mask)
    assert launch.constexprs["TREE"]
    figure = f"paged {arch} {variant:10} {num_drafts:2} drafts {launch.registers} registers"
    record_property("figure", f"{figure}, {launch.spill_bytes} B spilled")
    assert loop_model.analyze(launch.kernel).hot.spills == 0


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize("variant", ["plain", "varlen", "fp8", "everything", "window"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tree_of_drafts_with_a_shared_prefix(arch, variant, record_property):
    """The launch over nodes has no bits in its loops; it is the one of a call without them, but for positions."""
    num_drafts = 8
    shape = (BATCH * num_drafts,) if variant == "varlen" else (BATCH, num_drafts)
    tree = tree_of_all(128, 4)._replace(batch=BATCH, total_q=BATCH * num_drafts)
    options = dict(prefix_tree=tree, tree_mask=torch.empty(shape, dtype=torch.int64))
    nodes, own, _ = compile_default(arch, 128, num_drafts, variant, **options)
    assert [launch.constexprs["TREE"] for launch in (nodes, own)] == [False, True]
    for name, launch in (("nodes", nodes), ("own", own)):
        figure = f"paged {arch} {variant:10} {num_drafts} drafts, {name:5} {launch.registers} registers"
        record_property("figure", f"{figure}, {launch.spill_bytes} B spilled")
        assert loop_model.analyze(launch.kernel).hot.spills == 0
    assert nodes.spill_bytes <= OUTSIDE_THE_LOOP


@pytest.mark.ci(but_each=4)
@pytest.mark.oldest
@pytest.mark.parametrize("arch", ARCHS)
def test_merge(arch, record_property):
    _, launch = compile_default(arch, 128, "decode", "splits")
    assert launch.name == "_merge_kernel"
    record_property("figure", f"merge {arch:7} {launch.registers} registers, {launch.spill_bytes} B spilled")
    assert launch.spill_bytes == 0


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_other_dtypes_fit(rows, dtype):
    for head_dim in (128, 512) if rows == "decode" else (128,):
        launch, *_ = compile_default("sm_80", head_dim, rows, "plain", dtype=dtype)
        assert launch.shared_bytes <= shared_memory_limit("sm_80")


class NoReadBack(Instrument):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("variant", ["plain", "splits", "varlen"])
def test_no_device_to_host_sync(variant):
    with NoReadBack(), pytest.raises(AssertionError):
        torch.ones(1).item()  # the test can fail
    with NoReadBack():
        compile_default("sm_90", 128, "draft", variant)
        if variant != "splits":
            compile_default("sm_90", 128, "draft", variant, prefix_tree=tree_of_all(BATCH, 4, ROWS["draft"]))


@pytest.mark.oldest
def test_lengths_and_batches_compile_no_other_kernel():
    with compile_only("sm_90") as launches:
        for batch in (1, 2, 3, 16, 100):
            for max_pages in (1, 7, 64, 1000):
                q = torch.empty(batch, 1, NUM_HEADS, 128, dtype=torch.float16)
                cache = torch.empty(32, 16, NUM_HEADS_KV, 128, dtype=torch.float16)
                tables = torch.empty(batch, max_pages, dtype=torch.int32)
                seqlens = torch.empty(batch, dtype=torch.int32)
                paged_attention(q, cache, cache, seqlens, tables, num_splits=3)
    assert {launch.name for launch in launches} == {"_paged_fwd_kernel", "_merge_kernel"}
    # The stride of the splits is a multiple of 16 for any batch, that of the table is not.
    assert len({launch.kernel.hash for launch in launches if launch.name == "_merge_kernel"}) == 1
    assert len({launch.kernel.hash for launch in launches if launch.name == "_paged_fwd_kernel"}) <= 3


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("num_splits", "prefix_tree"), [(1, None), (4, None), (1, tree_of_all(BATCH, 4))], ids=["1", "4", "prefix tree"]
)
def test_host_cost(num_splits, prefix_tree, record_property):
    """The cost of a known decode step beside its bare launches with prepared arguments.

    Python calls repeat exactly; a repeated launch makes fewer than the JIT. tests/driver measures other calls, with
    Triton's launcher.
    """
    given = arguments(128, 1)
    with compile_only("sm_90", every_launch=False):

        def call():
            return paged_attention(**given, num_splits=num_splits, prefix_tree=prefix_tree)

        launches = bare_launches(call, (forward, merge))
        cost, cost_of_launches, ratio = compare(call, launches)
        extra_calls = python_calls(call) - python_calls(launches)
    figure = f"{cost:.0f} us a call of paged_attention, {num_splits} splits"
    figure += ", " if prefix_tree is None else " and a prefix tree, "
    figure += f"{cost_of_launches:.0f} us the bare launches that it makes, {extra_calls} more Python calls"
    record_property("figure", figure)
    assert extra_calls <= (39 if num_splits > 1 or prefix_tree else 33)
    assert ratio <= 1.5 * ELSEWHERE
