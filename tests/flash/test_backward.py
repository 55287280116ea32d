"""The backward kernels against fp64 autograd through the definition: random calls, and each edge in an example."""

import contextlib
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from attention_cases import (
    DEVICE,
    DTYPES,
    HEAD_DIMS,
    INTERPRETED,
    LAYOUTS,
    Case,
    Inputs,
    cases,
    check_random,
    far_apart,
    lying_far_apart,
    rows_loaded,
    share_of_bound,
    using,
)
from attention_cases import PLAIN as PLAIN_FORWARD
from hypothesis import strategies as st
from triton.runtime import interpreter

from triton_attn import flash_attention, reference
from triton_attn._host.definition import visible_keys
from triton_attn.flash.backward_configs import BackwardConfig
from triton_attn.flash.configs import FlashConfig
from triton_attn.testing import assert_close_to_reference, guard, poisoned_empty

# NaN and infinity are fed on purpose, and numpy speaks up when it computes with them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# As autograd hands it over: of a sum, or of what follows a transposed view.
DOUT_LAYOUTS = LAYOUTS | {
    "one number": lambda x: x.new_ones(()).expand(x.shape),
    "last dimension apart": lambda x: x.mT.contiguous().mT,
}


@dataclass(frozen=True, kw_only=True)
class BackwardCase(Case):
    """A call and its backward pass."""

    tiles: BackwardConfig
    deterministic: bool
    dout_layout: str
    dlse_layout: str | None  # None: lse has no gradient


@st.composite
def backward_cases(draw, dtype, varlen):
    case = draw(cases(dtype, varlen))
    head_dims = st.sampled_from([dim for dim in HEAD_DIMS if dim <= 256]) | st.integers(1, 256)

    def tile(use_tma):
        # Not below the forward's tiles, by which the lengths were drawn: small tiles take the interpreter long.
        block_m = draw(st.sampled_from([16, 32, 64, 128]).filter(lambda block: block >= case.config.block_m))
        block_n = draw(st.sampled_from([16, 32, 64, 128]).filter(lambda block: block >= case.config.block_n))
        return FlashConfig(block_m, block_n, num_warps=4, num_stages=1, use_tma=use_tma)

    tiles = (tile(use_tma) for use_tma in [draw(st.booleans())] * 3)
    return BackwardCase(
        **vars(case) | {"head_dim": draw(head_dims), "head_dim_v": draw(head_dims)},
        tiles=BackwardConfig(*tiles),
        deterministic=draw(st.booleans()),
        dout_layout=draw(st.sampled_from(list(DOUT_LAYOUTS))),
        dlse_layout=draw(st.none() | st.sampled_from(list(DOUT_LAYOUTS))),
    )


class BackwardInputs(Inputs):
    """Inputs of a case and the gradients of its outputs: `clean` per sequence, and as given."""

    def __init__(self, case):
        super().__init__(case)
        rows = (case.seqlens_q, case.num_heads_q)
        self.clean_dout, self.dout = self._tensor(*rows, case.head_dim_v, DOUT_LAYOUTS[case.dout_layout])
        self.clean_dlse, self.dlse = [None] * len(case.seqlens_q), None
        if case.dlse_layout:
            clean, dlse = self._tensor(*rows, 1, DOUT_LAYOUTS[case.dlse_layout])
            self.clean_dlse, self.dlse = [as_lse(x) for x in clean], as_lse(dlse)

    def forward(self):
        """(out, lse), and what they are to be differentiated by: q, k, v, and the sinks where there are any."""
        leaves = [x.detach().requires_grad_() for x in (*self.given, self.sinks) if x is not None]
        sinks = leaves[3] if self.case.sinks else None
        return self.call_with(*leaves[:3], sinks, deterministic=self.case.deterministic), leaves

    def expected_gradients(self, dtype):
        """In dtype by autograd through the definition, for each sequence."""
        for i, qkv in enumerate(zip(*self.clean)):
            leaves = [x.to(dtype).detach().requires_grad_() for x in qkv]
            sinks = None
            if self.case.sinks:
                sinks = self.sinks.to(torch.promote_types(dtype, self.case.sinks)).detach().requires_grad_()
                leaves.append(sinks)
            outputs = self.attend(i, *leaves[:3], sinks, compute_dtype=dtype)
            yield gradients(outputs, leaves, (self.clean_dout[i], self.clean_dlse[i]))


