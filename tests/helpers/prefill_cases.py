"""Calls of mla_prefill, each checked against fp64."""

import contextlib
import itertools
from dataclasses import dataclass
from unittest import mock

import torch
from decode_cases import DEVICE, INTERPRETED, PLAIN

from triton_attn import mla_prefill
from triton_attn._host import gpu
from triton_attn._host.definition import attend
from triton_attn._host.tuned import forget_plans
from triton_attn.mla import absorbed, prefill
from triton_attn.mla.configs import MlaDecodeConfig, MlaPrefillConfig
from triton_attn.testing import assert_close_to_reference, poisoned_empty
from triton_attn.toolchain import guard

NAN = float("nan")
NAMES = ("q_nope", "q_pe", "kv_latent", "k_pe", "w_uk", "w_uv")
TILES = MlaPrefillConfig(32, 32, 4, 1, 32)
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "heads first": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "wide": lambda x: torch.nn.functional.pad(x, (3, 13))[..., 3:-13],
}


@dataclass(frozen=True)
class Case:
    """One call: packed sequences, or a dense batch of sequences with equal lengths."""

    mode: str
    dtype: torch.dtype = torch.float16
    packed: bool = False
    seqlens_q: tuple = (40, 40)
    seqlens_k: tuple = (70, 70)
    num_heads: int = 3
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    kv_lora_rank: int = 48
    v_head_dim: int = 24
    causal: bool = True
    softmax_scale: float | None = None
    max_workspace_bytes: int = 2**28
    q_layout: str = "contiguous"
    one_projection: bool = False  # latent vectors and rotary keys are slices of one tensor, as in models
    spare_rows: int = 0  # after the last sequence
    config: MlaPrefillConfig = TILES
    seed: int = 0


