"""MLA over 2, 3 and 4 processes gives what one process gives: out, lse and the gradients of all six inputs."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from mla_over_ranks import Case, check_fsdp
from parallel_ranks import (
    check_bytes,
    check_bytes_of_model,
    check_calls,
    check_difference,
    check_difference_later,
    check_refusal,
    check_training,
    check_values,
    run,
)

from triton_attn.parallel import context_parallel_mla_prefill

METHODS = ("all_gather", "ring")
OF_NODES = (("all_gather", "ulysses"), ("ring", "ulysses"))
FULL_MASK = dict(causal=False)
PACKED = [
    Case(documents=(17, 0, 3, 1, 30), rows_of_none=4, load_balance="per_document"),
    Case(documents=(5, 40, 2), rows_of_none=9, options=FULL_MASK),
    Case(documents=(23, 19, 1), load_balance=None),
    Case(documents=(3, 5, 0, 7, 1) * 4, load_balance="per_document", rows_of_none=1, options=FULL_MASK),
    Case(documents=(7, 31, 2, 9), rows_of_none=3),
]


def readable(num_ranks):
    """Each method with each load balance and mask, dense and packed."""
    for method in METHODS:
        yield from (replace(case, method=method) for case in PACKED)
        yield from (Case(method=method, seqlen=37), Case(method=method, seqlen=37, options=FULL_MASK))
        yield Case(method=method, seqlen=33, batch=2, load_balance=None, dlse=False)
    yield Case(method="auto", seqlen=num_ranks - 1)


def with_exchange(num_ranks):
    """Ranks exchange rows for heads, all of them, or those of each node on a mesh of two dimensions."""
    placings = [dict(method="ulysses", inner=None)]
    placings += [dict(method=method, inner=inner) for method in OF_NODES for inner in (2, num_ranks) if num_ranks > 2]
    for placing in placings:
        heads = dict(placing, num_heads_q=2 * num_ranks)
        yield from (replace(case, **heads) for case in PACKED)
        yield from (Case(seqlen=37, **heads), Case(seqlen=37, options=FULL_MASK, batch=2, **heads))
        yield Case(seqlen=num_ranks - 1, load_balance=None, dlse=False, **heads)
        yield Case(seqlen=40, dtype=torch.bfloat16, head_dim=32, rope=16, head_dim_v=32, **heads)
        yield Case(seqlen=0, documents=(0, 0), **heads)


def more(num_ranks):
    """Lengths at the edge, 16 bits, schedules."""
    for method, seqlen in itertools.product(METHODS, (0, 1, num_ranks - 1, 2 * num_ranks + 1)):
        yield Case(method=method, seqlen=seqlen, dlse=False)
        yield Case(method=method, seqlen=seqlen, load_balance=None, options=FULL_MASK)
        yield Case(method=method, documents=(seqlen, 0), rows_of_none=2, load_balance="per_document")
    dims = dict(head_dim=32, rope=16, head_dim_v=32)
    for method, dtype in itertools.product((*METHODS, "auto"), (torch.float16, torch.bfloat16)):
        yield Case(method=method, dtype=dtype, batch=2, seqlen=64, **dims)
        yield Case(method=method, dtype=dtype, documents=(40, 1, 55), load_balance="per_document", **dims)
    for method, mode in itertools.product(METHODS, ("fused", "materialized")):
        yield Case(method=method, options=dict(mode=mode))
    # A head at a time, and parts of its keys:
    yield Case(method="ring", seqlen=700, options=dict(mode="materialized", max_workspace_bytes=2**16))


@pytest.mark.parametrize(
    ("num_ranks", "cases", "backend"),
    [
        pytest.param(2, readable, "triton", id="2 ranks"),
        pytest.param(4, readable, "reference", id="4 ranks by reference"),
        pytest.param(2, with_exchange, "triton", id="2 ranks, exchange", marks=pytest.mark.ci),
        pytest.param(4, with_exchange, "reference", id="4 ranks by reference, exchange"),
        pytest.param(4, with_exchange, "triton", id="4 ranks, exchange", marks=pytest.mark.full),
        pytest.param(2, more, "triton", id="2 ranks, more", marks=pytest.mark.ci),
        pytest.param(3, more, "reference", id="3 ranks by reference, more", marks=pytest.mark.ci),
        pytest.param(4, readable, "triton", id="4 ranks", marks=pytest.mark.ci),
    ],
)
def test_what_one_process_gives(num_ranks, cases, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    assert run(check_values, list(cases(num_ranks)), num_ranks, tmp_path / "store") == []


def test_bytes_that_ranks_receive(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    shape = dict(batch=2, seqlen=64, dtype=torch.bfloat16, options=FULL_MASK)
    placings = itertools.product(METHODS, ("head_tail", None))
    given = [Case(method=method, load_balance=balance, **shape) for method, balance in placings]
    given += [Case(method="ulysses", num_heads_q=8, **shape)]
    given += [Case(method=method, inner=2, num_heads_q=8, **shape) for method in OF_NODES]
    assert run(check_bytes, given, 4, tmp_path / "store") == []
    given += [replace(case, options=dict(causal=True)) for case in given if case.load_balance]
    assert run(check_bytes_of_model, given, 4, tmp_path / "another store") == []


def test_calls_of_the_ring(tmp_path, monkeypatch):
    """Keys and values of one block at a time, for all queries that see some of them."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    cases = [
        Case(method="ring"),
        Case(method="ring", batch=3, options=FULL_MASK),
        Case(method="ring", documents=(40, 33, 1, 50), load_balance="per_document"),
    ]
    assert run(check_calls, cases, 4, tmp_path / "store") == []


