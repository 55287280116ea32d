"""Each compiler workaround is still needed on the Tritons that it names. One that is not needed must be removed."""

import re
import shutil
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from perf.model import loop_model
from triton_attn import flash_attention, mla_decode
from triton_attn._host import gpu
from triton_attn._host.call import call_of
from triton_attn._host.descriptors import unchecked_descriptor
from triton_attn._host.options import AttentionOptions
from triton_attn._host.tuned import forget_plans
from triton_attn._jit.args import Strides, View
from triton_attn._jit.workarounds import (
    apart,
    computed_again,
    dot_once,
    fence_copies,
    in_vectors,
    loaded_once,
    multiple_of,
)
from triton_attn.dense import backward
from triton_attn.flash import forward
from triton_attn.mla import absorbed
from triton_attn.toolchain import compile_only
from triton_attn.toolchain.emulator import emulate

pytestmark = pytest.mark.compiled


@triton.jit
def _sum_kernel(x, page_stride, out_ptr, OF_VIEW: tl.constexpr, VECTOR: tl.constexpr):
    """The sum of each row of page 1."""
    if OF_VIEW and VECTOR > 1:
        x = in_vectors(x, VECTOR)
    page = tl.load(out_ptr).to(tl.int32)
    ptr = x.ptr + page * (x.strides.batch if OF_VIEW else multiple_of(page_stride, VECTOR))
    rows = tl.arange(0, 64)[:, None] * (x.strides.row if OF_VIEW else 64)
    tl.store(out_ptr + tl.arange(0, 64), tl.sum(tl.load(ptr + rows + tl.arange(0, 64)[None, :]), 1))


@pytest.mark.oldest
@pytest.mark.parametrize("of_view", [True, False], ids=["in_vectors", "multiple_of"])
@pytest.mark.parametrize("vector", [1, 8])
def test_triton_looks_for_strides_that_16_divides_alone(vector, of_view):
    x, out = torch.empty(2, 64 * 72 + 8, dtype=torch.float16), torch.empty(64, dtype=torch.float16)
    with compile_only("sm_90") as launches:
        _sum_kernel[(1,)](View(x, Strides(*x.stride()[:1], 72, 0)), x.stride(0), out, OF_VIEW=of_view, VECTOR=vector)
    (launch,) = launches
    assert bool(re.search(r"ld\.global\S*\.v4\.b32", launch.kernel.asm["ptx"])) == (vector > 1)


@triton.jit
def _rows_of(tile, stride):
    """Offsets of 128 rows, heads of a query."""
    rows = tile * 128 + tl.arange(0, 128)
    return (rows // 71).to(tl.int64) * stride + (rows % 71).to(tl.int64) * 64


@triton.jit
def _loop_between_rows_kernel(x_ptr, out_ptr, num_tiles, stride, AGAIN: tl.constexpr):
    """The rows are those of the loads before the loop, and of the stores after it."""
    tile, columns = tl.program_id(0), tl.arange(0, 64)[None, :]
    offsets = _rows_of(tile, stride)
    q = tl.load(x_ptr + (offsets[:, None] + columns))
    acc = tl.zeros([128, 64], tl.float32)
    for i in tl.range(0, num_tiles):
        k = tl.load(x_ptr + ((i * 64 + tl.arange(0, 64))[:, None] * 64 + columns))
        fence_copies()
        acc = tl.dot(tl.math.exp2(tl.dot(q, k.T)).to(q.dtype), k, acc)
    if AGAIN:
        offsets = _rows_of(computed_again(tile), stride)
    tl.store(out_ptr + (offsets[:, None] + columns), acc.to(out_ptr.dtype.element_ty))


@pytest.mark.oldest
@pytest.mark.parametrize("again", [True, False])
def test_rows_of_loads_before_a_loop_are_kept_for_stores_after_it(again):
    x = torch.empty(1, 64, dtype=torch.bfloat16)
    with compile_only("sm_90") as launches:
        _loop_between_rows_kernel[(1,)](x, x, 3, 71 * 64, AGAIN=again, num_warps=8)
    (launch,) = launches
    *_, after_loop = launch.kernel.asm["ptx"].split("wgmma.mma_async")
    assert ("mul.hi" in after_loop) == again  # of the division by 71


@triton.jit
def _multiply_kernel(a_ptr, b_ptr, out_ptr, num_tiles, stride, FENCE: tl.constexpr):
    rows, columns = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    a = tl.load(a_ptr + rows * stride + columns)
    acc = tl.zeros([64, 64], tl.float32)
    for i in tl.range(0, num_tiles, num_stages=3):
        b = tl.load(b_ptr + (i * 64 + rows) * stride + columns)
        if FENCE:
            fence_copies()
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + rows * stride + columns, acc)


