"""flash-attn 2's names: signatures, positional calls, packed tensors, what is refused."""

import inspect

import pytest
import torch

from triton_attn import flash_attention, flash_attention_varlen, reference
from triton_attn.interop import flash_attn as interop

DENSE_OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("flash_attn_func", f"(q, k, v, {DENSE_OPTIONS})"),
        ("flash_attn_kvpacked_func", f"(q, kv, {DENSE_OPTIONS})"),
        ("flash_attn_qkvpacked_func", f"(qkv, {DENSE_OPTIONS})"),
        ("flash_attn_varlen_func", f"(q, k, v, {LENGTHS}, {DENSE_OPTIONS}, block_table=None)"),
        ("flash_attn_varlen_kvpacked_func", f"(q, kv, {LENGTHS}, {DENSE_OPTIONS})"),
        ("flash_attn_varlen_qkvpacked_func", f"(qkv, cu_seqlens, max_seqlen, {DENSE_OPTIONS})"),
    ],
)
def test_signature_is_flash_attn_2s(name, signature):
    assert str(inspect.signature(getattr(interop, name))) == signature


@pytest.fixture
def qkv(device):
    torch.manual_seed(0)
    return torch.randn(2, 37, 3, 4, 32, device=device)


@pytest.fixture
def slopes(device):
    return torch.rand(4, device=device)


def test_positional_arguments_reach_their_places(qkv, slopes):
    q, k, v = qkv.unbind(2)
    out, lse, weights = interop.flash_attn_func(q, k, v, 0.0, 0.3, True, (9, 5), 2.0, slopes, True, True)
    options = dict(softmax_scale=0.3, causal=True, window_size=(9, 5), softcap=2.0, alibi_slopes=slopes)
    expected, expected_lse = reference.flash_attention(q, k, v, return_lse=True, **options)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert weights.numel() == 0


def test_packed_equals_separate_with_gradients(qkv):
    qkv.requires_grad_()
    packed = interop.flash_attn_qkvpacked_func(qkv, causal=True)
    kv_packed = interop.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True)
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv.unbind(2))
    separate = flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(packed, separate, atol=0, rtol=0)
    torch.testing.assert_close(kv_packed, separate, atol=0, rtol=0)
    dout = torch.randn_like(separate)
    separate.backward(dout)
    packed.backward(dout)
    torch.testing.assert_close(qkv.grad, torch.stack([q.grad, k.grad, v.grad], 2), atol=1e-5, rtol=1e-5)


def test_varlen_and_its_packed_forms(qkv):
    cu_seqlens = torch.tensor([0, 11, 11, 37], dtype=torch.int32, device=qkv.device)
    qkv = qkv[0]
    q, k, v = qkv.unbind(1)
    lengths = (cu_seqlens, cu_seqlens, 26, 26)
    expected, expected_lse = flash_attention_varlen(q, k, v, *lengths, causal=True, return_lse=True)
    out, lse, _ = interop.flash_attn_varlen_func(q, k, v, *lengths, causal=True, return_attn_probs=True)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=0, rtol=0)
    kv_packed = interop.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], *lengths, causal=True)
    qkv_packed = interop.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 26, causal=True)
    torch.testing.assert_close(kv_packed, expected, atol=0, rtol=0)
    torch.testing.assert_close(qkv_packed, expected, atol=0, rtol=0)


def test_negative_windows_are_unlimited_and_columns_may_be_strided(qkv):
    q, k, v = qkv.unbind(2)
    strided = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert strided.stride(-1) != 1
    out = interop.flash_attn_func(strided, k, v, window_size=(-7, -3))
    torch.testing.assert_close(out, flash_attention(q, k, v), atol=0, rtol=0)


def test_dropout_follows_torchs_generator(qkv):
    q, k, v = qkv.unbind(2)
    torch.manual_seed(3)
    first = interop.flash_attn_func(q, k, v, 0.5)
    second = interop.flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(3)
    assert torch.equal(interop.flash_attn_func(q, k, v, 0.5), first)
    assert not torch.equal(first, second)


def test_what_is_not_served_is_refused_by_name(qkv):
    q, k, v = qkv.unbind(2)
    with pytest.raises(NotImplementedError, match="return_attn_probs"):
        interop.flash_attn_func(q, k, v, dropout_p=0.1, return_attn_probs=True)
    cu_seqlens = torch.tensor([0, 37], dtype=torch.int32, device=qkv.device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=qkv.device)
    with pytest.raises(NotImplementedError, match="block_table"):
        interop.flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens, cu_seqlens, 37, 37, block_table=table)
