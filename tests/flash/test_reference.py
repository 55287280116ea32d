"""The reference against torch's own attention, and against its formulas for one query at a time."""

import contextlib
import math

import pytest
import torch
from half_products import NoNanIsRead
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from triton_attn import reference
from triton_attn._host.definition import attend
from triton_attn.flash import backward_pass


def random_qkv(seqlen_q=7, seqlen_k=9, num_heads_q=4, num_heads_kv=2, head_dim=8, head_dim_v=6):
    generator = torch.Generator().manual_seed(0)
    shapes = (seqlen_q, num_heads_q, head_dim), (seqlen_k, num_heads_kv, head_dim), (seqlen_k, num_heads_kv, head_dim_v)
    return [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_torch(dtype, causal):
    q, k, v = (x.to(dtype) for x in random_qkv(seqlen_q=9))
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True)
    out = reference.flash_attention(q, k, v, causal=causal)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.transpose(1, 2))


OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"window_size": (0, -1), "softmax_scale": 0.3},
    {"softcap": 0.8},
    {"alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8], dtype=torch.float64)},
    {"alibi_slopes": torch.arange(8, dtype=torch.float64).view(2, 4) / 8, "causal": True},
    {"sinks": torch.tensor([0.0, 1.0, -2.0, 5.0], dtype=torch.float64)},
    {
        "causal": True,
        "window_size": (3, -1),
        "softcap": 2.0,
        "alibi_slopes": torch.full((4,), 0.3, dtype=torch.float64),
        "sinks": torch.ones(4, dtype=torch.float64),
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options) or "plain")
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 9), (9, 5), (1, 6)])
def test_against_its_formulas(seqlen_q, seqlen_k, options):
    q, k, v = random_qkv(seqlen_q, seqlen_k)
    out, lse = reference.flash_attention(q, k, v, **options, return_lse=True)
    for b in range(2):
        for head in range(4):
            for i in range(seqlen_q):
                expected_out, expected_lse = one_query(q, k, v, b, head, i, **options)
                torch.testing.assert_close(out[b, i, head], expected_out)
                torch.testing.assert_close(lse[b, head, i].item(), expected_lse)


