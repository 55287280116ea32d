"""Attention over a cache whose keys are sharded over the ranks of a mesh: each attends to its own, and one merge
follows."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._host.backend import should_check_values
from .._host.checks import check_per_head, fail
from .._host.dtensors import is_dtensor
from .._host.mesh import check_mesh
from .._host.prefix_tree import PrefixTree
from ..mla import mla_decode
from ..paged import paged_attention
from .agreement import agree, compare, digest_of, kind_of, refuse
from .merging import check_heads, gather_heads, merge_ranks


def context_parallel_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    mesh: DeviceMesh,
    interleave: int = 1,
    heads: str = "replicated",
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
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`paged_attention` over a cache whose keys are sharded over the ranks of a mesh, as in `PagedKVCache(mesh=)`.

        rank r holds the keys j with j // interleave % R = r, in their order, R ranks in all
        out, lse = merge_attention over r of (paged_attention over the keys of rank r)

    Masks, windows, ALiBi and trees of drafts are exact, since a rank knows the positions of its keys. A rank
    computes the part of the results that its keys have, in q's dtype, and merges the parts of all ranks in fp32. All
    ranks make the same call; they attend to their own keys at the same time, and meet in one collective, in which a
    rank receives so many bytes:

    | heads | collective | bytes |
    |---|---|---|
    | "replicated" | all-gather | (R - 1) P |
    | "scattered" | all-to-all | (R - 1) P / R |
    | "sharded" | all-gather of q, all-to-all | (R - 1) (P + queries * H * head_dim * e) / R |

    H is the number of query heads of all ranks, e the bytes of an element, and P = queries * H * (head_dim_v * e + 4),
    or P / R of a share of the heads, rounded up to a multiple of 64.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or packed, as in `paged_attention`; the same on all ranks unless
            heads are sharded.
        k_cache, v_cache: this rank's pages. They have the KV heads of all query heads.
        cache_seqlens, block_table: the same on all ranks, as `cache_seqlens` and `block_table` of the cache give them:
            the number of keys of each sequence on all ranks together, and its pages.
        mesh: a DeviceMesh of one dimension, such as mesh["dcp"].
        interleave: keys in a row that a rank holds. It divides page_size.
        heads: "replicated": q and out have all heads on every rank. "scattered": q has all heads, out this rank's:
            rank r those from r num_heads_q / R on. "sharded": q and out have this rank's, as in tensor parallelism.
        sinks, alibi_slopes: of all heads, the same on all ranks.
        check_values: compare the call with that of the other ranks first, and check lengths and pages, which costs a
            collective and a device-to-host sync. None follows the environment variable TRITON_ATTN_CHECK=1.
        The rest as in `paged_attention`.

    Returns:
        out, and lse with return_lse, as `paged_attention`; of this rank's heads unless they are replicated.

    Raises: as `paged_attention`; on every rank, ValueError: ranks differ in a shape, a dtype or an option; with
        check_values also in a length or a page.

    A digest of 8 bytes goes to all ranks beside the call, in host memory. On GPUs nothing waits for it: it is looked at
    before the next call over this mesh, so the error comes one call late, and results until then are undefined.

    torch.compile traces it, collectives included; there nothing is compared.

    Example:
        >>> from triton_attn.parallel import context_parallel_paged_attention
        >>> mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))  # under torchrun
        >>> q, cache = torch.randn(1, 1, 8, 64), torch.randn(4, 16, 2, 64)
        >>> places = torch.tensor([60], dtype=torch.int32), torch.arange(4, dtype=torch.int32)[None]
        >>> context_parallel_paged_attention(q, cache, cache, *places, mesh=mesh).shape
        torch.Size([1, 1, 8, 64])
    """
    rank, num_ranks = check_mesh(mesh)
    _check(q, "q", heads, mesh)
    options = dict(
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        tree_mask=tree_mask,
        k_scale=k_scale,
        v_scale=v_scale,
        num_splits=num_splits,
        prefix_tree=prefix_tree,
    )
    others = dict(cache_seqlens=cache_seqlens, block_table=block_table, sinks=sinks)
    others["prefix_tree"] = None if prefix_tree is None else prefix_tree.memory
    tensors, caches = dict(q=q), dict(k_cache=k_cache, v_cache=v_cache)
    _agree(mesh, tensors, caches, options | dict(interleave=interleave, heads=heads, **others), check_values)
    if heads == "sharded":
        q = gather_heads(q, mesh)
    if sinks is not None:
        num_heads = q.shape[-2]
        check_per_head("sinks", sinks, ((num_heads,),), q.device, (torch.float32, q.dtype))
    out, lse = paged_attention(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        **options,
        sinks=sinks if rank == 0 else None,  # they count once
        key_shard=(rank, num_ranks, interleave),
        return_lse=True,
        check_values=check_values,
    )
    out, lse = merge_ranks(out, lse, mesh, heads)
    return (out, lse) if return_lse else out


