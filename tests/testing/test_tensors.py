"""Poisoned and padded tensors reveal mistakes, and the error rule is the documented one."""

import contextlib
import math
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from triton_attn.testing import assert_close_to_reference, padded, poisoned_empty

pytestmark = pytest.mark.oldest


def in_module(name, source):
    """The value of `source`, an expression in the module `name`."""
    return eval(source, {"__name__": name, "torch": torch})


MAKERS = [
    "torch.empty(2, 3)",
    "torch.empty_like(torch.zeros(2, 3))",
    "torch.empty_strided((2, 3), (1, 2))",
    "torch.zeros(1).new_empty(2, 3)",
    "torch.empty(2, 3, requires_grad=True)",
]


@pytest.mark.parametrize("source", MAKERS)
@pytest.mark.parametrize("module", ["triton_attn", "triton_attn.flash.forward"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_empty_tensors_of_the_package_are_poisoned(source, module, mode):
    with poisoned_empty(), mode():
        out = in_module(module, source)
    assert out.isnan().all()
    assert out.shape == (2, 3)
    assert out.is_leaf


@pytest.mark.parametrize("source", MAKERS)
@pytest.mark.parametrize("module", ["triton_attn_of_somebody_else", "tests.triton_attn", "torch.nn"])
def test_empty_tensors_of_others_are_not(source, module, monkeypatch):
    monkeypatch.setattr("triton_attn.testing.tensors._poison", lambda tensor: pytest.fail("poisoned"))
    with poisoned_empty():
        assert in_module(module, source).shape == (2, 3)


def test_another_package_can_be_named():
    with poisoned_empty("their_kernels"):
        assert in_module("their_kernels.attention", "torch.empty(3)").isnan().all()


@pytest.mark.parametrize(
    ("dtype", "poison"),
    [
        (torch.float16, math.nan),
        (torch.bfloat16, math.nan),
        (torch.float64, math.nan),
        (torch.float8_e4m3fn, math.nan),
        (torch.float8_e5m2, math.nan),
        (torch.int32, 2**31 - 1),
        (torch.int64, 2**63 - 1),
        (torch.uint8, 255),
        (torch.bool, True),
    ],
)
def test_poison_of_each_dtype(dtype, poison):
    with poisoned_empty():
        out = in_module("triton_attn", f"torch.empty(5, dtype={dtype})")
    expected = torch.full((5,), poison, dtype=torch.float64 if dtype.is_floating_point else dtype)
    torch.testing.assert_close(
        out.double() if dtype.is_floating_point else out, expected, rtol=0, atol=0, equal_nan=True
    )


def test_torch_is_itself_again_also_after_an_exception():
    names = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    before = [getattr(*name) for name in names]
    with pytest.raises(ZeroDivisionError), poisoned_empty():
        raise ZeroDivisionError
    assert [getattr(*name) for name in names] == before
    assert "new_empty" not in vars(torch.Tensor)


def test_compiled_code_is_left_alone():
    def fill(x):
        out = [torch.empty(3), torch.empty_like(x), torch.empty_strided((3,), (1,)), x.new_empty(3)]
        return sum(empty.copy_(x) for empty in out)

    for context in (poisoned_empty(__name__), contextlib.nullcontext()):
        torch.compiler.reset()
        with context:
            out = torch.compile(fill, backend="eager", fullgraph=True)(torch.ones(3))
        assert torch.equal(out, torch.full((3,), 4.0))


@triton.jit
def _store_kernel(x_ptr, offset, value, N: tl.constexpr):
    tl.store(x_ptr + offset + tl.arange(0, N), value)


def test_an_output_that_is_not_written_shows(device):
    with poisoned_empty():
        out = in_module("triton_attn.flash", f"torch.empty(16, device={device!r})")
    _store_kernel[(1,)](out, 0, 1.0, N=8)
    assert out[:8].isfinite().all()
    assert out[8:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_writes_beside_a_padded_tensor_show(dtype, device):
    size = dtype.itemsize
    faults = {
        -1: f"{size} bytes written before the tensor, the nearest 0 bytes from it",
        -40: f"{8 * size} bytes written before the tensor, the nearest {32 * size} bytes from it",
        5: f"{size} bytes written after the tensor, the nearest 0 bytes from it",
        20: f"{8 * size} bytes written after the tensor, the nearest {8 * size} bytes from it",
    }
    for offset in (0, 4, *faults):
        x, check = padded((3, 4), dtype, device)
        assert x.data_ptr() % 16 == 0
        _store_kernel[(1,)](x, offset, 1.5 if dtype.is_floating_point else 2**24 + 2**16 + 2**8 + 1, N=8)
        if offset in faults:
            with pytest.raises(AssertionError, match=faults[offset]):
                check()
        else:
            check()


@triton.jit
def _sum_kernel(x_ptr, out_ptr, offset, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offset + tl.arange(0, N)).to(tl.float32)))


def test_reads_beside_a_padded_tensor_show(device):
    out = torch.zeros(1, device=device)
    x, _ = padded((16,), torch.float16, device)
    for offset, shows in ((0, False), (1, True), (-16, True)):
        x.fill_(1.0)
        _sum_kernel[(1,)](x, out, offset, N=16)
        assert out.isnan().item() == shows


def test_the_rule():
    ref = torch.tensor([0.0, 1.0, -4.0], dtype=torch.float64)
    out = ref.float() + torch.tensor([0.0, 0.003, 0.0])
    torch_out = ref.float() + torch.tensor([0.0, 0.0, -0.002])
    closeness = assert_close_to_reference(out, ref, torch_out=torch_out)
    assert closeness.error == pytest.approx(0.003, rel=1e-3)
    assert closeness.torch_error == pytest.approx(0.002, rel=1e-3)
    assert closeness.bound == pytest.approx(2 * closeness.torch_error + 4 * 2**-23 * 4.0, rel=1e-12)
    assert assert_close_to_reference(out, ref, torch_error=0.002) == pytest.approx(closeness, rel=1e-3)
    with pytest.raises(
        AssertionError, match=r"lse: error 3.000e-03 at \(1,\) is above .* = 1 \* 2.000e-03 .*; got 1.003"
    ):
        assert_close_to_reference(out, ref, torch_out=torch_out, factor=1.0, name="lse")
    with pytest.raises(AssertionError, match="above"):
        assert_close_to_reference(out, ref)
    assert assert_close_to_reference(out, ref, floor=0.0031).bound == 0.0031


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 2**-21)])
def test_the_default_floor(dtype, eps):
    ref = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    assert assert_close_to_reference(ref.to(dtype), ref) == (0.0, 0.0, 2 * eps)


