"""The peer in this repository is right in the interpreter, and compiles for the GPU on which it is timed."""

import pytest
import torch
from small_problems import PROBLEM

from perf.harness.checks import check_gradients, check_sample
from perf.workloads import providers, tutorial
from perf.workloads.problems import Problem
from triton_attn.toolchain import compile_only, shared_memory_limit

SMALLEST = tutorial.CONFIGS[-1]
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def attend(problem, config):
    """In the form of a provider: heads after rows."""
    return lambda *qkv: tutorial.attention(*(x.transpose(1, 2) for x in qkv), problem.causal, config).transpose(1, 2)


def tensors(problem, count, dtype=torch.float16):
    torch.manual_seed(0)
    shape = problem.batch, problem.seqlen, problem.num_heads, problem.head_dim
    return [torch.randn(shape, dtype=dtype) for _ in range(count)]


@pytest.mark.ci(but_each=4)
@HALF
@CAUSAL
@pytest.mark.parametrize("head_dim", tutorial.HEAD_DIMS)
def test_forward(head_dim, causal, dtype):
    problem = Problem(batch=2, seqlen=256, num_heads=2, head_dim=head_dim, causal=causal)
    qkv = tensors(problem, 3, dtype)
    check_sample(attend(problem, SMALLEST)(*qkv), *qkv, causal)


@CAUSAL
@pytest.mark.parametrize("config", [tutorial.CONFIGS[0], tutorial.CONFIGS[3]], ids=str)
def test_tiles_of_other_shapes(config, causal):
    problem = Problem(batch=1, seqlen=384, num_heads=2, head_dim=64, causal=causal)
    qkv = tensors(problem, 3)
    check_sample(attend(problem, config)(*qkv), *qkv, causal)


@pytest.mark.ci(but_each=4)
@HALF
@CAUSAL
@pytest.mark.parametrize("head_dim", tutorial.HEAD_DIMS)
def test_gradients(head_dim, causal, dtype):
    problem = Problem(batch=1, seqlen=256, num_heads=2, head_dim=head_dim, causal=causal)
    torch.manual_seed(0)
    check_gradients(attend(problem, SMALLEST), problem, dtype, "cpu")


def test_layouts_may_differ():
    problem = Problem(batch=2, seqlen=128, num_heads=2, head_dim=64, causal=True)
    q, k, v = (x.transpose(1, 2) for x in tensors(problem, 3))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    copies = [
        q.detach().requires_grad_(),
        k.contiguous().requires_grad_(),
        torch.cat([v, v], dim=3)[..., :64].requires_grad_(),
    ]
    grads = []
    for qkv in (inputs, copies):
        out = tutorial.attention(*qkv, causal=True, config=SMALLEST)
        grads.append([out, *torch.autograd.grad(out.sum(), qkv)])  # a gradient with strides of 0
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize(("seqlen", "head_dim"), [(256, 256), (200, 64)])
def test_other_shapes_are_refused(seqlen, head_dim):
    with pytest.raises(NotImplementedError, match="head_dim 64 or 128 and seqlen a multiple of 128"):
        providers.PROVIDERS["Triton tutorial"](Problem(1, seqlen, 2, head_dim, True), "cpu")
    assert not tutorial.supports(PROBLEM.seqlen, PROBLEM.head_dim)


@pytest.mark.ci
@pytest.mark.full(but_each=2)
@pytest.mark.compiled
@pytest.mark.oldest
@CAUSAL
@pytest.mark.parametrize("head_dim", tutorial.HEAD_DIMS)
def test_compiled(head_dim, causal):
    """A tile of 8 warps and one of 4, and both kernels of the backward pass."""
    problem = Problem(batch=2, seqlen=1024, num_heads=4, head_dim=head_dim, causal=causal)
    q, k, v, dout, out = (x.transpose(1, 2) for x in tensors(problem, 5))
    with compile_only("sm_90") as launches:
        _, lse = tutorial.forward(q, k, v, causal, tutorial.CONFIGS[0])
        tutorial.forward(q, k, v, causal, tutorial.CONFIGS[3])
        tutorial.backward(dout, q, k, v, out, lse, causal)
    *forward, delta, backward = launches
    assert [launch.grid for launch in forward] == [(8, 8, 1), (8, 8, 1)]
    assert all(launch.uses_tma and launch.uses_wgmma for launch in forward)
    assert (delta.name, delta.grid) == ("delta_kernel", (8, 8, 1))
    assert backward.uses_wgmma
    assert backward.uses_cp_async
    assert not backward.uses_tma
    assert all(launch.shared_bytes <= shared_memory_limit("sm_90") for launch in launches)


@pytest.mark.compiled
@pytest.mark.full
def test_the_first_call_tries_all_tiles(monkeypatch):
    tried = []

    def bench(call, quantiles):
        call()
        tried.append(call)
        return [float(len(tried))] * 3

    monkeypatch.setitem(vars(tutorial.forward_kernel), "do_bench", bench)  # a property that needs a driver
    monkeypatch.setattr(tutorial.forward_kernel, "cache", {})
    problem = Problem(batch=1, seqlen=256, num_heads=2, head_dim=64, causal=True)
    attention = providers.PROVIDERS["Triton tutorial"](problem, "cpu")
    qkv = tensors(problem, 3)
    with compile_only("sm_90") as launches:
        attention(*qkv)
        assert len(tried) == len(tutorial.CONFIGS)
        attention(*qkv)
    assert len(tried) == len(tutorial.CONFIGS)
    assert launches[-1].constexprs["BLOCK_N"] == tutorial.CONFIGS[0].kwargs["BLOCK_N"]