def context_parallel_mla_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    latent_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    w_uk: Tensor | None = None,
    w_uv: Tensor | None = None,
    *,
    mesh: DeviceMesh,
    interleave: int = 1,
    heads: str = "replicated",
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
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mla_decode` over a cache whose keys are sharded over the ranks of a mesh, as in `LatentKVCache(mesh=)`.

    All heads share the keys, so every rank attends with all heads to its own keys. Ranks, collectives and bytes are
    those of `context_parallel_paged_attention`, where head_dim_v is the last dimension of out ("sharded":
    kv_lora_rank), and head_dim, of the queries that "sharded" gathers, kv_lora_rank + qk_rope_head_dim.

    Args:
        q_nope, q_pe: as in `mla_decode`; of this rank's heads if they are sharded, otherwise the same on all ranks.
        latent_cache, rope_cache: this rank's pages.
        cache_seqlens, block_table: the same on all ranks, as those of the cache; lengths count the keys of all ranks.
        w_uk, w_uv: of the heads that q_nope has. With sharded heads a rank absorbs its queries before they are
            gathered, and projects its outputs after the merge, so that no rank needs the weights of others.
        mesh, interleave, heads, check_values: as in `context_parallel_paged_attention`.
        rope_cos, rope_sin: as in `mla_decode`. Not supported with sharded heads: rotate q_pe before.
        The rest as in `mla_decode`.

    Returns:
        out, and lse with return_lse, as `mla_decode`; of this rank's heads unless they are replicated.

    Raises: as `mla_decode`, and as `context_parallel_paged_attention`; NotImplementedError: rope_cos with sharded
        heads.

    torch.compile traces it, collectives included; there nothing is compared.

    Example:
        >>> from triton_attn.parallel import context_parallel_mla_decode
        >>> mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))  # under torchrun
        >>> q_nope, q_pe, cache = torch.randn(1, 1, 16, 512), torch.randn(1, 1, 16, 64), torch.randn(2, 64, 576)
        >>> places = torch.tensor([100], dtype=torch.int32), torch.arange(2, dtype=torch.int32)[None]
        >>> context_parallel_mla_decode(q_nope, q_pe, cache, *places, mesh=mesh, softmax_scale=0.05).shape
        torch.Size([1, 1, 16, 512])
    """
    rank, num_ranks = check_mesh(mesh)
    _check(q_nope, "q_nope", heads, mesh)
    options = dict(
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        tree_mask=tree_mask,
        causal=causal,
        softmax_scale=softmax_scale,
        k_scale=k_scale,
        k_pe_scale=k_pe_scale,
        rope_cos=rope_cos,
        rope_sin=rope_sin,
        rope_interleaved=rope_interleaved,
        num_splits=num_splits,
        prefix_tree=prefix_tree,
    )
    others = dict(cache_seqlens=cache_seqlens, block_table=block_table)
    others["prefix_tree"] = None if prefix_tree is None else prefix_tree.memory
    tensors = dict(q_nope=q_nope, q_pe=q_pe, w_uk=w_uk, w_uv=w_uv)
    caches = dict(latent_cache=latent_cache, rope_cache=rope_cache)
    _agree(mesh, tensors, caches, options | dict(interleave=interleave, heads=heads, **others), check_values)
    projection = None
    if heads == "sharded":
        q_nope, q_pe, options["softmax_scale"] = _absorb(q_nope, q_pe, w_uk, softmax_scale, rope_cos, mesh)
        w_uk, w_uv, projection = None, None, w_uv
    out, lse = mla_decode(
        q_nope,
        q_pe,
        latent_cache,
        cache_seqlens,
        block_table,
        w_uk,
        w_uv,
        rope_cache=rope_cache,
        **options,
        key_shard=(rank, num_ranks, interleave),
        return_lse=True,
        check_values=check_values,
    )
    out, lse = merge_ranks(out, lse, mesh, heads)
    if projection is not None:
        out = torch.einsum("...hc,hvc->...hv", out, projection)
    return (out, lse) if return_lse else out


def _absorb(q_nope, q_pe, w_uk, softmax_scale, rope_cos, mesh):
    """Absorbed queries and rotary queries of all heads, from this rank's, and their softmax_scale."""
    if rope_cos is not None:
        raise NotImplementedError("rope_cos: not supported with heads='sharded'; rotate q_pe before")
    if w_uk is not None:
        softmax_scale = (q_nope.shape[-1] + q_pe.shape[-1]) ** -0.5 if softmax_scale is None else softmax_scale
        q_nope = torch.einsum("...hn,hnc->...hc", q_nope, w_uk)
    q = gather_heads(torch.cat([q_nope, q_pe], dim=-1), mesh)
    return *q.split([q_nope.shape[-1], q_pe.shape[-1]], dim=-1), softmax_scale


def _check(q, name, heads, mesh):
    """What must hold before ranks can compare their calls."""
    try:
        if is_dtensor(q):
            fail(name, "a plain tensor with this rank's heads", type(q).__name__, TypeError)
        if not isinstance(q, Tensor) or q.ndim not in (3, 4):
            got = f"shape {tuple(q.shape)}" if isinstance(q, Tensor) else type(q).__name__
            wanted = "a tensor (batch, seqlen_q, heads, dim), or (total_q, heads, dim) with cu_seqlens_q"
            fail(name, wanted, got, TypeError)
        check_heads(heads, q.shape[-2], mesh.size())
    except (TypeError, ValueError) as error:
        if not torch.compiler.is_compiling():
            refuse(mesh.get_group(), error)
        raise


def _agree(mesh, tensors, caches, values, check_values):
    """Find out whether all ranks make the same call, see agreement.py. Caches may have pages for more sequences on one
    rank than on another. With check_values the elements of `values` are compared at once, those of tensors too.
    """
    if torch.compiler.is_compiling():
        return
    kinds = {name: kind_of(x) for name, x in tensors.items()}
    kinds |= {name: _kind_of_pages(x) for name, x in caches.items()}
    if should_check_values(check_values):
        values_of = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in values.items()}
        compare(kinds | values_of, mesh.get_group())
    if mesh.size() > 1:
        kinds |= {name: kind_of(x) for name, x in values.items()}
        agree(mesh.get_group(), kinds, digest_of(kinds), next(iter(tensors.values())).device)


def _kind_of_pages(x):
    return (tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else x
