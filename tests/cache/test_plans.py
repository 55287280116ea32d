"""Plans of the launches that write to caches. Strides and shapes are tested with the results; here is what those tests
would not see: a plan that is used again for other options, and what a call costs the host.
"""

import pytest
import torch
from host_cost import bare_launches, median_microseconds, python_calls
from plans import check_neighbour, launches_of

from triton_attn import append_kv_cache, append_latent_cache, copy_kv_pages, gather_kv_cache, gather_latent_cache
from triton_attn.cache.kernels import append, append_latent, copy, gather
from triton_attn.toolchain import compile_only

pytestmark = pytest.mark.compiled

TOKENS = 8
MODULES = append, append_latent, copy, gather
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def append_with(is_latent, rotary_dim=0, cache_dtype=torch.bfloat16, interleaved=False):
    rope = {}
    if rotary_dim:
        table, positions = torch.empty(64, rotary_dim // 2), torch.zeros(TOKENS, dtype=torch.int64)
        rope = dict(rope_cos=table, rope_sin=table, positions=positions, rope_interleaved=interleaved)
    if is_latent:
        kv_latent, k_pe = (torch.empty(TOKENS, dim, dtype=torch.bfloat16) for dim in (512, 64))
        cache = torch.empty(8, 16, 656 if cache_dtype == torch.uint8 else 576, dtype=cache_dtype)
        append_latent_cache(kv_latent, k_pe, cache, torch.arange(TOKENS), **rope)
    else:
        k = torch.empty(TOKENS, 4, 64, dtype=torch.bfloat16)
        cache = torch.empty(8, 16, 4, 64, dtype=cache_dtype)
        append_kv_cache(k, k, cache, cache, torch.arange(TOKENS), **rope)


@pytest.mark.parametrize(
    ("base", "more"),
    [
        ({}, dict(rotary_dim=64)),
        (dict(rotary_dim=64), dict(rotary_dim=32)),
        (dict(rotary_dim=64), dict(interleaved=True)),
        ({}, dict(cache_dtype=E4M3)),
        (dict(cache_dtype=E4M3), dict(cache_dtype=E5M2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_latent", [False, True], ids=["keys", "latents"])
def test_options(is_latent, base, more):
    def launches(**arguments):
        return launches_of(append_with, MODULES, is_latent=is_latent, **arguments)

    check_neighbour(launches, base, more)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("call", "most"),
    [("keys", 31), ("latents", 38), ("pages", 34), ("gathered keys", 38), ("gathered latents", 47)],
)
def test_host_cost(call, most, record_property):
    """Python calls besides those of the bare launch: they repeat exactly. The ratio of times is printed.

    On Triton 3.9.0 it was 1.66 for keys, 1.94 for latents, 2.71 for pages, 1.45 and 1.65 for what is gathered of both:
    above the 1.5 that is wanted. Checks of arguments are most of the rest.
    """
    k, cache, slots = torch.empty(8, 8, 128), torch.empty(64, 16, 8, 128), torch.arange(8)
    v, table, bounds = torch.empty_like(k), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    kv_latent, k_pe, latent_cache = torch.empty(8, 512), torch.empty(8, 64), torch.empty(64, 64, 576)
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64)
    calls = {
        "keys": lambda: append_kv_cache(k, k, cache, cache, slots),
        "latents": lambda: append_latent_cache(kv_latent, k_pe, latent_cache, slots),
        "gathered keys": lambda: gather_kv_cache(cache, cache, table, bounds, out=(k, v)),
        "gathered latents": lambda: gather_latent_cache(latent_cache, table, bounds, out=(kv_latent, k_pe), **sizes),
        "pages": lambda: copy_kv_pages((cache, cache), slots[:2], slots[2:4]),
    }
    with compile_only("sm_90", every_launch=False):
        launch = bare_launches(calls[call], MODULES)
        cost = median_microseconds({"call": calls[call], "launch": launch}, batches=20)
        extra_calls = python_calls(calls[call]) - python_calls(launch)
    ratio = cost["call"] / cost["launch"]
    record_property("figure", f"{call}: {ratio:.2f} times its bare launch, {extra_calls} more Python calls")
    assert extra_calls <= most
