"""Scalar arguments of every public function: all kinds of bool, int and float are accepted; kernels get plain ones."""

import inspect
from fractions import Fraction

import numpy as np
import pytest
import torch

import triton_attn as ta
from triton_attn.interop import flash_attn as fa
from triton_attn.interop import flash_mla

BOOL, INT, NUMBER, PAIR, TRIPLE = "a bool", "an int", "a number", "a pair", "three ints"
OTHERS = {  # plain value: equal values of other types
    BOOL: [np.bool_],
    INT: [np.int64, np.int32],
    NUMBER: [int, np.float32, np.float64, np.int64, Fraction],
    PAIR: [lambda pair: [np.int64(side) for side in pair], lambda pair: tuple(np.int32(side) for side in pair)],
    TRIPLE: [lambda triple: [np.int64(x) for x in triple], lambda triple: tuple(np.int32(x) for x in triple)],
}
WRONG = {
    BOOL: [1, 0.0, "yes", torch.tensor(True)],
    INT: [True, 1.0, "1", np.bool_(True), Fraction(1), torch.tensor(1)],
    NUMBER: [True, "1", np.bool_(True), 1j, torch.tensor(1.0)],
    PAIR: [3, (1, 2, 3), (2.0, 1), (2, True), (2, None)],
    TRIPLE: [3, (0, 2), (0.0, 2, 1), (0, 2, True), (0, None, 1), (2, 2, 1), (0, 2, 3)],
}

Q, K = torch.randn(1, 3, 2, 16), torch.randn(1, 5, 1, 16)
CACHE = torch.randn(4, 4, 1, 16)
LATENT_CACHE = torch.randn(4, 4, 24)
Q_MLA = torch.randn(1, 1, 2, 24)
BOUNDS_Q, BOUNDS_K = (torch.tensor([0, n], dtype=torch.int32) for n in (3, 5))
LENGTHS, TABLE = torch.tensor([5], dtype=torch.int32), torch.arange(4, dtype=torch.int32)[None]
SLOTS = torch.tensor([1, 6])
ANGLES = torch.randn(8, 4)
ROPE = dict(rope_cos=ANGLES, rope_sin=ANGLES)
W_UK, W_UV = torch.randn(2, 8, 16), torch.randn(2, 8, 16)

FLASH = dict(
    causal=(BOOL, True),
    softmax_scale=(NUMBER, 2.0),
    window_size=(PAIR, (2, 1)),
    softcap=(NUMBER, 4.0),
    dropout_p=(NUMBER, 0.0),
    deterministic=(BOOL, True),
    return_lse=(BOOL, True),
)
SEED = dict(dropout_seed=(INT, 7))
LONGEST = dict(max_seqlen_q=(INT, 3), max_seqlen_k=(INT, 5))
CHECKED = dict(check_values=(BOOL, True))
PAGED = dict(
    max_seqlen_q=(INT, 3),
    causal=(BOOL, False),
    softmax_scale=(NUMBER, 2.0),
    window_size=(PAIR, (2, 1)),
    softcap=(NUMBER, 4.0),
    k_scale=(NUMBER, 2.0),
    v_scale=(NUMBER, 3.0),
    num_splits=(INT, 2),
    batch_invariant=(BOOL, False),
    key_shard=(TRIPLE, (1, 2, 4)),
    return_lse=(BOOL, True),
)


def append_kv_cache(**options):
    k_cache, v_cache = CACHE.clone(), CACHE.clone()
    new = K[0, :2]
    ta.append_kv_cache(new, new, k_cache, v_cache, SLOTS, positions=SLOTS, **ROPE, **options)
    return k_cache, v_cache


def append_latent_cache(**options):
    cache = LATENT_CACHE.clone()
    ta.append_latent_cache(K[0, :2, 0], Q[0, :2, 0, :8], cache, SLOTS, positions=SLOTS, **ROPE, **options)
    return cache


def copy_kv_pages(**options):
    cache = CACHE.clone()
    ta.copy_kv_pages(cache, torch.tensor([0]), torch.tensor([3]), **options)
    return cache


def copy_kv_pages_to(**options):
    target = torch.zeros_like(CACHE)
    ta.copy_kv_pages(CACHE, torch.tensor([0]), torch.tensor([3]), to=target, **options)
    return target


def mla_decode(**options):
    inputs = Q[..., :8], Q[..., 8:], LATENT_CACHE, LENGTHS, TABLE, W_UK, W_UV
    return ta.mla_decode(*inputs, **ROPE, **options)


