"""Errors are raised before anything is launched; and which implementation runs a correct call."""

import re
from unittest import mock

import numpy as np
import pytest
import torch
from attention_cases import DEVICE, INTERPRETED

from triton_attn import flash_attention, flash_attention_varlen, reference
from triton_attn.flash import forward


@pytest.fixture
def launches(monkeypatch):
    """The launches of the forward kernel, which the kernel backend runs here on any device."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "triton")
    with mock.patch.object(forward, "launch") as launch:
        yield launch


def tensor(*shape, dtype=torch.float16, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


def dense(**changed):
    return {"q": tensor(2, 5, 4, 16), "k": tensor(2, 7, 2, 16), "v": tensor(2, 7, 2, 24)} | changed


def int32(*values, device=DEVICE):
    return torch.tensor(values, dtype=torch.int32, device=device)


def varlen(**changed):
    return {
        "q": tensor(5, 4, 16),
        "k": tensor(7, 2, 16),
        "v": tensor(7, 2, 24),
        "cu_seqlens_q": int32(0, 2, 5),
        "cu_seqlens_k": int32(0, 3, 7),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    } | changed


def last_dim_strided(*shape):
    return tensor(*shape[:-1], 2 * shape[-1])[..., ::2]


# (arguments, error, message). `dense` has tensors that agree with each other.
WRONG = {
    "q is no tensor": ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
    "k is None": ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
    "v is an array": ({"v": np.zeros(3)}, TypeError, "v: expected a tensor, got ndarray"),
    "q has three dimensions": (
        {"q": tensor(5, 4, 16)},
        ValueError,
        "q: expected (batch, seqlen, heads, head_dim), got",
    ),
    "v has five dimensions": (
        {"v": tensor(1, 2, 7, 2, 24)},
        ValueError,
        "v: expected (batch, seqlen, heads, head_dim)",
    ),
    "k of another dtype": (
        {"k": tensor(2, 7, 2, 16, dtype=torch.bfloat16)},
        TypeError,
        "k: expected q's dtype torch.float16, got torch.bfloat16",
    ),
    "v on another device": (
        {"v": tensor(2, 7, 2, 24, device="meta")},
        ValueError,
        f"v: expected q's device {tensor(1).device}, got meta",
    ),
    "an integer dtype": (
        {name: x.int() for name, x in dense().items()},
        TypeError,
        "q: expected float16, bfloat16 or float32, got torch.int32",
    ),
    "fp64": (
        {name: x.double() for name, x in dense().items()},
        TypeError,
        "q: expected float16, bfloat16 or float32, got torch.float64",
    ),
    "a strided last dimension": (
        {"k": last_dim_strided(2, 7, 2, 16)},
        ValueError,
        "k: expected a contiguous last dimension (stride 1), got stride 2",
    ),
    "head_dim 0": (
        {"q": tensor(2, 5, 4, 0), "k": tensor(2, 7, 2, 0)},
        ValueError,
        "q: expected a head dimension of 1 to 512, got 0",
    ),
    "head_dim_v 513": ({"v": tensor(2, 7, 2, 513)}, ValueError, "v: expected a head dimension of 1 to 512, got 513"),
    "k of another head_dim": ({"k": tensor(2, 7, 2, 24)}, ValueError, "k: expected q's head dimension 16, got 24"),
    "k and v of other lengths": (
        {"v": tensor(2, 8, 2, 24)},
        ValueError,
        "v: expected k's shape except for the last dimension, (2, 7, 2), got (2, 8, 2)",
    ),
    "another batch": (
        {"k": tensor(3, 7, 2, 16), "v": tensor(3, 7, 2, 24)},
        ValueError,
        "k: expected q's batch size 2, got 3",
    ),
    "heads that do not divide": (
        {"k": tensor(2, 7, 3, 16), "v": tensor(2, 7, 3, 24)},
        ValueError,
        "k: expected a number of heads that divides q's 4, got 3",
    ),
    "no KV head": (
        {"k": tensor(2, 7, 0, 16), "v": tensor(2, 7, 0, 24)},
        ValueError,
        "k: expected a number of heads that divides q's 4, got 0",
    ),
    "causal is an int": ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
    "causal is a tensor": ({"causal": tensor(1)}, TypeError, "causal: expected a bool, got Tensor"),
    "softmax_scale is a string": ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number, got str"),
    "softmax_scale is a bool": ({"softmax_scale": True}, TypeError, "softmax_scale: expected a number, got bool"),
    "softmax_scale is 0": ({"softmax_scale": 0}, ValueError, "softmax_scale: expected a number above 0, got 0.0"),
    "softmax_scale is negative": ({"softmax_scale": -0.5}, ValueError, "softmax_scale: expected a number above 0, got"),
    "softmax_scale is NaN": (
        {"softmax_scale": float("nan")},
        ValueError,
        "softmax_scale: expected a finite number, got",
    ),
    "softcap is infinite": ({"softcap": float("inf")}, ValueError, "softcap: expected a finite number, got inf"),
    "softcap is negative": ({"softcap": -1.0}, ValueError, "softcap: expected 0 (none) or more, got -1.0"),
    "window_size is an int": ({"window_size": 3}, TypeError, "window_size: expected a pair (left, right), got 3"),
    "window_size of three": ({"window_size": (1, 2, 3)}, TypeError, "window_size: expected a pair (left, right), got"),
    "window_size of floats": ({"window_size": (1.0, 2)}, TypeError, "window_size: expected a pair of ints, got"),
    "window_size of bools": ({"window_size": (True, 2)}, TypeError, "window_size: expected a pair of ints, got"),
    "window_size below -1": (
        {"window_size": (0, -2)},
        ValueError,
        "window_size: expected -1 (unlimited) or more on each",
    ),
    "alibi_slopes is a list": ({"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes: expected a tensor, got list"),
    "alibi_slopes per KV head": (
        {"alibi_slopes": tensor(2, dtype=torch.float32)},
        ValueError,
        "alibi_slopes: expected shape (4,) or shape (2, 4), got shape (2,)",
    ),
    "alibi_slopes in fp16": (
        {"alibi_slopes": tensor(4)},
        TypeError,
        "alibi_slopes: expected torch.float32, got torch.float16",
    ),
    "alibi_slopes elsewhere": (
        {"alibi_slopes": tensor(4, dtype=torch.float32, device="meta")},
        ValueError,
        f"alibi_slopes: expected q's device {tensor(1).device}, got meta",
    ),
    "sinks are a number": ({"sinks": 1.0}, TypeError, "sinks: expected a tensor, got float"),
    "sinks per sequence": (
        {"sinks": tensor(2, 4)},
        ValueError,
        "sinks: expected shape (4,), got shape (2, 4)",
    ),
    "sinks of another dtype": (
        {"sinks": tensor(4, dtype=torch.bfloat16)},
        TypeError,
        "sinks: expected torch.float32 or torch.float16, got torch.bfloat16",
    ),
    "dropout_p is 1": ({"dropout_p": 1.0}, ValueError, "dropout_p: expected 0 <= dropout_p < 1, got 1.0"),
    "dropout_p is NaN": ({"dropout_p": float("nan")}, ValueError, "dropout_p: expected a finite number, got nan"),
    "dropout_seed is a float": (
        {"dropout_p": 0.5, "dropout_seed": 1.0},
        TypeError,
        "dropout_seed: expected an int or a tensor, got float",
    ),
    "dropout_seed in int32": (
        {"dropout_p": 0.5, "dropout_seed": int32(1)},
        TypeError,
        "dropout_seed: expected dtype torch.int64, got torch.int32",
    ),
    "out with q's head dimension": (
        {"out": tensor(2, 5, 4, 16)},
        ValueError,
        "out: expected shape (2, 5, 4, 24), got shape (2, 5, 4, 16)",
    ),
    "out of another dtype": (
        {"out": tensor(2, 5, 4, 24, dtype=torch.float32)},
        TypeError,
        "out: expected torch.float16, got torch.float32",
    ),
    "out elsewhere": (
        {"out": tensor(2, 5, 4, 24, device="meta")},
        ValueError,
        f"out: expected device {tensor(1).device}, got meta",
    ),
    "out with a strided last dimension": (
        {"out": last_dim_strided(2, 5, 4, 24)},
        ValueError,
        "out: expected a contiguous last dimension (stride 1), got stride 2",
    ),
    "out where a gradient is wanted": (
        {"out": tensor(2, 5, 4, 24), "k": tensor(2, 7, 2, 16).requires_grad_()},
        NotImplementedError,
        "out: gradients are not supported with it, got a call that wants some; leave it out",
    ),
    "out that requires a gradient": (
        {"out": tensor(2, 5, 4, 24).requires_grad_()},
        NotImplementedError,
        "out: gradients are not supported with it, got a call that wants some; leave it out",
    ),
}

WRONG_VARLEN = {
    "q has four dimensions": (
        {"q": tensor(1, 5, 4, 16)},
        ValueError,
        "q: expected (total, heads, head_dim), got shape",
    ),
    "cu_seqlens_q is a list": ({"cu_seqlens_q": [0, 5]}, TypeError, "cu_seqlens_q: expected a tensor, got list"),
    "cu_seqlens_k in int64": (
        {"cu_seqlens_k": int32(0, 3, 7).long()},
        TypeError,
        "cu_seqlens_k: expected dtype torch.int32, got torch.int64",
    ),
    "cu_seqlens_q of two dimensions": (
        {"cu_seqlens_q": int32(0, 2, 5)[None]},
        ValueError,
        "cu_seqlens_q: expected a contiguous tensor of shape (batch + 1,), got shape (1, 3)",
    ),
    "cu_seqlens_q empty": (
        {"cu_seqlens_q": int32()},
        ValueError,
        "cu_seqlens_q: expected a contiguous tensor of shape (batch + 1,), got shape (0,)",
    ),
    "cu_seqlens_q strided": (
        {"cu_seqlens_q": int32(0, 9, 2, 9, 5)[::2]},
        ValueError,
        "cu_seqlens_q: expected a contiguous tensor of shape (batch + 1,)",
    ),
    "cu_seqlens_k elsewhere": (
        {"cu_seqlens_k": int32(0, 3, 7, device="meta")},
        ValueError,
        f"cu_seqlens_k: expected q's device {tensor(1).device}, got meta",
    ),
    "another number of sequences": (
        {"cu_seqlens_k": int32(0, 7)},
        ValueError,
        "cu_seqlens_k: expected cu_seqlens_q's shape (3,), got (2,)",
    ),
    "max_seqlen_q is two": (
        {"max_seqlen_q": int32(3, 4)},
        TypeError,
        "max_seqlen_q: expected an int, or a tensor of one int32 or int64, got torch.int32 of shape (2,)",
    ),
    "out of a dense batch": (
        {"out": tensor(1, 5, 4, 24)},
        ValueError,
        "out: expected shape (5, 4, 24), got shape (1, 5, 4, 24)",
    ),
    "max_seqlen_k is negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected 0 to 2**31 - 1, got -1"),
    "alibi_slopes of another batch": (
        {"alibi_slopes": tensor(5, 4, dtype=torch.float32)},
        ValueError,
        "alibi_slopes: expected shape (4,) or shape (2, 4), got shape (5, 4)",
    ),
}

# Values that live on the device: (cu_seqlens of q or k, message).
WRONG_VALUES = {
    "does not start at 0": ({"cu_seqlens_q": int32(1, 2, 5)}, "cu_seqlens_q[0]: expected 0, got 1"),
    "falls": ({"cu_seqlens_k": int32(0, 4, 3)}, "cu_seqlens_k, sequence 1: expected a length of 0 to 4, got -1"),
    "longer than max_seqlen": (
        {"cu_seqlens_q": int32(0, 4, 5)},
        "cu_seqlens_q, sequence 0: expected a length of 0 to 3, got 4",
    ),
    "ends past the last row": ({"cu_seqlens_k": int32(0, 4, 8)}, "cu_seqlens_k[2]: expected at most the 7 rows"),
}


@pytest.mark.parametrize(("changed", "error", "message"), WRONG.values(), ids=WRONG)
def test_dense_arguments(changed, error, message, launches):
    with pytest.raises(error, match=re.escape(message)):
        flash_attention(**dense(**changed))
    assert not launches.called


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_VARLEN.values(), ids=WRONG_VARLEN)
def test_varlen_arguments(changed, error, message, launches):
    with pytest.raises(error, match=re.escape(message)):
        flash_attention_varlen(**varlen(**changed))
    assert not launches.called


@pytest.mark.parametrize(
    "name", ["causal", "softmax_scale", "window_size", "softcap", "sinks", "alibi_slopes", "dropout_p", "out"]
)
def test_varlen_checks_its_options_too(name, launches):
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        flash_attention_varlen(**varlen(**{name: object()}))
    assert not launches.called


def test_the_reference_backend_checks_as_well(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    with pytest.raises(ValueError, match=r"^k: expected q's head dimension 16, got 24"):
        flash_attention(**dense(k=tensor(2, 7, 2, 24)))


def test_right_arguments_are_launched(launches):
    flash_attention(**dense())
    flash_attention(**dense(window_size=[1, 2], softmax_scale=np.float32(0.5), softcap=3))
    flash_attention_varlen(**varlen())
    assert launches.call_count == 3


@pytest.mark.parametrize(("changed", "message"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_values_are_read_when_asked(changed, message, launches, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_attention_varlen(**varlen(**changed), check_values=True)
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_attention_varlen(**varlen(**changed))
    assert not launches.called
    flash_attention_varlen(**varlen(**changed), check_values=False)
    assert launches.call_count == 1


def test_right_values_pass(launches):
    flash_attention_varlen(**varlen(cu_seqlens_q=int32(0, 0, 3), cu_seqlens_k=int32(0, 4, 7)), check_values=True)
    assert launches.call_count == 1


@pytest.mark.parametrize("backend", ["Triton", "cuda", ""])
def test_an_unknown_backend(backend, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    with pytest.raises(ValueError, match="TRITON_ATTN_BACKEND: expected auto, triton or reference, got"):
        flash_attention(**dense())


@pytest.mark.skipif(not INTERPRETED, reason="the kernel runs on CPU tensors only in the interpreter")
@pytest.mark.parametrize(
    ("backend", "interpreted", "by_kernel"),
    [
        (None, "1", True),
        (None, "0", False),
        ("auto", "1", True),
        ("auto", None, False),
        ("triton", None, True),
        ("reference", "1", False),
    ],
)
def test_the_backend_of_a_cpu_tensor(backend, interpreted, by_kernel, monkeypatch):
    for name, value in (("TRITON_ATTN_BACKEND", backend), ("TRITON_INTERPRET", interpreted)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with mock.patch.object(forward, "launch") as launch:
        flash_attention(**dense())
    assert launch.called == by_kernel


def test_fp64_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    q = torch.randn(1, 5, 2, 16, dtype=torch.float64, device=DEVICE)
    assert torch.equal(flash_attention(q, q, q), reference.flash_attention(q, q, q))


@pytest.mark.parametrize(
    "change", [{"causal": 1}, {"window_size": (True, -1)}, {"softcap": True}, {"softmax_scale": True}], ids=str
)
def test_a_call_like_the_one_before_is_checked_all_the_same(change):
    """1 == True: the cached result of a call must not accept another type."""
    q = torch.randn(1, 3, 1, 16)
    equal = {"causal": True, "window_size": (1, -1), "softcap": 1.0, "softmax_scale": 1.0}
    flash_attention(q, q, q, **equal)
    with pytest.raises(TypeError, match=next(iter(change))):
        flash_attention(q, q, q, **equal | change)
