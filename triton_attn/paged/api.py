"""Public API of attention over a KV cache: argument checks, then the kernel or the reference."""

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .._host import keywords
from .._host.backend import is_batch_invariant, should_check_values, use_kernel
from .._host.checks import (
    KERNEL_DTYPES,
    MAX_HEAD_DIM,
    QUANTIZED_BITS,
    check_bool,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_factor,
    check_kv_scale,
    check_last_contiguous,
    check_max_seqlen,
    check_packed_pages,
    check_tensor,
    fail,
    layout_of,
    read_length,
)
from .._host.key_shard import KeyShard, check_key_shard, num_ranks_of
from .._host.known import Known, sides_of
from .._host.layout import known_outputs, lse_shape, new_outputs, slots_of_packed
from .._host.observers import is_observed, number_and_tensor, refuse_gradients, refuse_vmap
from .._host.options import (
    AttentionOptions,
    attention_options,
    check_head_tensors,
    check_num_drafts,
    check_tree_mask,
    with_tensors,
    with_tree_mask,
)
from .._host.prefix_tree import (
    PrefixTree,
    check_prefix_tree,
    check_tree_values,
    operands_of_tree,
    tree_of_operands,
)
from .._host.workspace import Workspace, as_workspace, check_lse, check_workspace, only_counts
from ..merge.splits import check_batch_invariant, check_num_splits
from . import reference

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11


