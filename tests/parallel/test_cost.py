"""The cost model behind method="auto": its formulas against what is counted and simulated, and its decisions."""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_ranks import Case, check_bytes_of_model, run

from triton_attn.models import LLAMA_2_7B, LLAMA_3_8B, LLAMA_3_70B
from triton_attn.parallel import cost
from triton_attn.parallel.balance import Chunk, sharding_of, sharding_of_batch
from triton_attn.parallel.cost import H100, Pass, choose, costs, pairs_of, work_of
from triton_attn.parallel.local import Mask
from triton_attn.parallel.ulysses import check_heads

METHODS = ("all_gather", "ring", "ulysses")
CAUSAL, FULL = Mask(-1, 0, False, False), Mask(-1, -1, False, False)


def window(left, right=0):
    return Mask(left, right, False, False)


def sizes(model=LLAMA_3_8B, num_ranks=8, seqlen=65536, mask=CAUSAL, load_balance="head_tail", **others):
    work = work_of(sharding_of_batch(1, seqlen, num_ranks, load_balance), mask)
    dims = model.head_dim, model.head_dim_v or model.head_dim
    heads = model.num_heads_q, model.num_heads_kv
    return replace(cost.Sizes(num_ranks, min(num_ranks, 8), seqlen, *heads, *dims, 2, *work), **others)


def test_pairs_that_are_not_masked():
    sides = (-1, 0, 1, 3, 20)
    for seqlen, left, right in itertools.product((0, 1, 2, 7, 13), sides, sides):
        seen = [
            sum((left < 0 or i - left <= j) and (right < 0 or j <= i + right) for j in range(seqlen))
            for i in range(seqlen)
        ]
        for start, end in itertools.combinations_with_replacement(range(seqlen + 1), 2):
            assert pairs_of(Chunk(start, end), (left, right), seqlen) == sum(seen[start:end])


