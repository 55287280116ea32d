"""The forward kernel of hopper.py on a GPU with its instructions: shapes of models, ragged and random calls.

Gluon has no interpreter, so these tests need such a GPU.
"""

from dataclasses import replace

import backward_cases
import hopper_cases
import pytest
import torch
from attention_cases import PLAIN, check
from scale import AT_SCALE, DTYPES, heads_of

from perf.workloads.models import GEMMA_3_12B, LLAMA_3_8B
from triton_attn import flash_attention
from triton_attn.flash import forward
from triton_attn.flash.configs import HOPPER_HEAD_DIMS

IS_HOPPER = AT_SCALE and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs an H100 or H200")
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
of_head_dims = pytest.mark.parametrize("head_dim", HOPPER_HEAD_DIMS)


@pytest.fixture(autouse=True)
def on_hopper():
    """Only this kernel runs."""
    with hopper_cases.launched(forward, "launch_flash_fwd_hopper"):
        yield


@of_dtypes
@of_masks
@of_head_dims
def test_prompt(head_dim, causal, dtype):
    shape = {"num_heads_kv": 2, "group_size": 4, "head_dim": head_dim, "head_dim_v": HOPPER_HEAD_DIMS[head_dim]}
    check(replace(PLAIN, dtype=dtype, causal=causal, seqlens_q=(4093,), seqlens_k=(4093,), **shape))


@of_dtypes
@of_masks
@of_head_dims
def test_ragged_batch(head_dim, causal, dtype):
    """With empty sequences, rows that see nothing, rows after the last sequence, and one sequence of NaN."""
    shape = {"num_heads_kv": 2, "group_size": 3, "head_dim": head_dim, "head_dim_v": HOPPER_HEAD_DIMS[head_dim]}
    shape |= {"seqlens_q": (1039, 1, 0, 127, 500, 64), "seqlens_k": (1093, 2048, 300, 0, 33, 64)}
    check(replace(PLAIN, varlen=True, dtype=dtype, causal=causal, poisoned_sequence=1, spare_rows=7, **shape))


@of_head_dims
@pytest.mark.parametrize("seed", range(12))
def test_random_calls(seed, head_dim):
    sizes = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 257, 500, 1000)
    check(hopper_cases.attention(seed, sizes, sizes, head_dim))


@of_dtypes
@pytest.mark.parametrize("model", [LLAMA_3_8B, GEMMA_3_12B], ids=lambda model: model.name)
def test_gradients_through_its_log_sum_exp(model, dtype):
    case = replace(backward_cases.PLAIN, dtype=dtype, seqlens_q=(1021,), seqlens_k=(1021,), **heads_of(model))
    backward_cases.check(case)


@of_masks
def test_repeats_bitwise(causal):
    """A race would show as a difference. There are more programs than resident ones."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(4, 4096, 16, 128, generator=generator, device="cuda").bfloat16() for _ in range(3))
    expected = flash_attention(q, k, v, causal=causal, return_lse=True)
    for _ in range(20):
        assert all(map(torch.equal, flash_attention(q, k, v, causal=causal, return_lse=True), expected))
