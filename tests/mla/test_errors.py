"""Wrong arguments of the MLA functions: the error names the argument, the expected and the actual value; no
launches."""

import pytest
import torch

from triton_attn import mla_decode, mla_prefill
from triton_attn.mla.schedule import ProblemSizes, causal_pairs, choose_schedule, cost, workspace_bytes

HEADS, NOPE, ROPE, RANK, VALUE = 4, 16, 8, 128, 12


def decode_arguments():
    return dict(
        q_nope=torch.zeros(2, 1, HEADS, NOPE),
        q_pe=torch.zeros(2, 1, HEADS, ROPE),
        latent_cache=torch.zeros(4, 16, RANK + ROPE),
        cache_seqlens=torch.tensor([5, 20], dtype=torch.int32),
        block_table=torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        w_uk=torch.zeros(HEADS, NOPE, RANK),
        w_uv=torch.zeros(HEADS, VALUE, RANK),
    )


def prefill_arguments():
    return dict(
        q_nope=torch.zeros(2, 3, HEADS, NOPE),
        q_pe=torch.zeros(2, 3, HEADS, ROPE),
        kv_latent=torch.zeros(2, 5, RANK),
        k_pe=torch.zeros(2, 5, ROPE),
        w_uk=torch.zeros(HEADS, NOPE, RANK),
        w_uv=torch.zeros(HEADS, VALUE, RANK),
    )


def table(*shape):
    return torch.zeros(shape, dtype=torch.int32)


