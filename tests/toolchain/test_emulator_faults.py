"""A kernel for each fault that the emulator names, written by hand so that it has this one and no other."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hand_written import kernel

from triton_attn.toolchain import EmulationError, compilation, compile_only, emulate
from triton_attn.toolchain.emulator import SCHEDULES, core, run_ptx

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C++ compiler"),
]


def faults(body, shared_bytes=1024, threads=64, tensors=None, **options):
    tensors = tensors or {"x": torch.arange(64, dtype=torch.int32)}
    return run_ptx(kernel(body, threads, tuple(tensors)), tensors, shared_bytes=shared_bytes, **options)


BARRIER = "bar.sync 0;"
ORDERED = f"""
st.shared.b32 [%s], %tid;
{BARRIER}
ld.shared.b32 %r1, [%next];
mad.wide.u32 %a0, %tid, 4, %x;
st.global.b32 [%a0], %r1;
"""
COPY = """
mad.wide.u32 %a0, %tid, 4, %x;
cp.async.ca.shared.global [%s], [%a0], 4;
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared.b32 %r1, [%s];
add.s32 %r2, %r1, 1;
"""
MBARRIER = """
@%leader mbarrier.init.shared::cta.b64 [global_smem+512], 1;
bar.sync 0;
st.shared.b32 [%s], %tid;
bar.sync 0;
@%leader mbarrier.arrive.shared::cta.b64 _, [global_smem+512], 1;
wait: mbarrier.try_wait.parity.shared::cta.b64 %p0, [global_smem+512], 0;
@!%p0 bra wait;
ld.shared.b32 %r1, [%next];
"""

# name: (kind, line of planted.py, PTX)
FAULTS = {
    "global memory out of bounds": (1, "ld.global.b32 %r1, [%x+256];"),
    "shared memory out of bounds": (1, "st.shared.b32 [%s+1000], %r0;"),
    "misaligned access": (1, "ld.global.b32 %r1, [%x+2];"),
    "use of shared memory that nobody has written": (2, "ld.shared.b32 %r1, [%s];\nadd.s32 %r2, %r1, 1;"),
    "access to shared memory that an asynchronous copy has not finished with": (
        4,
        COPY.strip().replace("cp.async.wait_group 0;\n", ""),
    ),
    "race: read after write": (2, ORDERED.strip().replace(BARRIER + "\n", "")),
    "race: write after read": (
        4,
        f"st.shared.b32 [%s], %tid;\n{BARRIER}\nld.shared.b32 %r1, [%next];\nst.shared.b32 [%s], %r0;",
    ),
    "race: write after write": (1, "st.shared.b32 [global_smem], %tid;"),
    "misused barrier": (1, "bar.sync 0, 48;"),
    "lanes diverge at an aligned instruction": (1, "@%leader bar.sync 0, 32;"),
    "deadlock": (1, "@%first bar.sync 0;"),
    "trap": (1, "trap;"),
    "wrong number of transaction bytes": (
        4,
        "@%leader mbarrier.init.shared::cta.b64 [global_smem+512], 1;\nbar.sync 0;\n"
        "@%leader mbarrier.arrive.expect_tx.shared::cta.b64 _, [global_smem+512], 16;\n"
        "wait: mbarrier.try_wait.parity.shared::cta.b64 %p0, [global_smem+512], 0;\n@!%p0 bra wait;",
    ),
}  # fmt: skip


# Of a fault between two accesses the line of the other one.
AGAINST = {
    "access to shared memory that an asynchronous copy has not finished with": 2,
    "race: read after write": 1,
    "race: write after read": 3,
    "race: write after write": 1,
    "wrong number of transaction bytes": 1,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", FAULTS)
def test_planted_fault(kind, schedule):
    line, body = FAULTS[kind]
    found = faults(body, schedule=schedule)
    assert kind in [fault.kind for fault in found], found
    fault = next(fault for fault in found if fault.kind == kind)
    assert fault.where == f"planted.py:{line}", fault
    assert fault.kernel == "planted"
    assert fault.program == (0, 0, 0)
    assert kind not in AGAINST or fault.other == f"planted.py:{AGAINST[kind]}", fault


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("body", [ORDERED, COPY, MBARRIER], ids=["barrier", "cp.async", "mbarrier"])
def test_correct_kernels_have_none(body, schedule):
    assert not faults(body, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wait_counts_groups_of_copies(schedule):
    """One group may be under way: without its own commit the first copy is in the second group."""
    copy, second = "cp.async.ca.shared.global [%s], [%a0], 4;", "cp.async.ca.shared.global [%s+512], [%a0], 4;"
    commit = "cp.async.commit_group;"
    body = COPY.replace(commit, f"{commit}\n{second}\n{commit}").replace("wait_group 0", "wait_group 1")
    assert not faults(body, schedule=schedule)
    (fault,) = faults(body.replace(f"{copy}\n{commit}", copy), schedule=schedule)
    assert fault.kind == "access to shared memory that an asynchronous copy has not finished with"


# ---- lanes of a warp run in lock step here, but nothing says that they do

NEIGHBOUR = "xor.b32 %next, %s, 4;\n"  # what the lane beside it has
WRITES, READS = "st.shared.b32 [%s], %tid;\n", "ld.shared.b32 %r1, [%next];\n"
WARP_SYNC = "bar.warp.sync 0xffffffff;\n"


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("race: read after write", WRITES, READS),
        ("race: write after read", WRITES + WARP_SYNC + READS, "st.shared.b32 [%s], %r0;\n"),
        ("race: write after write", WRITES, "st.shared.b32 [%next], %r0;\n"),
        ("race: read after write", COPY.partition("ld.shared")[0].lstrip(), READS),
    ],
)
def test_lanes_of_a_warp(kind, before, after):
    (fault,) = faults(NEIGHBOUR + before + after, threads=32)
    assert fault.kind == kind
    assert "by lane 1 of the same warp" in fault.detail
    assert fault.lane == 0
    for ordered in (WARP_SYNC, "bar.sync 0;\n"):
        assert not faults(NEIGHBOUR + before + ordered + after, threads=32)
    for unordered in (  # they wait for each other without an order of their accesses, or do not wait
        "vote.sync.any.pred %p1, %p0, 0xffffffff;\n",
        "shfl.sync.bfly.b32 %r2, %r0, 1, 31, 0xffffffff;\n",
        "membar.cta;\n",
        "bar.arrive 1, 64;\n",
    ):
        assert [fault.kind for fault in faults(NEIGHBOUR + before + unordered + after, threads=32)] == [kind]


def test_lanes_that_store_to_one_address():
    """As those of a layout with replicas do: in one instruction any may come last. The values need not be equal: of a
    sum of products each lane has contracted another product."""
    store, load = "st.shared.b32 [global_smem], {};\n", "ld.shared.b32 %r1, [global_smem];\n"
    assert not faults(store.format("%r0") + load, threads=32)
    assert not faults(store.format("%tid") + WARP_SYNC + load, threads=32)
    (fault,) = faults("setp.lt.u32 %p0, %tid, 16;\n@%p0 " + store.format("%tid") + store.format("%r0"), threads=32)
    assert (fault.kind, fault.where) == ("race: write after write", "planted.py:3")
    half = "setp.lt.u32 %p0, %tid, 16;\n@%p0 "
    (fault,) = faults(half + store.format("%r0") + load, threads=32)
    assert (fault.kind, fault.lane) == ("race: read after write", 16)


def test_bytes_of_a_word_are_each_a_lanes_own():
    own = "add.s32 %s, %tid, global_smem;\nst.shared.b8 [%s], %tid;\n"
    load, store = "ld.shared.b8 %r1, [%s];\n", "st.shared.b8 [%s], %r0;\n"
    assert not faults(own + load + store, threads=32)
    (fault,) = faults(own + WARP_SYNC + load.replace("%s", "%s+1") + store, threads=31 + 1)
    assert fault.kind == "race: write after read"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lanes_that_signal(schedule):
    """An arrival says what its own lane did, and what others did of which that lane knows."""

    def run(count, store, arrive, load, threads):
        init = f"@%leader mbarrier.init.shared::cta.b64 [global_smem+512], {count};\nbar.sync 0;\n"
        wait = "".join(MBARRIER.partition("wait:")[1:]).rpartition("ld.shared")[0]
        body = init + store + f"{arrive}mbarrier.arrive.shared::cta.b64 _, [global_smem+512], 1;\n" + wait + load
        return [(f.kind, f.where) for f in faults(body, threads=threads, schedule=schedule)]

    # Within a warp: all arrive, or one does.
    assert not run(32, NEIGHBOUR + WRITES, "", READS, 32)
    assert run(1, NEIGHBOUR + WRITES, "@%leader ", READS, 32) == [("race: read after write", "planted.py:8")]
    # For another warp.
    store, load = "@%first " + WRITES, "@%second " + READS
    assert run(1, store, "@%leader ", load, 64) == [("race: read after write", "planted.py:7")]
    assert not run(1, store + WARP_SYNC, "@%leader ", load, 64)
    assert not run(32, store, "@%first ", load, 64)
    assert not run(1, "@%leader " + WRITES, "@%leader ", "setp.eq.u32 %p1, %tid, 32;\n@%p1 " + READS, 64)


def test_part_of_a_warp_cannot_wait_alone():
    (fault,) = faults("setp.lt.u32 %p0, %lane, 16;\n@%p0 bar.warp.sync 0xffff;", threads=32)
    assert fault.kind == "not supported"
    (fault,) = faults("setp.lt.u32 %p0, %lane, 16;\n@%p0 bar.warp.sync 0xffffffff;", threads=32)
    assert fault.kind == "lanes diverge at an aligned instruction"


def test_what_was_computed():
    x = torch.zeros(64, dtype=torch.int32)
    faults(ORDERED, tensors={"x": x})
    assert x.tolist() == [i ^ 32 for i in range(64)]


def test_a_conversion_takes_the_low_half_of_a_wider_register():
    x = torch.zeros(64, dtype=torch.int64)
    body = f"mov.b64 %a0, {5 - 2**32};\ncvt.s64.s32 %a1, %a0;\nst.global.b64 [%x], %a1;"
    assert not faults(body, tensors={"x": x}, threads=32)
    assert x[0] == 5


def test_the_limit_stops_an_endless_loop():
    (fault,) = faults("again: bra again;", limit=1000)
    assert fault.kind == "too many instructions"


BY_ONE_THREAD = {  # of PTX: (kind, tensor, index, words of the detail)
    "ld.global.b32 %r1, [%x+384];": ("global memory out of bounds", "x", None, "4 bytes at element offset 96, shape="),
    "ld.global.b32 %r1, [%x+64];": ("global memory out of bounds", "x", None, "of a view at element offset 16, shape="),
    "ld.global.b32 %r1, [%x+2];": ("misaligned access", "x", (0, 0), "4 bytes"),
    "atom.global.add.u32 %r1, [%x+102], 1;": ("misaligned access", "x", (1, 1), "4 bytes"),
    "st.global.b32 [%fixed+8], %r0;": ("write to read-only memory", "fixed", (2,), "4 bytes"),
    "st.shared.b32 [%s+1000], %r0;": ("shared memory out of bounds", None, None, "at shared address 1148 of 1024"),
    "ld.shared.b32 %r1, [%s+2];": ("misaligned access", None, None, "shared address 150 is no multiple of 4"),
    "mbarrier.arrive.shared::cta.b64 _, [global_smem+8];": (
        "misused barrier", None, None, "no mbarrier is initialized at shared address 8",
    ),
    "cp.async.ca.shared.global [%s], [%x+2], 4;": ("misaligned access", "x", (0, 0), "4 bytes"),
    "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%fixed, {%r1}], [%r1];": (
        "misused tensor map", "fixed", (0,), "no tensor map there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("instruction", BY_ONE_THREAD)
def test_a_report_names_program_warp_and_lane_tensor_and_index(instruction):
    """The fault is that of one thread of one program; x is a view of rows of 24 elements."""
    kind, tensor, index, detail = BY_ONE_THREAD[instruction]
    x, fixed = torch.zeros(4, 24, dtype=torch.int32)[:, :16], torch.zeros(64, dtype=torch.int32)
    body = f"""
    setp.eq.u32 %p0, %tid, 37;
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
    mad.lo.s32 %r1, %r2, 10, %r1; mad.lo.s32 %r1, %r3, 100, %r1;
    setp.eq.and.u32 %p0, %r1, 21, %p0;
    mov.b32 %r1, global_smem;
    @%p0 {instruction}
    """
    (fault,) = faults(body, tensors={"x": x, "fixed": fixed}, grid=(2, 3, 1), read_only=[fixed])
    assert (fault.kind, fault.where, fault.kernel) == (kind, "planted.py:6", "planted")
    assert (fault.program, fault.warp, fault.lane) == ((1, 2, 0), 1, 5)
    assert (fault.tensor, fault.index) == (tensor, index)
    assert detail in fault.detail
    assert str(fault).startswith(f"planted.py:6: {kind}")


INIT = "@%leader mbarrier.init.shared::cta.b64 [global_smem+512], 1;\nbar.sync 0;\n"
STORED = "st.shared.b32 [%s], %tid;\nfence.proxy.async.shared::cta;\nbar.sync 0;\nmov.b32 %r1, global_smem;\n"
MAP = """
@%leader tensormap.replace.tile.global_address.global.b1024.b64 [%map], %x;
@%leader tensormap.replace.tile.rank.global.b1024.b32 [%map], 0;
@%leader tensormap.replace.tile.elemtype.global.b1024.b32 [%map], 3;
@%leader tensormap.replace.tile.box_dim.global.b1024.b32 [%map], 0, 16;
@%leader tensormap.replace.tile.global_dim.global.b1024.b32 [%map], 0, 64;
bar.sync 0;
"""
LOAD = "@%leader cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%map, {0}], [%r2];"
STORE = "@%leader cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%map, {0}], [%r1];\n"
OTHER_FAULTS = {  # (kind, words of the detail, PTX); the last line is at fault
    "initialized twice": ("misused barrier", "is initialized again", INIT + INIT.splitlines()[0]),
    "more arrivals": (
        "misused barrier", "more arrivals than the 1",
        INIT + "@%leader mbarrier.arrive.shared::cta.b64 _, [global_smem+512], 2;",
    ),
    "ended in a phase": (
        "misused barrier", "ends with 0 arrivals and 16 bytes outstanding",
        INIT + "@%leader mbarrier.arrive.expect_tx.shared::cta.b64 _, [global_smem+512], 16;\n"
        "@%leader mbarrier.inval.shared::cta.b64 [global_smem+512];",
    ),
    "no such barrier": ("misused barrier", "barrier 16 of 64 threads", "bar.sync 16;"),
    "rank": (
        "misused tensor map", "2 coordinates for a tensor of 1 dimensions",
        MAP + INIT + "mov.b32 %r1, global_smem;\n" + LOAD.replace("1d", "2d").replace("{0}", "{0, 0}"),
    ),
    "store in flight at the end": (
        "access to shared memory that an asynchronous copy has not finished with", "ends before it has waited",
        MAP + STORED + STORE.strip(),
    ),
    "load in flight at the end": (
        "access to shared memory that an asynchronous copy has not finished with", "ends before the copy",
        MAP + INIT + "mov.b32 %r1, global_smem;\nadd.s32 %r2, %r1, 512;\n" + LOAD,
    ),
    "store of unwritten": (
        "use of shared memory that nobody has written", "shared address 0",
        MAP + "mov.b32 %r1, global_smem;\n" + STORE + "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;",
    ),
    "store without a fence": (
        "read by the async proxy without a proxy fence", "written by warp",
        MAP + STORED.replace("fence.proxy.async.shared::cta;\n", "") + STORE
        + "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;",
    ),
    "source overwritten": (
        "overwritten under an asynchronous operation that reads it", "shared address 0",
        MAP + STORED + STORE
        + "@%leader st.shared.b32 [%s], %r0;\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FAULTS)
def test_other_forms_of_faults(name):
    kind, detail, body = OTHER_FAULTS[name]
    buffer = torch.zeros(192, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    tensors = {"x": torch.arange(64, dtype=torch.int32), "map": buffer[start : start + 128]}
    found = faults(body, tensors=tensors, schedule="late")
    assert [f.kind for f in found if detail in f.detail] == [kind], found
    lines = body.strip().splitlines()
    fault = next(f for f in found if detail in f.detail)
    at_fault = fault.where.removeprefix("planted.py:")
    assert fault.instruction in lines[int(at_fault) - 1]


def test_a_deadlock_says_who_waits_for_what():
    body = """
    @%leader mbarrier.init.shared::cta.b64 [global_smem+512], 2;
    bar.sync 0;
    @%first bar.sync 1;
    wait: mbarrier.try_wait.parity.shared::cta.b64 %p0, [global_smem+512], 0;
    @!%p0 bra wait;
    """
    found = faults(body)
    assert {(f.kind, f.warp, f.where) for f in found} == {
        ("deadlock", 0, "planted.py:3"),
        ("deadlock", 1, "planted.py:4"),
    }
    details = {f.warp: f.detail for f in found}
    assert details[0] == "waits at barrier 1, where 32 of 64 threads are"
    assert details[1].startswith(
        "waits for the phase of parity 0 of the mbarrier at shared address 512: phase 0 lacks 2 "
    )


def test_every_kind_of_fault_is_planted():
    text = "".join((Path(__file__).parent / f"test_emulator_{name}.py").read_text() for name in ("faults", "warps"))
    assert [kind for kind in core.FAULTS if f'"{kind}"' not in text] == []


def test_inline_assembly_is_at_the_line_of_its_statement():
    """LLVM gives each line of its text one of its own, from there on."""
    body = """
    mov.b32 %r1, 0;
    // begin inline asm
    {
    .reg .b32 own;
    ld.global.b32 own, [%x+256];
    }
    // end inline asm
    """
    (fault,) = faults(body)
    assert fault.where == "planted.py:2"


def test_unwritten_bytes_may_be_copied():
    """A structure with padding is stored in parts, loaded whole, and only its parts are used."""
    body = """
    st.shared.b16 [%s], 5;
    ld.shared.b32 %r1, [%s];
    mov.b32 %r2, %r1;
    st.shared.b32 [%s+512], %r2;
    ld.shared.b16 %r3, [%s+512];
    add.s32 %r4, %r3, 1;
    """
    assert not faults(body, schedule="late")
    assert [f.kind for f in faults(body + "ld.shared.b32 %r3, [%s+512];\nadd.s32 %r4, %r3, 1;")] == [
        "use of shared memory that nobody has written"
    ]


@pytest.mark.parametrize("atomic", [False, True])
def test_programs_that_write_one_element(atomic):
    body = "red.global.gpu.relaxed.add.u32 [%x], 1;" if atomic else "st.global.b32 [%x], %r0;"
    found = faults(body, threads=32, grid=(2, 1, 1))
    assert [f.kind for f in found] == ([] if atomic else ["race between programs"])
    assert all((f.program, f.tensor, f.index) == ((1, 0, 0), "x", (0,)) for f in found)
    assert all(f.where == f.other == "planted.py:1" for f in found)


def test_a_program_that_reads_what_another_writes():
    body = """
    mov.u32 %r1, %ctaid.x;
    setp.eq.u32 %p0, %r1, 0;
    @%p0 st.global.b32 [%x], 1;
    @!%p0 ld.global.b32 %r2, [%x];
    """
    (fault,) = faults(body, threads=32, grid=(2, 1, 1))
    assert (fault.kind, fault.where) == ("race between programs", "planted.py:4")
    released = body.replace("@!%p0 ld", "atom.global.gpu.acq_rel.add.u32 %r3, [%x+4], 1;\n@!%p0 ld")
    assert not faults(released, threads=32, grid=(2, 1, 1))


FENCE = "membar.gl;\n"
STORE_FLAG, LOAD_FLAG = "st.{}.global.b32 [%x+4], 1;\n", "ld.{}.global.b32 %r3, [%x+4];\n"
RACE = "race between programs"


@pytest.mark.parametrize(
    ("store", "load", "races"),
    [
        pytest.param(STORE_FLAG.format("release.gpu"), LOAD_FLAG.format("acquire.gpu"), [], id="both"),
        pytest.param(STORE_FLAG.format("release.gpu"), LOAD_FLAG.format("relaxed.gpu"), [(RACE, (0,))], id="release"),
        pytest.param(STORE_FLAG.format("relaxed.gpu"), LOAD_FLAG.format("acquire.gpu"), [(RACE, (0,))], id="acquire"),
        pytest.param(STORE_FLAG.format("volatile"), LOAD_FLAG.format("volatile"), [(RACE, (0,))], id="volatile"),
        pytest.param(FENCE + STORE_FLAG.format("relaxed.gpu"), LOAD_FLAG.format("volatile") + FENCE, [], id="fences"),
        pytest.param(
            STORE_FLAG.format("release.gpu"),
            "atom.global.acquire.gpu.or.b32 %r3, [%x+4], 0;\n",
            [],
            id="atomic",
        ),
        pytest.param(
            STORE_FLAG.format("weak"), LOAD_FLAG.format("acquire.gpu"), [(RACE, (1,)), (RACE, (0,))], id="weak store"
        ),
        pytest.param(
            STORE_FLAG.format("release.gpu"), LOAD_FLAG.format("weak"), [(RACE, (1,)), (RACE, (0,))], id="weak load"
        ),
        pytest.param(
            STORE_FLAG.format("release.gpu") + STORE_FLAG.format("release.gpu").replace("+4", "+8"),
            LOAD_FLAG.format("acquire.gpu").replace("+4", "+12"),
            [(RACE, (0,))],
            id="another flag",
        ),
    ],
)
def test_a_flag_orders_what_was_before_it(store, load, races):
    """Program 0 stores an element and then a flag, program 1 loads the flag and then the element."""
    guarded = lambda guard, body: "".join(f"{guard} {line}\n" for line in body.splitlines())  # noqa: E731
    body = "mov.u32 %r1, %ctaid.x;\nsetp.eq.u32 %p0, %r1, 0;\n"
    body += guarded("@%p0", "st.global.b32 [%x], 1;\n" + store)
    body += guarded("@!%p0", load + "ld.global.b32 %r2, [%x];\n")
    x = torch.zeros(64, dtype=torch.int32)
    found = faults(body, threads=32, grid=(2, 1, 1), tensors={"x": x})
    assert [(fault.kind, fault.index) for fault in found] == races


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warp_that_waits_for_a_flag_of_another(schedule):
    body = """
    mad.wide.u32 %a0, %lane, 4, %x;
    @%first st.global.b32 [%a0+128], %lane;
    bar.warp.sync 0xffffffff;
    @%leader st.release.gpu.global.b32 [%x], 1;
    @%first bra done;
    wait: ld.acquire.gpu.global.b32 %r1, [%x];
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra wait;
    ld.global.b32 %r2, [%a0+128];
    done:
    """
    flag = lambda: {"x": torch.zeros(64, dtype=torch.int32)}  # noqa: E731
    assert not faults(body, schedule=schedule, tensors=flag())
    for weaker in (body.replace("release", "relaxed"), body.replace("acquire", "relaxed")):
        (fault,) = faults(weaker, schedule=schedule, tensors=flag())
        assert (fault.kind, fault.where) == ("race: read after write", "planted.py:9")
    never = faults(body.replace("@%leader st", "@%p4 st"), schedule=schedule, tensors=flag())
    assert [(f.kind, f.warp) for f in never] == [("deadlock", 1)]


WRITE, READ = "st.global.b32 [%a0], %r0;\n", "ld.global.b32 %r1, [%a1];\n"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("kinds", "before", "after"),
    [
        pytest.param({"race: read after write", "race: write after read"}, WRITE, READ, id="read"),
        pytest.param({"race: read after write", "race: write after read"}, READ, WRITE, id="write"),
        pytest.param({"race: write after write"}, WRITE, WRITE.replace("%a0", "%a1"), id="writes"),
    ],
)
def test_warps_in_global_memory(kinds, before, after, schedule):
    """%a0 is a thread's own element, %a1 that of a thread of the other warp; the schedule says who is first."""
    addresses = "mad.wide.u32 %a0, %tid, 4, %x;\nxor.b32 %r2, %tid, 32;\nmad.wide.u32 %a1, %r2, 4, %x;\n"
    found = faults(addresses + before + after, schedule=schedule)
    assert found
    assert all(f.kind in kinds and f.tensor == "x" and f.index is not None for f in found)
    assert all({f.where, f.other} <= {"planted.py:4", "planted.py:5"} for f in found)
    assert not faults(addresses + before + "bar.sync 0;\n" + after, schedule=schedule)


