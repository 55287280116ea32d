"""Attention and rotary positions in plain torch, shared by the references of all families."""

from typing import Any, NamedTuple

import torch


def visible_keys(seqlen_q, seqlen_k, causal, window_size, device, offset=None, lengths=None, key_positions=None):
    """(seqlen_q, seqlen_k): which keys a query sees, and key position minus query position.

    offset: the position of query 0, counted from key 0; an int, or of each sequence (batch, 1, 1, 1). None is
    bottom-right alignment. lengths: (queries, keys) of each sequence, both (batch,), if they are padded to seqlen_q and
    seqlen_k. With either of each sequence the results are (batch, 1, seqlen_q, seqlen_k). key_positions: (seqlen_k,) of
    keys that do not follow each other, counted as offset is, which must be given.
    """
    left, right = window_size
    if causal:
        right = 0
    queries, keys = torch.arange(seqlen_q, device=device)[:, None], torch.arange(seqlen_k, device=device)
    keys = keys if key_positions is None else key_positions
    num_queries, num_keys = (seqlen_q, seqlen_k) if lengths is None else (x.view(-1, 1, 1, 1) for x in lengths)
    distance = keys - (queries + (num_keys - num_queries if offset is None else offset))
    visible = torch.ones_like(distance, dtype=torch.bool)
    if lengths is not None:
        visible = visible & (queries < num_queries) & (keys < num_keys)
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    return visible, distance


def packed_bounds(cu_seqlens, num_rows):
    """cu_seqlens as a list, clamped to the num_rows rows of the packed tensor."""
    return cu_seqlens.clamp(max=num_rows).tolist()


class Padded(NamedTuple):
    """Sequences of a packed tensor, to be padded to the longest one without their lengths on the host."""

    starts: torch.Tensor  # (batch,)
    lengths: torch.Tensor  # (batch,)
    longest: int
    num_rows: int  # of the packed tensor

    @classmethod
    def of(cls, cu_seqlens, longest, num_rows):
        """longest: an int, or a tensor, which is not read."""
        bounds = cu_seqlens.long().clamp(max=num_rows)
        longest = num_rows if isinstance(longest, torch.Tensor) else min(longest, num_rows)
        return cls(bounds[:-1], bounds.diff(), longest, num_rows)

    def pad(self, x):
        """(num_rows, ...) as (batch, longest, ...), 0 in the padding."""
        positions = torch.arange(self.longest, device=x.device)
        rows = (self.starts[:, None] + positions).clamp(max=self.num_rows - 1)
        is_padding = positions >= self.lengths[:, None]
        return x[rows].masked_fill(is_padding.view(*is_padding.shape, *[1] * (x.ndim - 1)), 0)

    def unpad(self, x, fill):
        """(batch, longest, ...) as (num_rows, ...). Rows after the last sequence are `fill`."""
        if x.shape[0] == 0 or self.longest == 0:
            return x.new_full((self.num_rows, *x.shape[2:]), fill)
        rows = torch.arange(self.num_rows, device=x.device)
        sequences = torch.searchsorted(self.starts + self.lengths, rows, right=True)
        is_outside = sequences == x.shape[0]
        sequences = sequences.clamp(max=x.shape[0] - 1)
        positions = (rows - self.starts[sequences]).clamp(max=self.longest - 1)
        return x[sequences, positions].masked_fill(is_outside.view(-1, *[1] * (x.ndim - 2)), fill)


def _heads_of(q, k, v, compute_dtype):
    """q, k and v as (batch, num_heads_q, rows, dim) in compute_dtype."""
    # On processors with AMX torch's 16-bit matmuls read past the end of a row, which may hold another tensor's NaN.
    copy = compute_dtype.itemsize < 4
    group_size = q.shape[2] // k.shape[2]
    q_heads, k_heads, v_heads = (x.transpose(1, 2).to(compute_dtype, copy=copy) for x in (q, k, v))
    return q_heads, *(x.repeat_interleave(group_size, dim=1) for x in (k_heads, v_heads))


def _masked_scores(products, causal, window_size, softcap, alibi_slopes, offset=None, lengths=None, key_positions=None):
    """Scores (batch, heads, seqlen_q, seqlen_k) from softmax_scale * q . k, -inf where a query does not see a key."""
    scores = softcap * torch.tanh(products / softcap) if softcap else products
    places = offset, lengths, key_positions
    visible, distance = visible_keys(*products.shape[2:], causal, window_size, products.device, *places)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(products.dtype)[..., None, None] * distance.abs()
    return scores.masked_fill(~visible, float("-inf"))


