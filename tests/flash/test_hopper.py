"""The kernel of hopper.py: which calls it supports, and its compiled code. tests/gpu/test_hopper.py tests its
results."""

import re

import pytest
import torch
import triton
from hopper_cases import write_record

from perf.model import loop_model, sass
from triton_attn import flash_attention, flash_attention_varlen, use_tuned
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


@pytest.mark.ci(but_each=9)
@pytest.mark.full(but_each=2)
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("head_dim", "bound"), [(64, 770), (128, 940), (256, 940)])
def test_what_it_compiles_to(head_dim, bound, causal, varlen, wanted, record_property):
    """It fits, loads by TMA, spills nothing in a loop and little outside. The matmul of one tile is in flight while the
    softmax of the next one runs.
    """
    launch = launch_of(head_dim=head_dim, causal=causal, varlen=varlen, return_lse=not varlen)
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
    # Outside the loops. ptxas of newer Tritons spills more there; they have no entry that makes this kernel the
    # default.
    assert report["spills"] <= (2 if triton.__version__.startswith("3.6.") else 20)
    assert report["useful share"] == 1.0
    assert report["bound TFLOP/s"] >= bound
    # Per group and loop body: the wait for scores leaves one matmul in flight.
    loops = launch.constexprs["GROUPS"] * (2 if causal else 1)
    assert re.findall(r"pendings = (\d+)", launch.kernel.asm["ttgir"]).count("1") == loops


@pytest.mark.ci
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_exponentials_stand_before_the_wait_for_the_output(head_dim, wanted):
    """In the machine code: ptxas may wait earlier, and then nothing overlaps."""
    code = sass.disassemble(launch_of(head_dim=head_dim).kernel.asm["cubin"])
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
        {"window_size": (100, 0)},
        {"window_size": (-1, 3)},
        {"softcap": 30.0, "causal": True},
        {"alibi_slopes": torch.ones(4)},
        {"sinks": torch.ones(4)},
        {"dropout_p": 0.1, "dropout_seed": 1},
        {"head_dim": 96},
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
        "config": {"block_n": 64, "groups": 2, "num_stages": 2},
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
