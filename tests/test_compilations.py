"""The number of kernels that a public function compiles as lengths, batches, tables and pools of pages change.

Each number is given: tiles by the number of rows, splits of the keys (one or several), and merges by powers of two.
Nothing is compiled here. Kernels are counted by Triton's specialization.
"""

import itertools
from collections import Counter

import pytest
import torch
from levels import FULL
from transformers.masking_utils import causal_mask_function

import triton_attn
from triton_attn.interop.transformers import attention, token_mask
from triton_attn.toolchain import record_specializations

pytestmark = pytest.mark.compiled

BF16 = torch.bfloat16
LONGEST = 4097
POWERS = [1 << i for i in range(13)]
EDGES = sorted({1, 2, 3, 5, 7, 37, 997, 1009, 1040, 3001, *(n + i for n in POWERS for i in (-1, 0, 1))} - {0})
LENGTHS = range(1, LONGEST + 1) if FULL else EDGES
BATCHES = range(1, 66) if FULL else (1, 2, 3, 15, 16, 17, 64, 65)
WIDTHS = (1, 2, 15, 16, 17, 300)
HEADS = {"mha": (8, 8), "gqa": (32, 8), "mqa of 5": (5, 1)}
DIM = 64


@pytest.fixture
def kernels():
    """Counts the kernels of each function over the calls of a test."""
    with record_specializations("sm_90") as met:
        yield lambda: Counter(kernel.name for kernel in met)


def tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype)


def indices(*shape, dtype=torch.int32, offset=0):
    """With an offset, a slice whose address is not a multiple of 16."""
    return torch.zeros(shape[0] + offset, *shape[1:], dtype=dtype)[offset:]


@pytest.fixture(params=HEADS)
def heads(request):
    return HEADS[request.param]


@pytest.mark.parametrize("return_lse", [False, True])
def test_dense_attention(kernels, heads, return_lse):
    for seqlen, batch in itertools.product(LENGTHS, (1, 3)):
        q, k, v = (tensor(batch, seqlen, n, DIM) for n in (heads[0], heads[1], heads[1]))
        triton_attn.flash_attention(q, k, v, causal=True, return_lse=return_lse)
    assert kernels() == {"_flash_fwd_kernel": 1}


def test_packed_attention(kernels, heads):
    for seqlen, batch in itertools.product(LENGTHS, (1, 3)):
        q, k, v = (tensor(batch * seqlen, n, DIM) for n in (heads[0], heads[1], heads[1]))
        cu_seqlens = indices(batch + 1)
        triton_attn.flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, seqlen, seqlen, causal=True)
    assert kernels() == {"_flash_fwd_kernel": 1}


def test_gradients(kernels, heads):
    for seqlen, batch in itertools.product(EDGES, (1, 3)):
        q, k, v = (tensor(batch, seqlen, n, DIM).requires_grad_() for n in (heads[0], heads[1], heads[1]))
        outputs = triton_attn.flash_attention(q, k, v, causal=True, return_lse=True)
        torch.autograd.grad(outputs, (q, k, v), [torch.empty_like(x) for x in outputs])
    assert set(kernels().values()) == {1}


@pytest.mark.parametrize("return_lse", [False, True])
def test_decode(kernels, heads, return_lse):
    group_size = heads[0] // heads[1]
    for seqlen_q, batch, width in itertools.product((1, 2, 3, 5, 8), BATCHES, WIDTHS):
        cache = tensor(2 * batch, 16, heads[1], DIM)
        lens, table = indices(batch, offset=batch % 2), indices(batch, width, offset=1)
        q = tensor(batch, seqlen_q, heads[0], DIM)
        triton_attn.paged_attention(q, cache, cache, lens, table, return_lse=return_lse)
    counts = kernels()
    # One tile up to 16 rows, one more up to 32 and 64; with and without splits.
    tiles = 1 + (8 * group_size > 16) + (8 * group_size > 32)
    assert counts["_paged_fwd_kernel"] <= 2 * tiles
    assert counts["_merge_kernel"] <= 5  # 2, 4, 8, 16, 32 splits or more


@pytest.mark.parametrize("return_lse", [False, True])
def test_chunks_of_prompts(kernels, heads, return_lse):
    for seqlen_q, (batch, width) in itertools.product(LENGTHS, ((1, 17), (5, 300))):
        cache = tensor(9, 16, heads[1], DIM)
        q, cu_seqlens_q = tensor(seqlen_q + batch, heads[0], DIM), indices(batch + 1)
        options = dict(cu_seqlens_q=cu_seqlens_q, max_seqlen_q=seqlen_q, return_lse=return_lse)
        triton_attn.paged_attention(q, cache, cache, indices(batch), indices(batch, width), **options)
    counts = kernels()
    # Tiles of 16, 32, 64 and 128 rows, and 128 rows with a search of the sequence; with and without splits.
    assert counts["_paged_fwd_kernel"] <= 2 * 5
    assert counts["_merge_kernel"] <= 5


