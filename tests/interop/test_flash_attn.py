"""Names of flash-attn 2: signatures, positional calls, packed tensors, errors."""

import pytest
import torch
from signatures import without_annotations

from triton_attn import flash_attention, flash_attention_varlen, reference
from triton_attn.interop import flash_attn as interop

DENSE_OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
CACHE_OPTIONS = (
    "k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, "
    "alibi_slopes=None, num_splits=0, return_softmax_lse=False"
)


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("flash_attn_func", f"(q, k, v, {DENSE_OPTIONS}, s_aux=None)"),
        ("flash_attn_kvpacked_func", f"(q, kv, {DENSE_OPTIONS})"),
        ("flash_attn_qkvpacked_func", f"(qkv, {DENSE_OPTIONS})"),
        ("flash_attn_varlen_func", f"(q, k, v, {LENGTHS}, {DENSE_OPTIONS}, block_table=None, s_aux=None)"),
        ("flash_attn_varlen_kvpacked_func", f"(q, kv, {LENGTHS}, {DENSE_OPTIONS})"),
        ("flash_attn_varlen_qkvpacked_func", f"(qkv, cu_seqlens, max_seqlen, {DENSE_OPTIONS})"),
        ("flash_attn_with_kvcache", f"(q, k_cache, v_cache, {CACHE_OPTIONS}, s_aux=None)"),
    ],
)
def test_signature_is_flash_attn_2s_and_sinks(name, signature):
    assert without_annotations(getattr(interop, name)) == signature


@pytest.fixture
def qkv(device):
    torch.manual_seed(0)
    return torch.randn(2, 37, 3, 4, 32, device=device)


@pytest.fixture
def slopes(device):
    return torch.rand(4, device=device)


def test_positional_arguments_reach_their_places(qkv, slopes):
    q, k, v = qkv.unbind(2)
    out, lse, weights = interop.flash_attn_func(q, k, v, 0.0, 0.3, True, (9, 5), 2.0, slopes, True, True)
    options = dict(softmax_scale=0.3, causal=True, window_size=(9, 5), softcap=2.0, alibi_slopes=slopes)
    expected, expected_lse = reference.flash_attention(q, k, v, return_lse=True, **options)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert weights.numel() == 0


def test_packed_equals_separate_with_gradients(qkv):
    qkv.requires_grad_()
    packed = interop.flash_attn_qkvpacked_func(qkv, causal=True)
    kv_packed = interop.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True)
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv.unbind(2))
    separate = flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(packed, separate, atol=0, rtol=0)
    torch.testing.assert_close(kv_packed, separate, atol=0, rtol=0)
    dout = torch.randn_like(separate)
    separate.backward(dout)
    packed.backward(dout)
    torch.testing.assert_close(qkv.grad, torch.stack([q.grad, k.grad, v.grad], 2), atol=1e-5, rtol=1e-5)


