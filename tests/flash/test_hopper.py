"""The kernel of hopper.py: which calls it supports, and its compiled code. tests/gpu/test_hopper.py tests its
results."""

import re

import hopper_cases
import pytest
import torch
import triton
from hopper_cases import write_record

from perf.model import loop_model, sass
from triton_attn import flash_attention, flash_attention_varlen, use_tuned
from triton_attn.flash import hopper
from triton_attn.flash.configs import HOPPER_HEAD_DIMS
from triton_attn.toolchain import compile_only, shared_memory_limit

pytestmark = [pytest.mark.compiled, pytest.mark.oldest, pytest.mark.usefixtures("no_tables")]

HOPPER, PORTABLE = "_flash_fwd_hopper_kernel", "_flash_fwd_kernel"


@pytest.fixture
def wanted(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "hopper")


def launch_of(arch="sm_90", head_dim=128, dtype=torch.bfloat16, varlen=False, head_dim_v=None, change=None, **options):
    """The one launch of a call of 4 query heads and 2 KV heads."""
    q, k = (torch.empty(2, 256, heads, head_dim, dtype=dtype) for heads in (4, 2))
    v = torch.empty(2, 256, 2, head_dim_v or head_dim, dtype=dtype)
    if change:
        q, k, v = change(q), change(k), change(v)
    with compile_only(arch) as launches:
        if varlen:
            cu_seqlens = torch.tensor([0, 200, 512], dtype=torch.int32)
            packed = [x.flatten(0, 1) for x in (q, k, v)]
            flash_attention_varlen(*packed, cu_seqlens, cu_seqlens, 312, 312, **options)
        else:
            flash_attention(q, k, v, **options)
    (launch,) = launches
    return launch


SLOPES, SINKS = torch.ones(4), torch.ones(4)
# Options besides causal: how many loop bodies they make, and bounds of head dim 64 and of the others with them. With
# softcap three exponentials and reciprocals stand for one exponential.
OPTIONS = {
    "plain": ({}, 0, 850, 940),
    "window": ({"window_size": (100, -1)}, 1, 850, 940),
    "sinks": ({"sinks": SINKS}, 0, 850, 940),
    "softcap": ({"softcap": 30.0}, 0, 290, 460),
    "ALiBi": ({"alibi_slopes": SLOPES}, 0, 750, 940),
    "all": ({"window_size": (100, -1), "sinks": SINKS, "softcap": 30.0, "alibi_slopes": SLOPES}, 1, 290, 460),
}


@pytest.mark.ci(but_each=9)
@pytest.mark.full(but_each=7)
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head_dim", HOPPER_HEAD_DIMS)
def test_what_it_compiles_to(head_dim, options, causal, varlen, wanted, record_property):
    """It fits, loads by TMA, spills nothing in a loop and little outside. The matmul of one tile is in flight while the
    softmax of the next one runs.
    """
    options, bodies, *bounds = OPTIONS[options]
    head_dim_v = HOPPER_HEAD_DIMS[head_dim]
    launch = launch_of(
        head_dim=head_dim, head_dim_v=head_dim_v, causal=causal, varlen=varlen, return_lse=not varlen, **options
    )
    assert launch.name == HOPPER
    report = loop_model.analyze(launch.kernel).row()
    record_property(
        "figure",
        f"hopper {head_dim} {'causal' if causal else 'full'}{' varlen' if varlen else ''}: {report['registers']} "
        f"registers, {report['spills']} spills, {report['shared B']} B shared, {report['loop instructions']} "
        f"instructions in the loop, bound {report['bound TFLOP/s']:.0f} TFLOP/s",
    )
    assert launch.uses_tma
    assert launch.uses_wgmma
    assert launch.kernel.metadata.shared <= shared_memory_limit("sm_90")
    assert report["spills in loop"] == 0
    # Outside the loops. ptxas of newer Tritons spills more there, with causal the number of the thread; they have no
    # entry that makes this kernel the default.
    few, more = (
        10 if options else 4 if causal and head_dim == 192 else 0,
        32 if options or head_dim == 256 else 14 if causal else 0,
    )
    assert report["spills"] <= (few if triton.__version__.startswith("3.6.") else more)
    assert report["useful share"] == 1.0
    assert report["bound TFLOP/s"] >= bounds[head_dim > 64]
    # Per group and loop body: the wait for scores leaves the matmuls of the output in flight, one for each piece.
    loops = launch.constexprs["GROUPS"] * (1 + causal + bodies)
    pieces = "2" if head_dim_v == 96 else "1"
    assert re.findall(r"pendings = (\d+)", launch.kernel.asm["ttgir"]).count(pieces) == loops


@pytest.mark.ci
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_instructions_beside_the_matmuls(causal, wanted):
    """Of a trip over a full tile at head dim 128. Without `lazy` there are 464 on Triton 3.6.0."""
    model = loop_model.analyze(launch_of(causal=causal).kernel).hot
    assert model.instructions - model.mma_instructions <= 457


