"""Each instruction of the emulator's table against Python, numpy and torch: saturation, rounding, NaN, subnormals."""

import math
import operator
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton

from triton_attn.toolchain.emulator import core, run_ptx

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C++ compiler"),
]

INTEGERS = (0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 255, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
INTEGERS += (1 << 63, (1 << 63) - 1, (1 << 64) - 1, 0x123456789ABCDEF0)
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.5,
    2.5,
    3.5,
    0.1,
    448.0,
    464.0,
    465.0,
    65504.0,
    65519.9,
    65520.0,
    3e38,
    -3e38,
    2**31,
    -(2**31),
)
FLOATS += (1.4e-45, 1e-40, 2**-126, 2**-24, 2**-25, 1.5 * 2**-25, 2**-9, 2**-10, math.inf, -math.inf, math.nan)
FLOATS += (1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 17.0, 19.0, 1.125, 1.375)  # ties
LANES = 64  # of 2 warps

FORMATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
DIGITS = {"f16": (11, -24), "bf16": (8, -133), "f32": (24, -149), "f64": (53, -1074)}


def values_of(kind, seed):
    """LANES bit patterns (int) of a type."""
    rng = np.random.default_rng(seed)
    if kind in FORMATS:
        width = FORMATS[kind].itemsize
        drawn = np.concatenate(
            [rng.permutation(FLOATS), rng.standard_normal(LANES - len(FLOATS)) * 10.0 ** rng.integers(-6, 6)]
        )
        patterns = torch.from_numpy(rng.permutation(drawn)).to(FORMATS[kind]).view(getattr(torch, f"int{8 * width}"))
    else:
        width = int(re.sub(r"\D", "", kind)) // 8 if re.search(r"\d", kind) else 4
        numbers = [*INTEGERS, *rng.integers(0, 1 << 63, LANES - len(INTEGERS)).tolist()]
        patterns = torch.tensor([n - (n >> 63 << 64) for n in rng.permutation(np.array(numbers, np.uint64)).tolist()])
    mask = (1 << 8 * width) - 1
    return [int(p) & mask for p in patterns.tolist()]


def pairs_of(kind, position):
    """Bit patterns so that operands 0 and 1 of an instruction meet all pairs of a type's extremes."""
    if kind in FORMATS:
        info = torch.finfo(FORMATS[kind])
        smallest = info.smallest_normal * info.eps
        extremes = [pattern(kind, x) for x in (0.0, -0.0, -1.5, smallest, info.max, math.inf, -math.inf, math.nan)]
    else:
        bits = int(re.sub(r"\D", "", kind)) if re.search(r"\d", kind) else 32
        extremes = [0, 1, 5, 31, 32, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1]
    places = [(i, j, (i + j) % 8, (i + 3 * j) % 8)[position] for i in range(8) for j in range(8)]
    return [extremes[place] for place in places]


def number(kind, pattern):
    """What a bit pattern means: int, float, bool or a pair of floats (low, high)."""
    if kind == "p":
        return bool(pattern)
    if kind.endswith("x2"):
        width = 8 * FORMATS[kind[:-2]].itemsize
        return tuple(number(kind[:-2], pattern >> i * width & ((1 << width) - 1)) for i in range(2))
    bits = int(kind[-2:]) if kind[-2:].isdigit() else 8
    if kind in FORMATS:
        signed = pattern - (pattern >> bits - 1 << bits)
        return torch.tensor(signed, dtype=getattr(torch, f"int{bits}")).view(FORMATS[kind]).item()
    pattern &= (1 << bits) - 1
    return pattern - (pattern >> bits - 1 << bits) if kind[0] == "s" else pattern


def pattern(kind, value):
    if kind == "p":
        return int(value)
    if kind.endswith("x2"):
        width = 8 * FORMATS[kind[:-2]].itemsize
        return sum(pattern(kind[:-2], value[i]) << i * width for i in range(2))
    if kind in FORMATS:
        bits = 8 * FORMATS[kind].itemsize
        return torch.tensor(value, dtype=FORMATS[kind]).view(getattr(torch, f"int{bits}")).item() & ((1 << bits) - 1)
    return int(value) & ((1 << int(kind[-2:])) - 1)