PACKED = {
    "q_nope": torch.zeros(4, HEADS, NOPE),
    "q_pe": torch.zeros(4, HEADS, ROPE),
    "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=torch.int32),
    "max_seqlen_q": 2,
}
DECODE = [
    ({"q_nope": 3}, TypeError, "q_nope: expected a tensor, got int"),
    ({"q_nope": torch.zeros(2, HEADS, NOPE)}, ValueError, "q_nope: expected shape"),
    ({"q_nope": torch.zeros(2, 1, HEADS, NOPE, dtype=torch.int32)}, TypeError, "q_nope: expected torch.float16"),
    (
        {"q_nope": torch.zeros(2, 1, HEADS, 2 * NOPE)[..., ::2]},
        ValueError,
        "q_nope: expected a contiguous last",
    ),
    ({"q_pe": torch.zeros(2, 1, HEADS + 1, ROPE)}, ValueError, "q_pe: expected shape"),
    ({"q_pe": torch.zeros(2, 1, HEADS, ROPE, dtype=torch.float16)}, TypeError, "q_pe: expected torch.float32"),
    ({"latent_cache": torch.zeros(4, 16, RANK)}, ValueError, f"latent_cache: expected shape .*{RANK + ROPE}"),
    ({"latent_cache": torch.zeros(4, 16, 1, dtype=torch.uint8)}, ValueError, "latent_cache: expected shape .*148"),
    (
        {"latent_cache": torch.zeros(4, 0, RANK + ROPE)},
        ValueError,
        "latent_cache: .* page size of 1 or more, got 0",
    ),
    ({"latent_cache": torch.zeros(4, 16, RANK + ROPE, dtype=torch.float16)}, TypeError, "latent_cache: expected"),
    ({"cache_seqlens": torch.zeros(2, dtype=torch.int64)}, TypeError, "cache_seqlens: expected torch.int32"),
    ({"cache_seqlens": table(3)}, ValueError, "cache_seqlens: expected shape"),
    ({"block_table": table(3, 2)}, ValueError, "block_table: expected shape"),
    ({"w_uk": torch.zeros(HEADS, NOPE + 1, RANK)}, ValueError, "w_uk: expected shape"),
    ({"w_uk": None}, ValueError, "w_uv: expected shape"),
    (
        {"w_uk": None, "w_uv": None, "q_nope": torch.zeros(2, 1, HEADS, RANK)},
        ValueError,
        "softmax_scale: expected a number",
    ),
    ({"w_uv": torch.zeros(HEADS, VALUE, RANK + 1)}, ValueError, "w_uv: expected shape"),
    ({"w_uv": torch.zeros(HEADS, 513, RANK)}, ValueError, "w_uv: expected dimensions of 1 to 512"),
    ({"q_pe": torch.zeros(2, 1, HEADS, 513)}, ValueError, "q_pe: expected dimensions of 0 to 512"),
    ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected a finite number"),
    ({"softmax_scale": 0}, ValueError, "softmax_scale: expected a number above 0"),
    ({"num_splits": 257}, ValueError, "num_splits: expected 0 .* to 256, got 257"),
    ({"num_splits": 1.0}, TypeError, "num_splits: expected an int"),
    ({"batch_invariant": 1}, TypeError, "batch_invariant: expected a bool"),
    ({"batch_invariant": True, "num_splits": 2}, ValueError, "num_splits: expected 0 with batch_invariant"),
    ({"max_seqlen_q": 7}, ValueError, "max_seqlen_q: expected q_nope's 1 queries without cu_seqlens_q"),
    ({"cu_seqlens_q": table(3)}, ValueError, "q_nope: expected shape .total_q"),
    (PACKED | {"cu_seqlens_q": table(4)}, ValueError, r"cu_seqlens_q: expected shape .3,., one more"),
    (PACKED | {"max_seqlen_q": None}, TypeError, "max_seqlen_q: expected an int, required with cu_seqlens_q"),
    (PACKED | {"max_seqlen_q": 1}, ValueError, "cu_seqlens_q, sequence 1: expected a length of 0 to 1"),
    (
        PACKED | {"rope_cos": torch.zeros(33, 2), "rope_sin": torch.zeros(33, 2)},
        NotImplementedError,
        "rope_cos: not supported with cu_seqlens_q",
    ),
    ({"rope_cache": torch.zeros(4, 16, ROPE)}, ValueError, f"latent_cache: expected shape .*{RANK}"),
    (
        {"latent_cache": torch.zeros(4, 16, RANK).to(torch.float8_e4m3fn), "rope_cache": torch.zeros(4, 16, ROPE)},
        TypeError,
        "rope_cache: expected torch.float8_e4m3fn, got torch.float32",
    ),
    ({"k_scale": 0.0}, ValueError, "k_scale: expected a number above 0"),
    ({"k_scale": torch.ones(2)}, ValueError, r"k_scale: expected shape \(1,\), got shape \(2,\)"),
    ({"k_pe_scale": torch.ones(1).half()}, TypeError, "k_pe_scale: expected torch.float32"),
    (
        {"latent_cache": torch.zeros(4, 16, 148, dtype=torch.uint8), "k_scale": 2.0},
        ValueError,
        "k_scale: expected None with a uint8 cache",
    ),
    (
        {"latent_cache": torch.zeros(4, 16, 148, dtype=torch.uint8), "k_pe_scale": torch.ones(1)},
        ValueError,
        "k_pe_scale: expected None with a uint8 cache",
    ),
    (
        {"latent_cache": torch.zeros(4, 16, RANK), "rope_cache": torch.zeros(4, 16, ROPE + 1)},
        ValueError,
        "rope_cache: expected shape",
    ),
    (
        {"q_pe": torch.zeros(2, 1, HEADS, 0), "latent_cache": torch.zeros(4, 16, 1, dtype=torch.uint8)},
        ValueError,
        "q_pe: expected 1 or more columns with a uint8 cache",
    ),
    ({"rope_cos": torch.zeros(9, 2)}, TypeError, "rope_cos, rope_sin: expected both or none"),
    ({"rope_cos": torch.zeros(9, 5), "rope_sin": torch.zeros(9, 5)}, ValueError, "rope_cos: expected 1 to 4 columns"),
    (
        {"rope_cos": torch.zeros(9, 2), "rope_sin": torch.zeros(9, 2), "w_uk": None, "w_uv": None, "softmax_scale": 1.0}
        | {"q_nope": torch.zeros(2, 1, HEADS, RANK)},
        ValueError,
        "rope_cos: expected None without w_uk",
    ),
    ({"q_nope": torch.zeros(2, 1, HEADS, NOPE, requires_grad=True)}, NotImplementedError, "q_nope: gradients"),
    (
        {"cache_seqlens": torch.tensor([5, 33], dtype=torch.int32)},
        ValueError,
        r"cache_seqlens\[1\]: expected 0 to",
    ),
    (
        {"cache_seqlens": torch.tensor([-1, 3], dtype=torch.int32)},
        ValueError,
        r"cache_seqlens\[0\]: expected 0 to",
    ),
    ({"block_table": torch.tensor([[0, 9], [2, 4]], dtype=torch.int32)}, ValueError, r"block_table\[1, 1\]: .* got 4"),
    (
        {"rope_cos": torch.zeros(9, 2), "rope_sin": torch.zeros(9, 2)},
        ValueError,
        r"cache_seqlens\[1\]: expected at most the 9 positions",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), DECODE, ids=range(len(DECODE)))
def test_decode(changes, error, message):
    arguments = decode_arguments() | {"check_values": True} | changes
    with pytest.raises(error, match=message):
        mla_decode(**arguments)