def one_query(
    q,
    k,
    v,
    b,
    head,
    i,
    causal=False,
    window_size=(-1, -1),
    softmax_scale=None,
    softcap=0,
    alibi_slopes=None,
    sinks=None,
):
    """out and lse of one query, by the sums of the docstring."""
    left, right = (math.inf if side < 0 else side for side in window_size)
    right = 0 if causal else right
    position = i + k.shape[1] - q.shape[1]
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    total = math.exp(sinks[head]) if sinks is not None else 0.0
    out = torch.zeros(v.shape[3], dtype=torch.float64)
    for j in range(k.shape[1]):
        if not position - left <= j <= position + right:
            continue
        score = scale * sum(a * b for a, b in zip(q[b, i, head].tolist(), k[b, j, head // 2].tolist()))
        if softcap:
            score = softcap * math.tanh(score / softcap)
        if alibi_slopes is not None:
            slope = alibi_slopes[b, head] if alibi_slopes.ndim == 2 else alibi_slopes[head]
            score -= slope.item() * abs(position - j)
        total += math.exp(score)
        out += math.exp(score) * v[b, j, head // 2]
    return (out / total, math.log(total)) if total else (out, -math.inf)


def test_varlen_is_each_sequence_by_itself():
    q, k, v = (x[0] for x in random_qkv(12, 15))
    cu_seqlens_q, cu_seqlens_k = (torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 4, 4, 10], [0, 0, 6, 14]))
    slopes = torch.rand(3, 4, dtype=torch.float64)
    options = {"causal": True, "sinks": torch.ones(4, dtype=torch.float64)}
    out, lse = reference.flash_attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, 6, 8, alibi_slopes=slopes, return_lse=True, **options
    )
    for i, (rows_q, rows_k) in enumerate(
        [(slice(0, 4), slice(0, 0)), (slice(4, 4), slice(0, 6)), (slice(4, 10), slice(6, 14))]
    ):
        expected_out, expected_lse = reference.flash_attention(
            q[None, rows_q], k[None, rows_k], v[None, rows_k], alibi_slopes=slopes[i], return_lse=True, **options
        )
        assert torch.equal(out[rows_q], expected_out[0])
        assert torch.equal(lse[:, rows_q], expected_lse[0])
    assert (out[10:] == 0).all()
    assert (lse[:, 10:] == -torch.inf).all()


class Observer(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def of_each_sequence_and_padded(function, tensors, **arguments):
    """Results and gradients with lengths that the host reads, and where an observer hides them. Rows after the last
    sequence hold NaN."""
    for observer in (contextlib.nullcontext(), Observer()):
        xs = [x.clone().requires_grad_() for x in tensors]
        with observer:
            results = function(*xs, **arguments, return_lse=True)
        loss = sum((x.where(x.isfinite(), 0.0) * torch.arange(x.numel()).view(x.shape)).sum() for x in results)
        yield *results, *(torch.autograd.grad(loss, xs) if loss.requires_grad else ())


SEQUENCES = [
    pytest.param([0, 4, 4, 10], [0, 0, 6, 14], id="an empty one"),
    pytest.param([0, 4, 4, 12], [0, 0, 6, 15], id="no row after the last one"),
    pytest.param([0, 0, 0, 0], [0, 0, 0, 0], id="empty ones"),
    pytest.param([0, 5, 9, 99], [0, 6, 9, 99], id="a length beyond the last row"),
    pytest.param([0], [0], id="none"),
]


@pytest.mark.parametrize("max_seqlen", [int, torch.tensor])
@pytest.mark.parametrize("options", [*OPTIONS, {"dropout_p": 0.4, "dropout_seed": 7}], ids=", ".join)
@pytest.mark.parametrize(("bounds_q", "bounds_k"), SEQUENCES)
def test_padded_sequences_are_each_by_itself(bounds_q, bounds_k, options, max_seqlen):
    q, k, v = (x[0] for x in random_qkv(12, 15))
    q[bounds_q[-1] :] = k[bounds_k[-1] :] = v[bounds_k[-1] :] = float("nan")
    slopes = options.get("alibi_slopes")
    if slopes is not None and slopes.ndim == 2:
        options = options | {"alibi_slopes": torch.arange(12, dtype=torch.float64).view(3, 4)[: len(bounds_q) - 1] / 8}
    cu_seqlens = (torch.tensor(bounds, dtype=torch.int32) for bounds in (bounds_q, bounds_k))
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    arguments = options | dict(zip(names, (*cu_seqlens, max_seqlen(8), max_seqlen(9))))
    expected, got = of_each_sequence_and_padded(reference.flash_attention_varlen, (q, k, v), **arguments)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["fused", "absorbed"])
@pytest.mark.parametrize(("bounds_q", "bounds_k"), SEQUENCES)
def test_padded_sequences_of_latent_vectors_are_each_by_itself(bounds_q, bounds_k, mode):
    torch.manual_seed(0)
    shapes = (12, 3, 8), (12, 3, 4), (15, 16), (15, 4), (3, 8, 16), (3, 6, 16)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for x, bounds in zip(tensors, (bounds_q, bounds_q, bounds_k, bounds_k)):
        x[bounds[-1] :] = float("nan")
    cu_seqlens = (torch.tensor(bounds, dtype=torch.int32) for bounds in (bounds_q, bounds_k))
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    arguments = dict(zip(names, (*cu_seqlens, 8, 9)), mode=mode)
    expected, got = of_each_sequence_and_padded(reference.mla_prefill, tensors, **arguments)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seqlen", [7, 40])
def test_the_yardstick_in_half_precision_reads_nothing_after_the_last_row(seqlen):
    """AMX reads past a row's end if its width is not a multiple of 32. NaN there must not affect the result."""
    q, k, v = (torch.randn(1, seqlen + 1, 1, 40, dtype=torch.bfloat16) for _ in range(3))
    for x in (q, k, v):
        x[:, seqlen:] = float("nan")
    case = dict(causal=True, softmax_scale=None, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None)
    with NoNanIsRead():
        out, _ = attend(*(x[:, :seqlen] for x in (q, k, v)), **case, compute_dtype=torch.bfloat16)
    assert out.isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"causal": True, "dropout_p": 0.4, "dropout_seed": 3}],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_gradients_from_results_are_those_of_autograd(options, packed, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    inputs = [x.float().requires_grad_() for x in random_qkv(7, 9)]
    options = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    lengths = None, None, 7, 9
    if packed:
        inputs = [x.detach().flatten(0, 1).requires_grad_() for x in inputs]
        lengths = torch.tensor([0, 3, 11], dtype=torch.int32), torch.tensor([0, 9, 13], dtype=torch.int32), 8, 9
    leaves = list(inputs)
    if "sinks" in options:
        options["sinks"] = options["sinks"].clone().requires_grad_()
        leaves.append(options["sinks"])
    if packed:
        results = reference.flash_attention_varlen(*inputs, *lengths, **options, return_lse=True)
    else:
        results = reference.flash_attention(*inputs, **options, return_lse=True)
    douts = [torch.randn_like(x) for x in results]
    expected = torch.autograd.grad(
        [x[torch.isfinite(x)] for x in results], leaves, [d[torch.isfinite(x)] for x, d in zip(results, douts)]
    )
    out, lse = (x.detach() for x in results)
    options = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    found = backward_pass(douts[0], douts[1], out, lse, *(x.detach() for x in inputs), lengths, **options)
    for gradient, of_autograd in zip(found, expected):
        torch.testing.assert_close(gradient, of_autograd, atol=1e-5, rtol=1e-5)
    assert (found[3] is None) == ("sinks" not in options)
