"""Public API of context parallelism: argument checks, then the operator."""

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._host.checks import check_bool, check_same_kind, fail, layout_of
from .._host.dtensors import DENSE, PACKED, has_dtensor
from .._host.observers import autocast, number_and_tensor, wants_gradients
from .._host.options import check_head_tensors, with_dropout, with_tensors
from ..flash.api import check_differentiable, checked_options
from .arguments import check_method, errors_for_all, settings_of
from .dtensors import attend_rows
from .heads import HEADS, Inputs, Options
from .operators import Settings, attend


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    method: str | tuple[str, str] = "auto",
    load_balance: Any = "head_tail",
    seqlen: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` of sequences whose rows are sharded over the ranks of a mesh: the same results and gradients.

    Every rank calls it with its own rows, as `shard_sequence` gives them, and with the same options. KV heads are never
    repeated. A rank receives so many bytes:

    | method | forward | backward | memory besides its rows |
    |---|---|---|---|
    | "all_gather" | n K e | n K e + (1 - 1/R) S K 4 | twice the keys that it sees; backward, twice fp32 gradients too |
    | "ring" | (1 - 1/R) S K e | (1 - 1/R) S K e + S K 4 | two blocks of keys; backward, three of fp32 gradients too |
    | "ulysses" | (1 - 1/R) S (Q e + 4 L) / R | the same | twice whole sequences of its heads; one is kept |

    R is the number of ranks, S the length of the whole sequence, n the number of keys that the rank's queries see and
    other ranks hold, and e the bytes of an element. One key and value of each sequence are K = batch * num_heads_kv *
    (head_dim + head_dim_v) elements, Q = batch * (num_heads_q + max(num_heads_kv, R)) * (head_dim + head_dim_v), and
    L = batch * num_heads_q. Under a causal mask or a window all_gather returns gradients of fewer keys: those that
    other ranks see. The ring overlaps its transfers with attention; the others do not.

    A mesh of two dimensions is R nodes of G GPUs each. The GPUs of a node exchange rows for heads. Then each attends
    with the rows of its node, together with the GPUs of other nodes that have its heads. A rank receives what the table
    says of "ulysses" with G ranks and a node's rows for S, and what it says of "ring" or "all_gather" with R ranks and
    max(num_heads_kv / G, 1) KV heads.

    Args:
        q, k, v: this rank's rows, (batch, rows, heads, dim); the rest as in `flash_attention`. Queries and keys have
            the same positions. With a batch above 1, a tensor whose (batch, rows) are not one dimension is copied. Or
            DTensors with Shard(1) on the dimension of their mesh that is `mesh`; on other dimensions as in
            `flash_attention`. Their rows are in the order of the ranks' rows, and their length is a multiple of the
            ranks. DTensors on a mesh without the other ranks of `mesh`, such as mesh["tp"], have this rank's rows;
            ranks of `mesh` that have other sequences or heads of them raise. Results are then DTensors placed like q.
        mesh: a DeviceMesh of one dimension, such as mesh["cp"], or of two, such as mesh["node", "gpu"]; with DTensors
            of one. Ranks are counted row by row and ascend; those of two dimensions are as far apart in each row.
        method: of the table, or on a mesh of two dimensions ("ring", "ulysses") or ("all_gather", "ulysses"). "ulysses"
            needs query heads in multiples of the ranks that exchange them, and KV heads that divide these ranks or are
            multiples of them. "auto" is the method with the least predicted time of both passes on H100s in nodes of 8,
            of those that need at most 8 GiB beside the rows. It follows from the shapes and the ranks, so all ranks
            choose alike. `python -m perf parallel` prints the predictions. Under torch.compile it is the same where the
            graph has the lengths as constants. With other lengths, and with packed documents, it is never "ulysses".
        load_balance: how `shard_sequence` has sharded the rows.
        seqlen: the length of the whole sequence. None: all ranks hold the same number of rows.
        check_values: compare all of the call with that of the other ranks first, values of tensors too, which costs a
            round of messages and a device-to-host sync. None follows the environment variable TRITON_ATTN_CHECK=1.
        dropout_seed: needed with dropout, and the same on all ranks: the mask is the one of a single GPU.
        The rest as in `flash_attention`.

    Returns:
        out and lse of this rank's rows, as `flash_attention`. The gradient of sinks is this rank's part; sum it over
        the mesh, as of any parameter that all ranks have. Gradients of tensors without requires_grad are neither
        computed nor sent; the same tensors have it on all ranks. That of sinks alone needs no keys of other ranks.

    Ranks that differ in a shape, a dtype, an option or in which tensors require a gradient get an error on every rank
    that names the difference, and so do all ranks if one of them has refused its arguments. For that a digest of 8
    bytes goes to all ranks beside the call's transfers, in host memory. A GPU never waits for it: it is looked at
    before the next call over this mesh, or the next backward pass, which raises for the call before. On a CPU this call
    raises. Values of alibi_slopes, sinks and a seed that is a tensor are compared with check_values alone.

    Autograd, activation checkpoints and torch.compile see one operator. Under torch.compile errors of arguments are
    those of one rank, until the operator runs.

    Raises: as `flash_attention`; ValueError: the rows are not those of `shard_sequence`, or ranks differ;
    RuntimeError, by torch.distributed: a rank has died, or has not come within the timeout of the process group.

    Example:
        >>> from triton_attn.parallel import context_parallel_attention, shard_sequence
        >>> mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))  # under torchrun
        >>> own = [shard_sequence(x, mesh) for x in torch.randn(3, 1, 100, 4, 64)]
        >>> out = context_parallel_attention(*own, mesh=mesh, seqlen=100, causal=True)
        >>> out.shape == own[0].shape
        True
    """
    options = dict(
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
    )
    placing = dict(mesh=mesh, method=method, load_balance=load_balance, seqlen=seqlen, check_values=check_values)
    options |= dict(placing, return_lse=return_lse)
    if has_dtensor(q, k, v):
        return attend_rows(_attend, DENSE, (q, k, v), (), **options)
    return _attend(q, k, v, **options)


def context_parallel_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    mesh: DeviceMesh,
    method: str | tuple[str, str] = "auto",
    load_balance: Any = "head_tail",
    seqlen: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention_varlen` of packed documents whose rows are sharded over the ranks of a mesh.

    Document i is the rows [cu_seqlens[i], cu_seqlens[i + 1]) of the whole batch, of which `shard_sequence(x, mesh, 0,
    load_balance, cu_seqlens=cu_seqlens)` gives a rank its rows. A document may lie on any number of ranks. The rest is
    as in `context_parallel_attention`, whose table holds with the length of the whole batch for S.

    Args:
        q, k, v: this rank's rows, (rows, heads, dim). Or DTensors, as in `context_parallel_attention`; where their mesh
            has the ranks of `mesh`, load_balance is "head_tail" or None.
        cu_seqlens: (documents + 1,) int32, of the whole batch and the same on all ranks; on q's device or on the CPU.
            The host needs the lengths, to know what travels and which calls to make. On the CPU they cost nothing. On a
            GPU the tensor is read at its first use, a device-to-host sync, and not in the calls after it, such as the
            other layers and the backward pass, unless an operator of torch writes to it; under torch.compile once per
            call. Each new batch also takes the host some microseconds for each document and rank.
        load_balance: how `shard_sequence` has sharded the rows: "head_tail" (the default) and None cut the whole batch,
            "per_document" cuts each document. Under a causal mask "per_document" gives all ranks the same work;
            "head_tail" does so for one document, and moves fewer keys if documents are short.
        seqlen: the rows of the whole batch, those after the last document included. None: all ranks hold the same
            number of rows.
        alibi_slopes: (num_heads_q,) or (documents, num_heads_q).

    Returns:
        out (rows, num_heads_q, head_dim_v), and with return_lse also lse (num_heads_q, rows) in fp32. Rows after
        cu_seqlens[-1] belong to no document: they influence nothing, their out and gradients are 0 and their lse is
        -inf.

    A rank makes one call of attention for its head chunks and one for its tail chunks, or with "ring" one to three for
    each rank whose keys arrive, however many documents there are.

    Raises: as `context_parallel_attention`; ValueError for bad values in cu_seqlens, which are always checked.

    Example:
        >>> from triton_attn.parallel import context_parallel_attention_varlen, shard_sequence
        >>> mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))  # under torchrun
        >>> cu_seqlens = torch.tensor([0, 30, 100], dtype=torch.int32)
        >>> own = [shard_sequence(x, mesh, 0) for x in torch.randn(3, 100, 4, 64)]
        >>> out = context_parallel_attention_varlen(*own, cu_seqlens, mesh=mesh, seqlen=100, causal=True)
        >>> out.shape == own[0].shape
        True
    """
    options = dict(
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
    )
    placing = dict(mesh=mesh, method=method, load_balance=load_balance, seqlen=seqlen, check_values=check_values)
    options |= dict(placing, return_lse=return_lse)
    if has_dtensor(q, k, v):
        return attend_rows(_attend_varlen, PACKED, (q, k, v), (cu_seqlens,), **options)
    return _attend_varlen(q, k, v, cu_seqlens, **options)


def _attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
    out, lse = _attend_to_rows(4, q, k, v, None, **options)
    shape = q.shape[:2]
    out = out.unflatten(0, shape)
    return out if lse is None else (out, lse.unflatten(1, shape).transpose(0, 1).contiguous())


def _attend_varlen(q: Any, k: Any, v: Any, cu_seqlens: Any, **options: Any) -> Any:
    out, lse = _attend_to_rows(3, q, k, v, cu_seqlens, **options)
    return out if lse is None else (out, lse)


def _attend_to_rows(
    ndim: int, q: Any, k: Any, v: Any, cu_seqlens: Any, *, mesh: DeviceMesh, return_lse: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """out (rows, ...) of plain tensors, and lse if it is to be returned."""
    with errors_for_all(mesh):
        return_lse = check_bool("return_lse", return_lse)
        inputs, settings = _checked(ndim, q, k, v, cu_seqlens, mesh=mesh, **options)
    out, lse = attend(HEADS, inputs, settings)
    return out, lse if return_lse else None


def _checked(
    ndim: int,
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens: Any,
    *,
    causal: Any,
    softmax_scale: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    dropout_p: Any,
    dropout_seed: Any,
    deterministic: Any,
    **placing: Any,
) -> tuple[Inputs, Settings]:
    """A call of (rows, heads, dim). Checks all that needs no other rank and no values; a batch is flattened."""
    q, k, v = autocast(q, k, v)
    check_same_kind(q, k, v)
    check_method(placing["mesh"], placing["method"])
    options = checked_options(ndim, layout_of(q, k, v), causal, softmax_scale, window_size, softcap)
    if k.shape[-3] != q.shape[-3]:
        fail("k", f"q's {q.shape[-3]} rows", k.shape[-3])
    settings = settings_of((q, k, v, sinks), cu_seqlens, **placing)
    check_head_tensors(q, q.shape[0] if ndim == 4 else len(cu_seqlens) - 1, alibi_slopes, sinks)
    options = with_tensors(options, alibi_slopes, sinks)
    options = with_dropout(options, q, dropout_p, dropout_seed)
    if options.dropout_p > 0 and dropout_seed is None:
        fail("dropout_seed", "an int or a tensor, the same on all ranks, with dropout", None)
    of_kind = Options(
        number_and_tensor(dropout_seed)[0] if options.dropout_p > 0 else None,
        options.softmax_scale,
        *(-1 if side is None else side for side in options.window),
        options.softcap or 0.0,
        options.dropout_p,
        check_bool("deterministic", deterministic),
    )
    tensors = q, k, v, sinks, alibi_slopes, options.dropout_seed
    if wants_gradients(*tensors):
        check_differentiable(q, v, alibi_slopes)
    if ndim == 4:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return Inputs(q, k, v, *tensors[3:], cu_seqlens), settings._replace(options=of_kind)
