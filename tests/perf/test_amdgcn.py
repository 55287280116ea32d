from perf.model import amdgcn

METADATA = """
; NumAgprs: 4
amdhsa.target:   amdgcn-amd-amdhsa--gfx942
    .symbol: kernel.kd
    .vgpr_count: 100
    .sgpr_count: 30
    .vgpr_spill_count: 2
    .sgpr_spill_count: 0
    .private_segment_fixed_size: 8
"""
MASKED = """
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tv_cndmask_b32_e32 v0, v1, v2, vcc
\ts_cbranch_scc0 .LBB0_1
"""
# The latch is before the header; around them are the prologue and a block outside all loops.
INTERIOR = """
\ts_branch .LBB0_4
.LBB0_3:                                ;   in Loop: Header=BB0_4 Depth=1
.Ltmp3:
\t.loc\t1 10 5
\tscratch_load_dword v0, off, s0
\ts_cbranch_scc0 .LBB0_6
.LBB0_4:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc1 .LBB0_3
; %bb.5:                                ;   in Loop: Header=BB0_4 Depth=1
\ts_branch .LBB0_3
.LBB0_6:                                ; %Flow
\tv_mov_b32_e32 v0, v1
"""
NESTED = """
.LBB0_7:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_8 Depth 2
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
.LBB0_8:                                ;   Parent Loop BB0_7 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\t{body}
\ts_cbranch_scc1 .LBB0_8
; %bb.9:                                ;   in Loop: Header=BB0_7 Depth=1
\ts_cbranch_scc1 .LBB0_7
"""


def opcodes(*parts):
    return amdgcn.analyze("".join(parts) + METADATA, shared_bytes=0).opcodes


def test_the_hot_loop_covers_full_tiles_and_its_blocks_need_not_be_contiguous():
    masked = MASKED.replace("s_cbranch", "\tv_add_u32 v0, v1, v2\n" * 3 + "\ts_cbranch")
    assert opcodes(masked, INTERIOR) == {
        "scratch_load_dword": 1,
        "v_mfma_f32_32x32x8_bf16": 1,
        "s_cbranch_scc0": 1,
        "s_cbranch_scc1": 1,
        "s_branch": 1,
    }


def test_of_nested_loops_the_innermost_with_matmuls_is_hot():
    matmul, copy = "v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]", "ds_read_b64 v[0:1], v2"
    assert opcodes(NESTED.format(body=matmul)) == {"v_mfma_f32_32x32x8_bf16": 1, "s_cbranch_scc1": 1}
    assert opcodes(NESTED.format(body=copy)) == {"v_mfma_f32_32x32x8_bf16": 2, "s_cbranch_scc1": 1}


def test_a_row_counts_the_loop_and_its_spills():
    row = amdgcn.analyze(INTERIOR + METADATA, shared_bytes=16).row()
    assert (row["loop instructions"], row["spills in loop"], row["spills"]) == (5, 1, 2)
    assert row["kernel"] == "kernel"


def test_without_matmuls_there_is_no_hot_loop():
    report = amdgcn.analyze(INTERIOR.replace("v_mfma_f32_32x32x8_bf16", "v_fma_f32") + METADATA, shared_bytes=0)
    assert not report.opcodes
    assert report.row()["loop instructions"] is None
