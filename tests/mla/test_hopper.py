"""The kernel of hopper.py: which calls it supports, and its compiled code. tests/gpu/test_mla_hopper.py tests its
results.
"""

import re
from collections import Counter

import pytest
import torch
from hopper_cases import write_record

from perf.model import loop_model, sass
from perf.model.gpus import RATES
from triton_attn import mla_decode, mla_prefill, use_tuned
from triton_attn.mla.absorbed import launch_mla_decode
from triton_attn.mla.api import DecodeCall
from triton_attn.mla.configs import MlaDecodeConfig
from triton_attn.toolchain import compile_only, shared_memory_limit

pytestmark = [pytest.mark.compiled, pytest.mark.oldest, pytest.mark.usefixtures("no_tables")]

HOPPER, PORTABLE = "_mla_decode_hopper_kernel", "_mla_absorbed_kernel"
BATCH, PAGES, NOPE, RANK, ROPE, VALUE = 4, 16, 128, 512, 64, 128


@pytest.fixture
def wanted(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "hopper")


def decode(
    arch="sm_90",
    num_heads=128,
    seqlen_q=1,
    page_size=64,
    dims=(RANK, ROPE),
    dtype=torch.bfloat16,
    is_fp8=False,
    weights=False,
    max_pages=PAGES,
    change_q=None,
    change_cache=None,
    **options,
):
    """The launches of a call."""
    rank, rope = dims
    q_nope = torch.empty(BATCH, seqlen_q, num_heads, NOPE if weights else rank, dtype=dtype)
    q_pe = torch.empty(BATCH, seqlen_q, num_heads, rope, dtype=dtype)
    cache = torch.empty(BATCH * PAGES, page_size, rank + rope, dtype=dtype)
    if is_fp8:
        cache = torch.empty(BATCH * PAGES, page_size, 656, dtype=torch.uint8)
    if change_q:
        q_nope, q_pe = change_q(q_nope), change_q(q_pe)
    if change_cache:
        cache = change_cache(cache)
    if weights:
        weight = torch.empty(num_heads, NOPE + VALUE, rank, dtype=dtype)
        options["w_uk"], options["w_uv"] = weight.split([NOPE, VALUE], dim=1)
    lengths, block_table = torch.empty(BATCH, dtype=torch.int32), torch.empty(BATCH, max_pages, dtype=torch.int32)
    with compile_only(arch) as launches:
        mla_decode(q_nope, q_pe, cache, lengths, block_table, **{"softmax_scale": 0.1, "num_splits": 4} | options)
    return launches


def kernel_of(**options):
    """The name of the attention kernel."""
    (name,) = {launch.name for launch in decode(**options)} & {HOPPER, PORTABLE}
    return name


@pytest.mark.ci(but_each=9)
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"dtype": torch.float16},
        {"num_splits": 1, "return_lse": True},
        {"weights": True},
        {"weights": True, "num_splits": 1},
        {"num_heads": 64, "page_size": 128},
        {"seqlen_q": 4},
        {"seqlen_q": 2, "causal": False},
        {"seqlen_q": 4, "key_shard": (2, 4, 1)},
        {"is_fp8": True},
        {"is_fp8": True, "seqlen_q": 4, "key_shard": (2, 4, 1)},
        {"is_fp8": True, "num_heads": 64, "page_size": 128, "weights": True},
    ],
    ids=lambda call: " ".join(map(str, call)) or "plain",
)
def test_what_it_compiles_to(call, wanted, record_property):
    """It fits, loads by TMA, spills nothing, and rescales no output before all matmuls of a step are in flight."""
    (launch,) = (launch for launch in decode(**call) if launch.name == HOPPER)
    report = loop_model.analyze(launch.kernel).row()
    record_property(
        "figure",
        f"mla hopper {' '.join(map(str, call))}: {report['registers']} registers, {report['spills']} spills, "
        f"{report['shared B']} B shared, {report['loop instructions']} instructions in the loop, bound "
        f"{report['bound TFLOP/s']:.0f} TFLOP/s",
    )
    assert launch.uses_tma
    assert launch.uses_wgmma
    assert launch.kernel.metadata.shared <= shared_memory_limit("sm_90")
    assert report["spills"] == 0
    assert report["useful share"] == 1.0
    assert report["bound TFLOP/s"] >= 940
    # In each group's loop the wait for the other's output leaves the scores in flight.
    assert re.findall(r"pendings = (\d+)", launch.kernel.asm["ttgir"]).count("1") == 2


