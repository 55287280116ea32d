"""After a warm-up nothing that a server calls is compiled; also output and errors of the function and the command."""

import inspect
import itertools
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from levels import INTERPRETED
from prefix_trees import tree_of_all
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import triton_attn
from triton_attn import __main__ as command
from triton_attn import parallel
from triton_attn._warmup import compilation
from triton_attn.models import MODELS, model_named
from triton_attn.parallel.balance import sharding_of_batch
from triton_attn.toolchain import record_specializations

BF16 = torch.bfloat16
ARCH = "sm_90"


@pytest.fixture
def warmed(monkeypatch):
    """A warm-up that records the kernels it would compile."""

    def warm(*args, **options):
        kernels = set()

        def compile_all(jobs, arch, num_workers, report):
            kernels.update(kernel for *_, task in compilation._tasks(jobs, arch) for kernel in task)
            return len(kernels), 0

        monkeypatch.setattr(compilation, "compile_all", compile_all)
        triton_attn.warmup(*args, **(dict(arch=ARCH) | options))
        return kernels

    return warm


def indices(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


def serve(model, num_heads_q, num_heads_kv, rng, *, cache_dtype=BF16, page_size=16, **options):
    """Whole, packed and chunked prompts, a decode batch that grows and shrinks, drafts, appends, copies, merges."""
    dim, window = model.head_dim, (-1, -1)
    if model.sinks:
        options["sinks"] = torch.empty(num_heads_q, dtype=BF16)

    def qkv(*rows):
        return [torch.empty(*rows, heads, dim, dtype=BF16) for heads in (num_heads_q, num_heads_kv, num_heads_kv)]

    caches = [torch.empty(2, 999, page_size, num_heads_kv, dim, dtype=cache_dtype) for _ in range(2)]
    for step in range(60):
        if model.window is not None:
            window = rng.choice([(-1, -1), (model.window - 1, 0)])
        masks = {"causal": True, "window_size": window, **options}
        prompt, batch, width = rng.randint(1, 5000), rng.randint(1, 64), rng.randint(1, 300)
        drafts, chunk = rng.randint(1, 8), rng.randint(9, 2048)
        return_lse = rng.random() < 0.5
        lens, table = indices(batch), indices(batch, width)
        triton_attn.flash_attention(*qkv(1, prompt), return_lse=return_lse, **masks)
        cu_seqlens = indices(batch + 1)
        triton_attn.flash_attention_varlen(*qkv(prompt), cu_seqlens, cu_seqlens, prompt, prompt, **masks)
        k_cache, v_cache = (cache[step % 2] for cache in caches)
        triton_attn.append_kv_cache(*qkv(prompt)[1:], k_cache, v_cache, indices(prompt, dtype=torch.int64))
        for seqlen_q in (1, drafts):
            q = qkv(batch, seqlen_q)[0]
            triton_attn.paged_attention(q, k_cache, v_cache, lens, table, return_lse=return_lse, **masks)
        mixed = dict(cu_seqlens_q=cu_seqlens, max_seqlen_q=chunk)
        q = qkv(chunk + batch - 1)[0]
        triton_attn.paged_attention(q, k_cache, v_cache, lens, table, return_lse=return_lse, **mixed, **masks)
        pages = indices(rng.randint(1, 20))
        triton_attn.copy_kv_pages(caches, pages, pages)
        starts = rng.choice([None, indices(batch)])
        triton_attn.gather_kv_cache(k_cache, v_cache, table, cu_seqlens, rng.randint(1, 999), seq_starts=starts)
        outs = torch.empty(rng.randint(2, 5), batch, 1, num_heads_q, dim, dtype=BF16)
        triton_attn.merge_attention(outs, torch.empty(*outs.shape[:2], num_heads_q, 1))


def serve_latent(model, num_heads, rng, page_size=64):
    """The same for a model with latent vectors."""
    nope, rank, rope, v_dim = model.head_dim - model.qk_rope_head_dim, model.kv_lora_rank, model.qk_rope_head_dim, 128
    w_uk, w_uv = (torch.empty(num_heads, dim, rank, dtype=BF16) for dim in (nope, v_dim))
    cache = torch.empty(99, page_size, rank + rope, dtype=BF16)

    def queries(*rows):
        return torch.empty(*rows, num_heads, nope + rope, dtype=BF16).split([nope, rope], dim=-1)

    def latents(*rows):
        return torch.empty(*rows, rank + rope, dtype=BF16).split([rank, rope], dim=-1)

    for _ in range(40):
        batch, width, drafts = rng.randint(1, 64), rng.randint(1, 200), rng.randint(1, 8)
        return_lse = rng.random() < 0.5
        for seqlen_q in (1, drafts):
            lens, table = indices(batch), indices(batch, width)
            triton_attn.mla_decode(*queries(batch, seqlen_q), cache, lens, table, w_uk, w_uv, return_lse=return_lse)
        tokens, keys = rng.randint(1, 3000), rng.randint(1, 100)
        cu_seqlens = indices(batch + 1)
        lengths = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=tokens, max_seqlen_k=keys)
        for mode in ("absorbed", "fused"):
            inputs = *queries(tokens), *latents(keys), w_uk, w_uv
            triton_attn.mla_prefill(*inputs, mode=mode, return_lse=return_lse, **lengths)
        inputs = *queries(1, tokens), *latents(1, keys), w_uk, w_uv
        triton_attn.mla_prefill(*inputs, mode="materialized", return_lse=return_lse)
        triton_attn.append_latent_cache(*latents(tokens), cache, indices(tokens, dtype=torch.int64))
        pages = indices(rng.randint(1, 20))
        triton_attn.copy_kv_pages(cache, pages, pages)
        out = rng.choice([None, latents(tokens)])
        sizes = dict(kv_lora_rank=rank, qk_rope_head_dim=rope)
        triton_attn.gather_latent_cache(cache, table, cu_seqlens, tokens, out=out, **sizes)


