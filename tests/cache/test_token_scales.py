"""A cache with a scale for each token and head: scales go where their elements go."""

import pytest
import torch
from append_cases import DEVICE, QUANTIZED

from triton_attn import (
    PagedKVCache,
    append_kv_cache,
    gather_kv_cache,
    kv_cache_bytes_per_token,
    paged_attention,
)

SIZE = dict(num_layers=2, num_kv_heads=2, head_dim=32, head_dim_v=16, device=DEVICE)
dtypes = pytest.mark.parametrize("dtype", QUANTIZED, ids=str)


def make(dtype, num_pages=8, **options):
    cache = PagedKVCache(num_pages, 4, **SIZE, dtype=dtype, token_scales=True, **options)
    for scale in (cache.k_scale, cache.v_scale):
        scale.fill_(torch.nan)
    return cache


def row(token, layer, dim):
    """A key or value of a token; tokens differ in size by up to 2^10."""
    generator = torch.Generator().manual_seed(1000 * layer + token)
    return (2.0 ** (token % 11) * torch.randn(2, dim, generator=generator)).to(DEVICE, torch.bfloat16)


def write(cache, seq, ids, slots=None):
    slots = cache.extend([seq], [ids]) if slots is None else slots
    for layer in range(2):
        k, v = (torch.stack([row(token, layer, dim) for token in ids]) for dim in (32, 16))
        caches, scales = (cache.k_cache[layer], cache.v_cache[layer]), (cache.k_scale[layer], cache.v_scale[layer])
        append_kv_cache(k, v, *caches, slots, k_scale=scales[0], v_scale=scales[1])


def assert_holds(cache, seq, ids):
    """The sequence reads as these tokens, to the precision of the dtype, in both layers."""
    lengths = torch.tensor([0, len(ids)], dtype=torch.int32, device=DEVICE)
    for layer in range(2):
        caches, scales = (cache.k_cache[layer], cache.v_cache[layer]), (cache.k_scale[layer], cache.v_scale[layer])
        table = cache.block_table([seq])
        read = gather_kv_cache(*caches, table, lengths, k_scale=scales[0], v_scale=scales[1], dtype=torch.float32)
        for x, dim in zip(read, (32, 16)):
            expected = torch.stack([row(token, layer, dim) for token in ids]).float()
            step = 2.0**-7 if cache.k_cache.dtype == torch.int8 else 2.0**-3
            assert ((x - expected).abs() <= step * expected.abs().amax(2, keepdim=True)).all()
        q = torch.randn(1, 1, 4, 32, generator=torch.Generator().manual_seed(7)).to(DEVICE, torch.bfloat16)
        out = paged_attention(
            q, *caches, cache.cache_seqlens([seq]), table, softmax_scale=0.01, k_scale=scales[0], v_scale=scales[1]
        )
        k, v = (x.repeat_interleave(2, dim=1).double() for x in read)
        weights = (torch.einsum("hd,jhd->hj", q[0, 0].double(), k) * 0.01).softmax(1)
        expected = torch.einsum("hj,jhd->hd", weights, v)
        torch.testing.assert_close(out[0, 0].double(), expected, rtol=0.02, atol=0.01 * v.abs().max().item())


@dtypes
def test_a_fork_copies_scales_when_it_writes(dtype):
    cache = make(dtype)
    seq, _ = cache.create([])
    write(cache, seq, range(6))
    fork = cache.fork(seq)
    write(cache, fork, [17, 18, 19])
    write(cache, seq, [6])
    assert_holds(cache, seq, [*range(7)])
    assert_holds(cache, fork, [*range(6), 17, 18, 19])


@dtypes
def test_pages_leave_and_come_back_with_their_scales(dtype):
    cache, other = make(dtype), make(dtype)
    seq, _ = cache.create([])
    write(cache, seq, range(10))
    pages = cache.export_pages(seq)
    assert [x.shape[:4] for x in pages] == [(2, 3, 4, 2)] * 4
    scales = pages[2].contiguous().view(torch.float32)[..., 0]
    assert torch.equal(scales[:, :2], cache.k_scale[:, cache.block_table([seq])[0, :2].long()])
    assert_holds(other, other.import_pages(pages, range(10)), range(10))


@dtypes
def test_accepted_drafts_keep_their_scales(dtype):
    cache = make(dtype)
    seq, _ = cache.create([])
    write(cache, seq, [1, 2, 3])
    write(cache, seq, [10, 11, 12, 13, 14, 15])
    cache.keep([seq], 6, [[1, 3, 5]])
    assert_holds(cache, seq, [1, 2, 3, 11, 13, 15])


@dtypes
def test_bytes(dtype):
    cache = make(dtype)
    held = sum(x.numel() * x.itemsize for x in (cache.k_cache, cache.v_cache, cache.k_scale, cache.v_scale))
    sizes = {name: size for name, size in SIZE.items() if name != "device"}
    assert held == 8 * 4 * kv_cache_bytes_per_token(**sizes, dtype=dtype, token_scales=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: make(torch.bfloat16),
            TypeError,
            "dtype: expected int8, float8_e4m3fn or float8_e5m2 with",
        ),
        (
            lambda: PagedKVCache(2, **SIZE, token_scales=1),
            TypeError,
            "token_scales: expected a bool, got int",
        ),
        (
            lambda: kv_cache_bytes_per_token(num_layers=1, kv_lora_rank=128, qk_rope_head_dim=64, token_scales=True),
            ValueError,
            "token_scales: expected False with kv_lora_rank",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
