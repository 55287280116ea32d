"""Random calls of copy_kv_pages: one launch, the right pages and no others, on every layout of a cache."""

import contextlib

import pytest
import torch
from append_cases import DEVICE, INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_attn import copy_kv_pages
from triton_attn.testing import padded
from triton_attn.toolchain import guard

pytestmark = pytest.mark.random
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn]


def random_cache(shape, dtype, seed, pages_last=False):
    """A cache inside poisoned memory, with the check of that memory. pages_last: pages are not the outer stride."""
    if pages_last:
        shape = (*shape[:-4], shape[-3], shape[-4], *shape[-2:])
    cache, check = padded(shape, dtype, DEVICE)
    bits = torch.randint(256, (cache.numel() * cache.element_size(),), generator=torch.Generator().manual_seed(seed))
    cache.view(-1).view(torch.uint8).copy_(bits)
    return cache.transpose(-3, -4) if pages_last else cache, check


def bits(x):
    return x.contiguous().view(torch.uint8)


@st.composite
def problems(draw):
    """(caches with the checks of the memory around them, sources, destinations)."""
    dtype = draw(st.sampled_from(DTYPES))
    num_pages = draw(st.integers(2, 9))
    layers = draw(st.sampled_from([(), (1,), (3,)]))
    shape = (*layers, num_pages, draw(st.sampled_from([1, 5, 16])), draw(st.integers(1, 4)))
    dims = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    caches = [random_cache((*shape, dim), dtype, i, draw(st.booleans())) for i, dim in enumerate(dims)]
    pages = draw(st.permutations(range(num_pages)))
    num_copies = draw(st.integers(0, num_pages - 1))
    sources = st.sampled_from(pages[num_copies:])
    return caches, draw(st.lists(sources, min_size=num_copies, max_size=num_copies)), pages[:num_copies]


@pytest.mark.emulated
@pytest.mark.oldest
@settings(max_examples=3 * settings.default.max_examples)  # they take milliseconds
@given(problems(), st.sampled_from([torch.int32, torch.int64]))
def test_pages_are_copied_in_one_launch(problem, index_dtype):
    caches, sources, destinations = problem
    tensors = [cache for cache, _ in caches]
    expected = [cache.clone() for cache in tensors]
    for cache in expected:
        for source, destination in zip(sources, destinations):
            cache[..., destination, :, :, :] = cache[..., source, :, :, :]
    pages = [torch.tensor(x, dtype=index_dtype, device=DEVICE) for x in (sources, destinations)]
    with guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        copy_kv_pages(tensors, *pages, check_values=True)
    if INTERPRETED:
        assert accesses.launches == (len(sources) > 0)
    for ours, theirs in zip(tensors, expected):
        assert torch.equal(bits(ours), bits(theirs))
    for _, check in caches:
        check()


@pytest.mark.emulated
@pytest.mark.oldest
@given(problems(), st.integers(1, 7), st.data())
def test_pages_are_copied_to_another_cache(problem, num_targets, data):
    """Its number of pages and its strides differ, and a page may have the same number on both sides."""
    caches, sources, _ = problem
    tensors, sources = [cache for cache, _ in caches], sources[:num_targets]
    shapes = [(*x.shape[:-4], num_targets, *x.shape[-3:]) for x in tensors]
    targets = [random_cache(x, tensors[0].dtype, 50 + i, data.draw(st.booleans())) for i, x in enumerate(shapes)]
    destinations = data.draw(st.permutations(range(num_targets)))[: len(sources)]
    untouched, expected = [x.clone() for x in tensors], [x.clone() for x, _ in targets]
    for cache, target in zip(tensors, expected):
        for source, destination in zip(sources, destinations):
            target[..., destination, :, :, :] = cache[..., source, :, :, :]
    pages = [torch.tensor(x, dtype=torch.int64, device=DEVICE) for x in (sources, destinations)]
    copy_kv_pages(tensors, *pages, to=[x for x, _ in targets], check_values=True)
    for ours, theirs in zip([*tensors, *[x for x, _ in targets]], [*untouched, *expected]):
        assert torch.equal(bits(ours), bits(theirs))
    for _, check in (*caches, *targets):
        check()
