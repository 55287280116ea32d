"""A cache that is sharded over 2 and 4 processes is as one: out, lse, pages, and the tokens that a model generates."""

import itertools
import re
from dataclasses import replace

import pytest
import sharded_caches
import sharded_traces
import torch
from levels import LEVEL
from parallel_ranks import run, run_without_a_rank
from prefix_trees import tree_of_all
from sharded_caches import Case

from triton_attn import PagedKVCache
from triton_attn.parallel import context_parallel_mla_decode, context_parallel_paged_attention
from triton_attn.parallel.merging import check_heads

NUM_TRACES = {"quick": 4, "ci": 12, "full": 100}[LEVEL]  # of each kind, 60 operations each
ATTEND = {False: context_parallel_paged_attention, True: context_parallel_mla_decode}
MASKS = [
    dict(),
    dict(options=dict(causal=False)),
    dict(options=dict(window_size=(9, -1)), sinks=True),
    dict(options=dict(causal=False, window_size=(7, 5), softcap=2.0), alibi=True),
    dict(options=dict(num_splits=3), alibi=True, sinks=True, interleave=4),
]


def readable(num_ranks):
    """Each mask, and each way of sharing the heads."""
    yield from (Case(interleave=2, **mask) if "interleave" not in mask else Case(**mask) for mask in MASKS)
    for heads in ("scattered", "sharded"):
        yield Case(heads=heads, sinks=True, seqlens_q=(5, 0, 33, 1), packed=True)
        yield Case(heads=heads, latent=True)
        yield Case(heads=heads, latent=True, weights=False, options=dict(softmax_scale=0.2), packed=True)
    yield Case(latent=True, interleave=2, options=dict(causal=False))
    yield Case(latent=True, seqlens_q=(5, 0, 33, 1), packed=True)
    tree = dict(shared=17, seqlens_k=(40, 23, 33, 20), fork=False, page_size=2)
    for heads in sharded_caches.HEADS:
        yield from (Case(heads=heads, latent=latent, **tree) for latent in (False, True))
    for latent in (False, True):
        yield Case(latent=latent, tree="tree", seqlens_q=(9,) * 4, interleave=2, heads="sharded")
        yield Case(latent=latent, tree="any", **tree | dict(seqlens_q=(5, 0, 20, 1)), packed=True)
    yield Case(tree="tree", seqlens_q=(9,) * 4, options=dict(window_size=(6, -1)), alibi=True, sinks=True)


def more(num_ranks):
    """16 bits and fp8, one query, a page for each turn, more ranks than keys, no sequence."""
    for dtype in (torch.float16, torch.bfloat16):
        for heads in sharded_caches.HEADS:
            yield Case(dtype=dtype, heads=heads, head_dim_v=18)
            yield Case(dtype=dtype, heads=heads, latent=True)
    yield Case(dtype=torch.float16, cache_dtype=torch.float8_e5m2)
    yield Case(dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, latent=True)
    for interleave in (1, 4):
        yield Case(seqlens_q=(1, 1), seqlens_k=(1, 40), interleave=interleave, fork=False, options=dict(causal=True))
    yield Case(seqlens_q=(1,), seqlens_k=(1,), page_size=1, fork=False, sinks=True)
    yield Case(seqlens_q=(0, 0), seqlens_k=(5, 9), fork=False)
    yield Case(seqlens_q=(2,), seqlens_k=(1,), fork=False, heads="scattered")


@pytest.mark.parametrize(
    ("num_ranks", "cases", "backend"),
    [
        pytest.param(2, readable, "triton", id="2 ranks"),
        pytest.param(4, readable, "reference", id="4 ranks by reference"),
        pytest.param(2, more, "triton", id="2 ranks, more", marks=pytest.mark.ci),
        pytest.param(4, more, "reference", id="4 ranks by reference, more", marks=pytest.mark.ci),
        pytest.param(4, readable, "triton", id="4 ranks", marks=pytest.mark.ci),
    ],
)
def test_what_one_process_gives(num_ranks, cases, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    assert run(sharded_caches.check_values, list(cases(num_ranks)), num_ranks, tmp_path / "store") == []


def test_bytes_that_ranks_receive(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    shape = dict(dtype=torch.bfloat16, seqlens_q=(3, 3), seqlens_k=(20, 9), fork=False)
    given = [Case(heads=heads, head_dim_v=21, **shape) for heads in sharded_caches.HEADS]
    for case, weights in itertools.product(given[:], (True, False)):
        given.append(replace(case, latent=True, weights=weights, options=dict(softmax_scale=0.1)))
    assert run(sharded_caches.check_bytes, given, 4, tmp_path / "store") == []


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.ci)])
def test_random_operations(num_ranks, tmp_path):
    traces = [(kind, range(NUM_TRACES)) for kind in ("heads", "token scales", "latent")]
    assert run(sharded_traces.check_traces, traces, num_ranks, tmp_path / "store") == []


