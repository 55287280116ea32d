"""Attention on DTensors: what one process gives, without a transfer, or an error that names the placement."""

import itertools
import re

import pytest
import torch
import torch.distributed as dist
from dtensor_ranks import (
    S0,
    S1,
    S2,
    Case,
    LatentCase,
    R,
    check_block,
    check_bytes,
    check_common_ranks,
    check_decode,
    check_descending_ranks,
    check_error,
    check_latent_block,
    check_mixed_parts,
    check_values,
)
from parallel_ranks import run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from triton_attn import flash_attention, flash_attention_varlen, mla_decode, mla_prefill
from triton_attn.parallel import (
    context_parallel_attention,
    context_parallel_mla_decode,
    context_parallel_mla_prefill,
    context_parallel_paged_attention,
)


def of_two():
    for keys in (S2, R):
        yield Case(mesh_shape=(2,), of_q=(S2,), of_keys=(keys,), sinks=(S0,), alibi=True)
        yield Case(mesh_shape=(2,), of_q=(S2,), of_keys=(keys,), sinks=(R,), options=dict(window_size=(5, 3)))
        yield Case(mesh_shape=(2,), of_q=(S2,), of_keys=(keys,), options=dict(dropout_p=0.4, dropout_seed=7))
    yield Case(mesh_shape=(2,), of_q=(S2,), of_keys=(R,), num_heads_kv=1)
    yield Case(mesh_shape=(2,), of_q=(S0,), of_keys=(S0,), sinks=(R,))  # one rank has a sequence more
    yield Case(mesh_shape=(2,), of_q=(S0,), of_keys=(S0,), batch=1, options=dict(dropout_p=0.4, dropout_seed=7))
    yield Case(mesh_shape=(2,), of_q=(R,), of_keys=(R,), sinks=(R,), options=dict(dropout_p=0.4, dropout_seed=7))
    for keys, options in itertools.product((S1, R), (dict(causal=True), dict(dropout_p=0.4, dropout_seed=7))):
        yield Case(mesh_shape=(2,), of_q=(S1,), of_keys=(keys,), packed=True, sinks=(S0,), options=options)
    for seqlen in (24, 22):  # of 22 the chunks have 5 or 6 rows, and the ranks 11
        yield Case(mesh_shape=(2,), of_q=(S1,), of_keys=(S1,), seqlen=seqlen, context_parallel={}, sinks=(R,))
    yield Case(mesh_shape=(2,), of_q=(S2,), of_keys=(S2,), dtype=torch.bfloat16)


def of_four():
    dropout = dict(dropout_p=0.4, dropout_seed=7)
    yield Case(mesh_shape=(4,), of_q=(S2,), of_keys=(S2,), sinks=(S0,), options=dropout)
    for heads in (1, 2, 4):
        yield Case(mesh_shape=(4,), of_q=(S2,), of_keys=(R,), num_heads_kv=heads)
    for keys in (S2, R):
        yield Case(mesh_shape=(2, 2), of_q=(S0, S2), of_keys=(S0, keys), sinks=(R, S0), alibi=True, options=dropout)
        yield Case(mesh_shape=(2, 2), of_q=(S2, R), of_keys=(keys, R), sinks=(R, R), options=dict(softcap=3.0))
    for method, balance in (("all_gather", "head_tail"), ("ring", None), ("ulysses", "head_tail")):
        cp = dict(method=method, load_balance=balance)
        for outer in (S2, S0, R):
            places = dict(of_q=(outer, S1), of_keys=(outer, S1))
            sinks = (S0 if outer == S2 else R, R)
            options = dict(causal=balance is not None)
            yield Case(mesh_shape=(2, 2), **places, sinks=sinks, options=options, context_parallel=cp)
    yield Case(
        mesh_shape=(4,), of_q=(S1,), of_keys=(S1,), seqlen=12, options={}, context_parallel=dict(load_balance=None)
    )
    yield from heads_and_rows(Case)