BESIDE = "mad.wide.u32 %a0, %lane, 4, %x;\nxor.b32 %r2, %lane, 1;\nmad.wide.u32 %a1, %r2, 4, %x;\n"
READ_ASYNC = "cp.async.ca.shared.global [%s], [%a1], 4;\ncp.async.wait_all;\n"


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        pytest.param("race: read after write", WRITE, READ, id="read"),
        pytest.param("race: read after write", WRITE, READ_ASYNC, id="cp.async"),
        pytest.param("race: write after read", READ, WRITE, id="write"),
        pytest.param("race: write after read", READ_ASYNC, WRITE, id="write after cp.async"),
        pytest.param("race: write after write", WRITE, "st.global.b32 [%a1], %tid;\n", id="writes"),
    ],
)
def test_lanes_in_global_memory(kind, before, after):
    """%a0 is a lane's own element, %a1 that of the lane beside it."""
    (fault,) = faults(BESIDE + before + after, threads=32)
    assert (fault.kind, fault.lane, fault.tensor, fault.index) == (kind, 0, "x", (1 if "%a1" in after else 0,))
    assert "by lane 1 of the same warp" in fault.detail
    for ordered in (WARP_SYNC, "bar.sync 0;\n"):
        assert not faults(BESIDE + before + ordered + after, threads=32)
    own = [text.replace("%a1", "%a0") for text in (before, after)]
    assert not faults(BESIDE + "".join(own), threads=32)


