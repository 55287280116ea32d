"""mla_decode and mla_prefill at scale, at the widths of DeepSeek-V2 and V3."""

import decode_cases
import prefill_cases
import pytest
import torch
from scale import DTYPES, at_scale

from triton_attn.mla.schedule import MODES

# Inputs contain NaN on purpose, and numpy warns about it.
pytestmark = [pytest.mark.ci, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_caches = pytest.mark.parametrize("is_fp8", [False, True], ids=["half", "fp8"])
WIDTHS = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, kv_lora_rank=512, v_head_dim=128)
CONTEXTS = at_scale((8191, 1, 4096, 333, 0, 2053), (40, 1, 0))
HEADS = at_scale((128, 16), (2,))
SEVERAL = {"packed": True, "seqlens_q": at_scale((1021, 1, 0, 333), (20, 1)), "spare_rows": 5}
SEVERAL["seqlens_k"] = at_scale((4093, 2048, 5, 333), (33, 9))


@of_dtypes
@of_caches
@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_decode(seqlen_q, num_heads, is_fp8, dtype):
    sizes = dict(seqlen_q=seqlen_q, seqlens_k=CONTEXTS, num_heads=num_heads, page_size=64, num_splits=0)
    decode_cases.check(decode_cases.Case(dtype=dtype, is_fp8=is_fp8, **sizes, **WIDTHS))


@of_dtypes
@of_caches
def test_decode_of_what_is_absorbed_already(is_fp8, dtype):
    """In FlashMLA's form: an explicit scale, no weights, keys in splits, small pages."""
    sizes = dict(seqlens_k=CONTEXTS, num_heads=HEADS[0], page_size=16, num_splits=3)
    options = dict(with_uk=False, with_uv=False, softmax_scale=0.07)
    decode_cases.check(decode_cases.Case(dtype=dtype, is_fp8=is_fp8, **sizes, **options, **WIDTHS))


@of_dtypes
@pytest.mark.parametrize("mode", MODES)
def test_prompt(mode, dtype):
    seqlens = at_scale((2053,), (20,))
    case = prefill_cases.Case(mode, dtype, seqlens_q=seqlens, seqlens_k=seqlens, num_heads=HEADS[-1], **WIDTHS)
    prefill_cases.check(case)


@of_dtypes
@pytest.mark.parametrize("mode", MODES)
def test_several_prompts(mode, dtype):
    prefill_cases.check(prefill_cases.Case(mode, dtype, num_heads=HEADS[-1], **SEVERAL, **WIDTHS))


@of_dtypes
@pytest.mark.parametrize("mode", ["fused", "materialized"])
def test_gradients(mode, dtype):
    seqlens = at_scale((1021,), (20,))
    case = prefill_cases.Case(mode, dtype, seqlens_q=seqlens, seqlens_k=seqlens, num_heads=at_scale(16, 1), **WIDTHS)
    prefill_cases.check_gradients(case)


@of_dtypes
@of_caches
def test_decode_repeats_bitwise(is_fp8, dtype):
    sizes = dict(seqlens_k=CONTEXTS, num_heads=HEADS[0], page_size=64, num_splits=0)
    inputs = decode_cases.Inputs(decode_cases.Case(dtype=dtype, is_fp8=is_fp8, **sizes, **WIDTHS))
    with decode_cases.using(decode_cases.TILES):
        expected = inputs.call()
        for _ in range(at_scale(10, 1)):
            assert all(map(torch.equal, inputs.call(), expected))
