"""Every pointer of every kernel, with rows far apart or at unaligned addresses.

One dimension of each tensor is spread at a time: its last index (for rows, that of a later tile) is beyond 2^31
elements, in memory that is mostly never touched, or its stride is one more, which no vector load divides. Dimensions
have three indices or more: with two the stride itself is beyond 2^31, so 64 bits wide, as then is every offset.
"""

import functools

import pytest
import torch
import triton
from far import FAR, FarAllocation, far, odd

import triton_attn
from triton_attn._host.call import call_of
from triton_attn._host.options import AttentionOptions
from triton_attn.dense.backward import launch_flash_bwd
from triton_attn.flash.forward import launch_flash_fwd

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="takes memory that no GPU has")
HALF = torch.float16


def randn(*shape):
    return torch.randn(shape).to(HALF)


def paged(page_size):
    """With a table, or with a contiguous cache of 16 rows where page_size is None."""
    cache = (5, page_size, 3, 16) if page_size else (3, 16, 3, 16)
    tensors = dict(q=randn(3, 3, 3, 16), k_cache=randn(*cache), v_cache=randn(*cache), out=randn(3, 3, 3, 16))
    tensors["alibi_slopes"] = torch.rand(3, 3)
    keys = page_size or 8
    lengths = torch.tensor([keys + 1, 3, 2 * keys], dtype=torch.int32)
    if page_size:
        tensors["block_table"] = torch.tensor([[0, 1], [3, 0], [2, 4]], dtype=torch.int32)
    return tensors, lambda **x: (triton_attn.paged_attention(cache_seqlens=lengths, num_splits=1, **x),)


def merged():
    tensors = dict(outs=randn(3, 3, 3, 3, 16), lses=torch.randn(3, 3, 3, 3))
    return tensors, lambda **x: triton_attn.merge_attention(**x)


def decoded(page_size):
    tensors = dict(q_nope=randn(3, 3, 3, 16), q_pe=randn(3, 3, 3, 16), latent_cache=randn(5, page_size, 48))
    tensors |= dict(w_uk=randn(3, 16, 32), w_uv=randn(3, 16, 32))
    tensors |= dict(rope_cos=torch.rand(129, 8), rope_sin=torch.rand(129, 8))
    tensors["block_table"] = torch.tensor([[0, 1], [3, 0], [2, 4]], dtype=torch.int32)
    lengths = torch.tensor([page_size + 4, 5, 2 * page_size], dtype=torch.int32)
    return tensors, lambda **x: (triton_attn.mla_decode(cache_seqlens=lengths, **x),)


def prefilled(mode):
    tensors = dict(q_nope=randn(3, 3, 3, 16), q_pe=randn(3, 3, 3, 16), kv_latent=randn(3, 5, 32), k_pe=randn(3, 5, 16))
    tensors |= dict(w_uk=randn(3, 16, 32), w_uv=randn(3, 16, 32))
    return tensors, lambda **x: (triton_attn.mla_prefill(mode=mode, **x),)


def appended():
    tensors = dict(k=randn(3, 3, 16), v=randn(3, 3, 16), k_cache=randn(3, 4, 3, 16), v_cache=randn(3, 4, 3, 16))
    tensors |= dict(rope_cos=torch.rand(3, 8), rope_sin=torch.rand(3, 8))

    def call(**x):
        positions = torch.arange(3, dtype=torch.int32)
        triton_attn.append_kv_cache(slot_mapping=torch.tensor([0, 7, 11]), positions=positions, **x)
        return x["k_cache"], x["v_cache"]

    return tensors, call


def appended_latents():
    tensors = dict(kv_latent=randn(3, 32), k_pe=randn(3, 16), latent_cache=randn(3, 4, 48))
    tensors |= dict(rope_cos=torch.rand(3, 8), rope_sin=torch.rand(3, 8))

    def call(**x):
        positions = torch.arange(3, dtype=torch.int32)
        triton_attn.append_latent_cache(slot_mapping=torch.tensor([0, 7, 11]), positions=positions, **x)
        return (x["latent_cache"],)

    return tensors, call


def copied():
    def call(cache):
        pages = torch.tensor([0, 2, 3, 1], dtype=torch.int32)
        triton_attn.copy_kv_pages(cache, pages[:2], pages[2:])
        return (cache,)

    return dict(cache=randn(3, 4, 3, 3, 16)), call


def copied_to_another():
    def call(cache, target):
        pages = torch.tensor([0, 2, 3, 1], dtype=torch.int32)
        triton_attn.copy_kv_pages(cache, pages[:2], pages[2:], to=target)
        return (target,)

    return dict(cache=randn(3, 4, 3, 3, 16), target=randn(3, 5, 3, 3, 16)), call


