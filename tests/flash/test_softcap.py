"""softcap in fp32: capped scores, outputs and gradients are as close to the definition as with torch's own tanh."""

import pytest
import torch
from attention_cases import DEVICE, using

from triton_attn import flash_attention, paged_attention, reference
from triton_attn.flash.configs import FlashConfig
from triton_attn.testing import assert_close_to_reference

# The interpreter's exp2 overflows where tanh saturates.
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
CAPS = (0.3, 5.0, 50.0, 1000.0, 1e4)


def near_and_far_scores():
    """q, k, v of one query head, with scores from 1e-4 to 100 on both sides of 0."""
    generator = torch.Generator().manual_seed(0)
    q = torch.ones(1, 48, 1, 16)
    q *= torch.logspace(-2, 0.5, 48)[None, :, None, None]
    k = torch.randn(1, 64, 1, 16, generator=generator)
    k *= torch.logspace(-2, 0.5, 64)[None, :, None, None]
    return q, k, torch.randn(1, 64, 1, 16, generator=generator)


def by_torch(function, tensors, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    gradients = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves)
    return out.detach(), lse.detach(), *gradients


@pytest.mark.oldest
@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("softcap", CAPS)
def test_flash_attention(softcap, deterministic):
    tensors = near_and_far_scores()
    options = {"softmax_scale": 1.0, "softcap": softcap, "return_lse": True, "deterministic": deterministic}

    def definition(*qkv):
        return reference.flash_attention(*qkv, **options)

    def kernel(*qkv):
        return flash_attention(*(x.to(DEVICE) for x in qkv), **options)

    with using(FlashConfig(32, 32, 4, 1)):
        results = by_torch(kernel, tensors, torch.float32)
    exact, torchs = (by_torch(definition, tensors, dtype) for dtype in (torch.float64, torch.float32))
    for name, result, ref64, torch_out in zip(("out", "lse", "dq", "dk", "dv"), results, exact, torchs):
        floor = 4 * torch.finfo(torch.float32).eps  # for the softmax, whose sums are near 1
        assert_close_to_reference(result.cpu(), ref64, torch_out=torch_out, factor=4.0, floor=floor, name=name)


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("softcap", CAPS)
def test_a_single_key_shows_the_capped_score(softcap):
    """lse is the score. Each key is a sequence of its own, and errors are compared score by score."""
    _, k, v = near_and_far_scores()
    k, v = k.transpose(0, 1).to(DEVICE), v.transpose(0, 1).to(DEVICE)
    q = torch.ones_like(k)
    options = {"softmax_scale": 1.0, "softcap": softcap, "return_lse": True}
    lengths = torch.ones(len(k), dtype=torch.int32, device=DEVICE)
    with using(FlashConfig(32, 32, 4, 1)):
        _, dense = flash_attention(q, k, v, **options)
    _, paged = paged_attention(q, k, v, lengths, lengths.cumsum(0, dtype=torch.int32)[:, None] - 1, **options)
    _, exact = reference.flash_attention(q.double(), k.double(), v.double(), **options)
    largest_term = (q * k).abs().amax((1, 2, 3))[:, None, None]  # rounding of the matmul itself
    for lse in (dense, paged):
        errors = (lse.double() - exact).abs()
        bound = torch.finfo(torch.float32).eps * (4 * exact.abs() + 8 * largest_term)
        assert (errors <= bound).all(), (errors / bound).max()
