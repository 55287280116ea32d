import pytest
from sass_listing import listing

from perf.model import sass
from perf.model.gpus import RATES
from perf.model.loop_model import LoopModel, Report, useful_share

MATMULS = {
    "register A": "HGMMA.64x128x16.F32 R24, R88, gdesc[UR8], R24",
    "shared A": "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24",
    "mma.sync": "HMMA.16816.F32 R4, R8, R12, R4",
}
SOFTMAX = """
    MUFU.EX2 R5, R5 | 2
    FFMA R6, R6, R7, R8 | 4
    FMNMX R7, R7, R8, !PT | 4
    SHFL.BFLY PT, R9, R7, 0x1, 0x1f | 1
    IMAD.MOV.U32 R10, RZ, RZ, R9 | 1
"""


def models(text, arch="sm_90"):
    instructions, labels = sass.parse(listing(text))["kernel"]
    return tuple(LoopModel(loop, RATES.get(arch)) for loop in sass.find_mma_loops(instructions, labels))


def loop_text(*body, label=".L_x_1"):
    return "\n".join([f"{label}:", *body, f"@P0 BRA `({label}) | 5"])


def report(loops, threads=256, warp_specialized=False, ctas=1):
    return Report(
        kernel="kernel",
        arch="sm_90",
        threads=threads,
        registers=168,
        stack_bytes=0,
        shared_bytes=0,
        static_spills=0,
        warp_specialized=warp_specialized,
        ctas_per_sm_by={"registers": ctas, "warps": ctas + 1},
        loops=loops,
    )


@pytest.mark.parametrize(
    ("matmul", "arch", "flops", "tensor", "smem"),
    [
        ("register A", "sm_90", 2 * 64 * 128 * 16, 64, 128 * 16 * 2 / 128),
        ("shared A", "sm_90", 2 * 64 * 128 * 16, 64, (128 + 64) * 16 * 2 / 128),
        ("mma.sync", "sm_80", 4 * 2 * 16 * 8 * 16, 8, 0),
        ("mma.sync", "sm_90", 4 * 2 * 16 * 8 * 16, 4 / 0.62, 0),
    ],
)
def test_a_matmul_costs_its_flops_at_the_rate_of_the_target(matmul, arch, flops, tensor, smem):
    (loop,) = models(loop_text(MATMULS[matmul]), arch)
    assert loop.flops == flops
    assert loop.cycles["tensor"] == pytest.approx(tensor)
    assert loop.cycles["smem"] == smem


@pytest.mark.parametrize(("arch", "fp32"), [("sm_80", 2), ("sm_90", 1)])
def test_other_units_are_charged_by_their_lanes(arch, fp32):
    (loop,) = models(loop_text(MATMULS["mma.sync"], SOFTMAX), arch)
    cycles = loop.cycles
    assert cycles["mufu"] == 8
    assert cycles["alu"] == 2
    assert cycles["fma"] == fp32 + 2
    assert cycles["smem"] == 4
    assert cycles["issue"] == 7
    assert cycles["stall"] == 1 + (2 + 4 + 4 + 1 + 1) + 5


@pytest.mark.parametrize(
    ("access", "bytes_per_warp"),
    [
        ("LDS R1, [R2]", 128),
        ("LDS.64 R4, [R2]", 256),
        ("STS.128 [R2], R4", 512),
        ("LDSM.16.M88.4 R4, [R2]", 512),
        ("LDSM.16.M88.2 R4, [R2]", 256),
        ("STSM.16.M88 [R2], R4", 128),
    ],
)
def test_shared_memory_accesses_cost_their_bytes(access, bytes_per_warp):
    (loop,) = models(loop_text(MATMULS["mma.sync"], access))
    assert loop.cycles["smem"] == 4 * bytes_per_warp / 128


def test_bound_is_the_busiest_unit_and_lock_adds_matmuls_and_softmax():
    (loop,) = models(loop_text(MATMULS["register A"], SOFTMAX))
    peak = 132 * 1.755e9 * 4096 / 1e12
    assert loop.limiter == "tensor"
    assert loop.bound() == pytest.approx(peak)
    stall = 1 + 12 + 5
    assert loop.lock(warpgroups=1) == pytest.approx(peak * 64 / (64 + stall))
    assert loop.lock(warpgroups=2) == pytest.approx(peak * 64 / (64 + stall / 2))
    assert loop.lock(warpgroups=8) == pytest.approx(peak * 64 / (64 + 8)), "MUFU is busy for 8 cycles whatever waits"


def test_counts_of_a_trip():
    copy = "@P1 LDGSTS.E.BYPASS.128 [R4], [R6.64]"
    (loop,) = models(loop_text(MATMULS["register A"], "LDL R3, [R1+0x8]", "STL [R1], R2", copy))
    assert loop.spills == 2
    assert loop.async_copies == 1
    assert loop.mma_shapes == {"HGMMA.64x128x16": 1}
    assert loop.instructions == 5


def test_the_hot_loop_covers_full_tiles():
    full = loop_text(MATMULS["register A"], SOFTMAX, label=".L_x_2")
    masked = loop_text(MATMULS["register A"], SOFTMAX, "FSEL R1, R2, R3, P1", label=".L_x_1")
    small = loop_text("HGMMA.64x64x16.F32 R24, R88, gdesc[UR8], R24", label=".L_x_3")
    loops = models("\n".join([masked, full, small, "EXIT"]))
    assert len(loops) == 3
    assert report(loops).hot is loops[1]


