"""A call like an earlier one finds its checks and plans by its layout: wrong neighbours of it must still raise."""

import functools
import gc
import itertools
import shutil
import weakref
from unittest import mock

import pytest
import torch
from alike import checked_alike
from host_cost import bare_launches, python_calls, real_launcher
from plans import launches_of
from prefix_trees import tree_of_all
from triton.runtime.jit import JITFunction

from triton_attn import (
    flash_attention,
    flash_attention_varlen,
    merge_attention,
    mla_decode,
    mla_prefill,
    paged_attention,
)
from triton_attn._host.tuned import forget_plans
from triton_attn.flash import forward as flash_forward
from triton_attn.merge import kernel as merge_kernel
from triton_attn.mla import absorbed, prefill, projections
from triton_attn.mla.api import DecodeCall
from triton_attn.paged import forward as paged_forward
from triton_attn.toolchain import compile_only

pytestmark = [pytest.mark.compiled, pytest.mark.oldest]

BF16 = torch.bfloat16
MODULES = flash_forward, merge_kernel, absorbed, prefill, projections, paged_forward


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


def spread(x):
    """With another stride in the last dimension."""
    return torch.empty(*x.shape, 2, dtype=x.dtype)[..., 0]


def needs_gradient(x):
    return x.clone().requires_grad_()


