"""Attention over 2 and 4 processes gives what one process gives: out, lse and all gradients."""

import contextlib
import functools
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parallel_ranks import (
    BALANCERS,
    BesideFakes,
    Case,
    attend_without_the_last,
    check_bytes,
    check_calls,
    check_choice,
    check_difference,
    check_difference_later,
    check_irregular_mesh,
    check_training,
    check_values,
    run,
    run_without_a_rank,
)
from torch._library.custom_ops import CustomOpDef

from triton_attn import flash_attention, flash_attention_varlen, mla_prefill
from triton_attn.parallel import (
    context_parallel_attention,
    unshard_sequence,
    whole,
)

METHODS = ("all_gather", "ring", "ulysses")
MASKS = [
    dict(options=dict(causal=True)),
    dict(options=dict(causal=False)),
    dict(options=dict(causal=True, window_size=(9, -1)), sinks=True),
    dict(options=dict(window_size=(7, 5), softcap=2.0), alibi=True),
    dict(options=dict(causal=True, dropout_p=0.3, dropout_seed=5)),
    dict(options=dict(causal=True, window_size=(0, 0), deterministic=True), sinks=True, dlse=False),
]


def readable(num_ranks):
    """Each mask by each method, and padding, of which sinks must not see the gradients."""
    padded = [replace(PACKED[0], method=method, sinks=True) for method in METHODS]
    padded += [Case(method=method, seqlen=9, num_heads_kv=2, head_dim=264, head_dim_v=272) for method in METHODS]
    return padded + [
        Case(method=method, seqlen=37, num_heads_kv=num_ranks, **mask) for method in METHODS for mask in MASKS
    ]


PACKED = [
    Case(documents=(17, 0, 3, 1, 30), rows_of_none=4, load_balance="per_document"),
    Case(documents=(5, 40, 2), load_balance="head_tail", rows_of_none=9),
    Case(documents=(23, 19, 1), load_balance=None, sinks=True),
    Case(documents=(3, 5, 0, 7, 1) * 4, load_balance="per_document", rows_of_none=1),  # rows taken by index
]


def packed(num_ranks):
    """Each mask by each method, over packed documents."""
    for i, (method, mask) in enumerate(itertools.product(METHODS, MASKS)):
        case = replace(PACKED[i % 4], method=method, num_heads_kv=num_ranks if i % 2 else 1, **mask)
        yield replace(case, slopes_each=True)


def both(num_ranks):
    return [*readable(num_ranks), *packed(num_ranks)]


def more(num_ranks):
    """One KV head for all ranks, several sequences, lengths at the edge, 16 bits."""
    for method, mask in itertools.product(METHODS, MASKS):
        yield Case(method=method, load_balance=None, num_heads_kv=1, batch=2, seqlen=37, **mask)
    for method, seqlen in itertools.product(METHODS, (0, 1, num_ranks - 1, 2 * num_ranks + 1)):
        yield Case(method=method, seqlen=seqlen)
        yield Case(method=method, seqlen=seqlen, load_balance=None, sinks=True)
    for method, dtype in itertools.product((*METHODS, "auto"), (torch.float16, torch.bfloat16)):
        yield Case(method=method, dtype=dtype, head_dim=24, head_dim_v=32, seqlen=64, num_heads_kv=4)


def over_two(num_ranks):
    """Each mask by each method over a mesh of two dimensions, dense and packed; fewer KV heads than inner ranks, and
    lengths at the edge."""
    for i, (first, mask) in enumerate(itertools.product(("all_gather", "ring"), MASKS)):
        place = dict(method=(first, "ulysses"), inner=2)
        yield Case(seqlen=37, batch=1 + i % 2, num_heads_kv=(1, 2, 4)[i % 3], **place, **mask)
        yield replace(PACKED[i % 4], num_heads_kv=(4, 1, 2)[i % 3], slopes_each=True, **place, **mask)
    for inner in (1, num_ranks):
        yield Case(method=("ring", "ulysses"), inner=inner, sinks=True)
    for seqlen in (0, 1, num_ranks - 1):
        yield Case(method=("ring", "ulysses"), inner=2, seqlen=seqlen, sinks=True)
    yield Case(method="auto", inner=2, dtype=torch.bfloat16, head_dim=24, head_dim_v=32, seqlen=64, load_balance=None)


