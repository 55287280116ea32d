"""Public API of multi-head latent attention: argument checks, then the kernels or the reference."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .._host import keywords
from .._host.backend import should_check_values, use_kernel
from .._host.call import Lengths, check_packed, packed_lengths
from .._host.checks import (
    FLOAT8_MANTISSA_BITS,
    KERNEL_DTYPES,
    MAX_HEAD_DIM,
    check_bool,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_factor,
    check_int,
    check_last_contiguous,
    check_latent_scales,
    check_max_seqlen,
    check_rope_tables,
    check_rows,
    check_rows_aligned,
    check_tensor,
    fail,
    read_length,
)
from .._host.dtensors import Layout, Operand, attend_shards, has_dtensor, lse_dims, of_rows, on_each_rank
from .._host.key_shard import KeyShard, check_key_shard, num_ranks_of
from .._host.known import check_once
from .._host.latent import latent_storage
from .._host.layout import Layouts, Outputs, lse_shape, outputs_of
from .._host.observers import (
    autocast,
    is_observed,
    number_and_tensor,
    refuse_gradients,
    refuse_transforms,
    wants_gradients,
)
from .._host.options import check_num_drafts, check_softmax_scale, check_tree_mask
from .._host.prefix_tree import (
    PrefixTree,
    check_prefix_tree,
    check_tree_values,
    operands_of_tree,
    tree_of_operands,
)
from .._host.workspace import Workspace, as_workspace, check_lse, check_out, check_workspace, only_counts
from ..merge.splits import check_batch_invariant, check_num_splits
from . import reference
from .schedule import MODES, ProblemSizes, choose_schedule

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11


@overload
def mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    w_uk: Tensor | None = None,
    w_uv: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: "Unpack[keywords.LatentDecode]",
) -> Tensor: ...
@overload
def mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    w_uk: Tensor | None = None,
    w_uv: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: "Unpack[keywords.LatentDecode]",
) -> tuple[Tensor, Tensor]: ...
@overload
def mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    w_uk: Tensor | None = None,
    w_uv: Tensor | None = None,
    *,
    return_lse: bool,
    **options: "Unpack[keywords.LatentDecode]",
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    """Attention of new queries over a paged cache of latent vectors: the absorbed form of MLA.

        s[b, h, i, j] = softmax_scale * ((q_nope[b, i, h] @ w_uk[h]) . c[b, j] + rope(q_pe[b, i, h]) . r[b, j])
        out[b, i, h] = w_uv[h] @ sum_j softmax_j(s[b, h, i, j]) c[b, j]
        [c[b, j] / k_scale, r[b, j] / k_pe_scale] = latent_cache[block_table[b, j // page_size], j % page_size]

    over the keys j < cache_seqlens[b] that query i sees. The queries are the last tokens of a sequence: query i is at
    position cache_seqlens[b] - seqlen_q + i. A tile of heads reads each key once. With w_uk, one kernel absorbs,
    scales and rotates the queries; with w_uv, one kernel merges the splits and projects them. Without both the contract
    is that of FlashMLA: queries (..., kv_lora_rank) in, latent vectors (..., kv_lora_rank) out.

    Args:
        q_nope: (batch, seqlen_q, num_heads, qk_nope_head_dim), or (..., kv_lora_rank) without w_uk (already absorbed);
            fp16, bf16 or fp32. Any strides, the last dimension contiguous. Dimensions are 1 to 512. With cu_seqlens_q
            (total_q, num_heads, ...), as q_pe.
        q_pe: (batch, seqlen_q, num_heads, qk_rope_head_dim), q_nope's dtype. qk_rope_head_dim may be 0.
        latent_cache: (num_pages, page_size, kv_lora_rank + qk_rope_head_dim) of q_nope's dtype, float8_e4m3fn or
            float8_e5m2, or uint8 (num_pages, page_size, bytes), the fp8 layout of `append_latent_cache` whose rows hold
            scales. Any strides, the last dimension contiguous.
        cache_seqlens: (batch,) int32 on q_nope's device, number of keys of each sequence, including new ones. May be
            0. A length beyond the capacity, max_pages * page_size, counts as the capacity.
        block_table: (batch, max_pages) int32 on q_nope's device: the pages of each sequence, in order. Entries past its
            last page, and slots past its last key, are never read.
        w_uk: (num_heads, qk_nope_head_dim, kv_lora_rank), q_nope's dtype, or None; a view of kv_b_proj's weight.
        w_uv: (num_heads, v_head_dim, kv_lora_rank), q_nope's dtype, or None.
        rope_cache: (num_pages, page_size, qk_rope_head_dim), latent_cache's dtype, not uint8: the rotary keys, if
            latent_cache has only the kv_lora_rank columns of latent vectors. None: rotary keys follow the latent
            vectors.
        k_scale: factor of cached elements: a number above 0, or an fp32 tensor (1,). None is 1. A uint8 cache takes
            none. 16-bit queries are not multiplied by it, so that nothing overflows.
        k_pe_scale: the factor of rotary keys, if it differs; rotary queries are multiplied by k_pe_scale / k_scale, and
            rounded. None is k_scale.
        cu_seqlens_q: (batch + 1,) int32: sequence b has the queries [cu_seqlens_q[b], cu_seqlens_q[b + 1]), 0 or more.
        max_seqlen_q: the largest number of queries of a sequence, an int, required with cu_seqlens_q. Queries past it
            are not computed. A tensor as in `flash_attention_varlen`.
        tree_mask: (batch, seqlen_q) int64 on q_nope's device, (total_q,) with cu_seqlens_q: the queries of a sequence
            are a tree of at most 64 drafts, and bit j of query i says whether it sees the j-th, as in
            `paged_attention`. A position in the tree, by which q_pe and the cached keys are to be rotated, is that of
            `paged_attention` too; rope_cos, which rotates by the order of the queries, is not supported with it.
        causal: new tokens do not see later ones. Aligned to the bottom right. Means nothing with a tree_mask.
        softmax_scale: above 0. None means (qk_nope_head_dim + qk_rope_head_dim) ** -0.5. Without w_uk this width is
            unknown, and a number must be given. See `mla_softmax_scale` for models with YaRN.
        rope_cos, rope_sin: (num_positions, rotary_dim / 2), both fp32 or both q_nope's dtype. They rotate the first
            rotary_dim dimensions of q_pe by the angles of their positions, in fp32, and require w_uk; they are not
            supported with cu_seqlens_q. None: q_pe is already rotated.
        rope_interleaved: pairs are neighbours (DeepSeek's checkpoints), not halves apart.
        num_splits: number of splits of a sequence's keys, which are computed concurrently and merged. 0 chooses it by
            the shapes. With a given number, the result for a sequence is bitwise independent of the rest of the batch.
        prefix_tree: as in `paged_attention`, from `LatentKVCache.prefix_groups`, or `prefix_tree` with one KV head.
            Where the heads of a sequence alone fill tiles, no tree pays.
        batch_invariant: as in `paged_attention`; num_splits must be 0, prefix_tree None. Rotations and projections are
            part of it.
        key_shard: (rank, num_ranks, interleave) of a cache that is sharded over ranks by turns, as in
            `paged_attention`: the result is that over the keys in this cache, while cache_seqlens and the capacity
            count those of all ranks.
        out: contiguous tensor for the result.
        lse: contiguous tensor for the lse that return_lse asks for.
        workspace: as in `paged_attention`: memory for absorbed queries and results of splits.
        return_lse: also return the natural log-sum-exp of the scores.
        check_values: check lengths and page numbers on the host, which costs a device-to-host sync. None follows
            TRITON_ATTN_CHECK=1.

    Returns:
        out (batch, seqlen_q, num_heads, v_head_dim), or (..., kv_lora_rank) without w_uv, in q_nope's dtype, and with
        return_lse also lse (batch, num_heads, seqlen_q) in fp32; (total_q, num_heads, ...) and (num_heads, total_q)
        with cu_seqlens_q. A query that sees no key, and a row after the last sequence, has out = 0, lse = -inf.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was launched. If values are checked, also for a length
            beyond the table, a page outside the cache, a position without an angle, or a prefix_tree of other pages
            or queries.
        NotImplementedError: an argument requires a gradient or has a tangent; rope_cos is given with cu_seqlens_q or
            tree_mask.

    It is one operator under torch.compile, export and vmap, which loops.

    DTensors: q_nope, q_pe and the weights, on one mesh: Shard on the heads (of weights Shard(0)), or Replicate(). The
    cache, lengths and pages are the same on all ranks, plain or Replicate(); other options are plain, and out and lse
    are not given. Each rank attends for its heads, nothing is moved, and the results are DTensors placed like q_nope.

    Example:
        >>> q_nope, q_pe = torch.randn(1, 1, 4, 48).split([32, 16], dim=-1)
        >>> latent_cache = torch.randn(3, 16, 64 + 16)  # three pages of 16 tokens
        >>> w_uk, w_uv = torch.randn(2, 4, 32, 64)
        >>> cache_seqlens, block_table = torch.tensor([20]).int(), torch.tensor([[2, 0]]).int()
        >>> triton_attn.mla_decode(q_nope, q_pe, latent_cache, cache_seqlens, block_table, w_uk, w_uv).shape
        torch.Size([1, 1, 4, 32])

    Source: DeepSeek-V2 (2024), arXiv:2405.04434, section 2.1; split keys: Dao et al., Flash-Decoding (2023).
    """
    packed = cu_seqlens_q is not None
    if has_dtensor(q_nope, q_pe, latent_cache, cache_seqlens, block_table, w_uk, w_uv, rope_cache):
        options = dict(
            rope_cache=rope_cache,
            k_scale=k_scale,
            k_pe_scale=k_pe_scale,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            tree_mask=tree_mask,
            causal=causal,
            softmax_scale=softmax_scale,
            rope_cos=rope_cos,
            rope_sin=rope_sin,
            rope_interleaved=rope_interleaved,
            num_splits=num_splits,
            prefix_tree=prefix_tree,
            batch_invariant=batch_invariant,
            key_shard=key_shard,
            out=out,
            lse=lse,
            workspace=workspace,
            return_lse=return_lse,
            check_values=check_values,
        )
        cache = dict(latent_cache=latent_cache, cache_seqlens=cache_seqlens, block_table=block_table)
        return _decode_shards((q_nope, q_pe), cache, (w_uk, w_uv), options)
    tensors = q_nope, q_pe, latent_cache, cache_seqlens, block_table, w_uk, w_uv, rope_cos, rope_sin, rope_cache
    tensors = *tensors, cu_seqlens_q, k_scale, k_pe_scale, tree_mask
    runs_kernel = isinstance(q_nope, Tensor) and use_kernel(q_nope)
    numbers = runs_kernel, softmax_scale, causal, rope_interleaved, num_splits, return_lse
    checked = _check_decode((*tensors, out, lse, workspace), numbers)
    softmax_scale, causal, rope_interleaved, num_splits, return_lse, layouts, outputs = checked
    k_number = k_pe_number = None
    if k_scale is not None:
        k_number, k_scale = number_and_tensor(check_factor("k_scale", k_scale))
    if k_pe_scale is not None:
        k_pe_number, k_pe_scale = number_and_tensor(check_factor("k_pe_scale", k_pe_scale))
    max_seqlen_q = _check_longest(max_seqlen_q, q_nope, packed)
    if key_shard is not None:
        key_shard = check_key_shard(key_shard, latent_cache.shape[1])
    if tree_mask is not None:
        check_tree_mask(tree_mask, q_nope, max_seqlen_q if packed else q_nope.shape[1])
    batch_invariant = check_batch_invariant(batch_invariant, num_splits=num_splits)
    if prefix_tree is not None:
        check_prefix_tree(prefix_tree, cache_seqlens.shape[0], block_table, batch_invariant, q_nope.device)
    check_values = should_check_values(check_values)
    if is_observed(*tensors[:11], k_scale, k_pe_scale, tree_mask, out, lse):
        tensors = *tensors[:11], k_scale, k_pe_scale, tree_mask
        refuse_gradients(**dict(zip(DECODE_INPUTS, tensors)), out=out, lse=lse)
        max_seqlen_q, longest_q = number_and_tensor(max_seqlen_q)
        more = longest_q, max_seqlen_q, k_number, k_pe_number
        more = *more, softmax_scale, causal, rope_interleaved, num_splits, batch_invariant, key_shard
        more = *more, *operands_of_tree(prefix_tree), check_values, return_lse
        new_out, new_lse = _decode_operator(*tensors, *more)
        out, lse = (new if x is None else x.copy_(new) for x, new in ((out, new_out), (lse, new_lse)))
        return (out, lse) if return_lse else out
    out, lse = outputs.new(q_nope, return_lse, out, lse)
    # By position: keywords take twice as long.
    call = DecodeCall(
        q_nope,
        q_pe,
        latent_cache,
        cache_seqlens,
        block_table,
        softmax_scale,
        causal,
        w_uk,
        w_uv,
        rope_cos,
        rope_sin,
        rope_interleaved,
        rope_cache,
        k_number if k_scale is None else k_scale,
        k_pe_number if k_pe_scale is None else k_pe_scale,
        cu_seqlens_q,
        max_seqlen_q,
        num_splits,
        batch_invariant,
        key_shard,
        prefix_tree,
        tree_mask,
        as_workspace(workspace),
        layouts,
    )
    _attend(call, check_values, out, lse)
    return (out, lse) if return_lse else out


def _decode_shards(queries, cache, weights, options):
    """`mla_decode` of DTensors, whose heads may be sharded. All ranks have the same cache."""
    for name in ("out", "lse"):
        if options[name] is not None:
            fail(name, "None with DTensors", type(options[name]).__name__)
    cache = {name: on_each_rank(name, x) for name, x in cache.items()}
    options = options | dict(rope_cache=on_each_rank("rope_cache", options["rope_cache"]))
    packed = options["cu_seqlens_q"] is not None
    given = {name: x for name, x in zip(("w_uk", "w_uv"), weights) if x is not None}

    def check(tensors):
        _check_decode_tensors(
            *queries, cache["latent_cache"], options["rope_cache"], *weights, options["softmax_scale"], packed
        )

    def attend(q_nope, q_pe, *own, **options):
        return mla_decode(q_nope, q_pe, **cache, **dict(zip(given, own)), **options)

    rows = (operand._replace(batch=None) for operand in of_rows(("q_nope", "q_pe"), packed))
    operands = *rows, *(Operand(name, heads=0) for name in given)
    layout = Layout(operands, len(queries), lse_dims(packed), check, None)
    return attend_shards(attend, layout, (*queries, *given.values()), (), options)


DECODE_INPUTS = (
    "q_nope",
    "q_pe",
    "latent_cache",
    "cache_seqlens",
    "block_table",
    "w_uk",
    "w_uv",
    "rope_cos",
    "rope_sin",
    "rope_cache",
    "cu_seqlens_q",
    "k_scale",
    "k_pe_scale",
    "tree_mask",
)


class DecodeCall(NamedTuple):
    """A call of `mla_decode`, checked."""

    q_nope: Tensor
    q_pe: Tensor
    latent_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor
    softmax_scale: float
    causal: bool = True
    w_uk: Tensor | None = None
    w_uv: Tensor | None = None
    rope_cos: Tensor | None = None
    rope_sin: Tensor | None = None
    rope_interleaved: bool = False
    rope_cache: Tensor | None = None
    k_scale: float | Tensor | None = None
    k_pe_scale: float | Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int | None = None  # None without cu_seqlens_q
    num_splits: int = 0
    batch_invariant: bool = False
    key_shard: KeyShard | None = None
    prefix_tree: PrefixTree | None = None
    tree_mask: Tensor | None = None
    workspace: Workspace | None = None
    layouts: Layouts | None = None  # None: not found yet

    def find_layouts(self) -> Layouts:
        return self.layouts or _layouts_of([getattr(self, name) for name in DECODE_INPUTS], DECODE_INPUTS)


@check_once
def _layouts_of(tensors, names):
    return Layouts(dict(zip(names, tensors)))


def _decode(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    w_uk: Tensor | None,
    w_uv: Tensor | None,
    rope_cos: Tensor | None,
    rope_sin: Tensor | None,
    rope_cache: Tensor | None,
    cu_seqlens_q: Tensor | None,
    k_scale: Tensor | None,
    k_pe_scale: Tensor | None,
    tree_mask: Tensor | None,
    longest_q: Tensor | None,
    max_seqlen_q: int | None,
    k_number: float | None,
    k_pe_number: float | None,
    softmax_scale: float,
    causal: bool,
    rope_interleaved: bool,
    num_splits: int,
    batch_invariant: bool,
    key_shard: list[int] | None,
    tree: Tensor | None,
    tree_sizes: list[int] | None,
    check_values: bool,
    return_lse: bool,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """`_attend` with the arguments of an operator: (out, lse). lse is empty unless it was requested."""
    if longest_q is not None:
        max_seqlen_q = read_length("max_seqlen_q", longest_q)
        if tree_mask is not None:
            check_num_drafts(max_seqlen_q)
    call = DecodeCall(
        q_nope,
        q_pe,
        latent_cache,
        cache_seqlens,
        block_table,
        softmax_scale,
        causal,
        w_uk,
        w_uv,
        rope_cos,
        rope_sin,
        rope_interleaved,
        rope_cache,
        k_number if k_scale is None else k_scale,
        k_pe_number if k_pe_scale is None else k_pe_scale,
        cu_seqlens_q,
        max_seqlen_q,
        num_splits,
        batch_invariant,
        None if key_shard is None else KeyShard(*key_shard),
        tree_of_operands(tree, tree_sizes),
        tree_mask,
    )
    _attend(call, check_values, out, lse if return_lse else None)
    return out, lse


def _attend(call: DecodeCall, check_values: bool, out: Tensor, lse: Tensor | None) -> None:
    """Fill out and lse, by the kernels or the reference."""
    if call.latent_cache.dtype == torch.uint8:
        check_rows_aligned("latent_cache", call.latent_cache)
    if check_values:
        _check_values(call)
    if use_kernel(call.q_nope):
        _decode_kernels()(call, out, lse)
    elif not only_counts(call.workspace):
        _decode_by_reference(call, out, lse)


@functools.cache
def _decode_kernels() -> Callable[..., None]:
    """Imported at the first call, so that the package can be imported without triton."""
    from .absorbed import launch_mla_decode

    return launch_mla_decode


def _decode_by_reference(call: DecodeCall, out: Tensor, lse: Tensor | None) -> None:
    reference.mla_decode(
        call.q_nope,
        call.q_pe,
        call.latent_cache,
        call.cache_seqlens,
        call.block_table,
        call.w_uk,
        call.w_uv,
        rope_cache=call.rope_cache,
        k_scale=call.k_scale,
        k_pe_scale=call.k_pe_scale,
        cu_seqlens_q=call.cu_seqlens_q,
        tree_mask=call.tree_mask,
        causal=call.causal,
        softmax_scale=call.softmax_scale,
        rope_cos=call.rope_cos,
        rope_sin=call.rope_sin,
        rope_interleaved=call.rope_interleaved,
        key_shard=call.key_shard,
        out=out,
        lse=lse,
    )


def _decode_out_shape(q_nope, w_uk, w_uv):
    if w_uv is not None:
        return *q_nope.shape[:-1], w_uv.shape[1]
    return *q_nope.shape[:-1], q_nope.shape[-1] if w_uk is None else w_uk.shape[2]


def _decode_outputs(q_nope, w_uk, w_uv, return_lse):
    """New out, and lse or, if it is not wanted, an empty tensor, which operators return."""
    dtype = torch.float64 if q_nope.dtype == torch.float64 else torch.float32  # the reference computes in it
    lse = q_nope.new_empty(lse_shape(q_nope) if return_lse else 0, dtype=dtype)
    return q_nope.new_empty(_decode_out_shape(q_nope, w_uk, w_uv)), lse


DECODE_SCHEMA = ", ".join(
    [
        *(f"Tensor {name}" for name in DECODE_INPUTS[:5]),
        *(f"Tensor? {name}" for name in (*DECODE_INPUTS[5:], "longest_q")),
        "SymInt? max_seqlen_q, float? k_number, float? k_pe_number, float softmax_scale, bool causal",
        "bool rope_interleaved, SymInt num_splits, bool batch_invariant, SymInt[]? key_shard",
        "Tensor? tree, SymInt[]? tree_sizes, bool check_values, bool return_lse",
    ]
)
_decode_operator = torch.library.custom_op(
    "triton_attn::mla_decode",
    lambda *args: _decode(*args, *_decode_outputs(args[0], *args[5:7], args[-1])),
    mutates_args=(),
    schema=f"({DECODE_SCHEMA}) -> (Tensor, Tensor)",
)


@_decode_operator.register_fake
def _(q_nope, q_pe, latent_cache, cache_seqlens, block_table, w_uk, w_uv, *rest):
    return _decode_outputs(q_nope, w_uk, w_uv, rest[-1])


@overload
def mla_prefill(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_latent: Tensor,
    k_pe: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: "Unpack[keywords.LatentPrefill]",
) -> Tensor: ...
@overload
def mla_prefill(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_latent: Tensor,
    k_pe: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    return_lse: Literal[True],
    **options: "Unpack[keywords.LatentPrefill]",
) -> tuple[Tensor, Tensor]: ...
@overload
def mla_prefill(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_latent: Tensor,
    k_pe: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    return_lse: bool,
    **options: "Unpack[keywords.LatentPrefill]",
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    mode: keywords.Mode = "auto",
    max_workspace_bytes: int = 2**28,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over latent vectors for many queries (prefill, chunks, training), in three schedules.

        k[b, j, h] = [w_uk[h] @ kv_latent[b, j], k_pe[b, j]]        v[b, j, h] = w_uv[h] @ kv_latent[b, j]
        out[b, i, h] = sum_j softmax_j(softmax_scale * [q_nope, q_pe][b, i, h] . k[b, j, h]) v[b, j, h]

    - "materialized": a matmul computes the keys and values of a chunk of heads, then attention runs over them. If one
      head exceeds max_workspace_bytes, its keys are split too, and the splits are merged by their log-sum-exp.
    - "fused": the attention kernel computes tiles of keys and values from tiles of latent vectors, once for every 128
      queries. No key or value is ever in memory.
    - "absorbed": w_uk is applied to queries and w_uv to outputs, as in `mla_decode`, for a chunk of heads at a time.
    - "auto": the schedule with the least cost, in FLOP per head, where moving a byte costs as much as 300 FLOP. rank is
      kv_lora_rank, e the bytes of an element, nope, rope and v the dimensions, pairs the visible query-key pairs:

        materialized  2 (nope + rope + v) pairs  + (2 rank (nope + v) + 2 (nope + v) 300 e) keys
        fused         2 (nope + rope + v) pairs  + 2 rank (nope + v) pairs / 128
        absorbed      2 (2 rank + rope) pairs    + (2 rank (nope + v) + (4 rank + 2 rope) 300 e) queries

      A batch of several lengths is costed by its mean number of keys. "absorbed" is excluded if a gradient is
      required, and like "materialized" if a chunk of one head would not fit.

    Args:
        q_nope: (batch, seqlen_q, num_heads, qk_nope_head_dim), or (total_q, ...) with cu_seqlens_q; fp16, bf16 or fp32.
            All tensors may have any strides, with a contiguous last dimension. Dimensions are 1 to 512.
        q_pe: (batch, seqlen_q, num_heads, qk_rope_head_dim), rotated. All tensors have q_nope's dtype.
        kv_latent: (batch, seqlen_k, kv_lora_rank), after its norm. k_pe: (batch, seqlen_k, qk_rope_head_dim), rotated.
        w_uk: (num_heads, qk_nope_head_dim, kv_lora_rank). w_uv: (num_heads, v_head_dim, kv_lora_rank). They may
            be views of kv_b_proj's weight.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, for packed sequences: sequence b has the rows
            [cu_seqlens[b], cu_seqlens[b + 1]).
        max_seqlen_q, max_seqlen_k: the longest lengths, ints, required with cu_seqlens; tensors as in
            `flash_attention_varlen`.
        causal: query i sees key j if j <= i + seqlen_k - seqlen_q (aligned to the bottom right).
        softmax_scale: above 0. None means (qk_nope_head_dim + qk_rope_head_dim) ** -0.5. See `mla_softmax_scale`.
        mode: one of the schedules above.
        max_workspace_bytes: limit of the memory that "materialized" and "absorbed" use besides inputs and outputs, and
            that the backward pass uses for keys, values and their gradients.
        return_lse: also return the natural log-sum-exp of the scores, which is differentiable too.
        check_values: check cu_seqlens on the host, which costs a device-to-host sync. None follows TRITON_ATTN_CHECK=1.

    Returns:
        out (batch, seqlen_q, num_heads, v_head_dim) or (total_q, ...), and with return_lse also lse (batch, num_heads,
        seqlen_q) or (num_heads, total_q) in fp32. A query that sees no key has out = 0, lse = -inf. So have rows after
        cu_seqlens[-1], whose gradients are 0 and which influence nothing.

    The forward pass repeats bitwise. The backward pass repeats bitwise under torch.use_deterministic_algorithms, with
    more matmuls per tile.

    DTensors: all six, on one mesh. Where q_nope and q_pe are Shard on the heads, kv_latent and k_pe are Replicate(),
    and w_uk and w_uv both Shard(0) or both Replicate(); where they are Shard(0) on a dense batch, so are kv_latent and
    k_pe, and the weights are Replicate(); elsewhere all are Replicate(). The ranks divide the heads. Each rank attends
    for its heads and sequences, nothing is moved, and out and lse are DTensors placed like q_nope. The gradient of a
    tensor that is Replicate() beside sharded queries is Partial(). max_workspace_bytes is that of a rank. Any other
    placement raises; for sharded sequences see `triton_attn.parallel.context_parallel_mla_prefill`.

    Raises:
        TypeError, ValueError: an argument is wrong, max_workspace_bytes is too small, or a sequence or packed batch has
            more than 10**9 rows; nothing was launched.
        NotImplementedError: a gradient is required through "absorbed", or for a head dimension (nope + rope, v) above
            512.

    Example:
        >>> q_nope, q_pe = torch.randn(1, 20, 4, 48).split([32, 16], dim=-1)
        >>> kv_latent, k_pe = torch.randn(1, 20, 80).split([64, 16], dim=-1)
        >>> w_uk, w_uv = torch.randn(2, 4, 32, 64)
        >>> triton_attn.mla_prefill(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv).shape
        torch.Size([1, 20, 4, 32])

    Source: DeepSeek-V2 (2024), arXiv:2405.04434, section 2.1.
    """
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if has_dtensor(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv):
        options = dict(
            causal=causal,
            softmax_scale=softmax_scale,
            mode=mode,
            max_workspace_bytes=max_workspace_bytes,
            return_lse=return_lse,
            check_values=check_values,
        )
        options |= zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths)
        layout = LATENTS_DENSE if cu_seqlens_q is None else LATENTS_PACKED
        return attend_shards(mla_prefill, layout, (q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv), (), options)
    tensors = q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv = autocast(q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv)
    runs_kernel = isinstance(q_nope, Tensor) and use_kernel(q_nope)
    numbers = runs_kernel, mode, causal, return_lse, max_workspace_bytes, softmax_scale
    checked = _check_prefill((*tensors, cu_seqlens_q, cu_seqlens_k), numbers)
    causal, return_lse, max_workspace_bytes, softmax_scale, layouts, outputs, wants_grad, by_operator = checked
    lengths = _check_lengths(q_nope, kv_latent, lengths)
    check_values = should_check_values(check_values) and cu_seqlens_q is not None
    call = PrefillCall(*tensors, lengths, softmax_scale, causal, layouts)
    if not runs_kernel:
        if check_values:
            call.check_values()
        return reference.mla_prefill(
            *tensors,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=lengths.max_seqlen_q,
            max_seqlen_k=lengths.max_seqlen_k,
            causal=causal,
            softmax_scale=softmax_scale,
            mode=choose_schedule(ProblemSizes.of(call), mode, max_workspace_bytes, wants_grad).mode,
            return_lse=return_lse,
        )
    schedule = mode, max_workspace_bytes, wants_grad
    if by_operator or wants_grad:
        refuse_transforms(**dict(zip(PREFILL_INPUTS, tensors)))
    if by_operator:
        from .autograd import prefill_by_operator  # not cached, of which tracers warn

        out, lse = prefill_by_operator(call, schedule, check_values)
        return (out, lse) if return_lse else out
    if check_values:
        call.check_values()
    plain, differentiable = _prefill_kernels()
    if wants_grad:
        out, lse = differentiable(*tensors, call, schedule, outputs)
    else:
        out, lse = outputs.new(q_nope, return_lse)
        plain(out, lse, call, schedule)
    return (out, lse) if return_lse else out


@functools.cache
def _prefill_kernels() -> tuple[Callable[..., None], Callable[..., tuple[Tensor, Tensor]]]:
    """Imported at the first call, so that the package can be imported without triton."""
    from .autograd import LatentPrefill, launch_prefill

    return launch_prefill, LatentPrefill.apply


PREFILL_INPUTS = "q_nope", "q_pe", "kv_latent", "k_pe", "w_uk", "w_uv", "cu_seqlens_q", "cu_seqlens_k"


class PrefillCall(NamedTuple):
    """A call of `mla_prefill`, checked. torch.autocast has already cast the tensors."""

    q_nope: Tensor
    q_pe: Tensor
    kv_latent: Tensor
    k_pe: Tensor
    w_uk: Tensor
    w_uv: Tensor
    lengths: Lengths
    softmax_scale: float
    causal: bool
    layouts: Layouts | None = None  # None: not found yet

    def find_layouts(self) -> Layouts:
        return self.layouts or _layouts_of((*self.tensors, *self.lengths[:2]), PREFILL_INPUTS)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:6]

    def check_values(self) -> None:
        """`Lengths.check_values` of a packed batch. A device-to-host sync."""
        self.lengths.check_values(self.q_nope.shape[0], self.kv_latent.shape[0])


def check_differentiable(q_nope, q_pe, w_uv):
    """Raise at the call and not in the backward pass, where the cause would be hard to find."""
    head_dims = q_nope.shape[-1] + q_pe.shape[-1], w_uv.shape[1]
    if (head_dim := max(head_dims)) > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"gradients are supported for head dimensions up to {MAX_HEAD_DIM}, got {head_dim}; use torch.no_grad"
        )