def latents_of_two():
    by_heads = dict(mesh_shape=(2,), of_q=(S2,), of_keys=(R,))
    for weights in (S0, R):
        yield LatentCase(**by_heads, of_weights=(weights,))
    yield LatentCase(**by_heads, of_weights=(S0,), options=dict(causal=False, mode="materialized"))
    yield LatentCase(mesh_shape=(2,), of_q=(S1,), of_keys=(R,), of_weights=(S0,), packed=True)
    yield LatentCase(mesh_shape=(2,), of_q=(S0,), of_keys=(S0,), of_weights=(R,))  # one rank has a sequence more
    yield LatentCase(mesh_shape=(2,), of_q=(R,), of_keys=(R,), of_weights=(R,))
    yield LatentCase(**by_heads, of_weights=(S0,), dtype=torch.bfloat16)
    for method, seqlen in (("ring", 24), ("all_gather", 22)):
        cp = dict(method=method)
        rows = dict(mesh_shape=(2,), of_weights=(R,), context_parallel=cp, seqlen=seqlen)
        yield LatentCase(**rows, of_q=(S1,), of_keys=(S1,))
        yield LatentCase(**rows, of_q=(S0,), of_keys=(S0,), packed=True)


def latents_of_four():
    yield LatentCase(mesh_shape=(4,), of_q=(S2,), of_keys=(R,), of_weights=(S0,))
    yield LatentCase(mesh_shape=(2, 2), of_q=(S0, S2), of_keys=(S0, R), of_weights=(R, S0))
    yield from heads_and_rows(LatentCase, of_weights=(S0, R))


def heads_and_rows(kind, **others):
    """Heads on one dimension of the mesh and rows on the other: tensor parallelism beside context parallelism."""
    for method, balance, on_other in (
        ("all_gather", "head_tail", False),
        ("ring", None, True),
        ("ring", "head_tail", False),
    ):
        cp = dict(method=method, load_balance=balance)
        common = dict(mesh_shape=(2, 2), context_parallel=cp, on_other_mesh=on_other, **others)
        options = dict(causal=balance is not None)
        of_keys = [(S2, S1), (S1, S0)] if kind is Case else [(R, S1), (R, S0)]
        yield kind(of_q=(S2, S1), of_keys=of_keys[0], options=options, **common)
        yield kind(of_q=(S1, S0), of_keys=of_keys[1], options=options, packed=True, **common)