@triton.jit
def _scaled_scores_kernel(x_ptr, scales_ptr, out_ptr, num_tiles, ONCE: tl.constexpr):
    """Like attention, with a scale for each key."""
    rows, keys, columns = tl.arange(0, 128)[:, None], tl.arange(0, 64), tl.arange(0, 64)[None, :]
    q = tl.load(x_ptr + rows * 64 + columns)
    acc = tl.zeros([128, 64], tl.float32)
    for i in tl.range(0, num_tiles, num_stages=3):
        k = tl.load(x_ptr + (i * 64 + keys)[:, None] * 64 + columns)
        fence_copies()
        scales = tl.load(scales_ptr + i * 64 + keys)
        if ONCE:
            scales = loaded_once(scales)
        acc = tl.dot((tl.dot(q, k.T) * scales[None, :]).to(q.dtype), k, acc)
    tl.store(out_ptr + rows * 64 + columns, acc.to(q.dtype))


@pytest.mark.oldest
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_triton_3_6_alone_loads_a_vector_in_the_layout_of_scores(arch, once):
    """A thread copies two vectors of keys, and one scale or those of all its scores."""
    x, scales = torch.empty(1024, 64, dtype=torch.bfloat16), torch.empty(1024)
    with compile_only(arch) as launches:
        _scaled_scores_kernel[(1,)](x, scales, x, 16, ONCE=once, num_warps=8)
    (launch,) = launches
    more_copies = loop_model.analyze(launch.kernel).hot.async_copies > 3
    assert more_copies == (not once and triton.__version__.startswith("3.6."))


@triton.jit(do_not_specialize=["num_tiles", "end"])
def _cut_chain_kernel(x_ptr, out_ptr, num_tiles, end, APART: tl.constexpr):
    """The sum over tiles y of exp2 of x @ y.T + y @ x.T, each matmul in a `dot_once`. APART: "no", "ours", or "impure",
    as on Triton 3.6 everywhere."""
    rows, columns = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + rows * 64 + columns)
    total = tl.zeros([64, 64], tl.float32)
    for i in tl.range(0, num_tiles):
        one = (i * 64 < end).to(tl.int32)
        y = tl.load(x_ptr + (i * 64 + rows) * 64 + columns)
        acc = tl.zeros([64, 64], tl.float32)
        if APART == "ours":
            acc = apart(acc, one)
        if APART == "impure":
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, False, 1)
        acc = dot_once(x, y, acc, one, "ieee")
        total += tl.math.exp2(dot_once(y, x, acc, one, "ieee"))
    tl.store(out_ptr + rows * 64 + columns, total)


@pytest.mark.oldest
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("how", ["no", "ours"])
def test_llvm_copies_zeros_after_the_fence_of_wgmma(how):
    x, out = torch.randn(192, 64, dtype=torch.bfloat16), torch.empty(64, 64)
    with emulate("sm_90", strict=False) as log:
        _cut_chain_kernel[(1,)](x, out, 3, 192, APART=how, num_warps=4)
    kinds = {fault.kind for launch in log for fault in launch.faults}
    assert kinds == (set() if how == "ours" else {"no wgmma.fence since a register was accessed"})


@pytest.mark.oldest
@pytest.mark.parametrize("how", ["ours", "impure"])
def test_results_of_impure_instructions_go_through_shared_memory_but_on_3_6(how):
    x = torch.empty(192, 64, dtype=torch.bfloat16)
    with compile_only("sm_90") as launches:
        _cut_chain_kernel[(1,)](x, torch.empty(64, 64), 3, 192, APART=how, num_warps=4)
    (launch,) = launches
    to_mma = r"convert_layout .*xf32, #blocked\d*> -> tensor<64x64xf32, #mma>"
    assert bool(re.search(to_mma, launch.kernel.asm["ttgir"])) == (
        how == "impure" and not triton.__version__.startswith("3.6.")
    )


@pytest.mark.oldest
@pytest.mark.parametrize("fence", [False, True])
def test_triton_3_6_alone_leaves_out_a_proxy_fence(fence):
    a, b = torch.empty(64, 64, dtype=torch.float16), torch.empty(640, 64, dtype=torch.float16)
    with compile_only("sm_90") as launches:
        _multiply_kernel[(1,)](a, b, torch.empty(64, 64), 10, 64, FENCE=fence)
    (launch,) = launches
    ptx = launch.kernel.asm["ptx"]
    assert launch.uses_wgmma
    assert launch.uses_cp_async
    loop = ptx[: ptx.rindex("wgmma.mma_async")].rsplit("$L__BB", 1)[1]
    assert ("fence.proxy.async" in loop) == (fence or not triton.__version__.startswith("3.6."))


