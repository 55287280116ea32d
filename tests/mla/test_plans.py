"""Plans of MLA's launches: after any other call, a call launches what it would launch as the first.

Each neighbour differs from a call in one thing. Nothing is compiled: launches are recorded and not made.
"""

import functools
import itertools
from unittest import mock

import pytest
import torch
from plans import check_neighbour, kernels, launches_of, matmul_precision, padded, unaligned

from triton_attn import mla_decode, mla_prefill, override_config
from triton_attn.merge import kernel as merge
from triton_attn.mla import absorbed, hopper, prefill, projections

pytestmark = pytest.mark.compiled

BF16 = torch.bfloat16
MODULES = absorbed, hopper, prefill, projections, merge


def heads_first(x):
    return torch.empty(x.transpose(-2, -3).shape, dtype=x.dtype).transpose(-2, -3)


def pages_apart(x):
    """Twice as much memory from one page, or sequence, to the next."""
    return torch.empty(2 * x.shape[0], *x.shape[1:], dtype=x.dtype)[::2]


def in_one_row(x):
    """With the strides that it has beside the other part of a cache whose rows have 576 elements."""
    return torch.empty(*x.shape[:2], 576, dtype=x.dtype)[..., : x.shape[2]]


def changed(tensors, change):
    return {name: (change or {}).get(name, lambda x: x)(x) for name, x in tensors.items()}