PREFILL = [
    ({"q_nope": torch.zeros(2, HEADS, NOPE)}, ValueError, "q_nope: expected shape"),
    ({"q_pe": torch.zeros(2, 4, HEADS, ROPE)}, ValueError, "q_pe: expected shape"),
    ({"kv_latent": torch.zeros(3, 5, RANK)}, ValueError, "kv_latent: expected shape"),
    ({"kv_latent": torch.zeros(2, 5, RANK, dtype=torch.float16)}, TypeError, "kv_latent: expected torch.float32"),
    ({"k_pe": torch.zeros(2, 5, ROPE + 1)}, ValueError, "k_pe: expected shape"),
    ({"w_uk": torch.zeros(HEADS, NOPE, RANK - 1)}, ValueError, "w_uk: expected shape"),
    ({"w_uv": torch.zeros(HEADS, 0, RANK)}, ValueError, "w_uv: expected dimensions of 1 to 512"),
    ({"w_uv": torch.zeros(HEADS, RANK, VALUE).mT}, ValueError, "w_uv: expected a contiguous last dimension"),
    ({"causal": None}, TypeError, "causal: expected a bool"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number"),
    ({"softmax_scale": -0.1}, ValueError, "softmax_scale: expected a number above 0"),
    ({"mode": "quick"}, ValueError, "mode: expected auto, fused, absorbed, materialized, got 'quick'"),
    ({"max_workspace_bytes": 1e9}, TypeError, "max_workspace_bytes: expected an int, got float"),
    (
        {"mode": "materialized", "max_workspace_bytes": 100},
        ValueError,
        "max_workspace_bytes: .* 1120 bytes",
    ),
    ({"mode": "absorbed", "max_workspace_bytes": 100}, ValueError, "max_workspace_bytes: expected room for"),
    ({"cu_seqlens_q": table(3)}, TypeError, "cu_seqlens_q, cu_seqlens_k: expected both or none"),
    ({"max_seqlen_q": 4}, ValueError, "max_seqlen_q: expected 3 without cu_seqlens"),
    ({"cu_seqlens_q": table(3), "cu_seqlens_k": table(3)}, ValueError, "q_nope: expected shape"),
]
PACKED = {name: x.flatten(0, 1) for name, x in list(prefill_arguments().items())[:4]}
PACKED |= {
    "cu_seqlens_q": table(3),
    "cu_seqlens_k": table(3),
    "max_seqlen_q": 3,
    "max_seqlen_k": 5,
    "check_values": True,
}
PREFILL += [
    (PACKED | {"max_seqlen_k": None}, TypeError, "max_seqlen_k: expected an int"),
    (PACKED | {"cu_seqlens_k": table(4)}, ValueError, "cu_seqlens_k: expected cu_seqlens_q's shape"),
    (PACKED | {"cu_seqlens_q": table(3).long()}, TypeError, "cu_seqlens_q: expected dtype torch.int32"),
    (PACKED | {"cu_seqlens_q": torch.tensor([0, 4, 4], dtype=torch.int32)}, ValueError, "cu_seqlens_q, sequence 0"),
]


@pytest.mark.parametrize(("changes", "error", "message"), PREFILL, ids=range(len(PREFILL)))
def test_prefill(changes, error, message):
    with pytest.raises(error, match=message):
        mla_prefill(**prefill_arguments() | changes)


DEEPSEEK_V3 = dict(num_heads=128, nope=128, rope=64, v=128, rank=512, element_size=2)


def sizes(num_queries, num_keys):
    return ProblemSizes(num_queries, num_keys, causal_pairs(num_queries, num_keys, True), **DEEPSEEK_V3)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "mode"),
    [
        (1, 8192, "absorbed"),
        (16, 8192, "absorbed"),
        (4096, 4096, "materialized"),
        (1024, 65536, "materialized"),
        (64, 64, "fused"),
    ],
)
def test_auto_takes_the_cheapest(num_queries, num_keys, mode):
    problem = sizes(num_queries, num_keys)
    chosen = choose_schedule(problem, "auto", 2**28, wants_grad=False)
    assert chosen.mode == mode
    assert cost(problem, mode) == min(cost(problem, m) for m in ("fused", "absorbed", "materialized"))
    assert workspace_bytes(problem, mode) * chosen.heads_each <= 2**28
    assert choose_schedule(problem, "auto", 2**28, wants_grad=True).mode != "absorbed"


def test_without_room_auto_needs_none():
    assert choose_schedule(sizes(4096, 4096), "auto", 0, wants_grad=False).mode == "fused"


def test_the_costs_are_those_of_the_docstring():
    problem = sizes(100, 1000)
    pairs = 100 * 900 + 100 * 101 / 2
    assert problem.pairs == pairs
    assert cost(problem, "materialized") == 2 * 320 * pairs + (2 * 512 * 256 + 2 * 256 * 300 * 2) * 1000
    assert cost(problem, "fused") == 2 * 320 * pairs + 2 * 512 * 256 * pairs / 128
    assert cost(problem, "absorbed") == 2 * (1024 + 64) * pairs + (2 * 512 * 256 + (2048 + 128) * 600) * 100