@pytest.mark.full(but_each=2)
@pytest.mark.ci(but_each=5)
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("name", "tensor_parallel_size"),
    [(m.name.lower(), n) for m in MODELS for n in (1, 4) if m.kv_lora_rank is None and m.num_heads_q % n == 0],
)
def test_serving_compiles_nothing_after_a_warmup(warmed, name, tensor_parallel_size):
    model = model_named(name)
    kernels = warmed(name, tensor_parallel_size=tensor_parallel_size, max_seqlen=8192)
    num_heads_q, num_heads_kv = (max(1, n // tensor_parallel_size) for n in (model.num_heads_q, model.num_heads_kv))
    with record_specializations(ARCH) as met:
        serve(model, num_heads_q, num_heads_kv, random.Random(0))
    assert set(met) <= kernels
    assert len(met) > 10


@pytest.mark.ci(but_each=2)
@pytest.mark.compiled
@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_serving_latent_vectors_compiles_nothing_after_a_warmup(warmed, name):
    kernels = warmed(name, tensor_parallel_size=2, max_seqlen=4096)
    model = model_named(name)
    with record_specializations(ARCH) as met:
        serve_latent(model, model.num_heads_q // 2, random.Random(0))
    assert set(met) <= kernels
    assert len(met) > 20


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["gpt-oss-120b", "llama-3-8b", "deepseek-v2-lite"])
def test_a_batch_invariant_server_compiles_nothing_after_a_warmup(warmed, name, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BATCH_INVARIANT", "1")
    model = model_named(name)
    kernels = warmed(name, max_seqlen=4096)
    with record_specializations(ARCH) as met:
        if model.kv_lora_rank is None:
            serve(model, model.num_heads_q, model.num_heads_kv, random.Random(0))
        else:
            serve_latent(model, model.num_heads_q, random.Random(0))
    assert set(met) <= kernels
    assert len(met) > 10


def serve_trees(model, num_heads_q, num_heads_kv, rng, batch_invariant):
    """Decode steps over prefix trees, and the verification of trees of drafts."""
    is_latent = model.kv_lora_rank is not None
    page_size = 64 if is_latent else 16
    for _ in range(30):
        batch, width, drafts, shared = rng.randint(2, 64), rng.randint(2, 200), rng.randint(1, 64), rng.randint(1, 60)
        own = dict(tree_mask=indices(batch, drafts, dtype=torch.int64))
        calls = [(drafts, own)]
        if not batch_invariant:
            tree = tree_of_all(batch, shared, part=rng.choice([shared, -(-shared // 4)]))
            calls.append((1, dict(prefix_tree=tree)))
            calls.append((drafts, own | dict(prefix_tree=tree_of_all(batch, shared, drafts))))
        for seqlen_q, options in calls:
            options |= dict(return_lse=rng.random() < 0.5)
            lens, table = indices(batch), indices(batch, width + shared)
            if is_latent:
                nope, rope, rank = model.head_dim - model.qk_rope_head_dim, model.qk_rope_head_dim, model.kv_lora_rank
                q = torch.empty(batch, seqlen_q, num_heads_q, nope + rope, dtype=BF16).split([nope, rope], -1)
                cache = torch.empty(9, page_size, rank + rope, dtype=BF16)
                weights = (torch.empty(num_heads_q, dim, rank, dtype=BF16) for dim in (nope, 128))
                triton_attn.mla_decode(*q, cache, lens, table, *weights, **options)
            else:
                q = torch.empty(batch, seqlen_q, num_heads_q, model.head_dim, dtype=BF16)
                cache = torch.empty(9, page_size, num_heads_kv, model.head_dim, dtype=BF16)
                triton_attn.paged_attention(q, cache, cache, lens, table, **options)


@pytest.mark.compiled
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("name", "tensor_parallel_size"), [("llama-3-8b", 1), ("deepseek-v3", 1), ("deepseek-v2-lite", 8)]
)
def test_trees_compile_nothing_after_a_warmup(warmed, name, tensor_parallel_size, batch_invariant, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BATCH_INVARIANT", str(int(batch_invariant)))
    functions = ["tree_mask"] if batch_invariant else ["prefix_tree", "tree_mask"]
    kernels = warmed(name, functions=functions, max_seqlen=4096, tensor_parallel_size=tensor_parallel_size)
    model = model_named(name)
    heads = (n // tensor_parallel_size for n in (model.num_heads_q, model.num_heads_kv))
    with record_specializations(ARCH) as met:
        serve_trees(model, *heads, random.Random(0), batch_invariant)
    assert set(met) <= kernels
    assert len(met) >= 4


@pytest.mark.compiled
def test_training_compiles_nothing_after_a_warmup(warmed):
    options = {"sinks": torch.float32, "functions": ["flash_attention_backward"], "max_seqlen": 4096}
    kernels = warmed(num_heads_q=8, num_heads_kv=2, head_dim=64, **options)
    with record_specializations(ARCH) as met:
        for batch, seqlen in ((1, 1), (2, 1000), (3, 4097)):
            q, k, v = (torch.empty(batch, seqlen, n, 64, dtype=BF16, requires_grad=True) for n in (8, 2, 2))
            sinks = torch.empty(8, requires_grad=True)
            out = triton_attn.flash_attention(q, k, v, causal=True, sinks=sinks)
            torch.autograd.grad(out, (q, k, v, sinks), torch.empty_like(out))
    assert set(met) <= kernels
    assert {kernel.name for kernel in met} >= {"_flash_fwd_kernel", "_flash_bwd_delta_kernel"}


def train_on_latents(num_heads, rank, seqlens, **options):
    """Both passes, whole and packed, by both schedules, with chunks of all heads and of some, and with frozen weights
    too."""
    nope, rope, v_dim = 128, 64, 128
    w_uk, w_uv = (torch.empty(num_heads, dim, rank, dtype=BF16) for dim in (nope, v_dim))
    schedules = [dict(mode="fused"), dict(mode="materialized")]
    schedules += [dict(mode="fused", max_workspace_bytes=2**n) for n in (16, 20, 22, 24)]
    variants = itertools.product(schedules, ((1, seqlens[0]), (3, 7), (1, seqlens[1])), (False, True), (False, True))
    for schedule, (batch, seqlen), packed, is_frozen in variants:
        rows = [torch.empty(batch, seqlen, num_heads, nope + rope, dtype=BF16).split([nope, rope], -1)]
        rows += [torch.empty(batch, seqlen, rank + rope, dtype=BF16).split([rank, rope], -1)]
        tensors = [x.detach().requires_grad_() for pair in rows for x in pair]
        lengths = {}
        if packed:
            tensors = [x.detach().flatten(0, 1).requires_grad_() for x in tensors]
            lengths = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), indices(batch + 1))
            lengths |= dict(max_seqlen_q=seqlen, max_seqlen_k=seqlen)
        weights = [x.detach().requires_grad_(not is_frozen) for x in (w_uk, w_uv)]
        outputs = triton_attn.mla_prefill(*tensors, *weights, return_lse=True, **lengths, **schedule, **options)
        for number in (1, 2):
            wanted = [x for x in (*tensors, *weights) if x.requires_grad]
            douts = [torch.empty_like(x) for x in outputs[:number]]
            torch.autograd.grad(outputs[:number], wanted, douts, retain_graph=True)


@pytest.mark.ci(but_each=2)
@pytest.mark.compiled
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("tensor_parallel_size", "arch"), [(1, "sm_90"), (4, "sm_90"), (16, "sm_90"), (1, "sm_80")])
def test_training_on_latent_vectors_compiles_nothing_after_a_warmup(warmed, tensor_parallel_size, arch, deterministic):
    model, functions = model_named("deepseek-v2-lite"), ["mla_prefill_backward"]
    options = dict(tensor_parallel_size=tensor_parallel_size, deterministic=deterministic, max_seqlen=1024)
    kernels = warmed(model.name.lower(), functions=functions, arch=arch, **options)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with record_specializations(arch) as met:
            train_on_latents(model.num_heads_q // tensor_parallel_size, model.kv_lora_rank, (101, 512))
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(met) <= kernels
    counts = Counter(kernel.name for kernel in met)
    assert counts["_mla_prefill_kernel"] >= 4
    assert counts["_flash_bwd_delta_kernel"] == 4, "dense and packed, with a gradient of lse and without"
    assert 2 <= counts["_flash_bwd_dkdv_kernel"] <= 6, "dense and packed, of one head, of a multiple of 16, of others"
    assert (counts["_flash_bwd_dq_kernel"] > 0) == (deterministic or arch == "sm_80")


@pytest.fixture(params=[pytest.param(0, marks=pytest.mark.ci), 1, pytest.param(3, marks=pytest.mark.ci)])
def rank_of_four(request, monkeypatch):
    """A mesh of four ranks, of which this process is one, and messages do not arrive."""
    dist.init_process_group("fake", rank=request.param, world_size=4, store=FakeStore())
    for name in ("agree", "settle"):  # they read what other ranks send
        monkeypatch.setattr(parallel.operators, name, lambda *_: None)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def train_over_ranks(mesh, method, sinks, dropout_p):
    """Both passes over sequences and packed documents of which each rank has a part."""
    options = dict(mesh=mesh, method=method, dropout_p=dropout_p, dropout_seed=0)
    for batch, seqlen, balance in ((1, 40, "head_tail"), (2, 801, None), (1, 4097, None)):
        shares = sharding_of_batch(batch, seqlen, 4, balance).num_rows[mesh.get_local_rank()]
        q, k, v = (torch.empty(shares, n, 64, dtype=BF16, requires_grad=True) for n in (8, 4, 4))
        shared = dict(options, sinks=sinks, load_balance=balance)
        of_batch = [x.unflatten(0, (batch, -1)) for x in (q, k, v)]
        outs = [parallel.context_parallel_attention(*of_batch, seqlen=seqlen, causal=True, **shared)]
        cu_seqlens = torch.tensor([0, seqlen // 3, batch * seqlen], dtype=torch.int32)
        if batch == 1:
            outs.append(
                parallel.context_parallel_attention_varlen(q, k, v, cu_seqlens, seqlen=seqlen, causal=True, **shared)
            )
        for out in outs:
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))


@pytest.mark.compiled
@pytest.mark.parametrize(("sinks", "dropout_p"), [(None, 0.0), (BF16, 0.0), (None, 0.1)])
@pytest.mark.parametrize("method", ["all_gather", "ring", "ulysses"])
def test_context_parallel_training_compiles_nothing_after_a_warmup(warmed, rank_of_four, method, sinks, dropout_p):
    share = 4 if method == "ulysses" else 1
    shape = dict(num_heads_q=8, num_heads_kv=4, head_dim=64, tensor_parallel_size=share, context_parallel_size=4)
    functions = ["flash_attention_backward"]
    kernels = warmed(**shape, sinks=sinks, dropout_p=dropout_p, functions=functions, max_seqlen=4096)
    with record_specializations(ARCH) as met:
        train_over_ranks(rank_of_four, method, sinks and torch.empty(8, dtype=sinks, requires_grad=True), dropout_p)
    assert set(met) <= kernels
    assert {kernel.name for kernel in met} >= {"_flash_fwd_kernel", "_flash_bwd_delta_kernel"}
    assert len(met) > 3


def prefill_over_ranks(model, mesh):
    """Prompts, and packed ones, of which each rank has a part, by each method and schedule."""
    nope, rope, rank = model.head_dim - model.qk_rope_head_dim, model.qk_rope_head_dim, model.kv_lora_rank
    weights = [torch.empty(model.num_heads_q, dim, rank, dtype=BF16) for dim in (nope, 128)]
    placings = (1, 40, "head_tail"), (2, 801, None), (1, 2049, "head_tail"), (1, 4097, None)
    modes = "auto", "fused", "absorbed", "materialized"
    for method, mode, (batch, seqlen, balance) in itertools.product(("all_gather", "ring"), modes, placings):
        num_rows = sharding_of_batch(batch, seqlen, 4, balance).num_rows[mesh.get_local_rank()]
        q = torch.empty(num_rows, model.num_heads_q, nope + rope, dtype=BF16).split([nope, rope], -1)
        rows = *q, *torch.empty(num_rows, rank + rope, dtype=BF16).split([rank, rope], -1)
        options = dict(mesh=mesh, method=method, mode=mode, seqlen=seqlen, load_balance=balance)
        of_batch = [x.unflatten(0, (batch, -1)) for x in rows]
        parallel.context_parallel_mla_prefill(*of_batch, *weights, **options)
        if batch == 1:
            cu_seqlens = torch.tensor([0, seqlen // 3, seqlen], dtype=torch.int32)
            parallel.context_parallel_mla_prefill(*rows, *weights, cu_seqlens=cu_seqlens, **options)


@pytest.mark.compiled
def test_context_parallel_prefill_compiles_nothing_after_a_warmup(warmed, rank_of_four):
    model = model_named("deepseek-v2-lite")
    kernels = warmed(model.name.lower(), context_parallel_size=4, functions=["mla_prefill"], max_seqlen=4096)
    with record_specializations(ARCH) as met:
        prefill_over_ranks(model, rank_of_four)
    assert set(met) <= kernels
    assert len(met) > 3


def train_on_latents_over_ranks(model, mesh, method, is_frozen):
    """Both passes over sequences and packed documents of which each rank has a part."""
    nope, rope, rank = model.head_dim - model.qk_rope_head_dim, model.qk_rope_head_dim, model.kv_lora_rank
    weights = [torch.empty(model.num_heads_q, dim, rank, dtype=BF16) for dim in (nope, 128)]
    weights = [x.requires_grad_(not is_frozen) for x in weights]
    placings = (1, 40, "head_tail"), (2, 81, None), (1, 1027, None)
    for mode, (batch, seqlen, balance) in itertools.product(("fused", "materialized"), placings):
        num_rows = sharding_of_batch(batch, seqlen, 4, balance).num_rows[mesh.get_local_rank()]
        q = torch.empty(num_rows, model.num_heads_q, nope + rope, dtype=BF16).split([nope, rope], -1)
        rows = *q, *torch.empty(num_rows, rank + rope, dtype=BF16).split([rank, rope], -1)
        rows = [x.detach().requires_grad_() for x in rows]
        options = dict(mesh=mesh, method=method, mode=mode, seqlen=seqlen, load_balance=balance, return_lse=True)
        of_batch = [x.unflatten(0, (batch, -1)) for x in rows]
        calls = [parallel.context_parallel_mla_prefill(*of_batch, *weights, **options)]
        if batch == 1:
            cu_seqlens = torch.tensor([0, seqlen // 3, seqlen], dtype=torch.int32)
            calls.append(parallel.context_parallel_mla_prefill(*rows, *weights, cu_seqlens=cu_seqlens, **options))
        for outputs, number in itertools.product(calls, (1, 2)):
            wanted, douts = rows if is_frozen else rows + weights, [torch.empty_like(x) for x in outputs[:number]]
            torch.autograd.grad(outputs[:number], wanted, douts, retain_graph=True)


@pytest.mark.compiled
@pytest.mark.parametrize("is_frozen", [False, pytest.param(True, marks=pytest.mark.ci)])
@pytest.mark.parametrize("method", ["all_gather", "ring", "ulysses"])
def test_context_parallel_training_on_latent_vectors_compiles_nothing(warmed, rank_of_four, method, is_frozen):
    model, share = model_named("deepseek-v2-lite"), 4 if method == "ulysses" else 1
    options = dict(context_parallel_size=4, tensor_parallel_size=share, max_seqlen=4096)
    kernels = warmed(model.name.lower(), functions=["mla_prefill_backward"], **options)
    with record_specializations(ARCH) as met:
        train_on_latents_over_ranks(model, rank_of_four, method, is_frozen)
    assert set(met) <= kernels
    assert {kernel.name for kernel in met} >= {
        "_mla_prefill_kernel",
        "_flash_bwd_delta_kernel",
        "_flash_bwd_dkdv_kernel",
    }


def decode_over_ranks(model, mesh, rng, interleave, has_tree):
    """Decode steps and chunks of prompts, or trees of drafts, over caches of which each rank has some keys."""
    is_latent = model.kv_lora_rank is not None
    for _ in range(30):
        batch, width, seqlen_q = rng.randint(1, 64), rng.randint(1, 200), rng.choice([1, rng.randint(1, 8)])
        places = indices(batch), indices(batch, width)
        own = {}
        if has_tree:
            seqlen_q = rng.randint(1, 64)
            own = dict(tree_mask=indices(batch, seqlen_q, dtype=torch.int64))
        options = dict(mesh=mesh, interleave=interleave, heads=rng.choice(["replicated", "scattered", "sharded"]))
        num_heads = model.num_heads_q // (4 if options["heads"] == "sharded" else 1)
        if is_latent:
            nope, rope, rank = model.head_dim - model.qk_rope_head_dim, model.qk_rope_head_dim, model.kv_lora_rank
            q = torch.empty(batch, seqlen_q, num_heads, nope + rope, dtype=BF16).split([nope, rope], -1)
            cache = torch.empty(9, 64, rank + rope, dtype=BF16)
            weights = (torch.empty(num_heads, dim, rank, dtype=BF16) for dim in (nope, 128))
            parallel.context_parallel_mla_decode(*q, cache, *places, *weights, **own, **options)
        else:
            sinks = torch.empty(model.num_heads_q, dtype=BF16) if model.sinks else None
            q = torch.empty(batch, seqlen_q, num_heads, model.head_dim, dtype=BF16)
            cache = torch.empty(9, 16, model.num_heads_kv, model.head_dim, dtype=BF16)
            parallel.context_parallel_paged_attention(q, cache, cache, *places, sinks=sinks, **own, **options)


@pytest.mark.compiled
@pytest.mark.parametrize(("interleave", "has_tree"), [(1, False), (16, False), (16, True)])
@pytest.mark.parametrize("name", ["llama-3-8b", "gpt-oss-120b", "deepseek-v2-lite"])
def test_context_parallel_decode_compiles_nothing_after_a_warmup(warmed, rank_of_four, name, interleave, has_tree):
    model = model_named(name)
    function = "tree_mask" if has_tree else "mla_decode" if model.kv_lora_rank else "paged_attention"
    sizes = dict(context_parallel_size=4, interleave=interleave, window_size=(-1, -1) if model.window else None)
    kernels = warmed(name, functions=[function], max_seqlen=4096, **sizes)
    with record_specializations(ARCH) as met:
        decode_over_ranks(model, rank_of_four, random.Random(0), interleave, has_tree)
    assert set(met) <= kernels
    assert len(met) > 3


@pytest.mark.compiled
def test_what_was_not_warmed_up_is_noticed(warmed):
    """The comparison above can fail: another head dimension has other kernels."""
    kernels = warmed(num_heads_q=4, head_dim=64, functions=["flash_attention"], max_seqlen=16)
    with record_specializations(ARCH) as met:
        triton_attn.flash_attention(*[torch.empty(1, 16, 4, 32, dtype=BF16)] * 3, causal=True)
    assert not set(met) & kernels


CALLS = """
    import torch, triton, triton_attn
    from triton_attn.toolchain import compile_only

    hits = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    with compile_only("sm_80"):
        for seqlen in (1, 7, 100):
            q, k, v = (torch.empty(2, seqlen, n, 32, dtype=torch.float16) for n in (4, 2, 2))
            triton_attn.flash_attention(q, k, v, causal=True)
    assert hits == [{expected}], hits
"""


@pytest.mark.ci
@pytest.mark.compiled
def test_another_process_finds_the_kernels_on_disk(tmp_path):
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}

    def call(expected):
        source = textwrap.dedent(CALLS.format(expected=expected))
        subprocess.run([sys.executable, "-c", source], env=env, check=True)

    command = "--num-heads-q 4 --num-heads-kv 2 --head-dim 32 --dtype float16 --arch sm_80 --max-seqlen 16"
    command = [sys.executable, "-m", "triton_attn", "warmup", *command.split(), "--functions", "flash_attention"]
    first, second = (
        subprocess.run([*command, "--num-workers", n], env=env, check=True, capture_output=True, text=True).stdout
        for n in ("2", "1")
    )
    assert "1/2 _flash_fwd_kernel: " in first
    assert "2 kernels compiled, 0 in the cache" in first
    assert "2/2 _flash_fwd_kernel: in the cache" in second
    assert "0 kernels compiled, 2 in the cache" in second
    call(True)
    env["TRITON_CACHE_DIR"] = str(tmp_path / "empty")
    call(False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "gpt-2"}, ValueError, "model: expected llama-2-7b or"),
        ({}, TypeError, "num_heads_q: expected an int, got NoneType"),
        ({"num_heads_q": 4, "head_dim": 0}, ValueError, "head_dim: expected 1 or more, got 0"),
        ({"model": "llama-3-8b", "tensor_parallel_size": 5}, ValueError, "tensor_parallel_size: expected a divisor"),
        ({"model": "llama-3-8b", "dtype": torch.int8}, TypeError, "dtype: expected float16, bfloat16 or float32"),
        ({"model": "llama-3-8b", "kv_cache_dtype": torch.float32}, TypeError, "kv_cache_dtype: expected torch.bfl"),
        ({"model": "llama-3-8b", "functions": ["mla_decode"]}, ValueError, "functions: expected some of flash_att"),
        ({"model": "llama-3-8b", "functions": "flash_attention"}, TypeError, "functions: expected a list of names"),
        ({"model": "llama-3-8b", "page_size": 0, "functions": ["append_kv_cache"]}, ValueError, "page_size: expec"),
        ({"model": "llama-3-8b", "num_workers": 0}, ValueError, "num_workers: expected 1 or more, got 0"),
        ({"model": "llama-3-8b", "context_parallel_size": 0}, ValueError, "context_parallel_size: expected 1 or more"),
        (
            {"model": "llama-3-8b", "interleave": 3},
            ValueError,
            "interleave: expected an interleave that divides the 16",
        ),
        ({"model": "llama-3-8b", "window_size": 5}, TypeError, "window_size: expected a pair"),
        (
            {"model": "gpt-oss-120b", "sinks": 1},
            TypeError,
            "sinks: expected a bool, torch.bfloat16 or torch.float32, got i",
        ),
        (
            {"model": "gpt-oss-120b", "sinks": torch.float16},
            TypeError,
            "sinks: expected a bool, torch.bfloat16 or torc",
        ),
        ({"model": "deepseek-v3", "window_size": (9, 0)}, ValueError, "window_size: expected none, since MLA's"),
        ({"model": "deepseek-v3", "softcap": 5.0}, ValueError, "softcap: expected none, since MLA's functions"),
        ({"model": "deepseek-v3", "sinks": True}, ValueError, "sinks: expected none, since MLA's functions"),
        ({"model": "deepseek-v3", "alibi": True}, ValueError, "alibi: expected none, since MLA's functions"),
        ({"model": "deepseek-v3", "dropout_p": 0.1}, ValueError, "dropout_p: expected none, since MLA's functions"),
        ({"num_heads_q": 4, "head_dim": 64, "kv_lora_rank": 512}, TypeError, "kv_lora_rank, qk_rope_head_dim: exp"),
    ],
)
def test_bad_arguments_are_named_before_anything_happens(options, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        triton_attn.warmup(arch="sm_99", **options)


@pytest.mark.ci
@pytest.mark.compiled
def test_processes_choose_as_the_first_does(tmp_path, monkeypatch):
    """Child processes do not see a table set by the user in Python, nor the precision of fp32 matmuls."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    taken = []
    monkeypatch.setattr(compilation, "settings", lambda: taken.append("tables") or ([], {}))
    torch.set_float32_matmul_precision("high")
    try:
        shape = dict(num_heads_q=2, head_dim=32, dtype=torch.float32, max_seqlen=1)
        result = triton_attn.warmup(**shape, functions=["flash_attention"], arch="sm_80", num_workers=2)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert taken == ["tables"]
    assert result.compiled == 2, "with lse and without"


@pytest.mark.compiled
def test_what_a_process_does_not_meet_is_an_error(monkeypatch):
    monkeypatch.setattr(compilation, "_compile_task", lambda task: [])
    with pytest.raises(RuntimeError, match=r"2 of 2 kernels were not found again"):
        triton_attn.warmup(num_heads_q=2, head_dim=32, functions=["flash_attention"], arch="sm_80", max_seqlen=1)


@pytest.mark.compiled
def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"arch: expected sm_80, .*, got 'sm_99'"):
        triton_attn.warmup("llama-3-8b", arch="sm_99")


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled")
def test_an_interpreting_process_compiles_nothing():
    with pytest.raises(RuntimeError, match="a process without TRITON_INTERPRET"):
        triton_attn.warmup("llama-3-8b", arch="sm_90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_architecture_must_be_given():
    with pytest.raises(RuntimeError, match="arch: there is no GPU here"):
        triton_attn.warmup("llama-3-8b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["warm"], "invalid choice: 'warm'"),
        (["warmup", "--arch", "sm_90"], "error: num_heads_q: expected an int, got NoneType"),
        (["warmup", "--model", "gpt-2", "--arch", "sm_90"], "error: model: expected llama-2-7b or"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code != 0
    assert said in capsys.readouterr().err + str(end.value.code)


def test_help_describes_the_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["warmup", "--help"])
    said = capsys.readouterr().out
    assert "usage: python -m triton_attn warmup" in said
    names = inspect.signature(triton_attn.warmup).parameters.keys() - {"report"}
    assert [name for name in names if f"--{name.replace('_', '-')}" not in said] == []
