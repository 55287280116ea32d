"""What multi-head latent attention computes, in plain torch: keys and values of every head, then plain attention."""

from typing import Any

import torch
from torch import Tensor

from .._host.definition import Padded, attend_tree, attention_gradients, packed_bounds, rotate
from .._host.key_shard import check_key_shard, num_ranks_of
from .._host.keywords import Mode
from .._host.latent import latent_parts, read_latent_parts
from .._host.observers import is_observed, without_autocast
from .._host.prefix_tree import PrefixTree

PLAIN = dict(window_size=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None)


@without_autocast
def mla_prefill(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_latent: Tensor,
    k_pe: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    mode: Mode = "auto",
    max_workspace_bytes: int = 2**28,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `triton_attn.mla_prefill`; with mode="absorbed" the same in the absorbed form."""
    if softmax_scale is None:
        softmax_scale = (q_nope.shape[-1] + q_pe.shape[-1]) ** -0.5
    options = dict(causal=causal, softmax_scale=softmax_scale, absorbed=mode == "absorbed")
    if cu_seqlens_q is None:
        out, lse = _attend(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, **options)
        return (out, lse) if return_lse else out
    if is_observed(cu_seqlens_q, cu_seqlens_k):  # all at once and padded where a tracer hides the lengths
        queries = Padded.of(cu_seqlens_q, max_seqlen_q, q_nope.shape[0])
        keys = Padded.of(cu_seqlens_k, max_seqlen_k, kv_latent.shape[0])
        inputs = queries.pad(q_nope), queries.pad(q_pe), keys.pad(kv_latent), keys.pad(k_pe)
        out, lse = _attend(*inputs, w_uk, w_uv, **options, lengths=(queries.lengths, keys.lengths))
        out = queries.unpad(out, 0.0)
        lse = queries.unpad(lse.transpose(1, 2), float("-inf")).T.contiguous()
        return (out, lse) if return_lse else out
    out = q_nope.new_zeros(*q_nope.shape[:2], w_uv.shape[1])
    lse = q_nope.new_full((q_nope.shape[1], q_nope.shape[0]), float("-inf"), dtype=_compute_dtype(q_nope))
    bounds_q = packed_bounds(cu_seqlens_q, len(q_nope))
    bounds_k = packed_bounds(cu_seqlens_k, len(kv_latent))
    for i in range(len(bounds_q) - 1):
        rows_q, rows_k = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        inputs = (x[rows][None] for x, rows in ((q_nope, rows_q), (q_pe, rows_q), (kv_latent, rows_k), (k_pe, rows_k)))
        out_i, lse_i = _attend(*inputs, w_uk, w_uv, **options)
        out[rows_q], lse[:, rows_q] = out_i[0], lse_i[0]
    return (out, lse) if return_lse else out


@without_autocast
def prefill_gradients(dout: Tensor, lse: Tensor, minus_delta: Tensor, call: Any) -> list[Tensor]:
    """Gradients of the six tensors of a PrefillCall, in fp32 (fp64 for fp64), by formulas and without autograd.

    lse and minus_delta, dlse - rowsum(dout * out), may be over more keys. With dk and dv of the keys and values that
    each head has, w_uk[h] @ kv_latent[j] and w_uv[h] @ kv_latent[j]:

        dkv_latent[j] = sum_h dk[j, h] @ w_uk[h] + dv[j, h] @ w_uv[h]
        dw_uk[h] = sum_j outer(dk[j, h], kv_latent[j])        dw_uv[h] = sum_j outer(dv[j, h], kv_latent[j])
    """
    cu_seqlens_q, cu_seqlens_k, *_ = call.lengths
    dtype = _compute_dtype(dout)
    gradients = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in call.tensors]
    *rows, w_uk, w_uv = call.tensors
    w_uk, w_uv, nope = w_uk.to(dtype), w_uv.to(dtype), w_uk.shape[1]
    if cu_seqlens_q is None:
        places = [(slice(i, i + 1), slice(i, i + 1), slice(i, i + 1)) for i in range(len(dout))]
    else:
        bounds_q, bounds_k = packed_bounds(cu_seqlens_q, len(dout)), packed_bounds(cu_seqlens_k, len(rows[2]))
        slices = (map(slice, bounds[:-1], bounds[1:]) for bounds in (bounds_q, bounds_k))
        places = [((None, of_q), (None, of_k), (None, slice(None), of_q)) for of_q, of_k in zip(*slices)]
    options = dict(PLAIN, causal=call.causal, softmax_scale=call.softmax_scale, compute_dtype=dtype)
    del options["sinks"]
    for of_q, of_k, of_lse in places:
        q_nope, q_pe, latents, k_pe = (x[place].to(dtype) for x, place in zip(rows, (of_q, of_q, of_k, of_k)))
        q, k, v = _heads_of(q_nope, q_pe, latents, k_pe, w_uk, w_uv)
        dq, dk, dv = attention_gradients(q, k, v, dout[of_q], lse[of_lse], minus_delta[of_lse], **options)
        dk, dk_pe = dk[..., :nope], dk[..., nope:].sum(2)
        found = [dq[..., :nope], dq[..., nope:], torch.einsum("bjhn,hnc->bjc", dk, w_uk), dk_pe]
        found[2] += torch.einsum("bjhv,hvc->bjc", dv, w_uv)
        for total, place, part in zip(gradients, (of_q, of_q, of_k, of_k), found):
            total[place] = part
        for total, part in zip(gradients[4:], (dk, dv)):
            total += torch.einsum("bjhd,bjc->hdc", part, latents)
    return gradients


def _heads_of(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv):
    """Queries, keys and values (batch, rows, heads, dim)."""
    q = torch.cat([q_nope, q_pe], dim=-1)
    k = torch.einsum("bjc,hnc->bjhn", kv_latent, w_uk)
    v = torch.einsum("bjc,hvc->bjhv", kv_latent, w_uv)
    return q, torch.cat([k, k_pe.unsqueeze(2).expand(-1, -1, q.shape[2], -1)], dim=-1), v


@without_autocast
def mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    w_uk: Tensor | None = None,
    w_uv: Tensor | None = None,
    *,
    rope_cache: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    k_pe_scale: float | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    tree_mask: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    rope_interleaved: bool = False,
    num_splits: int = 0,
    prefix_tree: PrefixTree | None = None,
    batch_invariant: bool | None = None,
    key_shard: tuple[int, int, int] | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `triton_attn.mla_decode`."""
    num_heads, rope_dim = q_pe.shape[-2:]
    kv_lora_rank = q_nope.shape[-1] if w_uk is None else w_uk.shape[-1]
    if softmax_scale is None:
        softmax_scale = (q_nope.shape[-1] + rope_dim) ** -0.5
    dtype = _compute_dtype(q_nope)
    if out is None:
        out = q_nope.new_empty(*q_pe.shape[:-1], kv_lora_rank if w_uv is None else w_uv.shape[1])
    if lse is None:
        lse = q_nope.new_empty((*q_pe.shape[:-3], num_heads, q_pe.shape[-3]), dtype=dtype)
    out.zero_()
    lse.fill_(float("-inf"))
    page_size = latent_cache.shape[1]
    bounds = None if cu_seqlens_q is None else packed_bounds(cu_seqlens_q, len(q_nope))
    shard = check_key_shard(key_shard, page_size)
    capacity = block_table.shape[1] * page_size * num_ranks_of(shard)
    for i, seqlen in enumerate(cache_seqlens.clamp(max=capacity).tolist()):
        num_keys = seqlen if shard is None else shard.num_keys(seqlen)
        pages = block_table[i, : -(-num_keys // page_size)].long()
        if rope_cache is None:
            parts = latent_parts(_take(latent_cache, pages), kv_lora_rank, rope_dim)
        else:
            parts = _take(latent_cache, pages), None, _take(rope_cache, pages)
        rows = read_latent_parts(parts, dtype, k_scale, k_pe_scale).flatten(0, 1)[:num_keys]
        own = i if bounds is None else slice(*bounds[i : i + 2])
        q_nope_i, q_pe_i = q_nope[own], q_pe[own]
        if rope_cos is not None:
            positions = torch.arange(len(q_pe_i), device=q_pe.device) + seqlen - len(q_pe_i)
            positions = positions.clamp(0, len(rope_cos) - 1)
            cos, sin = (table[positions].to(dtype).unsqueeze(1) for table in (rope_cos, rope_sin))
            q_pe_i = rotate(q_pe_i.to(dtype), cos, sin, rope_interleaved)
        latents, k_pe = rows.split([kv_lora_rank, rope_dim], dim=-1)
        places = {} if shard is None else shard.places(seqlen, len(q_pe_i), q_pe.device)
        out_i, lse_i = _attend(
            q_nope_i[None],
            q_pe_i[None],
            latents[None],
            k_pe[None],
            w_uk,
            w_uv,
            causal=causal,
            softmax_scale=softmax_scale,
            absorbed=False,
            tree_mask=None if tree_mask is None else tree_mask[own],
            **places,
        )
        out[own] = out_i[0]
        (lse[i] if bounds is None else lse[:, own]).copy_(lse_i[0])
    return (out, lse) if return_lse else out


def _take(cache, pages):
    """cache[pages]. torch cannot index fp8 elements on every device, but it can bytes."""
    return cache[pages] if cache.dtype.itemsize > 1 else cache.view(torch.uint8)[pages].view(cache.dtype)


def _attend(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv, *, causal, softmax_scale, absorbed, tree_mask=None, **places):
    """out and lse of dense inputs. Without w_uk queries, without w_uv outputs are latent vectors.

    absorbed: the weights of keys and values are applied to queries and outputs, which changes nothing but the rounding.
    tree_mask: of one sequence, as in `attend_tree`. places: lengths, or offset and key_positions, as in `attend`.
    """
    dtype = _compute_dtype(q_nope)
    out_dtype = q_nope.dtype
    q_nope, q_pe, kv_latent, k_pe = (x.to(dtype) for x in (q_nope, q_pe, kv_latent, k_pe))
    latents = kv_latent.unsqueeze(2).expand(-1, -1, q_nope.shape[2], -1)
    k_nope, v, w_out = latents, latents, None
    if w_uk is not None and absorbed:
        q_nope = torch.einsum("bihn,hnc->bihc", q_nope, w_uk.to(dtype))
    elif w_uk is not None:
        k_nope = torch.einsum("bjc,hnc->bjhn", kv_latent, w_uk.to(dtype))
    if w_uv is not None and absorbed:
        w_out = w_uv.to(dtype)
    elif w_uv is not None:
        v = torch.einsum("bjc,hvc->bjhv", kv_latent, w_uv.to(dtype))
    q = torch.cat([q_nope, q_pe], dim=-1)
    k = torch.cat([k_nope, k_pe.unsqueeze(2).expand(-1, -1, q.shape[2], -1)], dim=-1)
    options = dict(PLAIN, causal=causal, softmax_scale=softmax_scale, compute_dtype=dtype, **places)
    out, lse = attend_tree(q, k, v, tree_mask=tree_mask, **options)
    if w_out is not None:
        out = torch.einsum("bihc,hvc->bihv", out, w_out)
    return out.to(out_dtype), lse


def _compute_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32