def test_varlen_and_its_packed_forms(qkv):
    cu_seqlens = torch.tensor([0, 11, 11, 37], dtype=torch.int32, device=qkv.device)
    qkv = qkv[0]
    q, k, v = qkv.unbind(1)
    lengths = (cu_seqlens, cu_seqlens, 26, 26)
    expected, expected_lse = flash_attention_varlen(q, k, v, *lengths, causal=True, return_lse=True)
    out, lse, _ = interop.flash_attn_varlen_func(q, k, v, *lengths, causal=True, return_attn_probs=True)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=0, rtol=0)
    kv_packed = interop.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], *lengths, causal=True)
    qkv_packed = interop.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 26, causal=True)
    torch.testing.assert_close(kv_packed, expected, atol=0, rtol=0)
    torch.testing.assert_close(qkv_packed, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"])
def test_sinks(qkv, name):
    """In q's dtype or in fp32, as a last argument."""
    q, k, v = qkv[:1].unbind(2)
    s_aux = torch.randn(4, device=qkv.device)
    expected = reference.flash_attention(q, k, v, causal=True, sinks=s_aux)
    tensors, options = (q, k, v), {}
    if name == "flash_attn_varlen_func":
        tensors, lengths = (q[0], k[0], v[0]), torch.tensor([0, 37], dtype=torch.int32, device=qkv.device)
        options = dict(cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=37, max_seqlen_k=37)
        table, pages = torch.zeros(1, 1, dtype=torch.int32, device=qkv.device), (q[0], k, v)
        out = interop.flash_attn_varlen_func(*pages, **options, causal=True, block_table=table, s_aux=s_aux)
        torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
    out = getattr(interop, name)(*tensors, **options, causal=True, s_aux=s_aux)
    torch.testing.assert_close(out.view_as(expected), expected, atol=1e-5, rtol=1e-5)
    half = [x.half() for x in tensors]
    out = getattr(interop, name)(*half, **options, causal=True, s_aux=s_aux.half())
    torch.testing.assert_close(out.view_as(expected).float(), expected, atol=5e-3, rtol=5e-3)


def test_negative_windows_are_unlimited_and_columns_may_be_strided(qkv):
    q, k, v = qkv.unbind(2)
    strided = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert strided.stride(-1) != 1
    out = interop.flash_attn_func(strided, k, v, window_size=(-7, -3))
    torch.testing.assert_close(out, flash_attention(q, k, v), atol=0, rtol=0)


def test_dropout_follows_torchs_generator(qkv):
    q, k, v = qkv.unbind(2)
    torch.manual_seed(3)
    first = interop.flash_attn_func(q, k, v, 0.5)
    second = interop.flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(3)
    assert torch.equal(interop.flash_attn_func(q, k, v, 0.5), first)
    assert not torch.equal(first, second)


def check_weights(s_dmask, out, lse, q, k, v, options):
    """S_dmask as in flash-attn's tests: its signs give the mask, and its values the output."""
    seqlen_q, seqlen_k = len(q), len(k)
    assert not s_dmask[:, seqlen_q:].any()
    assert not s_dmask[:, :, seqlen_k:].any()
    s_dmask = s_dmask[:, :seqlen_q, :seqlen_k]
    keep = s_dmask >= 0
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    expected = torch.einsum("hij,jhd->ihd", s_dmask * keep / 0.75, v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    _, expected_lse = reference.flash_attention(q[None], k[None], k[None], return_lse=True, **options)
    torch.testing.assert_close(lse, expected_lse[0], atol=1e-5, rtol=1e-5)
    distance = torch.arange(seqlen_k, device=q.device) - torch.arange(seqlen_q, device=q.device)[:, None]
    seen = (distance <= seqlen_k - seqlen_q) & (distance >= seqlen_k - seqlen_q - 20)
    assert not s_dmask.masked_fill(seen, 0).any()
    return (~keep)[:, seen].float().flatten()


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_shows_its_mask(device, packed):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, 32, device=device) for n, heads in ((130, 4), (139, 2), (139, 2)))
    slopes = torch.tensor([[0.5, 40, 0, 1], [1, 2, 0, 9]], device=device)  # weights of 0 among them
    options = dict(causal=True, window_size=(20, -1), alibi_slopes=slopes)
    if packed:
        starts = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 50, 180], [0, 61, 200])]
        (q, k, v), call, lengths = (x.flatten(0, 1) for x in (q, k, v)), interop.flash_attn_varlen_func, (130, 139)
        bounds = [(slice(0, 50), slice(0, 61)), (slice(50, 180), slice(61, 200))]
        places = (q[:180], k[:200], v[:200], *starts, *lengths)
        sequences = [(q[rows_q], k[rows_k], v[rows_k]) for rows_q, rows_k in bounds]
    else:
        call, places, sequences = interop.flash_attn_func, (q, k, v), list(zip(q, k, v))
    torch.manual_seed(1)
    out, lse, s_dmask = call(*places, dropout_p=0.25, return_attn_probs=True, **options)
    torch.manual_seed(1)
    assert torch.equal(call(*places, dropout_p=0.25, **options), out)
    assert s_dmask.shape == (2, 4, 256, 256)
    assert s_dmask.dtype == q.dtype
    dropped = []
    for i, rows in enumerate(sequences):
        own = options | {"alibi_slopes": slopes[i]}
        own_out = out[bounds[i][0]] if packed else out[i]
        own_lse = lse[:, bounds[i][0]] if packed else lse[i]
        dropped.append(check_weights(s_dmask[i], own_out, own_lse, *rows, own))
    assert abs(torch.cat(dropped).mean() - 0.25) < 0.02


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 5.0}, {"causal": True, "window_size": (6, 2)}])
def test_varlen_over_pages(device, options):
    torch.manual_seed(0)
    seqlens, counts, page_size = (17, 0, 5, 40), (9, 3, 5, 1), 8
    q = torch.randn(sum(counts), 4, 32, device=device)
    k, v = (torch.randn(sum(seqlens), 2, 32, device=device) for _ in range(2))
    starts_q, starts_k = (
        torch.tensor([0, *n], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32) for n in (counts, seqlens)
    )
    table = torch.full((4, 6), 2147480000, dtype=torch.int32, device=device)
    k_pages, v_pages = (torch.full((12, page_size, 2, 32), torch.nan, device=device) for _ in range(2))
    pages = iter(torch.randperm(12).tolist())
    for i, n in enumerate(seqlens):
        for j in range(0, n, page_size):
            table[i, j // page_size] = page = next(pages)
            rows = slice(int(starts_k[i]) + j, int(starts_k[i]) + min(j + page_size, n))
            k_pages[page, : rows.stop - rows.start], v_pages[page, : rows.stop - rows.start] = k[rows], v[rows]
    lengths = (starts_q, starts_k, max(counts), max(seqlens))
    slopes = torch.rand(4, device=device)
    expected = flash_attention_varlen(q, k, v, *lengths, return_lse=True, alibi_slopes=slopes, **options)
    call = interop.flash_attn_varlen_func
    options |= dict(alibi_slopes=slopes, block_table=table)
    out, lse, s_dmask = call(q, k_pages, v_pages, *lengths, return_attn_probs=True, **options)
    torch.testing.assert_close((out, lse), expected, atol=1e-5, rtol=1e-5)
    assert s_dmask.numel() == 0
    assert torch.equal(call(q, k_pages, v_pages, *lengths, **options), out)


def test_unsupported_arguments_are_named(qkv):
    q, k, v = qkv.unbind(2)
    cu_seqlens = torch.tensor([0, 37], dtype=torch.int32, device=qkv.device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=qkv.device)
    places = (q[0], k, v, cu_seqlens, cu_seqlens, 37, 37)
    with pytest.raises(NotImplementedError, match=r"dropout_p: expected 0 with a block_table, got 0\.1"):
        interop.flash_attn_varlen_func(*places, dropout_p=0.1, block_table=table)
    with pytest.raises(NotImplementedError, match="gradient"):
        interop.flash_attn_varlen_func(q[0], k.clone().requires_grad_(), *places[2:], block_table=table)
    with pytest.raises(TypeError, match=r"cu_seqlens_k: expected an int32 tensor .* got None"):
        interop.flash_attn_varlen_func(*places[:4], None, 37, 37, block_table=table)


# flash_attn_with_kvcache: ragged lengths, one of them 0, over a cache whose other slots are NaN.
SEQLENS, CAPACITY, PAGE_SIZE, ROOM_FOR_ANGLES = (0, 9, 21), 32, 4, 40


class Cache:
    """A contiguous or paged cache, and the keys and values (length, heads, head_dim) of its sequences."""

    def __init__(self, device, dtype, layout, first_keys=(0, 0, 0)):
        rows = 3 * (CAPACITY // PAGE_SIZE) + 2 if layout == "paged" else 5 if layout == "batch_idx" else 3
        shape = (rows, PAGE_SIZE if layout == "paged" else CAPACITY, 2, 16)
        self.k, self.v = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
        self.arguments = {"cache_seqlens": torch.tensor(SEQLENS, dtype=torch.int32, device=device)}
        where = torch.arange(3)[:, None]
        if layout == "paged":
            where = torch.randperm(rows)[: 3 * (CAPACITY // PAGE_SIZE)].view(3, -1)
            self.arguments["block_table"] = where.to(device, torch.int32)
        elif layout == "batch_idx":
            where = torch.tensor([[4], [0], [2]])
            self.arguments["cache_batch_idx"] = where[:, 0].to(device, torch.int32)
        if any(first_keys):
            self.arguments["cache_leftpad"] = torch.tensor(first_keys, dtype=torch.int32, device=device)
        self.first_keys = first_keys
        size = shape[1]
        self.slots = (where[:, :, None] * size + torch.arange(size)).flatten(1).to(device)  # (3, CAPACITY)
        for i, (first, seqlen) in enumerate(zip(first_keys, SEQLENS)):
            for cache in (self.k, self.v):
                cache.flatten(0, 1)[self.slots[i, first:seqlen]] = torch.randn(
                    seqlen - first, 2, 16, dtype=dtype, device=device
                )

    def held(self, i, num_new):
        slots = self.slots[i, self.first_keys[i] : SEQLENS[i] + num_new]
        return self.k.flatten(0, 1)[slots], self.v.flatten(0, 1)[slots]


def rotated(x, cos, sin, positions, interleaved):
    """x (length, heads, head_dim) at positions, by complex numbers."""
    half = cos.shape[1]
    part, rest = x[..., : 2 * half].double(), x[..., 2 * half :]
    pairs = part.unflatten(-1, (half, 2)) if interleaved else part.unflatten(-1, (2, half)).mT
    angles = torch.complex(cos[positions].double(), sin[positions].double())[:, None]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angles)
    turned = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], -1)


def check_with_kvcache(
    device, dtype, layout, *, seqlen_q=3, seqlen_new=3, rotary=None, first_keys=(0, 0, 0), **options
):
    torch.manual_seed(0)
    cache = Cache(device, dtype, layout, first_keys)
    q = torch.randn(3, seqlen_q, 4, 16, dtype=dtype, device=device)
    arguments, expected_q = dict(cache.arguments), q
    new = ()
    if seqlen_new:
        new = tuple(torch.randn(2, 3, seqlen_new, 2, 16, dtype=dtype, device=device))
        expected_new = list(new)
    if rotary is not None:
        rotary_dim, interleaved = rotary
        angles = torch.rand(ROOM_FOR_ANGLES, rotary_dim // 2, device=device) * 6.3
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        arguments |= dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)
        steps = torch.arange(seqlen_new, device=device)
        q_steps = torch.arange(seqlen_q, device=device)
        if not options.get("causal") and "window_size" not in options:
            q_steps = torch.zeros_like(q_steps)
        turn = [(seqlen, cos, sin, interleaved) for seqlen in SEQLENS]
        expected_new[0] = torch.stack([rotated(x, c, s, n + steps, i) for x, (n, c, s, i) in zip(new[0], turn)])
        expected_q = torch.stack([rotated(x, c, s, n + q_steps, i) for x, (n, c, s, i) in zip(q, turn)])
    before = [x.clone() for x in (cache.k, cache.v)]
    out, lse = interop.flash_attn_with_kvcache(
        q, cache.k, cache.v, *new, **arguments, **options, return_softmax_lse=True
    )

    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    options.pop("num_splits", None)
    for i in range(3):
        if seqlen_new:
            slots = cache.slots[i, SEQLENS[i] : SEQLENS[i] + seqlen_new]
            for written, x, old in zip((cache.k, cache.v), expected_new, before):
                torch.testing.assert_close(written.flatten(0, 1)[slots], x[i], atol=tolerance, rtol=tolerance)
                old.flatten(0, 1)[slots] = written.flatten(0, 1)[slots]
        k, v = cache.held(i, seqlen_new)
        sequence_options = dict(options)
        if options.get("alibi_slopes") is not None and options["alibi_slopes"].ndim == 2:
            sequence_options["alibi_slopes"] = options["alibi_slopes"][i]
        expected, expected_lse = reference.flash_attention(
            *(x[None].float() for x in (expected_q[i], k, v)), return_lse=True, **sequence_options
        )
        torch.testing.assert_close(out[i].float(), expected[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[i], expected_lse[0], atol=tolerance, rtol=tolerance)
    for written, old in zip((cache.k, cache.v), before):
        assert torch.equal(written.nan_to_num(7.0), old.nan_to_num(7.0)), "a slot that is not of a new key was written"


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("layout", ["contiguous", "batch_idx", "paged"])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_new", "causal", "dtype"),
    [
        (1, 1, True, torch.float16),
        (5, 5, True, torch.float32),
        (2, 7, False, torch.float32),
        (3, 0, True, torch.float32),
        (4, 4, False, torch.float16),
    ],
)
def test_with_kvcache_appends_and_attends(device, layout, seqlen_q, seqlen_new, causal, dtype):
    check_with_kvcache(device, dtype, layout, seqlen_q=seqlen_q, seqlen_new=seqlen_new, causal=causal)


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (6, 1)}], ids=["all", "causal", "local"])
def test_with_kvcache_rotates_keys_and_queries(device, layout, interleaved, options):
    check_with_kvcache(device, torch.float32, layout, rotary=(12, interleaved), **options)
    check_with_kvcache(device, torch.float16, layout, seqlen_q=2, rotary=(16, interleaved), **options)