def attend(
    q,
    k,
    v,
    *,
    causal,
    softmax_scale,
    window_size,
    softcap,
    alibi_slopes,
    sinks,
    compute_dtype,
    keep=None,
    dropout_p=0.0,
    offset=None,
    lengths=None,
    key_positions=None,
):
    """Attention with every matmul in compute_dtype: out in q's dtype, lse in fp32 (fp64 for fp64).

    offset, lengths, key_positions: as in `visible_keys`. In the padding out is 0, and lse -inf or the sink.

    With compute_dtype = q.dtype its error is the one that torch makes in that dtype. Tests compare kernels with it.
    """
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    q_heads, k_heads, v_heads = _heads_of(q, k, v, compute_dtype)
    products = q_heads @ k_heads.transpose(2, 3) * scale
    scores = _masked_scores(products, causal, window_size, softcap, alibi_slopes, offset, lengths, key_positions)
    logits = scores
    if sinks is not None:
        sink_column = sinks.to(compute_dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, sink_column], dim=3)

    # A row without logits has lse = -inf. Shifted by 0 instead, its weights are exp(-inf) = 0.
    lse = torch.logsumexp(logits.to(torch.promote_types(compute_dtype, torch.float32)), dim=3)
    shift = torch.where(lse == float("-inf"), 0.0, lse)
    weights = torch.exp(scores - shift[..., None].to(compute_dtype))
    if keep is not None:
        weights = weights * keep.to(q.device) / (1 - dropout_p)
    out = (weights @ v_heads).transpose(1, 2).to(q.dtype)
    return out, lse


def attend_tree(q, k, v, *, tree_mask, causal, window_size, **options):
    """`attend` of one sequence whose last keys are a tree of drafts, one for each query; None is plain `attend`.

    tree_mask: (seqlen_q,) int64. A query sees the keys before the drafts, then the drafts j whose bit j it has, and is
    at the end of these keys. options: with offset, the position of the first draft, and key_positions of keys that are
    a part of the sequence's.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if tree_mask is None or seqlen_q == 0:
        return attend(q, k, v, causal=causal, window_size=window_size, **options)
    first, positions = options.pop("offset", seqlen_k - seqlen_q), options.pop("key_positions", None)
    positions = torch.arange(seqlen_k, device=q.device) if positions is None else positions
    drafts, of_keys = torch.arange(seqlen_q, device=q.device), positions - first
    outs, lses = [], []
    for i, bits in enumerate(tree_mask):
        depths = first - 1 + ((bits >> drafts) & 1).cumsum(0)  # of those that are seen
        keys = ((of_keys < 0) | (bits >> of_keys.clamp(min=0) & 1 == 1)).nonzero().flatten()
        at = torch.where(of_keys < 0, positions, depths[of_keys.clamp(min=0)])[keys]
        one = q[:, i : i + 1], k[:, keys], v[:, keys]
        window = (window_size[0], -1)
        out, lse = attend(*one, causal=True, window_size=window, offset=int(depths[-1]), key_positions=at, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def row_sums(dout, dlse, out, lse, sinks, compute_dtype) -> tuple[Any, Any]:
    """-delta = dlse - rowsum(dout * out), (batch, heads, rows), and the gradient of the sinks; dlse and sinks may be
    None."""
    minus_delta = -(dout.to(compute_dtype) * out.to(compute_dtype)).sum(3).transpose(1, 2)
    minus_delta = minus_delta if dlse is None else minus_delta + dlse
    if sinks is None:
        return minus_delta, None
    no_key = lse == float("-inf")
    of_sinks = torch.exp(sinks.to(compute_dtype)[:, None] - torch.where(no_key, 0.0, lse).to(compute_dtype))
    return minus_delta, (torch.where(no_key, 0.0, of_sinks) * minus_delta).sum((0, 2))


def attention_gradients(
    q, k, v, dout, lse, minus_delta, *, softmax_scale, softcap, compute_dtype, keep=None, dropout_p=0.0, **mask
) -> tuple[Any, Any, Any]:
    """(dq, dk, dv) of `attend`, in compute_dtype. k and v may be a part of the keys that lse and minus_delta, of
    `row_sums`, are over. Without autograd, so also inside an operator of torch.

    With the weights P = exp(s - lse), ds = P * (dout . v - delta).
    """
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    q_heads, k_heads, v_heads = _heads_of(q, k, v, compute_dtype)
    dout = dout.transpose(1, 2).to(compute_dtype)
    lse = torch.where(lse == float("-inf"), 0.0, lse).to(compute_dtype)
    products = q_heads @ k_heads.transpose(2, 3) * scale
    weights = torch.exp(_masked_scores(products, softcap=softcap, **mask) - lse[..., None])
    kept = 1.0 if keep is None else keep.to(q.device) / (1 - dropout_p)
    dscores = weights * (dout @ v_heads.transpose(2, 3) * kept + minus_delta.to(compute_dtype)[..., None])
    if softcap:
        dscores = dscores * (1 - torch.tanh(products / softcap) ** 2)

    def of_rows(x, num_heads):
        """(batch, rows, num_heads, dim), summed over the heads of a group."""
        return x.unflatten(1, (num_heads, -1)).sum(2).transpose(1, 2)

    dq = of_rows(dscores @ k_heads * scale, q.shape[2])
    dk = of_rows(dscores.transpose(2, 3) @ q_heads * scale, k.shape[2])
    dv = of_rows((weights * kept).transpose(2, 3) @ dout, k.shape[2])
    return dq, dk, dv


def rotate(x, cos, sin, interleaved):
    """x (..., dim) with its first rotary_dim = 2 * cos.shape[-1] dimensions rotated in pairs.

    cos and sin broadcast to (..., rotary_dim / 2). If interleaved, pair i is the dimensions 2 i and 2 i + 1, otherwise
    i and i + rotary_dim / 2.
    """
    rotary_dim = 2 * cos.shape[-1]
    rotary, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotary.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotary.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    rotary = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([rotary, rest], dim=-1)