def as_lse(x):
    """(..., rows, heads, 1) in the order of lse, (..., heads, rows), and in its dtype."""
    return x[..., 0].mT.float()


def gradients(outputs, leaves, douts):
    """Of the leaves, from those of out and lse; None counts as 0."""
    pairs = [(output, dout.to(output.dtype)) for output, dout in zip(outputs, douts) if dout is not None]
    outputs, douts = zip(*pairs)
    return torch.autograd.grad(outputs, leaves, douts)


def by_sequence(case, x, seqlens):
    """x (..., rows, heads, dim) as one tensor (rows, heads, dim) for each sequence, and the spare rows."""
    return (x if case.varlen else x.flatten(0, 1)).split((*seqlens, case.spare_rows))


def check(case):
    """The gradients are right to the last row, each element is written once, and only tiles that matter are read.

    Returns the largest error over its bound.
    """
    inputs = BackwardInputs(case)
    with using(case.config, case.tiles), poisoned_empty():
        outputs, leaves = inputs.forward()
        with guard() if INTERPRETED else contextlib.nullcontext() as accesses:
            results = gradients(outputs, leaves, (inputs.dout, inputs.dlse))
    share = check_values(case, inputs, outputs[0].detach(), results)
    if INTERPRETED:
        check_accesses(case, accesses)
    return share


def check_values(case, inputs, out, results):
    exact = list(inputs.expected_gradients(torch.float64))
    by_torch = list(inputs.expected_gradients(case.dtype))
    clean = [i for i in range(len(case.seqlens_q)) if i != case.poisoned_sequence]
    floors = rounding(case, inputs, out, clean)
    shares = [0.0]
    for which, seqlens in enumerate((case.seqlens_q, case.seqlens_k, case.seqlens_k)):
        *sequences, spare = by_sequence(case, results[which], seqlens)
        assert (spare == 0).all()
        for i in clean:
            visible, _ = visible_keys(case.seqlens_q[i], case.seqlens_k[i], case.causal, case.window_size, DEVICE)
            assert (sequences[i][~visible.any(1 if which == 0 else 0)] == 0).all()
        if clean:
            closeness = assert_close(
                torch.cat([sequences[i] for i in clean]),
                torch.cat([exact[i][which][0] for i in clean]),
                torch.cat([by_torch[i][which][0] for i in clean]),
                floors,
                f"d{'qkv'[which]}",
            )
            shares.append(share_of_bound(closeness))
    if case.sinks and clean and case.poisoned_sequence is None:
        sums = (sum(row[3] for row in by) for by in (exact, by_torch))
        shares.append(share_of_bound(assert_close(results[3], *sums, floors, "dsinks")))
    return max(shares)


def assert_close(result, exact, by_torch, floors, name):
    largest = exact.abs().max().item() if exact.numel() else 0.0
    floor = max(floors["relative"] * largest, floors.get(name, 0.0))
    return assert_close_to_reference(result, exact, torch_out=by_torch, factor=3.0, floor=floor, name=name)


def rounding(case, inputs, out, clean):
    """What rounding leaves in a gradient: `relative` to the largest entry, and absolute where large terms cancel."""
    # Scores are fp32, and tanh by way of exp2 is exact to the rounding of softcap.
    score_eps = torch.finfo(torch.float32).eps * (4 + case.softcap)
    eps = max(torch.finfo(case.dtype).eps, score_eps)
    products = by_sequence(case, inputs.dout.double() * out.double(), case.seqlens_q)
    products = torch.cat([out.new_zeros(0, *out.shape[-2:]).double(), *(products[i] for i in clean)])
    if not products.numel():
        return {"relative": eps}
    # Each row of dS sums to 0: with a single key, nothing is left of its terms but what fp32 lost of dout * out, where
    # out is that key's value. Dropout scales it and a sink takes of it, so that out is rounded to its dtype as well.
    row_eps = eps if case.dropout_p or case.sinks else score_eps
    scale = abs(case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale)
    row = torch.linalg.vector_norm(products, dim=2).max().item() * row_eps * scale
    largest_q, largest_k = (
        max((x.abs().max().item() for x in inputs.clean[i] if x.numel()), default=0) for i in (0, 1)
    )
    queries = max(case.seqlens_q) * case.group_size
    # A sink gathers dout * out over all rows, out as it was rounded.
    head = torch.linalg.vector_norm(products, dim=(0, 2)).max().item() * eps
    return {"relative": eps, "dq": row * largest_k, "dk": row * largest_q * queries**0.5, "dsinks": head}