def mla_prefill(**options):
    inputs = Q[0, ..., :8], Q[0, ..., 8:], K[0, :, 0], K[0, :, 0, :8], W_UK, W_UV
    return ta.mla_prefill(*inputs, cu_seqlens_q=BOUNDS_Q, cu_seqlens_k=BOUNDS_K, **options)


def paged_kv_cache(**options):
    cache = ta.PagedKVCache(dtype=torch.float32, **options)
    seq, _ = cache.create(range(9))
    slots = cache.extend([seq], np.int64(9))
    cache.truncate(seq, np.int32(2))
    return slots, torch.tensor(cache.k_cache.shape), torch.tensor(cache.v_cache.shape)


def latent_kv_cache(**options):
    return torch.tensor(ta.LatentKVCache(dtype=torch.float32, **options).latent_cache.shape)


def block_pool(num_pages, prefix_caching, n):
    return torch.from_numpy(ta.BlockPool(num_pages, prefix_caching).allocate(n))


def flash_attn_with_kvcache(**options):
    return fa.flash_attn_with_kvcache(Q, CACHE, CACHE, block_table=TABLE, return_softmax_lse=True, **options)


# Name: (public function, call with given scalars, {scalar: (kind, value)}).
FUNCTIONS = {
    "flash_attention": (ta.flash_attention, lambda **options: ta.flash_attention(Q, K, K, **options), FLASH | SEED),
    "dropout": (
        ta.flash_attention,
        lambda **options: ta.flash_attention(Q, K, K, **options),
        dict(dropout_p=(NUMBER, 0.5)) | SEED,
    ),
    "flash_attention_varlen": (
        ta.flash_attention_varlen,
        lambda **options: ta.flash_attention_varlen(Q[0], K[0], K[0], BOUNDS_Q, BOUNDS_K, **options),
        FLASH | SEED | LONGEST | CHECKED,
    ),
    "paged_attention": (
        ta.paged_attention,
        lambda **options: ta.paged_attention(Q[0], CACHE, CACHE, LENGTHS, TABLE, cu_seqlens_q=BOUNDS_Q, **options),
        PAGED | CHECKED,
    ),
    "append_kv_cache": (
        ta.append_kv_cache,
        append_kv_cache,
        dict(k_scale=(NUMBER, 2.0), v_scale=(NUMBER, 3.0), rope_interleaved=(BOOL, True)) | CHECKED,
    ),
    "append_latent_cache": (
        ta.append_latent_cache,
        append_latent_cache,
        dict(k_scale=(NUMBER, 2.0), k_pe_scale=(NUMBER, 3.0), rope_interleaved=(BOOL, True)) | CHECKED,
    ),
    "copy_kv_pages": (ta.copy_kv_pages, copy_kv_pages, CHECKED),
    "copy_kv_pages, to another cache": (ta.copy_kv_pages, copy_kv_pages_to, CHECKED),
    "gather_kv_cache": (
        ta.gather_kv_cache,
        lambda **options: ta.gather_kv_cache(CACHE, CACHE, TABLE, BOUNDS_K, **options),
        dict(num_tokens=(INT, 6), k_scale=(NUMBER, 2.0), v_scale=(NUMBER, 3.0)) | CHECKED,
    ),
    "gather_latent_cache": (
        ta.gather_latent_cache,
        lambda **options: ta.gather_latent_cache(LATENT_CACHE, TABLE, BOUNDS_K, **options),
        dict(
            num_tokens=(INT, 6),
            kv_lora_rank=(INT, 16),
            qk_rope_head_dim=(INT, 8),
            k_scale=(NUMBER, 2.0),
            k_pe_scale=(NUMBER, 3.0),
        )
        | CHECKED,
    ),
    "mla_decode": (
        ta.mla_decode,
        mla_decode,
        dict(
            causal=(BOOL, False),
            softmax_scale=(NUMBER, 2.0),
            k_scale=(NUMBER, 2.0),
            k_pe_scale=(NUMBER, 3.0),
            rope_interleaved=(BOOL, True),
            num_splits=(INT, 2),
            batch_invariant=(BOOL, False),
            key_shard=(TRIPLE, (1, 2, 4)),
            return_lse=(BOOL, True),
        )
        | CHECKED,
    ),
    "mla_decode of packed queries": (
        ta.mla_decode,
        lambda **options: ta.mla_decode(
            Q[0, ..., :8], Q[0, ..., 8:], LATENT_CACHE, LENGTHS, TABLE, W_UK, W_UV, cu_seqlens_q=BOUNDS_Q, **options
        ),
        dict(max_seqlen_q=(INT, 3), num_splits=(INT, 2), key_shard=(TRIPLE, (1, 2, 4))) | CHECKED,
    ),
    "mla_prefill": (
        ta.mla_prefill,
        mla_prefill,
        dict(
            causal=(BOOL, False),
            softmax_scale=(NUMBER, 2.0),
            max_workspace_bytes=(INT, 2**20),
            return_lse=(BOOL, True),
        )
        | LONGEST
        | CHECKED,
    ),
    "mla_softmax_scale": (
        ta.mla_softmax_scale,
        lambda **options: torch.tensor(ta.mla_softmax_scale(**options)),
        dict(
            qk_nope_head_dim=(INT, 128),
            qk_rope_head_dim=(INT, 64),
            rope_factor=(NUMBER, 40.0),
            mscale_all_dim=(NUMBER, 1.0),
        ),
    ),
    "kv_cache_bytes_per_token": (
        ta.kv_cache_bytes_per_token,
        lambda **options: torch.tensor(ta.kv_cache_bytes_per_token(**options)),
        dict(num_layers=(INT, 61), num_kv_heads=(INT, 128), head_dim=(INT, 192), head_dim_v=(INT, 128))
        | dict(token_scales=(BOOL, True)),
    ),
    "kv_cache_bytes_per_token, MLA": (
        ta.kv_cache_bytes_per_token,
        lambda **options: torch.tensor(ta.kv_cache_bytes_per_token(**options)),
        dict(num_layers=(INT, 61), kv_lora_rank=(INT, 128), qk_rope_head_dim=(INT, 64)),
    ),
    "prefix_tree": (
        ta.prefix_tree,
        lambda **options: ta.prefix_tree([[0, 1, 2], [0, 1, 3]], [12, 11], device="cpu", **options).memory,
        dict(
            page_size=(INT, 4),
            num_heads_q=(INT, 4),
            num_heads_kv=(INT, 2),
            head_dim_v=(INT, 16),
            token_bytes=(INT, 128),
            seqlens_q=(INT, 2),
            always=(BOOL, True),
        ),
    ),
    "PagedKVCache": (
        ta.PagedKVCache,
        paged_kv_cache,
        dict(
            num_pages=(INT, 9),
            page_size=(INT, 2),
            num_layers=(INT, 1),
            num_kv_heads=(INT, 2),
            head_dim=(INT, 16),
            head_dim_v=(INT, 8),
            interleave=(INT, 2),
            prefix_caching=(BOOL, True),
            record_events=(BOOL, True),
            token_scales=(BOOL, False),
        ),
    ),
    "LatentKVCache": (
        ta.LatentKVCache,
        latent_kv_cache,
        dict(
            num_pages=(INT, 9),
            page_size=(INT, 2),
            num_layers=(INT, 1),
            kv_lora_rank=(INT, 16),
            qk_rope_head_dim=(INT, 8),
            interleave=(INT, 2),
            prefix_caching=(BOOL, True),
            record_events=(BOOL, True),
        ),
    ),
    "BlockPool": (
        ta.BlockPool,
        block_pool,
        dict(num_pages=(INT, 9), prefix_caching=(BOOL, False), n=(INT, 2)),
    ),
}
INTEROP = {  # flash-attn and FlashMLA accept any truth value as a bool
    "flash_attn_func": (
        fa.flash_attn_func,
        lambda **options: fa.flash_attn_func(Q, K, K, **options),
        {name: FLASH[name] for name in ("dropout_p", "softmax_scale", "causal", "window_size", "softcap")}
        | dict(deterministic=(BOOL, True), return_attn_probs=(BOOL, True)),
    ),
    "flash_attn_varlen_func": (
        fa.flash_attn_varlen_func,
        lambda **options: fa.flash_attn_varlen_func(Q[0], K[0], K[0], BOUNDS_Q, BOUNDS_K, **options),
        {name: FLASH[name] for name in ("dropout_p", "softmax_scale", "causal", "window_size", "softcap")}
        | dict(max_seqlen_q=(INT, 3), max_seqlen_k=(INT, 5), return_attn_probs=(BOOL, True)),
    ),
    "flash_attn_with_kvcache": (
        fa.flash_attn_with_kvcache,
        flash_attn_with_kvcache,
        {name: FLASH[name] for name in ("softmax_scale", "causal", "window_size", "softcap")}
        | dict(cache_seqlens=(INT, 5), num_splits=(INT, 2), rotary_interleaved=(BOOL, True)),
    ),
    "flash_mla_with_kvcache": (
        flash_mla.flash_mla_with_kvcache,
        lambda **options: flash_mla.flash_mla_with_kvcache(
            LATENT_CACHE[:1, :2, None],
            LATENT_CACHE[:, :, None],
            TABLE,
            LENGTHS,
            tile_scheduler_metadata=None,
            **options,
        ),
        dict(head_dim_v=(INT, 16), softmax_scale=(NUMBER, 2.0), causal=(BOOL, True), is_fp8_kvcache=(BOOL, False)),
    ),
}
# Arguments that are neither scalars nor covered by another test.
TENSORS = {
    "q",
    "k",
    "v",
    "outs",
    "lses",
    "out",
    "lse",
    "workspace",
    "sinks",
    "tree_mask",
    "alibi_slopes",
    "shard",
    "caches",
    "src_pages",
    "dst_pages",
    "positions",
    "to",
    "seq_starts",
}
TENSORS |= {"cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "block_table", "slot_mapping", "rope_cos", "rope_sin"}
TENSORS |= {"q_nope", "q_pe", "kv_latent", "k_pe", "w_uk", "w_uv", "latent_cache", "rope_cache", "k_cache", "v_cache"}
# The entries of layer_windows have tests in tests/cache/test_layer_windows.py.
NOT_SCALARS = TENSORS | {"mode", "dtype", "device", "mesh", "prefix_tree", "layer_windows"}


def plain(scalars):
    return {name: value for name, (_, value) in scalars.items()}


@pytest.fixture(params=["triton", "reference"])
def launched(request, monkeypatch):
    """The scalars of all launches, in order; none if the reference runs."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setenv("TRITON_ATTN_BACKEND", request.param)
    scalars = []
    run = InterpretedFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        scalars.extend(_scalars_in([args, kwargs, grid]))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return scalars


def _scalars_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [scalar for item in value for scalar in _scalars_in(item)]
    return [] if value is None or isinstance(value, torch.Tensor) else [value]


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("name", FUNCTIONS | INTEROP)
def test_equal_scalars_of_other_types_give_the_same_launch_and_result(name, launched):
    _, call, scalars = (FUNCTIONS | INTEROP)[name]
    expected = call(**plain(scalars))
    expected_launches = launched.copy()
    for i in range(max(map(len, OTHERS.values()))):
        launched.clear()
        result = call(**{scalar: _converted(kind, value, i) for scalar, (kind, value) in scalars.items()})
        assert [(type(x), x) for x in launched] == [(type(x), x) for x in expected_launches]
        for x, y in zip(_tensors(result), _tensors(expected), strict=True):
            assert torch.equal(x, y)
    assert {type(x) for x in launched} <= {bool, int, float, str}


def _converted(kind, value, i):
    """The value in its i-th other type, or the last one."""
    converted = OTHERS[kind][: i + 1][-1](value)
    return converted if kind in (PAIR, TRIPLE) or converted == value else value  # no int is 0.5


def _tensors(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize(("name", "scalar"), [(name, scalar) for name in FUNCTIONS for scalar in FUNCTIONS[name][2]])
def test_scalars_of_wrong_types_are_named(name, scalar):
    _, call, scalars = FUNCTIONS[name]
    options = plain(scalars)
    call(**options)  # a cached call must not hide an error
    for wrong in WRONG[scalars[scalar][0]]:
        if scalar in ("dropout_seed", "max_seqlen_q", "max_seqlen_k") and isinstance(wrong, torch.Tensor):
            continue  # may be a tensor
        with pytest.raises((TypeError, ValueError), match=scalar):
            call(**options | {scalar: wrong})


def test_every_scalar_of_every_public_function_is_here():
    public = {name: getattr(ta, name) for name in ta.__all__}
    others = "OutOfPages", "PrefixTree", "override_config", "use_tuned", "warmup", "workspace_bytes"
    listed = {}
    for function, _, scalars in FUNCTIONS.values():
        listed.setdefault(function, set()).update(scalars)
    for name, function in public.items():
        if not callable(function) or name in others:
            continue
        missing = set(inspect.signature(function).parameters) - NOT_SCALARS - listed.get(function, set())
        assert not missing, f"{name}: {missing}"
