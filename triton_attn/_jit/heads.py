"""Which sequence, head and tile a program computes, and where its rows are in memory."""

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def assign_tile(pid, num_tiles, num_heads, section_size, LAST_FIRST: tl.constexpr):
    """(tile, head) of a program; heads are counted over the whole batch.

    Programs go through sections of section_size heads whose operands fit in the L2 cache together. Inside a section
    they go tile by tile over all heads. With LAST_FIRST the last tiles come first: under a causal mask they take
    longest, and the short ones then fill the gaps at the end.
    """
    section = pid // (section_size * num_tiles)
    first_head = section * section_size
    heads_here = tl.minimum(section_size, num_heads - first_head)
    within = pid - first_head * num_tiles
    tile = within // heads_here
    return num_tiles - 1 - tile if LAST_FIRST else tile, first_head + within % heads_here


class Work(NamedTuple):
    """What a program computes: the rows from `start` on, of one head of one sequence.

    batch_head counts heads over the whole batch. program counts the tiles of this head over all sequences.
    """

    start: object
    batch: object
    head: object
    batch_head: object
    program: object
    num_sequences: object


@triton.jit
def assign_work(num_tiles, section_size, num_heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The Work of this program, in a grid of num_tiles * num_heads * batch, in the order of `assign_tile`."""
    num_batch_heads = tl.num_programs(0) // num_tiles
    tile, batch_head = assign_tile(tl.program_id(0), num_tiles, num_batch_heads, section_size, LAST_FIRST)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    return Work(tile * BLOCK, batch, head, batch_head, batch * num_tiles + tile, num_batch_heads // num_heads)


class Shard(NamedTuple):
    """Where a part of a longer sequence starts: the positions of its first query and key, and the number that dropout
    gives to its first head."""

    query_start: object
    key_start: object
    dropout_row: object


@triton.jit
def load_shard(shard_ptr, batch):
    """The Shard of a sequence."""
    ptr = shard_ptr + batch * 3
    return Shard(tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2))


class Bounds(NamedTuple):
    """First row and length of one sequence's queries and keys, and the position of query 0, counted from key 0."""

    first_q: object
    first_k: object
    seqlen_q: object
    seqlen_k: object
    offset: object


@triton.jit
def sequence_bounds(seqs, batch, seqlen_q, seqlen_k):
    """Bounds of a sequence.

    In a dense batch seqlen_q and seqlen_k are the lengths of each sequence. In a packed batch they are the rows of the
    whole tensors, and cu_seqlens are clamped to them. Whole sequences are aligned at their last query and key, shards
    by their positions.
    """
    first_q = 0
    first_k = 0
    if seqs.cu_seqlens_q_ptr is not None:
        first_q, seqlen_q = packed_bounds(seqs.cu_seqlens_q_ptr, batch, seqlen_q)
    if seqs.cu_seqlens_k_ptr is not None:
        first_k, seqlen_k = packed_bounds(seqs.cu_seqlens_k_ptr, batch, seqlen_k)
    offset = seqlen_k - seqlen_q
    if seqs.shard_ptr is not None:
        shard = load_shard(seqs.shard_ptr, batch)
        offset = shard.query_start - shard.key_start
    return Bounds(first_q, first_k, seqlen_q, seqlen_k, offset)


@triton.jit
def packed_bounds(cu_seqlens_ptr, sequence, num_rows):
    """First row and length of a sequence in a packed tensor of num_rows rows."""
    first = tl.minimum(tl.load(cu_seqlens_ptr + sequence), num_rows)
    return first, tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), num_rows) - first


class Spare(NamedTuple):
    """Rows after a packed batch's last sequence that a program clears: their indices, a mask, whether there are any."""

    rows: object
    mask: object
    any: object


@triton.jit
def spare_rows(cu_seqlens_ptr, num_sequences, num_rows, left_over, num_own, BLOCK: tl.constexpr, ROWS_EACH=1):
    """The Spare rows of a program.

    A program has BLOCK slots, of which the first num_own hold rows of its sequence. The other slots are left over: the
    empty ends of tiles, and all slots of idle programs. Counted over all programs, in the order of sequences and tiles,
    left-over slot i clears spare row i. left_over (int64) is the count before this program's first slot, see
    `slots_left_over`. The grid has a slot for every row of the tensor (`tiles_each`), so every spare row is cleared by
    exactly one program, in one store. Programs are added only where the host knows that there are spare rows. If each
    row of the tensor stands for ROWS_EACH rows, such as the heads of a query, then rows and num_own count those.
    """
    last = tl.minimum(tl.load(cu_seqlens_ptr + num_sequences), num_rows).to(tl.int64) * ROWS_EACH
    end = tl.cast(num_rows, tl.int64) * ROWS_EACH
    slots = tl.arange(0, BLOCK)
    rows = last + left_over + slots
    # rows >= last: if a sequence is longer than max_seqlen, left_over is negative, and its rows must not be cleared.
    mask = (slots >= num_own) & (rows >= last) & (rows < end)
    return Spare(rows, mask, last + left_over + tl.maximum(num_own, 0) < end)


@triton.jit
def spare_rows_of(work, cu_seqlens_ptr, num_rows, end_row, num_own, BLOCK: tl.constexpr):
    """The Spare rows of a program with this Work, whose sequence ends before end_row; see `spare_rows`."""
    left_over = slots_left_over(work.program, end_row, BLOCK)
    return spare_rows(cu_seqlens_ptr, work.num_sequences, num_rows, left_over, num_own, BLOCK)