@pytest.mark.parametrize("layout", ["contiguous", "batch_idx", "paged"])
@pytest.mark.parametrize("seqlen_new", [0, 3])
def test_with_kvcache_skips_the_left_padding(device, layout, seqlen_new):
    first_keys = (0, 9, 6)
    check_with_kvcache(device, torch.float32, layout, first_keys=first_keys, seqlen_new=seqlen_new, causal=True)
    if seqlen_new:
        check_with_kvcache(device, torch.float16, layout, first_keys=first_keys, rotary=(16, False), causal=True)


def test_with_kvcache_passes_the_other_options_on(device, slopes):
    options = dict(softmax_scale=0.4, causal=True, window_size=(8, -1), softcap=3.0, num_splits=3)
    check_with_kvcache(device, torch.float32, "paged", alibi_slopes=slopes, **options)
    check_with_kvcache(device, torch.float32, "contiguous", alibi_slopes=torch.stack([slopes] * 3) + 0.1, **options)


def test_with_kvcache_takes_an_int_or_a_full_cache(device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 16, device=device) for n in (1, 12, 12))
    k_cache, v_cache = (torch.cat([x, torch.full_like(x, torch.nan)]) for x in (k, v))  # more rows than q has
    full = interop.flash_attn_with_kvcache(q, k_cache, v_cache)
    torch.testing.assert_close(full, reference.flash_attention(q, k, v), atol=1e-5, rtol=1e-5)
    k_cache[:2, 7:] = v_cache[:2, 7:] = torch.nan
    some = interop.flash_attn_with_kvcache(q, k_cache, v_cache, k[:, 6:7], v[:, 6:7], cache_seqlens=6)
    torch.testing.assert_close(some, reference.flash_attention(q, k[:, :7], v[:, :7]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_with_kvcache_writes_no_key_that_has_no_room(device, layout):
    cache = Cache(device, torch.float32, layout)
    k = torch.ones(3, 2, 2, 16, device=device)
    arguments = cache.arguments | {
        "cache_seqlens": torch.tensor([CAPACITY - 1, 9, 21], dtype=torch.int32, device=device)
    }
    expected = cache.k.clone()
    for row, position in ((0, CAPACITY - 1), (1, 9), (1, 10), (2, 21), (2, 22)):
        expected.flatten(0, 1)[cache.slots[row, position]] = 1
    no_query = torch.empty(3, 0, 4, 16, device=device)
    interop.flash_attn_with_kvcache(no_query, cache.k, cache.v, k, k, **arguments)
    assert torch.equal(cache.k.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["all", "causal"])
def test_with_kvcache_rotates_past_the_table_by_its_last_row(device, options):
    """Queries and keys of one sequence; the others have their own angles."""
    torch.manual_seed(0)
    q, k = torch.randn(3, 3, 4, 16, device=device), torch.randn(3, 3, 2, 16, device=device)
    angles = torch.rand(22, 8, device=device) * 6.3  # the last sequence goes on to position 23 or 31
    longer = torch.cat([angles, angles[-1:].expand(20, -1)])
    for seqlens in (SEQLENS, (0, 9, 29)):
        results = []
        for table in (angles, longer):
            cache = torch.zeros(2, 3, CAPACITY, 2, 16, device=device)
            where = torch.tensor(seqlens, dtype=torch.int32, device=device)
            rotary = dict(rotary_cos=table.cos(), rotary_sin=table.sin(), cache_seqlens=where)
            results.append((interop.flash_attn_with_kvcache(q, *cache, k, k, **rotary, **options), cache))
        assert all(map(torch.equal, *results))


def test_with_kvcache_names_what_is_wrong(device):
    cache = Cache(device, torch.float32, "batch_idx")
    q, k = torch.randn(3, 1, 4, 16, device=device), torch.randn(3, 1, 2, 16, device=device)
    seqlens, rows = cache.arguments["cache_seqlens"], cache.arguments["cache_batch_idx"]
    before = cache.k.clone()

    def call(**arguments):
        arguments = {"cache_seqlens": seqlens, "k": k, "v": k} | arguments
        return interop.flash_attn_with_kvcache(q, cache.k, cache.v, **arguments)

    for error, match, arguments in (
        (NotImplementedError, "cache_batch_idx", dict(cache_batch_idx=rows, block_table=rows[:, None])),
        (ValueError, "k, v", dict(v=None)),
        (ValueError, "v: expected shape", dict(v=k[:2])),
        (ValueError, "cache_seqlens: expected the number", dict(cache_seqlens=None)),
        (ValueError, "cache_seqlens: expected shape", dict(cache_seqlens=seqlens[:2])),
        (TypeError, "cache_seqlens", dict(cache_seqlens=seqlens.long())),
        (TypeError, "cache_batch_idx", dict(cache_batch_idx=rows.long())),
        (ValueError, "cache_leftpad", dict(cache_leftpad=rows[:1])),
        (ValueError, "block_table", dict(block_table=rows)),
        (ValueError, "rotary_cos", dict(rotary_cos=torch.ones(40, 8, device=device))),
        (ValueError, "rotary_cos", dict(rotary_cos=torch.ones(40, 8), rotary_sin=torch.ones(40, 8), k=None, v=None)),
    ):
        with pytest.raises(error, match=match):
            call(**arguments)
        assert torch.equal(cache.k.nan_to_num(7.0), before.nan_to_num(7.0))
    with pytest.raises(NotImplementedError, match="cache_leftpad"):
        interop.flash_attn_with_kvcache(q, cache.k[:, :9], cache.v[:, :9], cache_seqlens=seqlens, cache_leftpad=rows)
    with pytest.raises(NotImplementedError, match="gradient"):
        interop.flash_attn_with_kvcache(q.requires_grad_(), cache.k, cache.v, cache_seqlens=seqlens)
