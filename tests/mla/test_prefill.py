"""mla_prefill in each schedule: gradients, memory, and one readable example for each convention."""

import contextlib
import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from decode_cases import DTYPES
from half_products import NoNanIsRead
from instruments import Instrument
from prefill_cases import Case, Inputs, check, check_gradients, floor_of
from torch.utils.checkpoint import checkpoint

from triton_attn import mla_prefill, reference
from triton_attn.mla import autograd
from triton_attn.mla.schedule import MODES

# Inputs contain NaN and infinity on purpose, and numpy warns about them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.ci(but_each=3)
@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_widths_of_deepseek(mode, dtype):
    widths = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, kv_lora_rank=512, v_head_dim=128)
    check(Case(mode, dtype, seqlens_q=(33,), seqlens_k=(50,), num_heads=2, **widths))


@pytest.mark.ci(but_each=2)
@pytest.mark.oldest
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seqlens", [((5, 0, 40), (70, 3, 40)), ((3, 9), (1, 0)), ((), ()), ((0,), (5,))])
def test_packed_sequences(mode, seqlens):
    check(Case(mode, packed=True, seqlens_q=seqlens[0], seqlens_k=seqlens[1], spare_rows=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_matmuls_of_torch_read_no_row_after_the_last(mode, dtype):
    """AMX reads past the end of a row whose width is not a multiple of 32, and NaN may be there."""
    sizes = dict(packed=True, seqlens_q=(5, 3), seqlens_k=(7, 12), kv_lora_rank=100, spare_rows=3)
    with NoNanIsRead():
        check(Case(mode, dtype, **sizes))


@pytest.mark.parametrize("packed", [False, True])
def test_a_head_whose_keys_exceed_the_workspace_is_split(packed):
    case = Case("materialized", packed=packed, seqlens_q=(20, 20), seqlens_k=(300, 300), max_workspace_bytes=20_000)
    check(case)
    assert case.max_workspace_bytes < 600 * (32 + 24) * 2


@pytest.mark.emulated
@pytest.mark.parametrize("mode", MODES)
def test_a_query_without_keys(mode):
    inputs = Inputs(Case(mode, seqlens_q=(5,), seqlens_k=(3,)))
    out, lse = mla_prefill(*inputs.tensors, **inputs.options, return_lse=True)
    assert not out[0, :2].any()
    assert (lse[0, :, :2] == float("-inf")).all()
    assert out[0, 2:].any(-1).all()


@pytest.mark.oldest
@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_has_the_same_arguments_and_result(packed):
    inputs = Inputs(Case("fused", torch.float32, packed=packed))
    results = mla_prefill(*inputs.tensors, **inputs.options, return_lse=True)
    options = {name: x for name, x in inputs.options.items() if name != "max_workspace_bytes"}
    for result, ref in zip(results, reference.mla_prefill(*inputs.tensors, **options, return_lse=True)):
        assert (result.shape, result.dtype) == (ref.shape, ref.dtype)
        torch.testing.assert_close(result, ref, atol=1e-5, rtol=1e-5)


GRADIENT_CASES = [
    Case(
        mode,
        dtype,
        packed=packed,
        seqlens_q=(33, 20) if packed else (33, 33),
        seqlens_k=(40, 17) if packed else (40, 40),
    )
    for mode, dtype, packed in itertools.product(("fused", "materialized"), DTYPES, (False, True))
]
GRADIENT_CASES += [
    Case("fused", torch.float16, causal=False, one_projection=True),
    Case("fused", torch.bfloat16, seqlens_q=(20,), seqlens_k=(9,), q_layout="wide"),  # queries without keys
    Case("materialized", torch.float16, max_workspace_bytes=50_000, q_layout="heads first"),
    Case("materialized", torch.float32, packed=True, seqlens_q=(7, 0, 5), seqlens_k=(9, 4, 0), spare_rows=0),
    Case("fused", torch.float16, num_heads=1, qk_nope_head_dim=300, v_head_dim=260),  # dk and dv apart
    Case(
        "fused",
        torch.bfloat16,
        num_heads=2,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        kv_lora_rank=512,
        v_head_dim=128,
    ),
]


@pytest.mark.ci(but_each=5)
@pytest.mark.parametrize(
    "case", GRADIENT_CASES, ids=lambda case: f"{case.mode}-{case.dtype}-{case.packed}-{case.causal}"
)
def test_gradients(case, record_property):
    for name, close in check_gradients(case).items():
        if case.kv_lora_rank == 512:
            record_property("figure", f"mla gradient {name:9} error {close.error:.1e}, torch's {close.torch_error:.1e}")


@pytest.mark.parametrize("wanted", range(6))
def test_only_the_gradients_that_are_wanted(wanted):
    inputs = Inputs(Case("fused", torch.float32))
    tensors = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs.tensors)]
    mla_prefill(*tensors, **inputs.options).sum().backward()
    leaves = [x.detach().double().requires_grad_(i == wanted) for i, x in enumerate(inputs.tensors)]
    reference.mla_prefill(*leaves).sum().backward()
    assert [x.grad is not None for x in tensors] == [i == wanted for i in range(6)]
    torch.testing.assert_close(tensors[wanted].grad, leaves[wanted].grad.float(), atol=1e-4, rtol=1e-4)