@check_once
def _check_prefill(tensors, options):
    """Check the six tensors and both cu_seqlens. Returns the options from causal on, checked; Layouts and Outputs;
    whether a gradient is wanted, and whether another observer than autograd wants the operator."""
    *tensors, cu_seqlens_q, cu_seqlens_k = tensors
    _, mode, causal, return_lse, max_workspace_bytes, softmax_scale = options
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        fail("cu_seqlens_q, cu_seqlens_k", "both or none", "one of them", TypeError)
    check_prefill_tensors(tensors, packed, mode)
    if packed:
        check_packed(cu_seqlens_q, cu_seqlens_k, tensors[0].device)
    causal, return_lse = check_bool("causal", causal), check_bool("return_lse", return_lse)
    max_workspace_bytes = check_int("max_workspace_bytes", max_workspace_bytes)
    softmax_scale = check_softmax_scale(softmax_scale, tensors[0].shape[-1] + tensors[1].shape[-1])
    layouts = None
    if not torch.compiler.is_compiling():  # sizes may be symbols
        layouts = Layouts(dict(zip(PREFILL_INPUTS, (*tensors, cu_seqlens_q, cu_seqlens_k))))
    outputs = outputs_of(tensors[0].shape, tensors[-1].shape[1], tensors[0].dtype)
    if wants_grad := wants_gradients(*tensors):
        check_differentiable(tensors[0], tensors[1], tensors[-1])
    by_operator = is_observed(*tensors, cu_seqlens_q, cu_seqlens_k, but_autograd=True)
    return causal, return_lse, max_workspace_bytes, softmax_scale, layouts, outputs, wants_grad, by_operator