@pytest.mark.parametrize(
    ("num_ranks", "cases", "backend"),
    [
        pytest.param(2, of_two, "triton", id="2 ranks"),
        pytest.param(2, latents_of_two, "triton", id="2 ranks, MLA"),
        pytest.param(4, of_four, "reference", id="4 ranks by reference", marks=pytest.mark.ci),
        pytest.param(4, of_four, "triton", id="4 ranks", marks=pytest.mark.full),
        pytest.param(4, latents_of_four, "reference", id="4 ranks by reference, MLA"),
        pytest.param(4, latents_of_four, "triton", id="4 ranks, MLA", marks=pytest.mark.ci),
    ],
)
def test_what_one_process_gives(num_ranks, cases, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", backend)
    assert run(check_values, list(cases()), num_ranks, tmp_path / "store") == []


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.ci)])
def test_a_tensor_parallel_layer(num_ranks, tmp_path, monkeypatch):
    """ColwiseParallel and RowwiseParallel, with attention on DTensors and on local tensors."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    assert run(check_block, [False, True], num_ranks, tmp_path / "store") == []


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.ci)])
def test_a_tensor_parallel_layer_of_latent_attention(num_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    assert run(check_latent_block, [10], num_ranks, tmp_path / "store") == []


def test_heads_of_latent_decode(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "triton")
    of_all = [{}, dict(num_splits=2, causal=False), dict(max_seqlen_q=2), dict(softmax_scale=0.2)]
    cases = [(S0, options) for options in of_all] + [(R, {}), (R, dict(max_seqlen_q=2))]
    assert run(check_decode, cases, 2, tmp_path / "store") == []


def test_bytes_do_not_depend_on_who_has_the_heads(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    placements = dict(of_q=(S2, S1), of_keys=(R, S1), of_weights=(S0, R))
    cases = [
        LatentCase(mesh_shape=(2, 2), **placements, context_parallel=dict(method=method), options=dict(causal=False))
        for method in ("all_gather", "ring")
    ]
    assert run(check_bytes, cases, 4, tmp_path / "store") == []


CP = dict(mesh_shape=(2,), of_q=(S1,), of_keys=(S1,))
ERRORS = [
    (
        Case(mesh_shape=(2,), of_q=(S2,), of_keys=(S2,), num_heads_kv=1),
        "k: expected KV heads in multiples of 2 ranks, or",
    ),
    (
        Case(**CP, seqlen=11, context_parallel=dict(load_balance=None)),
        r"q: expected .* multiples of 2 rows, .*, got 11",
    ),
    (Case(**CP, seqlen=3, context_parallel={}), r"q: expected a sequence in multiples of 2 rows, .*, got 3"),
    (Case(**CP, context_parallel=dict(seqlen=12)), "seqlen: expected None, or 24 as of the DTensors, got 12"),
    (
        LatentCase(mesh_shape=(2,), of_q=(S2,), of_keys=(S1,), of_weights=(S0,)),
        r"kv_latent: expected R on dimension 0 of the mesh, where q_nope has S\(2\), got S\(1\)",
    ),
    (
        LatentCase(mesh_shape=(2,), of_q=(S1,), of_keys=(S1,), of_weights=(R,)),
        r"q_nope: expected Shard\(0\), .* or triton_attn.parallel.context_parallel_mla_prefill for shards of sequences",
    ),
    (
        LatentCase(**CP, of_weights=(S0,), context_parallel={}),
        r"w_uk: expected R on dimension 0 of the mesh, where q_nope has S\(1\), got S\(0\)",
    ),
    (
        LatentCase(mesh_shape=(1, 2), of_q=(S2, S2), of_keys=(R, R), of_weights=(S0, S0)),
        r"q_nope: expected S\(2\) on one dimension of the mesh",
    ),
    (
        LatentCase(**CP, of_weights=(R,), seqlen=11, context_parallel={}),
        r"q_nope: expected a sequence in multiples of 2 rows, as many as ranks, got 11",
    ),
    (
        LatentCase(
            mesh_shape=(2,),
            of_q=(S0,),
            of_keys=(S0,),
            of_weights=(R,),
            packed=True,
            context_parallel=dict(load_balance="per_document"),
        ),
        "load_balance: expected 'head_tail', None or a load balancer of torch, got 'per_document'",
    ),
]


def test_errors_of_two_ranks(tmp_path, monkeypatch):
    """All ranks raise: no rank waits for another."""
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    failures = run(check_error, [case for case, _ in ERRORS], 2, tmp_path / "store")
    assert len(failures) == 2 * len(ERRORS)
    for rank in range(2):
        texts = [text for of, _, text in failures if of == rank]
        for text, (_, said) in zip(texts, ERRORS):
            assert re.search(said, text), text


def test_a_mesh_that_crosses_that_of_the_dtensors(tmp_path):
    assert run(check_common_ranks, [None], 2, tmp_path / "store") == []


def test_ranks_that_share_rows_have_the_same_heads_and_sequences(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    common = dict(mesh_shape=(2, 2), batch=2, context_parallel={}, on_other_mesh=True)
    cases = [Case(of_q=(shard,), of_keys=(shard,), **common) for shard in (S0, S2)]
    cases += [LatentCase(of_q=(S2,), of_keys=(R,), of_weights=(S0,), **common)]
    assert run(check_mixed_parts, cases, 4, tmp_path / "store") == []


def test_ranks_of_a_mesh_ascend(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    assert run(check_descending_ranks, [None], 2, tmp_path / "store") == []


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Of this process alone: one and two dimensions."""
    store = tmp_path_factory.mktemp("mesh") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,)), init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
    dist.destroy_process_group()


def dtensor(x, mesh, *placements):
    return DTensor.from_local(x, mesh, placements)