def test_lanes_that_store_to_one_byte_of_global_memory():
    """Any may come last: only the same value is the same result."""
    store = "st.global.b32 [%x], {};\n"
    assert not faults(store.format("%r0") + "st.global.b16 [%x], 7;\n", threads=32)
    (fault,) = faults(store.format("%tid"), threads=32)
    assert (fault.kind, fault.lane, fault.index) == ("race: write after write", 1, (0,))
    assert "written by lane 0 of the same warp" in fault.detail
    assert not faults("add.s64 %a0, %x, 0;\nred.global.add.u32 [%a0], %tid;\n", threads=32)
    half = "setp.lt.u32 %p0, %tid, 16;\n@%p0 "
    (fault,) = faults(half + store.format("%r0") + "ld.global.b32 %r1, [%x];\n", threads=32)
    assert (fault.kind, fault.lane) == ("race: read after write", 16)


def test_a_program_does_not_wait_for_lanes_of_another():
    """What a lane of an earlier program did is no concern of this one's lanes."""
    body = BESIDE.replace("%x;", "%x;\nmul.wide.u32 %a2, %r3, 128;\n") + WRITE.replace("st", "@%p0 st")
    setup = "mov.u32 %r3, %ctaid.x;\nsetp.eq.u32 %p0, %r3, 0;\n"
    found = faults(setup + body + READ.replace("ld", "@!%p0 ld"), threads=32, grid=(2, 1, 1))
    assert [fault.kind for fault in found] == ["race between programs"]