def _check_lengths(q_nope, kv_latent, lengths):
    """The Lengths, with the longest lengths set for a dense batch."""
    cu_seqlens_q, _, max_seqlen_q, max_seqlen_k = lengths
    if cu_seqlens_q is None:
        rows_q, rows_k = q_nope.shape[1], kv_latent.shape[1]
        for name, given, size in (("max_seqlen_q", max_seqlen_q, rows_q), ("max_seqlen_k", max_seqlen_k, rows_k)):
            if given not in (None, size):
                fail(name, f"{size} without cu_seqlens, or None", given)
        return Lengths(None, None, rows_q, rows_k)
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is None:
            fail(name, "an int, required with cu_seqlens", None, TypeError)
    return packed_lengths(*lengths)


def check_prefill_tensors(tensors, packed, mode):
    """Check the six tensors, and the mode."""
    q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv = tensors
    dtypes = KERNEL_DTYPES
    if isinstance(q_nope, torch.Tensor) and not use_kernel(q_nope):
        dtypes = (*KERNEL_DTYPES, torch.float64)
    outer_q, outer_k = (("total_q",), ("total_k",)) if packed else (("batch", "seqlen_q"), ("batch", "seqlen_k"))
    check_tensor("q_nope", q_nope, (*outer_q, "num_heads", "qk_nope_head_dim"), dtypes, None)
    dtype, device = (q_nope.dtype,), q_nope.device
    if not packed:
        outer_k = (q_nope.shape[0], "seqlen_k")
    *rows_q, num_heads, nope_dim = q_nope.shape
    check_tensor("q_pe", q_pe, (*rows_q, num_heads, "qk_rope_head_dim"), dtype, device)
    check_tensor("kv_latent", kv_latent, (*outer_k, "kv_lora_rank"), dtype, device)
    *rows_k, kv_lora_rank = kv_latent.shape
    check_tensor("k_pe", k_pe, (*rows_k, q_pe.shape[-1]), dtype, device)
    check_tensor("w_uk", w_uk, (num_heads, nope_dim, kv_lora_rank), dtype, device)
    check_tensor("w_uv", w_uv, (num_heads, "v_head_dim", kv_lora_rank), dtype, device)
    check_rows("q_nope", rows_q[-1])
    check_rows("kv_latent", rows_k[-1])
    names = "q_nope", "q_pe", "kv_latent", "k_pe", "w_uk", "w_uv"
    for name, x in zip(names, tensors):
        check_last_contiguous(name, x)
        if not all(1 <= size <= MAX_HEAD_DIM for size in x.shape[1 if name.startswith("w") else -1 :]):
            fail(name, f"dimensions of 1 to {MAX_HEAD_DIM}", f"shape {tuple(x.shape)}")
    if mode not in ("auto", *MODES):
        fail("mode", f"auto, {', '.join(MODES)}", repr(mode))


