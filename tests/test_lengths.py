"""Lengths beyond the capacity, and rows that belong to no sequence, in every function that takes lengths.

A length beyond the capacity counts as the capacity: nothing else is read or written. Rows of a packed tensor after the
last sequence influence nothing; their out and gradients are 0 and their lse is -inf. The expected result is that of the
same function for correct lengths, or for tensors that end there.
"""

import contextlib
import itertools
import math

import pytest
import torch
import triton
from prefix_trees import tree_of, tree_of_all

import triton_attn
from triton_attn import reference
from triton_attn.interop.flash_attn import flash_attn_with_kvcache
from triton_attn.interop.flash_mla import flash_mla_with_kvcache
from triton_attn.interop.rope import rotate
from triton_attn.testing import poisoned_empty
from triton_attn.toolchain import guard

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NAN = math.nan
by_both = pytest.mark.parametrize("library", [triton_attn, reference], ids=["kernel", "reference"])


@contextlib.contextmanager
def guarded():
    with poisoned_empty(), guard() if INTERPRETED else contextlib.nullcontext():
        yield


def randn(*shape):
    return torch.randn(shape, dtype=torch.float32).to(DEVICE, torch.float16)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def after(x, end):
    """x with NaN in the rows from end on."""
    x = x.clone()
    x[end:] = NAN
    return x


def assert_same(results, expected):
    for result, there in zip(results, expected, strict=True):
        assert torch.equal(result, there)


@pytest.mark.ci(but_each=3)
@by_both
@pytest.mark.parametrize("options", [{}, {"num_splits": 2}, {"prefix_tree": 3}], ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_paged_attention_has_no_keys_beyond_the_cache(paged, options, library):
    """The slots after a full sequence belong to the next sequence, or to another tensor."""
    if "prefix_tree" in options and not paged:
        pytest.skip("nothing is shared in a contiguous cache")
    q, table = randn(3, 2, 4, 24), None
    k_cache, v_cache = (randn(3, 32, 2, 24) for _ in "kv")
    for cache in (k_cache, v_cache):
        cache[2, 5:] = NAN
    if paged:
        k_cache, v_cache = (
            torch.cat([x.unflatten(1, (4, 8)).flatten(0, 1), randn(1, 8, 2, 24) * NAN]) for x in (k_cache, v_cache)
        )
        table = torch.arange(12, dtype=torch.int32, device=DEVICE).view(3, 4)
        if "prefix_tree" in options:
            table[1:, :3] = table[0, :3]
            options = {"prefix_tree": tree_of_all(3, options["prefix_tree"], 2, DEVICE)}
    lengths = ints(33, 2**31 - 1, 5)

    def call(lengths):
        return library.paged_attention(q, k_cache, v_cache, lengths, table, return_lse=True, **options)

    with guarded():
        result = call(lengths)
    assert_same(result, call(lengths.clamp(max=32)))
    assert not result[0].isnan().any()


@by_both
@pytest.mark.parametrize("num_splits", [1, 2])
def test_mla_decode_has_no_keys_and_no_positions_beyond_the_room(num_splits, library):
    q_nope, q_pe, w_uk, w_uv = randn(3, 2, 4, 16), randn(3, 2, 4, 8), randn(4, 16, 48), randn(4, 24, 48)
    cache = after(randn(7, 16, 56), 6)
    table = torch.arange(6, dtype=torch.int32, device=DEVICE).view(3, 2)
    angles = torch.rand(40, 4).to(DEVICE)

    def call(lengths, cos, sin):
        options = {"rope_cos": cos, "rope_sin": sin, "num_splits": num_splits, "return_lse": True}
        return library.mla_decode(q_nope, q_pe, cache, lengths, table, w_uk, w_uv, **options)

    lengths = ints(33, 2**31 - 1, 5)
    with guarded():
        result = call(lengths, angles.cos(), angles.sin())
    assert_same(result, call(lengths.clamp(max=32), angles.cos(), angles.sin()))
    # Angles up to position 29: positions 30 and 31 use the last ones.
    short = torch.cat([angles[:30], angles[29:30].expand(2, -1)])
    with guarded():
        result = call(lengths, angles[:30].cos(), angles[:30].sin())
    assert_same(result, call(lengths.clamp(max=32), short.cos(), short.sin()))


@by_both
def test_an_append_beyond_the_room_writes_nothing(library):
    slots = torch.tensor([8, 3, -1, 2**40, 9], device=DEVICE)
    k = randn(5, 1, 16)
    angles = torch.rand(4, 8).to(DEVICE)
    room = torch.full((2, 3, 4, 1, 16), 7.0, dtype=torch.float16, device=DEVICE)  # two of its pages are the cache
    rope = {"rope_cos": angles, "rope_sin": angles, "positions": ints(99, 99, -5, 4, 99)}
    with guarded():
        library.append_kv_cache(k, k, room[0, :2], room[1, :2], slots, **rope)
    assert (room != 7).any(-1).any(-1).nonzero().tolist() == [[0, 0, 3], [1, 0, 3]]
    last = room[0, 0, 3].clone()
    library.append_kv_cache(k, k, room[0, :2], room[1, :2], slots, **rope | {"positions": ints(3, 3, 3, 3, 3)})
    assert torch.equal(room[0, 0, 3], last)

    latents = torch.full((3, 4, 24), 7.0, dtype=torch.float16, device=DEVICE)
    with guarded():
        library.append_latent_cache(randn(5, 16), randn(5, 8), latents[:2], slots)
    assert (latents != 7).any(-1).nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("kind", ["contiguous", "paged", "rows", "leftpad"])
def test_flash_attn_with_kvcache_on_a_full_cache(kind):
    """One new key each. The first sequence has no room for it, and must not see the second one's first key."""
    cache = randn(2, 3, 16, 2, 32)
    cache[:, 1, 4:] = NAN
    cache[:, 2] = NAN
    k_cache, v_cache = cache[:, :2]
    q, k, v = randn(2, 1, 2, 32), randn(2, 1, 2, 32), randn(2, 1, 2, 32)
    angles = torch.rand(17, 16).to(DEVICE)
    options = {"rotary_cos": angles, "rotary_sin": angles, "causal": True}
    leftpad = 0
    if kind == "paged":
        k_cache, v_cache = (x.reshape(4, 8, 2, 32) for x in (k_cache, v_cache))
        options["block_table"] = torch.arange(4, dtype=torch.int32, device=DEVICE).view(2, 2)
    elif kind == "rows":
        options["cache_batch_idx"] = ints(0, 1)
    elif kind == "leftpad":
        leftpad = 2
        options["cache_leftpad"] = ints(2, 0)
    before = cache.clone()
    with guarded():
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=ints(16, 3), **options)
    if kind != "paged":
        assert torch.equal(cache[:, 0], before[:, 0])
    seen = before[:, 0, leftpad:16].unsqueeze(1)
    q_rotated = rotate(q[:1], angles[[16]], angles[[16]], True)
    expected = reference.flash_attention(q_rotated, *seen)
    torch.testing.assert_close(out[:1], expected, atol=2e-3, rtol=2e-3)
    assert not out.isnan().any()