def by_balancers_of_torch(num_ranks):
    """Each by each method and mask, of one sequence, several, and documents that begin in chunks and between them."""
    documents = dict(documents=(21, 0, 2, 9), rows_of_none=16)  # 48 rows
    for i, (method, name, mask) in enumerate(itertools.product(METHODS, BALANCERS, MASKS)):
        place = dict(method=method, load_balance=name, num_heads_kv=(1, 4)[i % 2])
        yield Case(seqlen=48, batch=1 + i % 2, **place, **mask) if i % 3 else Case(**documents, **place, **mask)
    if num_ranks == 4:
        for method, name in itertools.product(("all_gather", "ring"), BALANCERS):
            place = dict(method=(method, "ulysses"), inner=2, load_balance=name, sinks=True)
            yield Case(seqlen=48, batch=2, **place)
            yield Case(**documents, **place)


@pytest.mark.parametrize(
    ("num_ranks", "cases", "backend"),
    [
        pytest.param(2, readable, "triton", id="2 ranks"),
        pytest.param(4, both, "reference", id="4 ranks by reference"),
        pytest.param(4, over_two, "reference", id="2 x 2 ranks by reference"),
        pytest.param(4, by_balancers_of_torch, "reference", id="4 ranks by reference, torch's balancers"),
        pytest.param(2, by_balancers_of_torch, "triton", id="2 ranks, torch's balancers", marks=pytest.mark.ci),
        pytest.param(4, over_two, "triton", id="2 x 2 ranks", marks=pytest.mark.ci),
        pytest.param(2, packed, "triton", id="2 ranks, packed", marks=pytest.mark.ci),
        pytest.param(4, packed, "triton", id="4 ranks, packed", marks=pytest.mark.ci),
        pytest.param(2, more, "triton", id="2 ranks, more", marks=pytest.mark.ci),
        pytest.param(3, more, "reference", id="3 ranks by reference, more", marks=pytest.mark.ci),
        pytest.param(4, readable, "triton", id="4 ranks", marks=pytest.mark.ci),
        pytest.param(4, more, "triton", id="4 ranks, more", marks=pytest.mark.full),
    ],
)
def test_what_one_process_gives(num_ranks, cases, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    given = [case for case in cases(num_ranks) if num_ranks != 3 or case.method != "ulysses"]  # 3 divides no heads
    assert run(check_values, given, num_ranks, tmp_path / "store") == []


def test_bytes_that_ranks_receive(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    shape = dict(batch=2, seqlen=64, num_heads_q=8, head_dim_v=32, options={})
    given = [
        Case(method=method, dtype=torch.bfloat16, num_heads_kv=heads, **shape)
        for method in METHODS
        for heads in (2, 4, 8)
    ]
    given += [replace(case, method=(case.method, "ulysses"), inner=2) for case in given if case.method != "ulysses"]
    # Chunks 0 to 7 are of the ranks 0 1 2 3 3 2 1 0, and each needs 15 keys of the chunk before it.
    window = dict(causal=True, window_size=(15, -1))
    given.append(Case(seqlen=128, options=window, rows_from_others=(15, 30, 30, 15)))
    assert run(check_bytes, given, 4, tmp_path / "store") == []


@pytest.mark.parametrize(
    ("rank_1", "said"),
    [
        (dict(options=dict(causal=False)), r"window_size: expected the same on all ranks, \(-1, 0\) as on rank 0, got"),
        (dict(alibi=True), "alibi_slopes: expected the same on all ranks, None as on rank 0, got"),
        (dict(num_heads_q=2), r"q: expected the same on all ranks, \(\(4, 16\), torch.float32\) as on rank 0, got"),
        (dict(method="ring"), "method: expected the same on all ranks, all_gather as on rank 0, got ring on rank 1"),
        (dict(seqlen=49), "seqlen: expected the same on all ranks, 50 as on rank 0, got 49 on rank 1"),
        (
            dict(documents=(20, 30)),
            r"batch: expected the same on all ranks, 1 as on rank 0, got None on rank 1",
        ),
        (dict(dtype=torch.float16), r"q: expected the same on all ranks, .*float32.* rank 0, got .*float16.* rank 1"),
        # What one rank refuses:
        (dict(num_heads_kv=3), r"k: expected a number of heads that divides q's 4, got 3( \(on rank 1\))?$"),
        (dict(method="tree"), r"method: expected .*, got 'tree'"),
        (dict(method="ulysses", num_heads_q=3, num_heads_kv=1), r"q: expected query heads in multiples of 2 ranks"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.ci(but_each=5)
def test_ranks_that_differ_are_named_on_every_rank(rank_1, said, tmp_path):
    case = Case(load_balance=None)
    (_, _, first), (_, _, second) = run(check_difference, [(case, replace(case, **rank_1))], 2, tmp_path / "store")
    assert re.search(said, first), first
    assert re.search(said, second), second


@pytest.mark.ci
def test_values_are_compared_where_they_are_checked(tmp_path, monkeypatch):
    case = Case(alibi=True)
    cases = [(case, replace(case, seed=1))]
    assert run(check_difference, cases, 2, tmp_path / "store") == []
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    found = run(check_difference, cases, 2, tmp_path / "another store")
    assert [said.startswith("alibi_slopes: expected the same on all ranks") for *_, said in found] == [True, True]


def test_where_no_transfer_is_waited_for_the_next_call_names_the_difference(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    case = Case(method="ring", documents=(20, 31))
    cases = [(case, replace(case, options=dict(causal=True, softcap=3.0)))]
    found = run(check_difference_later, cases, 2, tmp_path / "store")
    assert len(found) == 2
    for *_, said in found:
        assert re.search(r"softcap: expected the same on all ranks, 0.0 as on rank 0, got 3.0 on rank 1", said), said


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "stays away"])
@pytest.mark.ci(but_each=2)
def test_a_rank_that_does_not_come_ends_the_others(dies, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    call = functools.partial(attend_without_the_last, Case(), dies)
    found = run_without_a_rank(call, 3, tmp_path, timeout=100 if dies else 20)
    for rank in (0, 1):
        assert found[rank] is not None, "no end"
        assert re.search("(?i)^RuntimeError.*(connection|timed out|timeout)", found[rank]), found[rank]


def test_calls_of_the_ring(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    cases = [
        Case(method="ring"),
        Case(method="ring", batch=3, options={}),
        Case(method="ring", documents=(40, 33, 1, 50), load_balance="per_document"),
    ]
    assert run(check_calls, cases, 4, tmp_path / "store") == []


def test_compiled_recomputed_and_accumulated(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    options = dict(causal=True, window_size=(12, -1), dropout_p=0.2, dropout_seed=3)
    cases = [Case(method=method, sinks=True, options=options) for method in METHODS]
    cases += [replace(PACKED[0], method=method, alibi=True, slopes_each=True) for method in METHODS]
    cases += [Case(method=method, seqlen=48, load_balance="of_documents") for method in ("auto", "ulysses")]
    assert run(check_training, cases, 2, tmp_path / "store") == []


def test_a_graph_chooses_what_a_plain_call_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    case = Case(method="auto", seqlen=32, even=True)
    assert run(check_choice, [case, replace(case, alibi=True, batch=2)], 2, tmp_path / "store") == []


@pytest.mark.ci
def test_compiled_over_two_dimensions(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    place = dict(inner=2, sinks=True, num_heads_kv=1)
    cases = [Case(method=("ring", "ulysses"), batch=2, seqlen=37, **place)]
    cases += [replace(case, method="auto", **place) for case in PACKED[:2]]
    assert run(check_training, cases, 4, tmp_path / "store") == []


@pytest.mark.ci
def test_ranks_of_two_dimensions_that_differ_are_named_on_every_rank(tmp_path, monkeypatch):
    """Rank 3 shares no dimension with rank 0."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    case = Case(method="auto", inner=2)
    cases = [
        (case, case, case, other) for other in (replace(case, options={}), replace(case, num_heads_q=3, num_heads_kv=1))
    ]
    found = run(check_difference, cases, 4, tmp_path / "store")
    said = [text for _, _, text in found]
    assert sum(text.startswith("window_size: expected the same on all ranks") for text in said) == 4, said
    assert sum("q: expected query heads in multiples of 2 ranks for 'ulysses', got 3" in text for text in said) == 4, (
        said
    )


def test_irregular_meshes(tmp_path):
    given = [[[0, 1], [3, 2]], [[0, 2], [1, 3]], [[1, 0], [3, 2]]]
    assert run(check_irregular_mesh, given, 4, tmp_path / "store") == []


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_one_rank(mesh, method):
    for mask in MASKS:
        check_values(Case(method=method, **mask), mesh)


@pytest.mark.parametrize("method", METHODS)
def test_autograd_alone_gets_what_an_operator_gives(mesh, method, monkeypatch):
    def step(observer):
        torch.manual_seed(0)
        leaves = [torch.randn(1, 8, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
        with observer:
            out = context_parallel_attention(*leaves, mesh=mesh, method=method, causal=True)
            out.square().sum().backward()
        return out, *(x.grad for x in leaves)

    seen = BesideFakes()
    expected = step(seen)
    assert seen.operators == [f"triton_attn::context_parallel_attention{end}" for end in ("", "_backward")]

    def fail(self, *args):
        raise AssertionError(f"{self._name} was called")

    monkeypatch.setattr(CustomOpDef, "__call__", fail)
    for x, y in zip(step(contextlib.nullcontext()), expected, strict=True):
        assert torch.equal(x, y)


def test_a_call_in_inference_mode_and_then_a_training_step(mesh):
    """Positions are cached; those of an inference tensor could not be saved for the backward pass."""
    whole._parts.cache_clear()
    options = dict(mesh=mesh, method="ulysses", dropout_p=0.3, dropout_seed=1)
    x = torch.randn(1, 6, 2, 16)
    with torch.inference_mode():
        out = context_parallel_attention(x, x, x, **options)
    leaf = x.clone().requires_grad_()
    trained = context_parallel_attention(leaf, leaf, leaf, **options)
    trained.sum().backward()
    assert torch.equal(trained, out)
    assert leaf.grad.isfinite().all()


def test_the_page_runs(mesh, device):
    page = Path(__file__).parents[2] / "docs/many-gpus.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(code) == 8
    names = {"device": device}
    exec(code[0], names)
    q, k, v = (names[name] for name in "qkv")
    found = unshard_sequence(names["out"].detach(), mesh, seqlen=q.shape[1])
    torch.testing.assert_close(found, flash_attention(q, k, v, causal=True), atol=1e-5, rtol=1e-5)
    exec("\n".join(code[1:]), names)
    torch.testing.assert_close(names["again"], found, atol=1e-5, rtol=1e-5)
    cu_seqlens = names["cu_seqlens"].to(device)
    expected = flash_attention_varlen(q[0], k[0], v[0], cu_seqlens, cu_seqlens, 300, 300, causal=True)
    torch.testing.assert_close(names["documents"].detach(), expected, atol=1e-5, rtol=1e-5)
    lengths = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=300, max_seqlen_k=300)
    expected = mla_prefill(*names["latent_rows"], names["w_uk"], names["w_uv"], **lengths)
    torch.testing.assert_close(names["latent_whole"], expected, atol=1e-4, rtol=1e-4)