def spills_of_softcap(hoist):
    q = torch.empty(1, 1024, 4, 320, dtype=torch.float16)
    forget_plans()  # a plan is cached by the arguments of the call
    with mock.patch.object(forward, "tanh_spills", return_value=not hoist), compile_only("sm_90") as launches:
        flash_attention(q, q, q, window_size=(256, 256), softcap=30.0)
    forget_plans()
    (launch,) = launches
    assert launch.constexprs["HOIST"] == hoist
    return launch.spill_bytes


@pytest.mark.oldest
def test_triton_3_6_spills_where_the_constants_of_tanh_are_hoisted():
    assert spills_of_softcap(hoist=False) == 0
    assert (spills_of_softcap(hoist=True) > 0) == triton.__version__.startswith("3.6.")


def test_softcap_takes_one_instruction_for_a_reciprocal():
    q = torch.empty(1, 1024, 4, 64, dtype=torch.float16)
    with compile_only("sm_80") as launches:
        flash_attention(q, q, q, softcap=30.0)
    (launch,) = launches
    loop = launch.kernel.asm["ptx"].split("mma.sync", 1)[1].rsplit("mma.sync", 1)[0]
    assert "rcp.approx.ftz.f32" in loop
    # Scalars, and the normalisation after the loop, may be divided.
    assert loop.count("div.full.f32") <= 2


def spills_of_dkdv(head_dim, hoist):
    """Bytes that the default kernel spills on sm_90, with and without LICM."""
    q = torch.empty(1, 512, 2, head_dim, dtype=torch.float16)
    options = AttentionOptions(1.0, (None, 0), None, None, None)
    wanted = False, True, True, False
    forget_plans()
    with mock.patch.object(backward, "may_hoist", return_value=hoist), compile_only("sm_90") as launches:
        backward.launch_flash_bwd(call_of(q, q, q, options), q, None, q, torch.empty(1, 2, 512), wanted)
    forget_plans()
    return launches[-1].spill_bytes


@pytest.mark.ci
def test_dkdv_spills_where_a_wide_head_is_hoisted():
    assert spills_of_dkdv(256, hoist=True) > spills_of_dkdv(256, hoist=False)


@pytest.mark.oldest
@pytest.mark.parametrize("cut_chain", [False, True])
def test_matmuls_of_64_rows_that_feed_each_other_are_done_twice(cut_chain):
    q, q_pe = torch.empty(4, 1, 128, 512, dtype=torch.bfloat16), torch.empty(4, 1, 128, 64, dtype=torch.bfloat16)
    cache, table = torch.empty(64, 64, 576, dtype=torch.bfloat16), torch.zeros(4, 16, dtype=torch.int32)
    lengths = torch.full((4,), 1000, dtype=torch.int32)
    forget_plans()
    with mock.patch.object(gpu, "has_wgmma", return_value=cut_chain), compile_only("sm_90") as launches:
        mla_decode(q, q_pe, cache, lengths, table, softmax_scale=0.1)
    forget_plans()
    launch = next(launch for launch in launches if "CUT_CHAIN" in launch.constexprs)
    assert launch.constexprs["CUT_CHAIN"] == cut_chain
    assert (loop_model.analyze(launch.kernel).hot.useful == 1) == cut_chain


@pytest.mark.oldest
def test_a_tile_of_512_columns_takes_more_shared_memory_on_amd_than_its_halves():
    q, q_pe = torch.empty(4, 1, 16, 512, dtype=torch.bfloat16), torch.empty(4, 1, 16, 64, dtype=torch.bfloat16)
    cache, table = torch.empty(64, 64, 576, dtype=torch.bfloat16), torch.zeros(4, 16, dtype=torch.int32)
    lengths = torch.full((4,), 1000, dtype=torch.int32)
    shared = {}
    for widest in (absorbed.WIDEST, 512):
        forget_plans()
        with mock.patch.object(absorbed, "WIDEST", widest), compile_only("gfx942") as launches:
            mla_decode(q, q_pe, cache, lengths, table, softmax_scale=0.1, num_splits=1)
        (launch,) = launches
        shared[len(launch.constexprs["GROUPS"])] = launch.shared_bytes
    forget_plans()
    assert shared[1] > shared[2]


def test_descriptors_have_checks_that_cost_and_no_more_fields():
    x = torch.empty(64, 64, dtype=torch.float16)
    checked = TensorDescriptor(x, [64, 64], [64, 1], [16, 64])
    fields = dict(shape=[64, 64], strides=[64, 1], block_shape=[16, 64])
    unchecked = unchecked_descriptor(TensorDescriptor, x, fields)
    assert {name: getattr(unchecked, name) for name in vars(checked)} == vars(checked)
    with mock.patch.object(TensorDescriptor, "__post_init__", side_effect=AssertionError):
        unchecked_descriptor(TensorDescriptor, x, fields)
        with pytest.raises(AssertionError):
            TensorDescriptor(x, [64, 64], [64, 1], [16, 64])