def rounded(exact, kind):
    """An exact number (Fraction) as the nearest of a format, ties to even."""
    digits, lowest = DIGITS[kind]
    if exact == 0:
        return 0.0
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent += (abs(exact) >= Fraction(2) ** exponent) - (abs(exact) < Fraction(2) ** (exponent - 1))
    unit = Fraction(2) ** max(exponent - digits, lowest)
    result = round(exact / unit) * unit
    largest = {"f16": 65504, "bf16": 0xFF * 2**120, "f32": 0xFFFFFF * 2**104, "f64": (2**53 - 1) * 2**971}[kind]
    magnitude = math.inf if abs(result) > largest else float(abs(result))
    return magnitude if exact > 0 else -magnitude


def exactly(kind, function):
    """A function of numbers, computed exactly and rounded once; by IEEE where an operand is special or the sum is 0."""

    def apply(*operands):
        if all(map(math.isfinite, operands)):
            exact = function(*map(Fraction, operands))
            if exact != 0:
                return rounded(exact, kind)
        with np.errstate(all="ignore"):
            return float(function(*map(np.float64, operands)))

    return apply


def flush(x):
    return math.copysign(0.0, x) if abs(x) < 2**-126 else x


def flushed(function):
    return lambda *operands: flush(function(*map(flush, operands)))


def compared_flushed(function):
    return lambda *operands: function(*map(flush, operands))


def by_numpy(function, dtype=np.float32):
    def apply(*operands):
        with np.errstate(all="ignore"):
            return float(dtype(function(*map(np.float64, operands))))

    return apply


def smaller(a, b):
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return min(a, b, key=lambda x: (x, math.copysign(1, x)))


def larger(a, b):
    return -smaller(-a, -b) if not (math.isnan(a) and math.isnan(b)) else math.nan


def truncated_division(a, b):
    return -(a // -b) if (a < 0) != (b < 0) else a // b


def or_nan(function):
    return lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else function(a, b)


def signed_by_product(function):
    def apply(a, b):
        magnitude = function(abs(a), abs(b))
        return math.copysign(magnitude, math.copysign(1, a) * math.copysign(1, b))

    return apply


def either_nan(a, b):
    return tuple(float(math.isnan(x) or math.isnan(y)) for x, y in zip(a, b))


def truncated_half(a):
    nearest = rounded(Fraction(a), "f16") if math.isfinite(a) and a else a
    if math.isfinite(a) and abs(nearest) > abs(a):
        return number("f16", pattern("f16", nearest) - 1)
    return nearest


def nearest_integer(kind, source, function):
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)

    def apply(x):
        if math.isnan(x):
            return 1 << bits - 1 if bits == 64 or source == "f64" else 0
        return max(low, min(high, function(x))) if math.isfinite(x) else low if x < 0 else high

    return apply


def float8(dtype):
    largest = torch.finfo(dtype).max
    return lambda x: (
        torch.tensor(x).clamp(-largest, largest).to(dtype).view(torch.uint8).item()
        & (0xFF if not math.isnan(x) else 0x7F)
    )


