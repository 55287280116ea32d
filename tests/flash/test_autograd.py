"""Attention under autograd, torch.compile and export: two operators, used only if a call has another observer than
autograd."""

import contextlib
import functools
import itertools
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from attention_cases import DEVICE
from backward_launches import Launches
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from triton_attn import flash_attention, flash_attention_varlen
from triton_attn._host.call import Lengths, call_of
from triton_attn._host.options import AttentionOptions
from triton_attn.dense import backward
from triton_attn.dense.backward import launch_flash_bwd
from triton_attn.flash import autograd

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window, softcap": {"window_size": (7, 3), "softcap": 5.0, "softmax_scale": 0.3},
    "ALiBi, sinks": {"alibi_slopes": (0.1, 0.2, 0.3, 0.4), "sinks": (0.0, 1.0, -1.0, 0.5)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": -5},
    "deterministic": {"deterministic": True, "causal": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
dense_and_varlen = pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
# Torch's tracers take seconds per call, so packed sequences are traced once.
every_option_and_varlen = pytest.mark.parametrize(
    ("options", "varlen"),
    [*((options, False) for options in OPTIONS.values()), (OPTIONS["plain"], True)],
    ids=[*OPTIONS, "varlen"],
)


def make_call(options, varlen=False, dtype=torch.float32, seqlen=24, head_dim=16):
    """f and its differentiable arguments q, k, v (and sinks): f(*leaves, **options) returns (out, lse)."""
    options = options | {"return_lse": True}
    shape = (seqlen,) if varlen else (2, seqlen)
    leaves = [torch.randn(*shape, heads, head_dim, device=DEVICE).to(dtype) for heads in (4, 2, 2)]
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            options[name] = torch.tensor(options[name], device=DEVICE)
    if "sinks" in options:
        leaves.append(options.pop("sinks"))
    cu_seqlens = torch.tensor([0, seqlen // 3, seqlen], dtype=torch.int32, device=DEVICE)

    def f(q, k, v, sinks=None, **more):
        if varlen:
            lengths = (cu_seqlens, cu_seqlens, seqlen, seqlen)
            return flash_attention_varlen(q, k, v, *lengths, sinks=sinks, **options, **more)
        return flash_attention(q, k, v, sinks=sinks, **options, **more)

    return f, [leaf.requires_grad_() for leaf in leaves]


def loss_of(out, lse):
    return (out.float().square().sum() + lse.sin().sum()) / 8


def gradients(f, leaves, wanted=None):
    return torch.autograd.grad(loss_of(*f(*leaves)), leaves if wanted is None else wanted)


def assert_equal(xs, ys):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        assert torch.equal(x, y)


def spy_on(name):
    return mock.patch.object(autograd, name, wraps=getattr(autograd, name))


def unused(name):
    return mock.patch.object(autograd, name, side_effect=AssertionError(f"{name} was called"))


@pytest.mark.ci
@every_option_and_varlen
def test_opcheck(options, varlen):
    f, leaves = make_call(options, varlen)
    with spy_on("flash_attention") as forward_spy, spy_on("gradients_of") as backward_spy, SeenOperators():
        gradients(f, leaves)
    torch.library.opcheck(autograd.flash_attention, forward_spy.call_args.args)
    without_history = [x.detach() if isinstance(x, torch.Tensor) else x for x in backward_spy.call_args.args]
    torch.library.opcheck(autograd.flash_attention_backward, without_history)


def test_what_autograd_alone_sees_is_no_operator():
    """An operator with autograd costs four launches. Another observer, of the forward or the backward pass, sees it."""
    f, leaves = make_call({"causal": True})
    observers = contextlib.nullcontext(), SeenOperators()
    for forward, backward_pass in itertools.product(observers, observers):
        with spy_on("flash_attention") as operator, spy_on("flash_attention_backward") as of_gradients:
            with forward:
                loss = loss_of(*f(*leaves))
            with backward_pass:
                loss.backward()
        assert operator.call_count == (forward is observers[1])
        assert of_gradients.call_count == (backward_pass is observers[1])


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("names", [("q",), ("k", "v"), ("sinks",)], ids=" ".join)
def test_opcheck_of_some_gradients(names):
    f, leaves = make_call(OPTIONS["ALiBi, sinks"])
    wanted = [name in names for name in ("q", "k", "v", "sinks")]
    for leaf, is_wanted in zip(leaves, wanted):
        leaf.requires_grad_(is_wanted)
    with spy_on("gradients_of") as spy:
        loss_of(*f(*leaves)).backward()
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in spy.call_args.args]
    assert args[-1] == wanted
    torch.library.opcheck(autograd.flash_attention_backward, args)


@pytest.mark.ci(but_each=5)
@every_option_and_varlen
def test_compile(options, varlen, traced):
    f, leaves = make_call(options, varlen)
    assert_equal(traced(f)(*leaves), f(*leaves))
    assert_equal(gradients(traced(f), leaves), gradients(f, leaves))
    with torch.no_grad():
        assert_equal(traced(f)(*leaves), f(*leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_compile_in_half_precision(dtype, traced):
    f, leaves = make_call({"causal": True}, dtype=dtype)
    assert_equal(gradients(traced(f), leaves), gradients(f, leaves))


@pytest.mark.ci
@dense_and_varlen
def test_compile_once_for_all_lengths(varlen, traced):
    options = {"causal": True, "window_size": (5, 0), "softcap": 3.0, "dropout_p": 0.1, "dropout_seed": 3}

    def f(q, k, v, cu_seqlens):
        if not varlen:
            return flash_attention(q, k, v, return_lse=True, **options)
        lengths = (cu_seqlens, cu_seqlens, q.shape[0], q.shape[0])
        return flash_attention_varlen(q, k, v, *lengths, return_lse=True, **options)

    compiled_f = traced(f, dynamic=True)
    for seqlen in (20, 33, 7):
        _, leaves = make_call({}, varlen, seqlen=seqlen)
        cu_seqlens = torch.tensor([0, 5, seqlen], dtype=torch.int32, device=DEVICE)
        outputs, expected = compiled_f(*leaves, cu_seqlens), f(*leaves, cu_seqlens)
        assert_equal(outputs, expected)
        assert_equal(*(torch.autograd.grad(loss_of(*pair), leaves) for pair in (outputs, expected)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_draws_a_seed_at_each_call(traced):
    f, leaves = make_call({"dropout_p": 0.5})
    compiled_f = traced(f)
    torch.manual_seed(0)
    first, second = compiled_f(*leaves)[0], compiled_f(*leaves)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(compiled_f(*leaves)[0], first)


def test_compiled_backward_has_the_mask_of_its_forward(traced):
    def f(q, k, v):
        return flash_attention(q, k, v, dropout_p=0.5)

    assert_dropout_of_backward(traced(f))


def assert_dropout_of_backward(f):
    """With one-hot values out is the weights, and the gradient of v is the weights times the gradient of out."""
    q, k = (torch.randn(1, 24, 1, 24, device=DEVICE, requires_grad=True) for _ in range(2))
    v = torch.eye(24, device=DEVICE)[None, :, None].requires_grad_()
    out = f(q, k, v)
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close(dv[0, :, 0], out.detach()[0, :, 0].T @ dout[0, :, 0])


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("c++") and DEVICE == "cpu", reason="Inductor needs a C++ compiler")
def test_inductor(traced):
    f, leaves = make_call({"causal": True})

    def block(q, k, v):
        out, lse = f(q * 2, k.tanh(), v)
        return out + v.repeat_interleave(2, dim=2), lse

    expected = gradients(block, leaves)
    for gradient, gradient_there in zip(gradients(traced(block, backend="inductor"), leaves), expected):
        torch.testing.assert_close(gradient, gradient_there)


class Attention(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


@every_option_and_varlen
def test_export(options, varlen):
    f, leaves = make_call(options, varlen)
    leaves = [leaf.detach() for leaf in leaves]
    exported = torch.export.export(Attention(f), tuple(leaves))
    operators = [node.target for node in exported.graph.nodes if "triton_attn" in str(node.target)]
    assert operators == [torch.ops.triton_attn.flash_attention.default]
    assert_equal(exported.module()(*leaves), f(*leaves))


def test_export_with_any_length():
    f, leaves = make_call({"causal": True})
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    leaves = [leaf.detach() for leaf in leaves]
    exported = torch.export.export(Attention(f), tuple(leaves), dynamic_shapes=(({1: seqlen},) * 3,))
    _, longer = make_call({}, seqlen=57)
    assert_equal(exported.module()(*longer), f(*longer))


@pytest.mark.ci(but_each=3)
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"causal": True, "window_size": (2, 0)}], ids=str)
@dense_and_varlen
def test_gradcheck_of_the_reference(options, varlen, monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    f, leaves = make_call(options, varlen, dtype=torch.float64, seqlen=6, head_dim=3)
    if len(leaves) > 3:
        leaves[3] = leaves[3].detach().double().requires_grad_()
    assert torch.autograd.gradcheck(f, leaves)


@dense_and_varlen
def test_autocast(varlen):
    f, leaves = make_call({"causal": True, "sinks": (0.0, 1.0, -1.0, 0.5)}, varlen)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, lse = f(*leaves)
        actual = gradients(f, leaves)
    halves = [leaf.detach().to(torch.bfloat16).requires_grad_() for leaf in leaves[:3]]
    expected_out, expected_lse = f(*halves, leaves[3])
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert_equal((out, lse), (expected_out, expected_lse))
    assert [gradient.dtype for gradient in actual] == [torch.float32] * 4
    expected = gradients(f, [*halves, leaves[3]])
    assert_equal(actual, [gradient.float() for gradient in expected])


def test_autocast_leaves_fp64_to_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")
    f, leaves = make_call({}, dtype=torch.float64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert f(*leaves)[0].dtype == torch.float64


@pytest.mark.ci
@every_option
def test_checkpoint(options):
    f, leaves = make_call(options)
    assert_equal(gradients(lambda *xs: checkpoint(f, *xs, use_reentrant=False), leaves), gradients(f, leaves))


def test_reentrant_checkpoint():
    f, leaves = make_call(OPTIONS["ALiBi, sinks"])
    expected = gradients(f, leaves)
    loss_of(*checkpoint(f, *leaves, use_reentrant=True)).backward()
    assert_equal([leaf.grad for leaf in leaves], expected)


@pytest.mark.parametrize("seen_again", [False, True])
def test_a_checkpoint_that_an_observer_sees_once(seen_again):
    """What autograd alone gets keeps the tensors that the operator keeps, so torch can take one for the other."""
    f, leaves = make_call(OPTIONS["dropout"] | {"sinks": (0.0, 1.0, -1.0, 0.5)})
    contexts = [contextlib.nullcontext(), SeenOperators()]
    first, again = contexts if seen_again else reversed(contexts)
    with first:
        outputs = checkpoint(f, *leaves, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again))
    with spy_on("flash_attention") as operator:
        results = torch.autograd.grad(loss_of(*outputs), leaves)
    assert operator.call_count == seen_again
    assert_equal(results, gradients(f, leaves))


@pytest.mark.parametrize("saved", [False, True])
def test_a_checkpoint_that_saves_what_an_operator_gave(saved):
    def policy(ctx, operator, *args, **kwargs):
        is_ours = operator is torch.ops.triton_attn.flash_attention.default
        return CheckpointPolicy.MUST_SAVE if is_ours and saved else CheckpointPolicy.PREFER_RECOMPUTE

    f, leaves = make_call({"causal": True})
    expected = gradients(f, leaves)
    context_fn = functools.partial(create_selective_checkpoint_contexts, policy)
    with spy_on("launch_flash_fwd") as launch:
        results = gradients(lambda *xs: checkpoint(f, *xs, use_reentrant=False, context_fn=context_fn), leaves)
    assert launch.call_count == 2 - saved
    assert_equal(results, expected)


def test_checkpoint_recomputes_the_same_dropout():
    def f(q, k, v):
        return flash_attention(q, k, v, dropout_p=0.5)

    assert_dropout_of_backward(lambda *qkv: checkpoint(f, *qkv, use_reentrant=False))


def contiguous_copy(x):
    return x.clone(memory_format=torch.contiguous_format)


ELSEWHERE = {
    "copied": lambda: saved_tensors_hooks(torch.Tensor.clone, lambda x: x),
    "with other strides": lambda: saved_tensors_hooks(contiguous_copy, lambda x: x),
    "on the host": save_on_cpu,
}


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_saved_tensors_may_live_elsewhere(elsewhere):
    f, leaves = make_call({"causal": True})
    leaves = [leaf.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for leaf in leaves]
    with ELSEWHERE[elsewhere]():
        loss = loss_of(*f(*leaves))
    assert_equal(torch.autograd.grad(loss, leaves), gradients(f, leaves))


def test_a_graph_holds_its_inputs_nowhere_else():
    f, leaves = make_call({"causal": True, "sinks": (0.0, 1.0, -1.0, 0.5)})
    with saved_tensors_hooks(torch.Tensor.clone, lambda x: x):
        inputs = [leaf * 1 for leaf in leaves]
        outputs = f(*inputs)
    references = [weakref.ref(x) for x in inputs]
    del inputs
    assert [reference() for reference in references] == [None] * 4
    assert_equal(torch.autograd.grad(loss_of(*outputs), leaves), gradients(f, leaves))


@every_option_and_varlen
def test_both_keep_the_same_tensors(options, varlen):
    f, leaves = make_call(options | {"sinks": (0.0, 1.0, -1.0, 0.5)}, varlen)

    def kept(observer):
        found = []
        with observer, saved_tensors_hooks(lambda x: found.append((x.shape, x.dtype)) or x, lambda x: x):
            f(*leaves)
        return found

    assert kept(contextlib.nullcontext()) == kept(SeenOperators())


def test_a_backward_pass_of_another_thread():
    f, leaves = make_call({"causal": True})
    loss, expected = loss_of(*f(*leaves)), gradients(f, leaves)
    with ThreadPoolExecutor(1) as pool:
        assert_equal(pool.submit(torch.autograd.grad, loss, leaves).result(), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_several_losses_at_once():
    f, leaves = make_call({"causal": True})
    out, _ = f(*leaves)
    douts = torch.randn(3, *out.shape, device=DEVICE)
    results = torch.autograd.grad(out, leaves, douts, retain_graph=True, is_grads_batched=True)
    expected = zip(*(torch.autograd.grad(out, leaves, dout, retain_graph=True) for dout in douts))
    assert_equal(results, [torch.stack(each) for each in expected])


def test_tensors_of_inference_mode_have_no_gradients():
    f, leaves = make_call({})
    with torch.inference_mode():
        k = leaves[1] * 1
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        f(leaves[0], k, leaves[2])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@dense_and_varlen
def test_without_gradients_the_kernel_is_launched_directly(mode, varlen):
    f, leaves = make_call({"causal": True}, varlen)
    expected = f(*leaves)
    with mode(), unused("_keep"):
        assert_equal(f(*leaves), expected)
    with unused("_keep"):
        results = f(*[leaf.detach() for leaf in leaves])
    assert_equal(results, expected)
    assert not any(x.requires_grad for x in results)


def test_modes_that_look_at_operators_see_one():
    f, leaves = make_call({})
    leaves = [leaf.detach() for leaf in leaves]
    with SeenOperators() as seen:
        f(*leaves)
    assert [str(operator) for operator in seen.operators] == ["triton_attn.flash_attention.default"]


class SeenOperators(TorchDispatchMode):
    """The operators that were called, and the bytes of the tensors that they allocated."""

    def __init__(self):
        super().__init__()
        self.operators = []
        self.outputs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(function)
        result = function(*args, **kwargs or {})
        self.outputs += [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result

    def bytes_made(self, *given):
        """Bytes of the storages that are not in `given`."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.outputs}
        for x in given:
            storages.pop(x.untyped_storage().data_ptr(), None)
        return sum(storages.values())


KERNELS_OF_GRADIENTS = {
    ("q", "k", "v", "sinks"): (["delta", "dkdv"], ["delta", "dkdv", "dq"]),
    ("q", "k", "v"): (["delta", "dkdv"], ["delta", "dkdv", "dq"]),
    ("q",): (["delta", "dq"], ["delta", "dq"]),
    ("q", "sinks"): (["delta", "dq"], ["delta", "dq"]),
    ("k",): (["delta", "dkdv"], ["delta", "dkdv"]),
    ("v",): (["delta", "dkdv"], ["delta", "dkdv"]),
    ("k", "v"): (["delta", "dkdv"], ["delta", "dkdv"]),
    ("q", "k"): (["delta", "dkdv"], ["delta", "dkdv", "dq"]),
    ("q", "v"): (["delta", "dkdv"], ["delta", "dkdv", "dq"]),
    ("sinks",): (["delta"], ["delta"]),
}


@pytest.mark.ci(but_each=4)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("names", KERNELS_OF_GRADIENTS, ids=" ".join)
def test_only_wanted_gradients_are_computed(names, deterministic):
    f, leaves = make_call({"sinks": (0.0, 1.0, -1.0, 0.5), "deterministic": deterministic})
    everything = dict(zip(("q", "k", "v", "sinks"), gradients(f, leaves)))
    for name, leaf in zip(everything, leaves):
        leaf.requires_grad_(name in names)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with Launches() as launches:
        results = gradients(f, leaves, wanted)
    fused = DEVICE == "cpu"  # on a GPU the config says which schedule is faster
    if fused or deterministic:
        assert launches == KERNELS_OF_GRADIENTS[names][deterministic]
    for name, result in zip(names, results):
        torch.testing.assert_close(result, everything[name])


def test_deterministic_algorithms():
    f, leaves = make_call({})
    torch.use_deterministic_algorithms(True)
    try:
        with Launches() as launches:
            gradients(f, leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert launches == ["delta", "dkdv", "dq"]


@pytest.mark.parametrize("which", ["out", "lse"])
def test_one_output_is_enough(which):
    f, leaves = make_call({"causal": True})
    output = f(*leaves)[which == "lse"]
    results = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    other = [torch.zeros_like(x) for x in f(*leaves)]
    other[which == "lse"].fill_(1)
    expected = torch.autograd.grad(f(*leaves), leaves, other)
    for result, there in zip(results, expected):
        torch.testing.assert_close(result, there)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@dense_and_varlen
def test_memory_of_the_backward_pass(varlen, dtype, deterministic):
    seqlen, num_heads, head_dim = 512, 8, 64
    shape = (2 * seqlen,) if varlen else (2, seqlen)
    q, out, dout = (torch.zeros(*shape, num_heads, head_dim, dtype=dtype, device=DEVICE) for _ in range(3))
    k, v = (torch.zeros(*shape, 2, head_dim, dtype=dtype, device=DEVICE) for _ in range(2))
    lse = torch.zeros((num_heads, 2 * seqlen) if varlen else (2, num_heads, seqlen), device=DEVICE)
    cu_seqlens = torch.tensor([0, seqlen, 2 * seqlen], dtype=torch.int32, device=DEVICE) if varlen else None
    sinks = torch.zeros(num_heads, device=DEVICE)
    options = AttentionOptions(0.1, (None, 0), None, None, sinks)
    given = (dout, q, k, v, out, lse, sinks)

    call = call_of(q, k, v, options, Lengths(cu_seqlens, cu_seqlens, seqlen, seqlen))
    with mock.patch.object(backward, "launch") as launch, SeenOperators() as seen:
        launch_flash_bwd(call, dout, None, out, lse, deterministic=deterministic)
    assert launch.call_count in (2, 3)
    fused = launch.call_count == 2
    dq, dk, dv, delta = (x.numel() * x.element_size() for x in (q, k, v, lse))
    # The gradient of a sink sums one value per 64 rows of its head.
    dsinks = (2 * seqlen // 64 + 1) * num_heads * 4
    dq_sum = q.numel() * 4 if fused and dtype != torch.float32 else 0
    assert seen.bytes_made(*given) <= dq + dk + dv + delta + dq_sum + dsinks


def test_autograd_makes_nothing_beside_the_operator():
    f, leaves = make_call({"sinks": (0.0, 1.0, -1.0, 0.5)})
    outputs = f(*leaves)
    douts = [torch.randn_like(x) for x in outputs]
    with SeenOperators() as seen:
        results = torch.autograd.grad(outputs, leaves, douts)
    assert "triton_attn.flash_attention_backward.default" in map(str, seen.operators)
    made = sum(x.numel() * x.element_size() for x in results)
    assert seen.bytes_made(*leaves, *outputs, *douts) == made


@dense_and_varlen
def test_second_derivatives_are_refused(varlen):
    f, leaves = make_call({}, varlen)
    (dq,) = torch.autograd.grad(loss_of(*f(*leaves)), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives of flash attention are not supported"):
        torch.autograd.grad(dq.sum(), leaves[0])


def test_a_graph_may_be_kept():
    f, leaves = make_call({})
    loss = loss_of(*f(*leaves))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for x, y in zip(first, second):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks", "out", "lse", "dropout_seed"])
def test_a_tensor_that_changed_before_the_backward_pass(name):
    seed = torch.tensor([3], device=DEVICE)
    f, leaves = make_call({"sinks": (0.0, 1.0, -1.0, 0.5), "dropout_p": 0.1, "dropout_seed": seed})
    inputs = [leaf * 1 for leaf in leaves]
    out, lse = f(*inputs)
    loss = loss_of(out, lse)
    with torch.no_grad():
        dict(zip(("q", "k", "v", "sinks", "out", "lse", "dropout_seed"), (*inputs, out, lse, seed)))[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inputs_that_share_memory():
    x = torch.randn(1, 24, 2, 16, device=DEVICE, requires_grad=True)
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    expected = sum(gradients(lambda *qkv: flash_attention(*qkv, return_lse=True), parts))
    (result,) = gradients(lambda x: flash_attention(x, x, x, return_lse=True), [x])
    torch.testing.assert_close(result, expected)
    qkv = torch.stack([part.detach() for part in parts], dim=2).requires_grad_()
    (result,) = gradients(lambda qkv: flash_attention(*qkv.unbind(2), return_lse=True), [qkv])
    torch.testing.assert_close(result.sum(2), expected)


def test_slopes_have_no_gradient():
    slopes = torch.rand(4, device=DEVICE, requires_grad=True)
    f, leaves = make_call({})
    with pytest.raises(NotImplementedError, match="alibi_slopes: gradients are not supported"):
        f(*leaves, alibi_slopes=slopes)
    with torch.no_grad():
        f(*leaves, alibi_slopes=slopes)
    f(*leaves, alibi_slopes=slopes.detach())


def test_shapes_alone():
    """On the meta device or with fake tensors nothing is computed."""
    q = torch.empty(2, 5, 4, 16, device="meta")
    v = torch.empty(2, 7, 2, 24, device="meta")
    out, lse = flash_attention(q, v[..., :16], v, return_lse=True)
    assert out.shape == (2, 5, 4, 24)
    assert lse.shape == (2, 4, 5)
    assert out.is_meta


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.jacrev, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))]
)
def test_functional_derivatives_are_refused(transform):
    x = torch.randn(1, 8, 2, 16, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"torch.func"):
        transform(lambda x: flash_attention(x, x, x).sum())(x)


def test_forward_mode_derivatives_are_refused():
    x = torch.randn(1, 8, 2, 16, device=DEVICE)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            flash_attention(forward_ad.make_dual(x, x), x, x)
        flash_attention(x, x, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap():
    x = torch.randn(3, 1, 8, 2, 16, device=DEVICE)
    assert torch.equal(
        torch.func.vmap(lambda x: flash_attention(x, x, x))(x), torch.stack([flash_attention(y, y, y) for y in x])
    )
