"""Elements of quantized caches, decoded in registers: int8, and fp8 (e4m3 or e5m2) held as uint8.

On NVIDIA GPUs inline PTX decodes four elements at a time. The compiler does not move code that it cannot read: tiles
are decoded in the layout in which they were loaded, 16 bytes a thread. Triton 3.6 to 3.9 move other code behind the
change of layout to that of a matmul's operand, where they load single bytes from shared memory, and where warps of
small tiles decode the same elements.
"""

import triton
import triton.language as tl
from triton.language.target_info import current_target

# PTX from the bytes of $2 to two pairs of numbers, $0 and $1: what comes first, then the code of a pair. LOW and HIGH
# select the pair's bytes for the lower and upper halves of 16 bits, beside bytes of a second operand.
_HEAD = "{ .reg .b32 a, b, c, x, y; .reg .b16 u, v, w, z; .reg .f32 f, g; "
_PAIRS = (("$0", "0x4140", "0x1404", "u"), ("$1", "0x4342", "0x3424", "v"))
_HALVES_TO_BF16 = "mov.b32 {w, z}, a; cvt.f32.f16 f, w; cvt.f32.f16 g, z; cvt.rn.bf16x2.f32 OUT, g, f; "


def _ptx(start, pair):
    """A constant of a kernel, from what comes first and the code of a pair."""
    for out, low, high, half in _PAIRS:
        start += pair.replace("OUT", out).replace("LOW", low).replace("HIGH", high).replace("HALF", half)
    return tl.constexpr(_HEAD + start + "}")


# Bits of 1024 + 128 + x, minus 1152.
_INT8_TO_FP16: tl.constexpr = _ptx(
    "xor.b32 x, $2, 0x80808080; mov.b32 c, 0x64646464; mov.b32 b, 0x64806480; ",
    "prmt.b32 a, x, c, LOW; sub.f16x2 OUT, a, b; ",
)
# x is its lower seven bits minus 128 times the highest one. Bits of 128 + the former, minus 128 or 256: 0x4300 and
# 0x4380 differ in the highest bit of x.
_INT8_TO_BF16: tl.constexpr = _ptx(
    "mov.b32 c, 0xBF80BF80; ",
    "prmt.b32 a, $2, 0, LOW; lop3.b32 b, a, 0x00800080, 0x43004300, 0xEA; "
    "lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA; fma.rn.bf16x2 OUT, b, c, a; ",
)
# e5m2 is the upper half of fp16.
_E5M2_TO_FP16: tl.constexpr = _ptx("", "prmt.b32 OUT, $2, 0, HIGH; ")
_E5M2_TO_BF16: tl.constexpr = _ptx("", "prmt.b32 a, $2, 0, HIGH; " + _HALVES_TO_BF16)
_NATIVE_E4M3_TO_FP16: tl.constexpr = _ptx("mov.b32 {u, v}, $2; ", "cvt.rn.f16x2.e4m3x2 OUT, HALF; ")
_NATIVE_E4M3_TO_BF16: tl.constexpr = _ptx("mov.b32 {u, v}, $2; ", "cvt.rn.f16x2.e4m3x2 a, HALF; " + _HALVES_TO_BF16)
# The bits of the number times 2^-8 or 2^-120, since the exponent has another bias. NaN becomes 480, and gets the
# missing bits of its exponent, if the magnitude plus one carries.
_E4M3_TO_FP16: tl.constexpr = _ptx(
    "mov.b32 c, 0x5C005C00; ",
    "prmt.b32 a, $2, 0, HIGH; shr.u32 b, a, 1; and.b32 b, b, 0x3F803F80; "
    "lop3.b32 a, a, 0x80008000, b, 0xEA; mul.f16x2 a, a, c; add.u32 b, b, 0x00800080; and.b32 b, b, 0x40004000; "
    "shr.u32 x, b, 4; shl.b32 b, b, 1; sub.u32 b, b, x; or.b32 OUT, a, b; ",
)
_E4M3_TO_BF16: tl.constexpr = _ptx(
    "mov.b32 c, 0x7B807B80; mov.b32 x, 0x80008000; ",
    "prmt.b32 a, $2, 0, HIGH; shr.u32 b, a, 4; and.b32 b, b, 0x07F007F0; lop3.b32 a, a, 0x80008000, b, 0xEA; "
    "fma.rn.bf16x2 a, a, c, x; add.u32 b, b, 0x00100010; and.b32 b, b, 0x08000800; "
    "shl.b32 y, b, 4; shr.u32 b, b, 4; sub.u32 b, y, b; or.b32 OUT, a, b; ",
)


