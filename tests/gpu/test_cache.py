"""Appends, copies and merges at scale, and a cache of more than 2^31 elements."""

import math

import pytest
import torch
from append_cases import DEVICE
from scale import CACHED_MODELS, DTYPES, MODELS, at_scale

from perf.commands.verify import verify
from perf.workloads.models import DEEPSEEK_V3, LLAMA_3_8B
from triton_attn import (
    PagedKVCache,
    append_kv_cache,
    append_latent_cache,
    copy_kv_pages,
    mla_decode,
    paged_attention,
    reference,
)

of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SEQLEN = at_scale(4093, 24)
PAGE_SIZE = 16
PER_HEAD = "append_kv_cache", "copy_kv_pages"
CALLS = [(model, function) for model in at_scale(CACHED_MODELS, [LLAMA_3_8B]) for function in PER_HEAD]
CALLS += [(DEEPSEEK_V3, "append_latent_cache"), *((model, "merge_attention") for model in at_scale(MODELS, []))]


@of_dtypes
@pytest.mark.parametrize(("model", "function"), CALLS, ids=lambda x: getattr(x, "name", x))
def test_against_the_reference(model, function, dtype):
    for _, wrong in verify((model, function, SEQLEN, dtype)):
        assert not wrong


def large_cache(*shape):
    """In memory that is touched only where it is written. Its last pages are beyond 2^31 elements."""
    num_pages = 2**31 // math.prod(shape) + 8
    return torch.empty(num_pages, *shape, dtype=torch.bfloat16, device=DEVICE), num_pages


def test_a_large_cache():
    """Append to the last pages, copy within them and attend to them, as in a small cache."""
    heads = 8, 128
    (k_cache, num_pages), (v_cache, _) = large_cache(PAGE_SIZE, *heads), large_cache(PAGE_SIZE, *heads)
    k, v = (torch.randn(40, *heads, device=DEVICE).bfloat16() for _ in range(2))
    pages = torch.arange(num_pages - 3, num_pages, dtype=torch.int32, device=DEVICE)
    slots = pages[0].long() * PAGE_SIZE + torch.arange(40, device=DEVICE)
    append_kv_cache(k, v, k_cache, v_cache, slots)
    copy_kv_pages((k_cache, v_cache), pages, pages - 3)
    q = torch.randn(1, 1, 32, 128, device=DEVICE).bfloat16()
    seqlens = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    expected = reference.flash_attention(q, k[None], v[None])
    for block_table in (pages[None], pages[None] - 3):
        out = paged_attention(q, k_cache, v_cache, seqlens, block_table)
        torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)


def test_a_large_latent_cache():
    cache, num_pages = large_cache(64, 576)
    latents, k_pe = torch.randn(70, 512, device=DEVICE).bfloat16(), torch.randn(70, 64, device=DEVICE).bfloat16()
    pages = torch.arange(num_pages - 2, num_pages, dtype=torch.int32, device=DEVICE)
    slots = pages[0].long() * 64 + torch.arange(70, device=DEVICE)
    append_latent_cache(latents, k_pe, cache, slots)
    q_latent, q_pe = (torch.randn(1, 1, 16, dim, device=DEVICE).bfloat16() for dim in (512, 64))
    seqlens = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    out = mla_decode(q_latent, q_pe, cache, seqlens, pages[None], softmax_scale=0.07)
    rows = torch.cat([latents, k_pe], dim=1)[None, :, None]
    expected = reference.flash_attention(
        torch.cat([q_latent, q_pe], dim=3), rows, latents[None, :, None], softmax_scale=0.07
    )
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no graphs")
def test_a_captured_step_replays():
    """A graph of four rows follows sequences that join, leave and change places, while the host runs ahead."""
    cache = PagedKVCache(64, 4, num_layers=1, num_kv_heads=2, head_dim=64, device=DEVICE)
    step = cache.step(max_batch=4, max_seqlen=128)
    k, q = torch.randn(4, 2, 64, device=DEVICE).bfloat16(), torch.randn(4, 1, 8, 64, device=DEVICE).bfloat16()

    def decode():
        append_kv_cache(k, k, cache.k_cache[0], cache.v_cache[0], step.slot_mapping)
        return paged_attention(q, cache.k_cache[0], cache.v_cache[0], step.cache_seqlens, step.block_table)

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode()
    seqs, results = [cache.create([])[0] for _ in range(4)], []
    for i in range(20):
        batch = seqs[: 1 + i % 4][:: 1 if i % 2 else -1]
        step.extend(batch, 1)
        graph.replay()
        alone = paged_attention(
            q[: len(batch)], cache.k_cache[0], cache.v_cache[0], cache.cache_seqlens(batch), cache.block_table(batch)
        )
        results.append((captured.clone(), alone))
    for out, alone in results:
        torch.testing.assert_close(out[: len(alone)], alone, atol=1e-2, rtol=1e-2)
        assert not out[len(alone) :].any()


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no pinned memory that is given to others")
def test_pages_may_be_dropped_while_they_are_on_their_way():
    """Pinned memory of an import goes to others only after the copy, which waits behind what the stream has to do."""
    size = dict(num_layers=4, num_kv_heads=8, head_dim=128, device=DEVICE)
    source, target = PagedKVCache(64, 16, **size), PagedKVCache(64, 16, **size)
    source.k_cache.normal_()
    source.v_cache.normal_()
    prompt = list(range(1000))
    seq, _ = source.create(prompt)
    source.extend([seq], [prompt])
    torch.cuda.synchronize()
    pages = source.export_pages(seq)
    torch.cuda.synchronize()
    shapes = [(x.shape, x.dtype) for x in pages]
    torch.cuda._sleep(10**9)
    moved = target.import_pages(pages, prompt)
    del pages
    for shape, dtype in shapes:
        torch.full(shape, math.nan, dtype=dtype, pin_memory=True)
    columns = source.block_table([seq])[0].long(), target.block_table([moved])[0].long()
    assert torch.equal(*(cache.k_cache[:, pages] for cache, pages in zip((source, target), columns)))
    assert torch.equal(*(cache.v_cache[:, pages] for cache, pages in zip((source, target), columns)))