@overload
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: "Unpack[keywords.Paged]",
) -> Tensor: ...
@overload
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: "Unpack[keywords.Paged]",
) -> tuple[Tensor, Tensor]: ...
@overload
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    return_lse: bool,
    **options: "Unpack[keywords.Paged]",
) -> Tensor | tuple[Tensor, Tensor]: ...
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
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
    """Exact attention of new queries over a KV cache: decode, speculative drafts, prefill chunks, or a mix of them.

        out[b, i, h] = sum_j softmax_j(s[b, h, i, j]) v[b, j],  s as in `flash_attention`
        k[b, j] = k_scale[h // group_size] * k_cache[block_table[b, j // page_size], j % page_size, h // group_size]

    and v likewise, over the keys j < cache_seqlens[b] that query i sees. A k_scale of each token has the indices of
    k_cache. The queries of a sequence are its last tokens: query i has position cache_seqlens[b] - seqlen_q + i. Append
    their keys and values before the call.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or (total_q, num_heads_q, head_dim) with cu_seqlens_q; fp16, bf16
            or fp32; head_dim 1 to 512. Any strides, the last dimension contiguous.
        k_cache: (num_pages, page_size, num_heads_kv, head_dim) with a block_table, (batch, seqlen_cache, num_heads_kv,
            head_dim) without; q's dtype, float8_e4m3fn, float8_e5m2 or int8. num_heads_kv divides num_heads_q. Or,
            with a block_table, vLLM's packed cache (num_pages, num_heads_kv, head_dim / x, page_size, x), x = 16 bytes,
            which is read in place: k_cache[page, h, d // x, slot, d % x]. x divides head_dim. The strides of pages and
            heads are arbitrary; the other dimensions are contiguous.
        v_cache: k_cache's shape but for head_dim_v, 1 to 512, its own; k_cache's dtype. Beside a packed k_cache
            (num_pages, num_heads_kv, head_dim_v, page_size), whose strides follow the same rule.
        cache_seqlens: (batch,) int32 on q's device, the number of keys of each sequence, new ones included. May be 0.
            A length above the capacity, max_pages * page_size or seqlen_cache, counts as the capacity.
        block_table: (batch, max_pages) int32 on q's device: the pages of each sequence, in order. Entries past its last
            page, and slots past its last key, are never read.
        cu_seqlens_q: (batch + 1,) int32: sequence b has the queries [cu_seqlens_q[b], cu_seqlens_q[b + 1]), 0 or more.
        max_seqlen_q: the largest number of queries of a sequence, an int, required with cu_seqlens_q. Queries past it
            are not computed. A tensor as in `flash_attention_varlen`.
        causal: new tokens do not see later ones. Aligned to the bottom right, as window_size is.
        softmax_scale, window_size, softcap, alibi_slopes, sinks: as in `flash_attention`. Pages that lie outside of the
            window are not touched.
        tree_mask: (batch, seqlen_q) int64 on q's device, (total_q,) with cu_seqlens_q; the last dimension contiguous.
            The queries of a sequence, at most 64, are then the tokens of a tree of drafts. Bit j of query i says
            whether it sees the j-th of them, whose key is cache_seqlens[b] - seqlen_q + j; all see the keys before.
            Query i gets what a single query gets whose sequence ends with the drafts that it sees: it has position
            p = cache_seqlens[b] - seqlen_q + popcount(bits) - 1, and draft j, seen by it, p + 1 -
            popcount(bits >> j). Where the order of the drafts puts parents first, that is their depth in the tree.
            window_size and alibi_slopes count from these positions, and causal and the right side of the window have
            nothing to hide. Bits from seqlen_q on do not count.
        k_scale, v_scale: factors of cached elements: a number above 0, or fp32 tensors (1,) or (num_heads_kv,), or, of
            a cache in fp8 or int8, (num_pages, page_size, num_heads_kv), (batch, seqlen_cache, num_heads_kv) without a
            block_table, of any strides: one for each token and head, in this order beside a packed cache too. None is
            1. With fp16 queries, such a v_scale times the largest number of the cache's dtype is in the range of fp16,
            as those are that `append_kv_cache` writes.
        num_splits: splits of the keys of a sequence, computed in parallel and merged. 0 chooses by the shapes. With the
            same num_splits and max_seqlen_q, and without a prefix_tree, the result for a sequence is bitwise the same
            in every batch.
        prefix_tree: which leading pages sequences share, from `prefix_tree` or a cache's `prefix_groups`. The keys of a
            node are read once for all sequences below it, and the results are merged with those of each sequence's own
            keys, which num_splits is about: three launches, whatever the number of levels. It changes no result but for
            rounding. Beside a tree_mask nodes end before the page of a sequence's first draft. None: each sequence
            reads all of its keys.
        batch_invariant: the result for a query is bitwise the same whatever else the call has: other sequences, other
            queries of its own, a wider table. A prompt in chunks gets what the whole prompt gets, and a decoded token
            what it gets as part of a prompt. Keys are split every 1024, and tiles do not follow the shapes, which costs
            time. num_splits must be 0, prefix_tree None. None follows TRITON_ATTN_BATCH_INVARIANT=1.
        key_shard: (rank, num_ranks, interleave) of a cache that is sharded over ranks by turns: this one holds the keys
            j with j // interleave % num_ranks = rank, in their order, and the result is that over these keys.
            cache_seqlens, window_size and the capacity still count the keys of all ranks. interleave divides page_size
            (seqlen_cache). Merge the results of the ranks with `merge_attention`; sinks go to one of
            them. See `parallel.context_parallel_paged_attention`.
        out: tensor for the result, q's dtype and shape except for head_dim_v; the last dimension contiguous.
        lse: contiguous tensor for the lse that return_lse asks for.
        workspace: (bytes,) uint8 on q's device, aligned to 16 bytes: memory for results of splits, so that with out and
            lse nothing is allocated. `workspace_bytes` says how many; a tracer uses memory of its own. Calls that
            run at the same time need one each.
        return_lse: also return the natural log-sum-exp of the scores, including the sink.
        check_values: check lengths and page numbers, which costs a device-to-host sync. None follows
            TRITON_ATTN_CHECK=1.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) in q's dtype, and with return_lse also lse (batch, num_heads_q,
        seqlen_q) in fp32; (total_q, num_heads_q, head_dim_v) and (num_heads_q, total_q) with cu_seqlens_q, 0 and -inf
        in rows after the last sequence. A query that sees no key has out = 0 and lse = -inf, or the sink.

    Raises:
        TypeError, ValueError: an argument is wrong, or q has more than 10**9 rows for a KV head; nothing was launched
            or written. With values checked also: a length beyond the cache, a page outside the cache, or
            a prefix_tree of other pages or queries.
        NotImplementedError: an argument requires a gradient or has a tangent.

    It is one operator under torch.compile, export and vmap, which loops. With `out` the operator writes to it, and vmap
    is not supported.

    Example:
        >>> k_cache = v_cache = torch.randn(8, 16, 2, 64)  # eight pages of 16 tokens
        >>> lengths, table = torch.tensor([9, 30]).int(), torch.tensor([[5, 0], [2, 7]]).int()
        >>> q = torch.randn(2, 1, 8, 64)  # one new token of each sequence
        >>> triton_attn.paged_attention(q, k_cache, v_cache, lengths, table).shape
        torch.Size([2, 1, 8, 64])
        >>> drafts, tree_mask = torch.randn(2, 3, 8, 64), torch.tensor([[0b001, 0b011, 0b101]] * 2)  # two after one
        >>> triton_attn.paged_attention(drafts, k_cache, v_cache, lengths, table, tree_mask=tree_mask).shape
        torch.Size([2, 3, 8, 64])

    Source: Kwon et al., PagedAttention (2023), arXiv:2309.06180; split keys: Dao et al., Flash-Decoding (2023); shared
    prefixes: Juravsky et al., Hydragen (2024), arXiv:2402.05099; trees of drafts: Miao et al., SpecInfer (2024),
    arXiv:2305.09781.
    """
    given = q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q, alibi_slopes, sinks, tree_mask
    tree, tree_sizes = (prefix_tree.memory, prefix_tree[1:]) if type(prefix_tree) is PrefixTree else (None, prefix_tree)
    numbers = causal, softmax_scale, softcap, num_splits, batch_invariant, return_lse, max_seqlen_q, tree_sizes
    numbers = *numbers, *sides_of(window_size), *sides_of(key_shard), is_batch_invariant()
    tensors = *given, k_scale, v_scale, tree, out, lse, workspace
    key, known = _known.find_launch(tensors, q, check_values, numbers)
    launches = None if known is None else known.get(_forward().target_of(q, k_cache, v_cache))
    if launches is not None:
        room = as_workspace(workspace)
        scales = check_factor("k_scale", k_scale), check_factor("v_scale", v_scale)
        result, new_lse = launches.outputs.new(q, return_lse, out, lse)
        launches.launch((*given, *scales, tree), result, new_lse, room)
        return (result, new_lse) if return_lse else result
    batch, options, layout = _check_tensors(
        q, k_cache, v_cache, block_table, causal, softmax_scale, window_size, softcap
    )
    if k_cache.ndim == 5:
        k_cache, v_cache = slots_of_packed(k_cache, v_cache)
        layout = layout_of(q, k_cache, v_cache)
    shape = ("batch" if batch is None else batch,)
    check_tensor("cache_seqlens", cache_seqlens, shape, (torch.int32,), q.device)
    check_last_contiguous("cache_seqlens", cache_seqlens)
    batch = cache_seqlens.shape[0]
    if block_table is not None:
        check_tensor("block_table", block_table, (batch, "max_pages"), (torch.int32,), q.device)
        check_last_contiguous("block_table", block_table)
    longest = _check_queries(q, batch, cu_seqlens_q, max_seqlen_q)
    check_head_tensors(q, batch, alibi_slopes, sinks)
    options = with_tensors(options, alibi_slopes, sinks)
    k_number = v_number = None
    if k_scale is not None:
        k_number, k_scale = number_and_tensor(check_kv_scale("k_scale", k_scale, k_cache))
    if v_scale is not None:
        v_number, v_scale = number_and_tensor(check_kv_scale("v_scale", v_scale, v_cache))
    num_splits = check_num_splits(num_splits)
    batch_invariant = check_batch_invariant(batch_invariant, num_splits=num_splits)
    key_shard = None if key_shard is None else check_key_shard(key_shard, k_cache.shape[1])
    return_lse = check_bool("return_lse", return_lse)
    if prefix_tree is not None:
        check_prefix_tree(prefix_tree, batch, block_table, batch_invariant, q.device)
    if tree_mask is not None:
        check_tree_mask(tree_mask, q, longest)
        options = with_tree_mask(options, tree_mask)
    if out is not None:
        check_tensor("out", out, (*q.shape[:-1], v_cache.shape[-1]), (q.dtype,), q.device)
        check_last_contiguous("out", out)
    if lse is not None:
        check_lse(lse, lse_shape(q), return_lse, q.device)
    if workspace is not None:
        check_workspace(workspace, q.device)
    check_values = should_check_values(check_values)
    tensors = q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q
    if is_observed(*tensors, alibi_slopes, sinks, k_scale, v_scale, tree_mask, out, lse):
        per_head = alibi_slopes, sinks, k_scale, v_scale, tree_mask
        refuse_gradients(**dict(zip(INPUTS, (*tensors, *per_head))), out=out, lse=lse)
        num_queries, longest_q = number_and_tensor(longest)
        numbers = k_number, v_number, num_queries, options.softmax_scale, *options.window, options.softcap
        numbers += num_splits, batch_invariant, key_shard
        more = *operands_of_tree(prefix_tree), check_values, return_lse
        if out is None:
            result, new_lse = _operator(*tensors, *per_head, longest_q, *numbers, *more)
        else:
            refuse_vmap(**dict(zip(INPUTS, (*tensors, *per_head))), out=out)
            result, new_lse = out, _operator_with_out(*tensors, *per_head, longest_q, *numbers, *more, out)
        new_lse = new_lse if lse is None else lse.copy_(new_lse)
        return (result, new_lse) if return_lse else result
    result, new_lse = known_outputs(q.shape, v_cache.shape[-1], q.dtype).new(q, return_lse, out, lse)
    scales = k_number if k_scale is None else k_scale, v_number if v_scale is None else v_scale
    splits = num_splits, prefix_tree, batch_invariant
    call = PagedCall(*tensors, longest, options, layout, *scales, *splits, key_shard)
    call = call._replace(workspace=as_workspace(workspace))
    launches = _attend(call, check_values, result, new_lse)
    if launches is not None and type(workspace) is not Workspace:
        if known is None:
            _known.keep(key, {launches.target: launches})
        else:
            known[launches.target] = launches
    return (result, new_lse) if return_lse else result