@triton.constexpr_function
def is_nvidia():
    """Whether the kernel is compiled for an NVIDIA GPU."""
    target = current_target()
    return target is not None and target.backend == "cuda"


@triton.jit
def decode_float8(bits, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Convert e4m3 (3 mantissa bits) or e5m2 (2) elements to fp16, exactly; NaN stays NaN.

    NATIVE: the GPU has an instruction for it. Otherwise integer arithmetic does it.
    """
    if NATIVE:
        return bits.to(tl.float8e4nv if MANTISSA_BITS == 3 else tl.float8e5, bitcast=True).to(tl.float16)
    bits = bits.to(tl.int16)
    if MANTISSA_BITS == 2:  # the upper half of an fp16 number
        return (bits << 8).to(tl.float16, bitcast=True)
    magnitude = bits & 0x7F
    shifted = ((bits & 0x80) << 8) | (magnitude << 7)
    # The exponent bias is 7 in e4m3 and 15 in fp16.
    values = shifted.to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), values).to(tl.float16)


@triton.constexpr_function
def _may_move():
    """Whether the compiler may move the code after all: Triton 3.6 cannot pipeline it otherwise beside tcgen05."""
    return 100 <= current_target().arch < 120


@triton.jit
def _by_ptx(bits, TO_FP16: tl.constexpr, TO_BF16: tl.constexpr, dtype: tl.constexpr):
    """`decode` by one of two codes."""
    if dtype == tl.float16:
        return tl.inline_asm_elementwise(TO_FP16, "=r,=r,r", [bits], tl.float16, _may_move(), 4)
    else:
        return tl.inline_asm_elementwise(TO_BF16, "=r,=r,r", [bits], tl.bfloat16, _may_move(), 4)


@triton.jit
def decode(bits, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr, dtype: tl.constexpr):
    """The numbers in the given dtype, exactly; NaN stays NaN. MANTISSA_BITS is 3 for e4m3, 2 for e5m2, 7 for int8.

    NATIVE: the GPU has instructions that convert this fp8.
    """
    if not is_nvidia() or dtype == tl.float32:
        if MANTISSA_BITS == 7:
            return bits.to(dtype)
        else:
            return decode_float8(bits, MANTISSA_BITS, NATIVE).to(dtype)
    elif MANTISSA_BITS == 7:
        return _by_ptx(bits, _INT8_TO_FP16, _INT8_TO_BF16, dtype)
    elif MANTISSA_BITS == 2:
        return _by_ptx(bits, _E5M2_TO_FP16, _E5M2_TO_BF16, dtype)
    elif NATIVE:
        return _by_ptx(bits, _NATIVE_E4M3_TO_FP16, _NATIVE_E4M3_TO_BF16, dtype)
    else:
        return _by_ptx(bits, _E4M3_TO_FP16, _E4M3_TO_BF16, dtype)


@triton.jit
def decode_pieces(tile, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr, dtype: tl.constexpr):
    """`decode` of each piece of a tile."""
    first = decode(tile[0], MANTISSA_BITS, NATIVE, dtype)
    if len(tile) > 1:
        return first, decode(tile[1], MANTISSA_BITS, NATIVE, dtype)
    else:
        return (first,)