@pytest.mark.parametrize("is_fp8", [False, True])
def test_scores_are_under_way_before_anything_is_waited_for(is_fp8, wanted):
    """In the machine code, where ptxas may wait earlier; weights come before the output that needs them."""
    launch = next(launch for launch in decode(is_fp8=is_fp8) if launch.name == HOPPER)
    loops = list(sass.disassemble(launch.kernel.asm["cubin"]).mma_loops())
    assert len(loops) == 2
    for loop in loops:
        trip = sorted(loop.always, key=lambda instruction: instruction.address)
        products, waits, exponentials = (
            [i for i, instruction in enumerate(trip) if instruction.mnemonic.startswith(name)]
            for name in ("HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2")
        )
        assert len(products) == 4 + 36 + 4
        assert len(waits) == 3
        assert products[39] < waits[0]
        assert waits[1] < products[40] < waits[2]
        assert sum(waits[1] < i < products[40] for i in exponentials) >= 32


def test_fp8_rows_are_decoded_beside_the_matmuls(wanted, record_property):
    """Once for all heads: loads and stores have 16 bytes, elements are converted in pairs and scaled one by one. The
    loop of the warps that do it and that of a group leave issue slots free while the matmuls of a tile run."""
    launch = next(launch for launch in decode(is_fp8=True) if launch.name == HOPPER)
    code = sass.disassemble(launch.kernel.asm["cubin"])
    groups = code.mma_loops()
    trip = loop_with(code, "F2FP.F16.E4M3.UNPACK_B")
    counts = Counter(instruction.mnemonic for instruction in trip)
    elements = 64 * RANK // 128  # of a tile, for a thread
    assert counts["LDG.E.128"] == elements // 16
    assert counts["STS.128"] == elements // 8
    assert counts["F2FP.F16.E4M3.UNPACK_B"] == counts["F2FP.BF16.F32.PACK_AB"] == elements // 2
    assert counts["FMUL"] == elements
    rates = RATES["sm_90"]
    loader = loop_model.unit_cycles(trip, rates)
    group, *_ = sorted((loop_model.unit_cycles(loop.always, rates) for loop in groups), key=lambda x: -x["issue"])
    busy = {unit: loader[unit] + group[unit] for unit in ("issue", "alu", "fma", "mufu")}
    record_property("figure", f"mla hopper fp8: {len(trip)} instructions decode a tile, cycles with a group {busy}")
    assert max(busy.values()) <= 0.85 * group["tensor"]
    assert loader["stall"] <= 0.85 * group["tensor"]


def loop_with(code, mnemonic):
    """Instructions of the smallest loop that has all those of a mnemonic."""
    where = [i for i, instruction in enumerate(code.instructions) if instruction.mnemonic == mnemonic]
    jumps = ((i, re.search(r"\.L_\w+", x.operands)) for i, x in enumerate(code.instructions) if x.opcode == "BRA")
    loops = [(code.labels[to.group()], i + 1) for i, to in jumps if to]
    start, end = min((x for x in loops if x[0] <= where[0] and where[-1] < x[1]), key=lambda x: x[1] - x[0])
    return code.instructions[start:end]


@pytest.mark.full(but_each=2)
@pytest.mark.ci(but_each=5)
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("page_size", [64, 128, 192])
@pytest.mark.parametrize("num_heads", [64, 128, 192])
def test_which_calls_it_supports(num_heads, page_size, is_fp8, wanted):
    def one_layer(cache):
        return torch.empty(cache.shape[0], 3, *cache.shape[1:], dtype=cache.dtype)[:, 1]

    call = {"num_heads": num_heads, "page_size": page_size, "is_fp8": is_fp8}
    assert kernel_of(**call) == HOPPER
    assert kernel_of(**call, change_cache=one_layer) == HOPPER
    assert kernel_of(**call, change_q=lambda q: torch.empty_like(q.transpose(1, 2)).transpose(1, 2)) == HOPPER