def decode(
    dtype=BF16,
    is_fp8=False,
    batch=2,
    seqlen_q=1,
    num_heads=16,
    widths=(512, 64),
    pages=(8, 64),
    table_width=32,
    weights=None,
    two_caches=False,
    packed=None,
    rotary_dim=None,
    change=None,
    softmax_scale=0.1,
    **options,
):
    """change: {tensor: function}. weights: (qk_nope_head_dim, v_head_dim), None: queries are absorbed already. packed:
    max_seqlen_q of packed queries."""
    rank, rope = widths
    nope, value = weights or (rank, None)
    row = rank if two_caches else rank + rope
    cache = torch.empty(*pages, 656, dtype=torch.uint8) if is_fp8 else torch.empty(*pages, row, dtype=dtype)
    tensors = {
        "q_nope": torch.empty(batch, seqlen_q, num_heads, nope, dtype=dtype),
        "q_pe": torch.empty(batch, seqlen_q, num_heads, rope, dtype=dtype),
        "latent_cache": cache,
    }
    if weights:
        tensors["w_uk"] = torch.empty(num_heads, nope, rank, dtype=dtype)
        tensors["w_uv"] = torch.empty(num_heads, value, rank, dtype=dtype)
    if two_caches:
        tensors["rope_cache"] = torch.empty(*pages, rope, dtype=dtype)
    if packed:
        tensors |= {name: tensors[name].flatten(0, 1) for name in ("q_nope", "q_pe")}
        tensors["cu_seqlens_q"] = torch.zeros(batch + 1, dtype=torch.int32)
        options["max_seqlen_q"] = packed
    if rotary_dim:
        tensors |= {name: torch.ones(64, rotary_dim // 2) for name in ("rope_cos", "rope_sin")}
    lengths, table = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, table_width, dtype=torch.int32)
    tensors |= {"cache_seqlens": lengths, "block_table": table}
    mla_decode(**changed(tensors, change), softmax_scale=softmax_scale, **options)


def prefilled(
    dtype=BF16,
    rows=(2, 256),
    rows_k=(2, 256),
    num_heads=4,
    head_dims=(64, 32, 48),
    rank=128,
    packed=None,
    change=None,
    mode="fused",
    **options,
):
    """change: {tensor: function}. packed: sequences, and the longest of queries and of keys."""
    nope, rope, value = head_dims
    tensors = {
        "q_nope": torch.empty(*rows, num_heads, nope, dtype=dtype),
        "q_pe": torch.empty(*rows, num_heads, rope, dtype=dtype),
        "kv_latent": torch.empty(*rows_k, rank, dtype=dtype),
        "k_pe": torch.empty(*rows_k, rope, dtype=dtype),
    }
    if packed:
        sequences, *longest = packed
        tensors = {name: x.flatten(0, 1) for name, x in tensors.items()}
        tensors |= {name: torch.zeros(sequences + 1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        options |= dict(zip(("max_seqlen_q", "max_seqlen_k"), longest))
    tensors["w_uk"] = torch.empty(num_heads, nope, rank, dtype=dtype)
    tensors["w_uv"] = torch.empty(num_heads, value, rank, dtype=dtype)
    with mock.patch.object(torch, "bmm"):  # its result is not read
        mla_prefill(**changed(tensors, change), mode=mode, **options)


def few_sms():
    return mock.patch.object(absorbed, "count_sms", return_value=4)


FP32 = {"dtype": torch.float32}
WITH_WEIGHTS = {"weights": (128, 128)}
HOPPER = {"num_heads": 64, "inside": lambda: kernels("hopper")}
TWO_CACHES = {"two_caches": True}
# (what a call has, what a neighbour of it has besides)
DECODE = {
    "dtype": ({}, {"dtype": torch.float16}),
    "fp8": ({}, {"is_fp8": True}),
    "batch": ({}, {"batch": 3}),
    "seqlen_q": ({}, {"seqlen_q": 3}),
    "heads": ({}, {"num_heads": 32}),
    "kv_lora_rank": ({}, {"widths": (256, 64)}),
    "qk_rope_head_dim": ({}, {"widths": (512, 32)}),
    "page_size": ({}, {"pages": (8, 128)}),
    "pages of a sequence": ({}, {"table_width": 64}),
    **{f"strides of {x}": ({"seqlen_q": 2}, {"change": {x: heads_first}}) for x in ("q_nope", "q_pe")},
    **{f"rows of {x}": ({}, {"change": {x: padded}}) for x in ("q_nope", "q_pe", "latent_cache")},
    **{f"pages of {x}": (TWO_CACHES, {"change": {x: pages_apart}}) for x in ("latent_cache", "rope_cache")},
    "pages of an fp8 cache": ({"is_fp8": True}, {"change": {"latent_cache": pages_apart}}),
    **{f"start of {x}": (TWO_CACHES, {"change": {x: unaligned}}) for x in ("latent_cache", "rope_cache")},
    "two caches": ({}, TWO_CACHES),
    "two caches of one row": ({}, TWO_CACHES | {"change": dict.fromkeys(("latent_cache", "rope_cache"), in_one_row)}),
    "packed": ({}, {"packed": 1}),
    "max_seqlen_q": ({"packed": 1}, {"packed": 2}),
    "sequences of packed queries": ({"packed": 2, "seqlen_q": 3}, {"batch": 3, "seqlen_q": 2}),
    "causal": ({}, {"causal": False}),
    "softmax_scale": ({}, {"softmax_scale": 0.5}),
    "splits": ({}, {"num_splits": 3}),
    "one split": ({}, {"num_splits": 1}),
    "batch-invariant": ({}, {"batch_invariant": True}),
    "batch-invariant, with weights": (WITH_WEIGHTS, {"batch_invariant": True}),
    "projection": (WITH_WEIGHTS | {"table_width": 2}, {"change": {"w_uv": lambda x: None}}),
    "SMs": ({}, {"inside": few_sms}),
    "architecture": ({"inside": few_sms}, {"arch": "sm_80"}),
    "fp32": ({"num_splits": 1}, FP32),
    "precision of fp32": (FP32, {"inside": lambda: matmul_precision("high")}),
    "config": ({}, {"inside": lambda: override_config("mla", block_n=32)}),
    "lse": (WITH_WEIGHTS, {"return_lse": True}),
    "weights": ({}, WITH_WEIGHTS),
    "qk_nope_head_dim": (WITH_WEIGHTS, {"weights": (64, 128)}),
    "v_head_dim": (WITH_WEIGHTS, {"weights": (128, 64)}),
    **{f"rows of {x}": (WITH_WEIGHTS, {"change": {x: padded}}) for x in ("w_uk", "w_uv")},
    **{f"strides of {x} to absorb": (WITH_WEIGHTS, {"change": {x: padded}}) for x in ("q_nope", "q_pe")},
    "dtype of weights": (WITH_WEIGHTS | {"num_splits": 1}, FP32),
    "precision of fp32 weights": (WITH_WEIGHTS | FP32, {"inside": lambda: matmul_precision("high")}),
    "rope": (WITH_WEIGHTS, {"rotary_dim": 64}),
    "rotary_dim": (WITH_WEIGHTS | {"rotary_dim": 64}, {"rotary_dim": 32}),
    "interleaved": (WITH_WEIGHTS | {"rotary_dim": 64}, {"rope_interleaved": True}),
    "splits with weights": (WITH_WEIGHTS, {"num_splits": 3}),
    "kernel": ({"num_heads": 64, "inside": lambda: kernels("portable")}, HOPPER),
    "kernel, causal": (HOPPER, {"causal": False}),
    "kernel, splits": (HOPPER, {"num_splits": 3}),
    "kernel, SMs": (HOPPER, {"num_splits": 0, "table_width": 64}),
    "kernel, packed": (HOPPER | {"batch": 1}, {"packed": 1}),
    "kernel, two caches": (HOPPER, TWO_CACHES),
    **{f"kernel, start of {x}": (HOPPER, {"change": {x: unaligned}}) for x in ("q_nope", "q_pe", "latent_cache")},
}
PACKED = {"packed": (2, 256, 256)}
ABSORBED = {"mode": "absorbed"}
MATERIALIZED = {"mode": "materialized"}
IN_CHUNKS = MATERIALIZED | {"max_workspace_bytes": 400_000}
PREFILL = {
    "dtype": ({}, {"dtype": torch.float16}),
    "fp32": ({}, FP32),
    "batch": ({}, {"rows": (3, 256), "rows_k": (3, 256)}),
    "seqlen_q": ({}, {"rows": (2, 250)}),
    "seqlen_k": ({}, {"rows_k": (2, 300)}),
    "heads": ({}, {"num_heads": 2}),
    "qk_nope_head_dim": ({}, {"head_dims": (48, 32, 48)}),
    "qk_rope_head_dim": ({}, {"head_dims": (64, 16, 48)}),
    "v_head_dim": ({}, {"head_dims": (64, 32, 64)}),
    "kv_lora_rank": ({}, {"rank": 256}),
    **{f"strides of {x}": ({}, {"change": {x: heads_first}}) for x in ("q_nope", "q_pe")},
    **{f"rows of {x}": ({}, {"change": {x: padded}}) for x in ("q_nope", "q_pe", "kv_latent", "k_pe", "w_uk", "w_uv")},
    **{f"sequences of {x}": ({}, {"change": {x: pages_apart}}) for x in ("kv_latent", "k_pe")},
    "causal": ({}, {"causal": False}),
    "softmax_scale": ({}, {"softmax_scale": 0.5}),
    "packed": ({}, PACKED),
    "sequences": (PACKED, {"packed": (3, 256, 256)}),
    "max_seqlen_q": (PACKED, {"packed": (2, 512, 256)}),
    "max_seqlen_k": (PACKED | MATERIALIZED, {"packed": (2, 256, 2**24)}),
    "precision of fp32": (FP32, {"inside": lambda: matmul_precision("high")}),
    "architecture": ({}, {"arch": "sm_80"}),
    "config": ({}, {"inside": lambda: override_config("mla_prefill", block_m=64)}),
    "lse": ({}, {"return_lse": True}),
    "materialized": ({}, MATERIALIZED),
    "chunks of keys": (MATERIALIZED, {"max_workspace_bytes": 200_000}),
    "chunks of heads": (MATERIALIZED, IN_CHUNKS),
    "absorbed": ({}, ABSORBED),
    "absorbed, seqlen_k": (ABSORBED, {"rows_k": (2, 300)}),
    "absorbed, rows of k_pe": (ABSORBED, {"change": {"k_pe": padded}}),
}


@pytest.mark.parametrize("name", DECODE)
def test_a_plan_of_decode_is_not_that_of_a_neighbour(name):
    check_neighbour(functools.partial(launches_of, decode, MODULES), *DECODE[name])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_batch_invariant_tiles_do_not_follow_the_batch(arch):
    """Of attention, absorption, merge and projection; but for SEARCH, which says how a program finds its rows."""
    tiles = {}
    for batch, seqlen_q, width in itertools.product((1, 2, 300), (1, 5, 70), (1, 32, 4096)):
        for packed in (None, seqlen_q):
            options = WITH_WEIGHTS | dict(batch=batch, seqlen_q=seqlen_q, table_width=width, packed=packed)
            for kernel, _, _, constants in launches_of(decode, MODULES, arch, batch_invariant=True, **options):
                tile = constants.pop("TILE")
                if kernel == "_mla_absorbed_kernel":
                    tile = absorbed.AbsorbedTile._make(tile)._replace(SEARCH=None)
                tiles.setdefault(kernel, set()).add((tile, *constants.items()))
    assert {kernel: len(of_kernel) for kernel, of_kernel in tiles.items()} == dict.fromkeys(tiles, 1)
    assert len(tiles) == 4


@pytest.mark.parametrize("name", PREFILL)
def test_a_plan_of_prefill_is_not_that_of_a_neighbour(name):
    check_neighbour(functools.partial(launches_of, prefilled, MODULES), *PREFILL[name])
