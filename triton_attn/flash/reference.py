"""What flash attention computes, in plain torch: every dtype up to fp64, any device, differentiable."""

from typing import Any

import torch
from torch import Tensor

from .._host import definition
from .._host.call import Call
from .._host.definition import Padded, attend, attention_gradients, packed_bounds
from .._host.observers import is_observed, without_autocast


def compute(call: Call, return_lse: bool, out: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """What a checked call returns."""
    q, k, v, (cu_seqlens_q, cu_seqlens_k, *longest), options, _ = call
    arguments = dict(options.as_arguments(), out=out, return_lse=return_lse)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return flash_attention(q, k, v, **arguments)
    return flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, **arguments)


@without_autocast
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    shard: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `triton_attn.flash_attention`: the whole matrix of scores, in fp32 (fp64 for fp64 inputs)."""
    options: dict[str, Any] = dict(
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        compute_dtype=torch.float64 if q.dtype == torch.float64 else torch.float32,
    )
    seed = _seed(dropout_seed) if dropout_p > 0 else None
    keep = _keep_mask(seed, dropout_p, range(q.shape[0]), q.shape[2], q.shape[1], k.shape[1], shard)
    result, lse = attend(q, k, v, keep=keep, offset=_offset(shard), **options)
    return _results(result, lse, out, return_lse)


@without_autocast
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    shard: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `triton_attn.flash_attention_varlen`: one sequence after the other, or all at once and padded
    where a tracer hides the lengths. Rows after the last one are 0, their lse -inf."""
    options: dict[str, Any] = dict(
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        compute_dtype=torch.float64 if q.dtype == torch.float64 else torch.float32,
    )
    seed = _seed(dropout_seed) if dropout_p > 0 else None
    if is_observed(cu_seqlens_q, cu_seqlens_k):
        queries = Padded.of(cu_seqlens_q, max_seqlen_q, q.shape[0])
        keys = Padded.of(cu_seqlens_k, max_seqlen_k, k.shape[0])
        sequences = range(cu_seqlens_q.shape[0] - 1)
        keep = _keep_mask(seed, dropout_p, sequences, q.shape[1], queries.longest, keys.longest, shard)
        places = dict(lengths=(queries.lengths, keys.lengths), offset=_offset(shard))
        result, lse = attend(queries.pad(q), keys.pad(k), keys.pad(v), keep=keep, **places, **options)
        result = queries.unpad(result, 0.0)
        lse = queries.unpad(lse.transpose(1, 2), float("-inf")).T.contiguous()
        return _results(result, lse, out, return_lse)
    bounds_q, bounds_k = packed_bounds(cu_seqlens_q, len(q)), packed_bounds(cu_seqlens_k, len(k))
    outs, lses = [], []
    for i in range(len(bounds_q) - 1):
        rows_q, rows_k = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        out_i, lse_i = _attend_to(i, q[rows_q], k[rows_k], v[rows_k], shard, seed, options)
        outs.append(out_i)
        lses.append(lse_i)
    padding = q.shape[0] - bounds_q[-1]
    outs.append(q.new_zeros(padding, q.shape[1], v.shape[2]))
    lses.append(q.new_full((q.shape[1], padding), float("-inf"), dtype=options["compute_dtype"]))
    return _results(torch.cat(outs), torch.cat(lses, dim=1), out, return_lse)


def _results(result, lse, out, return_lse):
    """What a function returns; `out` is the caller's, or None."""
    result = result if out is None else out.copy_(result)
    return (result, lse) if return_lse else result


def _attend_to(i, q, k, v, shard, seed, options):
    """out (rows, heads, dim) and lse (heads, rows) of sequence i, with its tensors; options are those of the batch."""
    options = _options_of(i, q, k, shard, seed, options)
    out, lse = attend(q[None], k[None], v[None], **options)
    return out[0], lse[0]


def _options_of(i, q, k, shard, seed, options):
    """The options of sequence i, of those of the batch."""
    slopes, shard = options["alibi_slopes"], None if shard is None else shard[i : i + 1]
    if slopes is not None and slopes.ndim == 2:
        slopes = slopes[i]
    keep = _keep_mask(seed, options["dropout_p"], range(i, i + 1), q.shape[1], len(q), len(k), shard)
    return options | dict(alibi_slopes=slopes, keep=keep, offset=_offset(shard))


def _offset(shard):
    """Of each sequence the position of query 0, counted from key 0: (batch, 1, 1, 1)."""
    return None if shard is None else (shard[:, 0] - shard[:, 1]).view(-1, 1, 1, 1)