@pytest.mark.full(but_each=2)
@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize(
    "call",
    [
        {"num_heads": 16},
        {"num_heads": 96},
        {"num_heads": 16, "seqlen_q": 4},
        {"page_size": 32},
        {"page_size": 96},
        {"dims": (256, 64)},
        {"dims": (512, 32)},
        {"is_fp8": True, "dtype": torch.float16},  # rotary keys are bf16
        {"is_fp8": True, "num_heads": 96},
        {"is_fp8": True, "change_cache": lambda c: torch.empty(*c.shape[:2], 672, dtype=c.dtype)[..., 4:660]},
        {"is_fp8": True, "change_cache": lambda c: torch.empty(*c.shape[:2], 660, dtype=c.dtype)[..., :656]},
        {"change_cache": lambda c: c.to(torch.float8_e4m3fn)},
        {"dtype": torch.float32},
        {"max_pages": 0},
        {"arch": "sm_80"},
        {"arch": "sm_100"},
        {"change_q": lambda q: torch.nn.functional.pad(q, (1, 7))[..., 1:-7]},  # no TMA
        {"change_q": lambda q: q[:1].expand(BATCH, -1, -1, -1)},
        {"change_cache": lambda c: torch.empty(*c.shape[:2], c.shape[2] + 4, dtype=c.dtype)[..., :-4]},
        {"change_cache": lambda c: torch.empty(*c.shape[:2], c.shape[2] + 8, dtype=c.dtype)[..., 4:-4]},
    ],
    ids=lambda call: " ".join(call),
)
def test_all_else_is_the_portable_kernels(call, wanted):
    assert kernel_of(**call) == PORTABLE


@pytest.mark.ci
def test_a_config_is_the_portable_kernels(wanted):
    q, cache = torch.empty(1, 1, 128, 576, dtype=torch.bfloat16), torch.empty(4, 64, 576, dtype=torch.bfloat16)
    table = torch.empty(1, 4, dtype=torch.int32)
    parts, config = q.split([RANK, ROPE], dim=3), MlaDecodeConfig(64, 64, 8, 2)
    with compile_only("sm_90") as launches:
        launch_mla_decode(
            DecodeCall(*parts, cache, table[:, 0], table, 0.1, num_splits=1), torch.empty_like(parts[0]), None, config
        )
    assert [launch.name for launch in launches] == [PORTABLE]


@pytest.mark.ci
def test_prefill_is_the_portable_kernels(wanted):
    shapes = (1, 128, 64, NOPE), (1, 128, 64, ROPE), (1, 128, RANK), (1, 128, ROPE), (64, NOPE, RANK), (64, VALUE, RANK)
    with compile_only("sm_90") as launches:
        mla_prefill(*(torch.empty(shape, dtype=torch.bfloat16) for shape in shapes), mode="absorbed")
    assert HOPPER not in {launch.name for launch in launches}


@pytest.mark.ci
@pytest.mark.parametrize(
    "call",
    [{"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "is_fp8": True}],
    ids=lambda call: " ".join(map(str, call.values())),
)
def test_a_tuned_table_makes_it_the_default(call, tmp_path, monkeypatch):
    """By an entry for the dtypes of queries and cache. TRITON_ATTN_KERNELS=portable takes precedence."""
    assert kernel_of(**call) == PORTABLE
    dtype, is_fp8 = call["dtype"], call.get("is_fp8", False)
    cache_dtype = torch.float8_e4m3fn if is_fp8 else dtype
    path = write_record(
        tmp_path / "sm_90.json",
        family="mla_hopper",
        dtype=str(dtype).removeprefix("torch."),
        case={
            "kv_lora_rank": RANK,
            "qk_rope_head_dim": ROPE,
            "cache_dtype": str(cache_dtype).removeprefix("torch."),
        },
        buckets={"seqlen_k": 8192, "rows": 128},
        config={"num_stages": 2},
    )
    use_tuned(path)
    assert kernel_of(**call) == HOPPER
    assert kernel_of(**call, weights=True) == HOPPER
    others = [torch.float16, torch.bfloat16]
    others.remove(dtype)
    assert kernel_of(dtype=others[0]) == PORTABLE
    assert kernel_of(dtype=torch.bfloat16, is_fp8=not is_fp8) == PORTABLE
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "portable")
    assert kernel_of(**call) == PORTABLE


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "fast")
    with pytest.raises(ValueError, match="TRITON_ATTN_KERNELS: expected auto, hopper or portable, got fast"):
        decode()
