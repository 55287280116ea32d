import pytest
from sass_listing import listing

from perf.model import sass

NESTED = """
    MOV R1, c[0x0][0x28] | 4
.L_x_0:
    IADD3 R2, R2, 0x1, RZ
.L_x_1:
    HMMA.16816.F32 R4, R8, R12, R4 | 7
    ISETP.GE.AND P0, PT, R3, R0, PT
    @P1 BRA `(.L_x_2) | 5
    MUFU.EX2 R5, R5
.L_x_2:
    @!P0 BRA `(.L_x_1) | 5
    @P2 BRA `(.L_x_0) | 5
    EXIT
"""


def loops_of(text):
    instructions, labels = sass.parse(listing(text))["kernel"]
    return sass.find_mma_loops(instructions, labels)


def test_an_instruction_is_read_with_predicate_operands_and_stall_count():
    instructions, labels = sass.parse(listing(NESTED))["kernel"]
    assert labels == {".L_x_0": 1, ".L_x_1": 2, ".L_x_2": 6}
    product = instructions[2]
    assert (product.address, product.mnemonic, product.opcode, product.stall) == (32, "HMMA.16816.F32", "HMMA", 7)
    assert product.operands == "R4, R8, R12, R4"
    assert instructions[6].predicate == "!P0"


def test_functions_are_kept_apart():
    functions = sass.parse(listing("EXIT", "first") + "\n" + listing("NOP\nEXIT", "second"))
    assert {name: len(instructions) for name, (instructions, _) in functions.items()} == {"first": 1, "second": 2}


def test_only_the_innermost_loop_counts_and_skipped_instructions_are_conditional():
    (loop,) = loops_of(NESTED)
    assert [i.opcode for i in loop.always] == ["HMMA", "ISETP", "BRA", "BRA"]
    assert [i.opcode for i in loop.conditional] == ["MUFU"]


def test_a_loop_without_matmuls_is_no_mma_loop():
    assert loops_of(".L_x_1:\nFADD R1, R1, R2\n@P0 BRA `(.L_x_1)\nEXIT") == []


def test_a_loop_left_in_the_middle_is_one_loop():
    (loop,) = loops_of("""
    .L_x_1:
        HMMA.16816.F32 R4, R8, R12, R4
        @P0 BRA `(.L_x_2)
        FADD R1, R1, R2
        BRA `(.L_x_1)
    .L_x_2:
        EXIT
    """)
    assert [i.opcode for i in loop.always] == ["HMMA", "BRA", "FADD", "BRA"]
    assert loop.conditional == ()


def test_matmuls_that_one_elected_thread_issues_belong_to_the_loop():
    (loop,) = loops_of("""
    .L_x_1:
        FADD R1, R1, R2
        @P1 BRA `(.L_x_2)
        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0
    .L_x_2:
        @P0 BRA `(.L_x_1)
        EXIT
    """)
    assert [i.opcode for i in loop.always] == ["FADD", "BRA", "UTCHMMA", "BRA"]


def test_of_two_ways_a_trip_takes_the_one_with_more_matmuls_then_the_shorter():
    """As with matmuls in an `if`, the last of which has a masked and a full form."""
    (loop,) = loops_of("""
    .L_x_1:
        FADD R1, R1, R2
        @P1 BRA `(.L_x_2)
        HGMMA.64x32x16.F32 R24, R88, gdesc[UR8], R24
    .L_x_2:
        @P2 BRA `(.L_x_3)
        HGMMA.64x64x16.F32 R24, R88, gdesc[UR8], R24
        FSEL R24, R24, R25, P3
        BRA `(.L_x_4)
    .L_x_3:
        HGMMA.64x64x16.F32 R24, R88, gdesc[UR8], R24
    .L_x_4:
        @P0 BRA `(.L_x_1)
        EXIT
    """)
    assert [i.mnemonic[:12] for i in loop.always] == ["FADD", "BRA", "HGMMA.64x32x", "BRA", "HGMMA.64x64x", "BRA"]
    assert [i.opcode for i in loop.conditional] == ["HGMMA", "FSEL", "BRA"]


def test_code_that_only_a_jump_table_reaches_is_searched_too():
    (loop,) = loops_of("""
        BRX R2 -0x100
    .L_x_1:
        HGMMA.64x128x16.F32 R24, R88, gdesc[UR8], R24
        @P0 BRA `(.L_x_1)
        EXIT
    """)
    assert loop.always[0].opcode == "HGMMA"


@pytest.mark.parametrize("ending", ["EXIT", "RET.REL.NODEC R2 `(kernel)"])
def test_nothing_follows_the_end(ending):
    assert loops_of(f".L_x_1:\nHMMA.16816.F32 R4, R8, R12, R4\n{ending}\n@P0 BRA `(.L_x_1)\nEXIT") == []