def check_accesses(case, accesses):
    """dk, dv and the dq of the split schedule are stored once; two tiles meet if one of the queries sees a key."""
    fused = not case.deterministic
    size = case.dtype.itemsize
    num_keys = sum(case.seqlens_k) * case.num_heads_kv
    assert accesses.bytes_stored["dk_ptr"] == num_keys * case.head_dim * size
    assert accesses.bytes_stored["dv_ptr"] == num_keys * case.head_dim_v * size
    tile = case.tiles.fused if fused else case.tiles.dkdv
    num_queries = rows_loaded(case, tile, of_queries=True)
    assert of_tile(accesses.bytes_loaded, "q") == num_queries * case.head_dim * size
    assert of_tile(accesses.bytes_loaded, "dout") == num_queries * case.head_dim_v * size
    if fused:
        assert of_tile(accesses.bytes_stored, "dq") == num_queries * case.head_dim * 4
        return
    assert accesses.bytes_stored["dq_ptr"] == sum(case.seqlens_q) * case.num_heads_q * case.head_dim * size
    num_keys = rows_loaded(case, case.tiles.dq)
    assert of_tile(accesses.bytes_loaded, "k") == num_keys * case.head_dim * size
    assert of_tile(accesses.bytes_loaded, "v") == num_keys * case.head_dim_v * size


def of_tile(bytes_by_name, name):
    """Bytes of a tile by pointer or by the descriptors of its one or two pieces."""
    return sum(bytes_by_name[key] for key in (name, f"{name}[0]", f"{name}[1]"))


@pytest.mark.parametrize("shard", range(2))
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(dtype, varlen, shard, record_property):
    seed = shard + 2 * varlen + 4 * DTYPES.index(dtype)
    what = f"backward, {str(dtype).removeprefix('torch.')}, {'varlen' if varlen else 'dense'}"
    check_random(check, backward_cases(dtype, varlen), seed, record_property, what)


def alike(tile):
    return BackwardConfig(tile, tile, tile)


TILE = PLAIN_FORWARD.config
PLAIN = BackwardCase(
    **vars(PLAIN_FORWARD), tiles=alike(TILE), deterministic=True, dout_layout="contiguous", dlse_layout=None
)
both_schedules = pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])


@pytest.mark.oldest
@both_schedules
@pytest.mark.parametrize("head_dim", [dim for dim in HEAD_DIMS if dim <= 256])
def test_every_head_dim(head_dim, deterministic):
    check(replace(PLAIN, head_dim=head_dim, head_dim_v=head_dim, deterministic=deterministic))


