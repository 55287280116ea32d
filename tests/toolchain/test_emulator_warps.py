"""Instructions that are more than a function of a lane, against numpy and torch: memory, atomics, matrices, copies,
what the lanes of a warp tell each other, control flow. Layouts are those of the PTX ISA's figures."""

import math
import operator
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_calls import MARKS
from hand_written import kernel

from triton_attn.toolchain.emulator import opcodes, run_ptx

pytestmark = MARKS
BITS = {32: torch.int32, 64: torch.int64}


def run(body, tensors, threads=32, shared_bytes=0, **options):
    """Without a fault, in every way in which asynchronous work may come."""
    before = {name: x.clone() for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    for schedule in ("early", "random", "late"):
        for name, x in before.items():
            tensors[name].copy_(x)
        ptx = kernel(body, threads, tuple(tensors))
        assert not run_ptx(ptx, tensors, shared_bytes=shared_bytes, schedule=schedule, **options)


def bits_of(numbers, bits):
    """Integers as a tensor of their lowest bits."""
    return torch.tensor([(n & ((1 << bits) - 1)) - ((n >> bits - 1 & 1) << bits) for n in numbers], dtype=BITS[bits])


def own(register, size, base="%x"):
    """%`register` is the address of this thread's `size` bytes."""
    return f"mad.wide.u32 {register}, %tid, {size}, {base};"


# ---- ld, st

TYPES = [kind + size for size in ("8", "16", "32", "64") for kind in "bus"] + ["f32", "f64"]
LOADS = [f"ld.{space}.{type_}" for space in ("global", "shared") for type_ in TYPES]


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("opcode", LOADS)
@pytest.mark.parametrize("vector", [1, 2, 4])
def test_loads_and_stores(opcode, vector):
    """Into wider registers signed numbers are extended by their sign, others by 0."""
    _, space, type_ = opcode.split(".")
    size = int(type_[1:]) // 8
    for register_bits in {32, 64} if size < 4 or type_[0] in "us" else {8 * size}:
        if register_bits < 8 * size or size * vector > 16 or register_bits * vector > 128:
            continue
        letter = {32: "%r", 64: "%a"}[register_bits]
        registers = [f"{letter}{10 + i}" for i in range(vector)]
        operand, of_vector = ("{" + ", ".join(registers) + "}", f".v{vector}") if vector > 1 else (registers[0], "")
        there = opcode.replace(type_, f"{of_vector.removeprefix('.')}.{type_}".removeprefix("."))
        to_shared = f"""
        {own("%a0", size * vector)}
        mul.lo.s32 %r1, %tid, {size * vector};
        add.s32 %r1, %r1, global_smem;
        ld.global{of_vector}.b{8 * size} {operand}, [%a0];
        st.shared{of_vector}.b{8 * size} [%r1], {operand};
        """
        body = f"""
        {to_shared if space == "shared" else own("%a0", size * vector)}
        {there} {operand}, [{"%r1" if space == "shared" else "%a0"}];
        {own("%a1", register_bits // 8 * vector, "%out")}
        st.global{of_vector}.b{register_bits} [%a1], {operand};
        """
        x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 32 * vector * size, dtype=np.uint8))
        out = torch.zeros(32 * vector, dtype=BITS[register_bits])
        run(body, {"x": x, "out": out}, shared_bytes=2048)
        expected = x.numpy().view(f"{'i' if type_[0] == 's' else 'u'}{size}").astype(np.int64 if size < 8 else "i8")
        assert out.tolist() == bits_of(expected.tolist(), register_bits).tolist()


@pytest.mark.parametrize(("type_", "expected"), [("s8", -13), ("u8", 243), ("s16", -3341), ("b32", -218959117)])
def test_parameters(type_, expected):
    out = torch.zeros(1, dtype=torch.int32)
    run(f"ld.param.{type_} %r1, [k_n];\nst.global.b32 [%out], %r1;", {"n": 0xF2F2F2F3, "out": out})
    assert out.item() == expected


def test_local_memory():
    """Each lane has its own; here two arrays, the second indexed by the lane."""
    body = f"""
    .local .align 4 .b8 first[4];
    .local .align 16 .b8 second[32];
    mov.b64 %a2, second;
    cvta.local.u64 %a3, %a2;
    cvta.to.local.u64 %a3, %a3;
    and.b32 %r1, %tid, 7;
    mad.wide.u32 %a4, %r1, 4, %a3;
    st.local.b32 [first], %tid;
    st.local.v4.b32 [%a3], {{%r0, %r0, %r0, %r0}};
    st.local.v4.b32 [%a3+16], {{%r0, %r0, %r0, %r0}};
    st.local.b32 [%a4], %tid;
    ld.local.b32 %r2, [first];
    ld.local.b32 %r3, [%a4];
    ld.local.s16 %r4, [%a3];
    add.s32 %r2, %r2, %r3;
    {own("%a0", 8)}
    st.global.v2.b32 [%a0], {{%r2, %r4}};
    """
    x = torch.zeros(64, 2, dtype=torch.int32)
    run(body, {"x": x}, threads=64)
    assert x.tolist() == [[2 * i, i if i % 8 == 0 else 7] for i in range(64)]
    beside = kernel(".local .align 4 .b8 first[4];\nmov.b64 %a1, first;\nst.local.b32 [%a1+4], %tid;")
    (fault,) = run_ptx(beside, {"x": x})
    assert (fault.kind, fault.where) == ("not supported", "planted.py:3")


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_numbers_of_128_bits(operation):
    """By their words: carries go on from one to the next."""
    numbers = [0, 1, (1 << 32) - 1, 1 << 32, (1 << 64) - 1, 1 << 96, (1 << 128) - 1, 0x0123456789ABCDEF << 50]
    pairs = [(a, b) for a in numbers for b in numbers]
    read = [f"ld.global.b32 %r{10 + i}, [%a0+{4 * i}];" for i in range(8)]  # words of a, then of b
    if operation == "mul":  # of a by the lowest word of b
        code = ["mul.lo.u32 %r20, %r10, %r14;", "mul.hi.u32 %r21, %r10, %r14;", "mad.lo.cc.u32 %r21, %r11, %r14, %r21;"]
        code += ["madc.hi.cc.u32 %r22, %r11, %r14, 0;", "madc.hi.u32 %r23, %r12, %r14, 0;"]
        code += ["mad.lo.cc.u32 %r22, %r12, %r14, %r22;", "madc.lo.u32 %r23, %r13, %r14, %r23;"]
        right = lambda a, b: a * (b & 0xFFFFFFFF)  # noqa: E731
    else:
        code = [f"{operation}.cc.u32 %r20, %r10, %r14;"]
        code += [f"{operation}c.cc.u32 %r{20 + i}, %r{10 + i}, %r{14 + i};" for i in (1, 2)]
        code += [f"{operation}c.u32 %r23, %r13, %r17;"]
        right = {"add": operator.add, "sub": operator.sub}[operation]
    words_of = lambda n: [n >> 32 * i & 0xFFFFFFFF for i in range(4)]  # noqa: E731
    x = bits_of([word for pair in pairs for n in pair for word in words_of(n)], 32).view(-1, 8)
    out = torch.zeros(len(pairs), 4, dtype=torch.int32)
    store = "st.global.v4.b32 [%a1], {%r20, %r21, %r22, %r23};"
    run("\n".join([own("%a0", 32), own("%a1", 16, "%out"), *read, *code, store]), {"x": x, "out": out}, len(pairs))
    for (a, b), got in zip(pairs, out.tolist()):
        assert got == bits_of(words_of(right(a, b)), 32).tolist(), (a, b)