_known = Known()  # {`target_of`: Launches} of a call


class PagedCall(NamedTuple):
    """A call of `paged_attention`, checked."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int
    options: AttentionOptions
    layout: tuple  # `layout_of` q, k_cache and v_cache
    k_scale: float | Tensor | None = None
    v_scale: float | Tensor | None = None
    num_splits: int = 0
    prefix_tree: PrefixTree | None = None
    batch_invariant: bool = False
    key_shard: KeyShard | None = None
    workspace: Workspace | None = None


def _attend(call: PagedCall, check_values: bool, out: Tensor, lse: Tensor | None) -> Any:
    """Fill out and lse, by the kernel, whose Launches are the result, or the reference."""
    if check_values:
        _check_values(call)
    if use_kernel(call.q):
        return _forward().launch_paged_fwd(call, out, lse)
    if only_counts(call.workspace):
        return None
    k_cache = call.k_cache.flatten(3)  # of a packed cache, from (num_pages, page_size, heads, dim / x, x)
    reference.paged_attention(
        call.q,
        k_cache,
        call.v_cache,
        call.cache_seqlens,
        call.block_table,
        cu_seqlens_q=call.cu_seqlens_q,
        **call.options.as_arguments(),
        k_scale=call.k_scale,
        v_scale=call.v_scale,
        key_shard=call.key_shard,
        out=out,
        lse=lse,
    )
    return None


PACK_BYTES = 16  # of a key that lie side by side in a packed cache
# Arguments of the operators: `INPUTS`, then the options as numbers.
INPUTS = (
    "q",
    "k_cache",
    "v_cache",
    "cache_seqlens",
    "block_table",
    "cu_seqlens_q",
    "alibi_slopes",
    "sinks",
    "k_scale",
    "v_scale",
    "tree_mask",
    "longest_q",
)
SCHEMA = ", ".join(
    [
        *(f"Tensor {name}" for name in INPUTS[:4]),
        *(f"Tensor? {name}" for name in INPUTS[4:]),
        "float? k_number, float? v_number, SymInt? max_seqlen_q, float softmax_scale, SymInt? left, SymInt? right",
        "float? softcap, SymInt num_splits, bool batch_invariant, int[]? key_shard",
        "Tensor? tree, SymInt[]? tree_sizes, bool check_values, bool return_lse",
    ]
)


def _attend_flat(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    tree_mask: Tensor | None,
    longest_q: Tensor | None,
    k_number: float | None,
    v_number: float | None,
    max_seqlen_q: int,
    softmax_scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    num_splits: int,
    batch_invariant: bool,
    key_shard: list[int] | None,
    tree: Tensor | None,
    tree_sizes: list[int] | None,
    check_values: bool,
    return_lse: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`_attend` with the arguments of an operator: (out, lse)."""
    if longest_q is not None:
        max_seqlen_q = read_length("max_seqlen_q", longest_q)
        if tree_mask is not None:
            check_num_drafts(max_seqlen_q)
    options = AttentionOptions(softmax_scale, (left, right), softcap, alibi_slopes, sinks, tree_mask=tree_mask)
    scales = k_number if k_scale is None else k_scale, v_number if v_scale is None else v_scale
    tensors = q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q
    out, lse = new_outputs(q, v_cache, return_lse, out)
    layout = layout_of(q, k_cache, v_cache)
    shard = None if key_shard is None else KeyShard(*key_shard)
    splits = num_splits, tree_of_operands(tree, tree_sizes), batch_invariant
    call = PagedCall(*tensors, max_seqlen_q, options, layout, *scales, *splits, shard)
    _attend(call, check_values, out, lse)
    return out, _or_empty(lse, q)