@pytest.mark.oldest
@both_schedules
@pytest.mark.parametrize("use_tma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bit_of_everything(dtype, use_tma, deterministic):
    check(
        replace(
            PLAIN,
            varlen=True,
            dtype=dtype,
            seqlens_q=(70, 0, 5, 33),
            seqlens_k=(100, 40, 0, 20),
            num_heads_kv=2,
            group_size=3,
            head_dim=80,
            head_dim_v=96,
            window_size=(30, -1),
            softcap=20.0,
            alibi="per sequence",
            sinks=dtype,
            dropout_p=0.2,
            poisoned_sequence=1,
            spare_rows=9,
            tiles=alike(replace(TILE, use_tma=use_tma)),
            deterministic=deterministic,
            dlse_layout="contiguous",
        )
    )


@pytest.mark.parametrize(
    ("num_heads_kv", "group_size", "head_dim", "options"),
    [
        pytest.param(1, 71, 64, {}, id="Falcon-7B"),
        pytest.param(2, 16, 128, {}, id="Qwen3-235B-A22B, two of four KV heads"),
        pytest.param(1, 2, 256, {"window_size": (20, -1)}, id="Gemma-3, one of four KV heads"),
        pytest.param(1, 8, 64, {"window_size": (20, -1), "sinks": torch.float16}, id="gpt-oss, one of eight KV heads"),
        pytest.param(4, 1, 192, {"head_dim_v": 128}, id="DeepSeek-V3, four of 128 heads"),
    ],
)
def test_heads_of_real_models(num_heads_kv, group_size, head_dim, options):
    shape = {"num_heads_kv": num_heads_kv, "group_size": group_size, "head_dim": head_dim, "head_dim_v": head_dim}
    check(replace(PLAIN, **shape | options))


@both_schedules
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k"), [(0, 3, 3), (1, 0, 3), (1, 3, 0), (1, 0, 0), (1, 1, 1), (2, 1, 300), (2, 300, 1)]
)
def test_sizes_at_the_edge(batch, seqlen_q, seqlen_k, deterministic):
    lengths = {"seqlens_q": (seqlen_q,) * batch, "seqlens_k": (seqlen_k,) * batch}
    check(replace(PLAIN, sinks=torch.float32, deterministic=deterministic, **lengths))
    check(replace(PLAIN, varlen=True, deterministic=deterministic, **lengths))


@both_schedules
@pytest.mark.parametrize("softmax_scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive(softmax_scale, deterministic):
    check(replace(PLAIN, softmax_scale=softmax_scale, deterministic=deterministic))


@both_schedules
def test_rows_without_a_partner_have_no_gradient(deterministic):
    """Causal with more queries than keys, and a window that leaves the first keys to nobody."""
    q, k, v = (torch.randn(1, rows, 2, 16, device=DEVICE, requires_grad=True) for rows in (5, 2, 2))
    out = flash_attention(q, k, v, causal=True, deterministic=deterministic)
    dq, _, _ = torch.autograd.grad(out, (q, k, v), torch.full_like(out, 1e30))
    assert (dq[:, :3] == 0).all()

    q, k, v = (torch.randn(1, rows, 2, 16, device=DEVICE, requires_grad=True) for rows in (2, 9, 9))
    out = flash_attention(q, k, v, window_size=(1, 0), deterministic=deterministic)
    _, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dk[:, :6] == 0).all()
    assert (dv[:, :6] == 0).all()
    assert (dv[:, 6:] != 0).all()


def gradients_at_scores(scores, deterministic, **options):
    """Of q, k and v, and the exact ones, for 33 queries that score scores[j] with key j; v and dout are random."""
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 33, 1, 16)
    q[..., 0] = 1
    k = torch.zeros(1, len(scores), 1, 16)
    k[0, :, 0, 0] = scores
    k[..., 1:] = torch.randn(1, len(scores), 1, 15, generator=generator)
    v = torch.randn(1, len(scores), 1, 16, generator=generator)
    dout = torch.randn(1, 33, 1, 16, generator=generator)
    leaves = [x.to(DEVICE).requires_grad_() for x in (q, k, v)]
    exact_leaves = [x.double().requires_grad_() for x in (q, k, v)]
    with using(TILE):
        out = flash_attention(*leaves, softmax_scale=1.0, deterministic=deterministic, **options)
        results = torch.autograd.grad(out, leaves, dout.to(DEVICE))
    exact = reference.flash_attention(*exact_leaves, softmax_scale=1.0, **options)
    return results, torch.autograd.grad(exact, exact_leaves, dout.double())