# ---- atom, red

INTEGERS = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
FLOATS = (0.0, -0.0, 1.0, -1.5, 3e-39, -1e-40, 1e-45, 2**-126, -(2**-126), 65504.0, 3e38, math.inf, -math.inf, math.nan)
FORMATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
OF_INTEGERS = {
    "add": operator.add, "min": min, "max": max, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "exch": lambda a, b: b, "inc": lambda a, b: 0 if a >= b else a + 1,
    "dec": lambda a, b: b if a == 0 or a > b else a - 1,
}  # fmt: skip
ATOMICS = [f"{op}.{t}" for op in ("add", "min", "max") for t in ("u32", "s32", "u64", "s64")]
ATOMICS.remove("add.s64")
ATOMICS += [f"{op}.b{n}" for op in ("and", "or", "xor", "exch", "cas") for n in (32, 64)] + ["inc.u32", "dec.u32"]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("operation", ATOMICS)
def test_atomics_of_integers(operation, space):
    name, type_ = operation.split(".")
    bits, pairs = int(type_[1:]), [(a, b) for a in INTEGERS for b in INTEGERS]
    mask = (1 << bits) - 1
    x, y, old = (torch.zeros(len(pairs), dtype=BITS[bits]) for _ in range(3))
    x.copy_(bits_of([a for a, _ in pairs], bits)), y.copy_(bits_of([b for _, b in pairs], bits))
    letter = {32: "%r", 64: "%a"}[bits]
    compared = f"{letter}10, " if name == "cas" else ""  # with what is there in every second thread
    atomic(f"atom.{space}.{operation} {letter}12, [ADDRESS], {compared}{letter}11;", bits, x, y, old)

    def value(pattern):
        pattern &= mask
        return pattern - (pattern >> bits - 1 << bits) if type_[0] == "s" else pattern

    for i, (a, b) in enumerate((value(a), value(b)) for a, b in pairs):
        compare = a if i % 2 else a ^ 1
        expected = (b if a == compare else a) if name == "cas" else OF_INTEGERS[name](a, b)
        assert value(old[i].item()) == a
        assert value(x[i].item()) == value(expected), f"{operation} of {a} and {b}"


def atomic(instruction, bits, x, y, old=None):
    """Each thread's own element of x, and of y; in shared memory x is copied there and back."""
    letter, size, shared = {32: "%r", 64: "%a"}[bits], bits // 8, ".shared" in instruction
    body = f"""
    {own("%a0", size)}
    {own("%a1", size, "%y")}
    {own("%a2", size, "%old")}
    mul.lo.s32 %r1, %tid, {size};
    add.s32 %r1, %r1, global_smem;
    ld.global.b{bits} {letter}10, [%a0];
    ld.global.b{bits} {letter}11, [%a1];
    {f"st.shared.b{bits} [%r1], {letter}10;" if shared else ""}
    and.b32 %r2, %tid, 1;
    xor.b32 %r2, %r2, 1;
    {"cvt.u64.u32 %a3, %r2; xor.b64 %a10, %a10, %a3;" if bits == 64 else "xor.b32 %r10, %r10, %r2;"}
    mov.b{bits} {letter}12, 0;
    {instruction.replace("ADDRESS", "%r1" if shared else "%a0")}
    st.global.b{bits} [%a2], {letter}12;
    {f"ld.shared.b{bits} {letter}13, [%r1]; st.global.b{bits} [%a0], {letter}13;" if shared else ""}
    """
    old = torch.zeros_like(x) if old is None else old
    run(body, {"x": x, "y": y, "old": old}, threads=len(x), shared_bytes=len(x) * size)


@pytest.mark.parametrize("form", ["atom.global", "red.global.gpu.relaxed", "atom.shared"])
@pytest.mark.parametrize("type_", FORMATS)
def test_atomic_sums_of_floats(type_, form):
    """Of f32 in global memory subnormal numbers are flushed, operands and sums; nowhere else."""
    dtype = FORMATS[type_]
    a, b = torch.tensor([(a, b) for a in FLOATS for b in FLOATS], dtype=torch.float64).to(dtype).unbind(1)
    a, b = (torch.cat([x, torch.zeros(-len(x) % 64, dtype=dtype)]).contiguous() for x in (a, b))
    noftz = ".noftz" if type_ in ("f16", "bf16") else ""
    bits = max(32, torch.finfo(dtype).bits)
    if bits > torch.finfo(dtype).bits:  # two in a register, as a pair
        type_ += "x2"
    letter = {32: "%r", 64: "%a"}[bits]
    result = f"{letter}12, " if form.startswith("atom") else ""
    x, y = a.clone().view(BITS[bits]), b.view(BITS[bits])
    atomic(f"{form}.add{noftz}.{type_} {result}[ADDRESS], {letter}11;", bits, x, y)

    def flushed(x):
        return torch.where(x.abs() < 2**-126, torch.zeros_like(x).copysign(x), x) if "global" in form else x

    exact = (flushed(flushed(a) + flushed(b)) if type_ == "f32" else a + b).to(dtype)
    got = x.view(dtype)
    torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit() & ~got.isnan(), exact.signbit() & ~exact.isnan())


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_atomic_sums_of_one_half(type_):
    x = torch.arange(32).to(FORMATS[type_])
    body = f"{own('%a0', 2)}\nmov.b16 %h1, 0x3F80;\natom.global.add.noftz.{type_} %h2, [%a0], %h1;"
    run(body, {"x": x})
    one = torch.tensor(0x3F80, dtype=torch.int16).view(FORMATS[type_])
    assert torch.equal(x, torch.arange(32).to(FORMATS[type_]) + one)


@pytest.mark.parametrize("vector", [2, 4])
def test_atomics_of_vectors(vector):
    x, old = torch.arange(32.0 * vector), torch.zeros(32 * vector)
    names = [[f"%f{i}" for i in range(at, at + vector)] for at in (1, 11)]
    values, results = ("{" + ", ".join(of_one) + "}" for of_one in names)
    moves = "\n".join(f"mov.f32 {name}, 0f3F000000;" for name in names[0])
    body = f"{own('%a0', 4 * vector)}\n{own('%a1', 4 * vector, '%old')}\n{moves}\n"
    body += f"atom.global.v{vector}.f32.add {results}, [%a0], {values};".replace(
        f".v{vector}.f32.add", f".add.v{vector}.f32"
    )
    run(body + f"\nst.global.v{vector}.f32 [%a1], {results};", {"x": x, "old": old})
    assert torch.equal(old, torch.arange(32.0 * vector))
    assert torch.equal(x, old + 0.5)