def test_the_source_of_a_tensor_copy_is_free_when_it_is_over():
    """Its reads are as old as its issue: who waits for it has seen them."""
    copy = MAP + INIT.replace("bar.sync 0;\n", "") + "mov.b32 %r1, global_smem;\nadd.s32 %r2, %r1, 512;\nbar.sync 0;\n"
    copy += "@%leader mbarrier.arrive.expect_tx.shared::cta.b64 _, [global_smem+512], 64;\n" + LOAD + "\n"
    wait = "".join(MBARRIER.partition("wait:")[1:]).rpartition("ld.shared")[0]
    store = "mad.wide.u32 %a0, %tid, 4, %x;\nst.global.b32 [%a0], %r0;\n"
    buffer = torch.zeros(192, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    for schedule in SCHEDULES:
        tensors = {"x": torch.arange(64, dtype=torch.int32), "map": buffer[start : start + 128]}
        assert not faults(copy + "bar.sync 0;\n" + wait + store, tensors=tensors, schedule=schedule)


def test_the_message_has_a_line_of_the_source_once():
    copies = [f"cp.async.ca.shared.global [%s+{8 * i}], [%x], 4;" for i in range(3)]
    found = faults("\n".join(["mov.b32 %r1, 0;", " ".join(copies)]), shared_bytes=4, threads=32)
    assert {fault.where for fault in found} == {"planted.py:2"}
    assert len(found) == 3
    message = str(EmulationError(found))
    assert message.count("planted.py:2: shared memory out of bounds") == 1
    assert message.endswith("\n    and at 2 more of this line's instructions")


def test_an_unsupported_instruction_is_named_with_its_line():
    with pytest.raises(NotImplementedError, match=r"tcgen05.*planted.py:2"):
        faults("mov.b32 %r1, 0;\ntcgen05.wait::ld.sync.aligned;")


@pytest.mark.parametrize(
    ("error", "arch", "schedule"),
    [
        (NotImplementedError, "sm_100", "random"),
        (NotImplementedError, "gfx942", "random"),
        (ValueError, "sm_70", "random"),
        (ValueError, "sm_90", "slow"),
    ],
)
def test_what_is_not_emulated_is_refused(error, arch, schedule):
    message = (
        "schedule: expected random, .*, got 'slow'" if schedule == "slow" else f"arch: expected sm_80, .* got '{arch}'"
    )
    message += ": tcgen05 of sm_100 .* AMD GPUs are not emulated" if error is NotImplementedError else "$"
    with pytest.raises(error, match=message), emulate(arch, schedule=schedule):
        pass


def test_one_is_open_at_a_time():
    x, out = torch.randn(64), torch.zeros(64)
    with emulate("sm_90"):
        with pytest.raises(RuntimeError, match="inside another"), emulate("sm_80"):
            pass
        _shift_kernel[(1,)](x, out, 63, BLOCK=64)
    torch.testing.assert_close(out[:63], x[1:])


def test_without_a_compiler(monkeypatch, tmp_path):
    """Triton's helper takes gcc, clang or what CC says."""
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    build = lambda: core.built("stub_libcuda.c", "libcuda.so.1", ["-Wl,-soname,libcuda.so.1"])  # noqa: E731
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler: expected gcc or clang on PATH, or a path in CC"):
        build()
    monkeypatch.setenv("CC", compiler)
    assert build().is_relative_to(tmp_path)


# ---- wgmma and the async proxy: a product of 64 x 16 by 16 x 8, by one warp group

PRODUCT = """
mov.b64 %a1, 0x0000400000000040;
shl.b64 %a2, %a1, 0;
mov.b32 %r1, 0;
@%p4 st.shared.b32 [%s], %r1;
fence.proxy.async.shared::cta;
bar.sync 0;
mov.b32 %f1, 0f00000000;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r1, %r1, %r1, %r1}, %a1, 0, 1, 1, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
add.f32 %f5, %f1, %f2;
"""


def product(change=lambda body: body, **options):
    body = "setp.eq.u32 %p4, %tid, %tid;\n" + change(PRODUCT).strip()
    return [fault.kind for fault in faults(body, threads=128, shared_bytes=2048, **options)]


@pytest.mark.parametrize("schedule", ["late", "early", "random"])
def test_a_product_and_its_faults(schedule):
    run = lambda *replaced: product(lambda body: body.replace(*replaced), schedule=schedule)  # noqa: E731
    assert run("", "") == []
    assert run("fence.proxy.async.shared::cta;\n", "") == ["read by the async proxy without a proxy fence"]
    assert run("wgmma.wait_group.sync.aligned 0;\n", "") == ["register of a wgmma in flight is read"]
    assert run("wgmma.commit_group.sync.aligned;\n", "") == ["register of a wgmma in flight is read"]
    assert run("wgmma.fence.sync.aligned;\n", "") == ["no wgmma.fence since a register was accessed"]
    assert run("wgmma.wait_group", "mov.b32 %r1, %r0;\nadd.s32 %r1, %r0, 1;\nwgmma.wait_group")[:1] == [
        "overwritten under an asynchronous operation that reads it"
    ]


@pytest.mark.parametrize("schedule", ["late", "early", "random"])
def test_products_that_write_registers_anew(schedule):
    """Neither adds to what is there, so that no register is written before: the first is the warp's first product, and
    the second overwrites what was read."""
    wgmma = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %a1, %a1, 0, 1, 1, 0, 0;\n"
    fence = "wgmma.fence.sync.aligned;\n"
    over = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    before = PRODUCT.partition("mov.b32 %f1")[0]
    read = "add.f32 %f5, %f1, %f2;\n"
    run = lambda *after: product(lambda _: before + "".join(after), schedule=schedule)  # noqa: E731
    missing = ["no wgmma.fence since a register was accessed"]
    assert run(fence, wgmma, over, read, fence, wgmma, over) == []
    assert run(fence, wgmma, wgmma, over, wgmma, over, read) == []
    assert run(wgmma, over, read, fence, wgmma, over) == missing
    assert run(fence, wgmma, over, read, wgmma, over) == missing


@pytest.mark.parametrize("schedule", ["late", "early", "random"])
def test_a_product_of_what_cp_async_copied(schedule):
    """cp.async writes by the generic proxy: its wait and the barrier are not enough."""
    copied = """
    shl.b32 %s, %tid, 4;
    add.s32 %s, %s, global_smem;
    mad.wide.u32 %a0, %tid, 16, %x;
    cp.async.cg.shared.global [%s], [%a0], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    """
    fence, wait = "fence.proxy.async.shared::cta;\n", "cp.async.wait_group 0;\n"
    body = copied.replace("    ", "") + PRODUCT.replace("@%p4 st.shared.b32 [%s], %r1;", "").lstrip()
    run = lambda body: product(  # noqa: E731
        lambda _: body, schedule=schedule, tensors={"x": torch.zeros(512, dtype=torch.int32)}
    )
    assert run(body) == []
    unfenced = body.replace(fence, "")
    assert run(unfenced) == ["read by the async proxy without a proxy fence"]
    assert run(unfenced.replace(wait, fence + wait)) == ["read by the async proxy without a proxy fence"]


@pytest.mark.parametrize("schedule", ["late", "early", "random"])
def test_a_proxy_fence_covers_what_comes_before_it(schedule):
    """By whichever thread, and nothing that comes after it."""
    fence, store = "fence.proxy.async.shared::cta;", "@%p4 st.shared.b32 [%s], %r1;"
    early = lambda body: body.replace(fence, "").replace(store, f"{fence}\n{store}")  # noqa: E731
    assert product(early, schedule=schedule) == ["read by the async proxy without a proxy fence"]
    late = lambda body: body.replace(fence, "").replace("bar.sync 0;", f"bar.sync 0;\n{fence}")  # noqa: E731
    assert product(late, schedule=schedule) == []


# ---- a kernel in Triton, through the ordinary launch


@triton.jit
def _shift_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at + 1, mask=at < n, other=0.0), mask=at < n)


