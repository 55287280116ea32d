"""LatentKVCache: its allocations, and that shared and copied pages return what kernels wrote there.

The rules of ownership are those of PagedKVCache. They are tested there and, for both, in test_state_machine.
"""

import pytest
import torch
from append_cases import DEVICE, bits

from triton_attn import LatentKVCache, append_latent_cache, kv_cache_bytes_per_token, reference
from triton_attn._host.latent import latent_row

pytestmark = pytest.mark.oldest
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
NUM_LAYERS, KV_LORA_RANK, ROPE_DIM = 2, 128, 8


def make(dtype, **options):
    shape = {"num_layers": NUM_LAYERS, "kv_lora_rank": KV_LORA_RANK, "qk_rope_head_dim": ROPE_DIM}
    cache = LatentKVCache(8, 4, **shape, dtype=dtype, device=DEVICE, **options)
    cache.latent_cache.view(torch.uint8).fill_(0xFF)
    return cache


def tokens_of_layer(token_ids, layer, dtype):
    """kv_latent and k_pe that only these tokens have in this layer, as slices of one projection."""
    compute_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    numbers = [torch.randn(KV_LORA_RANK + ROPE_DIM, generator=seeded(layer, token)) for token in token_ids]
    return torch.stack(numbers).to(DEVICE, compute_dtype).split([KV_LORA_RANK, ROPE_DIM], dim=1)


def seeded(layer, token):
    return torch.Generator().manual_seed(100 * layer + token)


def extend(cache, dtype, seqs, token_ids):
    slots = cache.extend(seqs, token_ids)
    new = [token for tokens in token_ids for token in tokens]
    for layer in range(NUM_LAYERS):
        append_latent_cache(*tokens_of_layer(new, layer, dtype), cache.latent_cache[layer], slots, check_values=True)


def assert_holds(cache, dtype, seq, token_ids):
    """Bitwise equal to what the reference writes for these tokens in a separate cache."""
    pages = cache.block_table([seq])[0].long()
    for layer in range(NUM_LAYERS):
        actual = cache.latent_cache[layer, pages].flatten(0, 1)[: len(seq)]
        expected = torch.zeros(1, len(token_ids), actual.shape[1], dtype=actual.dtype, device=DEVICE)
        slots = torch.arange(len(token_ids), device=DEVICE)
        reference.append_latent_cache(*tokens_of_layer(token_ids, layer, dtype), expected, slots)
        assert torch.equal(bits(actual), bits(expected[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefix_sharing_fork_copy_on_write_and_truncation(dtype):
    cache = make(dtype)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    first, cached = cache.create(prompt)
    assert cached == 0
    extend(cache, dtype, [first], [prompt])
    cache.commit([first])

    second, cached = cache.create([*prompt[:8], 20])
    assert cached == 8
    assert_holds(cache, dtype, second, prompt[:8])
    fork = cache.fork(first)
    extend(cache, dtype, [second, fork, first], [[20], [11, 12, 13], [14]])
    assert cache.stats().pages_held == 6  # two of the prefix; one, two and one
    sequences = {second: [*prompt[:8], 20], fork: [*prompt, 11, 12, 13], first: [*prompt, 14]}
    for seq, token_ids in sequences.items():
        assert_holds(cache, dtype, seq, token_ids)

    cache.truncate(fork, 6)  # in a page that all three share
    extend(cache, dtype, [fork], [[30, 31, 32]])
    for seq, token_ids in (sequences | {fork: [*prompt[:6], 30, 31, 32]}).items():
        assert_holds(cache, dtype, seq, token_ids)
    for seq in sequences:
        cache.free(seq)
    assert cache.stats().pages_free == 8


def test_without_prefix_caching():
    cache = make(torch.bfloat16, prefix_caching=False)
    first, _ = cache.create([1, 2, 3, 4, 5])
    cache.extend([first], [[1, 2, 3, 4, 5]])
    cache.commit([first])
    assert cache.create([1, 2, 3, 4, 5])[1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_lora_rank", "rope_dim"), [(512, 64), (256, 32)])
def test_tensors_have_the_documented_shapes_and_the_bytes_of_the_formula(dtype, kv_lora_rank, rope_dim):
    shape = {"num_layers": 3, "kv_lora_rank": kv_lora_rank, "qk_rope_head_dim": rope_dim}
    cache = LatentKVCache(7, **shape, dtype=dtype)
    is_fp8 = dtype == torch.float8_e4m3fn
    width = latent_row(kv_lora_rank, rope_dim)[2] if is_fp8 else kv_lora_rank + rope_dim
    assert cache.latent_cache.shape == (3, 7, 64, width)
    assert cache.latent_cache.dtype == (torch.uint8 if is_fp8 else dtype)
    allocated = cache.latent_cache.untyped_storage().nbytes()
    assert allocated == 7 * 64 * kv_cache_bytes_per_token(**shape, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers: expected 1 or more, got 0"),
        ({"kv_lora_rank": 512.0}, TypeError, "kv_lora_rank: expected an int, got float"),
        ({"qk_rope_head_dim": 0}, ValueError, "qk_rope_head_dim: expected 1 or more, got 0"),
        ({"page_size": 0}, ValueError, "page_size: expected 1 or more, got 0"),
        ({"dtype": torch.float8_e5m2}, TypeError, "dtype: expected .* or float8_e4m3fn for a latent cache"),
        ({"dtype": torch.uint8}, TypeError, "dtype: expected float16"),
        ({"dtype": torch.float8_e4m3fn, "kv_lora_rank": 64}, ValueError, "kv_lora_rank: expected a multiple of 128"),
        ({"dtype": torch.float8_e4m3fn, "qk_rope_head_dim": 63}, ValueError, "qk_rope_head_dim: expected an even"),
    ],
)
def test_wrong_arguments(options, error, message):
    sizes = {"num_layers": 1, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    with pytest.raises(error, match=message):
        LatentKVCache(4, **sizes | options)