_operator = torch.library.custom_op(
    "triton_attn::paged_attention", _attend_flat, mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)"
)
_operator_with_out = torch.library.custom_op(
    "triton_attn::paged_attention_out",
    lambda *args: _attend_flat(*args)[1],
    mutates_args=("out",),
    schema=f"({SCHEMA}, Tensor(a!) out) -> Tensor",
)


@_operator.register_fake
def _(q, k_cache, v_cache, *rest):
    out, lse = new_outputs(q, v_cache, rest[-1])
    return out, _or_empty(lse, q)


@_operator_with_out.register_fake
def _(q, k_cache, v_cache, *rest):
    return _or_empty(new_outputs(q, v_cache, rest[-2], rest[-1])[1], q)


def _or_empty(lse: Tensor | None, q: Tensor) -> Tensor:
    """An operator returns tensors only."""
    return q.new_empty(0, dtype=torch.float32) if lse is None else lse


@functools.cache
def _forward() -> ModuleType:
    """Imported at the first call, so that the package can be imported without triton."""
    from . import forward

    return forward


def _check_tensors(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
) -> tuple[int | None, AttentionOptions, tuple]:
    """(batch, or None if only cu_seqlens_q says it; options; layout). Results for a layout are cached."""
    if not isinstance(q, torch.Tensor):
        fail("q", "a tensor", type(q).__name__, TypeError)
    dtype, device = q.dtype, q.device
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(x, torch.Tensor):
            fail(name, "a tensor", type(x).__name__, TypeError)
        if x.device != device:
            fail(name, f"q's device {device}", x.device)
    if dtype not in KERNEL_DTYPES and (dtype != torch.float64 or use_kernel(q)):
        fail("q", "float16, bfloat16 or float32", dtype, TypeError)
    cache_dtype = k_cache.dtype
    if cache_dtype != dtype and cache_dtype not in QUANTIZED_BITS:
        fail("k_cache", f"q's dtype {dtype}, float8_e4m3fn, float8_e5m2 or int8", cache_dtype, TypeError)
    if v_cache.dtype != cache_dtype:
        fail("v_cache", f"k_cache's dtype {cache_dtype}", v_cache.dtype, TypeError)
    if k_cache.ndim == 5 and k_cache.shape[4] * cache_dtype.itemsize != PACK_BYTES:
        x = PACK_BYTES // cache_dtype.itemsize
        expected = f"(num_pages, num_heads_kv, head_dim / {x}, page_size, {x}) of a packed cache of {cache_dtype}"
        fail("k_cache", expected, f"shape {tuple(k_cache.shape)}")
    layout, is_paged = layout_of(q, k_cache, v_cache), block_table is not None
    if torch.compiler.is_compiling():
        return *_check_options(layout, is_paged, causal, softmax_scale, softcap, window_size), layout
    try:
        left, right = window_size
        pair = type(window_size)
        batch, options = _remembered_options(layout, is_paged, causal, softmax_scale, softcap, left, right, pair)
    except (TypeError, ValueError):  # an argument is wrong; the uncached check names it
        batch, options = _check_options(layout, is_paged, causal, softmax_scale, softcap, window_size)
    return batch, options, layout


