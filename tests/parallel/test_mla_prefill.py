"""MLA over 2 and 4 processes gives what one process gives: out, lse and the gradients of all six inputs."""

import re
from dataclasses import replace

import mla_over_ranks
import pytest
import torch
from mla_over_ranks import Case
from parallel_ranks import run

from triton_attn.parallel import context_parallel_mla_prefill


def readable(num_ranks):
    yield from (Case(), Case(causal=False), Case(load_balance=None, batch=2), Case(seqlen=num_ranks - 1))


def more(num_ranks):
    for seqlen in (0, 1, 2 * num_ranks + 1):
        yield Case(seqlen=seqlen, dlse=False)
        yield Case(seqlen=seqlen, load_balance=None, causal=False)
    for dtype in (torch.float16, torch.bfloat16):
        yield Case(dtype=dtype, batch=2, seqlen=64, nope=32, rope=16, v_dim=32)
    yield from (Case(mode=mode) for mode in ("fused", "materialized"))


@pytest.mark.parametrize(
    ("num_ranks", "cases", "backend"),
    [
        pytest.param(2, readable, "triton", id="2 ranks"),
        pytest.param(4, readable, "reference", id="4 ranks by reference"),
        pytest.param(2, more, "triton", id="2 ranks, more", marks=pytest.mark.ci),
        pytest.param(3, more, "reference", id="3 ranks by reference, more", marks=pytest.mark.ci),
        pytest.param(4, readable, "triton", id="4 ranks", marks=pytest.mark.ci),
    ],
)
def test_what_one_process_gives(num_ranks, cases, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    assert run(mla_over_ranks.check_values, list(cases(num_ranks)), num_ranks, tmp_path / "store") == []


def test_bytes_that_ranks_receive(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    given = [Case(dtype=torch.bfloat16, batch=2), Case(load_balance=None, causal=False)]
    assert run(mla_over_ranks.check_bytes, given, 4, tmp_path / "store") == []


@pytest.mark.parametrize(
    ("rank_1", "said"),
    [
        (dict(causal=False), "causal: expected the same on all ranks, True as on rank 0, got False on rank 1"),
        (dict(rank=24), r"kv_latent: expected the same on all ranks, \(\(1, 32\), torch.float32\) as on rank 0, got"),
    ],
    ids=["causal", "rank"],
)
@pytest.mark.ci(but_each=2)
def test_ranks_that_differ_are_named_on_every_rank(rank_1, said, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    cases = Case(seqlen=8), replace(Case(seqlen=8), **rank_1)
    (_, _, first), (_, _, second) = run(mla_over_ranks.check_difference, [cases], 2, tmp_path / "store")
    assert re.search(said, first), first
    assert re.search(said, second), second


def test_one_rank(mesh):
    for case in readable(1):
        mla_over_ranks.check_values(case, mesh)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(mesh="cp"), TypeError, "mesh: expected a DeviceMesh, got str"),
        (dict(load_balance="zigzag"), ValueError, "load_balance: expected 'head_tail' or None, got 'zigzag'"),
        (
            dict(seqlen=9),
            ValueError,
            "seqlen: expected the length of a sequence of which rank 0 of 1 has 6",
        ),
        (dict(mode="tree"), ValueError, "mode: expected auto"),
        (dict(mode="absorbed"), NotImplementedError, "mode: 'absorbed' does not support gradients"),
        (dict(keys=5), ValueError, "kv_latent: expected q_nope's 6 rows, got 5"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(mesh, arguments, error, said):
    inputs = mla_over_ranks.Inputs(Case(seqlen=6))
    tensors = [x.requires_grad_() for x in (*inputs.rows, *inputs.weights)]
    num_keys = arguments.pop("keys", 6)
    tensors[2:4] = [x[:, :num_keys] for x in tensors[2:4]]
    with pytest.raises(error, match=said):
        context_parallel_mla_prefill(*tensors, **(dict(mesh=mesh) | arguments))