INF = math.inf


@pytest.mark.parametrize(
    ("out", "ref", "at"),
    [
        ([1.0, math.nan], [1.0, 1.0], 1),
        ([1.0, -INF], [1.0, 1.0], 1),
        ([1.0, 1.0], [1.0, -INF], 1),
        ([INF, 1.0], [-INF, 1.0], 0),
        ([math.nan, 1.0], [-INF, 1.0], 0),
        ([1.0, -INF], [-INF, 1.0], 0),
    ],
)
@pytest.mark.parametrize("torch_error", [0.0, 1e6])
def test_what_is_not_finite_must_be_in_place(out, ref, at, torch_error):
    out, ref = torch.tensor(out), torch.tensor(ref, dtype=torch.float64)
    with pytest.raises(AssertionError, match=rf"error inf at \({at},\)"):
        assert_close_to_reference(out, ref, torch_error=torch_error)


def test_infinities_in_place_are_equal():
    ref = torch.tensor([-INF, 1.0, INF], dtype=torch.float64)
    assert assert_close_to_reference(ref.float(), ref).error == 0.0


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_torch_is_judged_where_it_is_finite(bad):
    ref = torch.tensor([0.0, 1.0, -INF], dtype=torch.float64)
    torch_out = torch.tensor([bad, 1.5, 0.0])
    assert assert_close_to_reference(ref.float(), ref, torch_out=torch_out).torch_error == 0.5
    with pytest.raises(AssertionError, match="above"):
        assert_close_to_reference(ref.float() + 2.0, ref, torch_out=torch_out)


def test_an_unknown_error_of_torch_bounds_nothing():
    ref = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="above"):
        assert_close_to_reference(ref.float() + 1, ref, torch_error=math.nan)


def test_empty_and_scalar_outputs():
    assert assert_close_to_reference(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.float64)) == (0.0, 0.0, 0.0)
    with pytest.raises(AssertionError, match=r"error 1.000e\+00 at \(\)"):
        assert_close_to_reference(torch.tensor(2.0), torch.tensor(1.0, dtype=torch.float64))


def test_shapes_and_dtypes_have_to_agree():
    ref = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"out has shape \(3, 2\), the reference \(2, 3\)"):
        assert_close_to_reference(ref.t().float(), ref)
    with pytest.raises(AssertionError, match=r"torch's output \(1, 3\)"):
        assert_close_to_reference(ref.float(), ref, torch_out=ref[:1].float())
    with pytest.raises(AssertionError, match=r"dtype torch.float16, torch's output torch.float32"):
        assert_close_to_reference(ref.half(), ref, torch_out=ref.float())


def test_arguments_that_cannot_judge():
    ref = torch.ones(2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"ref64: expected torch\.float64, got torch\.float32"):
        assert_close_to_reference(ref.float(), ref.float())
    with pytest.raises(ValueError, match="ref64: expected no NaN"):
        assert_close_to_reference(ref.float(), ref * math.nan)
    with pytest.raises(ValueError, match="torch_out, torch_error: expected at most one"):
        assert_close_to_reference(ref.float(), ref, torch_out=ref.float(), torch_error=0.0)


@pytest.mark.ci
def test_without_triton_the_rest_is_there():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from triton_attn import testing, toolchain\n"
        "testing.padded((2,))[1]()\n"
        "with testing.poisoned_empty(): pass\n"
        "try: toolchain.guard\n"
        "except ImportError: print('needs triton')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("needs triton\n", 0), done.stderr