def test_compiled_recomputed_and_accumulated(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    cases = [Case(method=method, batch=2, seqlen=37) for method in ("auto", *METHODS)]
    cases += [replace(PACKED[0], method=method) for method in ("auto", *METHODS)]
    cases += [replace(case, method="ulysses", num_heads_q=4) for case in (cases[0], PACKED[0])]
    assert run(check_training, cases, 2, tmp_path / "store") == []


@pytest.mark.ci
def test_compiled_recomputed_and_accumulated_over_nodes(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    nodes = dict(inner=2, num_heads_q=4)
    cases = [Case(method=method, batch=2, seqlen=37, **nodes) for method in ("auto", *OF_NODES)]
    cases += [replace(PACKED[0], method=method, **nodes) for method in OF_NODES]
    assert run(check_training, cases, 4, tmp_path / "store") == []


def test_beside_fsdp(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    assert run(check_fsdp, [Case(method=method) for method in METHODS], 4, tmp_path / "store") == []


@pytest.mark.parametrize(
    ("rank_1", "said"),
    [
        (dict(options=FULL_MASK), "causal: expected the same on all ranks, True as on rank 0, got False on rank 1"),
        (dict(rank=24), r"kv_latent: expected the same on all ranks, \(\(32,\), torch.float32\) as on rank 0, got"),
        (dict(method="ring"), "method: expected the same on all ranks, all_gather as on rank 0, got ring on rank 1"),
        (dict(options=dict(mode="fused")), "mode: expected the same on all ranks, auto as on rank 0, got fused"),
        (dict(documents=(20, 30)), "batch: expected the same on all ranks, 1 as on rank 0, got None on rank 1"),
        # What one rank refuses:
        (dict(method="ulysses"), "q_nope: expected query heads in multiples of 2 ranks for 'ulysses', got 3"),
        (dict(method="tree"), "method: expected 'auto' or 'all_gather' or 'ring' or 'ulysses', got 'tree'"),
        (dict(options=dict(mode="none")), "mode: expected auto, .*, got 'none'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.ci(but_each=4)
def test_ranks_that_differ_are_named_on_every_rank(rank_1, said, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    case = Case(load_balance=None)
    (_, _, first), (_, _, second) = run(check_difference, [(case, replace(case, **rank_1))], 2, tmp_path / "store")
    assert re.search(said, first), first
    assert re.search(said, second), second


@pytest.mark.ci
def test_all_of_a_call_is_compared_first_where_values_are_checked(tmp_path, monkeypatch):
    """Also where no transfer is waited for, and the difference would come one call late."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    case = Case(method="ring", documents=(20, 31))
    cases = [(case, replace(case, options=dict(softmax_scale=0.3)))]
    found = run(check_difference_later, cases, 2, tmp_path / "store")
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    found += run(check_difference, cases, 2, tmp_path / "another store")
    assert len(found) == 4
    for *_, said in found:
        assert re.search("softmax_scale: expected the same on all ranks, 0.2.* as on rank 0, got 0.3 on rank 1", said)
    # Other weights, compared by a digest and element by element:
    cases = [(case, replace(case, seed=1)) for case in (Case(rank=256), Case(num_heads_q=1, head_dim=4))]
    found = run(check_difference, cases, 2, tmp_path / "third store")
    starts = [f"w_uk: expected the same on all ranks, {values}" for values in ("values with digest", "[[")]
    assert [said.startswith(start) for (*_, said), start in zip(found, starts * 2)] == [True] * 4, found


def test_a_workspace_that_is_too_small_is_refused_before_anything_travels(tmp_path, monkeypatch):
    """By all ranks, also those whose own rows would fit: a ring that one of them leaves would wait for it."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    short = dict(mode="materialized", max_workspace_bytes=24000)
    cases = [Case(method=method, seqlen=600, load_balance=None, options=short) for method in METHODS]
    short = dict(short, max_workspace_bytes=40000)  # enough for a third of the queries
    cases.append(Case(method="ulysses", seqlen=600, load_balance=None, options=short))
    # Enough for the ranks that have a row less than the first:
    cases.append(Case(seqlen=601, load_balance=None, options=short | FULL_MASK | dict(max_workspace_bytes=26340)))
    found = run(check_refusal, cases, 3, tmp_path / "store")
    assert len(found) == 12
    for *_, said in found:
        assert said.startswith("max_workspace_bytes: expected room for a chunk of"), said


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_one_rank(mesh, method):
    for case in readable(1):
        check_values(replace(case, method=method), mesh)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(mesh="cp"), TypeError, "mesh: expected a DeviceMesh, got str"),
        (
            dict(load_balance="zigzag"),
            ValueError,
            "load_balance: expected 'head_tail', None or a load balancer of torch",
        ),
        (
            dict(seqlen=9),
            ValueError,
            "seqlen: expected the length of a sequence of which rank 0 of 1 has 6",
        ),
        (dict(mode="tree"), ValueError, "mode: expected auto"),
        (dict(mode="absorbed"), NotImplementedError, "mode: 'absorbed' does not support gradients"),
        (dict(keys=5), ValueError, "kv_latent: expected q_nope's 6 rows, got 5"),
        (dict(cu_seqlens=torch.tensor([0, 6])), ValueError, "q_nope: expected shape"),
        (dict(return_lse=1), TypeError, "return_lse: expected a bool"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(mesh, arguments, error, said):
    inputs = Case(seqlen=6).inputs()
    tensors = [x.requires_grad_() for x in (*inputs.rows, *inputs.parameters)]
    num_keys = arguments.pop("keys", 6)
    tensors[2:4] = [x[:, :num_keys] for x in tensors[2:4]]
    with pytest.raises(error, match=said):
        context_parallel_mla_prefill(*tensors, **(dict(mesh=mesh) | arguments))


@pytest.mark.parametrize("mode", ["auto", "absorbed"])
def test_absorbed_without_gradients(mesh, mode):
    """Few queries of long sequences: "auto" may take it where no gradient is wanted, and then gives the same."""
    inputs = Case(seqlen=21).inputs()
    tensors = *inputs.rows, *inputs.parameters
    expected = inputs.of_one_process()[0][0]
    for method in METHODS:
        out = context_parallel_mla_prefill(*tensors, mesh=mesh, method=method, mode=mode)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
