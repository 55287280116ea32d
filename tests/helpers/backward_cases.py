"""Calls of flash_attention with their backward pass. Gradients are checked against fp64 autograd."""

import contextlib
from dataclasses import dataclass

import torch
from attention_cases import DEVICE, INTERPRETED, LAYOUTS, Case, Inputs, of_argument, rows_loaded, share_of_bound, using
from attention_cases import PLAIN as PLAIN_FORWARD

from triton_attn._host.gpu import repeats_rows
from triton_attn.dense.backward_configs import BackwardConfig, dk_apart_from_dv
from triton_attn.dense.tiles import HALF, in_chunks
from triton_attn.testing import assert_close_to_reference, poisoned_empty
from triton_attn.toolchain import guard

# Layouts of gradients that autograd passes: from a sum, or from a transposed view.
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


def alike(tile):
    return BackwardConfig(tile, tile, tile)


TILE = PLAIN_FORWARD.config
PLAIN = BackwardCase(
    **vars(PLAIN_FORWARD), tiles=alike(TILE), deterministic=True, dout_layout="contiguous", dlse_layout=None
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
        """(out, lse), and the tensors to differentiate by: q, k, v, and the sinks if there are any."""
        leaves = [x.detach().requires_grad_() for x in (*self.given, self.sinks) if x is not None]
        sinks = leaves[3] if self.case.sinks else None
        return self.call_with(*leaves[:3], sinks, deterministic=self.case.deterministic), leaves

    def expected_gradients(self, dtype):
        """Gradients in dtype by autograd of the definition, for each sequence."""
        for i, qkv in enumerate(zip(*self.clean)):
            leaves = [x.to(dtype).detach().requires_grad_() for x in qkv]
            sinks = None
            if self.case.sinks:
                sinks = self.sinks.to(torch.promote_types(dtype, self.case.sinks)).detach().requires_grad_()
                leaves.append(sinks)
            outputs = self.attend(i, *leaves[:3], sinks, compute_dtype=dtype)
            yield gradients(outputs, leaves, (self.clean_dout[i], self.clean_dlse[i]))


def as_lse(x):
    """Convert (..., rows, heads, 1) to the layout of lse, (..., heads, rows), and its dtype."""
    return x[..., 0].mT.float()


def gradients(outputs, leaves, douts):
    """Gradients of the leaves from those of out and lse; None counts as 0."""
    pairs = [(output, dout.to(output.dtype)) for output, dout in zip(outputs, douts) if dout is not None]
    outputs, douts = zip(*pairs)
    return torch.autograd.grad(outputs, leaves, douts)


def by_sequence(case, x, seqlens):
    """x (..., rows, heads, dim) as one tensor (rows, heads, dim) for each sequence, and the spare rows."""
    return (x if case.varlen else x.flatten(0, 1)).split((*seqlens, case.spare_rows))


def check(case):
    """The gradients are right in every row, each element is written once, and only tiles that matter are read.

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
            visible = case.visible(i, DEVICE)
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
    """The rounding error of a gradient: `relative` to the largest entry, and absolute if large terms cancel."""
    # Scores are fp32. In half precision their tanh is computed through exp2, exact to the rounding of softcap.
    score_eps = torch.finfo(torch.float32).eps * (4 + (case.dtype != torch.float32) * case.softcap)
    eps = max(torch.finfo(case.dtype).eps, score_eps)
    products = by_sequence(case, inputs.dout.double() * out.double(), case.seqlens_q)
    products = torch.cat([out.new_zeros(0, *out.shape[-2:]).double(), *(products[i] for i in clean)])
    if not products.numel():
        return {"relative": eps}
    # Each row of dS sums to 0. With a single key only the fp32 rounding of dout * out remains, where out is that key's
    # value. Dropout scales it and a sink changes it, so out is rounded to its dtype as well.
    row_eps = eps if case.dropout_p or case.sinks else score_eps
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    row = torch.linalg.vector_norm(products, dim=2).max().item() * row_eps * scale
    largest_q, largest_k = (
        max((x.abs().max().item() for x in inputs.clean[i] if x.numel()), default=0) for i in (0, 1)
    )
    queries = max(case.seqlens_q) * case.group_size
    # A sink's gradient sums dout * out over all rows, with rounded out.
    head = torch.linalg.vector_norm(products, dim=(0, 2)).max().item() * eps
    return {"relative": eps, "dq": row * largest_k, "dk": row * largest_q * queries**0.5, "dsinks": head}


def loads_twice(case, tile, rows, loads_by_tma):
    """Whether a program of so many rows loads halves of wide q or k by TMA for S, and again for dK or dQ."""
    is_wide = max(case.head_dim, case.head_dim_v) > HALF
    return is_wide and loads_by_tma and repeats_rows("interpreter", rows, tile.num_warps)


def check_accesses(case, accesses):
    """dk, dv and the dq of the split schedule are stored once. Two tiles meet if one of the queries sees a key."""
    apart = dk_apart_from_dv("interpreter", (case.head_dim, case.head_dim_v), case.tiles.dkdv)
    chunked = in_chunks(case.dtype, (case.head_dim, case.head_dim_v))
    fused = not case.deterministic and not apart and not chunked
    launches = 2 if apart else 1  # of dkdv
    size = case.dtype.itemsize
    spare_rows = case.spare_rows if case.varlen and case.seqlens_q else 0  # cleared by kernels
    num_keys = (sum(case.seqlens_k) + spare_rows) * case.num_heads_kv
    assert accesses.bytes_stored["dk.ptr"] == num_keys * case.head_dim * size
    assert accesses.bytes_stored["dv.ptr"] == num_keys * case.head_dim_v * size
    if chunked:
        num_rows = (sum(case.seqlens_q) + spare_rows) * case.num_heads_q
        assert accesses.bytes_stored["dq.ptr"] == num_rows * case.head_dim * size
        check_loads_of_chunks(case, accesses.bytes_loaded, launches)
        return
    tile = case.tiles.fused if fused else case.tiles.dkdv
    num_queries = rows_loaded(case, tile, of_queries=True) * launches
    # A program loads its own tile once: queries in the kernels of delta and dq, keys in that of dkdv.
    own_queries = sum(case.seqlens_q) * case.num_heads_q
    own_keys = sum(case.seqlens_k) * case.num_heads_kv * launches
    rows = num_queries if fused else num_queries + own_queries
    # Strides may not suit TMA.
    q_by_tma, k_by_tma = (accesses.bytes_loaded[name] > 0 for name in ("q_desc", "k_desc"))
    again = num_queries // launches if apart and loads_twice(case, tile, tile.block_n, q_by_tma) else 0
    assert of_argument(accesses.bytes_loaded, "q") == (rows + again) * case.head_dim * size
    assert of_argument(accesses.bytes_loaded, "dout") == (rows + own_queries) * case.head_dim_v * size
    if fused:
        assert of_argument(accesses.bytes_stored, "dq") == num_queries * case.head_dim * 4
        return
    num_rows = sum(case.seqlens_q) + spare_rows
    assert accesses.bytes_stored["dq.ptr"] == num_rows * case.num_heads_q * case.head_dim * size
    passing = rows_loaded(case, case.tiles.dq)
    num_keys = passing + own_keys
    again = passing if loads_twice(case, case.tiles.dq, case.tiles.dq.block_m, k_by_tma) else 0
    assert of_argument(accesses.bytes_loaded, "k") == (num_keys + again) * case.head_dim * size
    assert of_argument(accesses.bytes_loaded, "v") == num_keys * case.head_dim_v * size


def check_loads_of_chunks(case, bytes_loaded, launches):
    """A program loads chunks of its own tile with each tile that passes: q and k for S, v and dout for dP. It loads
    tiles that pass for these, and again for dK, dV and dQ. delta reads dout."""
    tiles, size = case.tiles, case.dtype.itemsize
    queries, keys = rows_loaded(case, tiles.dkdv, of_queries=True), rows_loaded(case, tiles.dq)
    own_keys = rows_loaded(case, tiles.dkdv, of_queries=True, own=True) * launches
    own_queries = rows_loaded(case, tiles.dq, own=True)
    passing = queries * (launches + 1)  # once for S or dP in each launch of dkdv, and for dK or dV in one of them
    rows = passing + own_queries
    assert bytes_loaded["q.ptr"] == rows * case.head_dim * size
    assert bytes_loaded["dout.ptr"] == (rows + sum(case.seqlens_q) * case.num_heads_q) * case.head_dim_v * size
    assert bytes_loaded["k.ptr"] == (own_keys + 2 * keys) * case.head_dim * size
    assert bytes_loaded["v.ptr"] == (own_keys + keys) * case.head_dim_v * size
