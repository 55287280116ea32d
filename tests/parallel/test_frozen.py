"""Gradients that no tensor requires are neither computed nor sent."""

import itertools
import re
from dataclasses import replace

import mla_over_ranks
import parallel_ranks
import pytest
import torch
from backward_launches import Launches
from parallel_ranks import (
    check_bytes,
    check_difference,
    check_fakes,
    check_training,
    check_transfers,
    check_values,
    run,
)

METHODS = ("all_gather", "ring", "ulysses")
SHAPE = dict(batch=2, seqlen=64, num_heads_q=8, options=dict(causal=False))
HEADS = parallel_ranks.Case(num_heads_kv=4, **SHAPE)
LATENTS = mla_over_ranks.Case(**SHAPE)
OF_LATENTS, OF_WEIGHTS = ("dkv_latent", "dk_pe"), ("dw_uk", "dw_uv")
FROZEN = [
    (HEADS, ("dk", "dv")),
    (HEADS, ("dk",)),
    (HEADS, ("dq",)),
    (replace(HEADS, sinks=True), ("dsinks", "dv")),
    (LATENTS, OF_WEIGHTS),
    (LATENTS, OF_LATENTS),
    (LATENTS, ("dk_pe", "dw_uk")),
    (LATENTS, OF_LATENTS + OF_WEIGHTS),
    (LATENTS, ("dq_nope", "dq_pe", *OF_LATENTS)),
    (replace(HEADS, sinks=True), ("dq", "dk", "dv")),
]


def cases():
    for (case, frozen), method in itertools.product(FROZEN, METHODS):
        yield replace(case, frozen=frozen, method=method)
    for case, frozen in FROZEN[::3]:
        yield replace(case, frozen=frozen, method=("ring", "ulysses"), inner=2)


def of_no_rows():
    for (case, frozen), method in itertools.product(FROZEN[::4], METHODS):
        yield replace(case, frozen=frozen, method=method, documents=(0, 0), rows_of_none=1)


def packed():
    for case in itertools.islice(cases(), 0, None, 2):
        yield replace(case, documents=(17, 0, 3, 11), rows_of_none=2, load_balance="per_document", num_heads_q=4)


@pytest.mark.parametrize(
    ("num_ranks", "backend"),
    [
        pytest.param(4, "reference", id="4 ranks by reference"),
        pytest.param(2, "triton", id="2 ranks", marks=pytest.mark.ci),
    ],
)
def test_the_others_are_those_of_one_process(num_ranks, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    given = [case for case in packed() if num_ranks > 2 or case.inner is None]
    if num_ranks > 2:
        given += [*itertools.islice(cases(), 1, None, 2), *of_no_rows()]
    assert run(check_values, given, num_ranks, tmp_path / "store") == []


def test_bytes_that_ranks_receive(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    assert run(check_bytes, list(cases()), 4, tmp_path / "store") == []


def test_nothing_that_is_empty_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    given = [replace(case, batch=1) for case in cases() if case.inner is None]
    assert run(check_transfers, given, 2, tmp_path / "store") == []


def test_compilers_are_told_which_there_are(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    assert run(check_fakes, [*packed(), *of_no_rows()], 4, tmp_path / "store") == []


def test_compiled_recomputed_and_accumulated(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    given = [replace(case, frozen=frozen, method="ring") for case, frozen in (FROZEN[0], FROZEN[4])]
    assert run(check_training, given, 2, tmp_path / "store") == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("case", "frozen", "kernels"),
    [
        (HEADS, (), ["delta", "dkdv"]),  # one kernel for all
        (HEADS, ("dk", "dv"), ["delta", "dq"]),
        (HEADS, ("dq", "dk"), ["delta", "dkdv"]),
        (replace(HEADS, sinks=True), ("dq", "dk", "dv"), ["delta"]),
        (LATENTS, (), ["delta", "dkdv"]),
        (LATENTS, OF_WEIGHTS, ["delta", "dkdv"]),
        (LATENTS, OF_LATENTS + OF_WEIGHTS, ["delta", "dq"]),
        (LATENTS, ("dq_nope", "dq_pe", *OF_LATENTS), ["delta", "dkdv"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_kernels_of_the_others(mesh, method, case, frozen, kernels):
    inputs = replace(case, frozen=frozen, method=method, batch=1).inputs()
    outputs, leaves = inputs.attend(mesh)
    with Launches() as launches:
        inputs.gradients(outputs, leaves)
    assert launches == kernels


def test_products_of_frozen_weights_are_not_formed(mesh):
    """Of the gradients of keys and values, with the latent vectors."""
    counts = []
    for frozen in ((), OF_WEIGHTS, OF_LATENTS + OF_WEIGHTS):
        inputs = replace(LATENTS, frozen=frozen, batch=1, method="all_gather").inputs()
        outputs, leaves = inputs.attend(mesh)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            inputs.gradients(outputs, leaves)
        counts.append(sum(event.name == "aten::einsum" for event in profile.events()))
    assert counts == [4, 2, 0]


@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize(
    ("case", "names"), [(HEADS, "q, k, v"), (LATENTS, "q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv")]
)
def test_ranks_that_differ_are_named_on_every_rank(case, names, tmp_path, monkeypatch):
    """Before one of them waits for gradients that the other does not send."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    others = replace(case, frozen=case.inputs().names[3:])
    found = run(check_difference, [(case, others)], 2, tmp_path / "store")
    assert len(found) == 2
    expected = (
        f"requires_grad: expected the same on all ranks, {names} as on rank 0, got {names.split(',')[0]} on rank 1"
    )
    for *_, said in found:
        assert re.search(expected, said), said