@functools.lru_cache(maxsize=1024, typed=True)
def _remembered_options(layout, is_paged, causal, softmax_scale, softcap, left, right, pair):
    """The sides of the window as separate arguments, since lru_cache checks the types of arguments but not inside
    tuples.
    """
    return _check_options(layout, is_paged, causal, softmax_scale, softcap, pair((left, right)))


def _check_options(layout, is_paged, causal, softmax_scale, softcap, window_size):
    (shape_q, _), (shape_k, _), (shape_v, _) = layout
    if len(shape_q) not in (3, 4):
        expected = "(batch, seqlen_q, num_heads_q, head_dim), or (total_q, num_heads_q, head_dim) with cu_seqlens_q"
        fail("q", expected, f"shape {tuple(shape_q)}")
    if len(shape_k) == 5:
        shape_k, shape_v = _check_packed(layout, is_paged)
    outer = "(num_pages, page_size" if is_paged else "(batch, seqlen_cache"
    for name, shape in (("k_cache", shape_k), ("v_cache", shape_v)):
        if len(shape) != 4:
            fail(name, f"{outer}, num_heads_kv, head_dim)", f"shape {tuple(shape)}")
    for name, shape, (given, strides) in zip(INPUTS, (shape_q, shape_k, shape_v), layout):
        if strides[-1] != 1 and given[-1] != 1:
            fail(name, "a contiguous last dimension (stride 1)", f"stride {strides[-1]}")
        if not 1 <= shape[-1] <= MAX_HEAD_DIM:
            fail(name, f"a head dimension of 1 to {MAX_HEAD_DIM}", shape[-1])
    if shape_k[:-1] != shape_v[:-1]:
        fail("v_cache", f"k_cache's shape except for the last dimension, {tuple(shape_k[:-1])}", tuple(shape_v[:-1]))
    if shape_k[-1] != shape_q[-1]:
        fail("k_cache", f"q's head dimension {shape_q[-1]}", shape_k[-1])
    if shape_k[2] == 0 or shape_q[-2] % shape_k[2]:
        fail("k_cache", f"a number of heads that divides q's {shape_q[-2]}", shape_k[2])
    if is_paged and shape_k[1] == 0:
        fail("k_cache", "a page size of 1 or more", 0)
    batch = shape_q[0] if len(shape_q) == 4 else None
    if not is_paged:
        if batch is not None and shape_k[0] != batch:
            fail("k_cache", f"q's batch size {batch}, without a block_table", shape_k[0])
        batch = shape_k[0]
    return batch, attention_options(shape_q[-1], causal, softmax_scale, softcap, window_size)