@triton.jit
def slots_left_over(program, end_row, BLOCK: tl.constexpr, ROWS_EACH=1):
    """Slots left over before program number `program`, whose sequence ends before end_row; see `spare_rows`."""
    return tl.cast(program, tl.int64) * BLOCK - tl.cast(end_row, tl.int64) * ROWS_EACH


@triton.jit
def row_pointer(view, batch, row, head):
    """Pointer to the first element of a row, computed in 64 bits."""
    offset = tl.cast(batch, tl.int64) * view.strides.batch + tl.cast(row, tl.int64) * view.strides.row
    return view.ptr + offset + tl.cast(head, tl.int64) * view.strides.head


@triton.jit
def row_offsets(batch, rows, heads, strides):
    """64-bit offsets of rows in a tensor with the strides (batch, row, head)."""
    batch_stride, row_stride, head_stride = strides
    offsets = tl.cast(batch, tl.int64) * batch_stride + rows.to(tl.int64) * row_stride
    return offsets + heads.to(tl.int64) * head_stride


@triton.jit
def lse_offsets(batch, heads, rows, num_heads, num_rows):
    """64-bit offsets into a contiguous log-sum-exp (batch, num_heads, num_rows)."""
    return (tl.cast(batch, tl.int64) * num_heads + heads) * num_rows + rows


@triton.jit
def find_sequence(
    cu_seqlens_ptr, batch, search_steps, target, MULTIPLY: tl.constexpr, DIVIDE: tl.constexpr, ADD: tl.constexpr
):
    """The last sequence i with cu_seqlens[i] * MULTIPLY // DIVIDE + i * ADD <= target, by bisection.

    target is a scalar or a tensor; search_steps is batch.bit_length().
    """
    lo = target * 0
    hi = lo + batch
    for _ in range(search_steps):
        middle = (lo + hi) // 2
        first = tl.load(cu_seqlens_ptr + middle) * MULTIPLY // DIVIDE + middle * ADD
        below = first <= target
        lo = tl.where(below, middle, lo)
        hi = tl.where(below, hi, middle)
    return lo


class Node(NamedTuple):
    """A program's tile of the queries of a `PrefixTree`'s node. The query of row i is order_ptr[i]."""

    order_ptr: object
    num: object  # queries
    tile: object
    first_page: object
    end_page: object
    slot: object


class Batch(NamedTuple):
    """The sequences: num_rows are the queries of each, or all rows of a packed batch. cache_seqlens and capacity count
    the keys of all ranks. tree_ptr points to the memory of a `PrefixTree`, or is None.
    """

    cu_seqlens_q_ptr: object
    cache_seqlens_ptr: object
    num: object
    num_rows: object
    capacity: object  # longer lengths in cache_seqlens are clamped to it
    search_steps: object
    tree_ptr: object
    num_nodes: object


@triton.jit
def find_node(batch, program, GROUP_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The Node of a program; a tile for each node and those of all queries are an upper bound of programs.

    A query has GROUP_SIZE rows.
    """
    num_nodes = batch.num_nodes
    starts_ptr = batch.tree_ptr + 2 * batch.num
    index = find_sequence(starts_ptr, num_nodes, batch.search_steps, program, GROUP_SIZE, BLOCK, 1)
    first = tl.load(starts_ptr + index)
    tile = program - (first * GROUP_SIZE // BLOCK + index)
    node_ptr = starts_ptr + num_nodes + 1 + 4 * index
    order_ptr = starts_ptr + 5 * num_nodes + 1 + tl.load(node_ptr)
    num = tl.load(starts_ptr + index + 1) - first
    return Node(order_ptr, num, tile, tl.load(node_ptr + 1), tl.load(node_ptr + 2), tl.load(node_ptr + 3))


class NodeRows(NamedTuple):
    """Rows of a Node's tile: a mask, where their queries are in a tensor, their sequences, positions among the keys of
    these, numbers of queries and of keys of these. Rows past the last query repeat it."""

    mask: object
    batch: object
    query: object
    sequence: object
    position: object
    seqlen_q: object
    seqlen_k: object


@triton.jit
def rows_of_node(node, batch, GROUP_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The NodeRows of a Node; a row is one of the GROUP_SIZE heads of a query."""
    rows = node.tile * BLOCK + tl.arange(0, BLOCK)
    query = tl.load(node.order_ptr + tl.minimum(rows // GROUP_SIZE, node.num - 1))
    if batch.cu_seqlens_q_ptr is None:
        sequence = query // batch.num_rows
        first = sequence * batch.num_rows
        seqlen_q = batch.num_rows
        batch_index = sequence
        row = query - first
    else:
        sequence = find_sequence(batch.cu_seqlens_q_ptr, batch.num, batch.search_steps, query, 1, 1, 0)
        first, seqlen_q = packed_bounds(batch.cu_seqlens_q_ptr, sequence, batch.num_rows)
        batch_index = sequence * 0
        row = query
    seqlen_k = tl.minimum(tl.load(batch.cache_seqlens_ptr + sequence), batch.capacity)
    mask = rows < node.num * GROUP_SIZE
    position = query - first + seqlen_k - seqlen_q
    return NodeRows(mask, batch_index, row, sequence, position, seqlen_q, seqlen_k)


@triton.jit
def sequence_of_first(position, sequence):
    """A sequence of those rows (rows,) whose position is the smallest. None of the others sees a key that is before
    its window, whose page it may have given back."""
    return tl.max(tl.where(position == tl.min(position, 0), sequence, 0), 0)


@triton.jit
def longest_of(end_key, sequence):
    """The largest of end_key (rows,), and a sequence of those rows that have it."""
    longest = tl.max(end_key, 0)
    return longest, tl.max(tl.where(end_key == longest, sequence, 0), 0)
