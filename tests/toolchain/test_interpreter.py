"""The repaired interpreter against torch's own conversions, and fp8 rounding against the definition."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_attn import append_kv_cache, flash_attention, merge_attention, paged_attention
from triton_attn.toolchain import fix_interpreter, guard

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="tests the interpreter, on a machine with a GPU too"),
]

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
if not triton.__version__.startswith(("3.6.", "3.7.")):  # whose interpreters know no type of AMD's own
    FLOAT8 += [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
ALL_16_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
# Every sign, exponent and leading 7 bits of mantissa, with the rest at, around and between the halfway points.
FP32_SAMPLE = (
    (ALL_16_BITS.to(torch.int32)[:, None] << 16) | torch.tensor([0, 1, 0x4000, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF])
).flatten()
FP32_SAMPLE = FP32_SAMPLE.to(torch.int32).view(torch.float32)


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < N)


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        _cast_kernel[(triton.cdiv(x.numel(), 2**16),)](x, y, x.numel(), BLOCK=2**16)
    return y


def assert_same_values(actual, expected):
    """Equal bit for bit, except that any NaN equals any other."""
    assert actual.dtype == expected.dtype
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    nan = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), nan)
    assert torch.equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def round_to_float8(x, dtype):
    """Nearest value of `dtype`, ties to the even code, saturating: found by search, not by arithmetic on bits."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    values = values[values.isfinite()]  # codes 0, 1, 2 ... in ascending order
    midpoints = (values[1:] + values[:-1]) / 2
    magnitude = x.double().abs()
    code = torch.searchsorted(midpoints, magnitude)
    tie = (code < len(midpoints)) & (midpoints[code.clamp(max=len(midpoints) - 1)] == magnitude)
    code = torch.where(tie & (code % 2 == 1), code + 1, code).to(torch.uint8)
    has_negative_zero = dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    code = torch.where(x.double().signbit() & (has_negative_zero | (code > 0)), code | 0x80, code)
    return torch.where(x.double().isnan(), 0x7F if has_negative_zero else 0x80, code).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_every_bf16_value_casts_as_in_torch(dtype):
    x = ALL_16_BITS.view(torch.bfloat16)
    assert_same_values(cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("float8", FLOAT8)
def test_every_fp8_value_casts_as_in_torch(float8, dtype):
    x = torch.arange(256, dtype=torch.uint8).view(float8)
    assert_same_values(cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize(
    "x",
    [FP32_SAMPLE, FP32_SAMPLE.double(), ALL_16_BITS.view(torch.float16), torch.arange(-70000, 70000), ALL_16_BITS > 0],
    ids=["fp32", "fp64", "fp16", "int64", "bool"],
)
def test_casts_to_bf16_round_as_torch_does(x):
    assert_same_values(cast(x, torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.parametrize(
    "x",
    [FP32_SAMPLE, ALL_16_BITS.view(torch.float16), ALL_16_BITS.view(torch.bfloat16)],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize("float8", FLOAT8)
def test_casts_to_fp8_round_to_nearest_even_and_saturate(float8, x):
    assert_same_values(cast(x, float8), round_to_float8(x, float8))


@triton.jit
def _truncate_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_a_cast_that_rounds_to_zero_still_does():
    x = torch.tensor([1.0, 1.999, -1.999, 2**-20 * 1.999])
    y = torch.empty(4, dtype=torch.bfloat16)
    _truncate_kernel[(1,)](x, y, N=4)
    assert torch.equal(y.view(torch.int16), (x.view(torch.int32) >> 16).to(torch.int16))


def test_bf16_casts_to_integers_by_value():
    x = torch.tensor([-3.0, -0.75, 0.0, 2.5, 100.0], dtype=torch.bfloat16)
    assert torch.equal(cast(x, torch.int32), x.to(torch.int32))


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + N + offs, x - y)
    tl.store(out_ptr + 2 * N + offs, x * y)
    tl.store(out_ptr + 3 * N + offs, x / y)
    tl.store(out_ptr + 4 * N + offs, -x)
    tl.store(out_ptr + 5 * N + offs, tl.abs(x))
    tl.store(out_ptr + 6 * N + offs, tl.maximum(x, y))
    tl.store(out_ptr + 7 * N + offs, tl.minimum(x, y))
    tl.store(out_ptr + 8 * N + offs, tl.where((x < y) & (x != -y), x, y))
    tl.store(out_ptr + 9 * N + offs, tl.fma(x, y, x))
    tl.store(out_ptr + 10 * N + offs, tl.clamp(x, -1.5, 0.5))
    tl.store(out_ptr + 11 * N + offs, x * 2.0 + 0.5)


def test_bf16_elementwise_operations_compute_on_values():
    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out = torch.empty(12, 4096, dtype=torch.bfloat16)
    _elementwise_kernel[(1,)](x, y, out, N=4096)
    expected = [
        x + y,
        x - y,
        x * y,
        x / y,
        -x,
        x.abs(),
        torch.maximum(x, y),
        torch.minimum(x, y),
        torch.where((x < y) & (x != -y), x, y),
        torch.addcmul(x.double(), x.double(), y.double()).to(torch.bfloat16),
        x.clamp(-1.5, 0.5),
        x * 2.0 + 0.5,
    ]
    assert_same_values(out, torch.stack(expected))


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, argmax_ptr, scan_ptr, M: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, M)
    offs = rows[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + rows, tl.sum(x, axis=1))
    tl.store(out_ptr + M + rows, tl.max(x, axis=1))
    tl.store(out_ptr + 2 * M + rows, tl.min(x, axis=1))
    tl.store(out_ptr + 3 * M + rows, tl.reduce(x, 1, _multiply))
    tl.store(argmax_ptr + rows, tl.argmax(x, axis=1))
    tl.store(scan_ptr + offs, tl.cumsum(x, axis=1))
    tl.store(out_ptr + 4 * M, tl.sum(x))


def test_bf16_reductions_and_scans_compute_on_values():
    # Sixteenths of at most 8 bits: every sum is exact, so no order of summation is favoured.
    x = torch.randint(-8, 8, (8, 16), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) / 16
    out = torch.empty(4 * 8 + 1, dtype=torch.bfloat16)
    argmax, scan = torch.empty(8, dtype=torch.int32), torch.empty_like(x)
    _reduce_kernel[(1,)](x, out, argmax, scan, M=8, N=16)
    sums, maxima, minima, products = out[:-1].view(4, 8)
    assert torch.equal(sums, x.float().sum(1).to(torch.bfloat16))
    assert torch.equal(out[-1], x.float().sum().to(torch.bfloat16))
    assert torch.equal(maxima, x.amax(1))
    assert torch.equal(minima, x.amin(1))
    torch.testing.assert_close(products, x.float().prod(1).to(torch.bfloat16))
    assert torch.equal(argmax, x.argmax(1).int())
    assert torch.equal(scan, x.float().cumsum(1).to(torch.bfloat16))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dot_multiplies_values(dtype):
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    c = torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, c, N=64)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_dot_keeps_fp8_nan():
    a = torch.eye(16).to(torch.float8_e4m3fn)
    b = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](b, a, c, N=16)
    assert torch.equal(c.isnan().any(1), b.float().isnan().any(1))


@triton.jit
def _descriptor_kernel(x_desc, y_desc, out_ptr, M: tl.constexpr, N: tl.constexpr):
    x = x_desc.load([0, 0])
    offs = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, x)
    y_desc.store([0, 0], x.to(tl.float32) * 1.01)