def test_a_masked_loop_with_fewer_instructions_is_not_hot():
    """ptxas of Triton 3.6 computes the descriptors of the second loop's matmuls in ordinary registers."""
    masked = loop_text(MATMULS["shared A"], SOFTMAX, "FSEL R1, R2, R3, P1", label=".L_x_1")
    full = loop_text("R2UR UR4, R12", "R2UR UR5, R13", MATMULS["shared A"], SOFTMAX, label=".L_x_2")
    loops = models("\n".join([masked, full, "EXIT"]))
    assert loops[0].instructions < loops[1].instructions
    assert report(loops).hot is loops[1]


def test_tcgen05_gives_counts_and_no_rates():
    loops = models(loop_text("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0"))
    kernel = report(loops)
    assert kernel.hot.mma_instructions == 1
    assert kernel.bound is None
    assert kernel.lock is None
    assert kernel.row()["bound by"] is None


def test_without_matmuls_there_is_no_hot_loop():
    kernel = report(())
    assert kernel.hot is None
    assert kernel.lock is None
    assert kernel.row()["spills in loop"] is None


@pytest.mark.parametrize(
    ("threads", "warp_specialized", "ctas", "warpgroups"),
    [(128, False, 2, 2), (256, False, 1, 2), (64, False, 1, 1), (384, True, 1, 2), (256, True, 1, 1)],
)
def test_warpgroups_that_run_the_loop(threads, warp_specialized, ctas, warpgroups):
    loops = models("\n".join(loop_text(MATMULS["register A"], label=f".L_x_{i}") for i in range(2)) + "\nEXIT")
    kernel = report(loops, threads, warp_specialized, ctas)
    assert kernel.mma_warpgroups_per_sm == warpgroups
    assert kernel.occupancy_limit == "registers"


# One matmul of 64 x 64 scores and one of 64 x 128 outputs over 64 keys, as in Triton's TTGIR for mma.sync and wgmma.
TTGIR = """
#blocked = #ttg.blocked<{{sizePerThread = [1, 8], threadsPerWarp = [2, 16], warpsPerCTA = [8, 1], order = [1, 0]}}>
#mma = #ttg.nvidia_mma<{{versionMajor = {major}, versionMinor = 0, warpsPerCTA = {warps}, instrShape = {shape}}}>
%s = {opcode} %q, %k, %z : {q}<64x128xf16, #a> * {k}<128x64xf16, #b> -> tensor<64x64xf32, #mma> loc(#loc1)
%o = {opcode} %p, %v, %acc {{isAsync = true}} : {q}<64x64xf16, #a> * {k}<64x128xf16, #b> -> tensor<64x128xf32, #mma>
"""


@pytest.mark.parametrize(
    ("version", "warps", "shape", "share"),
    [
        (2, [4, 1], [16, 8], 1.0),
        (2, [8, 1], [16, 8], 0.5),
        (2, [1, 8], [16, 8], 1.0),
        (2, [1, 16], [16, 8], 2 / 3),  # twice the columns of the scores, those of the outputs
        (3, [4, 1], [16, 64, 16], 1.0),
        (3, [4, 2], [16, 64, 16], 2 / 3),
        (3, [8, 1], [16, 128, 16], 0.5),
    ],
)
def test_matmuls_that_warps_repeat_count_once(version, warps, shape, share):
    opcode, k = ("tt.dot", "tensor") if version == 2 else ("ttng.warp_group_dot", "!ttg.memdesc")
    text = TTGIR.format(major=version, warps=warps, shape=shape, opcode=opcode, q="tensor", k=k)
    if version == 3 and shape[1] == 128:  # an instruction is never wider than its result
        text = text.replace("64x64xf32", "64x128xf32").replace("128x64xf16, #b", "128x128xf16, #b")
    assert useful_share(text) == pytest.approx(share)


def test_a_kernel_without_matmuls_repeats_none():
    assert useful_share("tt.store %x, %y : tensor<64x!tt.ptr<f32>>") == 1.0


def test_a_loop_whose_warps_repeat_each_other_is_as_much_slower():
    (loop,) = models(loop_text(MATMULS["mma.sync"], SOFTMAX), "sm_80")
    half = LoopModel(loop.loop, loop.rates, useful=0.5)
    assert half.bound() == pytest.approx(loop.bound() / 2)
    assert half.lock(4) == pytest.approx(loop.lock(4) / 2)


def test_bank_conflicts_cost_shared_memory_and_no_other_unit():
    (loop,) = models(loop_text(MATMULS["shared A"], SOFTMAX), "sm_90")
    twice = LoopModel(loop.loop, loop.rates, conflicts=2.0)
    shuffles = 4 * loop.histogram["SHFL"]
    assert twice.cycles["smem"] - shuffles == 2 * (loop.cycles["smem"] - shuffles) > 0
    without = [{unit: n for unit, n in x.cycles.items() if unit != "smem"} for x in (loop, twice)]
    assert without[0] == without[1]
