"""The options that all attention functions share, checked."""

from typing import Any, NamedTuple

import torch

from .backend import Variable
from .checks import (
    MAX_ROWS,
    check_bool,
    check_int,
    check_last_contiguous,
    check_number,
    check_per_head,
    check_tensor,
    check_window,
    fail,
)

MAX_DRAFTS = 64  # of a sequence: the bits of an int64


class AttentionOptions(NamedTuple):
    softmax_scale: float
    window: tuple  # (left, right), None: unlimited; causal sets right to 0
    softcap: float | None
    alibi_slopes: object  # tensor (num_heads_q,) or (batch, num_heads_q), or None
    sinks: object  # tensor (num_heads_q,), or None
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None  # of one int64, on the device; None without dropout
    shard: torch.Tensor | None = None  # (batch, 3) int32: where a part of a longer sequence starts
    tree_mask: torch.Tensor | None = None  # int64 of each query: which drafts it sees

    def as_arguments(self) -> dict[str, Any]:
        """Arguments of a public function or its reference. Without dropout, a shard or a tree there are none for it."""
        more: dict[str, Any] = {} if self.shard is None else dict(shard=self.shard)
        if self.tree_mask is not None:
            more |= dict(tree_mask=self.tree_mask)
        if self.dropout_p:
            more |= dict(dropout_p=self.dropout_p, dropout_seed=self.dropout_seed)
        return dict(
            causal=False,  # the window includes it
            softmax_scale=self.softmax_scale,
            window_size=tuple(-1 if side is None else side for side in self.window),
            softcap=self.softcap or 0.0,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            **more,
        )


_KERNELS = Variable("TRITON_ATTN_KERNELS")


def wanted_kernels():
    """TRITON_ATTN_KERNELS, read at each call. `HopperConfig.choose` defines its values."""
    wanted = _KERNELS.get("auto")
    if wanted not in ("auto", "hopper", "portable"):
        fail("TRITON_ATTN_KERNELS", "auto, hopper or portable", wanted)
    return wanted


def attention_options(head_dim, causal, softmax_scale, softcap, window_size):
    """The options of a call without its tensors, checked."""
    causal = check_bool("causal", causal)
    left, right = check_window(window_size)
    softcap = check_number("softcap", softcap)
    if softcap < 0:
        fail("softcap", "0 (none) or more", softcap)
    softmax_scale = check_softmax_scale(softmax_scale, head_dim)
    # 2**30 exceeds every distance, and its sum with a position fits in 32 bits.
    left, right = min(left, 2**30), min(right, 2**30)
    window = (left if left >= 0 else None, 0 if causal else right if right >= 0 else None)
    return AttentionOptions(softmax_scale, window, softcap or None, None, None)


def check_softmax_scale(softmax_scale, width):
    """softmax_scale, checked. None means width ** -0.5, where width is that of queries and keys."""
    if softmax_scale is None:
        return width**-0.5
    softmax_scale = check_number("softmax_scale", softmax_scale)
    if softmax_scale <= 0:
        fail("softmax_scale", "a number above 0", softmax_scale)
    return softmax_scale


def check_head_tensors(q, batch, alibi_slopes, sinks):
    num_heads_q = q.shape[-2]
    if alibi_slopes is not None:
        shapes = ((num_heads_q,), (batch, num_heads_q))
        check_per_head("alibi_slopes", alibi_slopes, shapes, q.device, (torch.float32,))
    if sinks is not None:
        check_per_head("sinks", sinks, ((num_heads_q,),), q.device, (torch.float32, q.dtype))


def with_tensors(options, alibi_slopes, sinks, shard=None):
    """The options with checked tensors."""
    if alibi_slopes is None and sinks is None and shard is None:
        return options
    softmax_scale, window, softcap, *_ = options
    return AttentionOptions(softmax_scale, window, softcap, alibi_slopes, sinks, shard=shard)


def check_shard(shard, q, batch):
    """Check the starts of shards but for their values."""
    if not isinstance(shard, torch.Tensor):
        fail("shard", "a tensor or None", type(shard).__name__, TypeError)
    if shard.dtype != torch.int32:
        fail("shard", "dtype torch.int32", shard.dtype, TypeError)
    if shard.shape != (batch, 3):
        fail("shard", f"shape (batch, 3) = {(batch, 3)}", tuple(shard.shape))
    if not shard.is_contiguous():
        fail("shard", "a contiguous tensor", f"strides {shard.stride()}")
    if shard.device != q.device:
        fail("shard", f"q's device {q.device}", shard.device)


def check_shard_values(shard):
    """Positions and the number of a head are 0 or more, and positions at most 10**9. A device-to-host sync."""
    for i, (query_start, key_start, dropout_row) in enumerate(shard.tolist()):
        for name, value, most in (
            ("query", query_start, MAX_ROWS),
            ("key", key_start, MAX_ROWS),
            ("head", dropout_row, 2**31 - 1),
        ):
            if not 0 <= value <= most:
                fail(f"shard[{i}], first {name}", f"0 to {most}", value)


def check_tree_mask(tree_mask: Any, q: torch.Tensor, max_seqlen_q: Any) -> None:
    """tree_mask of queries (batch, seqlen_q, heads, dim) or (total_q, heads, dim). max_seqlen_q may be a tensor."""
    check_tensor("tree_mask", tree_mask, q.shape[:-2], (torch.int64,), q.device)
    check_last_contiguous("tree_mask", tree_mask)
    if not isinstance(max_seqlen_q, torch.Tensor):
        check_num_drafts(max_seqlen_q)


def check_num_drafts(max_seqlen_q: int) -> None:
    if max_seqlen_q > MAX_DRAFTS:
        fail("tree_mask", f"at most {MAX_DRAFTS} queries of a sequence", max_seqlen_q)


def with_tree_mask(options: AttentionOptions, tree_mask: torch.Tensor) -> AttentionOptions:
    """The options with a checked tree_mask, which takes the place of the right side of the window."""
    return options._replace(tree_mask=tree_mask, window=(options.window[0], None))


def with_dropout(options, q, dropout_p, dropout_seed):
    """The options with dropout, checked; the seed as a tensor of one int64 on q's device."""
    if dropout_seed is None and type(dropout_p) is float and dropout_p == 0:
        return options
    dropout_p = check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        fail("dropout_p", "0 <= dropout_p < 1", dropout_p)
    if isinstance(dropout_seed, torch.Tensor):
        if dropout_seed.dtype != torch.int64:
            fail("dropout_seed", "dtype torch.int64", dropout_seed.dtype, TypeError)
        if dropout_seed.numel() != 1:
            fail("dropout_seed", "one element", f"shape {tuple(dropout_seed.shape)}")
        if dropout_seed.device != q.device:
            fail("dropout_seed", f"q's device {q.device}", dropout_seed.device)
    elif dropout_seed is not None:
        dropout_seed = check_int("dropout_seed", dropout_seed, "an int or a tensor")
        if not -(2**63) <= dropout_seed < 2**63:
            fail("dropout_seed", "a 64-bit integer", dropout_seed)
    if dropout_p == 0:
        return options
    if dropout_seed is None:
        dropout_seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    elif isinstance(dropout_seed, int):
        dropout_seed = torch.full((1,), dropout_seed, dtype=torch.int64, device=q.device)
    return options._replace(dropout_p=dropout_p, dropout_seed=dropout_seed)