def test_gradients_repeat_where_torch_is_to_be_deterministic(monkeypatch):
    asked = []
    launch = autograd.launch_flash_bwd_of_sums

    def record(*args):
        asked.append(inspect.signature(launch).bind(*args).arguments["deterministic"])
        return launch(*args)

    monkeypatch.setattr(autograd, "launch_flash_bwd_of_sums", record)
    for deterministic in (False, True):
        tensors = [x.detach().requires_grad_() for x in Inputs(Case("fused", torch.float32)).tensors]
        torch.use_deterministic_algorithms(deterministic)
        try:
            mla_prefill(*tensors).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def test_what_has_no_gradient_says_so():
    inputs = Inputs(Case("absorbed", torch.float32))
    tensors = [x.detach().requires_grad_() for x in inputs.tensors]
    with pytest.raises(NotImplementedError, match="absorbed"):
        mla_prefill(*tensors, **inputs.options)
    with torch.no_grad():
        mla_prefill(*tensors, **inputs.options)
    wide = [x.detach().requires_grad_() for x in Inputs(Case("fused", torch.float32, qk_nope_head_dim=500)).tensors]
    with pytest.raises(NotImplementedError, match="512, got 516"):
        mla_prefill(*wide)
    tensors = [x.detach().requires_grad_() for x in Inputs(Case("fused", torch.float32)).tensors]
    (gradient,) = torch.autograd.grad(mla_prefill(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_a_saved_tensor_that_changes_is_caught():
    tensors = [x.detach().requires_grad_() for x in Inputs(Case("fused", torch.float32)).tensors]
    latent = tensors[2] * 1.0
    out = mla_prefill(*tensors[:2], latent, *tensors[3:])
    latent += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_what_autograd_alone_gets_keeps_what_the_operator_keeps(packed):
    """Saved tensors may come back with other strides, and a checkpoint may run as one and again as the other."""
    inputs = Inputs(Case("fused", torch.float32, packed=packed))
    leaves = [torch.cat((x, x), -1)[..., : x.shape[-1]].detach().requires_grad_() for x in inputs.tensors]

    def call(*tensors):
        return mla_prefill(*tensors, **inputs.options)

    def observed():
        return contextlib.nullcontext(), Allocations()

    def pack(x):
        kept.append((x.shape, x.dtype))
        return x.clone(memory_format=torch.contiguous_format)

    expected = torch.autograd.grad(call(*leaves).sin().sum(), leaves)
    found = []
    for observer in (contextlib.nullcontext(), Allocations()):
        kept = []
        with observer, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = call(*leaves)
        found.append(kept)
        results = torch.autograd.grad(out.sin().sum(), leaves)
        again = torch.autograd.grad(
            checkpoint(call, *leaves, context_fn=observed, use_reentrant=False).sin().sum(), leaves
        )
        for x, y, z in zip(expected, results, again):
            assert torch.equal(x, y)
            assert torch.equal(x, z)
    assert found[0] == found[1]
    assert len(found[0]) == 8 + 2 * packed


@pytest.mark.ci
def test_opcheck_and_compile():
    inputs = Inputs(Case("materialized", torch.float32, num_heads=2))
    tensors = [x.detach().requires_grad_() for x in inputs.tensors]
    args = (*tensors, None, None, None, None, 40, 70, 0.1, True, 2**28, "materialized", True, False)
    torch.library.opcheck(torch.ops.triton_attn.mla_prefill.default, args)

    def loss(*tensors):
        return mla_prefill(*tensors, mode="fused").square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, ref in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
        torch.testing.assert_close(x, ref)


class Allocations(Instrument):
    """Bytes of each allocated tensor."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty" in func.name() or "zeros" in func.name():
            self.sizes.append(out.numel() * out.element_size())
        return out


@pytest.mark.ci(but_each=2)
@pytest.mark.parametrize("packed", [False, True])
def test_memory_besides_outputs(packed, record_property):
    """0 for "fused". For the others at most the bound, at any context."""
    case = Case("fused", packed=packed, seqlens_q=(20, 20), seqlens_k=(400, 400), num_heads=4)
    for mode, bound in (("fused", 0), ("materialized", 2**28), ("materialized", 100_000), ("materialized", 21_000)):
        inputs = Inputs(replace(case, mode=mode, max_workspace_bytes=bound or 2**28))
        tensors, options = inputs.tensors, inputs.options
        with Allocations() as allocations:
            out = mla_prefill(*tensors, **options)
        taken = sum(allocations.sizes) - out.numel() * out.element_size()
        record_property("figure", f"mla_prefill {mode}: {taken} bytes besides the output, bound {bound}")
        assert taken <= bound
        assert (taken > 0) == (mode != "fused")
    inputs = Inputs(replace(case, mode="absorbed", max_workspace_bytes=40_000))
    with Allocations() as allocations:
        mla_prefill(*inputs.tensors, **inputs.options)
    assert max(allocations.sizes) <= 40_000


def test_floor_counts_what_rounding_may_do():
    """The floor of these tests is far below the values, so a wrong kernel does not pass by it."""
    case = Case("fused", torch.bfloat16)
    inputs = Inputs(case)
    out64, _ = inputs.expected(torch.float64)
    assert floor_of(case, inputs) < 0.1 * out64.abs().max()