@pytest.mark.parametrize(
    ("of_q", "of_k", "said"),
    [
        (
            Shard(1),
            Shard(1),
            r"q: expected Shard\(0\), Shard\(2\) or Replicate\(\) on dimension 0 of the mesh, or "
            r"triton_attn.parallel.context_parallel_attention for shards of sequences, got S\(1\)",
        ),
        (
            Shard(3),
            Shard(3),
            r"q: expected Shard\(0\), Shard\(2\) or Replicate\(\) on dimension 0 of the mesh, got S\(3\)",
        ),
        (_StridedShard(2, split_factor=2), Shard(2), r"q: expected Shard\(0\), Shard\(2\) or Replicate\(\) .*, got _S"),
        (Partial(), Replicate(), r"q: expected Shard\(0\), Shard\(2\) or Replicate\(\) .*, got P"),
        (Shard(0), Shard(2), r"k: expected S\(0\) on dimension 0 of the mesh, where q has S\(0\), got S\(2\)"),
        (Shard(0), Replicate(), r"k: expected S\(0\) on dimension 0 of the mesh, where q has S\(0\), got R"),
        (Replicate(), Shard(2), r"k: expected R on dimension 0 of the mesh, where q has R, got S\(2\)"),
    ],
)
def test_placements_that_would_need_a_transfer(meshes, of_q, of_k, said):
    x = torch.randn(2, 6, 4, 16)
    q, k = dtensor(x, meshes[0], of_q), dtensor(x, meshes[0], of_k)
    with pytest.raises(ValueError, match=said):
        flash_attention(q, k, k)


def test_errors_of_one_process(meshes):
    one, two = meshes
    plain = torch.randn(2, 6, 4, 16)
    x, y = dtensor(plain, one, Shard(2)), dtensor(plain, two, Shard(2), Shard(0))
    sinks = torch.randn(4, requires_grad=True)
    whole_keys = dtensor(plain, one, Replicate())
    for call, error, said in [
        (
            lambda: flash_attention(x, plain, plain),
            TypeError,
            "k: expected a DTensor, as others of q, k and v are, got Tensor",
        ),
        (
            lambda: flash_attention(plain, x, x),
            TypeError,
            "q: expected a DTensor, as others of q, k and v are, got Tensor",
        ),
        (lambda: flash_attention(x, y, y), ValueError, "k: expected q's mesh"),
        (lambda: flash_attention(x, x, whole_keys), ValueError, "v: expected k's S"),
        (lambda: flash_attention(x, x, x[:, :, :3]), ValueError, "v: expected k's shape"),
        (
            lambda: flash_attention(x, x, x, sinks=sinks),
            TypeError,
            "sinks: expected a DTensor, since gradients are wanted",
        ),
        (
            lambda: flash_attention(x, x, x, sinks=dtensor(sinks, one, Partial())),
            ValueError,
            r"sinks: expected Replicate\(\) on",
        ),
        (lambda: flash_attention(x, x, x, sinks=dtensor(sinks, two, R, R)), ValueError, "sinks: expected q's mesh"),
        (
            lambda: flash_attention(x, x, x, dropout_p=0.1),
            ValueError,
            "dropout_seed: expected an int or a tensor, the same",
        ),
        (
            lambda: flash_attention(x, x[:, :5], x[:, :5], dropout_p=0.1, dropout_seed=1),
            ValueError,
            "dropout_p: expected 0 for DTensors whose queries and keys have different lengths",
        ),
        (
            lambda: flash_attention(x, x, x, shard=torch.zeros(2, 3, dtype=torch.int32)),
            ValueError,
            "shard: expected None with",
        ),
        (
            lambda: flash_attention(*[dtensor(plain, two, S2, S2)] * 3),
            ValueError,
            r"q: expected S\(2\) on one dimension of the mesh",
        ),
        (lambda: context_parallel_attention(x, x, x, mesh=one), ValueError, r"q: expected Shard\(1\) on dimension 0"),
        (
            lambda: context_parallel_attention(*[whole_keys] * 3, mesh=one),
            ValueError,
            r"q: expected Shard\(1\) .*, got R",
        ),
        (lambda: context_parallel_attention(x, x, x, mesh=two), ValueError, "mesh: expected one dimension"),
        (lambda: context_parallel_attention(plain, x, x, mesh=one), TypeError, "q: expected a DTensor"),
        (
            lambda: context_parallel_attention(
                *[dtensor(plain, two, S2, S1)] * 3, mesh=two["cp"], dropout_p=0.1, dropout_seed=1
            ),
            ValueError,
            "dropout_p: expected 0 where sequences and heads, or batches, are sharded, got 0.1",
        ),
    ]:
        with pytest.raises(error, match=said):
            call()


