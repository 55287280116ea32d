"""diffusers' native back ends on our kernels, on a CPU: `make test-engines`.

On a CPU torch's F.scaled_dot_product_attention has a flash back end of its own, so models reach ours by `route_sdpa`.
Context parallelism calls the operator by name, and reaches ours by torch's registry.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention

from triton_attn.interop import torch as door

dispatch = pytest.importorskip("diffusers.models.attention_dispatch", reason="make test-engines installs it")
NATIVE = [dispatch.AttentionBackendName.NATIVE, dispatch.AttentionBackendName._NATIVE_FLASH]


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 40, 4, 32, generator=generator, dtype=torch.float16) for _ in range(3)]


def expected(q, k, v, **options):
    views = (x.transpose(1, 2).double() for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*views, **options).transpose(1, 2)


def count_calls(monkeypatch, name):
    """The calls of a function of the door from now on."""
    calls, function = [], getattr(door, name)

    def counted(*args, **options):
        calls.append(name)
        return function(*args, **options)

    monkeypatch.setattr(door, name, counted)
    return calls


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_native_back_ends(backend, is_causal, monkeypatch):
    q, k, v = inputs()
    out64, calls = expected(q, k, v, is_causal=is_causal), count_calls(monkeypatch, "flash_attention")
    with door.route_sdpa():
        out = dispatch.dispatch_attention_fn(q, k, v, is_causal=is_causal, backend=backend)
    assert calls == ["flash_attention"]
    torch.testing.assert_close(out.double(), out64, atol=2e-3, rtol=2e-3)


def test_the_operators_of_context_parallelism(monkeypatch):
    """Forward with the log-sum-exp, and backward, as diffusers' ring attention calls them."""
    q, k, v = inputs()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out64 = expected(*leaves)
    dout = torch.randn(out64.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float16)
    gradients = torch.autograd.grad(out64, leaves, dout.double())
    door.register("triton_attn of diffusers", dispatch_key="CPU")
    torch.nn.attention.activate_flash_attention_impl("triton_attn of diffusers")
    try:
        calls, context = count_calls(monkeypatch, "forward_pass"), SimpleNamespace()
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        out, lse = dispatch._native_flash_attention_forward_op(context, q, k, v, return_lse=True)
        ours = dispatch._native_flash_attention_backward_op(context, dout)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert calls == ["forward_pass"]
    assert lse.shape == out.shape[:-1]
    torch.testing.assert_close(out.double(), out64.detach(), atol=2e-3, rtol=2e-3)
    for found, gradient in zip(ours, gradients):
        torch.testing.assert_close(found.double(), gradient, atol=4e-3, rtol=4e-3)