def _check_packed(layout, is_paged):
    """The shapes that a packed cache would have in the usual order of dimensions."""
    (shape_q, _), (shape_k, strides_k), (shape_v, strides_v) = layout
    num_pages, num_heads, num_packs, page_size, x = shape_k
    if not is_paged:
        fail("block_table", "a tensor, since k_cache is packed: it has 5 dimensions", None)
    if shape_q[-1] % x:
        fail("q", f"a head dimension that is a multiple of {x}, since k_cache is packed", shape_q[-1])
    if len(shape_v) != 4 or (*shape_v[:2], shape_v[3]) != (num_pages, num_heads, page_size):
        expected = f"shape ({num_pages}, {num_heads}, head_dim_v, {page_size}), since k_cache is packed"
        fail("v_cache", expected, f"shape {tuple(shape_v)}")
    for name, shape, strides in (("k_cache", shape_k, strides_k), ("v_cache", shape_v, strides_v)):
        check_packed_pages(name, shape, strides)
    slots = num_pages, page_size, num_heads
    return (*slots, num_packs * x), (*slots, shape_v[2])


def _check_queries(q: Tensor, batch: int, cu_seqlens_q: Tensor | None, max_seqlen_q: int | Tensor | None) -> Any:
    """The largest number of queries of a sequence: an int, or a tensor where the call is traced."""
    if cu_seqlens_q is None:
        if q.ndim != 4:
            fail("cu_seqlens_q", "a tensor, since q is (total_q, num_heads_q, head_dim)", None)
        if max_seqlen_q not in (None, q.shape[1]):
            fail("max_seqlen_q", f"q's {q.shape[1]} queries without cu_seqlens_q, or None", max_seqlen_q)
        return q.shape[1]
    if q.ndim != 3:
        fail("q", "(total_q, num_heads_q, head_dim) with cu_seqlens_q", f"shape {tuple(q.shape)}")
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
    if cu_seqlens_q.shape[0] != batch + 1:
        fail("cu_seqlens_q", f"shape ({batch + 1},), one more than cache_seqlens", f"shape {tuple(cu_seqlens_q.shape)}")
    if max_seqlen_q is None:
        fail("max_seqlen_q", "an int, required with cu_seqlens_q", None, TypeError)
    return check_max_seqlen("max_seqlen_q", max_seqlen_q)