def test_work_is_that_of_the_rank_with_most():
    all_pairs, pairs, rows, keys = work_of(sharding_of_batch(1, 64, 4, "head_tail"), CAUSAL)
    assert (all_pairs, pairs, rows, keys) == (64 * 65 // 2, 64 * 65 // 8, 16, 64)
    assert work_of(sharding_of_batch(1, 64, 4, None), CAUSAL)[1] == sum(range(49, 65))
    assert work_of(sharding_of_batch(1, 64, 4, None), window(7))[3] == 16 + 7
    assert work_of(sharding_of_batch(1, 5, 4, None), FULL) == (25, 10, 2, 5)


def test_work_of_packed_documents():
    """Two documents on two ranks: the first rank has the first one, and the second the rest."""
    sharding = sharding_of((0, 3, 8), 10, 2, None)
    # Rows 0 to 4 and 5 to 9; queries of the second document see its keys alone.
    assert work_of(sharding, FULL) == (9 + 25, 9 + 10 if 9 + 10 > 15 else 15, 5, 8)
    assert work_of(sharding, CAUSAL) == (6 + 15, 12, 5, 5)


def test_bytes_are_those_that_ranks_receive(tmp_path, monkeypatch):
    """Equal without a mask. Under a causal mask no rank both sees all keys and has gradients of all its keys returned,
    so the model's backward pass is a bound.
    """
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    shape = dict(batch=2, seqlen=64, num_heads_q=8, head_dim_v=32, options={}, dtype=torch.bfloat16)
    given = [Case(method=method, num_heads_kv=heads, **shape) for method in METHODS for heads in (2, 4, 8)]
    given += [Case(method=method, seqlen=40, load_balance=None, options={}) for method in METHODS]
    given += [Case(method=method, seqlen=64) for method in METHODS]
    given += [Case(seqlen=128, options=dict(causal=True, window_size=(15, -1)))]
    over_two = [
        Case(method=(method, "ulysses"), inner=2, num_heads_kv=n, **shape) for method in METHODS[:2] for n in (1, 4)
    ]
    given += [*over_two, Case(method=("all_gather", "ulysses"), inner=2, seqlen=64)]
    assert run(check_bytes_of_model, given, 4, tmp_path / "store") == []


def test_time_of_a_ring_is_that_of_its_steps():
    """Simulated step by step, with a link that carries one block after the other."""
    for ranks, seqlen, model in itertools.product((1, 2, 3, 16, 64), (4096, 2**20), (LLAMA_3_8B, LLAMA_2_7B)):
        for cluster in (H100, H100._replace(node_bytes=1e10, network_bytes=1e9)):
            s = sizes(model, ranks, seqlen)
            link = cluster.node_bytes if ranks <= 8 else cluster.network_bytes
            elements = s.rows * 2 * model.num_heads_kv * 128
            keys, sums = (cluster.message + elements * size / link for size in (2, 4))
            queries = s.rows * model.num_heads_q * 128
            merge, add = queries * 26 / cluster.memory_bytes, (queries * 10 + elements * 26) / cluster.memory_bytes
            flops = model.num_heads_q * s.pairs / ranks * 128
            step = max(4 * flops / cluster.forward_flops + merge, 3 * cluster.launch)
            back = max(10 * flops / cluster.backward_flops + add, 3 * cluster.launch)
            found = costs(s, cluster)["ring"]
            assert found.forward.seconds == pytest.approx(simulated(ranks, step, keys, 0))
            assert found.backward.seconds == pytest.approx(simulated(ranks, back, keys, sums))


def simulated(ranks, compute, keys, sums):
    """Seconds of a rank that computes with one block while the next, and the sums of the last, are on their way."""
    now, sums_sent = 0.0, False
    for step in range(ranks):
        on_link = (keys if step + 1 < ranks else 0) + (sums if sums_sent else 0)
        now += max(compute, on_link)
        sums_sent = ranks > 1
    return now + (sums if sums_sent else 0)


@pytest.mark.parametrize(
    ("call", "method"),
    [
        (dict(seqlen=2048), "ulysses"),  # short: fewest steps
        (dict(seqlen=8192, num_ranks=64), "all_gather"),
        (dict(seqlen=2**17, mask=window(1024), num_ranks=64), "all_gather"),  # keys of neighbours alone
        (dict(seqlen=2**17), "ulysses"),  # a node with many heads
        (dict(seqlen=2**20, num_ranks=64), "ring"),  # more ranks than query heads
        (dict(model=LLAMA_2_7B, seqlen=2**20, num_ranks=64), "ring"),
        (dict(model=LLAMA_3_70B, seqlen=2**18, num_ranks=64), "ulysses"),
        (dict(model=LLAMA_2_7B, seqlen=2**20, num_heads_q=36, num_heads_kv=36), "ring"),  # 8 ranks divide no 36 heads
        (dict(num_ranks=1, seqlen=4096), "all_gather"),
        (dict(seqlen=0), "ulysses"),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x,
)
def test_decisions(call, method):
    assert choose(sizes(**call)) == method


def test_the_choice_is_the_fastest_that_fits():
    """Every call of a grid against all methods."""
    chosen = set()
    grid = itertools.product((LLAMA_2_7B, LLAMA_3_8B, LLAMA_3_70B), (1, 2, 8, 16, 64), (512, 2**14, 2**18, 2**20))
    for model, ranks, seqlen in grid:
        for mask, workspace in itertools.product((CAUSAL, FULL, window(512)), (2**28, 2**33, 2**40)):
            s, cluster = sizes(model, ranks, seqlen, mask), H100._replace(workspace=workspace)
            found = {
                name: (each.seconds, each.forward.workspace, each.backward.workspace) for name, each in costs(s).items()
            }
            choice = choose(s, cluster)
            fitting = {name for name, (_, *needs) in found.items() if max(needs) <= workspace}
            if fitting:
                assert choice in fitting
                assert found[choice][0] == min(found[name][0] for name in fitting)
            else:
                assert max(found[choice][1:]) == min(max(needs) for _, *needs in found.values())
            chosen.add(choice)
    assert chosen == set(METHODS)


def test_links_decide():
    """A ring hides its transfers, so a slower network favours it; a faster one than its sums makes it needless."""
    s = sizes(seqlen=2**18, num_ranks=64)
    assert choose(s) == "ring"
    assert choose(s, H100._replace(network_bytes=1e12)) == "all_gather"
    one, apart = sizes(num_ranks=4), sizes(num_ranks=4, ranks_per_node=1)
    for method in METHODS:
        assert costs(apart)[method].seconds > costs(one)[method].seconds
        assert costs(apart)[method].forward.bytes == costs(one)[method].forward.bytes


def test_heads_that_ulysses_takes():
    for heads_q, heads_kv, ranks in itertools.product((4, 6, 8, 12), (1, 2, 3, 4), (1, 2, 3, 4, 8)):
        s = replace(sizes(num_ranks=ranks), num_heads_q=heads_q, num_heads_kv=heads_kv)
        try:
            check_heads(heads_q, heads_kv, ranks)
            fits = True
        except ValueError:
            fits = False
        assert ("ulysses" in costs(s)) == fits


@pytest.mark.parametrize(
    ("ranks", "per_node"),
    [(range(4), 4), (range(16), 8), (range(0, 64, 8), 1), (range(12), 4), ((0, 1, 8, 9), 2)],
    ids=str,
)
def test_ranks_of_a_node(ranks, per_node):
    with mock.patch.object(dist, "get_process_group_ranks", return_value=list(ranks)):
        outer = cost.ranks_of(mock.Mock())
    assert outer == (len(ranks), per_node)
    sharding = sharding_of_batch(2, 4 * len(ranks), len(ranks), None)
    found = cost.sizes_of(cost.HeadDims(8, 8, 64, 32), torch.bfloat16, sharding, FULL, outer)
    assert (found.num_ranks, found.ranks_per_node) == outer
    assert (found.seqlen, found.rows, found.keys_seen) == (8 * len(ranks), 8, 8 * len(ranks))
    assert (found.num_heads_q, found.num_heads_kv, found.head_dim, found.head_dim_v, found.element_size) == (
        8,
        8,
        64,
        32,
        2,
    )


def test_one_rank_moves_nothing():
    for cost_of_method in costs(sizes(num_ranks=1)).values():
        assert [each.bytes for each in cost_of_method] == [0, 0]


def test_latent_vectors_travel_in_place_of_keys():
    heads = sizes(num_ranks=16, seqlen=2**16, num_heads_q=128, num_heads_kv=128, head_dim=192, head_dim_v=128)
    latent = replace(heads, latent=576, key_flops=2 * 512 * 128 * 256)
    for method in ("all_gather", "ring"):
        of_latent, of_heads = (costs(s)[method] for s in (latent, heads))
        assert isinstance(of_latent.forward, Pass)
        assert of_latent.forward.bytes * 128 * 320 == of_heads.forward.bytes * 576
        fast = H100._replace(node_bytes=1e30, network_bytes=1e30, memory_bytes=1e30)
        of_latent, of_heads = (costs(s, fast)[method].forward.seconds for s in (latent, heads))
        assert of_latent - of_heads == pytest.approx(2 * 512 * 128 * 256 * 2**16 / H100.forward_flops)


def test_ulysses_brings_all_latent_vectors_and_computes_the_keys_of_a_share_of_the_heads():
    latent = sizes(num_ranks=16, seqlen=2**16, num_heads_q=128, num_heads_kv=128, head_dim=192, head_dim_v=128)
    latent = replace(latent, latent=576, key_flops=2 * 512 * 128 * 256)
    received = costs(latent)["ulysses"].forward.bytes
    assert received == 15 / 16 * 2**16 * (8 * (192 + 128) * 2 + 8 * 4 + 576 * 2)
    fast = H100._replace(node_bytes=1e30, network_bytes=1e30, memory_bytes=1e30, message=0.0)
    saved = costs(latent, fast)["all_gather"].forward.seconds - costs(latent, fast)["ulysses"].forward.seconds
    assert saved == pytest.approx(15 / 16 * 2 * 512 * 128 * 256 * 2**16 / H100.forward_flops, rel=1e-3)