def _of_latents(is_packed):
    """The Layout of a prefill."""
    rows = *of_rows(("q_nope", "q_pe"), is_packed), *of_rows(("kv_latent", "k_pe"), is_packed, has_heads=False)
    weights = Operand("w_uk", heads=0), Operand("w_uv", heads=0)

    def check(tensors):
        check_prefill_tensors(tensors, is_packed, "auto")

    return Layout((*rows, *weights), 2, lse_dims(is_packed), check, "context_parallel_mla_prefill")


LATENTS_DENSE, LATENTS_PACKED = _of_latents(False), _of_latents(True)


class CheckedDecode(NamedTuple):
    """What follows from the kinds of a decode's tensors and from its options."""

    softmax_scale: float
    causal: bool
    rope_interleaved: bool
    num_splits: int
    return_lse: bool
    layouts: Layouts | None  # None where sizes may be symbols
    outputs: Outputs


@check_once
def _check_decode(tensors, options):
    """Check the tensors, among them out, lse and workspace, but for tree_mask; and these options."""
    q_nope, q_pe, latent_cache, cache_seqlens, block_table, w_uk, w_uv, *more, out, lse, workspace = tensors
    rope_cos, rope_sin, rope_cache, cu_seqlens_q, k_scale, k_pe_scale, tree_mask = more
    _, softmax_scale, causal, rope_interleaved, num_splits, return_lse = options
    packed = cu_seqlens_q is not None
    softmax_scale = _check_decode_tensors(q_nope, q_pe, latent_cache, rope_cache, w_uk, w_uv, softmax_scale, packed)
    causal, return_lse = check_bool("causal", causal), check_bool("return_lse", return_lse)
    rope_interleaved = check_bool("rope_interleaved", rope_interleaved)
    device = q_nope.device
    batch = "batch" if packed else q_nope.shape[0]
    check_tensor("cache_seqlens", cache_seqlens, (batch,), (torch.int32,), device)
    check_last_contiguous("cache_seqlens", cache_seqlens)
    batch = cache_seqlens.shape[0]
    check_tensor("block_table", block_table, (batch, "max_pages"), (torch.int32,), device)
    check_last_contiguous("block_table", block_table)
    if packed:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, device)
        if cu_seqlens_q.shape[0] != batch + 1:
            expected = f"shape ({batch + 1},), one more than cache_seqlens"
            fail("cu_seqlens_q", expected, f"shape {tuple(cu_seqlens_q.shape)}")
        check_rows("q_nope", q_nope.shape[0] * q_nope.shape[1])
    _check_rope(q_pe, w_uk, rope_cos, rope_sin, packed, tree_mask)
    num_splits = check_num_splits(num_splits)
    check_latent_scales(latent_cache, k_scale, k_pe_scale)
    shape = _decode_out_shape(q_nope, w_uk, w_uv)
    if out is not None:
        check_out(out, shape, q_nope.dtype, device)
    if lse is not None:
        check_lse(lse, lse_shape(q_nope), return_lse, device)
    if workspace is not None:
        check_workspace(workspace, device)
    checked = softmax_scale, causal, rope_interleaved, num_splits, return_lse
    layouts = None if torch.compiler.is_compiling() else Layouts(dict(zip(DECODE_INPUTS, tensors)))
    return CheckedDecode(*checked, layouts, outputs_of(q_nope.shape, shape[-1], q_nope.dtype))