def _check_values(call: PagedCall) -> None:
    """Raise unless lengths and pages are within the cache and the tree is of these pages. A device-to-host sync."""
    block_table, cu_seqlens_q = call.block_table, call.cu_seqlens_q
    num_pages, page_size = call.k_cache.shape[0], call.k_cache.shape[1] * num_ranks_of(call.key_shard)
    capacity = page_size * (1 if block_table is None else block_table.shape[1])
    seqlens = call.cache_seqlens.tolist()
    for i, seqlen in enumerate(seqlens):
        if not 0 <= seqlen <= capacity:
            fail(f"cache_seqlens[{i}]", f"0 to the {capacity} keys that fit in the cache", seqlen)
    if cu_seqlens_q is not None:
        check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, call.q.shape[0], call.max_seqlen_q)
    if block_table is None:
        return
    tables = [pages[: -(-seqlen // page_size)] for pages, seqlen in zip(block_table.tolist(), seqlens)]
    for i, pages in enumerate(tables):
        for entry, page in enumerate(pages):
            if not 0 <= page < num_pages:
                fail(f"block_table[{i}, {entry}]", f"a page of 0 to {num_pages - 1}", page)
    if call.prefix_tree is not None:
        of_batch = block_table, call.cache_seqlens, page_size, call.q, cu_seqlens_q
        check_tree_values(call.prefix_tree, *of_batch, call.options.window[0])