@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_a_program_of_several_tiles(head_dim, causal, varlen, wanted):
    """The loop over keys is as good as with one tile, and queries have a buffer beside that of results."""
    with hopper_cases.several_tiles(2):
        launch = launch_of(head_dim=head_dim, causal=causal, varlen=varlen)
    model = loop_model.analyze(launch.kernel)
    report = model.row()
    tiles = -(-(312 if varlen else 256) // (64 * launch.constexprs["GROUPS"]))
    assert launch.grid[0] == 2 * 4 * -(-tiles // 2)
    assert launch.kernel.metadata.shared <= shared_memory_limit("sm_90")
    assert report["spills in loop"] == 0
    assert report["spills"] <= 32
    assert report["bound TFLOP/s"] >= (850 if head_dim == 64 else 940)
    if head_dim == 128:
        assert model.hot.instructions - model.hot.mma_instructions <= 457


@pytest.mark.parametrize(
    ("most", "num_tiles", "num_heads", "tiles"),
    [
        (4, 8, 256, 4),  # 512 programs in 3.9 waves
        (8, 8, 256, 8),  # 256 in 1.9
        (2, 8, 16, 1),  # 64 programs leave half of the SMs idle
        (4, 8, 64, 4),  # 128 in one wave
        (4, 8, 48, 1),  # 96 and 192: 0.7 and 1.5 waves
        (4, 2, 660, 2),
        (1, 8, 256, 1),
        (4, 1, 10_000, 1),
        (4, 0, 0, 1),
    ],
)
def test_programs_have_several_tiles_where_they_fill_the_gpu(most, num_tiles, num_heads, tiles):
    assert hopper._tiles_per_program(most, num_tiles, num_heads, 132) == tiles


@pytest.mark.ci
@pytest.mark.parametrize("options", [{}, {"window_size": (100, 0), "alibi_slopes": SLOPES}], ids=["plain", "options"])
@pytest.mark.parametrize("head_dim", HOPPER_HEAD_DIMS)
def test_exponentials_stand_before_the_wait_for_the_output(head_dim, options, wanted):
    """In the machine code: ptxas may wait earlier, and then nothing overlaps."""
    launch = launch_of(head_dim=head_dim, head_dim_v=HOPPER_HEAD_DIMS[head_dim], **options)
    code = sass.disassemble(launch.kernel.asm["cubin"])
    for loop in code.mma_loops():
        trip = sorted(loop.always, key=lambda instruction: instruction.address)
        products, waits, exponentials = (
            [i for i, instruction in enumerate(trip) if instruction.mnemonic.startswith(name)]
            for name in ("HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2")
        )
        assert len(waits) == 2
        assert max(products) < waits[0]
        assert exponentials
        assert all(waits[0] < i < waits[1] for i in exponentials)


@pytest.mark.full(but_each=2)
@pytest.mark.ci
@pytest.mark.parametrize(
    "call",
    [
        {"dropout_p": 0.1, "dropout_seed": 1},
        {"head_dim": 80},
        {"head_dim": 192},
        {"head_dim": 128, "head_dim_v": 64},
        {"dtype": torch.float32},
        {"arch": "sm_80"},
        {"arch": "sm_100"},
        {"change": lambda x: torch.empty(2, 256, x.shape[2], 129, dtype=x.dtype)[..., 1:]},  # no TMA
        {"change": lambda x: x[:, :1].expand(-1, 256, -1, -1)},
    ],
    ids=lambda call: " ".join(call),
)
def test_all_else_is_the_portable_kernels(call, wanted):
    assert launch_of(**call).name == PORTABLE


def record(path, **changes):
    """A table with one entry of the kernel, as a sweep writes it."""
    entry = {
        "family": "flash_hopper",
        "dtype": "bfloat16",
        "case": {"head_dim": 128, "causal": False},
        "buckets": {"seqlen_k": 4096},
        "config": {"block_n": 64, "groups": 2, "num_stages": 2, "lazy": True, "tiles": 1},
    }
    return write_record(path, **entry | changes)


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_tuned_table_makes_it_the_default(dtype, tmp_path, monkeypatch):
    """By an entry for the dtype, head dim and mask. TRITON_ATTN_KERNELS=portable takes precedence."""
    assert launch_of(dtype=dtype).name == PORTABLE
    use_tuned(record(tmp_path / "sm_90.json", dtype=str(dtype).removeprefix("torch.")))
    launch = launch_of(dtype=dtype)
    assert launch.name == HOPPER
    assert launch.constexprs["BLOCK_N"] == 64
    assert launch_of(dtype=dtype, causal=True).name == PORTABLE
    for option in ({"window_size": (100, -1)}, {"softcap": 30.0}, {"alibi_slopes": SLOPES}, {"sinks": SINKS}):
        assert launch_of(dtype=dtype, **option).name == PORTABLE, "it was not measured with options"
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "portable")
    assert launch_of(dtype=dtype).name == PORTABLE


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({"portable": 600.1}, PORTABLE),
        ({"portable": 600}, HOPPER),
        ({"source": "predicted"}, PORTABLE),  # it has not run
        ({"kernel": "0123456789abcdef"}, PORTABLE),
    ],
    ids=["slower", "as fast", "predicted", "of other code"],
)
def test_a_record_is_of_this_code_and_does_not_find_the_portable_kernel_faster(changes, kernel, tmp_path, monkeypatch):
    """The entry has the best config of its kernel all the same."""
    use_tuned(record(tmp_path / "sm_90.json", **changes))
    assert launch_of().name == kernel
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "hopper")
    assert launch_of().constexprs["BLOCK_N"] == 64


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "fast")
    with pytest.raises(ValueError, match="TRITON_ATTN_KERNELS: expected auto, hopper or portable, got fast"):
        launch_of()