def test_errors_of_latent_attention(meshes):
    one, two = meshes
    shapes = (2, 6, 4, 16), (2, 6, 4, 8), (2, 6, 32), (2, 6, 8), (4, 16, 32), (4, 12, 32)
    plain = [torch.randn(shape) for shape in shapes]
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv = by_heads = [
        dtensor(x, one, p) for x, p in zip(plain, (S2, S2, R, R, S0, S0))
    ]
    cache, lengths, table = plain[2], torch.tensor([6, 6]).int(), torch.tensor([[0], [1]]).int()
    cache = torch.cat([cache, plain[3]], -1)
    for call, error, said in [
        (
            lambda: mla_prefill(*by_heads[:4], *plain[4:]),
            TypeError,
            "w_uk: expected a DTensor, as others of q_nope, q_pe, kv_latent, k_pe, w_uk and w_uv are, got Tensor",
        ),
        (lambda: mla_prefill(*plain[:5], w_uv), TypeError, "q_nope: expected a DTensor, as others of"),
        (lambda: mla_prefill(*by_heads[:5], dtensor(plain[5], two, R, S0)), ValueError, "w_uv: expected q_nope's mesh"),
        (lambda: mla_prefill(*by_heads[:5], dtensor(plain[5], one, R)), ValueError, r"w_uv: expected w_uk's S\(0\) on"),
        (lambda: mla_prefill(q_nope, q_pe, kv_latent, k_pe, w_uk[:3], w_uv), ValueError, "w_uk: expected shape"),
        (lambda: mla_prefill(*by_heads, mode="tree"), ValueError, "mode: expected auto"),
        (
            lambda: context_parallel_mla_prefill(*plain[:5], w_uv, mesh=one),
            TypeError,
            "q_nope: expected a DTensor, as others of",
        ),
        (
            lambda: context_parallel_mla_prefill(*by_heads, mesh=one),
            ValueError,
            r"q_nope: expected Shard\(1\) on dimension 0 of the mesh, got S\(2\)",
        ),
        (
            lambda: mla_decode(*plain[:2], dtensor(cache, one, R), lengths, table, *plain[4:]),
            TypeError,
            "q_nope: expected a DTensor, as others of q_nope, q_pe, w_uk and w_uv are, got Tensor",
        ),
        (
            lambda: mla_decode(q_nope, q_pe, dtensor(cache, one, S0), lengths, table, w_uk, w_uv),
            ValueError,
            r"latent_cache: expected a plain tensor, or Replicate\(\) on all",
        ),
        (
            lambda: mla_decode(q_nope, q_pe, dtensor(cache, two, R, S0), lengths, table, w_uk, w_uv),
            ValueError,
            r"latent_cache: expected a plain tensor, or Replicate\(\) on all",
        ),
        (
            lambda: mla_decode(q_nope, q_pe, cache, lengths, table, w_uk, w_uv, out=torch.empty(2, 6, 4, 12)),
            ValueError,
            "out: expected None with DTensors, got Tensor",
        ),
        (
            lambda: mla_decode(*(dtensor(x, one, S0) for x in plain[:2]), cache, lengths, table, w_uk, w_uv),
            ValueError,
            r"q_nope: expected Shard\(2\) or Replicate\(\) on dimension 0 of the mesh, got S\(0\)",
        ),
        (
            lambda: mla_decode(q_nope.requires_grad_(), q_pe, cache, lengths, table, w_uk, w_uv),
            NotImplementedError,
            "q_nope: gradients are not supported",
        ),
        (
            lambda: context_parallel_mla_decode(q_nope, q_pe, cache, lengths, table, w_uk, w_uv, mesh=one),
            TypeError,
            "q_nope: expected a plain tensor with this rank's heads, got DTensor",
        ),
        (
            lambda: context_parallel_paged_attention(q_nope, *[plain[0]] * 2, lengths, table, mesh=one),
            TypeError,
            "q: expected a plain tensor with this rank's heads, got DTensor",
        ),
    ]:
        with pytest.raises(error, match=said):
            call()


