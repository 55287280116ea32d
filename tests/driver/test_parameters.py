"""The comparison of a launch with its PTX detects each fault of a launcher or a call path."""

import struct

import pytest
import torch
from parameters import arguments_of, compare, cut, listed_in

PTX = """
.version 9.4
.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 _kernel_param_0,
	.param .align 64 .b8 _kernel_param_1[128],
	.param .u32 _kernel_param_2,
	.param .u64 _kernel_param_3,
	.param .u32 _kernel_param_4,
	.param .f32 _kernel_param_5,
	.param .u8 _kernel_param_6,
	.param .u64 .ptr .global .align 1 _kernel_param_7,
	.param .u64 .ptr .global .align 1 _kernel_param_8
)
.reqntid 128
"""
SIGNATURE = {
    "q": "*bf16",
    "descriptor": "tensordesc<bf16[64, 64]>",
    "sizes": ("i32", ("fp32", "constexpr")),
    "BLOCK": "constexpr",
    "flag": "u1",
}


class Descriptor:
    block_shape, shape, strides = [64], [5], [2**33]


Q = torch.zeros(3)
VALUES = {"q": Q, "descriptor": Descriptor(), "sizes": (7, (0.5, 3)), "BLOCK": 64, "flag": True}
ARGUMENTS = list(arguments_of(SIGNATURE, VALUES))
LISTED = listed_in(PTX)
HANDED = struct.pack("<Q128siqif?QQ", Q.data_ptr(), b"map", 5, 2**33, 7, 0.5, True, 0, 0)


def line(i):
    return next(x for x in PTX.splitlines() if f"_param_{i}" in x)


def test_a_launch_as_it_should_be_passes():
    assert LISTED == ["pointer", "128 x b8", "u32", "u64", "u32", "f32", "u8", "pointer", "pointer"]
    assert b"".join(cut(HANDED, LISTED)) == HANDED
    compare("_kernel", LISTED, ARGUMENTS, HANDED)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (line(4) + "\n", "", "parameter 4: expected u32, PTX has f32"),
        (line(6) + "\n", "", "parameter 6: expected u8, PTX has pointer"),
        (line(7) + "\n", "", "expected 7 parameters and scratch, PTX has 8"),
        (line(4), line(4) + "\n" + line(4), "parameter 5: expected f32, PTX has u32"),
        (line(7), line(7) + "\n" + line(7), "expected 7 parameters and scratch, PTX has 10"),
        (line(2) + "\n" + line(3), line(3) + "\n" + line(2), "parameter 2: expected u32, PTX has u64"),
        (".u32 _kernel_param_2", ".u64 _kernel_param_2", "parameter 2: expected u32, PTX has u64"),
        ("[128]", "[64]", "parameter 1: expected 128 x b8, PTX has 64 x b8"),
        (".u32 _kernel_param_4", ".f32 _kernel_param_4", "parameter 4: expected u32, PTX has f32"),
        (".f32 _kernel_param_5", ".u32 _kernel_param_5", "parameter 5: expected f32, PTX has u32"),
        (".u64 _kernel_param_3", ".u64 .ptr .global .align 1 _kernel_param_3", "expected u64, PTX has pointer"),
        (".u64 .ptr .global .align 1 _kernel_param_0", ".u64 _kernel_param_0", "expected pointer, PTX has u64"),
    ],
)
def test_ptx_that_lists_other_parameters_is_found(old, new, said):
    changed = PTX.replace(old, new)
    assert changed != PTX
    with pytest.raises(AssertionError, match=said):
        compare("_kernel", listed_in(changed), ARGUMENTS, HANDED)


@pytest.mark.parametrize(
    ("handed", "said"),
    [
        (("<Q128siqif?QQ", Q.data_ptr() + 4, b"", 5, 2**33, 7, 0.5, True, 0, 0), "parameter 0"),
        (("<Q128siqif?QQ", Q.data_ptr(), b"", 7, 2**33, 5, 0.5, True, 0, 0), "parameter 2: expected 05000000"),
        (("<Q128siqiifQQ", Q.data_ptr(), b"", 5, 2**33, 7, 0, 0.5, True, 0), "parameter 5"),
        (("<Q128siqii?QQ", Q.data_ptr(), b"", 5, 2**33, 7, 1, True, 0, 0), "parameter 5: expected 0000003f"),
        (("<Q128siqif?QQ", Q.data_ptr(), b"", 5, 2**33 % 2**32, 7, 0.5, True, 0, 0), "parameter 3"),
        (("<Q128siqif?QQ", Q.data_ptr(), b"", 5, 2**33, 7, 0.5, False, 0, 0), "parameter 6"),
    ],
    ids=["another tensor", "order", "one too many before it", "type", "cut to 32 bits", "value"],
)
def test_a_launcher_that_hands_over_others_is_found(handed, said):
    handed = struct.pack(*handed)[: len(HANDED)]
    with pytest.raises(AssertionError, match=said):
        compare("_kernel", LISTED, ARGUMENTS, handed)


def test_a_tuple_of_another_length_is_found():
    with pytest.raises(ValueError, match="zip"):
        list(arguments_of(SIGNATURE, VALUES | {"sizes": (7,)}))