def gathered():
    def call(k_cache, v_cache):
        places = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32), torch.tensor([0, 7, 10], dtype=torch.int32)
        return triton_attn.gather_kv_cache(k_cache, v_cache, *places, 11)

    return dict(k_cache=randn(3, 4, 3, 16), v_cache=randn(3, 4, 3, 16)), call


def gathered_latents():
    def call(latent_cache):
        places = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32), torch.tensor([0, 7, 10], dtype=torch.int32)
        sizes = dict(kv_lora_rank=32, qk_rope_head_dim=16)
        return triton_attn.gather_latent_cache(latent_cache, *places, 11, **sizes)

    return dict(latent_cache=randn(3, 4, 48)), call


CALLS = {
    "paged_attention, small pages": lambda: paged(8),
    "paged_attention, a page holds a tile": lambda: paged(64),
    "paged_attention, contiguous": lambda: paged(None),
    "merge_attention": merged,
    "mla_decode, small pages": lambda: decoded(16),
    "mla_decode, a page holds a tile": lambda: decoded(64),
    **{f"mla_prefill, {mode}": lambda mode=mode: prefilled(mode) for mode in ("fused", "materialized", "absorbed")},
    "append_kv_cache": appended,
    "append_latent_cache": appended_latents,
    "copy_kv_pages": copied,
    "gather_kv_cache": gathered,
    "gather_latent_cache": gathered_latents,
    "copy_kv_pages, to another cache": copied_to_another,
}


def cases():
    for call, make in CALLS.items():
        for name, x in make()[0].items():
            for dim in range(x.ndim - 1):
                # Within 32 bits: weights are one matrix of a matmul.
                within = name in ("w_uk", "w_uv") and dim > 0
                assert x.shape[dim] > 2
                if not within:
                    yield pytest.param(call, name, dim, id=f"{call}-{name}-{dim}")


@functools.cache
def results_of_contiguous(call):
    torch.manual_seed(0)
    tensors, function = CALLS[call]()
    return function(**tensors)


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("spread", [far, odd])
@pytest.mark.parametrize(("call", "name", "dim"), list(cases()))
def test_functions(call, name, dim, spread):
    torch.manual_seed(0)
    tensors, function = CALLS[call]()
    results = function(**tensors | {name: spread(tensors[name], dim)})
    for result, there in zip(results, results_of_contiguous(call), strict=True):
        assert torch.equal(result, there)


def flash(which=None, dim=1, lse_rows=65, spread=far, batch=1):
    """out, lse and gradients with one of the tensors spread. lse has room for more rows than there are."""
    torch.manual_seed(0)
    tensors = {name: randn(batch, 65, 3, 16) for name in ("q", "k", "v", "out", "dout")}
    if which in tensors:
        tensors[which] = spread(tensors[which], dim)
    q, k, v, out, dout = tensors.values()
    lse = torch.empty(batch, 3, lse_rows)
    options = AttentionOptions(0.25, (None, None), None, None, None)
    call = call_of(q, k, v, options)
    launch_flash_fwd(call, out, lse)
    results = [out, lse[..., :65]]
    for deterministic in (False, True):
        gradients = launch_flash_bwd(call, dout, None, out, lse, (True, True, True, False), deterministic)
        results += gradients[:3]
    return results


@pytest.mark.parametrize("which", ["q", "k", "v", "out", "dout"])
def test_a_later_tile_of_flash_attention(which):
    for result, there in zip(flash(which), flash(), strict=True):
        assert torch.equal(result, there)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("which", ["q", "k", "v", "out", "dout"])
def test_odd_strides_of_flash_attention(which, dim):
    for result, there in zip(flash(which, dim, spread=odd, batch=2), flash(batch=2), strict=True):
        torch.testing.assert_close(result, there, atol=1e-3, rtol=1e-3)


def test_a_late_head_of_lse():
    for result, there in zip(flash(lse_rows=FAR // 2), flash(), strict=True):
        assert torch.equal(result, there)


def test_a_later_tile_of_what_the_backward_allocates():
    with FarAllocation() as near:
        expected = flash()
    rows = [k for k, shape in enumerate(near.allocated) if len(shape) == 4]
    assert len(rows) >= 6  # dq, dk and dv of both schedules
    for k in rows:
        with FarAllocation(k, dim=1):
            results = flash()
        for result, there in zip(results, expected, strict=True):
            assert torch.equal(result, there)
