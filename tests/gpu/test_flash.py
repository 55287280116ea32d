"""flash_attention and flash_attention_varlen, forward and backward, at scale."""

from dataclasses import replace

import backward_cases
import pytest
import torch
from attention_cases import DEVICE, PLAIN, check, lying_far_apart, using
from scale import DTYPES, MODELS, at_scale, heads_of

from perf.workloads.models import FALCON_7B, GPT_OSS_120B, LLAMA_3_8B
from triton_attn import flash_attention

# Inputs contain NaN on purpose, and numpy warns about it.
pytestmark = [pytest.mark.ci, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
of_models = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
schedules = pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
RAGGED = at_scale((2039, 1, 0, 127, 1021), (33, 1, 0, 5))
RAGGED_KEYS = at_scale((4093, 2048, 300, 127, 1021), (47, 32, 10, 5))


@of_dtypes
@of_models
def test_prompt(model, dtype):
    seqlens = at_scale((4096,), (40,))
    check(replace(PLAIN, dtype=dtype, seqlens_q=seqlens, seqlens_k=seqlens, **heads_of(model)))


@of_dtypes
@pytest.mark.parametrize("causal", [False, True])
def test_chunk_of_a_long_prompt(causal, dtype):
    shape = heads_of(LLAMA_3_8B) | {"num_heads_kv": 1}
    lengths = {"seqlens_q": at_scale((1021,), (9,)), "seqlens_k": at_scale((16381,), (70,))}
    check(replace(PLAIN, dtype=dtype, causal=causal, **lengths, **shape))


@of_dtypes
@pytest.mark.parametrize("model", [LLAMA_3_8B, FALCON_7B, GPT_OSS_120B], ids=lambda model: model.name)
def test_ragged_batch(model, dtype):
    """With rows after the last sequence, and a sequence of NaN rows that must not affect the others."""
    check(
        replace(
            PLAIN,
            varlen=True,
            dtype=dtype,
            seqlens_q=RAGGED,
            seqlens_k=RAGGED_KEYS,
            poisoned_sequence=1,
            spare_rows=7,
            **heads_of(model),
        )
    )


@of_dtypes
def test_every_option_at_once(dtype):
    options = {"alibi": "per sequence", "softcap": 20.0, "softmax_scale": 0.07, "dropout_p": 0.1}
    lengths = {"seqlens_q": RAGGED, "seqlens_k": RAGGED_KEYS}
    shape = heads_of(GPT_OSS_120B) | {"num_heads_kv": 1, "group_size": 2}
    check(replace(PLAIN, varlen=True, dtype=dtype, **lengths, **shape, **options))


@of_dtypes
@schedules
@pytest.mark.parametrize("model", [m for m in MODELS if m.head_dim <= 256], ids=lambda model: model.name)
def test_gradients(model, deterministic, dtype):
    seqlens = at_scale((2039,), (37,))
    shape = heads_of(model)
    if model.attention in ("MHA", "MLA"):
        shape["num_heads_kv"] = at_scale(16, 1)
    lengths = {"seqlens_q": seqlens, "seqlens_k": seqlens}
    case = replace(backward_cases.PLAIN, dtype=dtype, deterministic=deterministic, **lengths, **shape)
    backward_cases.check(case)


@of_dtypes
@schedules
def test_gradients_of_a_ragged_batch(deterministic, dtype):
    options = {"varlen": True, "poisoned_sequence": 1, "spare_rows": 7, "dlse_layout": "contiguous"}
    lengths = {"seqlens_q": RAGGED, "seqlens_k": RAGGED_KEYS}
    case = replace(backward_cases.PLAIN, dtype=dtype, deterministic=deterministic, **lengths, **options)
    backward_cases.check(replace(case, **heads_of(LLAMA_3_8B)))


def random_call(dtype):
    """q, k, v and dout of a few sequences, with more programs than a GPU has SMs."""
    seqlen, shape = at_scale(4096, 70), heads_of(LLAMA_3_8B)
    heads = shape["num_heads_kv"] * shape["group_size"], shape["num_heads_kv"]
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, seqlen, n, shape["head_dim"]) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(x, generator=generator).to(DEVICE, dtype) for x in shapes]


@of_dtypes
def test_forward_and_deterministic_backward_repeat_bitwise(dtype):
    *inputs, dout = random_call(dtype)

    def results():
        leaves = [x.detach().requires_grad_() for x in inputs]
        with using(PLAIN.config):
            out, lse = flash_attention(*leaves, causal=True, deterministic=True, return_lse=True)
            return out, lse, *torch.autograd.grad(out, leaves, dout)

    expected = results()
    for _ in range(at_scale(10, 1)):
        assert all(map(torch.equal, results(), expected))


def test_offsets_past_32_bits():
    """Sequences more than 2^31 elements apart, one tensor at a time."""
    tensors = [x[:, : at_scale(256, 20), :1].contiguous() for x in random_call(torch.bfloat16)]

    def results(q, k, v, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with using(PLAIN.config):
            out = flash_attention(*leaves, causal=True, deterministic=True)
            return out, *torch.autograd.grad(out, leaves, dout)

    expected = results(*tensors)
    for which, x in enumerate(tensors):
        far = [*tensors[:which], lying_far_apart(x, 0, 2**31 + 64), *tensors[which + 1 :]]
        assert all(map(torch.equal, results(*far), expected))