def test_flash_mla_with_kvcache_on_a_full_cache():
    q = randn(2, 1, 4, 56)
    cache = after(randn(5, 16, 1, 56), 4)
    table = torch.arange(4, dtype=torch.int32, device=DEVICE).view(2, 2)
    with guarded():
        result = flash_mla_with_kvcache(q, cache, table, ints(33, 32), 48, None)
    assert_same(result, flash_mla_with_kvcache(q, cache, table, ints(32, 32), 48, None))


# Offsets of sequences, the given longest length, and rows of the tensors.
PACKED = {
    "some spare rows": ((0, 5, 38, 38, 50), 33, 60),
    "no sequence": ((0,), 0, 9),
    "empty sequences": ((0, 0, 0), 0, 7),
    "more rows than the longest would fill": ((0, 5, 9), 5, 150),
    "tiles without an empty slot": ((0, 64, 128), 64, 128),
    "a sequence that ends beyond the rows": ((0, 20, 70), 64, 50),
    "a sequence that begins beyond the rows": ((0, 20, 70, 75), 64, 60),
}


def packed(*names):
    names = names or PACKED
    return pytest.mark.parametrize(("bounds", "longest", "total"), [PACKED[name] for name in names], ids=names)


def assert_spare(out, lse, end):
    assert (out[end:] == 0).all()
    assert (lse[:, end:] == -math.inf).all()


