"""Checks of attention outputs: errors against fp64, beside the error that torch makes in the same dtype."""

import torch

from triton_attn import reference
from triton_attn._host.definition import attend
from triton_attn.testing import assert_close_to_reference

SAMPLED_ROWS = 128
SAMPLED_HEADS = 4
_NO_OPTIONS = {
    "causal": False,
    "softmax_scale": None,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "sinks": None,
}


def by_torch(q, k, v, **options):
    """(out, lse) computed by torch, with every matmul in the dtype of q."""
    return attend(q, k, v, compute_dtype=q.dtype, **_NO_OPTIONS | options)


def worst(found):
    """Of several Closeness the one whose error is nearest to its bound."""
    return max(found, key=lambda closeness: closeness.error / closeness.bound if closeness.bound else 0.0)


def check_sample(out, q, k, v, causal):
    """The worst Closeness. Raise AssertionError if `out` is wrong in the first rows of its first heads or in the last
    rows of its last heads.

    All tensors are (batch, seqlen, heads, head_dim), with no more queries than keys. The heads are those of the first
    and of the last KV head.
    """
    group_size = q.shape[2] // k.shape[2]
    rows = min(SAMPLED_ROWS, q.shape[1])
    first, last = slice(rows), slice(-rows, None)
    keys_of_first = slice(k.shape[1] - q.shape[1] + rows)  # masks are aligned to the bottom right
    found = []
    for entry, heads, queries, keys in (
        (slice(1), slice(group_size), first, keys_of_first if causal else slice(None)),
        (slice(-1, None), slice(-group_size, None), last, slice(None)),
    ):
        sample = q[entry, queries, heads], k[entry, keys, entry], v[entry, keys, entry]
        found.append(
            assert_close_to_reference(
                out[entry, queries, heads],
                reference.flash_attention(*(x.double() for x in sample), causal=causal),
                torch_out=by_torch(*sample, causal=causal)[0],
            )
        )
    return worst(found)


def check_gradients(attention, problem, dtype, device):
    """Raise AssertionError if the gradients of `attention`, a function of q, k and v, are wrong for the problem."""
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


def latent_by_torch(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, absorbed=False):
    """(out, lse) of causal `mla_prefill`, computed by torch with every matmul in the dtype of q_nope."""
    num_heads = q_nope.shape[2]
    k_nope = v = kv_latent.unsqueeze(2).expand(-1, -1, num_heads, -1)
    scale = (q_nope.shape[3] + q_pe.shape[3]) ** -0.5
    if absorbed:
        q_nope = torch.einsum("bihn,hnc->bihc", q_nope, w_uk)
    else:
        k_nope = torch.einsum("bjc,hnc->bjhn", kv_latent, w_uk)
        v = torch.einsum("bjc,hvc->bjhv", kv_latent, w_uv)
    q = torch.cat([q_nope, q_pe], dim=3)
    k = torch.cat([k_nope, k_pe.unsqueeze(2).expand(-1, -1, num_heads, -1)], dim=3)
    out, lse = by_torch(q, k, v, causal=True, softmax_scale=scale)
    return (torch.einsum("bihc,hvc->bihv", out, w_uv) if absorbed else out), lse


def check_latent_decode(out, q, rows):
    """The worst Closeness. Raise AssertionError if `out` is wrong in a few heads of the first and of the last sequence.

    q is (batch, 1, heads, dim). rows (batch, seqlen, dim) are the latent vectors and rotary keys of the cache. out is
    (batch, 1, heads, kv_lora_rank).
    """
    k = rows.unsqueeze(2)
    return worst(
        check_sample(out[:, :, heads], q[:, :, heads], k, k[..., : out.shape[3]], causal=False)
        for heads in (slice(SAMPLED_HEADS), slice(-SAMPLED_HEADS, None))
    )


def check_latent_prefill(out, q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv):
    """The worst Closeness. Raise AssertionError if `out` is wrong in the first rows of the first head or in the last
    rows of the last head.

    Its error is compared with the error of torch in the plain or in the absorbed form, whichever is larger.
    """
    rows = min(SAMPLED_ROWS, q_nope.shape[1])
    keys_of_first = kv_latent.shape[1] - q_nope.shape[1] + rows
    found = []
    for heads, queries, keys in (
        (slice(1), slice(rows), slice(keys_of_first)),
        (slice(-1, None), slice(-rows, None), slice(None)),
    ):
        sample = q_nope[:, queries, heads], q_pe[:, queries, heads], kv_latent[:, keys], k_pe[:, keys]
        sample = *sample, w_uk[heads], w_uv[heads]
        exact = reference.mla_prefill(*(x.double() for x in sample))
        by_forms = [latent_by_torch(*sample, absorbed=absorbed)[0] for absorbed in (False, True)]
        torch_error = max((form.double() - exact).abs().max().item() for form in by_forms)
        found.append(assert_close_to_reference(out[:, queries, heads], exact, torch_error=torch_error))
    return worst(found)