def test_a_triton_kernel_reports_its_own_source_line():
    x, out = torch.randn(100), torch.zeros(100)
    with emulate("sm_90", strict=False) as log:
        _shift_kernel[(2,)](x, out, 100, BLOCK=64)
    (launch,) = log
    (fault,) = launch.faults
    assert fault.kind == "global memory out of bounds"
    assert re.fullmatch(r".*test_emulator_faults.py:\d+", fault.where)
    assert (fault.kernel, fault.program, fault.tensor) == ("_shift_kernel", (1, 0, 0), "x")
    torch.testing.assert_close(out[:99], x[1:])
    with pytest.raises(EmulationError, match="out of bounds of x"), emulate("sm_90"):
        _shift_kernel[(2,)](x, out, 100, BLOCK=64)


def test_an_autotuned_kernel_runs_with_the_first_config_that_fits():
    """After pruning; the autotuner remembers nothing of it."""
    configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((16, 4), (32, 2), (64, 1))]
    prune = lambda configs, arguments, **others: [c for c in configs if c.kwargs["BLOCK"] > arguments["n"] % 20]  # noqa: E731
    tuned = triton.autotune(configs, key=["n"], prune_configs_by={"early_config_prune": prune})(_shift_kernel)
    x = torch.randn(100)
    for n, block, warps in ((61, 16, 4), (56, 32, 2)):
        out = torch.zeros(100)
        with emulate("sm_90") as log:
            tuned[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, out, n)
        assert [(launch.constexprs["BLOCK"], launch.num_warps) for launch in log] == [(block, warps)]
        torch.testing.assert_close(out[:n], x[1 : n + 1])
    assert tuned.configs == configs
    assert not tuned.cache
    with compile_only("sm_90"), pytest.raises(RuntimeError, match="launch one explicit config"):
        tuned[(1,)](x, out, 61)


