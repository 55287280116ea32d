"""Every public function under all of torch's transforms of a call: supported, or refused at the call.

Derivatives of each kind, torch.func, vmap, meta and fake tensors, torch.compile, export, autocast.
"""

import contextlib
import functools
import os
import re
from typing import NamedTuple

import pytest
import torch
from prefix_trees import tree_of
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map_only

import triton_attn
from triton_attn import (
    append_kv_cache,
    append_latent_cache,
    copy_kv_pages,
    flash_attention,
    flash_attention_varlen,
    gather_kv_cache,
    gather_latent_cache,
    merge_attention,
    mla_decode,
    mla_prefill,
    paged_attention,
)
from triton_attn._host.latent import read_latent_cache
from triton_attn.interop import flash_mla, flashinfer
from triton_attn.interop.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from triton_attn.interop.flash_mla import flash_mla_with_kvcache

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
PAGE, HEADS, HEADS_KV, DIM, RANK, ROPE = 4, 2, 1, 16, 32, 8


def randn(*shape):
    return torch.randn(shape, device=DEVICE)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def cache():
    return randn(6, PAGE, HEADS_KV, DIM)


def tables():
    return {"cache_seqlens": int32(5, 3), "block_table": int32(2, 0, 4, 1).view(2, 2)}


def packed(max_seqlen=int):
    bounds = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), int32(0, 2, 5))
    return bounds | {name: 3 if max_seqlen is int else max_seqlen(3) for name in ("max_seqlen_q", "max_seqlen_k")}