@pytest.mark.ci(but_each=3)
@packed()
@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
def test_flash_attention_varlen(bounds, longest, total, deterministic):
    end = min(bounds[-1], total)
    tensors = randn(total, 4, 24), randn(total, 2, 24), randn(total, 2, 40)
    dout = randn(total, 4, 40)

    def call(function, tensors, dout):
        leaves = [x.detach().requires_grad_() for x in tensors]
        cu_seqlens = ints(*bounds), ints(*bounds), longest, longest
        out, lse = function(*leaves, *cu_seqlens, causal=True, return_lse=True, deterministic=deterministic)
        loss = out.mul(dout).nan_to_num().sum()
        return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)

    with guarded():
        out, lse, *gradients = call(
            triton_attn.flash_attention_varlen, [after(x, end) for x in tensors], after(dout, end)
        )
    assert_spare(out, lse, end)
    for gradient in gradients:
        assert (gradient[end:] == 0).all()
    if len(bounds) == 1:
        return
    exact = call(reference.flash_attention_varlen, [after(x.double(), end) for x in tensors], dout)
    assert_spare(*exact[:2], end)
    for result, there in zip((out, lse, *gradients), exact, strict=True):
        torch.testing.assert_close(result.double(), there.double(), atol=1e-2, rtol=1e-2)


@pytest.mark.ci(but_each=3)
@packed(
    "some spare rows", "no sequence", "more rows than the longest would fill", "a sequence that ends beyond the rows"
)
@pytest.mark.parametrize("options", [{}, {"num_splits": 3}, {"prefix_tree": 2}], ids=str)
def test_paged_attention(bounds, longest, total, options):
    end = min(bounds[-1], total)
    batch = len(bounds) - 1
    k_cache, v_cache = randn(4 * batch + 1, 16, 2, 24), randn(4 * batch + 1, 16, 2, 40)
    table = torch.arange(4 * batch, dtype=torch.int32, device=DEVICE).view(batch, 4)
    table[1:, :2] = table[:1, :2]
    lengths = ints(70, 64, 40, 33)[:batch]
    q = after(randn(total, 4, 24), end)
    if "prefix_tree" in options:
        seqlens_q = [min(b, total) - min(a, total) for a, b in itertools.pairwise(bounds)]
        options = {"prefix_tree": tree_of(table.tolist(), seqlens_q, DEVICE, part=1)}
    options = {"cu_seqlens_q": ints(*bounds), "max_seqlen_q": longest, "return_lse": True, **options}
    with guarded():
        out, lse = triton_attn.paged_attention(q, k_cache, v_cache, lengths, table, **options)
    exact = reference.paged_attention(q, k_cache, v_cache, lengths, table, **options)
    for result in ((out, lse), exact):
        assert_spare(*result, end)
    torch.testing.assert_close(out, exact[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, exact[1], atol=1e-3, rtol=1e-3)


@pytest.mark.ci(but_each=3)
@packed("some spare rows", "no sequence", "more rows than the longest would fill")
@pytest.mark.parametrize(
    ("mode", "workspace"),
    [("fused", 2**28), ("materialized", 2**28), ("materialized", 2**17), ("absorbed", 2**28)],
    ids=["fused", "materialized", "cut", "absorbed"],
)
def test_mla_prefill(bounds, longest, total, mode, workspace):
    end = min(bounds[-1], total)
    rows = [randn(total, 3, 16), randn(total, 3, 8), randn(total, 48), randn(total, 8)]
    weights = [0.2 * randn(3, 16, 48), 0.2 * randn(3, 24, 48)]
    dout = randn(total, 3, 24)
    lengths = {f"cu_seqlens_{name}": ints(*bounds) for name in "qk"} | {f"max_seqlen_{name}": longest for name in "qk"}

    def call(function, tensors, dout, **options):
        leaves = [x.detach().requires_grad_(mode != "absorbed") for x in tensors]
        out, lse = function(*leaves, **lengths, mode=mode, return_lse=True, **options)
        if mode == "absorbed" or len(bounds) == 1:
            return out.detach(), lse.detach()
        loss = out.mul(dout).nan_to_num().sum()
        return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)

    given = [after(x, end) for x in rows] + weights
    with guarded():
        results = call(triton_attn.mla_prefill, given, after(dout, end), max_workspace_bytes=workspace)
    assert_spare(*results[:2], end)
    for gradient in results[2:6]:
        assert (gradient[end:] == 0).all()
    exact = call(reference.mla_prefill, [x.double() for x in given], dout)
    assert_spare(*exact[:2], end)
    for result, there in zip(results, exact, strict=True):
        torch.testing.assert_close(result.double(), there.double(), atol=3e-2, rtol=2e-2)