def test_a_contiguous_cache(kernels, heads):
    for seqlen, batch in itertools.product(LENGTHS, (1, 3)):
        cache = tensor(batch, seqlen, heads[1], DIM)
        triton_attn.paged_attention(tensor(batch, 1, heads[0], DIM), cache, cache, indices(batch))
    counts = kernels()
    assert counts["_paged_fwd_kernel"] <= 2
    assert counts["_merge_kernel"] <= 5


@pytest.mark.parametrize("is_padded", [False, True])
def test_decode_steps_of_transformers(kernels, heads, is_padded):
    """Over a cache that grows, and with padding over pages of one key."""
    for seqlen, batch in itertools.product(EDGES, (1, 3)):
        padding = torch.ones(batch, seqlen, dtype=torch.bool) if is_padded else None
        mask = token_mask(batch, 1, seqlen, seqlen - 1, 0, causal_mask_function, padding, "cpu")
        q, k, v = (tensor(batch, n, rows, DIM) for n, rows in zip((heads[0], heads[1], heads[1]), (1, seqlen, seqlen)))
        attention(torch.nn.Identity(), q, k, v, mask)
    counts = kernels()
    assert 1 <= counts["_paged_fwd_kernel"] <= 2
    assert counts["_merge_kernel"] <= 5
    assert counts.keys() <= {"_paged_fwd_kernel", "_merge_kernel"}


def test_bookkeeping_of_pages(kernels):
    for num_tokens, num_pages in itertools.product(LENGTHS, (1, 16, 17)):
        k, cache = tensor(num_tokens, 2, DIM), tensor(num_pages, 16, 2, DIM)
        slots = indices(num_tokens, dtype=torch.int64, offset=num_tokens % 2)
        triton_attn.append_kv_cache(k, k, cache, cache, slots)
        kv_latent, k_pe = tensor(num_tokens, 576).split([512, 64], dim=-1)
        triton_attn.append_latent_cache(kv_latent, k_pe, tensor(num_pages, 64, 576), slots)
        places = indices(3, num_pages + 1), indices(4, offset=num_tokens % 3), num_tokens
        starts = indices(3, offset=num_tokens % 2)
        triton_attn.gather_kv_cache(cache, cache, *places, seq_starts=starts)
        pages = indices(num_tokens, offset=num_tokens % 3)
        triton_attn.copy_kv_pages([tensor(3, num_pages, 16, 2, DIM)] * 2, pages, pages)
    names = "_append_kv_cache_kernel", "_append_latent_cache_kernel", "_copy_kv_pages_kernel", "_gather_cache_kernel"
    assert kernels() == dict.fromkeys(names, 1)


def test_merges(kernels, heads):
    for seqlen, batch in itertools.product(EDGES, (1, 3)):
        outs = tensor(2, batch, seqlen, heads[0], DIM)
        triton_attn.merge_attention(outs, tensor(2, batch, heads[0], seqlen, dtype=torch.float32))
    assert kernels() == {"_merge_kernel": 1}


LATENT_HEADS = 16


def latent_queries(*rows):
    return tensor(*rows, LATENT_HEADS, 192).split([128, 64], dim=-1)


@pytest.mark.parametrize("return_lse", [False, True])
def test_decode_of_latent_vectors(kernels, return_lse):
    w_uk = w_uv = tensor(LATENT_HEADS, 128, 512)
    for seqlen_q, batch, width in itertools.product((1, 2, 3, 8), BATCHES, WIDTHS):
        lens, table = indices(batch, offset=batch % 2), indices(batch, width, offset=1)
        queries = latent_queries(batch, seqlen_q)
        triton_attn.mla_decode(*queries, tensor(9, 64, 576), lens, table, w_uk, w_uv, return_lse=return_lse)
    counts = kernels()
    assert counts["_mla_absorbed_kernel"] <= 2 * 2  # up to 16 rows and more; with and without splits
    assert counts["_absorb_kernel"] <= 2  # of 16 and 64 tokens
    assert counts["_merge_project_kernel"] <= 4 * 3  # 1, 4, 16, 64 tokens; one split, a few and many


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("mode", ["fused", "absorbed", "materialized"])
def test_prefill_of_latent_vectors(kernels, mode, return_lse):
    w_uk = w_uv = tensor(LATENT_HEADS, 128, 512)
    max_workspace_bytes = 2**22  # all heads, and chunks of 8, 4, 2, 1
    for seqlen_q, batch in itertools.product(EDGES, (1, 3)):
        latents = tensor(batch, 40 * batch, 576).split([512, 64], dim=-1)
        options = dict(mode=mode, return_lse=return_lse, max_workspace_bytes=max_workspace_bytes)
        if mode != "absorbed" or seqlen_q * batch <= 1900:  # if one head fits
            triton_attn.mla_prefill(*latent_queries(batch, seqlen_q), *latents, w_uk, w_uv, **options)
    chunks = 5
    bounds = {
        "_mla_prefill_kernel": chunks,
        "_mla_absorbed_kernel": chunks + 1,  # up to 16 rows, and more
        "_absorb_kernel": chunks + 1,  # 16 and 64 tokens if all heads are one chunk
        "_merge_project_kernel": chunks + 3,  # of 1, 4, 16, 64
    }
    for name, count in kernels().items():
        assert count <= bounds[name], name