@without_autocast
def row_sums(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """-delta = dlse - rowsum(dout * out), as lse, and the gradient of the sinks; dense or packed."""
    compute_dtype = torch.promote_types(out.dtype, torch.float32)
    if out.ndim == 4:
        minus_delta, dsinks = definition.row_sums(dout, dlse, out, lse, sinks, compute_dtype)
    else:
        dlse = None if dlse is None else dlse[None]
        minus_delta, dsinks = definition.row_sums(dout[None], dlse, out[None], lse[None], sinks, compute_dtype)
        minus_delta = minus_delta[0]
    return minus_delta, None if sinks is None else dsinks.to(sinks.dtype)


@without_autocast
def gradients(dout: Tensor, lse: Tensor, minus_delta: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a checked call, in its dtype. lse and minus_delta, of `row_sums`, may be over more keys."""
    q, k, v, (cu_seqlens_q, cu_seqlens_k, *_), options, _ = call
    arguments = options.as_arguments()
    shard, seed = arguments.pop("shard", None), arguments.pop("dropout_seed", None)
    arguments = dict(dropout_p=0.0, compute_dtype=torch.promote_types(q.dtype, torch.float32)) | arguments
    del arguments["sinks"]  # lse includes them
    seed = None if seed is None else _seed(seed)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        places = [(i, i, (i,)) for i in range(len(q))]
    else:
        bounds_q, bounds_k = packed_bounds(cu_seqlens_q, len(q)), packed_bounds(cu_seqlens_k, len(k))
        slices = (map(slice, bounds[:-1], bounds[1:]) for bounds in (bounds_q, bounds_k))
        places = [(rows_q, rows_k, (slice(None), rows_q)) for rows_q, rows_k in zip(*slices)]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for i, (rows_q, rows_k, of_lse) in enumerate(places):
        of_sequence = _options_of(i, q[rows_q], k[rows_k], shard, seed, arguments)
        given = q[rows_q], k[rows_k], v[rows_k], dout[rows_q], lse[of_lse], minus_delta[of_lse]
        parts = attention_gradients(*(x[None] for x in given), **of_sequence)
        for gradient, rows, part in zip((dq, dk, dv), (rows_q, rows_k, rows_k), parts):
            gradient[rows] = part[0].to(gradient.dtype)
    return dq, dk, dv


def dropout_mask(
    dropout_seed: int | Tensor, dropout_p: float, batch: int, num_heads_q: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """The kernels' own dropout mask, True where a weight stays: bool (batch, num_heads_q, seqlen_q, seqlen_k), on CPU.

    Philox-4x32-10 with the seed as key and the counter (key // 4, query, batch * num_heads_q + head, 0); a weight stays
    if the upper 31 bits of word key % 4 reach dropout_p * 2^31. Each sequence of a packed batch counts its own queries
    and keys from 0. dropout_seed is an int or a tensor of one int64.

    Example:
        >>> mask = triton_attn.reference.dropout_mask(7, 0.25, batch=1, num_heads_q=2, seqlen_q=64, seqlen_k=64)
        >>> mask.shape, abs(mask.float().mean().item() - 0.75) < 0.05
        (torch.Size([1, 2, 64, 64]), True)

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    seed = _seed(dropout_seed)
    seed = seed.cpu() if isinstance(seed, Tensor) else seed
    mask: Any = _keep_mask(seed, dropout_p, range(batch), num_heads_q, seqlen_q, seqlen_k)
    return mask


def _seed(dropout_seed):
    """An int, or a tensor (), which tracers do not have to read."""
    if dropout_seed is None:
        return torch.randint(-(2**63), 2**63 - 1, ())
    return dropout_seed.view(()) if isinstance(dropout_seed, Tensor) else int(dropout_seed)


def _keep_mask(seed, dropout_p, sequences, num_heads, seqlen_q, seqlen_k, shard=None):
    """The `dropout_mask` of a range of sequences, on the seed's device; None without a seed. shard as of the calls."""
    if seed is None:
        return None
    device = seed.device if isinstance(seed, Tensor) else None
    heads = torch.arange(sequences.start * num_heads, sequences.stop * num_heads, device=device)
    heads = heads.view(len(sequences), num_heads, 1, 1)
    queries = torch.arange(seqlen_q, device=device)[:, None]
    keys = torch.arange(seqlen_k, device=device)
    if shard is not None:
        query_start, key_start, row = (x.view(-1, 1, 1, 1) for x in shard.to(heads.device, torch.int64).unbind(1))
        heads = row + torch.arange(num_heads, device=device)[:, None, None]
        queries, keys = query_start + queries, key_start + keys
    counter = torch.broadcast_tensors(keys // 4, queries, heads, torch.zeros_like(keys[..., :1]))
    words = torch.stack(_philox(seed, *counter), dim=-1)
    index = (keys % 4).expand(words.shape[:-1])
    word = words.gather(-1, index[..., None])[..., 0]
    return (word >> 1) >= int(dropout_p * 2**31)


def _philox(seed, c0, c1, c2, c3):
    """Philox-4x32-10 on int64 tensors that hold 32-bit words."""
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        high_0, low_0 = _multiply_words(c0, 0xD2511F53)
        high_2, low_2 = _multiply_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply_words(a, b):
    """Upper and lower word of the 64-bit product, by halves: int64 has no room for it whole."""
    lower = a * (b & 0xFFFF)
    upper = a * (b >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)