@pytest.mark.parametrize("backend", ["reference", pytest.param("auto", marks=pytest.mark.full)])
@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.ci), 4])
def test_ranks_generate_the_tokens_of_one(num_ranks, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    assert run(sharded_caches.check_generation, [False, True], num_ranks, tmp_path / "store") == []


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.ci)])
def test_accepted_drafts_move_between_ranks(num_ranks, tmp_path):
    cases = [(seed, kind) for seed in range(8) for kind in ("heads", "latent", "windows")]
    assert run(sharded_caches.check_keep, cases, num_ranks, tmp_path / "store") == []


def test_a_keep_that_one_rank_refuses_changes_nothing(tmp_path):
    found = run(sharded_caches.check_refused_keep, [([0, 2], [0, 4]), ([0, 2], [1, 2])], 2, tmp_path / "store")
    refused = "accepted: expected different indices of 0 to 3, got [0, 4]"
    differ = r"accepted: expected the same on all ranks, \[\(5, \[0, 2\]\)\] as on rank 0, got .* on rank 1; same: True"
    texts = {(rank, case): text for rank, case, text in ((who, str(case), text) for who, case, text in found)}
    assert len(texts) == 4, found
    for (rank, case), text in texts.items():
        expected = differ if "[1, 2]" in case else f"{re.escape(refused)}.*; same: True"
        assert re.search(expected, text), text
        assert ("keep: expected a call that no rank refuses" in text) == (rank == 0 and "[0, 4]" in case)


def test_a_keep_that_failed_on_one_rank_is_found_by_the_next(tmp_path):
    found = run(sharded_caches.check_failed_keep, [2], 2, tmp_path / "store")
    differ = "accepted: expected the same on all ranks, [(6, [0])] as on rank 0, got [(8, [0])] on rank 1; same: True"
    assert len(found) == 2, found
    assert all(differ in text for _, _, text in found), found


def test_a_rank_that_dies_in_keep_leaves_the_cache_of_another_unchanged(tmp_path):
    found = run_without_a_rank(sharded_caches.keep_without_the_last, 2, tmp_path)
    assert found[0] is not None, "no end"
    assert re.search("(?i)^RuntimeError.*(connection|timed out|timeout)", found[0]), found[0]


def test_all_ranks_run_out_of_pages_together(tmp_path):
    assert run(sharded_caches.check_out_of_pages, [(6, 9), (9, 6), (3, 3)], 2, tmp_path / "store") == []