def cases():
    """(opcode, type of the result, types of the operands, function of numbers)"""
    for t in ("s32", "u32", "s64", "u64", "s16", "u16"):
        shift = "u32"
        yield f"add.{t}", t, (t, t), operator.add
        yield f"sub.{t}", t, (t, t), operator.sub
        yield f"mul.lo.{t}", t, (t, t), operator.mul
        yield f"mad.lo.{t}", t, (t, t, t), lambda a, b, c: a * b + c
        yield f"min.{t}", t, (t, t), min
        yield f"max.{t}", t, (t, t), max
        yield f"shr.{t}", t, (t, shift), lambda a, b: a >> min(b, 64)
        for name, compare in zip(
            ("lt", "le", "gt", "ge", "eq", "ne"),
            (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne),
        ):
            yield f"setp.{name}.{t}", "p", (t, t), compare
        yield f"mul.hi.{t}", t, (t, t), lambda a, b, n=int(t[1:]): a * b >> n
        yield f"div.{t}", t, (t, t), lambda a, b: truncated_division(a, b) if b else -1
        yield f"rem.{t}", t, (t, t), lambda a, b: a - b * truncated_division(a, b) if b else a
        if t[1:] != "64":
            double = t[0] + str(2 * int(t[1:]))
            yield f"mul.wide.{t}", double, (t, t), operator.mul
            yield f"mad.wide.{t}", double, (t, t, double), lambda a, b, c: a * b + c
        if t[1:] == "32":
            yield f"mad.hi.{t}", t, (t, t, t), lambda a, b, c: (a * b >> 32) + c
    for t in ("s32", "s64", "s16"):
        yield f"neg.{t}", t, (t,), operator.neg
        yield f"abs.{t}", t, (t,), abs
    yield "min.relu.s32", "s32", ("s32", "s32"), lambda a, b: max(min(a, b), 0)
    yield "max.relu.s32", "s32", ("s32", "s32"), lambda a, b: max(a, b, 0)
    for bits in (16, 32, 64):
        t = f"u{bits}"
        for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
            yield f"{name}.b{bits}", t, (t, t), function
        yield f"not.b{bits}", t, (t,), operator.invert
        yield f"shl.b{bits}", t, (t, "u32"), lambda a, b: a << min(b, 64)
        yield f"selp.b{bits}", t, (t, t, "p"), lambda a, b, c: a if c else b
        yield f"mov.b{bits}", t, (t,), lambda a: a
        yield f"setp.eq.b{bits}", "p", (t, t), operator.eq
        yield f"setp.ne.b{bits}", "p", (t, t), operator.ne
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        yield f"{name}.pred", "p", ("p", "p"), function
    yield "not.pred", "p", ("p",), operator.not_
    yield "mov.pred", "p", ("p",), bool
    for bits in (32, 64):
        yield f"popc.b{bits}", "u32", (f"u{bits}",), lambda a: bin(a).count("1")
        yield f"clz.b{bits}", "u32", (f"u{bits}",), lambda a, n=bits: n - a.bit_length()
        yield f"brev.b{bits}", f"u{bits}", (f"u{bits}",), lambda a, n=bits: int(f"{a:0{n}b}"[::-1], 2)
    yield "bfind.u32", "u32", ("u32",), lambda a: a.bit_length() - 1
    yield "bfe.u32", "u32", ("u32", "u32", "u32"), lambda a, b, c: a >> (b & 255) & ((1 << (c & 255)) - 1)
    yield "bfe.s32", "s32", ("s32", "u32", "u32"), signed_field
    yield "bfi.b32", "u32", ("u32", "u32", "u32", "u32"), inserted
    yield "prmt.b32", "u32", ("u32", "u32", "u32"), permuted
    yield "lop3.b32", "u32", ("u32", "u32", "u32", "u32"), looked_up
    for clamp, limit in (("wrap", lambda c: c % 32), ("clamp", lambda c: min(c, 32))):
        yield f"shf.l.{clamp}.b32", "u32", ("u32", "u32", "u32"), lambda a, b, c, f=limit: (b << 32 | a) << f(c) >> 32
        yield f"shf.r.{clamp}.b32", "u32", ("u32", "u32", "u32"), lambda a, b, c, f=limit: (b << 32 | a) >> f(c)
    yield "pack.b8", "u32", ("u32",) * 4, lambda *x: sum((v & 255) << 8 * i for i, v in enumerate(x))
    yield "pack.b16", "u32", ("u16", "u16"), lambda a, b: a | b << 16
    yield "pack.b32", "u64", ("u32", "u32"), lambda a, b: a | b << 32
    yield "unpack.high.b16", "u16", ("u32",), lambda a: a >> 16

    for opcode in core.entries():  # conversions between integers
        if match := re.fullmatch(r"cvt\.([us]\d+)\.([us]\d+)", opcode):
            target, source = match.groups()
            wide = {"8": "16"}.get(target[1:], target[1:])
            held = source if source[1:] != "8" else source[0] + "32"
            yield opcode, target[0] + wide, (held,), narrowed(source, target)
    for t in ("s32", "u32", "s64", "u64", "s16", "u16"):
        yield f"cvt.rn.f32.{t}", "f32", (t,), lambda a: rounded(Fraction(a), "f32")
    for t in ("s8", "u8"):
        yield f"cvt.rn.f32.{t}", "f32", (f"{t[0]}32",), lambda a, t=t: float(narrowed(t, t)(a))
    for t in ("s32", "u32", "s64", "u64"):
        yield f"cvt.rn.f64.{t}", "f64", (t,), float
    roundings = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}
    for opcode in core.entries():
        if match := re.fullmatch(r"cvt\.(r[znmp]i)\.(ftz\.)?([us](?:32|64))\.(f32|f64)", opcode):
            rounding, flushes, target, source = match.groups()
            function = nearest_integer(target, source, roundings[rounding])
            yield opcode, target, (source,), flushed(function) if flushes else function
    for name, function in (("rmi", np.floor), ("rpi", np.ceil), ("rni", np.rint), ("rzi", np.trunc)):
        yield f"cvt.{name}.f32.f32", "f32", ("f32",), function
        yield f"cvt.{name}.f64.f64", "f64", ("f64",), function
        yield f"cvt.{name}.ftz.f32.f32", "f32", ("f32",), flushed(function)
    yield "cvt.sat.f32.f32", "f32", ("f32",), lambda a: min(a, 1.0) if a > 0 else 0.0
    yield "cvt.ftz.sat.f32.f32", "f32", ("f32",), flushed(lambda a: min(a, 1.0) if a > 0 else 0.0)
    for target, source in (("f32", "f16"), ("f32", "bf16"), ("f64", "f32")):
        yield f"cvt.{target}.{source}", target, (source,), lambda a: a
    for target, source in (("f16", "f32"), ("bf16", "f32"), ("f16", "bf16"), ("bf16", "f16"), ("f32", "f64")):
        yield f"cvt.rn.{target}.{source}", target, (source,), exactly(target, lambda a: a)
    yield "set.nan.f16x2.f16x2", "f16x2", ("f16x2",) * 2, either_nan
    yield "cvt.rz.f16.f32", "f16", ("f32",), truncated_half
    yield "cvt.rz.f16x2.f32", "f16x2", ("f32", "f32"), lambda a, b: (truncated_half(b), truncated_half(a))
    yield "cvt.rz.bf16.f32", "bf16", ("f32",), lambda a: number("f32", pattern("f32", a) >> 16 << 16)
    yield (
        "cvt.rna.tf32.f32",
        "f32",
        ("f32",),
        lambda a: number("f32", pattern("f32", a) + 0x1000 & ~0x1FFF) if math.isfinite(a) else a,
    )
    for t in ("f16", "bf16"):
        one = exactly(t, lambda a: a)
        yield f"cvt.rn.{t}x2.f32", f"{t}x2", ("f32", "f32"), lambda a, b, f=one: (f(b), f(a))
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        to = float8(dtype)
        back = lambda a, d=dtype: torch.tensor(a, dtype=torch.uint8).view(d).item()  # noqa: E731
        yield f"cvt.rn.satfinite.{name}x2.f32", "u16", ("f32", "f32"), lambda a, b, f=to: f(a) << 8 | f(b)
        yield f"cvt.rn.satfinite.{name}x2.f16x2", "u16", ("f16x2",), lambda a, f=to: f(a[1]) << 8 | f(a[0])
        yield f"cvt.rn.f16x2.{name}x2", "f16x2", ("u16",), lambda a, f=back: (f(a & 255), f(a >> 8))

    for t in FORMATS:
        compared = {
            "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq,
            "ne": lambda a, b: a < b or a > b,
        }  # fmt: skip
        nan = lambda a, b: math.isnan(a) or math.isnan(b)  # noqa: E731
        for ftz, flushes in (("", lambda f: f), ("ftz.", compared_flushed))[: 1 + (t == "f32")]:
            for name, function in compared.items():
                yield f"setp.{name}.{ftz}{t}", "p", (t, t), flushes(function)
                of_nan = lambda a, b, f=function, n=nan: f(a, b) or n(a, b)  # noqa: E731
                yield f"setp.{name}u.{ftz}{t}", "p", (t, t), flushes(of_nan)
            yield f"setp.nan.{ftz}{t}", "p", (t, t), nan
            yield f"setp.num.{ftz}{t}", "p", (t, t), lambda a, b, n=nan: not n(a, b)
        signs = {"neg": operator.neg, "abs": abs}
        sums = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
        for name, function in signs.items():
            yield f"{name}.{t}", t, (t,), function
        for name, function in sums.items():
            yield f"{name}.{t}", t, (t, t), exactly(t, function)
        yield f"fma.rn.{t}", t, (t, t, t), exactly(t, lambda a, b, c: a * b + c)
        yield f"min.{t}", t, (t, t), smaller
        yield f"max.{t}", t, (t, t), larger
        if t != "f64":
            yield f"min.NaN.{t}", t, (t, t), or_nan(smaller)
            yield f"max.NaN.{t}", t, (t, t), or_nan(larger)
        if t in ("f16", "bf16"):
            pairs = {name: exactly(t, f) for name, f in sums.items()} | {"min": smaller, "max": larger}
            pairs |= {"min.NaN": or_nan(smaller), "max.NaN": or_nan(larger)}
            for name, f in pairs.items():
                yield f"{name}.{t}x2", f"{t}x2", (f"{t}x2",) * 2, lambda a, b, f=f: tuple(map(f, a, b))
            f = exactly(t, lambda a, b, c: a * b + c)
            yield f"fma.rn.{t}x2", f"{t}x2", (f"{t}x2",) * 3, lambda a, b, c, f=f: tuple(map(f, a, b, c))
            yield f"neg.{t}x2", f"{t}x2", (f"{t}x2",), lambda a: (-a[0], -a[1])
            yield f"abs.{t}x2", f"{t}x2", (f"{t}x2",), lambda a: (abs(a[0]), abs(a[1]))
    sums_of_f32 = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "fma.rn": lambda a, b, c: a * b + c}
    for name, function in sums_of_f32.items():
        count, one = 2 + (name == "fma.rn"), exactly("f32", function)
        yield f"{name}.ftz.f32", "f32", ("f32",) * count, flushed(one)
        for ftz, f in (("", one), (".ftz", flushed(one))):
            yield f"{name}{ftz}.f32x2", "f32x2", ("f32x2",) * count, lambda *pairs, f=f: tuple(map(f, *pairs))
    for name, function in (("min", smaller), ("max", larger)):
        yield f"{name}.ftz.f32", "f32", ("f32", "f32"), flushed(function)
        yield f"{name}.ftz.NaN.f32", "f32", ("f32", "f32"), flushed(or_nan(function))
        yield f"{name}.xorsign.abs.f32", "f32", ("f32", "f32"), signed_by_product(function)
    yield "neg.ftz.f32", "f32", ("f32",), flushed(operator.neg)
    yield "abs.ftz.f32", "f32", ("f32",), flushed(abs)
    yield "sqrt.rn.f64", "f64", ("f64",), by_numpy(np.sqrt, np.float64)
    yield "copysign.f32", "f32", ("f32", "f32"), lambda a, b: np.copysign(b, a)
    yield "div.rn.f64", "f64", ("f64", "f64"), by_numpy(np.divide, np.float64)
    functions = {
        "rcp": lambda a: 1 / a, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "ex2": np.exp2, "lg2": np.log2,
        "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    }  # fmt: skip
    for name, function in functions.items():
        for suffix in (".rn.f32", ".approx.f32"):
            if name + suffix in core.entries():
                yield name + suffix, "f32", ("f32",), by_numpy(function)
        for suffix in (".rn.ftz.f32", ".approx.ftz.f32"):
            if name + suffix in core.entries():
                yield name + suffix, "f32", ("f32",), flushed(by_numpy(function))
    for name in ("div.rn", "div.full", "div.approx"):
        yield f"{name}.f32", "f32", ("f32", "f32"), by_numpy(np.divide)
    for name in ("div.rn", "div.full", "div.approx"):
        yield f"{name}.ftz.f32", "f32", ("f32", "f32"), flushed(by_numpy(np.divide))


def narrowed(source, target):
    bits = int(source[1:])
    value = lambda a: a & ((1 << bits) - 1)  # noqa: E731
    extended = lambda a: value(a) - (value(a) >> bits - 1 << bits) if source[0] == "s" else value(a)  # noqa: E731
    if target[1:] != "8":
        return extended
    return lambda a: (a & 255) - ((a & 128) << 1 if target[0] == "s" else 0)


def signed_field(a, b, c):
    at, width = b & 255, c & 255
    bits = [(a >> min(i, 31)) & 1 for i in range(at, at + width)]
    sign = (a >> min(at + width - 1, 31)) & 1 if width else 0
    bits = [bit if at + i < 32 else sign for i, bit in enumerate(bits)]
    return sum(bit << i for i, bit in enumerate((bits + [sign] * 32)[:32]))


def inserted(a, b, c, d):
    at, width = c & 255, d & 255
    mask = ((1 << width) - 1) << at & 0xFFFFFFFF if at < 32 else 0
    return b & ~mask | a << at & mask


def permuted(a, b, c):
    def byte(select):
        value = (b << 32 | a) >> 8 * (select & 7) & 255
        return value if select < 8 else 255 * (value >> 7)

    return sum(byte(c >> 4 * i & 15) << 8 * i for i in range(4))


def looked_up(a, b, c, table):
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def width_of(kind):
    """Bits of a register."""
    return 32 if kind == "p" else 2 * int(kind[-4:-2]) if kind.endswith("x2") else int(kind[-2:])


# The table is the core's, which only a process that compiles must have built.
CAN_RUN = shutil.which("cc") is not None and not triton.knobs.runtime.interpret
CASES = {opcode: rest for opcode, *rest in cases()} if CAN_RUN else {}
MOVED = {"pack.b8": "mov.b32", "pack.b16": "mov.b32", "pack.b32": "mov.b64", "unpack.high.b16": "mov.b32"}


def kernel(opcode, target, sources, threads):
    """A kernel that applies an instruction to what each thread loads from inputs 0, 1, ... and stores the result."""
    widths = [width_of(t) for t in (target, *sources)]
    prefix = {16: "%h", 32: "%r", 64: "%d"}
    name = lambda i, t: f"%p{i}" if t == "p" else f"{prefix[widths[i]]}{i}"  # noqa: E731
    names = [name(i, t) for i, t in enumerate((target, *sources))]
    code = []
    for i, t in enumerate((target, *sources)):
        code += [f"ld.param.b64 %a{i}, [k_param_{i}];", f"mad.wide.u32 %a{i}, %tid, {widths[i] // 8}, %a{i};"]
        if i:
            code += [f"ld.global.b{widths[i]} {prefix[widths[i]]}{i}, [%a{i}];"]
        if i and t == "p":
            code += [f"and.b32 %r{i}, %r{i}, 1;", f"setp.ne.b32 %p{i}, %r{i}, 0;"]
    if opcode.startswith("pack"):
        code.append(f"{MOVED[opcode]} {names[0]}, {{{', '.join(names[1:])}}};")
    elif opcode.startswith("unpack"):
        code.append(f"mov.b32 {{_, {names[0]}}}, {names[1]};")
    else:
        code.append(f"{opcode} {', '.join(names)};")
    if target == "p":
        code.append("selp.b32 %r0, 1, 0, %p0;")
    code.append(f"st.global.b{widths[0]} [%a0], {prefix[widths[0]]}0;")
    parameters = ", ".join(f".param .u64 k_param_{i}" for i in range(len(names)))
    registers = ".reg .b16 %h<5>; .reg .b32 %r<5>; .reg .b64 %d<5>; .reg .b64 %a<5>; .reg .pred %p<5>; .reg .b32 %tid;"
    body = "\n".join([registers, "mov.u32 %tid, %tid.x;", *code, "ret;"])
    return f".entry k({parameters})\n.reqntid {threads}\n{{\n{body}\n}}\n"


def run(opcode, target, sources):
    """(patterns of each operand, patterns of the results)"""
    inputs = []
    for i, t in enumerate(sources):
        kind = t[:-2] if t.endswith("x2") else "u32" if t == "p" else t
        pairs = [] if len(sources) == 1 else pairs_of(kind, i)
        patterns = pairs + values_of(kind, i)
        if t.endswith("x2"):
            half = width_of(t) // 2
            patterns = [a | b << half for a, b in zip(patterns, pairs[::-1] + values_of(kind, 9 - i))]
        inputs.append(patterns)
    tensors = [signed_tensor(patterns, width_of(t)) for patterns, t in zip(inputs, sources)]
    width = width_of(target)
    out = torch.zeros(len(inputs[0]), dtype=getattr(torch, f"int{width}"))
    arguments = {"out": out} | {f"operand {i}": tensor for i, tensor in enumerate(tensors)}
    assert not run_ptx(kernel(opcode, target, sources, len(out)), arguments)
    inputs = [[x & 1 for x in patterns] if t == "p" else patterns for patterns, t in zip(inputs, sources)]
    return inputs, [x & ((1 << width) - 1) for x in out.tolist()]


def signed_tensor(patterns, bits):
    return torch.tensor([p - (p >> bits - 1 << bits) for p in patterns], dtype=getattr(torch, f"int{bits}"))


def same(kind, got, expected, tolerance):
    if kind.endswith("x2"):
        return all(same(kind[:-2], *both, tolerance) for both in zip(got, expected))
    if kind not in FORMATS or math.isnan(got) or math.isnan(expected):
        return got == expected or (got != got and expected != expected)
    near = got == expected and math.copysign(1, got) == math.copysign(1, expected)
    return near or (tolerance and expected and abs(got - expected) <= tolerance * abs(expected))


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("opcode", CASES)
def test_instruction(opcode):
    target, sources, function = CASES[opcode]
    inputs, results = run(opcode, target, sources)
    tolerance = 3e-7 if re.match(r"ex2|lg2|rsqrt|sin|cos|tanh|rcp|div.*approx|div.full", opcode) else 0
    for patterns, result in zip(zip(*inputs), results):
        operands = [number(t, p) for t, p in zip(sources, patterns)]
        expected = number(target, pattern(target, function(*operands)))
        got = number(target, result)
        assert same(target, got, expected, tolerance), f"{opcode} of {operands}: got {got}, expected {expected}"


@pytest.mark.parametrize(
    "opcode", ["min.f32", "max.f32", "min.NaN.f32", "max.NaN.f32", "max.ftz.f32", "max.ftz.NaN.f32"]
)
def test_the_least_and_the_greatest_of_three(opcode):
    """As from sm_100 on."""
    _, _, of_two = CASES[opcode]
    inputs, results = run(opcode, "f32", ("f32",) * 3)
    for patterns, result in zip(zip(*inputs), results):
        a, b, c = (number("f32", p) for p in patterns)
        expected, got = of_two(of_two(a, b), c), number("f32", result)
        assert same("f32", got, expected, 0), f"{opcode} of {a}, {b}, {c}: got {got}, expected {expected}"


def test_every_instruction_of_the_table_has_a_case():
    spelled = {}
    for opcode, (entry, _) in core.entries().items():
        spelled.setdefault(entry, []).append(opcode)
    missing = [names for names in spelled.values() if not names[0].startswith("@") and not set(names) & set(CASES)]
    assert not missing