@pytest.mark.parametrize("space", ["global", "shared"])
def test_threads_that_add_to_one_element_see_each_sum_once(space):
    x, old = torch.zeros(1, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    address = "[%x]" if space == "global" else "[global_smem]"
    body = f"""
    @%leader st.shared.b32 [global_smem], 0;
    bar.sync 0;
    atom.{space}.add.u32 %r1, {address}, 1;
    {own("%a0", 4, "%old")}
    st.global.b32 [%a0], %r1;
    """
    run(body, {"x": x, "old": old}, threads=128, shared_bytes=16)
    assert sorted(old.tolist()) == list(range(128))


# ---- ldmatrix, stmatrix, mma, wgmma


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["ldmatrix", "stmatrix"])
def test_matrices_of_8_by_8(name, count, transposed):
    """Lanes 8 j to 8 j + 7 have the addresses of the rows of matrix j; lane l holds two elements of row l / 4."""
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    fragments = (matrices.mT if transposed else matrices).reshape(count, 32, 2).contiguous().view(torch.int32)[..., 0]
    rows = f"and.b32 %r1, %lane, {8 * count - 1}; shl.b32 %r1, %r1, 4; add.s32 %r1, %r1, global_smem;"
    operand = f"sync.aligned.m8n8.x{count}{transposed}.shared.b16"
    out = torch.zeros(count * 32, dtype=torch.int32)
    if name == "ldmatrix":
        copies = "".join(
            f"ld.global.b32 %r2, [%a0+{128 * i}]; st.shared.b32 [%s+{128 * i}], %r2;\n" for i in range(count)
        )
        stores = "".join(f"st.global.b32 [%a1+{128 * i}], %r{10 + i};\n" for i in range(count))
        body = f"{copies}bar.sync 0;\n{rows}\nldmatrix.{operand} {{{registers}}}, [%r1];\n{stores}"
        x, expected = matrices.view(torch.int32).flatten(), fragments.flatten()
    else:
        loads = "".join(f"ld.global.b32 %r{10 + i}, [%a0+{128 * i}];\n" for i in range(count))
        copies = "".join(
            f"ld.shared.b32 %r2, [%s+{128 * i}]; st.global.b32 [%a1+{128 * i}], %r2;\n" for i in range(count)
        )
        body = f"{loads}{rows}\nstmatrix.{operand} [%r1], {{{registers}}};\nbar.sync 0;\n{copies}"
        x, expected = fragments.flatten(), matrices.view(torch.int32).flatten()
    run(f"{own('%a0', 4)}\n{own('%a1', 4, '%out')}\n{body}", {"x": x.clone(), "out": out}, shared_bytes=512)
    assert torch.equal(out, expected)