def test_packed_sequences_have_no_sharded_tokens(meshes):
    x = dtensor(torch.randn(6, 4, 16), meshes[0], Shard(0))
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"q: expected Shard\(1\) or Replicate\(\) on dimension 0 of the mesh, or triton"
    ):
        flash_attention_varlen(x, x, x, cu_seqlens, cu_seqlens, 6, 6)


@pytest.mark.parametrize("placement", [Shard(0), Shard(2), Replicate()], ids=str)
def test_one_graph_under_compile(meshes, placement):
    torch._dynamo.reset()
    leaf = torch.randn(2, 6, 4, 16, requires_grad=True)

    def attend(x):
        q = dtensor(x, meshes[0], placement)
        return flash_attention(q, q, q, causal=True).to_local()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    out, expected = compiled(leaf), attend(leaf)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for found, of_eager in zip(torch.autograd.grad(out, leaf, dout), torch.autograd.grad(expected, leaf, dout)):
        torch.testing.assert_close(found, of_eager)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(2), Replicate(), None], ids=str)
def test_lengths_that_change_compile_twice(meshes, placement):
    """Once for the first length, and once for all others. None: local tensors of a context-parallel call."""
    torch._dynamo.reset()
    mesh, counter = meshes[0], CompileCounterWithBackend("aot_eager")

    def attend(x):
        q = x if placement is None else dtensor(x, mesh, placement)
        if placement in (None, Shard(1)):
            q = context_parallel_attention(q, q, q, mesh=mesh, causal=True)
        else:
            q = flash_attention(q, q, q, causal=True)
        return q if placement is None else q.to_local()

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for seqlen in (8, 12, 7, 30):
        leaf = torch.randn(2, seqlen, 4, 16, requires_grad=True)
        out, expected = compiled(leaf), attend(leaf)
        torch.testing.assert_close(out, expected)
        found, of_eager = (torch.autograd.grad(each.square().sum(), leaf) for each in (out, expected))
        torch.testing.assert_close(found, of_eager)
    assert counter.frame_count == 2


@pytest.mark.parametrize("form", ["heads", "rows", "heads and rows", "rows of another mesh"])
def test_latent_attention_compiles_twice(meshes, form):
    """As above, with the gradients of all tensors."""
    torch._dynamo.reset()
    counter, (one, two) = CompileCounterWithBackend("aot_eager"), meshes
    mesh, placements, of_rows = {
        "heads": (one, [(S2,), (R,), (S0,)], None),
        "rows": (one, [(S1,), (S1,), (R,)], one),
        "heads and rows": (two, [(S2, S1), (R, S1), (S0, R)], two["cp"]),
        "rows of another mesh": (two["dp"], [(S2,), (R,), (S0,)], two["cp"]),
    }[form]

    def attend(*tensors):
        placed = [dtensor(x, mesh, *placements[i // 2]) for i, x in enumerate(tensors)]
        if of_rows is None:
            return mla_prefill(*placed).to_local()
        return context_parallel_mla_prefill(*placed, mesh=of_rows).to_local()

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for seqlen in (8, 12, 7, 30):
        shapes = (2, seqlen, 4, 16), (2, seqlen, 4, 8), (2, seqlen, 32), (2, seqlen, 8), (4, 16, 32), (4, 12, 32)
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        out, expected = compiled(*leaves), attend(*leaves)
        torch.testing.assert_close(out, expected)
        found, of_eager = (torch.autograd.grad(each.square().sum(), leaves) for each in (out, expected))
        for gradient, of_leaf in zip(found, of_eager):
            torch.testing.assert_close(gradient, of_leaf)
    assert counter.frame_count == 2
