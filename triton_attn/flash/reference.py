"""What flash attention computes, in plain torch: every dtype up to fp64, any device, differentiable."""

import torch


def flash_attention(
    q,
    k,
    v,
    *,
    causal=False,
    softmax_scale=None,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    return_lse=False,
):
    """The definition of `triton_attn.flash_attention`: the whole matrix of scores, in fp32 (fp64 for fp64 inputs)."""
    out, lse = attend(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        compute_dtype=torch.float64 if q.dtype == torch.float64 else torch.float32,
    )
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    alibi_slopes=None,
    return_lse=False,
    check_values=None,
    **options,
):
    """The definition of `triton_attn.flash_attention_varlen`: one sequence after the other; other rows are 0."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for i in range(len(bounds_q) - 1):
        rows_q, rows_k = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes
        out, lse = flash_attention(
            q[None, rows_q], k[None, rows_k], v[None, rows_k], alibi_slopes=slopes, return_lse=True, **options
        )
        outs.append(out[0])
        lses.append(lse[0])
    num_heads, padding = q.shape[1], q.shape[0] - bounds_q[-1]
    outs.append(q.new_zeros(padding, num_heads, v.shape[2]))
    lses.append(q.new_zeros(num_heads, padding, dtype=lses[0].dtype if lses else torch.float32))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse) if return_lse else out


def visible_keys(seqlen_q, seqlen_k, causal, window_size, device):
    """(seqlen_q, seqlen_k) bool, and the distance of each key to the query's own position, bottom right aligned."""
    left, right = window_size
    if causal:
        right = 0
    positions_q = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    distance = torch.arange(seqlen_k, device=device)[None, :] - positions_q
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible, distance


def attend(q, k, v, *, causal, softmax_scale, window_size, softcap, alibi_slopes, sinks, compute_dtype):
    """Attention with every product in compute_dtype: out in q's dtype, lse in fp32 (fp64 for fp64).

    With compute_dtype = q.dtype it makes the error that torch makes in that dtype, the yardstick of the tests.
    """
    group_size = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    q_heads = q.transpose(1, 2).to(compute_dtype)
    k_heads = k.transpose(1, 2).to(compute_dtype).repeat_interleave(group_size, dim=1)
    v_heads = v.transpose(1, 2).to(compute_dtype).repeat_interleave(group_size, dim=1)

    scores = q_heads @ k_heads.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible, distance = visible_keys(q.shape[1], k.shape[1], causal, window_size, q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(compute_dtype)[..., None, None] * distance.abs()
    scores = scores.masked_fill(~visible, float("-inf"))
    logits = scores
    if sinks is not None:
        sink_column = sinks.to(compute_dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, sink_column], dim=3)

    # A row without a single logit has lse = -inf; the shift by 0 keeps its weights at exp(-inf) = 0.
    lse = torch.logsumexp(logits.to(torch.promote_types(compute_dtype, torch.float32)), dim=3)
    shift = torch.where(lse == float("-inf"), 0.0, lse)
    weights = torch.exp(scores - shift[..., None].to(compute_dtype))
    out = (weights @ v_heads).transpose(1, 2).to(q.dtype)
    return out, lse