def rope(width):
    return {"rope_cos": randn(9, width // 2), "rope_sin": randn(9, width // 2)}


def slots():
    return {"slot_mapping": torch.tensor([9, 2, -1, 23, 4], device=DEVICE)}


def mla_queries(width):
    return {"q_nope": randn(2, 1, HEADS, width), "q_pe": randn(2, 1, HEADS, ROPE)}


def mla_weights():
    return {"w_uk": randn(HEADS, DIM, RANK) / RANK**0.5, "w_uv": randn(HEADS, DIM, RANK) / RANK**0.5}


def mla_inputs(*rows):
    queries = {"q_nope": randn(*rows, HEADS, DIM), "q_pe": randn(*rows, HEADS, ROPE)}
    return queries | {"kv_latent": randn(*rows, RANK), "k_pe": randn(*rows, ROPE)} | mla_weights()


def qkv(*rows, **more):
    return {"q": randn(*rows, HEADS, DIM), "k": randn(*rows, HEADS_KV, DIM), "v": randn(*rows, HEADS_KV, DIM)} | more


def caches(**more):
    return {"k_cache": cache(), "v_cache": cache()} | more


def plus_tensor(n):
    return int32(n)[0]


NAMES_OF_FLASH_MLA = "cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo", "max_seqlen_kv"


def two_states():
    v, s = randn(2, 4, HEADS, DIM).unbind(), randn(2, 4, HEADS).unbind()
    return {"v_a": v[0], "s_a": s[0], "v_b": v[1], "s_b": s[1]}


def merge_state_in_place(v_a, s_a, v_b, s_b, mask):
    flashinfer.merge_state_in_place(v_a, s_a, v_b, s_b, mask)


def page_lists():
    """New keys of two sequences, in FlashInfer's lists of pages."""
    new = {"batch_indices": int32(0, 0, 1, 1, -1), "positions": int32(3, 4, 1, 2, 0)}
    return new | {"kv_indices": int32(2, 0, 4), "kv_indptr": int32(0, 2, 3), "kv_last_page_len": int32(1, 3)}


class Case(NamedTuple):
    """A call with these arguments. `trained`: one has a gradient. `written`: names of the arguments that it writes."""

    function: object
    arguments: object
    trained: bool = False
    written: tuple = ()

    def __call__(self, arguments):
        return self.function(**arguments)


CASES = {
    "flash_attention": Case(flash_attention, lambda: qkv(2, 5, return_lse=True, sinks=randn(HEADS)), trained=True),
    "flash_attention, into a tensor": Case(
        flash_attention, lambda: qkv(2, 5, out=randn(2, 5, HEADS, DIM), return_lse=True), written=("out",)
    ),
    "flash_attention_varlen": Case(
        flash_attention_varlen, lambda: qkv(5, **packed(), causal=True, return_lse=True), trained=True
    ),
    "flash_attention_varlen, max_seqlen in a tensor": Case(
        flash_attention_varlen, lambda: qkv(5, **packed(plus_tensor)), trained=True
    ),
    "flash_attention_varlen, dropout": Case(
        flash_attention_varlen,
        lambda: qkv(
            5, **packed(), dropout_p=0.5, dropout_seed=torch.tensor(3, device=DEVICE), alibi_slopes=randn(2, HEADS)
        ),
        trained=True,
    ),
    "paged_attention": Case(
        paged_attention,
        lambda: caches(q=randn(2, 1, HEADS, DIM), **tables(), k_scale=0.5, alibi_slopes=randn(HEADS), return_lse=True),
    ),
    "paged_attention, varlen": Case(
        paged_attention,
        lambda: caches(
            q=randn(3, HEADS, DIM),
            **tables(),
            cu_seqlens_q=int32(0, 2, 3),
            max_seqlen_q=plus_tensor(2),
            k_scale=randn(HEADS_KV).abs(),
            prefix_tree=tree_of([[3, 1], [3, 2]], (2, 1), DEVICE),
            num_splits=2,
        ),
    ),
    "paged_attention, into a tensor": Case(
        paged_attention,
        lambda: caches(q=randn(2, 1, HEADS, DIM), **tables(), out=randn(2, 1, HEADS, DIM)),
        written=("out",),
    ),
    "merge_attention": Case(
        merge_attention, lambda: {"outs": randn(3, 1, 4, HEADS, DIM), "lses": randn(3, 1, HEADS, 4)}
    ),
    "mla_decode": Case(
        mla_decode,
        lambda: (
            mla_queries(DIM) | tables() | mla_weights() | rope(ROPE) | {"latent_cache": randn(6, PAGE, RANK + ROPE)}
        ),
    ),
    "mla_decode of absorbed queries": Case(
        mla_decode,
        lambda: (
            mla_queries(RANK)
            | tables()
            | {"latent_cache": randn(6, PAGE, RANK + ROPE), "softmax_scale": 0.2, "return_lse": True}
        ),
    ),
    "mla_decode, packed, over two caches": Case(
        mla_decode,
        lambda: (
            {name: x[:, 0] for name, x in mla_queries(RANK).items()}
            | tables()
            | {"cu_seqlens_q": torch.arange(3, dtype=torch.int32, device=DEVICE), "max_seqlen_q": 1}
            | {"latent_cache": randn(6, PAGE, RANK), "rope_cache": randn(6, PAGE, ROPE), "softmax_scale": 0.2}
        ),
    ),
    "mla_decode, packed, with weights": Case(
        mla_decode,
        lambda: (
            {name: x[:, 0] for name, x in mla_queries(DIM).items()}
            | tables()
            | mla_weights()
            | {"cu_seqlens_q": int32(0, 1, 2), "max_seqlen_q": plus_tensor(1), "num_splits": 2, "return_lse": True}
            | {"latent_cache": randn(6, PAGE, RANK + ROPE)}
        ),
    ),
    "mla_decode over fp8": Case(
        mla_decode,
        lambda: (
            {"q_nope": randn(2, 1, HEADS, 128), "q_pe": randn(2, 1, HEADS, ROPE), "softmax_scale": 0.2}
            | tables()
            | {"latent_cache": torch.zeros(6, PAGE, 132 + 2 * ROPE, dtype=torch.uint8, device=DEVICE)}
        ),
    ),
    "mla_prefill": Case(mla_prefill, lambda: mla_inputs(2, 5) | {"return_lse": True}, trained=True),
    "mla_prefill, packed": Case(mla_prefill, lambda: mla_inputs(5) | packed() | {"mode": "materialized"}, trained=True),
    "append_kv_cache": Case(
        append_kv_cache,
        lambda: caches(
            k=randn(5, HEADS_KV, DIM),
            v=randn(5, HEADS_KV, DIM),
            positions=int32(3, 1, 0, 8, 2),
            k_scale=2,
            v_scale=randn(1).abs(),
            **rope(DIM),
            **slots(),
        ),
        written=("k_cache", "v_cache"),
    ),
    "append_latent_cache": Case(
        append_latent_cache,
        lambda: (
            {"kv_latent": randn(5, RANK), "k_pe": randn(5, ROPE), "latent_cache": randn(6, PAGE, RANK + ROPE)} | slots()
        ),
        written=("latent_cache",),
    ),
    "append_latent_cache, fp8": Case(
        append_latent_cache,
        lambda: (
            {
                "kv_latent": randn(5, 128),
                "k_pe": randn(5, ROPE),
                "latent_cache": torch.zeros(6, PAGE, 132 + 2 * ROPE, dtype=torch.uint8, device=DEVICE),
            }
            | slots()
        ),
        written=("latent_cache",),
    ),
    "copy_kv_pages": Case(
        copy_kv_pages,
        lambda: {"caches": (cache(), cache()), "src_pages": int32(0, 3), "dst_pages": int32(1, 5)},
        written=("caches",),
    ),
    "copy_kv_pages, to another cache": Case(
        copy_kv_pages,
        lambda: {
            "caches": (cache(), cache()),
            "src_pages": int32(0, 3),
            "dst_pages": int32(1, 7),
            "to": (randn(8, PAGE, HEADS_KV, DIM), randn(8, PAGE, HEADS_KV, DIM)),
        },
        written=("to",),
    ),
    "gather_kv_cache": Case(
        gather_kv_cache,
        lambda: caches(
            block_table=tables()["block_table"],
            cu_seqlens_k=int32(0, 5, 8),
            num_tokens=10,
            seq_starts=int32(1, 0),
            k_scale=0.5,
            v_scale=randn(HEADS_KV).abs(),
        ),
    ),
    "gather_kv_cache, into out": Case(
        gather_kv_cache,
        lambda: caches(
            block_table=tables()["block_table"],
            cu_seqlens_k=int32(0, 5, 8),
            out=(randn(10, HEADS_KV, DIM), randn(10, HEADS_KV, DIM)),
        ),
        written=("out",),
    ),
    "gather_latent_cache, fp8": Case(
        gather_latent_cache,
        lambda: {
            "latent_cache": torch.zeros(6, PAGE, 132 + 2 * ROPE, dtype=torch.uint8, device=DEVICE),
            "block_table": tables()["block_table"],
            "cu_seqlens_k": int32(0, 5, 8),
            "num_tokens": 8,
            "kv_lora_rank": 128,
            "qk_rope_head_dim": ROPE,
        },
    ),
    "read_latent_cache": Case(
        read_latent_cache,
        lambda: {"latent_cache": randn(6, PAGE, RANK + ROPE), "kv_lora_rank": RANK, "qk_rope_head_dim": ROPE},
        trained=True,
    ),
    "flash_attn_func": Case(flash_attn_func, lambda: qkv(2, 5, causal=True), trained=True),
    "flash_attn_varlen_func": Case(flash_attn_varlen_func, lambda: qkv(5, **packed(plus_tensor)), trained=True),
    "flash_attn_with_kvcache": Case(
        flash_attn_with_kvcache,
        lambda: qkv(
            2, 1, **caches(), **tables(), causal=True, rotary_cos=randn(9, DIM // 2), rotary_sin=randn(9, DIM // 2)
        ),
        written=("k_cache", "v_cache"),
    ),
    "flash_mla_with_kvcache": Case(
        flash_mla_with_kvcache,
        lambda: (
            {
                "q": randn(2, 1, HEADS, RANK + ROPE),
                "k_cache": randn(6, PAGE, 1, RANK + ROPE),
                "head_dim_v": RANK,
                "tile_scheduler_metadata": None,
            }
            | tables()
        ),
    ),
    "flash_mla.flash_attn_varlen_func": Case(
        flash_mla.flash_attn_varlen_func,
        lambda: qkv(5, causal=True, **dict(zip(NAMES_OF_FLASH_MLA, packed().values()))),
        trained=True,
    ),
    "flashinfer.single_decode_with_kv_cache": Case(
        flashinfer.single_decode_with_kv_cache,
        lambda: {
            "q": randn(HEADS, DIM),
            "k": randn(5, HEADS_KV, DIM),
            "v": randn(5, HEADS_KV, DIM),
            "return_lse": True,
        },
    ),
    "flashinfer.single_prefill_with_kv_cache": Case(
        flashinfer.single_prefill_with_kv_cache, lambda: qkv(5, causal=True, return_lse=True), trained=True
    ),
    "flashinfer.single_prefill_with_kv_cache, ALiBi": Case(
        flashinfer.single_prefill_with_kv_cache, lambda: qkv(5, causal=True, pos_encoding_mode="ALIBI"), trained=True
    ),
    "flashinfer.merge_state": Case(flashinfer.merge_state, two_states),
    "flashinfer.merge_states": Case(
        flashinfer.merge_states, lambda: {"v": randn(4, 3, HEADS, DIM), "s": randn(4, 3, HEADS)}
    ),
    "flashinfer.merge_state_in_place": Case(
        merge_state_in_place,
        lambda: two_states() | {"mask": torch.tensor([True, False, True, True], device=DEVICE)},
        written=("v_a", "s_a"),
    ),
    "flashinfer.append_paged_kv_cache": Case(
        flashinfer.append_paged_kv_cache,
        lambda: (
            {"append_key": randn(5, HEADS_KV, DIM), "append_value": randn(5, HEADS_KV, DIM)}
            | page_lists()
            | {"paged_kv_cache": (cache(), cache())}
        ),
        written=("paged_kv_cache",),
    ),
    "flashinfer.append_paged_mla_kv_cache": Case(
        flashinfer.append_paged_mla_kv_cache,
        lambda: (
            {"append_ckv": randn(5, RANK), "append_kpe": randn(5, ROPE)}
            | page_lists()
            | {"ckv_cache": randn(6, PAGE, RANK), "kpe_cache": randn(6, PAGE, ROPE)}
        ),
        written=("ckv_cache", "kpe_cache"),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(params=["kernel", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    return request.param


def floats(arguments):
    """Names of the arguments that could have a derivative."""
    return [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


def with_argument(case, arguments, name):
    """The call as a function of one argument: its first output, or the written tensor."""

    def f(x):
        given = arguments | {name: x}
        result = case(given)
        if result is None:
            result = [given[written] for written in case.written]
        return tree_flatten(result)[0][0]

    return f


def run(case, arguments):
    """Outputs and written tensors of a call with copies of the arguments."""
    arguments = tree_map_only(torch.Tensor, torch.clone, arguments)
    result = case(arguments)
    leaves, _ = tree_flatten((result, [arguments[name] for name in case.written]))
    return [x for x in leaves if x is not None]


def assert_same(xs, ys):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        torch.testing.assert_close(x, y, equal_nan=True)


def assert_says(error, words):
    assert words in str(error)


def test_every_public_function_is_here():
    functions = {case.function for case in CASES.values()}
    public = {getattr(triton_attn, name) for name in triton_attn.__all__ if name in triton_attn.reference.__all__}
    assert public <= functions


@pytest.mark.ci(but_each=3)
@every_case
def test_tensors_that_require_a_gradient(case):
    arguments = case.arguments()
    served = 0
    for name in floats(arguments):
        x = arguments[name].clone().requires_grad_()
        try:
            out = with_argument(case, arguments, name)(x)
        except NotImplementedError as error:
            assert_says(error, "gradient")
            continue
        served += 1
        assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    assert (served > 0) == case.trained
    with torch.no_grad():
        case(tree_map_only(torch.Tensor, lambda x: x.clone().requires_grad_(x.is_floating_point()), arguments))


@every_case
def test_forward_mode(case):
    arguments = case.arguments()
    with forward_ad.dual_level():
        for name in floats(arguments):
            x = forward_ad.make_dual(arguments[name].clone(), torch.ones_like(arguments[name]))
            try:
                out = with_argument(case, arguments, name)(x)
            except NotImplementedError as error:
                assert_says(error, "forward-mode")
                continue
            assert forward_ad.unpack_dual(out).tangent is not None
        case(arguments)  # without a tangent


def jvp(f):
    return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))


@every_case
@pytest.mark.parametrize("transform", [torch.func.grad, jvp])
def test_functional_derivatives(case, transform):
    arguments = case.arguments()
    for name in floats(arguments):
        f = with_argument(case, arguments, name)
        try:
            transform(lambda x: f(x).sum())(arguments[name].clone())  # noqa: B023
        except NotImplementedError as error:
            assert_says(error, "torch.func")
        else:
            assert case.function is read_latent_cache


@pytest.mark.ci(but_each=5)
@every_case
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.usefixtures("backend")
def test_vmap(case):
    arguments = case.arguments()
    for name in floats(arguments):
        xs = torch.stack([arguments[name], arguments[name].flip(-1)])
        f = with_argument(case, arguments, name)
        try:
            outs = torch.func.vmap(f)(xs.clone())
        except NotImplementedError as error:
            assert_says(error, "vmap")
        except RuntimeError as error:  # torch's own, of copy_
            assert case.function is merge_state_in_place
            assert_says(error, "vmap")
        else:
            torch.testing.assert_close(outs, torch.stack([f(x) for x in xs]))


# Functions of torch's own operators alone.
PLAIN = (read_latent_cache,)
# Functions in which torch's own operators make tensors, as in every reference. With fake tensors they need the mode.
WITH_TORCH = {
    flash_attn_with_kvcache,
    flashinfer.single_decode_with_kv_cache,
    flashinfer.single_prefill_with_kv_cache,
    flashinfer.append_paged_kv_cache,
    flashinfer.append_paged_mla_kv_cache,
}


@every_case
def test_tensors_without_memory(case, backend):
    """Meta tensors, and fake tensors inside and outside of their mode."""
    arguments = case.arguments()
    expected = [(x.shape, x.dtype) for x in run(case, arguments)]
    meta = tree_map_only(torch.Tensor, lambda x: x.to("meta"), arguments)
    assert [(x.shape, x.dtype) for x in run(case, meta)] == expected
    mode = FakeTensorMode()
    fake = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
    with mode:
        assert [(x.shape, x.dtype) for x in run(case, fake)] == expected
    if backend == "kernel" and case.function not in WITH_TORCH:
        assert [(x.shape, x.dtype) for x in run(case, fake)] == expected
    assert not any(isinstance(x, FakeTensor) for x in run(case, arguments))  # nothing of these calls is kept


@pytest.mark.ci(but_each=5)
@every_case
@pytest.mark.usefixtures("backend")
def test_compile(case, traced):
    arguments = case.arguments()
    expected = run(case, arguments)
    there = case._replace(function=traced(case.function))
    assert_same(run(there, arguments), expected)
    if case.trained:
        name = floats(arguments)[0]
        xs = [arguments[name].clone().requires_grad_() for _ in range(2)]
        outs = [with_argument(f, arguments, name)(x) for f, x in zip((case, there), xs)]
        assert_same(*(torch.autograd.grad(out.square().sum(), x) for out, x in zip(outs, xs)))


def in_forward_mode(f):
    def with_tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).primal

    return with_tangent


OBSERVERS = {
    "gradient": lambda f: f,
    "forward mode": in_forward_mode,
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "jvp": jvp,
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x[None]),
}


@pytest.mark.ci(but_each=11)
@pytest.mark.parametrize("observer", OBSERVERS)
@every_case
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_compile_refuses_what_a_call_refuses(case, observer, traced):
    arguments = case.arguments()
    for name in floats(arguments):
        f = OBSERVERS[observer](with_argument(case, arguments, name))
        x = arguments[name].clone().requires_grad_(observer == "gradient")
        refused = contextlib.nullcontext()
        try:
            f(x)
        except NotImplementedError as error:
            refused = pytest.raises(torch._dynamo.exc.Unsupported, match=re.escape(str(error)))
        except RuntimeError:  # torch's own, of copy_
            assert case.function is merge_state_in_place
            refused = pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="vmap")
        with refused:
            traced(f)(x)
        torch._dynamo.reset()


RECORDERS = {
    "make_fx": make_fx,
    "make_fx before autograd": functools.partial(make_fx, pre_dispatch=True),
    "torch.jit.trace": lambda f: lambda x: torch.jit.trace(f, x, check_trace=False),
}

# They replay functions without side effects. torch.jit.trace makes tensors of sizes, which the doors take for ints.
RECORDED = {
    name: case
    for name, case in CASES.items()
    if case.function.__name__ in triton_attn.__all__ and not case.written and "fp8" not in name
}


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("case", RECORDED.values(), ids=RECORDED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_recorders(case, recorder):
    """What they have recorded can be run with another tensor, whether or not that requires a gradient."""
    arguments = case.arguments()
    name = floats(arguments)[0]
    f = with_argument(case, arguments, name)
    for requires_grad in (False, True)[: 1 + case.trained]:
        x, y = (arguments[name][...].clone().requires_grad_(requires_grad) for _ in range(2))
        recorded = RECORDERS[recorder](f)(x)
        with torch.no_grad():
            y *= 0.5
        assert_same([recorded(y)], [f(y)])


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Our operators, with copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "triton_attn":
            self.seen.append((function, tree_map_only(torch.Tensor, lambda x: x.detach().clone(), args)))
        return function(*args, **kwargs or {})


@pytest.mark.ci(but_each=3)
@every_case
def test_opcheck(case):
    with Calls() as calls:
        run(case, case.arguments())
    assert calls.seen or case.function in PLAIN
    for operator, args in calls.seen:
        torch.library.opcheck(operator, args)
        written = {argument.name for argument in operator._schema.arguments if argument.alias_info is not None}
        assert bool(written) == operator._schema.is_mutable


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, **arguments):
        return self.function(**arguments)


@pytest.mark.ci(but_each=3)
@every_case
@pytest.mark.usefixtures("backend")
def test_export(case):
    arguments = case.arguments()
    exported = torch.export.export(Module(case.function), (), tree_map_only(torch.Tensor, torch.clone, arguments))
    module = exported.module()
    assert_same(run(case._replace(function=module), arguments), run(case, arguments))


TRAINED = {name: case for name, case in CASES.items() if case.trained and case.function is not read_latent_cache}


every_trained_case = pytest.mark.parametrize("case", TRAINED.values(), ids=TRAINED)


@pytest.mark.ci(but_each=2)
@every_trained_case
def test_autograd_alone_gets_what_an_operator_gives(case, monkeypatch):
    """Bitwise, outputs and gradients. The operator takes ten times as long."""
    arguments = case.arguments()
    names = [name for name in floats(arguments) if name != "alibi_slopes"]

    def outputs_and_gradients(observer):
        leaves = {name: arguments[name].clone().requires_grad_() for name in names}
        torch.manual_seed(0)
        with observer:
            outputs = tree_flatten(case(arguments | leaves))[0]
        with observer:
            gradients = torch.autograd.grad([x.sin().sum() for x in outputs], list(leaves.values()))
        return *outputs, *gradients

    calls = Calls()
    expected = outputs_and_gradients(calls)
    assert len(calls.seen) == 2

    def fail(self, *args):
        raise AssertionError(f"{self._name} was called")

    monkeypatch.setattr(CustomOpDef, "__call__", fail)
    for x, y in zip(outputs_and_gradients(contextlib.nullcontext()), expected, strict=True):
        assert torch.equal(x, y)


@every_trained_case
@pytest.mark.usefixtures("backend")
def test_autocast(case):
    """As in torch's own attention: every input except fp64 is cast, the result has the lower precision, gradients have
    the dtypes of the inputs; fp32 weights beside bf16 activations are no error.
    """
    arguments = case.arguments()
    names = [name for name in floats(arguments) if name not in ("sinks", "alibi_slopes")]
    for i, name in enumerate(names):
        arguments[name] = arguments[name].to(torch.bfloat16 if i % 2 else torch.float32).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = tree_flatten(case(arguments))[0][0]
    gradients = torch.autograd.grad(out.float().square().sum(), [arguments[name] for name in names])
    halves = {name: arguments[name].detach().to(torch.bfloat16).requires_grad_() for name in names}
    expected = tree_flatten(case(arguments | halves))[0][0]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    expected = torch.autograd.grad(expected.float().square().sum(), list(halves.values()))
    for name, gradient, there in zip(names, gradients, expected):
        assert gradient.dtype == arguments[name].dtype
        torch.testing.assert_close(gradient, there.to(gradient.dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16)], ids=str)
def test_autocast_casts_what_torch_casts(dtypes):
    q, k, v = (torch.randn(1, 2, 5, 16, device=DEVICE, dtype=dtype) for dtype in dtypes)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out = flash_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


def test_a_backward_pass_in_fp32_stays_so_under_autocast():
    arguments = mla_inputs(1, 5) | {"mode": "materialized"}
    leaves = [x.requires_grad_() for x in arguments.values() if isinstance(x, torch.Tensor)]
    loss = mla_prefill(**arguments).square().sum()
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = torch.autograd.grad(loss, leaves)
    for x, y in zip(actual, expected):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
