"""The calls of a server or a trainer: a small set of calls that uses every kernel which such calls can need.

Lengths change only tile sizes, in powers of two, so a few lengths cover all. Nothing is launched, and tensors are not
initialized.
"""

import contextlib
import itertools
from dataclasses import dataclass

import torch

from .._host.latent import latent_storage
from .._host.options import MAX_DRAFTS
from .._host.prefix_tree import PrefixTree, TreeSizes
from ..cache import append_kv_cache, append_latent_cache, copy_kv_pages, gather_kv_cache, gather_latent_cache
from ..flash import flash_attention, flash_attention_varlen
from ..merge import merge_attention
from ..merge.splits import FIXED_KEYS
from ..mla import mla_decode, mla_prefill
from ..mla.schedule import ProblemSizes, backward_bytes
from ..paged import paged_attention

MAX_CHAIN = 8  # queries of a sequence that a decode step verifies at once without a tree, with the new token
FIXED_ROWS = 64  # a batch-invariant tile has no more
MAX_TILED_PARTS = 128  # with more splits the merge uses the same kernels
WORKSPACE_BYTES = 2**28  # the default of mla_prefill


@dataclass(frozen=True)
class Workload:
    """Shapes and options that all calls share; see `triton_attn.warmup`."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    page_size: int | None
    causal: bool
    window_size: tuple
    softcap: float
    sinks: torch.dtype | None
    alibi: bool
    rotary_dim: int
    rope_interleaved: bool
    dropout_p: float
    deterministic: bool
    batch_invariant: bool
    max_seqlen: int
    context_parallel_size: int
    interleave: int

    @property
    def lengths(self):
        return powers_of_two(self.max_seqlen)

    @property
    def cached_lengths(self):
        """(queries, keys) over a cache: decode, drafts and chunks, from few keys to many."""
        return itertools.product(sorted({*range(1, MAX_CHAIN + 1), *self.lengths}), self.lengths)

    @property
    def tree_lengths(self):
        """The same with trees of drafts, which may be longer than chains."""
        return itertools.product(sorted({*range(1, MAX_CHAIN + 1), *powers_of_two(MAX_DRAFTS)}), self.lengths)

    @property
    def masks(self):
        """The options of attention, except dropout."""
        return dict(
            causal=self.causal,
            window_size=self.window_size,
            softcap=self.softcap,
            sinks=torch.empty(self.num_heads_q, dtype=self.sinks) if self.sinks else None,
            alibi_slopes=torch.empty(self.num_heads_q) if self.alibi else None,
        )

    @property
    def key_shards(self):
        """Of one rank of each kind: 1 and the multiples of 16 are constants to Triton. None: all keys."""
        if self.context_parallel_size == 1:
            return [None]
        ranks = (rank for rank in (0, 1, 2, 16) if rank < self.context_parallel_size)
        return [(rank, self.context_parallel_size, self.interleave) for rank in ranks]

    @property
    def lse_choices(self):
        """return_lse of calls over a cache. Results over the keys of a rank are merged by it."""
        return (False, True) if self.context_parallel_size == 1 else (True,)

    @property
    def causal_choices(self):
        """causal of a prefill of latent vectors. Over ranks the queries of some parts see all of their keys."""
        return {self.causal, self.causal and self.context_parallel_size == 1}

    @property
    def parts(self):
        """Options of flash attention: of a whole call, and of the parts that `triton_attn.parallel` makes of it. Parts
        are with or without positions and sinks, and in some of them every query sees every key."""
        whole = dict(dropout_p=self.dropout_p, **self.masks)
        if self.context_parallel_size == 1:
            return [whole]
        variants = [{}, dict(shard=indices(1, 3))]
        if not self.alibi and self.dropout_p == 0:
            variants.append(dict(causal=False, window_size=(-1, -1)))
        with_sinks = [{}, dict(sinks=None)] if self.sinks else [{}]
        return [whole | variant | sinks for variant, sinks in itertools.product(variants, with_sinks)]

    @property
    def rope(self):
        """Angles of one position."""
        if self.rotary_dim == 0:
            return {}
        angles = torch.empty(1, self.rotary_dim // 2)
        return dict(rope_cos=angles, rope_sin=angles, rope_interleaved=self.rope_interleaved)

    @property
    def cache_scales(self):
        """None, a number, one scale for all heads, one per head, and with pages one per token and head. A cache in q's
        dtype has no scales."""
        if self.kv_cache_dtype == self.dtype:
            return (None,)
        scales = None, 1.0, torch.empty(1), torch.empty(self.num_heads_kv)
        if self.page_size is None:
            return scales
        return *scales, torch.empty(1, self.num_heads_kv, self.page_size).transpose(1, 2)  # as in `PagedKVCache`

    def qkv(self, *rows):
        heads_and_dims = (
            (self.num_heads_q, self.head_dim),
            (self.num_heads_kv, self.head_dim),
            (self.num_heads_kv, self.head_dim_v),
        )
        return [torch.empty(*rows, *shape, dtype=self.dtype) for shape in heads_and_dims]

    def kv_caches(self, *rows):
        """Of (pages, page_size) or (batch, seqlen_cache)."""
        dims = self.head_dim, self.head_dim_v
        return [torch.empty(*rows, self.num_heads_kv, dim, dtype=self.kv_cache_dtype) for dim in dims]

    def latent_cache(self, num_pages=1):
        dtype, width = latent_storage(self.kv_lora_rank, self.qk_rope_head_dim, self.kv_cache_dtype)
        return torch.empty(num_pages, self.page_size, width, dtype=dtype)

    def latents(self, *rows):
        """Latent vectors and rotary keys, as slices of one projection."""
        widths = [self.kv_lora_rank, self.qk_rope_head_dim]
        return torch.empty(*rows, sum(widths), dtype=self.dtype).split(widths, dim=-1)

    def latent_layouts(self, *rows):
        """The layouts of models: slices of one tensor, the first or both normed or rotated into a tensor of its own."""
        kv_latent, k_pe = self.latents(*rows)
        own = kv_latent.contiguous(), k_pe.contiguous()
        return [(kv_latent, k_pe), (own[0], k_pe), own]

    def latent_queries(self, *rows):
        """q_nope and q_pe, also as slices of one projection."""
        widths = [self.head_dim - self.qk_rope_head_dim, self.qk_rope_head_dim]
        return torch.empty(*rows, self.num_heads_q, sum(widths), dtype=self.dtype).split(widths, dim=-1)

    def absorbed_queries(self, *rows):
        """The same of queries that are multiplied by w_uk."""
        widths = [self.kv_lora_rank, self.qk_rope_head_dim]
        return torch.empty(*rows, self.num_heads_q, sum(widths), dtype=self.dtype).split(widths, dim=-1)

    def latent_weights(self):
        """w_uk and w_uv, as views of kv_b_proj's weight."""
        widths = [self.head_dim - self.qk_rope_head_dim, self.head_dim_v]
        return torch.empty(self.num_heads_q, sum(widths), self.kv_lora_rank, dtype=self.dtype).split(widths, dim=1)


