"""Is an attention output right? Judged by errors against fp64, beside the error that torch makes in the same dtype."""

import torch

from triton_attn import reference
from triton_attn._host.definition import attend
from triton_attn.testing import assert_close_to_reference

SAMPLED_ROWS = 128
_NO_OPTIONS = {
    "causal": False,
    "softmax_scale": None,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "sinks": None,
}


def by_torch(q, k, v, **options):
    """(out, lse) as torch computes them, every product in the dtype of q."""
    return attend(q, k, v, compute_dtype=q.dtype, **_NO_OPTIONS | options)


def check_sample(out, q, k, v, causal):
    """Raise AssertionError if `out` is wrong in the first rows of its first heads or the last rows of its last.

    All tensors are (batch, seqlen, heads, head_dim); the heads are those of the first and of the last KV head. Causal
    needs as many keys as queries: the first rows see as many keys; the last rows see all, since masks are aligned to
    the bottom right.
    """
    group_size = q.shape[2] // k.shape[2]
    first, last = slice(SAMPLED_ROWS), slice(-SAMPLED_ROWS, None)
    for entry, heads, queries, keys in (
        (slice(1), slice(group_size), first, first if causal else slice(None)),
        (slice(-1, None), slice(-group_size, None), last, slice(None)),
    ):
        sample = q[entry, queries, heads], k[entry, keys, entry], v[entry, keys, entry]
        assert_close_to_reference(
            out[entry, queries, heads],
            reference.flash_attention(*(x.double() for x in sample), causal=causal),
            torch_out=by_torch(*sample, causal=causal)[0],
        )


def check_gradients(attention, problem, dtype, device):
    """Raise AssertionError if the gradients of `attention`, a function of q, k and v, are wrong at that problem."""
    shape = (problem.batch, problem.seqlen, problem.num_heads, problem.head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))

    def gradients(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(function(*inputs), inputs, dout.to(dtype))

    ours = gradients(attention, dtype)
    exact = gradients(lambda *inputs: reference.flash_attention(*inputs, causal=problem.causal), torch.float64)
    torchs = gradients(lambda *inputs: by_torch(*inputs, causal=problem.causal)[0], dtype)
    for gradient, expected, torch_out in zip(ours, exact, torchs):
        assert_close_to_reference(gradient, expected, torch_out=torch_out, factor=3.0)
