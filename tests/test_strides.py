"""Every pointer of every kernel, with rows far apart or at unaligned addresses.

One dimension of each tensor is spread at a time: its last index (for rows, that of a later tile) is beyond 2^31
elements, in memory that is mostly never touched, or its stride is one more, which no vector load divides.
"""

import pytest
import torch
import triton
from far import FAR, FarAllocation, far, odd

import triton_attn
from triton_attn._host.options import AttentionOptions
from triton_attn.dense.backward import launch_flash_bwd
from triton_attn.flash.forward import launch_flash_fwd

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="takes memory that no GPU has")
HALF = torch.float16


def randn(*shape):
    return torch.randn(shape).to(HALF)


def paged():
    tensors = dict(q=randn(2, 1, 4, 16), k_cache=randn(5, 8, 2, 16), v_cache=randn(5, 8, 2, 16))
    tensors["out"] = randn(2, 1, 4, 16)
    tensors["block_table"] = torch.tensor([[0, 1], [2, 4]], dtype=torch.int32)
    tensors["alibi_slopes"] = torch.rand(2, 4)
    lengths = torch.tensor([9, 16], dtype=torch.int32)
    return tensors, lambda **x: (triton_attn.paged_attention(cache_seqlens=lengths, num_splits=1, **x),)


def merged():
    tensors = dict(outs=randn(3, 2, 2, 2, 16), lses=torch.randn(3, 2, 2, 2))
    return tensors, lambda **x: triton_attn.merge_attention(**x)


def decoded():
    tensors = dict(q_nope=randn(2, 2, 2, 16), q_pe=randn(2, 2, 2, 16), latent_cache=randn(4, 16, 48))
    tensors |= dict(
        w_uk=randn(2, 16, 32), w_uv=randn(2, 16, 32), rope_cos=torch.rand(33, 8), rope_sin=torch.rand(33, 8)
    )
    tensors["block_table"] = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    lengths = torch.tensor([20, 32], dtype=torch.int32)
    return tensors, lambda **x: (triton_attn.mla_decode(cache_seqlens=lengths, **x),)


def prefilled(mode):
    tensors = dict(q_nope=randn(2, 3, 2, 16), q_pe=randn(2, 3, 2, 16), kv_latent=randn(2, 5, 32), k_pe=randn(2, 5, 16))
    tensors |= dict(w_uk=randn(2, 16, 32), w_uv=randn(2, 16, 32))
    return tensors, lambda **x: (triton_attn.mla_prefill(mode=mode, **x),)


def appended():
    tensors = dict(k=randn(3, 2, 16), v=randn(3, 2, 16), k_cache=randn(3, 4, 2, 16), v_cache=randn(3, 4, 2, 16))
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

    return dict(cache=randn(4, 2, 2, 16)), call


CALLS = {
    "paged_attention": paged,
    "merge_attention": merged,
    "mla_decode": decoded,
    **{f"mla_prefill, {mode}": lambda mode=mode: prefilled(mode) for mode in ("fused", "materialized", "absorbed")},
    "append_kv_cache": appended,
    "append_latent_cache": appended_latents,
    "copy_kv_pages": copied,
}


def cases():
    for call, make in CALLS.items():
        for name, x in make()[0].items():
            for dim in range(x.ndim - 1):
                # Within 32 bits: a page's rows are one tile of a copy, and weights one matrix of a matmul.
                within = (name == "cache" and dim > 0) or (name in ("w_uk", "w_uv") and dim > 0)
                if x.shape[dim] > 1 and not within:
                    yield pytest.param(call, name, dim, id=f"{call}-{name}-{dim}")


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("spread", [far, odd])
@pytest.mark.parametrize(("call", "name", "dim"), list(cases()))
def test_functions(call, name, dim, spread):
    torch.manual_seed(0)
    tensors, function = CALLS[call]()
    expected = function(**{key: x.clone() for key, x in tensors.items()})
    results = function(**tensors | {name: spread(tensors[name], dim)})
    for result, there in zip(results, expected, strict=True):
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
    launch_flash_fwd(q, k, v, out, lse, None, None, 65, 65, options)
    results = [out, lse[..., :65]]
    for deterministic in (False, True):
        gradients = launch_flash_bwd(
            dout, None, q, k, v, out, lse, None, None, 65, 65, options, (True, True, True, False), deterministic
        )
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
