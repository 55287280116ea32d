"""paged_attention at scale: decode, chunked prefill, mixed batches. Slots without a key are NaN
(paged_cases.Inputs)."""

from dataclasses import replace

import pytest
import torch
from paged_cases import FLOAT8, PLAIN, Inputs, check, using
from scale import CACHED_MODELS, DTYPES, at_scale, heads_of

from perf.workloads.models import LLAMA_3_8B

# Inputs contain NaN on purpose, and numpy warns about it.
pytestmark = [pytest.mark.ci, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CONTEXTS = at_scale((8191, 1, 4096, 333, 0, 2053), (70, 1, 32, 0))
DECODE = {"seqlens_q": (1,) * len(CONTEXTS), "seqlens_k": CONTEXTS}
MIXED = {
    "varlen": True,
    "seqlens_q": at_scale((1021, 1, 1, 333, 0, 17), (9, 1, 1, 0)),
    "seqlens_k": CONTEXTS,
    "spare_rows": 5,
}
LLAMA = heads_of(LLAMA_3_8B)


def case_of(dtype, cache_dtype=None, **changes):
    return replace(PLAIN, dtype=dtype, cache_dtype=cache_dtype or dtype, **changes)


@of_dtypes
@pytest.mark.parametrize("model", CACHED_MODELS, ids=lambda model: model.name)
def test_decode(model, dtype):
    check(case_of(dtype, num_splits=0, **DECODE, **heads_of(model)))


@of_dtypes
@pytest.mark.parametrize("page_size", [1, 16, 256, None])
@pytest.mark.parametrize("num_splits", [1, 7])
def test_split_keys(num_splits, page_size, dtype):
    check(case_of(dtype, num_splits=num_splits, page_size=page_size, **DECODE, **LLAMA))


@of_dtypes
@pytest.mark.parametrize("model", CACHED_MODELS, ids=lambda model: model.name)
def test_mixed_batch(model, dtype):
    check(case_of(dtype, num_splits=0, **MIXED, **heads_of(model)))


@of_dtypes
@pytest.mark.parametrize("cache_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("batch", [DECODE, MIXED], ids=["decode", "mixed"])
def test_fp8_cache(batch, cache_dtype, dtype):
    check(case_of(dtype, cache_dtype, scales=("per head", 0.5), num_splits=0, **batch, **LLAMA))


@of_dtypes
@pytest.mark.parametrize("batch", [DECODE, MIXED], ids=["decode", "mixed"])
def test_prefix_tree(batch, dtype):
    num_pages = at_scale(1024, 32) // PLAIN.page_size
    forks = tuple((0, max(0, num_pages - i // 2)) if i else None for i in range(len(batch["seqlens_q"])))
    check(case_of(dtype, forks=forks, part=at_scale(16, 1), num_splits=0, **batch, **LLAMA))


@of_dtypes
@pytest.mark.parametrize("num_splits", [0, 1, 7])
def test_repeats_bitwise(num_splits, dtype):
    inputs = Inputs(case_of(dtype, num_splits=num_splits, **MIXED, **LLAMA))
    with using(PLAIN.config):
        expected = inputs.call()
        for _ in range(at_scale(10, 1)):
            assert all(map(torch.equal, inputs.call(), expected))