@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_bf16_tensor_descriptors(padding):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y = torch.zeros_like(x)
    out = torch.empty(8, 16, dtype=torch.bfloat16)
    x_desc = TensorDescriptor.from_tensor(x, [8, 16], padding)
    _descriptor_kernel[(1,)](x_desc, TensorDescriptor.from_tensor(y, [8, 16]), out, M=8, N=16)
    assert torch.equal(out[:5], x)
    assert torch.equal(out[5:].isnan(), torch.full((3, 16), padding == "nan"))
    assert torch.equal(y, (x.float() * 1.01).to(torch.bfloat16))


@triton.jit
def _descriptor_add_kernel(desc, value, M: tl.constexpr, N: tl.constexpr):
    desc.atomic_add([0, 0], tl.full((M, N), value, desc.dtype))


def test_atomic_add_through_a_descriptor():
    x = torch.zeros(5, 16)
    desc = TensorDescriptor.from_tensor(x, [8, 16])
    with guard() as accesses:
        _descriptor_add_kernel[(3,)](desc, 0.5, M=8, N=16)
    assert torch.equal(x, torch.full_like(x, 1.5))
    assert accesses.bytes_stored == {"desc": 3 * x.nbytes}
    with pytest.raises(InterpreterError, match="fp32"):
        _descriptor_add_kernel[(1,)](TensorDescriptor.from_tensor(x.half(), [8, 16]), 0.5, M=8, N=16)