@pytest.mark.oldest
@both_schedules
@pytest.mark.parametrize("use_window", [False, True])
@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(torch.linspace(-500, -499, 47), id="far below 0"),
        pytest.param(torch.linspace(499, 500, 47), id="far above 0"),
        pytest.param(torch.linspace(-1e4, 1e4, 47), id="far apart"),
    ],
)
def test_large_scores_leave_no_nan(scores, use_window, deterministic):
    """The last tile reaches past the last key, whose score of 0 would be weighted by exp(500)."""
    options = {"window_size": (20, 3)} if use_window else {}
    for result, exact in zip(*gradients_at_scores(scores, deterministic, **options)):
        floor = 1e-4 * exact.abs().max().item() + 1e-6 * scores.abs().max().item()
        assert_close_to_reference(result, exact, floor=floor)


@both_schedules
def test_softcap_saturates(deterministic):
    scores = torch.cat([torch.linspace(-1e5, 1e5, 40), torch.linspace(-1, 1, 7)])
    results, exact = gradients_at_scores(scores, deterministic, softcap=3.0)
    for result, exact_there in zip(results, exact):
        assert_close_to_reference(result, exact_there, floor=1e-5 * exact_there.abs().max().item())
    _, dk, _ = results
    assert (dk[:, :19] == 0).all()


@both_schedules
@pytest.mark.parametrize("use_tma", [False, True])
def test_schedules_and_tiles_agree(use_tma, deterministic):
    q, k, v = (torch.randn(1, rows, 2, 48, device=DEVICE, requires_grad=True) for rows in (100, 130, 130))

    def gradients_with(block_m, block_n):
        with using(FlashConfig(block_m, block_n, 4, 1, use_tma)):
            out = flash_attention(q, k, v, causal=True, deterministic=deterministic)
            return torch.autograd.grad(out.square().sum(), (q, k, v))

    with using(TILE):
        out = flash_attention(q, k, v, causal=True, deterministic=True)
        expected = torch.autograd.grad(out.square().sum(), (q, k, v))
    for blocks in ((16, 128), (128, 16), (64, 64)):
        for gradient, gradient_there in zip(gradients_with(*blocks), expected):
            torch.testing.assert_close(gradient, gradient_there)


@contextlib.contextmanager
def programs_in_reverse():
    """On a GPU programs come in whatever order; the interpreter takes one after the other."""
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx
    with mock.patch.object(builder, "set_grid_idx", lambda x, y, z: set_grid_idx(builder.grid_dim[0] - 1 - x, y, z)):
        yield


@both_schedules
def test_deterministic_repeats_bitwise(deterministic):
    q, k, v = (torch.randn(1, 200, heads, 32, device=DEVICE, requires_grad=True) for heads in (4, 2, 2))

    def gradients_again():
        with using(TILE):
            out = flash_attention(q, k, v, causal=True, deterministic=deterministic)
            return torch.autograd.grad(out.square().sum(), (q, k, v))

    expected = gradients_again()
    with programs_in_reverse() if INTERPRETED else contextlib.nullcontext():
        results = gradients_again()
    if deterministic:
        assert all(map(torch.equal, results, expected))
    elif INTERPRETED:
        assert not torch.equal(results[0], expected[0])  # atomics add in another order: the test can tell


@both_schedules
def test_gradients_are_contiguous_and_of_their_tensors_dtype(deterministic):
    case = replace(PLAIN, dtype=torch.bfloat16, layouts=("heads first", "sliced", "expanded"), sinks=torch.float32)
    inputs = BackwardInputs(replace(case, deterministic=deterministic))
    outputs, leaves = inputs.forward()
    for leaf, gradient in zip(leaves, gradients(outputs, leaves, (inputs.dout, None))):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        assert gradient.is_contiguous()


@both_schedules
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@far_apart
def test_offsets_past_32_bits(which, dim, size, stride, deterministic):
    shape = [1, 3, 1, 16]
    shape[dim] = size
    names = ("q", "k", "v", "dout")
    tensors = {name: torch.randn(shape, dtype=torch.float32).to(DEVICE, torch.float16) for name in names}

    def gradients_of(q, k, v, dout):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(flash_attention(*leaves, deterministic=deterministic), leaves, dout)

    with using(replace(TILE, block_m=64, block_n=64)):
        expected = gradients_of(**tensors)
        tensors[which] = lying_far_apart(tensors[which].detach(), dim, stride)
        assert all(map(torch.equal, gradients_of(**tensors), expected))