@pytest.mark.parametrize(
    ("check", "rank_1", "said"),
    [
        (sharded_caches.check_difference, dict(heads="scattered"), "heads: expected the same on all ranks, replicated"),
        (sharded_caches.check_difference, dict(sinks=True), "sinks: expected the same on all ranks, None as on rank 0"),
        (sharded_caches.check_difference, dict(table=True), r"cache_seqlens: expected the same on all ranks, \[50, 3,"),
        (sharded_caches.check_cache_difference, dict(head_dim=9), "head_dim: expected the same on all ranks, 8 as on"),
        (sharded_caches.check_cache_difference, dict(interleave=2), "interleave: expected the same on all ranks, 1 as"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.ci(but_each=5)
def test_ranks_that_differ_are_named_on_every_rank(check, rank_1, said, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    (_, _, first), (_, _, second) = run(check, [({}, rank_1)], 2, tmp_path / "store")
    assert re.search(said, first), first
    assert re.search(said, second), second


DIFFERENCES = [
    (dict(heads="scattered"), "heads: expected the same on all ranks, replicated"),
    (dict(heads="sharded"), "(q|heads): expected the same on all ranks"),
    (dict(sinks=True), "sinks: expected the same on all ranks, None as on rank 0"),
    (dict(options=dict(softcap=2.0)), "softcap: expected the same on all ranks, 0.0 as on rank 0, got 2.0 on rank 1"),
    (
        dict(seqlens_q=(1, 1, 1, 1)),
        r"q: expected the same on all ranks, \(\(4, 3, 8, 16\), torch.float32\) as on rank 0",
    ),
    (dict(given=dict(interleave=2)), "interleave: expected the same on all ranks, 1 as on rank 0, got 2 on rank 1"),
    (dict(latent=True, options=dict(causal=False)), "causal: expected the same on all ranks, True as on rank 0"),
    (dict(given=dict(heads="own")), "heads: expected 'replicated' or 'scattered' or 'sharded', got 'own'"),
]


def test_a_digest_tells_every_rank_in_what_ranks_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    changes = [({name: x for name, x in rank_1.items() if name == "latent"}, rank_1) for rank_1, _ in DIFFERENCES]
    found = run(sharded_caches.check_difference, changes, 2, tmp_path / "store")
    for rank in (0, 1):
        of_rank = [text for who, _, text in found if who == rank]
        assert len(of_rank) == len(DIFFERENCES), of_rank
        for (_, said), text in zip(DIFFERENCES, of_rank):
            assert re.match(said, text), text


def test_on_gpus_the_next_step_names_the_difference(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    changes = [({}, dict(options=dict(softcap=2.0)))]
    found = [said for _, _, said in run(sharded_caches.check_difference_later, changes, 2, tmp_path / "store")]
    assert len(found) == 2
    assert all(said.startswith("softcap: expected the same on all ranks, 0.0 as on rank 0") for said in found), found


def test_one_rank(mesh):
    for case in (Case(sinks=True, alibi=True, heads="sharded"), Case(latent=True, heads="sharded")):
        sharded_caches.check_values(case, mesh)
    cache, _ = sharded_caches.Step(Case()).fill(mesh)
    assert cache.key_shard is None


@pytest.mark.parametrize("latent", [False, True])
def test_one_graph(mesh, latent):
    step = sharded_caches.Step(Case(latent=latent, heads="sharded"))
    cache, seqs = step.fill(mesh)
    expected = step.attend(mesh, cache, seqs)
    operands, attend = step.operands(cache, seqs), ATTEND[latent]
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(compiled(*operands, mesh=mesh, heads="sharded", return_lse=True), expected):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(heads="own"), "heads: expected 'replicated' or 'scattered' or 'sharded', got 'own'"),
        (dict(mesh="dcp"), "mesh: expected a DeviceMesh, got str"),
        (dict(interleave=3), "key_shard: expected an interleave that divides the 4 keys of a page, got 3"),
        (
            dict(q=torch.zeros(3, 16)),
            r"q: expected a tensor \(batch, seqlen_q, .*, got shape \(3, 16\)",
        ),
        (dict(sinks=torch.zeros(3)), "sinks: expected shape"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(mesh, arguments, said):
    step = sharded_caches.Step(Case())
    names = "q", "k_cache", "v_cache", "cache_seqlens", "block_table"
    given = dict(zip(names, step.operands(*step.fill(mesh)))) | dict(mesh=mesh)
    with pytest.raises((TypeError, ValueError), match=said):
        context_parallel_paged_attention(**(given | arguments))


@pytest.mark.parametrize("latent", [False, True])
def test_a_prefix_tree_of_another_batch(mesh, latent):
    step = sharded_caches.Step(Case(latent=latent))
    with pytest.raises(ValueError, match="prefix_tree: expected a tree of 4 sequences, as cache_seqlens, got 3"):
        step.attend(mesh, *step.fill(mesh), prefix_tree=tree_of_all(3, 1))


def test_heads_that_ranks_cannot_share():
    with pytest.raises(ValueError, match="q: expected heads in multiples of 4 ranks with heads='scattered', got 6"):
        check_heads("scattered", 6, 4)
    check_heads("replicated", 6, 4)


def test_rotation_of_sharded_heads_is_refused(mesh):
    step = sharded_caches.Step(Case(latent=True, heads="sharded"))
    angles = torch.zeros(60, 4)
    with pytest.raises(NotImplementedError, match="rope_cos: not supported with heads='sharded'; rotate q_pe before"):
        step.attend(mesh, *step.fill(mesh), rope_cos=angles, rope_sin=angles)


def test_the_page_of_a_cache_without_a_mesh_has_whole_turns():
    with pytest.raises(ValueError, match="interleave: expected an interleave that divides the 16 keys"):
        PagedKVCache(4, num_layers=1, num_kv_heads=1, head_dim=8, interleave=3)