PRODUCTS = {
    "f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}  # fmt: skip


def factors(type_, rows, depth, columns, special):
    """Two matrices whose products are exact in fp32; what a type leaves out of its values is noise."""
    rng = np.random.default_rng(rows + columns)
    a, b = (torch.from_numpy(rng.integers(-3, 4, shape) / 2).float() for shape in ((rows, depth), (depth, columns)))
    smallest = {"f16": 2**-24, "bf16": 2.0**-133, "tf32": 2.0**-136, "e4m3": 2**-9, "e5m2": 2**-16}[type_]
    if special:
        a[1, 2], a[2, 0], b[0, 3] = math.nan, smallest, 1.0
        a[2, 1:] = 0
        if type_ != "e4m3":
            a[3, 1], a[4, 1], b[1] = math.inf, -math.inf, 1.0
    a, b = a.to(PRODUCTS[type_]), b.to(PRODUCTS[type_])
    exact = a.double() @ b.double()
    if type_ == "tf32":
        a, b = ((x.view(torch.int32) | 0x1ABC * x.isfinite().int()).view(torch.float32) for x in (a, b))
    return a.contiguous(), b.contiguous(), exact


def words(x):
    """Its elements, as many as fill 32 bits together."""
    return x.contiguous().view(torch.uint8).flatten().view(torch.int32)


def fragments_of_a(a):
    """(lanes, registers): register j of lane l has row l / 4 + 8 (j % 2), and as many columns as fit, from
    (l % 4) times that many on, in the second half of the columns for j > 1."""
    per = 4 // a.element_size()
    return torch.stack(
        [
            torch.cat([words(a[lane // 4 + 8 * (j % 2), at : at + per]) for j in range(a.shape[1] // (4 * per) * 2)
                       for at in [lane % 4 * per + j // 2 * 4 * per]])
            for lane in range(32)
        ]
    )  # fmt: skip


def fragments_of_d(d):
    """(lanes, registers) of 16 rows: two columns each of row l / 4 and of row l / 4 + 8, then 8 columns on."""
    columns = d.shape[1]
    row = lambda lane, j: lane // 4 + 8 * (j // 2 % 2)  # noqa: E731
    return torch.tensor(
        [[d[row(lane, j), j // 4 * 8 + lane % 4 * 2 + j % 2].item() for j in range(columns // 2)] for lane in range(32)]
    )


MMA = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8), "e4m3": (16, 32), "e5m2": (16, 32)}
MMA = [f"mma.sync.aligned.m16n8k{k}.row.col.f32.{t}.{t}.f32" for t, depths in MMA.items() for k in depths]


@pytest.mark.parametrize("special", [False, True], ids=["exact", "special"])
@pytest.mark.parametrize("opcode", MMA)
def test_mma(opcode, special):
    depth, type_ = int(re.search(r"k(\d+)", opcode)[1]), opcode.split(".")[-2]
    a, b, exact = factors(type_, 16, depth, 8, special)
    c = torch.arange(128.0).view(16, 8) * (not special)
    of_a, of_b = fragments_of_a(a), fragments_of_a(torch.cat([b.mT, b.mT]))[:, ::2]
    inputs = torch.cat([of_a, of_b, fragments_of_d(c).view(torch.int32)], 1)
    count, num_a, num_b = inputs.shape[1], of_a.shape[1], of_b.shape[1]
    loads = "\n".join(f"ld.global.b32 %r{10 + i}, [%a0+{4 * i}];" for i in range(count))
    names = [f"%r{10 + i}" for i in range(count)]
    a_regs, b_regs, c_regs = (
        ", ".join(part) for part in (names[:num_a], names[num_a : num_a + num_b], names[num_a + num_b :])
    )
    stores = "\n".join(f"st.global.b32 [%a1+{4 * i}], %f{1 + i};" for i in range(4))
    body = f"{own('%a0', 4 * count)}\n{own('%a1', 16, '%out')}\n{loads}\n"
    body += f"{opcode} {{%f1, %f2, %f3, %f4}}, {{{a_regs}}}, {{{b_regs}}}, {{{c_regs}}};\n{stores}"
    out = torch.zeros(32, 4)
    run(body, {"x": inputs.contiguous(), "out": out})
    expected = fragments_of_d((c + exact).float())
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


WITH_OTHER_SUMS = [f"mma.sync.aligned.m16n8k{k}.row.col.f16.f16.f16.f16" for k in (8, 16)]
WITH_OTHER_SUMS += [
    f"mma.sync.aligned.m16n8k{k}.row.col.{s}s32.{t}.{t}.s32" for k in (16, 32) for t in ("s8", "u8")
    for s in ("", "satfinite.")
]  # fmt: skip


def other_sums(opcode, rows, depth, columns):
    """(a, b, c, what their product is, registers of c or of what is like it) where sums are halves or integers."""
    rng = np.random.default_rng(depth)
    if ".f16.f16.f16" in opcode:
        a, b, exact = factors("f16", rows, depth, columns, False)
        c = (torch.arange(rows * columns).view(rows, columns) % 64 / 2).half()
        return a, b, c, (c.double() + exact).half()
    dtype = torch.uint8 if ".u8" in opcode else torch.int8
    info = torch.iinfo(dtype)
    a, b = (
        torch.from_numpy(rng.integers(info.min, info.max + 1, n)).to(dtype) for n in ((rows, depth), (depth, columns))
    )
    limits = torch.tensor([0, 7, 2**31 - 1, -(2**31)])
    c = limits[torch.arange(rows * columns) % 4].view(rows, columns)
    exact = c + a.long() @ b.long()
    exact = exact.clamp(-(2**31), 2**31 - 1) if "satfinite" in opcode else exact
    return a.contiguous(), b.contiguous(), c.int(), exact.int()


def registers_of_d(d):
    """Fragments, two halves in a register."""
    fragments = torch.stack([fragments_of_d(rows) for rows in d.split(16)]).flatten(0, 1).to(d.dtype)
    return fragments.contiguous().view(torch.int32)


@pytest.mark.parametrize("opcode", WITH_OTHER_SUMS)
def test_mma_of_integers_and_in_halves(opcode):
    a, b, c, expected = other_sums(opcode, 16, int(re.search(r"k(\d+)", opcode)[1]), 8)
    of_a, of_b, of_c = fragments_of_a(a), fragments_of_a(torch.cat([b.mT, b.mT]))[:, ::2], registers_of_d(c)
    inputs = torch.cat([of_a, of_b, of_c], 1)
    names, at = [f"%r{10 + i}" for i in range(inputs.shape[1])], of_a.shape[1] + of_b.shape[1]
    groups = ["{" + ", ".join(x) + "}" for x in (names[: of_a.shape[1]], names[of_a.shape[1] : at], names[at:])]
    body = f"{own('%a0', 4 * len(names))}\n{own('%a1', 4 * of_c.shape[1], '%out')}\n"
    body += "\n".join(f"ld.global.b32 {name}, [%a0+{4 * i}];" for i, name in enumerate(names))
    body += f"\n{opcode} {groups[2]}, {', '.join(groups)};\n"
    body += "\n".join(f"st.global.b32 [%a1+{4 * i}], {name};" for i, name in enumerate(names[at:]))
    out = torch.zeros_like(of_c)
    run(body, {"x": inputs.contiguous(), "out": out})
    assert torch.equal(out, registers_of_d(expected))


def in_shared_memory(matrix, swizzle, k_major):
    """(bytes, leading and stride offset) of a matrix (rows or columns, k) in the canonical layouts of wgmma."""
    (rows, depth), size = matrix.shape, matrix.element_size()
    row, i, k = 16 << swizzle, *np.indices((rows, depth))
    if k_major and swizzle:
        leading, stride = 16, 8 * row
        offset = i % 8 * row + i // 8 * stride + k * size
    elif k_major:
        leading, stride = 128, 256
        offset = i % 8 * 16 + i // 8 * stride + k * size // 16 * leading + k * size % 16
    elif swizzle:
        leading, stride, width = 16 * row, 8 * row, row // size
        offset = i // width * leading + i % width * size + k % 8 * row + k // 8 * stride
    else:
        leading, stride, width = 128, 256, 16 // size
        offset = i // width * stride + i % width * size + k % 8 * 16 + k // 8 * leading
    offset ^= (offset >> 7 & ((1 << swizzle) - 1)) << 4
    image = np.zeros(8192, np.uint8)
    data = matrix.contiguous().view(torch.uint8).view(rows, depth, size).numpy()
    for byte in range(size):
        image[offset + byte] = data[..., byte]
    return torch.from_numpy(image), leading, stride


WGMMA = [f"wgmma.mma_async.sync.aligned.m64n16k{32 // (1 if t[0] == 'e' else 4 if t == 'tf32' else 2)}.f32.{t}.{t}"
         for t in PRODUCTS]  # fmt: skip


OPERANDS = [(opcode, a_from) for opcode in WGMMA for a_from in ("registers", "k-major")]
OPERANDS += [(opcode, "m-major") for opcode in WGMMA if "16.f32" in opcode]  # only halves are transposed


@pytest.mark.parametrize("special", [False, True], ids=["exact", "special"])
@pytest.mark.parametrize("swizzle", range(4))
@pytest.mark.parametrize(("opcode", "a_from"), OPERANDS)
def test_wgmma(opcode, swizzle, a_from, special):
    """With signs, with and without what the accumulators hold; b is n-major where a is m-major."""
    type_, depth = opcode.split(".")[-1], int(re.search(r"k(\d+)", opcode)[1])
    major = a_from == "m-major"
    a, b, exact = factors(type_, 64, depth, 16, special)
    adds, sign_a, sign_b = swizzle % 2, (1, -1)[swizzle // 2], (1, -1)[swizzle % 2]
    c = torch.arange(64.0 * 16).view(64, 16) * (not special)
    of_a, of_b = in_shared_memory(a, swizzle, not major), in_shared_memory(b.mT, swizzle, not major)
    image = torch.cat([of_a[0], of_b[0]]).view(torch.int32)
    mode = (0, 3, 2, 1)[swizzle] << 62
    descriptors = [
        (start >> 4) | leading >> 4 << 16 | stride >> 4 << 32 | mode
        for start, (_, leading, stride) in ((1024, of_a), (1024 + 8192, of_b))
    ]
    per_warp = torch.cat([fragments_of_a(rows) for rows in a.view(4, 16, depth)])
    of_c = torch.cat([fragments_of_d(rows) for rows in c.view(4, 16, 16)])
    inputs = torch.cat([per_warp, of_c.view(torch.int32)], 1)
    copies = "\n".join(f"ld.global.b32 %r1, [%a0+{512 * i}]; st.shared.b32 [%s+{512 * i}], %r1;" for i in range(32))
    loads = "\n".join(f"ld.global.b32 %r{10 + i}, [%a2+{4 * i}];" for i in range(4))
    loads += "\n" + "\n".join(f"ld.global.b32 %f{1 + i}, [%a2+{16 + 4 * i}];" for i in range(8))
    stores = "\n".join(f"st.global.b32 [%a1+{4 * i}], %f{1 + i};" for i in range(8))
    of_d = "{" + ", ".join(f"%f{1 + i}" for i in range(8)) + "}"
    operand_a = "{%r10, %r11, %r12, %r13}" if a_from == "registers" else "%a3"
    transposed = {"registers": [0], "k-major": [0, 0], "m-major": [1, 1]}[a_from] if type_ in ("f16", "bf16") else []
    body = f"""
    {own("%a0", 4)}
    {own("%a1", 32, "%out")}
    {own("%a2", 48, "%inputs")}
    mov.b64 %a3, {descriptors[0]};
    mov.b64 %a4, {descriptors[1]};
    {copies}
    {loads}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.b32 %p1, {adds}, 0;
    wgmma.fence.sync.aligned;
    {opcode} {of_d}, {operand_a}, %a4, %p1, {", ".join(map(str, [sign_a, sign_b, *transposed]))};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {stores}
    """
    out = torch.zeros(128, 8)
    run(body, {"x": image, "inputs": inputs.contiguous(), "out": out}, threads=128, shared_bytes=16384)
    d = (c * adds + sign_a * sign_b * exact).float()
    expected = torch.cat([fragments_of_d(rows) for rows in d.view(4, 16, 16)])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


WGMMA_OF_INTEGERS = [
    f"wgmma.mma_async.sync.aligned.m64n16k32.{s}s32.{t}.{t}" for t in ("s8", "u8") for s in ("", "satfinite.")
]


@pytest.mark.parametrize("adds", [0, 1])
@pytest.mark.parametrize("opcode", WGMMA_OF_INTEGERS)
def test_wgmma_of_integers(opcode, adds):
    a, b, c, expected = other_sums(opcode, 64, int(re.search(r"k(\d+)", opcode)[1]), 16)
    if not adds:
        expected = (a.double() @ b.double()).to(c.dtype)
    (image_a, *_), (image_b, _, stride) = (in_shared_memory(x, 1, True) for x in (a, b.mT))
    descriptors = [(start >> 4) | stride >> 4 << 32 | 3 << 62 for start in (1024, 1024 + 8192)]
    of_c = registers_of_d(c)
    count = of_c.shape[1]
    copies = "\n".join(f"ld.global.b32 %r1, [%a0+{512 * i}]; st.shared.b32 [%s+{512 * i}], %r1;" for i in range(32))
    sums = [f"%r{10 + i}" for i in range(count)]
    body = f"""
    {own("%a0", 4)}
    {own("%a1", 4 * count, "%sums")}
    mov.b64 %a3, {descriptors[0]};
    mov.b64 %a4, {descriptors[1]};
    {copies}
    {" ".join(f"ld.global.b32 {name}, [%a1+{4 * i}];" for i, name in enumerate(sums))}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.b32 %p1, {adds}, 0;
    wgmma.fence.sync.aligned;
    {opcode} {{{", ".join(sums)}}}, %a3, %a4, %p1;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {" ".join(f"st.global.b32 [%a1+{4 * i}], {name};" for i, name in enumerate(sums))}
    """
    sums_there = of_c.clone()
    run(body, {"x": torch.cat([image_a, image_b]).view(torch.int32), "sums": sums_there}, 128, 16384)
    assert torch.equal(sums_there, registers_of_d(expected))


# ---- asynchronous copies


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("source_bytes", ["", ", 0", ", 3", ", %r2"])
def test_cp_async(size, source_bytes):
    """What is not read is 0."""
    cache = "cg" if size == 16 else "ca"
    body = f"""
    {own("%a0", size)}
    mul.lo.s32 %r1, %tid, {size};
    add.s32 %r1, %r1, global_smem;
    and.b32 %r2, %tid, 3;
    cp.async.{cache}.shared.global [%r1], [%a0], {size}{source_bytes};
    cp.async.commit_group;
    cp.async.wait_all;
    {own("%a1", size, "%out")}
    """ + "\n".join(f"ld.shared.b32 %r3, [%r1+{4 * i}]; st.global.b32 [%a1+{4 * i}], %r3;" for i in range(size // 4))
    x = torch.arange(32 * size, dtype=torch.int32).to(torch.uint8).view(32, size) | 1
    out = torch.zeros_like(x)
    run(body, {"x": x, "out": out}, shared_bytes=32 * size)
    read = {"": torch.full((32, 1), size), ", %r2": (torch.arange(32) % 4)[:, None]}.get(source_bytes)
    read = torch.full((32, 1), int(source_bytes[2:])) if read is None else read
    assert torch.equal(out, torch.where(torch.arange(size) < read, x, 0))


ELEMENTS = {"u8": (0, torch.uint8), "s32": (3, torch.int32), "f16": (6, torch.float16), "f32": (7, torch.float32)}
ELEMENTS |= {"f64": (9, torch.float64), "bf16": (10, torch.bfloat16), "tf32": (11, torch.float32)}
ELEMENTS |= {"tf32.ftz": (12, torch.float32)}


def tensor_map(x, box, number, swizzle, nan=False):
    """Makes one of a contiguous tensor in %map, by the first thread."""
    fields = [("global_address", "64", "%x"), ("rank", "32", x.dim() - 1), ("elemtype", "32", number)]
    fields += [("interleave_layout", "32", 0), ("swizzle_mode", "32", swizzle), ("fill_mode", "32", int(nan))]
    for i in range(x.dim()):
        fields += [("box_dim", "32", f"{i}, {box[-1 - i]}"), ("global_dim", "32", f"{i}, {x.shape[-1 - i]}")]
        fields.append(("element_stride", "32", f"{i}, 1"))
        if i:
            fields.append(("global_stride", "64", f"{i - 1}, {x.stride(-1 - i) * x.element_size()}"))
    return "\n".join(
        f"@%leader tensormap.replace.tile.{name}.global.b1024.b{bits} [%map], {value};" for name, bits, value in fields
    )


def swizzled_image(rows, swizzle):
    """The bytes of a box (rows, bytes of a row) where the swizzle has them."""
    image = rows.reshape(-1).clone()
    offset = np.arange(0, len(image), 16)
    to = offset ^ (offset >> 7 & ((1 << swizzle) - 1)) << 4
    for old, new in zip(offset, to):
        image[new : new + 16] = rows.reshape(-1)[old : old + 16]
    return image


def aligned_map():
    buffer = torch.zeros(192, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    return buffer[start : start + 128]


def box_of(x, at, box, fill):
    """Elements of x at coordinates (the outermost dimension first), `fill` beside it."""
    index = np.indices(box) + np.reshape(at, (-1, *[1] * len(box)))
    inside = np.all([(i >= 0) & (i < size) for i, size in zip(index, x.shape)], axis=0)
    inside = torch.from_numpy(inside)
    values = x[tuple(torch.from_numpy(i.clip(0, size - 1)) for i, size in zip(index, x.shape))]
    return torch.where(inside, values, torch.full_like(values, fill)), inside


BOXES = [  # shape of the tensor, box, coordinates
    ((40,), (16,), (8,)),
    ((40,), (16,), (30,)),
    ((10, 32), (4, 16), (8, 0)),
    ((10, 32), (4, 16), (-2, -4)),
    ((3, 5, 16), (2, 4, 16), (2, -1, 8)),
    ((2, 3, 4, 16), (1, 2, 4, 16), (1, 2, 1, 0)),
    ((2, 2, 3, 4, 16), (2, 1, 2, 2, 16), (1, 1, -1, 3, 4)),
]


@pytest.mark.parametrize("swizzle", range(4))
@pytest.mark.parametrize("type_", ELEMENTS)
def test_tensor_copies_to_shared_memory(type_, swizzle):
    number, dtype = ELEMENTS[type_]
    size = dtype.itemsize
    nan = dtype.is_floating_point and swizzle % 2 == 1
    for shape, box, at in BOXES:
        if box[-1] * size > (16 << swizzle if swizzle else 1024):
            continue
        x = torch.arange(1, 1 + math.prod(shape)).to(dtype).view(shape)
        count = math.prod(box) * size
        coordinates = ", ".join(str(i) for i in reversed(at))
        body = f"""
        {tensor_map(x, box, number, swizzle, nan)}
        @%leader mbarrier.init.shared::cta.b64 [global_smem+2048], 1;
        bar.sync 0;
        @%leader mbarrier.arrive.expect_tx.shared::cta.b64 _, [global_smem+2048], {count};
        mov.b32 %r5, global_smem;
        add.s32 %r6, %r5, 2048;
        @%leader {load_opcode(len(box))} [%r5], [%map, {{{coordinates}}}], [%r6];
        wait: mbarrier.try_wait.parity.shared::cta.b64 %p0, [global_smem+2048], 0;
        @!%p0 bra wait;
        {own("%a1", 4, "%out")}
        setp.lt.u32 %p1, %tid, {count // 4};
        @%p1 ld.shared.b32 %r1, [%s];
        @%p1 st.global.b32 [%a1], %r1;
        """
        out = torch.zeros(count, dtype=torch.uint8)
        run(body, {"x": x, "map": aligned_map(), "out": out}, threads=512, shared_bytes=2056)
        expected, inside = box_of(x, at, box, math.nan if nan else 0)
        got = torch.empty_like(out)
        to = np.arange(0, count, 16)
        for i in to:
            j = i ^ (i >> 7 & ((1 << swizzle) - 1)) << 4
            got[i : i + 16] = out[j : j + 16]
        got = got.view(dtype).view(box)
        assert torch.equal(got[inside], expected[inside])
        assert got[~inside].isnan().all() if nan else not got[~inside].any()


def test_a_tensor_map_made_in_shared_memory():
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    made = tensor_map(x, (16,), 3, 0).replace(".global.b1024", ".shared::cta.b1024").replace("%map", "%r7")
    body = f"""
    mov.b32 %r7, global_smem;
    add.s32 %r7, %r7, 1024;
    {made}
    @%leader mbarrier.init.shared::cta.b64 [global_smem+512], 1;
    bar.sync 0;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%map], [%r7], 128;
    @%leader mbarrier.arrive.expect_tx.shared::cta.b64 _, [global_smem+512], 64;
    mov.b32 %r5, global_smem;
    add.s32 %r6, %r5, 512;
    @%leader {load_opcode(1)} [%r5], [%map, {{24}}], [%r6];
    wait: mbarrier.try_wait.parity.shared::cta.b64 %p0, [global_smem+512], 0;
    @!%p0 bra wait;
    {own("%a1", 4, "%out")}
    setp.lt.u32 %p1, %tid, 16;
    @%p1 ld.shared.b32 %r1, [%s];
    @%p1 st.global.b32 [%a1], %r1;
    """
    run(body, {"x": x, "map": aligned_map(), "out": out}, shared_bytes=1152)
    assert out.tolist() == list(range(24, 40))


@pytest.mark.parametrize("field", ["element_stride", "interleave_layout", "elemtype"])
def test_fields_of_tensor_maps_that_are_not_emulated(field):
    x, value = torch.zeros(128, dtype=torch.uint8), {"element_stride": "0, 2", "elemtype": "13"}.get(field, "1")
    body = f"@%leader tensormap.replace.tile.{field}.global.b1024.b32 [%x], {value};"
    (fault,) = run_ptx(kernel(body), {"x": x})
    assert (fault.kind, fault.where) == ("not supported", "planted.py:1")


def load_opcode(rank):
    return f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"


@pytest.mark.parametrize("adds", [False, True], ids=["store", "add"])
@pytest.mark.parametrize("type_", ["f16", "bf16", "f32", "s32"])
def test_tensor_copies_to_global_memory(type_, adds):
    """Nothing is written beside the tensor."""
    number, dtype = ELEMENTS[type_]
    for shape, box, at in BOXES:
        swizzle = {16: 0, 32: 1, 64: 2}[box[-1] * dtype.itemsize]
        box_values = torch.arange(1, 1 + math.prod(box)).to(dtype).view(box)
        count = math.prod(box) * dtype.itemsize
        image = swizzled_image(box_values.contiguous().view(torch.uint8), swizzle)
        x = torch.full(shape, 7).to(dtype)
        opcode = f"cp{'.reduce' * adds}.async.bulk.tensor.{len(box)}d.global.shared::cta{'.add' * adds}.bulk_group"
        coordinates = ", ".join(str(i) for i in reversed(at))
        body = f"""
        {tensor_map(x, box, number, swizzle)}
        {own("%a1", 4, "%image")}
        setp.lt.u32 %p1, %tid, {count // 4};
        @%p1 ld.global.b32 %r1, [%a1];
        @%p1 st.shared.b32 [%s], %r1;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        mov.b32 %r5, global_smem;
        @%leader {opcode} [%map, {{{coordinates}}}], [%r5];
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        """
        run(body, {"x": x, "map": aligned_map(), "image": image}, threads=512, shared_bytes=2048)
        expected = torch.full(shape, 7).to(dtype)
        index = np.indices(box) + np.reshape(at, (-1, *[1] * len(box)))
        for of_box in np.ndindex(*box):
            place = tuple(int(i[of_box]) for i in index)
            if all(0 <= i < size for i, size in zip(place, shape)):
                expected[place] = (expected[place] if adds else 0) + box_values[of_box]
        assert torch.equal(x, expected), (shape, box, at)


# ---- lanes of a warp


@pytest.mark.parametrize("segment", [32, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, segment):
    """In segments of the warp; a lane whose source is outside keeps its own, and has no predicate."""
    by = 3
    clamp = (32 - segment) << 8 | (0 if mode == "up" else 31)
    body = f"""
    shfl.sync.{mode}.b32 %r1|%p1, %tid, {by}, {clamp}, -1;
    selp.b32 %r2, 1, 0, %p1;
    {own("%a0", 8)}
    st.global.v2.b32 [%a0], {{%r1, %r2}};
    """
    x = torch.zeros(32, 2, dtype=torch.int32)
    run(body, {"x": x})
    for lane in range(32):
        start = lane // segment * segment
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": start + by}[mode]
        inside = start <= source < start + segment
        assert x[lane].tolist() == [source if inside else lane, inside]


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("ones", [0, 1, 0x80000001, 0xFFFFFFFF])
def test_vote(ones, negated):
    """Of all lanes, and of the lower half alone."""
    sign = "!" if negated else ""
    body = f"""
    shr.u32 %r1, {ones}, %lane;
    and.b32 %r1, %r1, 1;
    setp.ne.b32 %p1, %r1, 0;
    vote.sync.ballot.b32 %r10, {sign}%p1, -1;
    vote.sync.any.pred %p2, {sign}%p1, -1;
    vote.sync.all.pred %p3, {sign}%p1, -1;
    selp.b32 %r11, 1, 0, %p2;
    selp.b32 %r12, 1, 0, %p3;
    setp.lt.u32 %p4, %lane, 16;
    @%p4 vote.sync.ballot.b32 %r13, {sign}%p1, 0xFFFF;
    @!%p4 mov.b32 %r13, 0;
    {own("%a0", 16)}
    st.global.v4.b32 [%a0], {{%r10, %r11, %r12, %r13}};
    """
    x = torch.zeros(32, 4, dtype=torch.int32)
    run(body, {"x": x})
    votes = ones ^ (0xFFFFFFFF if negated else 0)
    expected = bits_of([votes, votes != 0, votes == 0xFFFFFFFF, votes & 0xFFFF], 32).tolist()
    assert x[0].tolist() == expected
    assert x[31].tolist() == [*expected[:3], 0]


REDUX = [f"redux.sync.{op}.{t}" for op in ("add", "min", "max") for t in ("u32", "s32")]
REDUX += [f"redux.sync.{op}.b32" for op in ("and", "or", "xor")]


@pytest.mark.parametrize("opcode", REDUX)
def test_redux(opcode):
    _, _, operation, type_ = opcode.split(".")
    numbers = np.random.default_rng(0).integers(1 << 32, size=32).tolist()
    x, out = bits_of(numbers, 32), torch.zeros(32, dtype=torch.int32)
    addresses = f"{own('%a0', 4)}\n{own('%a1', 4, '%out')}\nld.global.b32 %r1, [%a0];\n"
    run(f"{addresses}{opcode} %r2, %r1, -1;\nst.global.b32 [%a1], %r2;", {"x": x, "out": out})
    values = x.tolist() if type_ == "s32" else numbers
    result = values[0]
    for value in values[1:]:
        result = OF_INTEGERS[operation](result, value)
    assert out.tolist() == bits_of([result], 32).tolist() * 32


def test_one_lane_is_elected_and_the_active_ones_are_told():
    body = f"""
    setp.ge.u32 %p1, %lane, 5;
    mov.b32 %r10, 0;
    @%p1 activemask.b32 %r10;
    elect.sync %r11|%p2, -1;
    selp.b32 %r12, 1, 0, %p2;
    setp.lt.u32 %p3, %lane, 20;
    @%p3 bra low;
    activemask.b32 %r13;
    bra join;
    low: activemask.b32 %r13;
    join: {own("%a0", 16)}
    st.global.v4.b32 [%a0], {{%r10, %r11, %r12, %r13}};
    """
    x = torch.zeros(32, 4, dtype=torch.int32)
    run(body, {"x": x})
    assert x[:, 0].tolist() == [0] * 5 + [-32] * 27
    assert x[:, 1].tolist() == [0] * 32
    assert x[:, 2].tolist() == [1] + [0] * 31
    assert x[:, 3].tolist() == [(1 << 20) - 1] * 20 + [-(1 << 20)] * 12


JOINS = {
    "before the branch": """
        bra branch;
        join: redux.sync.add.u32 %r11, %r10, -1;
        bra end;
        branch: setp.lt.u32 %p1, %lane, 20;
        mov.b32 %r10, 1;
        @%p1 bra join;
        mov.b32 %r10, 2;
        bra join;
        end:""",
    "before a loop, which lanes leave one by one": """
        mov.b32 %r10, 0;
        bra loop;
        join: redux.sync.add.u32 %r11, %r10, -1;
        bra end;
        loop: add.u32 %r10, %r10, 1;
        setp.le.u32 %p1, %r10, %lane;
        @%p1 bra loop;
        bra join;
        end:""",
    "of a branch in one of two ways, before both": """
        setp.lt.u32 %p1, %lane, 20;
        setp.lt.u32 %p2, %lane, 10;
        mov.b32 %r10, 4;
        bra branch;
        join: redux.sync.add.u32 %r11, %r10, -1;
        bra end;
        inner: redux.sync.add.u32 %r12, %r10, 1048575;
        mov.b32 %r10, %r12;
        bra join;
        branch: @!%p1 bra join;
        mov.b32 %r10, 1;
        @%p2 bra inner;
        mov.b32 %r10, 2;
        bra inner;
        end:""",
}


@pytest.mark.parametrize(
    ("where", "total"), [*zip(JOINS, (20 + 2 * 12, sum(range(1, 33)), 20 * (10 + 20) + 4 * 12))], ids=JOINS.keys()
)
def test_lanes_come_together_wherever_that_stands(where, total):
    """Compilers place blocks in any order."""
    x = torch.zeros(32, dtype=torch.int32)
    run(f"{JOINS[where]}\n{own('%a0', 4)}\nst.global.b32 [%a0], %r11;", {"x": x})
    assert x.tolist() == [total] * 32


def test_members_that_do_not_come():
    ptx = kernel("@%leader vote.sync.ballot.b32 %r1, %first, -1;", 32)
    (fault,) = run_ptx(ptx, {"x": torch.zeros(1)})
    assert (fault.kind, fault.where) == ("lanes diverge at an aligned instruction", "planted.py:1")
    assert "it is for lanes ffffffff, lanes 00000001 execute it" in fault.detail


# ---- control flow, moves of parts, special registers


def test_loops_of_different_lengths_and_lanes_that_end():
    body = f"""
    mov.b32 %r1, 0;
    mov.b32 %r2, 0;
    again: add.s32 %r1, %r1, %r2;
    add.s32 %r2, %r2, 1;
    setp.le.u32 %p1, %r2, %tid;
    @%p1 bra again;
    {own("%a0", 4)}
    st.global.b32 [%a0], %r1;
    setp.gt.u32 %p2, %tid, 9;
    @%p2 ret;
    st.global.b32 [%a0], -1;
    """
    x = torch.zeros(64, dtype=torch.int32)
    run(body, {"x": x}, threads=64)
    assert x.tolist() == [-1] * 10 + [i * (i + 1) // 2 for i in range(10, 64)]


def test_a_jump_by_index():
    body = f"""
    mov.b32 %r2, 0;
    targets: .branchtargets $zero, $one, $two;
    brx.idx.uni %warp, targets;
    $zero: mov.b32 %r2, 10;
    bra $done;
    $one: mov.b32 %r2, 11;
    bra $done;
    $two: mov.b32 %r2, 12;
    $done: {own("%a0", 4)}
    st.global.b32 [%a0], %r2;
    """
    x = torch.zeros(96, dtype=torch.int32)
    run(body, {"x": x}, threads=96)
    assert x.view(3, 32).tolist() == [[10] * 32, [11] * 32, [12] * 32]


def test_parts_of_registers():
    body = """
    mov.b64 %a1, 0x7766554433221100;
    mov.b64 {%r1, %r2}, %a1;
    mov.b64 {%h1, %h2, %h3, %h4}, %a1;
    mov.b32 {%h5, _}, %r2;
    mov.b64 %a2, {%h4, %h3, %h2, %h1};
    mov.b32 %r3, {%h5, %h1};
    mov.b64 %a3, {%r3, %r1};
    cvt.u32.u64 %r4, %a1;
    st.global.b64 [%x], %a2;
    st.global.b64 [%x+8], %a3;
    st.global.b32 [%x+16], %r4;
    st.global.b32 [%x+20], %r2;
    """
    x = torch.zeros(3, dtype=torch.int64)
    run(body.replace("st.global", "@%leader st.global"), {"x": x})
    assert [f"{n:016x}" for n in x.tolist()] == ["1100332255447766", "3322110011005544", "7766554433221100"]


@pytest.mark.parametrize(("name", "function"), [("and", all), ("or", any), ("xor", lambda x: x[0] != x[1])])
def test_a_comparison_with_another_predicate(name, function):
    body = f"""
    setp.lt.s32 %p1, %tid, 2;
    setp.eq.{name}.s32 %p2, %tid, 1, %p1;
    setp.eq.{name}.s32 %p3, %tid, 1, !%p1;
    selp.b32 %r1, 1, 0, %p2;
    selp.b32 %r2, 1, 0, %p3;
    {own("%a0", 8)}
    st.global.v2.b32 [%a0], {{%r1, %r2}};
    """
    x = torch.zeros(32, 2, dtype=torch.int32)
    run(body, {"x": x})
    assert x.tolist() == [[function([i == 1, i < 2]), function([i == 1, i >= 2])] for i in range(32)]


def test_special_registers():
    names = ["tid.x", "tid.y", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y", "nctaid.z", "ntid.x", "ntid.y"]
    names += ["laneid", "warpid"]
    reads = "\n".join(f"mov.u32 %r2, %{name}; st.global.b32 [%a0+{4 * i}], %r2;" for i, name in enumerate(names))
    body = f"""
    mov.u32 %r3, %ctaid.y;
    mov.u32 %r4, %ctaid.z;
    mad.lo.s32 %r3, %r4, 3, %r3;
    mov.u32 %r4, %ctaid.x;
    mad.lo.s32 %r3, %r3, 2, %r4;
    mad.lo.s32 %r3, %r3, 64, %tid;
    mad.wide.u32 %a0, %r3, {4 * len(names)}, %x;
    {reads}
    """
    x = torch.zeros(2, 3, 2, 64, len(names), dtype=torch.int32)
    run(body, {"x": x}, threads=64, grid=(2, 3, 2))
    for z, y, cta_x, tid in np.ndindex(2, 3, 2, 64):
        assert x[z, y, cta_x, tid].tolist() == [tid, 0, cta_x, y, z, 2, 3, 2, 64, 1, tid % 32, tid // 32]


def test_what_only_orders_or_hints_changes_nothing():
    body = f"""
    bar.warp.sync -1;
    nanosleep.u32 20;
    setmaxnreg.inc.sync.aligned.u32 64;
    griddepcontrol.wait;
    prefetch.global.L2 [%x];
    pmevent 1;
    fence.mbarrier_init.release.cluster;
    fence.proxy.tensormap::generic.acquire.gpu [%x], 128;
    membar.cta;
    fence.acq_rel.cta;
    membar.gl;
    fence.sc.sys;
    createpolicy.fractional.L2::evict_first.b64 %a5, 1.0;
    {own("%a0", 4)}
    ld.global.nc.L1::evict_last.L2::cache_hint.b32 %r1, [%a0], %a5;
    st.global.wt.b32 [%a0], %r1;
    """
    x = torch.arange(32)
    run(body, {"x": x})
    assert torch.equal(x, torch.arange(32))


def test_the_address_of_a_parameter():
    out = torch.zeros(1, dtype=torch.int64)
    body = """
    mov.b64 %a0, k_n;
    cvta.param.u64 %a1, %a0;
    ld.global.b64 %a2, [%a1];
    @%leader st.global.b64 [%out], %a2;
    """
    run(body, {"n": 1 << 40, "out": out})
    assert out.item() == 1 << 40


# ---- mbarrier


@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
def test_phases_of_an_mbarrier(wait):
    """Two warps arrive twice; each sees what the other wrote before."""
    body = f"""
    @%leader mbarrier.init.shared::cta.b64 [global_smem+512], 64;
    bar.sync 0;
    st.shared.b32 [%s], %tid;
    mbarrier.arrive.shared::cta.b64 _, [global_smem+512];
    one: mbarrier.{wait}.parity.shared::cta.b64 %p0, [global_smem+512], 0;
    @!%p0 bra one;
    ld.shared.b32 %r1, [%next];
    mbarrier.arrive.release.cta.shared::cta.b64 _, [global_smem+512], 1;
    two: mbarrier.{wait}.parity.acquire.cta.shared::cta.b64 %p0, [global_smem+512], 1;
    @!%p0 bra two;
    st.shared.b32 [%next], %tid;
    bar.sync 0;
    @%leader mbarrier.inval.shared::cta.b64 [global_smem+512];
    {own("%a0", 4)}
    st.global.b32 [%a0], %r1;
    """
    x = torch.zeros(64, dtype=torch.int32)
    run(body, {"x": x}, threads=64, shared_bytes=520)
    assert x.tolist() == [i ^ 32 for i in range(64)]


def test_bytes_are_expected_beside_arrivals():
    body = """
    @%leader mbarrier.init.shared::cta.b64 [global_smem+512], 1;
    bar.sync 0;
    @%leader mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [global_smem+512], 16;
    @%leader mbarrier.arrive.shared::cta.b64 _, [global_smem+512];
    wait: mbarrier.try_wait.parity.shared::cta.b64 %p0, [global_smem+512], 0;
    @!%p0 bra wait;
    """
    found = run_ptx(kernel(body), {"x": torch.zeros(1)}, shared_bytes=520)
    assert {fault.kind for fault in found} == {"wrong number of transaction bytes"}
    assert "lacks 0 arrivals and 16 bytes" in found[0].detail


# ---- what is not there

UNSUPPORTED = [
    "tcgen05.wait::ld.sync.aligned",
    "barrier.cluster.arrive.aligned",
    "mapa.shared::cluster.u32 %r1, %r2, 0",
    "fence.proxy.alias",
    "div.approx.f64 %a1, %a2, %a3",
    "st.param.b32 [%r2], %r1",
    "ld.shared.b128 %a1, [%r2]",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%x], 16, [%r2]",
    "cp.async.ca.shared.global [%r1], [%x], 4, %p1",
    "mbarrier.arrive.shared::cta.b64 %a1, [%r1]",
    "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%r1]",
    "mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64 %p1, [%r1], 0",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r1}",
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%a1, %a2}, {%a3}, {%a4}, {%a1, %a2}",
    "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e5m2 {%f1, %f2, %f3, %f4}, %a1, %a2, 0, 1, 1",
    "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r1, %r2}, %a1, %a2, 0, 1, 1, 0, 0",
    "add.s32 %r1, %r2",
    "add.s32 %r1, %a1, %r2",
]


@pytest.mark.parametrize("instruction", UNSUPPORTED)
def test_what_is_not_emulated_says_so_with_its_line(instruction):
    with pytest.raises(NotImplementedError) as error:
        run_ptx(kernel(f"mov.b32 %r1, 0;\n{instruction};"), {"x": torch.zeros(1)})
    assert f"{instruction!r}, made from planted.py:2" in str(error.value)


def test_threads_that_fill_no_warp_are_refused():
    with pytest.raises(NotImplementedError, match="expected a multiple of 32 threads, got 40"):
        run_ptx(kernel("mov.b32 %r1, 0;", 40), {"x": torch.zeros(1)})


def test_every_instruction_that_is_decoded_by_hand_is_here():
    """By its opcode, in this file or in the one of faults."""
    text = "".join((Path(__file__).parent / f"test_emulator_{name}.py").read_text() for name in ("warps", "faults"))
    words = {*re.findall(r"[\w.:]+", text), *LOADS, *MMA, *WGMMA, *REDUX}
    words |= {opcode.replace("ld.", "st.") for opcode in LOADS} | {f"atom.global.{name}" for name in ATOMICS}
    words |= {f"{name}.sync.aligned.m8n8.x4.shared.b16" for name in ("ldmatrix", "stmatrix")}
    words |= {load_opcode(2), "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group", "shfl.sync.up.b32"}
    words |= {"tensormap.replace.tile.rank.global.b1024.b32", "setp.eq.and.s32", "vote.sync.any.pred"}
    words |= {"mbarrier.try_wait.parity.shared::cta.b64", "cp.async.ca.shared.global"}
    missing = [pattern.pattern for pattern, _ in opcodes._DECODERS if not any(map(pattern.fullmatch, words))]
    assert not missing
