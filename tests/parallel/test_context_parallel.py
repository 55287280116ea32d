"""Attention over 2 and 4 processes gives what one process gives: out, lse and all gradients."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_ranks import Case, check_bytes, check_difference, check_values, run
from torch.distributed.device_mesh import init_device_mesh

from triton_attn import flash_attention
from triton_attn.parallel import context_parallel_attention, local, shard_sequence, unshard_sequence
from triton_attn.parallel.balance import Sharding
from triton_attn.parallel.ulysses import check_heads

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
    """Each mask by each method."""
    return [Case(method=method, seqlen=37, num_heads_kv=num_ranks, **mask) for method in METHODS for mask in MASKS]


def more(num_ranks):
    """One KV head for all ranks, several sequences, lengths at the edge, 16 bits."""
    for method, mask in itertools.product(METHODS, MASKS):
        yield Case(method=method, load_balance=None, num_heads_kv=1, batch=2, seqlen=37, **mask)
    for method, seqlen in itertools.product(METHODS, (0, 1, num_ranks - 1, 2 * num_ranks + 1)):
        yield Case(method=method, seqlen=seqlen)
        yield Case(method=method, seqlen=seqlen, load_balance=None, sinks=True)
    for method, dtype in itertools.product((*METHODS, "auto"), (torch.float16, torch.bfloat16)):
        yield Case(method=method, dtype=dtype, head_dim=24, head_dim_v=32, seqlen=64, num_heads_kv=4)


@pytest.mark.parametrize(
    ("num_ranks", "cases", "backend"),
    [
        pytest.param(2, readable, "triton", id="2 ranks"),
        pytest.param(4, readable, "reference", id="4 ranks by reference"),
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
    # Chunks 0 to 7 are of the ranks 0 1 2 3 3 2 1 0, and each needs 15 keys of the chunk before it.
    window = dict(causal=True, window_size=(15, -1))
    given.append(Case(seqlen=128, options=window, rows_from_others=(15, 30, 30, 15)))
    assert run(check_bytes, given, 4, tmp_path / "store") == []


@pytest.mark.parametrize(
    ("rank_1", "said"),
    [
        (dict(options=dict(causal=False)), r"window_size: expected the same on all ranks, \(-1, 0\) as on rank 0, got"),
        (dict(alibi=True), "alibi_slopes: expected the same on all ranks, None as on rank 0, got"),
        (dict(num_heads_q=2), r"q: expected the same on all ranks, \(\(1, 4, 16\), torch.float32\) as on rank 0, got"),
        (dict(method="ring"), "method: expected the same on all ranks, all_gather as on rank 0, got ring on rank 1"),
        (dict(seqlen=49), "seqlen: expected the same on all ranks, 50 as on rank 0, got 49 on rank 1"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.ci(but_each=5)
def test_ranks_that_differ_are_named_on_every_rank(rank_1, said, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_CHECK", "1")
    case = Case(load_balance=None)
    (_, _, first), (_, _, second) = run(check_difference, [(case, replace(case, **rank_1))], 2, tmp_path / "store")
    assert re.search(said, first), first
    assert re.search(said, second), second


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """Of this process alone."""
    store = tmp_path_factory.mktemp("mesh") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_one_rank(mesh, method):
    for mask in MASKS:
        check_values(Case(method=method, **mask), mesh)


def test_a_call_in_inference_mode_and_then_a_training_step(mesh):
    """Positions are cached; those of an inference tensor could not be saved for the backward pass."""
    local.shard_of.cache_clear()
    options = dict(mesh=mesh, method="ulysses", dropout_p=0.3, dropout_seed=1)
    x = torch.randn(1, 6, 2, 16)
    with torch.inference_mode():
        out = context_parallel_attention(x, x, x, **options)
    leaf = x.clone().requires_grad_()
    trained = context_parallel_attention(leaf, leaf, leaf, **options)
    trained.sum().backward()
    assert torch.equal(trained, out)
    assert leaf.grad.isfinite().all()


X = torch.randn(1, 6, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(method="tree"), "method: expected 'auto' or 'all_gather' or 'ring' or 'ulysses', got 'tree'"),
        (dict(load_balance="zigzag"), "load_balance: expected 'head_tail' or None, got 'zigzag'"),
        (dict(seqlen=7), "seqlen: expected the length of a sequence of which rank 0 of 1 has 6 rows, got 7"),
        (dict(seqlen=-1), "seqlen: expected the length of a sequence .*, got -1"),
        (dict(k=X[:, :5]), "k: expected q's 6 rows, got 5"),
        (dict(v=X[0]), r"v: expected 4 dimensions \(batch, rows, heads, dim\), got shape \(6, 2, 16\)"),
        (
            dict(dropout_p=0.5),
            "dropout_seed: expected an int or a tensor, the same on all ranks, with dropout, got None",
        ),
        (dict(softcap=-1.0), "softcap: expected 0"),
        (dict(mesh="cp"), "mesh: expected a DeviceMesh, got str"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(mesh, arguments, said):
    arguments = dict(q=X, k=X, v=X, mesh=mesh) | arguments
    with pytest.raises((TypeError, ValueError), match=said):
        context_parallel_attention(**arguments)


def test_a_mesh_of_two_dimensions_is_refused(mesh):
    two = init_device_mesh("cpu", (1, 1))
    with pytest.raises(ValueError, match="mesh: expected one dimension"):
        shard_sequence(X, two)


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ((6, 2, 4), "q: expected query heads in multiples of 4 ranks for 'ulysses', got 6"),
        ((12, 3, 4), "k: expected KV heads that divide 4 ranks or are a multiple of them for 'ulysses', got 3"),
        ((8, 2, 4), None),
        ((8, 8, 4), None),
    ],
)
def test_heads_of_ulysses(heads, said):
    if said is None:
        check_heads(*heads)
    else:
        with pytest.raises(ValueError, match=said):
            check_heads(*heads)


def test_shards_of_each_length():
    """Every row is in one chunk, and no rank has more than its share and one chunk's rounding."""
    for seqlen, num_ranks, load_balance in itertools.product((0, 1, 5, 16, 37), (1, 2, 3, 8), ("head_tail", None)):
        sharding = Sharding(seqlen, num_ranks, load_balance)
        rows = [row for chunks in sharding.chunks for chunk in chunks for row in range(*chunk)]
        assert sorted(rows) == list(range(seqlen))
        whole = torch.arange(seqlen)
        assert torch.equal(sharding.in_order([sharding.own_rows(whole, r, 0) for r in range(num_ranks)], 0), whole)


def test_head_tail_gives_all_ranks_the_same_causal_work():
    chunks = Sharding(64, 4, "head_tail").chunks
    assert {sum(row + 1 for chunk in of_rank for row in range(*chunk)) for of_rank in chunks} == {64 * 65 // 2 // 4}


def test_gradients_of_shards(mesh):
    x = X.clone().requires_grad_()
    whole = unshard_sequence(shard_sequence(x, mesh), mesh)
    assert torch.equal(whole, x)
    dout = torch.randn_like(X)
    assert torch.equal(torch.autograd.grad(whole, x, dout)[0], dout)


def test_the_page_runs(mesh, device):
    page = Path(__file__).parents[2] / "docs/many-gpus.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(code) == 3
    names = {"device": device}
    exec("\n".join(code), names)
    q, k, v = (names[name] for name in "qkv")
    found = unshard_sequence(names["out"].detach(), mesh, seqlen=q.shape[1])
    torch.testing.assert_close(found, flash_attention(q, k, v, causal=True), atol=1e-5, rtol=1e-5)
