"""What the emulator counts, by kernels whose sectors, wavefronts and FLOP are known."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from emulated_calls import MARKS, normal
from hand_written import kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_attn.toolchain.emulator import count_ptx, emulate
from triton_attn.toolchain.emulator.counts import kind_of

pytestmark = MARKS


def counts(body, threads=32, tensors=None, shared_bytes=8192):
    tensors = tensors or {"x": torch.zeros(2048, dtype=torch.int32)}
    return count_ptx(kernel(body, threads, tuple(tensors)), tensors, shared_bytes=shared_bytes)


# ---- global memory: (address and instruction, bytes, sectors, least sectors) of a request of 32 lanes
GLOBAL = {
    "contiguous": ("mad.wide.u32 %a0, %lane, 4, %x; ld.global.b32 %r1, [%a0];", 128, 4, 4),
    "contiguous, 8 bytes": ("mad.wide.u32 %a0, %lane, 8, %x; ld.global.v2.b32 {%r1, %r2}, [%a0];", 256, 8, 8),
    "contiguous, 16 bytes": (
        "mad.wide.u32 %a0, %lane, 16, %x; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a0];",
        512,
        16,
        16,
    ),
    "bytes": ("mad.wide.u32 %a0, %lane, 1, %x; ld.global.b8 %r1, [%a0];", 32, 1, 1),
    "16 bytes after the start of a sector": ("mad.wide.u32 %a0, %lane, 4, %x; ld.global.b32 %r1, [%a0+16];", 128, 5, 4),
    "every second element": ("mad.wide.u32 %a0, %lane, 8, %x; ld.global.b32 %r1, [%a0];", 128, 8, 4),
    "a sector for each lane": ("mad.wide.u32 %a0, %lane, 128, %x; ld.global.b32 %r1, [%a0];", 128, 32, 4),
    "in reverse": ("sub.s32 %r2, 31, %lane; mad.wide.u32 %a0, %r2, 4, %x; ld.global.b32 %r1, [%a0];", 128, 4, 4),
    "one address": ("ld.global.b32 %r1, [%x+64];", 4, 1, 1),
    "half the lanes": (
        "setp.lt.u32 %p1, %lane, 16; mad.wide.u32 %a0, %lane, 4, %x; @%p1 ld.global.b32 %r1, [%a0];",
        64,
        2,
        2,
    ),
    "stores": ("mad.wide.u32 %a0, %lane, 8, %x; st.global.b32 [%a0], %lane;", 128, 8, 4),
    "atomics": ("mad.wide.u32 %a0, %lane, 4, %x; red.global.gpu.add.u32 [%a0], %lane;", 128, 4, 4),
    "asynchronous copies": (
        "mad.wide.u32 %a0, %lane, 16, %x; shl.b32 %s, %lane, 4; add.s32 %s, %s, global_smem;"
        "cp.async.cg.shared.global [%s], [%a0], 16;",
        512,
        16,
        16,
    ),
    "asynchronous copies of which the first 8 lanes read": (
        "mad.wide.u32 %a0, %lane, 16, %x; shl.b32 %s, %lane, 4; add.s32 %s, %s, global_smem;"
        "setp.lt.u32 %p1, %lane, 8; selp.b32 %r1, 16, 0, %p1; cp.async.cg.shared.global [%s], [%a0], 16, %r1;",
        128,
        4,
        4,
    ),
}


def lines(text):
    return "\n".join(f"{part.strip()};" for part in text.split(";") if part.strip())


@pytest.mark.parametrize("name", GLOBAL)
def test_sectors_of_a_request(name):
    body, *expected = GLOBAL[name]
    total = counts(lines(body)).total()
    assert [total.bytes, total.sectors, total.least_sectors] == expected


def test_sectors_count_once_for_a_launch_and_for_each_request():
    body = """
    mad.wide.u32 %a0, %lane, 8, %x;
    ld.global.b32 %r1, [%a0];
    ld.global.b32 %r2, [%a0+4];
    mad.wide.u32 %a1, %lane, 4, %y;
    st.global.b32 [%a1], %r1;
    red.global.gpu.add.u32 [%z], %r2;
    """
    tensors = {name: torch.zeros(64, dtype=torch.int32) for name in "xyz"}
    found = counts(body, tensors=tensors)
    kinds = found.by_kind()
    assert (kinds["ld.global"].executed, kinds["ld.global"].sectors) == (2, 16)
    assert (kinds["st.global"].sectors, kinds["red.global"].sectors) == (4, 1)
    assert found.read == {"x": 256, "z": 32}
    assert found.written == {"y": 128, "z": 32}
    assert (found.bytes_read, found.bytes_written) == (288, 160)


# ---- shared memory: words from a lane to the next, words of a lane, (wavefronts, those without a conflict)
SHARED = {
    "contiguous": (1, 1, 1, 1),
    "2 lanes to a bank": (2, 1, 2, 1),
    "8 lanes to a bank": (8, 1, 8, 1),
    "32 lanes to a bank": (32, 1, 32, 1),
    "an odd stride": (33, 1, 1, 1),
    "8 bytes": (2, 2, 2, 2),
    "8 bytes, 2 lanes to a bank": (4, 2, 4, 2),
    "8 bytes, 16 lanes to a bank": (32, 2, 32, 2),
    "16 bytes": (4, 4, 4, 4),
    "16 bytes, 2 lanes to a bank": (8, 4, 8, 4),
    "16 bytes, 8 lanes to a bank": (32, 4, 32, 4),
    "16 bytes with a row's padding": (36, 4, 4, 4),
    "one word": (0, 1, 1, 1),
}


@pytest.mark.parametrize("name", SHARED)
def test_wavefronts_of_a_request(name):
    stride, words, *expected = SHARED[name]
    width, registers = {1: ("b32", "%r1"), 2: ("v2.b32", "{%r1, %r2}"), 4: ("v4.b32", "{%r1, %r2, %r3, %r4}")}[words]
    kinds = counts(
        f"""
        mul.lo.u32 %s, %lane, {4 * stride};
        add.s32 %s, %s, global_smem;
        st.shared.{width} [%s], {registers};
        bar.warp.sync 0xffffffff;
        ld.shared.{width} {registers}, [%s];
        """
    ).by_kind()
    for kind in ("st.shared", "ld.shared"):
        assert [kinds[kind].wavefronts, kinds[kind].least_wavefronts] == expected
        assert kinds[kind].sectors == 0


def test_bytes_of_one_word_are_no_conflict():
    body = "add.s32 %s, %lane, global_smem;\nst.shared.b8 [%s], %r0;"
    assert counts(body).by_kind()["st.shared"].wavefronts == 1


def test_half_of_a_warp_takes_half_of_the_phases():
    body = "setp.lt.u32 %p1, %lane, 16;\nshl.b32 %s, %lane, 4;\nadd.s32 %s, %s, global_smem;\n"
    kinds = counts(body + "@%p1 st.shared.v4.b32 [%s], {%r0, %r0, %r0, %r0};").by_kind()
    assert (kinds["st.shared"].lanes, kinds["st.shared"].wavefronts, kinds["st.shared"].least_wavefronts) == (16, 2, 2)


@pytest.mark.parametrize(("row", "wavefronts"), [(16, 1), (32, 2), (128, 8), (144, 1)])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_rows_of_a_matrix_are_served_together(matrices, row, wavefronts):
    registers = ", ".join(f"%r{i}" for i in range(1, matrices + 1))
    kinds = counts(
        f"""
        mul.lo.u32 %s, %lane, {row};
        add.s32 %s, %s, global_smem;
        st.shared.v4.b32 [%s], {{%r0, %r0, %r0, %r0}};
        ldmatrix.sync.aligned.m8n8.x{matrices}.shared.b16 {{{registers}}}, [%s];
        stmatrix.sync.aligned.m8n8.x{matrices}.shared.b16 [%s], {{{registers}}};
        """
    ).by_kind()
    for kind in ("ldmatrix", "stmatrix"):
        assert kinds[kind].wavefronts == matrices * wavefronts
        assert kinds[kind].least_wavefronts == matrices


def test_asynchronous_copies_conflict_in_shared_memory():
    body = "mad.wide.u32 %a0, %lane, 16, %x;\nshl.b32 %s, %lane, 7;\nadd.s32 %s, %s, global_smem;\n"
    copies = counts(body + "cp.async.cg.shared.global [%s], [%a0], 16;").by_kind()["cp.async"]
    assert (copies.sectors, copies.wavefronts, copies.least_wavefronts) == (16, 32, 4)


# ---- instructions and products


def test_instructions_by_kind_and_line():
    body = """
    setp.lt.u32 %p1, %tid, 40;
    @%p1 add.s32 %r1, %tid, 1;
    @!%p1 add.s32 %r1, %tid, 2;
    mad.wide.u32 %a0, %tid, 4, %x;
    st.global.b32 [%a0], %r1;
    """
    found = counts(body, threads=96)
    by_line = found.by_line()
    assert by_line["planted.py:2", "add"][:2] == (2, 40)  # warps, lanes
    assert by_line["planted.py:3", "add"][:2] == (2, 56)
    assert by_line["planted.py:5", "st.global"][:4] == (3, 96, 384, 12)
    assert found.total().executed == sum(tally.executed for tally in found.by_kind().values())


@triton.jit
def _product_kernel(a, b, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + tl.program_id(0) * BLOCK * BLOCK + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@pytest.mark.parametrize(("arch", "kind"), [("sm_80", "mma"), ("sm_90", "wgmma.mma_async")])
def test_flops_of_a_product(arch, kind):
    a, b, out = normal(64, 64), normal(64, 64), torch.empty(3, 64, 64)
    with emulate(arch, counts=True) as log:
        _product_kernel[(3,)](a, b, out, BLOCK=64)
    found = log[0].counts
    torch.testing.assert_close(out, (a.float() @ b.float()).expand(3, 64, 64), atol=1e-3, rtol=1e-3)
    assert found.total().flops == found.by_kind()[kind].flops == 3 * 2 * 64**3
    assert found.read == {"a": 8192, "b": 8192}
    assert found.written == {"out": 3 * 16384}
    total = found.total()
    assert total.sectors == total.least_sectors
    assert total.wavefronts == total.least_wavefronts


@triton.jit
def _sum_of_products_kernel(a, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(n):
        x = tl.load(a + i * BLOCK * BLOCK + at)
        total = tl.dot(x, x, total)
    tl.store(out + at, total)


def test_the_hot_loop_has_the_products_and_not_what_comes_after():
    a, out = normal(5, 32, 32), torch.empty(32, 32)
    with emulate("sm_80", counts=True) as log:
        _sum_of_products_kernel[(1,)](a, out, 5, BLOCK=32)
    found = log[0].counts
    hot = found.total(found.hot())
    assert hot.flops == found.total().flops == 5 * 2 * 32**3
    assert not any("st.global" in text for text, is_hot in zip(found.program.text, found.hot()) if is_hot)
    assert any("ldmatrix" in text for text, is_hot in zip(found.program.text, found.hot()) if is_hot)


# ---- tensor copies


@triton.jit
def _tensor_copy_kernel(x, out, row):
    out.store([0, 0], x.load([row, 0]))


@pytest.mark.parametrize(("row", "rows"), [(0, 32), (90, 10)])
def test_a_tensor_copy_reads_what_of_its_box_is_in_the_tensor(row, rows):
    x, out = normal(100, 64), torch.empty(32, 64, dtype=torch.bfloat16)
    with emulate("sm_90", counts=True) as log:
        _tensor_copy_kernel[(1,)](*(TensorDescriptor.from_tensor(t, [32, 64]) for t in (x, out)), row)
    found = log[0].counts
    torch.testing.assert_close(out[:rows], x[row : row + rows])
    copies = found.by_kind()["cp.async.bulk.tensor"]
    assert copies.executed == copies.lanes == 2  # one lane of one warp loads, one stores
    assert copies.sectors == copies.least_sectors == (rows + 32) * 4
    assert copies.bytes == (rows + 32) * 128
    assert (found.bytes_read, found.bytes_written) == (rows * 128, 32 * 128)


# ---- as an option


def test_nothing_is_counted_unless_asked_and_counting_changes_nothing():
    a, b = normal(64, 64), normal(64, 64)
    runs = []
    for options in ({}, {"counts": True}):
        out = torch.empty(64, 64)
        with emulate("sm_80", **options) as log:
            _product_kernel[(1,)](a, b, out, BLOCK=64)
        runs.append((log[0], out))
    (plain, first), (counted, second) = runs
    assert plain.counts is None
    assert torch.equal(first, second)
    np.testing.assert_array_equal(plain.executed, counted.executed)
    assert plain.instructions == counted.instructions


def test_a_second_launch_counts_its_own():
    a, b, out = normal(64, 64), normal(64, 64), torch.empty(2, 64, 64)
    with emulate("sm_80", counts=True) as log:
        for programs in (1, 2):
            _product_kernel[(programs,)](a, b, out, BLOCK=64)
    first, second = (launch.counts.total() for launch in log)
    assert second == tuple(2 * x for x in first)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("@!%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ]", "ld.global"),
        ("st.shared::cta.b32 [%r1], %r2", "st.shared"),
        ("ld.local.b32 %r1, [%rd1]", "ld.local"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16", "cp.async"),
        ("cp.async.wait_group 0", "cp.async.wait_group"),
        (
            "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2}], [%r4]",
            "cp.async.bulk.tensor",
        ),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0", "wgmma.mma_async"),
        ("mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0", "mbarrier.try_wait"),
        ("add.s32 %r1, %r2, %r3", "add"),
        ("ret", "ret"),
    ],
)
def test_kinds_of_instructions(text, kind):
    assert kind_of(text) == kind
