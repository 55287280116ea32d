"""Every family's kernels as they are compiled, on CPU tensors: right against fp64, without a fault, in every schedule.

What the interpreter cannot see: layouts, barriers, asynchronous copies, tensor maps and the parameters of a launch.
"""

import shutil

import pytest
import torch

import triton_attn as ta
from triton_attn import reference
from triton_attn.testing.emulator import SCHEDULES, emulate

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the stub driver cannot stand beside a real one"),
]

BF16 = torch.bfloat16


def normal(*shape, dtype=BF16):
    return torch.randn(*shape).to(dtype)


def in_fp64(values):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


def flash(head_dim=64, **options):
    """Causal, with more keys than queries and a part of a tile at the end of each."""
    q, k, v = normal(1, 70, 4, head_dim), normal(1, 150, 2, head_dim), normal(1, 150, 2, head_dim)
    options = {"causal": True, "return_lse": True, **options}
    call = lambda f, *inputs: f(*inputs, **options)  # noqa: E731
    return call(ta.flash_attention, q, k, v), call(reference.flash_attention, *in_fp64((q, k, v)))


def flash_varlen():
    q, k, v = normal(140, 4, 64), normal(140, 2, 64), normal(140, 2, 64)
    lengths = torch.tensor([0, 90, 90, 140], dtype=torch.int32), torch.tensor([0, 90, 90, 140], dtype=torch.int32)
    call = lambda f, *inputs: f(*inputs, *lengths, 90, 90, causal=True)  # noqa: E731
    return [call(ta.flash_attention_varlen, q, k, v)], [call(reference.flash_attention_varlen, *in_fp64((q, k, v)))]


def backward(deterministic):
    inputs, out_grad = (normal(1, 100, 2, 64), normal(1, 100, 1, 64), normal(1, 100, 1, 64)), normal(1, 100, 2, 64)

    def gradients(function, dtype, **options):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = function(*leaves, causal=True, **options)
        out.backward(out_grad.to(dtype))
        return [out.detach(), *(x.grad for x in leaves)]

    computed = gradients(ta.flash_attention, BF16, deterministic=deterministic)
    return computed, gradients(reference.flash_attention, torch.float64)


def paged(**options):
    keys, values, q = normal(30, 16, 2, 64), normal(30, 16, 2, 64), normal(2, 1, 8, 64)
    where = torch.tensor([230, 133], dtype=torch.int32), torch.randperm(30).to(torch.int32).view(2, 15)
    computed = ta.paged_attention(q, keys, values, *where, **options, return_lse=True)
    return computed, reference.paged_attention(*in_fp64((q, keys, values)), *where, return_lse=True)


def append():
    rows, slots = (normal(20, 2, 64), normal(20, 2, 64)), torch.randperm(64)[:20]

    def caches(function):
        pools = [torch.zeros(4, 16, 2, 64, dtype=BF16) for _ in range(2)]
        function(*rows, *pools, slots)
        return pools

    return caches(ta.append_kv_cache), caches(reference.append_kv_cache)


def copy():
    """The pointers of the caches come in a tuple that the program indexes."""
    pools, of_pages = (
        (normal(2, 8, 16, 2, 64), normal(2, 8, 16, 2, 64)),
        torch.tensor([[0, 1], [6, 7]], dtype=torch.int32),
    )

    def copied(function):
        pair = [pool.clone() for pool in pools]
        function(tuple(pair), *of_pages)
        return pair

    return copied(ta.copy_kv_pages), copied(reference.copy_kv_pages)


def merge():
    parts, lse = normal(3, 1, 20, 4, 64), torch.randn(3, 1, 4, 20)
    return ta.merge_attention(parts, lse), reference.merge_attention(parts.double(), lse.double())


def mla_decode(heads=16):
    q_nope, q_pe, cache = normal(1, 1, heads, 512), normal(1, 1, heads, 64), normal(4, 64, 576)
    where = torch.tensor([200], dtype=torch.int32), torch.arange(4, dtype=torch.int32)[None]
    options = {"softmax_scale": 0.04, "return_lse": True}
    computed = ta.mla_decode(q_nope, q_pe, cache, *where, **options)
    return computed, reference.mla_decode(*in_fp64((q_nope, q_pe, cache)), *where, **options)


def mla_prefill():
    q_nope, q_pe, latents, rope = normal(1, 70, 2, 128), normal(1, 70, 2, 64), normal(1, 70, 512), normal(1, 70, 64)
    weights = [normal(2, 128, 512) / 512**0.5 for _ in range(2)]
    inputs = q_nope, q_pe, latents, rope, *weights
    return [ta.mla_prefill(*inputs)], [reference.mla_prefill(*in_fp64(inputs))]


CALLS = {
    "flash": flash,
    "flash varlen": flash_varlen,
    "flash backward": lambda: backward(False),
    "flash backward deterministic": lambda: backward(True),
    "paged": paged,
    "paged splits": lambda: paged(num_splits=3),
    "append": append,
    "copy": copy,
    "merge": merge,
    "mla decode": mla_decode,
    "mla prefill": mla_prefill,
}
# The scale of an error: bf16 has 8 digits, and a gradient sums many products.
BOUND = 0.03


def check(call):
    computed, expected = call()
    for got, right in zip(computed, expected):
        torch.testing.assert_close(got.double(), right.double(), atol=BOUND, rtol=BOUND, equal_nan=True)


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CALLS)
def test_portable_kernels(name, arch, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "portable")
    with emulate(arch) as log:
        check(CALLS[name])
    assert log
    assert all(launch.executed.sum() for launch in log)


@pytest.mark.oldest
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "portable")
    with emulate("sm_90", schedule=schedule):
        check(flash)
        check(lambda: paged(num_splits=3))


HOPPER = {
    "_flash_fwd_hopper_kernel causal": lambda: flash(128),
    "_flash_fwd_hopper_kernel full": lambda: flash(128, causal=False),
    "_mla_decode_hopper_kernel": lambda: mla_decode(128),
}


@pytest.mark.oldest
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", HOPPER)
def test_kernels_of_hopper(name, schedule, monkeypatch):
    """They have no interpreter: Gluon's layouts, mbarriers, tensor copies and warp specialization run here alone."""
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "hopper")
    with emulate("sm_90", schedule=schedule, seed=1) as log:
        check(HOPPER[name])
    assert log[0].name == name.split()[0]