def _check_decode_tensors(q_nope, q_pe, latent_cache, rope_cache, w_uk, w_uv, softmax_scale, packed):
    """Check the tensors; return softmax_scale."""
    dtypes = KERNEL_DTYPES
    if isinstance(q_nope, torch.Tensor) and not use_kernel(q_nope):
        dtypes = (*KERNEL_DTYPES, torch.float64)
    rows = ("total_q",) if packed else ("batch", "seqlen_q")
    check_tensor("q_nope", q_nope, (*rows, "num_heads", "dim"), dtypes, None)
    dtype, device = (q_nope.dtype,), q_nope.device
    check_tensor("q_pe", q_pe, (*q_nope.shape[:-1], "qk_rope_head_dim"), dtype, device)
    num_heads, kv_lora_rank = q_nope.shape[-2:]
    rope_dim = q_pe.shape[-1]
    if w_uk is not None:
        check_tensor("w_uk", w_uk, (num_heads, q_nope.shape[-1], "kv_lora_rank"), dtype, device)
        kv_lora_rank = w_uk.shape[2]
    if w_uv is not None:
        check_tensor("w_uv", w_uv, (num_heads, "v_head_dim", kv_lora_rank), dtype, device)
    has_scales = isinstance(latent_cache, torch.Tensor) and latent_cache.dtype == torch.uint8
    for name, x in (("q_nope", q_nope), ("q_pe", q_pe), ("w_uk", w_uk), ("w_uv", w_uv)):
        if x is None:
            continue
        check_last_contiguous(name, x)
        least = 0 if name == "q_pe" else 1
        for dim in (-2, -1) if name.startswith("w") else (-1,):
            if not least <= x.shape[dim] <= MAX_HEAD_DIM:
                fail(name, f"dimensions of {least} to {MAX_HEAD_DIM}", f"shape {tuple(x.shape)}")
    width, cache_dtypes = kv_lora_rank + rope_dim, (*dtype, *FLOAT8_MANTISSA_BITS, torch.uint8)
    if rope_cache is not None:
        width, cache_dtypes = kv_lora_rank, cache_dtypes[:-1]
    elif has_scales:
        if rope_dim == 0:
            fail("q_pe", "1 or more columns with a uint8 cache", 0)
        _, width = latent_storage(kv_lora_rank, rope_dim, torch.float8_e4m3fn)
    check_tensor("latent_cache", latent_cache, ("num_pages", "page_size", width), cache_dtypes, device)
    check_last_contiguous("latent_cache", latent_cache)
    if rope_cache is not None:
        check_tensor("rope_cache", rope_cache, (*latent_cache.shape[:2], rope_dim), (latent_cache.dtype,), device)
        check_last_contiguous("rope_cache", rope_cache)
    if latent_cache.shape[1] == 0:
        fail("latent_cache", "a page size of 1 or more", 0)
    if softmax_scale is None and w_uk is None:
        fail("softmax_scale", "a number, since without w_uk the width of queries and keys is not known", None)
    return check_softmax_scale(softmax_scale, q_nope.shape[-1] + rope_dim)