def powers_of_two(end):
    """1, 2, 4, ... up to the first value that reaches end."""
    return [1 << i for i in range((end - 1).bit_length() + 1)]


def indices(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


def call_flash_attention(work):
    for seqlen, return_lse, options in itertools.product(work.lengths, (False, True), work.parts):
        flash_attention(*work.qkv(1, seqlen), return_lse=return_lse, **options)


def call_flash_attention_varlen(work):
    cu_seqlens = indices(2)
    for seqlen, return_lse, options in itertools.product(work.lengths, (False, True), work.parts):
        lengths = cu_seqlens, cu_seqlens, seqlen, seqlen
        flash_attention_varlen(*work.qkv(seqlen), *lengths, return_lse=return_lse, **options)


def call_flash_attention_backward(work):
    """Training: both passes, dense and packed, with and without a gradient of lse."""
    cu_seqlens = indices(2)
    variants = itertools.product(work.lengths, (False, True), (False, True), work.parts)
    for seqlen, packed, use_lse, options in variants:
        inputs = [x.requires_grad_() for x in work.qkv(*((seqlen,) if packed else (1, seqlen)))]
        options = options | dict(deterministic=work.deterministic, return_lse=True)
        qkv = tuple(inputs)
        if options["sinks"] is not None:
            inputs.append(options["sinks"].requires_grad_())
        if packed:
            outputs = flash_attention_varlen(*qkv, cu_seqlens, cu_seqlens, seqlen, seqlen, **options)
        else:
            outputs = flash_attention(*qkv, **options)
        outputs = outputs if use_lse else outputs[:1]
        torch.autograd.grad(outputs, inputs, [torch.empty_like(x) for x in outputs])


def call_paged_attention(work, tree_mask=False):
    """Decode with drafts, chunks of prompts, dense and packed, with one split and several, and all merges."""
    _merge_ranks(work, work.head_dim_v)
    if work.batch_invariant:
        _attend_invariantly(work, tree_mask)
        return
    masks = dict(batch_invariant=False, tree_mask=tree_mask, **work.masks)
    variants = itertools.product(
        work.tree_lengths if tree_mask else work.cached_lengths, (1, 2), work.lse_choices, work.cache_scales
    )
    for (seqlen_q, seqlen_k), num_splits, return_lse, scale in variants:
        options = dict(num_splits=num_splits, return_lse=return_lse, k_scale=scale, v_scale=scale, **masks)
        _attend_cached(work, seqlen_q, seqlen_k, **options)
    for num_splits, return_lse in itertools.product(powers_of_two(MAX_TILED_PARTS), work.lse_choices):
        _attend_cached(work, 1, 1, num_splits=num_splits, return_lse=return_lse, **masks)


def _attend_invariantly(work, tree_mask):
    """Batch-invariant calls: one split, several at once and, from some batch size on, in turn."""
    longest = MAX_DRAFTS if tree_mask else FIXED_ROWS + 1
    batches = itertools.product(powers_of_two(256), (1, longest), (1, 2 * FIXED_KEYS))
    masks = dict(batch_invariant=True, tree_mask=tree_mask, **work.masks)
    for (batch, seqlen_q, seqlen_k), return_lse, scale in itertools.product(
        batches, work.lse_choices, work.cache_scales
    ):
        options = dict(return_lse=return_lse, k_scale=scale, v_scale=scale, **masks)
        _attend_cached(work, seqlen_q, seqlen_k, batch, **options)


def call_tree_mask(work):
    """paged_attention with trees of drafts."""
    call_paged_attention(work, tree_mask=True)


def call_prefix_tree(work, tree_mask=False):
    """paged_attention with a prefix tree, for few and many queries below a node, and all merges."""
    lengths = [(n, 1) for n, _ in (work.tree_lengths if tree_mask else work.cached_lengths)]
    lengths += [(1, n) for n in powers_of_two(256)]
    masks = dict(batch_invariant=False, tree_mask=tree_mask, **work.masks)
    for (seqlen_q, below), num_splits, scale in itertools.product(lengths, (1, 2), work.cache_scales):
        options = dict(num_splits=num_splits, k_scale=scale, v_scale=scale, **masks)
        tree = tree_of_one_node(seqlen_q, below)
        _attend_cached(work, seqlen_q, 2 * work.page_size, prefix_tree=tree, **options)
    for num_slots, return_lse in itertools.product(powers_of_two(MAX_TILED_PARTS), work.lse_choices):
        options = dict(num_splits=1, return_lse=return_lse, **masks)
        _attend_cached(work, 1, 1, prefix_tree=tree_of_one_node(1, 1, num_slots), **options)


def tree_of_one_node(seqlen_q, below, num_slots=1, batch=1):
    """A PrefixTree; a call compiles what it does for nodes with so many queries below them."""
    total_q = batch * seqlen_q
    sizes = TreeSizes(1, num_slots, max(total_q, below), below)
    return PrefixTree(indices(2 * batch + 6 + total_q), batch, total_q, sizes)


def _attend_cached(work, seqlen_q, seqlen_k, batch=1, tree_mask=False, **options):
    """paged_attention for sequences of one length, dense and packed, over the keys of all ranks or of each."""
    if work.page_size is None:
        cache = *work.kv_caches(batch, seqlen_k), indices(batch)
    else:
        cache = *work.kv_caches(1, work.page_size), indices(batch), indices(batch, -(-seqlen_k // work.page_size))
    q, _, _ = work.qkv(batch, seqlen_q)
    packed = dict(cu_seqlens_q=indices(batch + 1), max_seqlen_q=seqlen_q)
    bits = indices(batch, seqlen_q, dtype=torch.int64) if tree_mask else None
    of_rows = bits.flatten() if tree_mask else None
    for shard in work.key_shards:
        if shard is not None and shard[0] > 0:
            options |= dict(sinks=None)  # they count once
        paged_attention(q, *cache, tree_mask=bits, key_shard=shard, **options)
        paged_attention(q.flatten(0, 1), *cache, tree_mask=of_rows, key_shard=shard, **packed, **options)


def call_append_kv_cache(work):
    _, k, v = work.qkv(1)
    positions = {"positions": indices(1, dtype=torch.int64)} if work.rotary_dim else {}
    for scale in work.cache_scales:
        caches = work.kv_caches(1, work.page_size)
        slots = indices(1, dtype=torch.int64)
        append_kv_cache(k, v, *caches, slots, k_scale=scale, v_scale=scale, **work.rope, **positions)


def call_copy_kv_pages(work):
    """All layers at once, and one."""
    caches = [work.latent_cache()[None].unsqueeze(3)] if work.kv_lora_rank else work.kv_caches(1, 1, work.page_size)
    for dtype in (torch.int32, torch.int64):
        pages = indices(1, dtype=dtype)
        copy_kv_pages(caches, pages, pages)


def call_gather_kv_cache(work):
    """Whole contexts and chunks of them."""
    for scale, starts in itertools.product(work.cache_scales, (None, indices(1))):
        caches, places = work.kv_caches(1, work.page_size), (indices(1, 1), indices(2), 1)
        gather_kv_cache(*caches, *places, seq_starts=starts, k_scale=scale, v_scale=scale, dtype=work.dtype)


def call_gather_latent_cache(work):
    """The same, into tensors of their own and into rows of a workspace that hold both."""
    sizes = dict(kv_lora_rank=work.kv_lora_rank, qk_rope_head_dim=work.qk_rope_head_dim)
    for starts, out in itertools.product((None, indices(1)), (None, work.latents(1))):
        places = indices(1, 1), indices(2), 1
        gather_latent_cache(work.latent_cache(), *places, **sizes, seq_starts=starts, dtype=work.dtype, out=out)


def call_merge_attention(work):
    for num_parts in powers_of_two(MAX_TILED_PARTS):
        _merge(work, num_parts, work.num_heads_q, work.head_dim_v)


def _merge(work, num_parts, num_heads, head_dim_v):
    outs = torch.empty(num_parts, 1, 1, num_heads, head_dim_v, dtype=work.dtype)
    merge_attention(outs, torch.empty(num_parts, 1, num_heads, 1))


def _merge_ranks(work, head_dim_v):
    """Over the keys of all ranks, of all heads and of a rank's."""
    num_ranks = work.context_parallel_size
    if num_ranks > 1:
        for num_heads in {work.num_heads_q, -(-work.num_heads_q // num_ranks)}:
            _merge(work, num_ranks, num_heads, head_dim_v)


def tokens_and_parts(most_tokens):
    """Numbers of tokens and of partial results of each, but not many of both: the results of a model with 128 heads
    would take 128 GiB, and call no other kernels."""
    counts = itertools.product(powers_of_two(most_tokens), powers_of_two(MAX_TILED_PARTS))
    return [(tokens, parts) for tokens, parts in counts if tokens * parts <= 64 * MAX_TILED_PARTS]


def call_append_latent_cache(work):
    positions = {"positions": indices(1, dtype=torch.int64)} if work.rotary_dim else {}
    append_latent_cache(*work.latents(1), work.latent_cache(), indices(1, dtype=torch.int64), **work.rope, **positions)


def call_mla_decode(work, tree_mask=False):
    """Decode with drafts. The kernels around the absorbed form depend on the number of tokens and of splits."""
    longest = MAX_DRAFTS if tree_mask else MAX_CHAIN
    _merge_ranks(work, work.head_dim_v)
    _merge_ranks(work, work.kv_lora_rank)
    if work.batch_invariant:
        for seqlen_k, return_lse in itertools.product((1, FIXED_KEYS + 1), work.lse_choices):
            for batch, seqlen_q in ((1, 1), (2, 1), (1, longest)):
                _decode_latents(work, batch, seqlen_q, seqlen_k, tree_mask, return_lse=return_lse)
        return
    drafts = [(n, k) for n, k in work.tree_lengths if n <= longest]
    for (seqlen_q, seqlen_k), num_splits, return_lse in itertools.product(drafts, (1, 2), work.lse_choices):
        _decode_latents(work, 1, seqlen_q, seqlen_k, tree_mask, num_splits=num_splits, return_lse=return_lse)
    counts = tokens_and_parts(64 * MAX_DRAFTS if tree_mask else 64)
    for (batch, num_splits), return_lse in itertools.product(counts, work.lse_choices):
        _decode_latents(work, batch, 1, 1, tree_mask, num_splits=num_splits, return_lse=return_lse)


def _decode_latents(work, batch, seqlen_q, seqlen_k, tree_mask=False, **options):
    """mla_decode for sequences of one length. A tree of drafts has no rotary positions."""
    table = indices(batch, -(-seqlen_k // work.page_size))
    options |= dict(tree_mask=indices(batch, seqlen_q, dtype=torch.int64)) if tree_mask else work.rope
    options |= dict(causal=work.causal, batch_invariant=work.batch_invariant)
    cache, queries = (work.latent_cache(), indices(batch), table), work.latent_queries(batch, seqlen_q)
    for shard in work.key_shards:
        mla_decode(*queries, *cache, *work.latent_weights(), key_shard=shard, **options)
        if shard is not None:  # with the heads of all ranks, whose weights no rank has
            queries_of_all = work.absorbed_queries(batch, seqlen_q)
            mla_decode(*queries_of_all, *cache, key_shard=shard, softmax_scale=1.0, **options)


def call_tree_mask_of_latents(work):
    """mla_decode with trees of drafts."""
    call_mla_decode(work, tree_mask=True)


def call_prefix_tree_of_latents(work, tree_mask=False):
    """mla_decode with a prefix tree, for few and many queries below a node, and all that follow it."""
    longest = MAX_DRAFTS if tree_mask else MAX_CHAIN
    lengths = [(n, 1) for n in sorted({*range(1, MAX_CHAIN + 1), *powers_of_two(longest)})]
    lengths += [(1, n) for n in powers_of_two(256)]
    for (seqlen_q, below), num_splits in itertools.product(lengths, (1, 2)):
        options = dict(num_splits=num_splits, prefix_tree=tree_of_one_node(seqlen_q, below))
        _decode_latents(work, 1, seqlen_q, 2 * work.page_size, tree_mask, **options)
    for (batch, num_slots), return_lse in itertools.product(tokens_and_parts(64 * longest), work.lse_choices):
        options = dict(num_splits=1, return_lse=return_lse, prefix_tree=tree_of_one_node(1, 1, num_slots, batch))
        _decode_latents(work, batch, 1, work.page_size, tree_mask, **options)


def call_both_trees(work):
    """paged_attention or mla_decode with trees of drafts over a prefix tree."""
    call = call_prefix_tree if work.kv_lora_rank is None else call_prefix_tree_of_latents
    call(work, tree_mask=True)


def call_mla_prefill(work):
    """Every schedule, dense and packed. The heads per chunk, a constant of the kernels, follow from the tokens."""
    for num_tokens, return_lse in itertools.product(work.lengths, (False, True)):
        _prefill(work, num_tokens, return_lse, mode="fused")
        with contextlib.suppress(ValueError):  # a prompt so long that not even one head fits
            for latents in work.latent_layouts(1, num_tokens):
                _prefill(work, num_tokens, return_lse, latents, mode="absorbed", max_workspace_bytes=WORKSPACE_BYTES)
        # Tensors of keys and values would be allocated: with less memory a short prompt has as many heads per chunk.
        max_workspace_bytes = WORKSPACE_BYTES // num_tokens
        _prefill(work, 1, return_lse, mode="materialized", max_workspace_bytes=max_workspace_bytes)


def call_mla_prefill_backward(work):
    """Training: the forward pass by the schedules that have gradients, then the backward pass. Its kernels depend on
    the heads of a chunk, and not on the tokens: 1 and the multiples of 16 are constants to Triton."""
    for num_tokens in work.lengths:
        _prefill(work, num_tokens, True, mode="fused")
        _prefill(work, 1, True, mode="materialized", max_workspace_bytes=WORKSPACE_BYTES // num_tokens)
    chunks = {1, 2, 16, work.num_heads_q}
    variants = itertools.product(chunks, (False, True), (False, True), work.causal_choices)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(work.deterministic or before)
    try:
        for num_heads, packed, use_lse, causal in variants:
            _train_on_latents(work, num_heads, packed, use_lse, causal)
    finally:
        torch.use_deterministic_algorithms(before)


def _train_on_latents(work, num_heads, packed, use_lse, causal):
    """Both passes, in chunks of so many heads, of a sequence of one token."""
    inputs = [x.detach() for x in (*work.latent_queries(1, 1), *work.latents(1, 1))]
    inputs = [x[0] if packed else x for x in inputs] + [x.detach() for x in work.latent_weights()]
    for x in inputs:
        x.requires_grad_()
    nope, rope = work.head_dim - work.qk_rope_head_dim, work.qk_rope_head_dim
    dims = work.num_heads_q, nope, rope, work.head_dim_v, work.kv_lora_rank
    of_head = backward_bytes(ProblemSizes(1, 1, 1, *dims, work.dtype.itemsize))
    options = dict(causal=causal, mode="fused", max_workspace_bytes=num_heads * of_head)
    if packed:
        cu_seqlens = indices(2)
        options |= dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=1, max_seqlen_k=1)
    outputs = mla_prefill(*inputs, return_lse=True, **options)[: 1 + use_lse]
    torch.autograd.grad(outputs, inputs, [torch.empty_like(x) for x in outputs])


def _prefill(work, num_tokens, return_lse, latents=None, **options):
    inputs = *work.latent_queries(1, num_tokens), *(latents or work.latents(1, num_tokens))
    weights = work.latent_weights()
    cu_seqlens = indices(2)
    packed = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=num_tokens, max_seqlen_k=num_tokens)
    for causal in work.causal_choices:
        options |= dict(causal=causal, return_lse=return_lse)
        mla_prefill(*inputs, *weights, **options)
        mla_prefill(*(x[0] for x in inputs), *weights, **packed, **options)


# Keyed by the names that `warmup` takes.
OF_ANY_HEADS = {
    "flash_attention": call_flash_attention,
    "flash_attention_varlen": call_flash_attention_varlen,
    "flash_attention_backward": call_flash_attention_backward,
    "paged_attention": call_paged_attention,
    "prefix_tree": call_prefix_tree,
    "tree_mask": call_tree_mask,
    "append_kv_cache": call_append_kv_cache,
    "copy_kv_pages": call_copy_kv_pages,
    "gather_kv_cache": call_gather_kv_cache,
    "merge_attention": call_merge_attention,
}
OF_LATENT_VECTORS = {
    "mla_prefill": call_mla_prefill,
    "mla_prefill_backward": call_mla_prefill_backward,
    "mla_decode": call_mla_decode,
    "prefix_tree": call_prefix_tree_of_latents,
    "tree_mask": call_tree_mask_of_latents,
    "append_latent_cache": call_append_latent_cache,
    "copy_kv_pages": call_copy_kv_pages,
    "gather_latent_cache": call_gather_latent_cache,
}