@triton.jit
def _loop_kernel(n_ptr, out_ptr):
    total = 0
    for i in range(tl.load(n_ptr)):
        total += i
    tl.store(out_ptr, total)


def test_tensors_bound_loops_without_numpy_complaining():
    n, out = torch.tensor([5]), torch.empty(1, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        _loop_kernel[(1,)](n, out)
    assert out.item() == 10


@triton.jit
def _max_kernel(x_ptr, out_ptr, N: tl.constexpr, FAIL: tl.constexpr):
    largest = tl.max(tl.load(x_ptr + tl.arange(0, N)), 0)  # a function of a module that sees tl.core
    tl.static_assert(not FAIL)
    tl.store(out_ptr, largest)


def test_a_launch_leaves_the_language_as_it_was():
    def language():
        places = tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base
        return [{name: getattr(place, name) for name in dir(place) if name != "__annotations__"} for place in places]

    before = language()
    x, out = torch.arange(8.0), torch.empty(1)
    for _ in range(2):
        _max_kernel[(2,)](x, out, N=8, FAIL=False)
        assert out.item() == 7
        assert language() == before
        with pytest.raises(InterpreterError):
            _max_kernel[(2,)](x, out, N=8, FAIL=True)
        assert language() == before


def test_threads_launch_side_by_side(monkeypatch):
    """What each of several threads computes is what it computes alone, bit by bit, gradients too."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "triton")

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 9, 2, 16, generator=generator, requires_grad=True) for _ in range(3))
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        k, v = k.detach()[0], v.detach()[0]
        caches = torch.zeros(2, 3, 8, 2, 16)
        append_kv_cache(k, v, *caches, torch.arange(len(k)))
        seqlens, table = torch.tensor([len(k)], dtype=torch.int32), torch.arange(3, dtype=torch.int32)[None]
        decoded, decoded_lse = paged_attention(q.detach()[:, -1:], *caches, seqlens, table, return_lse=True)
        merged, _ = merge_attention(torch.stack([decoded, decoded]), torch.stack([decoded_lse, decoded_lse]))
        return [x.detach().clone() for x in (out, lse, *gradients, *caches, decoded, decoded_lse, merged)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(work, range(2)))
    finally:
        sys.setswitchinterval(interval)
    for seed, results in enumerate(together):
        for ours, alone in zip(results, work(seed)):
            assert torch.equal(ours, alone)


def anew(cls, *args):
    """An object as Triton's own constructor makes it."""
    made = cls.__new__(cls)
    cls.__init__.__wrapped__(made, *args)
    return made


ELEMENTS = [tl.float32, tl.bfloat16, tl.float8e5, tl.int1, tl.uint8, tl.int64]


@pytest.mark.parametrize("element", [*ELEMENTS, *map(tl.pointer_type, ELEMENTS)], ids=str)
def test_types_and_tensors_that_are_remembered_are_as_made_anew(element):
    def attributes(x):
        return {name: str(value) for name, value in vars(x).items()}

    for shape in ([4], [4, 8], [8, 4]):
        for _ in range(2):
            block = tl.block_type(element, shape)
            assert block.element_ty is element
            assert attributes(block) == attributes(anew(tl.block_type, element, shape))
            assert interpreter._get_np_dtype(block) == interpreter._get_np_dtype(element)
            for type_ in (block, element):
                handle = object()
                tensor = tl.tensor(handle, type_)
                assert tensor.handle is handle
                assert tensor.type is type_
                assert tensor.dtype is element
                assert attributes(tensor) == attributes(anew(tl.tensor, handle, type_))


def test_fixing_again_changes_nothing():
    from triton.runtime.interpreter import InterpreterBuilder

    fix_interpreter()
    before = dict(vars(InterpreterBuilder))
    fix_interpreter()
    assert dict(vars(InterpreterBuilder)) == before