def _check_longest(max_seqlen_q, q_nope, packed):
    """max_seqlen_q, checked; None if queries are not packed."""
    if not packed:
        if max_seqlen_q not in (None, q_nope.shape[1]):
            fail("max_seqlen_q", f"q_nope's {q_nope.shape[1]} queries without cu_seqlens_q, or None", max_seqlen_q)
        return None
    if max_seqlen_q is None:
        fail("max_seqlen_q", "an int, required with cu_seqlens_q", None, TypeError)
    return check_max_seqlen("max_seqlen_q", max_seqlen_q)


def _check_rope(q_pe, w_uk, rope_cos, rope_sin, packed, tree_mask):
    if rope_cos is None and rope_sin is None:
        return
    if packed:
        raise NotImplementedError("rope_cos: not supported with cu_seqlens_q; rotate q_pe before")
    if tree_mask is not None:
        raise NotImplementedError("rope_cos: not supported with tree_mask; rotate q_pe before, by depth in the tree")
    if rope_cos is None or rope_sin is None:
        fail("rope_cos, rope_sin", "both or none", "one of them", TypeError)
    if w_uk is None:
        fail("rope_cos", "None without w_uk: q_pe is rotated in the kernel that absorbs q_nope", "a tensor")
    check_rope_tables("q_pe", q_pe, rope_cos, rope_sin)