@triton.jit
def _copy_tile_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tile = tl.load(x + at[:, None] * BLOCK + at[None, :])
    tl.store(out + at[:, None] * BLOCK + at[None, :], tl.dot(tile, tile))


def test_a_config_that_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(compilation._Driver, "get_device_properties", lambda *_: {"max_shared_mem": 1536})
    x, out = torch.eye(32, dtype=torch.float16), torch.zeros(32, 32)
    tuned = triton.autotune([triton.Config({"BLOCK": block}) for block in (32, 16)], key=[])(_copy_tile_kernel)
    with emulate("sm_80") as log:
        tuned[(1,)](x, out)
    assert [launch.constexprs["BLOCK"] for launch in log] == [16]
    alone = triton.autotune([triton.Config({"BLOCK": 32})], key=[])(_copy_tile_kernel)
    with emulate("sm_80"), pytest.raises(triton.runtime.errors.OutOfResources):
        alone[(1,)](x, out)


def test_a_launch_that_a_driver_would_refuse():
    x, out = torch.randn(64), torch.zeros(64)
    with emulate("sm_90"), pytest.raises(RuntimeError, match="too large a grid"):
        _shift_kernel[(1, 70000)](x, out, 63, BLOCK=64)


def test_the_same_seed_gives_the_same_run():
    def run(seed):
        x, out = torch.arange(100.0), torch.zeros(100)
        with emulate("sm_80", seed=seed) as log:
            _shift_kernel[(2,)](x[:99], out[:98], 98, BLOCK=64)
        return log[0].executed.tolist(), out.tolist()

    assert run(3) == run(3)