class Inputs:
    """The inputs of a call. Rows after the last sequence are NaN."""

    def __init__(self, case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        nope, rank = case.qk_nope_head_dim, case.kv_lora_rank
        rows_q, rows_k = sum(case.seqlens_q), sum(case.seqlens_k)
        self.q_nope, self.q_pe = (self._rows(rows_q, case.num_heads, dim) for dim in (nope, case.qk_rope_head_dim))
        if case.one_projection:
            self.kv_latent, self.k_pe = self._rows(rows_k, rank + case.qk_rope_head_dim).split_with_sizes(
                [rank, case.qk_rope_head_dim], dim=-1
            )
        else:
            self.kv_latent, self.k_pe = (self._rows(rows_k, dim) for dim in (rank, case.qk_rope_head_dim))
        weight = self._randn(case.num_heads, nope + case.v_head_dim, rank) * rank**-0.5
        self.w_uk, self.w_uv = weight.split([nope, case.v_head_dim], dim=1)

    def _randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(DEVICE, self.case.dtype)

    def _rows(self, rows, *shape):
        x = self._randn(rows + self.case.spare_rows, *shape)
        x[rows:] = NAN
        return x

    @property
    def tensors(self):
        """The arguments of the call."""
        case = self.case
        q_nope, q_pe, latent, k_pe = self.q_nope, self.q_pe, self.kv_latent, self.k_pe
        if not case.packed:
            batch = len(case.seqlens_q)
            shapes = [(batch, case.seqlens_q[0] if batch else 3)] * 2 + [(batch, case.seqlens_k[0] if batch else 3)] * 2
            q_nope, q_pe, latent, k_pe = (
                x.unflatten(0, shape) for x, shape in zip((q_nope, q_pe, latent, k_pe), shapes)
            )
        return [LAYOUTS[case.q_layout](q_nope), LAYOUTS[case.q_layout](q_pe), latent, k_pe, self.w_uk, self.w_uv]

    @property
    def options(self):
        case = self.case
        options = dict(causal=case.causal, softmax_scale=case.softmax_scale, mode=case.mode)
        options["max_workspace_bytes"] = case.max_workspace_bytes
        if case.packed:
            for name, seqlens in (("q", case.seqlens_q), ("k", case.seqlens_k)):
                bounds = [0, *itertools.accumulate(seqlens)]
                options[f"cu_seqlens_{name}"] = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
                options[f"max_seqlen_{name}"] = max(seqlens, default=0)
        return options

    def rows_of(self, out, lse):
        """out (rows, heads, dim) and lse (rows, heads) of a call's results, without the spare rows."""
        if not self.case.packed:
            return out.flatten(0, 1), lse.mT.flatten(0, 1)
        rows = sum(self.case.seqlens_q)
        return out[:rows], lse.mT[:rows]

    def expected(self, dtype, tensors=None):
        """out (rows, heads, dim) and lse (rows, heads), by keys and values of every head, every step in dtype."""
        case = self.case
        rows_q, rows_k = sum(case.seqlens_q), sum(case.seqlens_k)
        q_nope, q_pe, latent, k_pe, w_uk, w_uv = tensors or (
            x.to(dtype) for x in (self.q_nope, self.q_pe, self.kv_latent, self.k_pe, self.w_uk, self.w_uv)
        )
        width = case.qk_nope_head_dim + case.qk_rope_head_dim
        scale = width**-0.5 if case.softmax_scale is None else case.softmax_scale
        outs = [q_nope.new_zeros(0, case.num_heads, case.v_head_dim)]
        lses = [q_nope.new_zeros(0, case.num_heads)]
        # Copies: with AMX, torch's half-precision matmuls read past a row's end, where NaN are.
        queries = torch.cat([q_nope, q_pe], dim=-1)[:rows_q].clone().split(case.seqlens_q)
        sequences = (x[:rows_k].clone().split(case.seqlens_k) for x in (latent, k_pe))
        for q, latent_i, k_pe_i in zip(queries, *sequences):
            k_nope = torch.einsum("jc,hnc->jhn", latent_i, w_uk)
            k = torch.cat([k_nope, k_pe_i.unsqueeze(1).expand(-1, case.num_heads, -1)], dim=-1)
            v = torch.einsum("jc,hvc->jhv", latent_i, w_uv)
            options = dict(causal=case.causal, softmax_scale=scale, compute_dtype=dtype)
            out, lse = attend(q[None], k[None], v[None], **options, **PLAIN)
            outs.append(out[0])
            lses.append(lse[0].mT)
        return torch.cat(outs), torch.cat(lses)


@contextlib.contextmanager
def using(config):
    """The kernels run with these tiles. On a GPU they use their own, which fit."""
    if not INTERPRETED:
        yield
        return
    rows = MlaDecodeConfig(config.block_m, config.block_n, 8, 1)
    with (
        mock.patch.object(prefill, "choose", return_value=config),
        mock.patch.object(absorbed, "choose", return_value=rows),
        mock.patch.object(gpu, "has_wgmma", return_value=True),  # 64 rows use the form of sm_90
    ):
        forget_plans()
        yield
    forget_plans()


def floor_of(case, inputs):
    """Weights sum to 1 and each is rounded once, and so are the values: their effect, even if values cancel."""
    eps = max(torch.finfo(case.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    rows = inputs.kv_latent[: sum(case.seqlens_k)].double()
    largest = rows.abs().max().item() if rows.numel() else 0.0
    return eps * largest * inputs.w_uv.double().abs().sum(-1).max().item() / 2


def check(case):
    """The call is right in every row, and writes each element once."""
    inputs = Inputs(case)
    with using(case.config), poisoned_empty(), guard() if INTERPRETED else contextlib.nullcontext():
        out, lse = mla_prefill(*inputs.tensors, **inputs.options, return_lse=True)
    if case.packed:
        assert (out[sum(case.seqlens_q) :] == 0).all()
        assert (lse[:, sum(case.seqlens_q) :] == -torch.inf).all()
    out, lse = inputs.rows_of(out, lse)
    if not out.numel():
        return
    out64, lse64 = inputs.expected(torch.float64)
    torch_out, torch_lse = inputs.expected(case.dtype)
    closeness = assert_close_to_reference(out, out64, torch_out=torch_out, floor=floor_of(case, inputs))
    finite = lse64.isfinite()
    scale = max(1.0, lse64[finite].abs().amax().item() if finite.any() else 0.0)
    torch_error = (torch_lse.double() - lse64)[finite].abs().amax().item() if finite.any() else 0.0
    eps = max(torch.finfo(case.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    assert_close_to_reference(lse, lse64, torch_error=torch_error, floor=eps * scale, name="lse")
    return closeness


def check_gradients(case):
    """Gradients against fp64 autograd of the definition, with at most 3 times torch's error in the same dtype.

    Returns the closeness of each gradient by the name of its tensor.
    """
    inputs = Inputs(case)
    tensors = [x.detach().requires_grad_() for x in inputs.tensors]
    with using(case.config), poisoned_empty(), guard() if INTERPRETED else contextlib.nullcontext():
        results = mla_prefill(*tensors, **inputs.options, return_lse=True)
        dout, dlse = (torch.randn(x.shape, generator=inputs.generator).to(DEVICE, x.dtype) for x in results)
        if case.packed:
            dout[sum(case.seqlens_q) :] = NAN
        seen = results[1].isfinite()
        dlse = torch.where(seen, dlse, 0)
        gradients = torch.autograd.grad([results[0], torch.where(seen, results[1], 0)], tensors, [dout, dlse])

    if case.packed:
        for x, seqlens in zip(gradients, (case.seqlens_q, case.seqlens_q, case.seqlens_k, case.seqlens_k)):
            assert (x[sum(seqlens) :] == 0).all()

    def expected(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        flat = [x.flatten(0, 1) if i < 4 and not case.packed else x for i, x in enumerate(leaves)]
        out, lse = inputs.expected(dtype, flat)
        dout_rows, dlse_rows = inputs.rows_of(dout, dlse)
        lse = torch.where(lse.isfinite(), lse, 0)
        return torch.autograd.grad([out, lse], leaves, [dout_rows.to(dtype), dlse_rows.to(dtype)])

    return {
        name: assert_close_to_reference(x, ref, torch_out=torch_x, factor=3.0, name=name)
        for name, x, ref, torch_x in zip(NAMES, gradients, expected(torch.float64), expected(case.dtype))
    }