def _check_values(call):
    """Check on the host, after a device-to-host sync, that every length fits the table, every used page is in the
    cache, every position has an angle, cu_seqlens_q fits q_nope, and the tree is one of the table's.
    """
    latent_cache, rope_cos = call.latent_cache, call.rope_cos
    num_pages, page_size = latent_cache.shape[0], latent_cache.shape[1] * num_ranks_of(call.key_shard)
    capacity = page_size * call.block_table.shape[1]
    for i, (seqlen, pages) in enumerate(zip(call.cache_seqlens.tolist(), call.block_table.tolist())):
        if not 0 <= seqlen <= capacity:
            fail(f"cache_seqlens[{i}]", f"0 to the {capacity} keys that fit in the table", seqlen)
        if rope_cos is not None and seqlen > rope_cos.shape[0]:
            fail(f"cache_seqlens[{i}]", f"at most the {rope_cos.shape[0]} positions of rope_cos", seqlen)
        for entry, page in enumerate(pages[: -(-seqlen // page_size)]):
            if not 0 <= page < num_pages:
                fail(f"block_table[{i}, {entry}]", f"a page of 0 to {num_pages - 1}", page)
    if call.cu_seqlens_q is not None:
        check_cu_seqlens_values("cu_seqlens_q", call.cu_seqlens_q, call.q_nope.shape[0], call.max_seqlen_q)
    if call.prefix_tree is not None:
        of_batch = call.block_table, call.cache_seqlens, page_size, call.q_nope, call.cu_seqlens_q
        check_tree_values(call.prefix_tree, *of_batch)