ROOM = dict(num_splits=3, workspace=torch.empty(2**17, dtype=torch.uint8))
DECODE = dict(
    q_nope=torch.empty(2, 1, 16, 64, dtype=BF16),
    q_pe=torch.empty(2, 1, 16, 32, dtype=BF16),
    latent_cache=torch.empty(4, 16, 96, dtype=BF16),
    cache_seqlens=int32(2),
    block_table=int32(2, 3),
    softmax_scale=0.1,
)
BYTES = dict(q_nope=torch.empty(2, 1, 16, 128, dtype=BF16), latent_cache=torch.zeros(4, 16, 196, dtype=torch.uint8))
UNALIGNED = torch.zeros(4 * 16 * 196 + 1, dtype=torch.uint8)[1:].view(4, 16, 196)
FLOAT8 = dict(latent_cache=DECODE["latent_cache"].to(torch.float8_e4m3fn))
PREFILL = dict(
    q_nope=torch.empty(2, 8, 4, 64, dtype=BF16),
    q_pe=torch.empty(2, 8, 4, 32, dtype=BF16),
    kv_latent=torch.empty(2, 8, 64, dtype=BF16),
    k_pe=torch.empty(2, 8, 32, dtype=BF16),
    w_uk=torch.empty(4, 64, 64, dtype=BF16),
    w_uv=torch.empty(4, 48, 64, dtype=BF16),
    mode="fused",
)
PACKED = {name: PREFILL[name].flatten(0, 1) for name in ("q_nope", "q_pe", "kv_latent", "k_pe")}
PACKED |= dict(cu_seqlens_q=int32(3), cu_seqlens_k=int32(3), max_seqlen_q=8, max_seqlen_k=8)
MERGE = dict(outs=torch.empty(3, 2, 1, 4, 64, dtype=BF16), lses=torch.empty(3, 2, 4, 1))
PAGED = dict(
    q=torch.empty(2, 1, 8, 64, dtype=BF16),
    k_cache=torch.empty(4, 16, 2, 64, dtype=BF16),
    v_cache=torch.empty(4, 16, 2, 64, dtype=BF16),
    cache_seqlens=int32(2),
    block_table=int32(2, 3),
)
QUANTIZED = {name: PAGED[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
FLASH = {name: torch.empty(2, 8, heads, 64, dtype=BF16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
OUT = dict(out=torch.empty(2, 8, 4, 64, dtype=BF16))
VARLEN = {name: x.flatten(0, 1) for name, x in FLASH.items()}
VARLEN |= dict(cu_seqlens_q=int32(3), cu_seqlens_k=int32(3), max_seqlen_q=8, max_seqlen_k=8)


def tensors_of(arguments):
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def neighbours(function, base, *, differentiable=False, right=(), **wrong):
    """(function, right arguments, wrong arguments) by name; each tensor of base has another stride, dtype, shape and
    type, and requires a gradient. right: those of these changes that are no mistakes."""
    changes = {"strides": spread, "dtype": lambda x: x.to(torch.complex64), "shape": lambda x: x[..., :-1]}
    changes |= {"no tensor": lambda x: x.tolist()}
    if not differentiable:
        changes["gradient"] = needs_gradient
    found = {}
    for what, change in changes.items():
        for name, x in tensors_of(base).items():
            if f"{what} of {name}" not in right and (what != "gradient" or x.is_floating_point()):
                found[f"{function.__name__}, {what} of {name}"] = function, base, base | {name: change(x)}
    for name, (more, other) in wrong.items():
        found[f"{function.__name__}, {name}"] = function, base | more, base | more | other
    return found


CALLS = {
    **neighbours(
        mla_decode,
        DECODE,
        right={"shape of block_table"},
        scale=({}, dict(softmax_scale=-0.1)),
        no_scale=({}, dict(softmax_scale=None)),
        int_for_a_bool=(dict(causal=True), dict(causal=1)),
        bool_for_an_int=(dict(num_splits=1), dict(num_splits=True)),
        negative_splits=(dict(num_splits=1), dict(num_splits=-1)),
        address=(BYTES, dict(latent_cache=UNALIGNED)),
        factor=(FLOAT8 | dict(k_scale=1.0), dict(k_scale=True)),
        negative_factor=(FLOAT8 | dict(k_scale=0.5), dict(k_scale=-0.5)),
        factor_of_rotary_keys=(FLOAT8 | dict(k_scale=0.5), dict(k_pe_scale=0.0)),
        out=(dict(out=torch.empty(2, 1, 16, 64, dtype=BF16)), dict(out=torch.empty(2, 1, 16, 32, dtype=BF16))),
        lse=(dict(lse=torch.empty(2, 16, 1), return_lse=True), dict(return_lse=False)),
        workspace=(dict(num_splits=4), dict(workspace=torch.empty(16, dtype=torch.uint8))),
        dtype_of_workspace=(ROOM, dict(workspace=torch.empty(2**17, dtype=torch.int8))),
        strides_of_workspace=(ROOM, dict(workspace=spread(ROOM["workspace"]))),
        key_shard=(dict(key_shard=(0, 2, 1)), dict(key_shard=(2, 2, 1))),
        batch_invariant=(dict(batch_invariant=True), dict(num_splits=2)),
        lengths=({}, dict(cache_seqlens=int32(2) + 1000, check_values=True)),
        check_values=({}, dict(check_values=1)),
    ),
    **neighbours(
        mla_prefill,
        PREFILL,
        differentiable=True,
        mode=({}, dict(mode="other")),
        gradient_of_absorbed=(dict(mode="absorbed"), dict(q_nope=needs_gradient(PREFILL["q_nope"]))),
        int_for_a_bool=(dict(causal=True), dict(causal=1)),
        room=(dict(mode="absorbed"), dict(max_workspace_bytes=1)),
        max_seqlen_q=({}, dict(max_seqlen_q=7)),
        packed=(PACKED, dict(cu_seqlens_k=None)),
        packed_longest=(PACKED, dict(max_seqlen_k=-1)),
        packed_values=(PACKED, dict(cu_seqlens_q=int32(3) + 9, check_values=True)),
    ),
    **neighbours(merge_attention, MERGE, right={"strides of lses", "shape of outs"}),
    **neighbours(
        paged_attention,
        PAGED,
        right={"shape of v_cache", "shape of block_table"},
        scale=({}, dict(softmax_scale=-0.1)),
        window=(dict(window_size=(8, 0)), dict(window_size=(8, -2))),
        list_of_a_window=(dict(window_size=(8, 0)), dict(window_size=[8, 0, 1])),
        int_for_a_bool=(dict(causal=True), dict(causal=1)),
        bool_for_an_int=(dict(num_splits=1), dict(num_splits=True)),
        factor=(QUANTIZED | dict(k_scale=1.0), dict(k_scale=True)),
        negative_factor=(QUANTIZED | dict(v_scale=0.5), dict(v_scale=-0.5)),
        out=(dict(out=torch.empty(2, 1, 8, 64, dtype=BF16)), dict(out=torch.empty(2, 1, 8, 32, dtype=BF16))),
        lse=(dict(lse=torch.empty(2, 8, 1), return_lse=True), dict(return_lse=False)),
        workspace=(ROOM, dict(workspace=torch.empty(16, dtype=torch.uint8))),
        dtype_of_workspace=(ROOM, dict(workspace=torch.empty(2**17, dtype=torch.int8))),
        strides_of_workspace=(ROOM, dict(workspace=spread(ROOM["workspace"]))),
        address_of_workspace=(ROOM, dict(workspace=torch.empty(2**17 + 1, dtype=torch.uint8)[1:])),
        splits_of_workspace=(ROOM, dict(num_splits=64)),
        key_shard=(dict(key_shard=(0, 2, 1)), dict(key_shard=(2, 2, 1))),
        bool_in_a_key_shard=(dict(key_shard=(0, 2, 1)), dict(key_shard=(0, 2, True))),
        batch_invariant=(dict(batch_invariant=True), dict(num_splits=2)),
        prefix_tree=(dict(prefix_tree=tree_of_all(2, 1)), dict(prefix_tree=tree_of_all(3, 1))),
        sinks=(dict(sinks=torch.empty(8)), dict(sinks=torch.empty(7))),
        max_seqlen_q=({}, dict(max_seqlen_q=2)),
        tree_mask=(dict(tree_mask=torch.zeros(2, 1, dtype=torch.int64)), dict(tree_mask=int32(2, 1))),
        lengths=({}, dict(cache_seqlens=int32(2) + 1000, check_values=True)),
        check_values=({}, dict(check_values=1)),
    ),
    **neighbours(
        flash_attention,
        FLASH,
        differentiable=True,
        right={"shape of v"},
        scale=({}, dict(softmax_scale=-0.1)),
        window=(dict(window_size=(8, 0)), dict(window_size=(8, -2))),
        int_for_a_bool=(dict(causal=True), dict(causal=1)),
        dropout=(dict(dropout_p=0.5, dropout_seed=1), dict(dropout_p=1.5)),
        out=(OUT, dict(out=torch.empty(2, 8, 4, 32, dtype=BF16))),
        strides_of_out=(OUT, dict(out=spread(OUT["out"]))),
        gradient_with_out=(OUT, dict(k=needs_gradient(FLASH["k"]))),
        sinks=(dict(sinks=torch.empty(4)), dict(sinks=torch.empty(3))),
    ),
    **neighbours(
        flash_attention_varlen,
        VARLEN,
        differentiable=True,
        right={"shape of v"},
        longest=({}, dict(max_seqlen_q=-1)),
        values=({}, dict(cu_seqlens_q=int32(3) + 9, check_values=True)),
    ),
}


@pytest.fixture(autouse=True)
def portable_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_KERNELS", "portable")


@pytest.mark.parametrize("what", CALLS)
def test_a_known_call_hides_no_error(what):
    """A wrong call says the same, and launches nothing, whether calls like it are known or not."""
    function, right, wrong = CALLS[what]
    said = []
    for is_known in (False, True):
        forget_plans()
        if is_known:
            first = launches_of(functools.partial(function, **right), MODULES)
            assert first == launches_of(functools.partial(function, **right), MODULES) != []
        with compile_only("sm_90") as launches, pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
            function(**wrong)
        assert not launches
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def unaligned(x):
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


WEIGHTS = dict(
    q_nope=torch.empty(2, 1, 16, 32, dtype=BF16),
    w_uk=torch.empty(16, 32, 64, dtype=BF16),
    w_uv=torch.empty(16, 48, 64, dtype=BF16),
)
TREE = dict(prefix_tree=tree_of_all(2, 1))
MASK = dict(tree_mask=torch.zeros(2, 1, dtype=torch.int64))
IN_CHUNKS = dict(kv_latent=torch.empty(2, 210, 64, dtype=BF16), k_pe=torch.empty(2, 210, 32, dtype=BF16))
# Of 136 rows, so that the start of the third chunk is a multiple of 16, but not that of the second.
IN_CHUNKS |= dict(mode="materialized", max_workspace_bytes=34000)
DENSE_FORMS = (
    {},
    dict(sinks=torch.ones(4), alibi_slopes=torch.ones(4)),
    dict(sinks=torch.ones(4, dtype=BF16), alibi_slopes=torch.ones(2, 4)),
    dict(alibi_slopes=torch.ones(4, 2).mT),
    dict(dropout_p=0.1, dropout_seed=1),
    dict(dropout_p=0.5, dropout_seed=1),
)
DENSE_OPTIONS = ({}, dict(causal=True), dict(window_size=(3, 0), softcap=30.0), dict(shard=int32(2, 3)))
# Forms of calls, each beside all others, with and without a number as a scale.
FORMS = {
    flash_attention: (
        FLASH,
        DENSE_FORMS,
        (*DENSE_OPTIONS, OUT, dict(out=OUT["out"].view(2, 4, 8, 64).transpose(1, 2))),
    ),
    flash_attention_varlen: (
        VARLEN,
        DENSE_FORMS,
        (*DENSE_OPTIONS, dict(max_seqlen_q=4), dict(out=torch.empty(16, 6, 64, dtype=BF16)[:, 1:5])),
    ),
    mla_decode: (
        DECODE,
        ({}, WEIGHTS, FLOAT8 | dict(k_scale=0.5), FLOAT8 | dict(k_scale=torch.ones(1)), FLOAT8 | dict(k_pe_scale=0.5)),
        ({}, dict(num_splits=3), dict(batch_invariant=True), dict(key_shard=(0, 2, 1)), TREE, MASK),
    ),
    mla_prefill: (
        PREFILL,
        ({}, PACKED, dict(mode="absorbed"), dict(mode="absorbed", max_workspace_bytes=2**16), IN_CHUNKS),
        ({},),
    ),
    merge_attention: (MERGE, ({}, dict(outs=torch.empty(3, 2, 1, 4, 64))), ({},)),
    paged_attention: (
        PAGED,
        (
            {},
            QUANTIZED | dict(k_scale=0.5, v_scale=torch.ones(2)),
            QUANTIZED | dict(k_scale=torch.ones(1), v_scale=0.5),
            QUANTIZED | dict(k_scale=torch.ones(4, 16, 2)),
            dict(sinks=torch.ones(8), alibi_slopes=torch.ones(2, 8), softcap=30.0),
            dict(alibi_slopes=torch.ones(8)),
        ),
        ({}, ROOM, dict(batch_invariant=True), dict(key_shard=(0, 2, 1)), TREE, MASK),
    ),
}


@pytest.mark.parametrize("function", FORMS, ids=lambda function: function.__name__)
def test_launches_that_say_they_are_alike_are_alike(function):
    """Known calls in every form, with tensors at any address. Nothing is compiled: keys alone are compared."""
    base, forms, others = FORMS[function]
    forget_plans()
    without_jit = mock.patch.object(JITFunction, "run")
    with compile_only("sm_90"), without_jit, checked_alike() as seen, torch.no_grad():
        for form, more in itertools.product(forms, others):
            arguments = base | form | more
            for return_lse in (False, True) if function is not merge_attention else (None,):
                options = {} if return_lse is None else dict(return_lse=return_lse)
                for name in (None, *tensors_of(base)):
                    moved = {} if name is None else {name: unaligned(arguments[name])}
                    for _ in range(2):
                        function(**arguments | moved | options)
    assert len(seen) > 2 * len(forms)


@pytest.mark.parametrize("function", [flash_attention, flash_attention_varlen, mla_prefill], ids=lambda x: x.__name__)
def test_launches_of_gradients_that_say_they_are_alike_are_alike(function):
    """Of each set of inputs, in every form."""
    base, forms, others = FORMS[function]
    forget_plans()
    with compile_only("sm_90"), mock.patch.object(JITFunction, "run"), checked_alike() as seen:
        for form, more in itertools.product(forms, others):
            arguments = base | form | more
            if arguments.get("mode") == "absorbed" or "out" in arguments:  # have no gradients
                continue
            inputs = [name for name, x in tensors_of(base | form).items() if x.is_floating_point()]
            inputs = [name for name in inputs if name != "alibi_slopes"]
            for wanted, deterministic in itertools.product((inputs, inputs[:1], inputs[1:3]), (False, True)):
                leaves = {name: needs_gradient(arguments[name]) for name in wanted}
                options = dict(deterministic=True) if deterministic and function is not mla_prefill else {}
                for return_lse in (False, True):
                    found = function(**arguments | leaves | options, return_lse=return_lse)
                    sums = sum(x.sum() for x in found) if return_lse else found.sum()
                    torch.autograd.grad(sums, [*leaves.values()])
    assert len(seen) >= 6


def test_an_lse_that_is_wanted_is_no_matter_of_layouts():
    """The operator of `mla_decode` has one plan for calls with and without it: their merges are not alike."""
    out, lse = torch.empty(2, 1, 16, 64, dtype=BF16), torch.empty(2, 16, 1)
    without_jit = mock.patch.object(JITFunction, "run")
    with compile_only("sm_90"), without_jit as launches, checked_alike() as seen:
        for wanted in (lse, None, lse, None):
            absorbed.launch_mla_decode(DecodeCall(**DECODE, num_splits=3), out, wanted)
    assert launches.call_count == 8
    assert len(seen) == 3


@pytest.mark.parametrize("variable", ["TRITON_ATTN_BATCH_INVARIANT", "TRITON_ATTN_CHECK"])
def test_a_known_decode_follows_the_environment(variable, monkeypatch):
    call = functools.partial(paged_attention, **PAGED | dict(cache_seqlens=int32(2) + 1000, num_splits=0))

    def outcome():
        try:
            return launches_of(call, MODULES)
        except ValueError as error:
            return str(error)

    with monkeypatch.context() as patch:
        forget_plans()
        patch.setenv(variable, "1")
        expected = outcome()
    forget_plans()
    before = outcome()
    assert outcome() == before != expected
    with monkeypatch.context() as patch:
        patch.setenv(variable, "1")
        assert outcome() == expected
    assert outcome() == before


def test_a_known_decode_runs_the_reference_where_it_is_wanted(monkeypatch):
    with compile_only("sm_90", every_launch=True) as launches:
        for _ in range(2):
            paged_attention(**PAGED, num_splits=1)
        with monkeypatch.context() as patch:  # undone within compile_only, which sets it too
            patch.setenv("TRITON_ATTN_BACKEND", "reference")
            paged_attention(**PAGED, num_splits=1)
    assert len(launches) == 2


def test_a_known_decode_holds_no_tensor():
    arguments = {name: x.clone() for name, x in (PAGED | ROOM).items() if isinstance(x, torch.Tensor)}
    arguments["prefix_tree"] = tree_of_all(2, 1)
    held = [weakref.ref(x) for x in (*arguments.values(), arguments["prefix_tree"].memory) if torch.is_tensor(x)]
    with compile_only("sm_90"):
        for _ in range(3):
            paged_attention(**arguments, num_splits=3)
    del arguments
    gc.collect()
    assert not any(ref() is not None for ref in held)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as Triton's launcher does on a GPU")
@pytest.mark.parametrize(("mode", "most"), [("fused", 17), ("absorbed", 23), ("materialized", 38)])
def test_python_calls_of_a_known_prefill(mode, most, monkeypatch):
    """Calls of Python functions besides those of bare launches, of which Triton 3.6.0 makes fewer; matmuls of
    "materialized" are not made."""
    monkeypatch.setattr(torch, "bmm", lambda a, b, out: out)
    call = functools.partial(mla_prefill, **PREFILL | dict(mode=mode))
    with real_launcher("sm_90"):
        call()
        launch = bare_launches(call, MODULES)
        extra_calls = python_calls(call) - python_calls(launch)
    assert extra_calls <= most
