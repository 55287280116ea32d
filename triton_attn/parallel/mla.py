"""Public API of multi-head latent attention over sequences that are sharded over a mesh."""

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._host.checks import check_bool, check_int, fail
from .._host.dtensors import has_dtensor
from .._host.observers import autocast
from .._host.options import check_softmax_scale
from ..mla.api import LATENTS_DENSE, LATENTS_PACKED, check_differentiable, check_prefill_tensors
from .arguments import check_method, errors_for_all, settings_of
from .dtensors import attend_rows
from .latent import LATENTS, Inputs, Options
from .operators import Settings, attend


def context_parallel_mla_prefill(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_latent: Tensor,
    k_pe: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    mesh: DeviceMesh,
    cu_seqlens: Tensor | None = None,
    method: str | tuple[str, str] = "auto",
    load_balance: Any = "head_tail",
    seqlen: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    mode: str = "auto",
    max_workspace_bytes: int = 2**28,
    return_lse: bool = False,
    check_values: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mla_prefill` of sequences whose rows are sharded over the ranks of a mesh: the same results and gradients.

    Every rank calls it with its own rows, as `shard_sequence` gives them, and with the same options. Latent vectors and
    rotary keys travel, which all heads share, and each rank computes from them the keys and values that its queries
    need. A rank receives so many bytes:

    | method | forward | backward | memory besides its rows |
    |---|---|---|---|
    | "all_gather" | n D e | n D e + (1 - 1/R) S D 4 | twice the latents seen; backward, twice fp32 gradients too |
    | "ring" | (1 - 1/R) S D e | (1 - 1/R) S D e + S D 4 | two blocks; backward, three of fp32 gradients too |
    | "ulysses" | (1 - 1/R) S ((Q e + 4 L) / R + D e) | the same | twice whole sequences of its heads; one is kept |

    D = batch * (kv_lora_rank + qk_rope_head_dim), Q = batch * num_heads * (qk_nope_head_dim + qk_rope_head_dim +
    v_head_dim), L = batch * num_heads; R, S, n and e are those of `context_parallel_attention`. Latent vectors have no
    heads, so "ulysses" brings all of them too. It receives more bytes than the others, and computes the keys and values
    of a share of the heads alone, where the others compute those of all heads on every rank.

    A mesh of two dimensions is R nodes of G GPUs each, as in `context_parallel_attention`. A rank receives what the
    table says of "ulysses" with G ranks and a node's rows for S, and what it says of "ring" or "all_gather" with R
    ranks.

    So for 2**20 tokens of DeepSeek-V3 in bf16 on 64 ranks, 1.2 GB of latents, all_gather needs 2.4 GB forward and 7.2
    GB backward. The ring needs 0.04 and 0.15 GB, and out and the gradients of the rank's queries in fp32, 1.1 and 1.6
    GB. The keys and values of heads are computed for those latents alone that a call of attention has, in at most
    max_workspace_bytes at a time.

    Args:
        q_nope, q_pe, kv_latent, k_pe: this rank's rows, (batch, rows, ...) as in `mla_prefill`, or (rows, ...) with
            cu_seqlens. Queries and keys have the same positions. With a batch above 1, a tensor whose (batch, rows) are
            not one dimension is copied. Or, with the weights, DTensors: on the dimension of their mesh that is `mesh`
            Shard on the sequence, and of weights Replicate(); on other dimensions as in `mla_prefill`. Their rows are
            in the order of the ranks' rows, and their length is a multiple of the ranks. DTensors on a mesh without the
            other ranks of `mesh`, such as mesh["tp"], have this rank's rows; ranks of `mesh` that have other sequences
            or heads of them raise. Results are DTensors placed like q_nope.
        w_uk, w_uv: of all heads that q_nope has, the same on all ranks. Ranks of another mesh, as of tensor
            parallelism, can share the heads: as DTensors, or as plain tensors of their own heads, whose gradients of
            kv_latent and k_pe are then to be summed over that mesh.
        mesh: as in `context_parallel_attention`.
        cu_seqlens: (documents + 1,) int32, for packed documents, as in `context_parallel_attention_varlen`: document i
            is the rows [cu_seqlens[i], cu_seqlens[i + 1]) of the whole batch. Rows after the last one belong to none.
        method: of the table, or on a mesh of two dimensions ("ring", "ulysses") or ("all_gather", "ulysses"). "ulysses"
            needs heads in multiples of the ranks that exchange them. "auto" is the one with the least predicted time of
            both passes, as in `context_parallel_attention`.
        load_balance: how `shard_sequence` has sharded the rows: "head_tail" or None, or with cu_seqlens "per_document".
        seqlen: the length of the whole sequence, or the rows of the whole packed batch. None: all ranks hold the same
            number of rows.
        mode, max_workspace_bytes: as in `mla_prefill`, of each call of attention: one for a rank's head chunks and one
            for its tail chunks, or in the ring one to three for each rank's block. Latent vectors that have arrived are
            not counted.
        check_values: as in `context_parallel_attention`; of the weights, digests are compared.
        The rest as in `mla_prefill`.

    Returns:
        out and lse of this rank's rows, as `mla_prefill`. The gradients of w_uk and w_uv are this rank's part; sum them
        over the mesh, as of any parameter that all ranks have. Gradients of tensors without requires_grad, as of frozen
        weights, are neither computed nor sent; the same tensors have it on all ranks.

    Ranks that differ, and a rank that refuses its arguments, raise on all ranks as `context_parallel_attention` does.
    Autograd, activation checkpoints and torch.compile see one operator. The gradients of latent vectors and weights are
    added up in fp32; with "ulysses" those of latent vectors are rounded for each share of the heads before.

    Raises: as `mla_prefill` and `context_parallel_attention`. max_workspace_bytes must be enough on every rank for the
    rank with most queries.

    Example:
        >>> from triton_attn.parallel import context_parallel_mla_prefill, shard_sequence
        >>> mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))  # under torchrun
        >>> shapes = (1, 40, 4, 32), (1, 40, 4, 16), (1, 40, 64), (1, 40, 16)
        >>> rows = [shard_sequence(torch.randn(shape), mesh) for shape in shapes]
        >>> context_parallel_mla_prefill(*rows, *torch.randn(2, 4, 32, 64), mesh=mesh, seqlen=40).shape
        torch.Size([1, 40, 4, 32])
    """
    options = dict(causal=causal, softmax_scale=softmax_scale, mode=mode, max_workspace_bytes=max_workspace_bytes)
    placing = dict(mesh=mesh, method=method, load_balance=load_balance, seqlen=seqlen, check_values=check_values)
    tensors = q_nope, q_pe, kv_latent, k_pe, w_uk, w_uv
    options |= dict(placing, cu_seqlens=cu_seqlens, return_lse=return_lse)
    if has_dtensor(*tensors):
        layout = LATENTS_DENSE if cu_seqlens is None else LATENTS_PACKED
        return attend_rows(_attend, layout, tensors, (), **options)
    return _attend(*tensors, **options)


def _attend(*tensors: Any, mesh: DeviceMesh, cu_seqlens: Any, return_lse: Any, **options: Any) -> Any:
    with errors_for_all(mesh):
        return_lse = check_bool("return_lse", return_lse)
        tensors = autocast(*tensors)
        inputs, settings = _checked(tensors, cu_seqlens, mesh=mesh, **options)
    out, lse = attend(LATENTS, inputs, settings)
    if cu_seqlens is None:
        shape = tensors[0].shape[:2]
        out, lse = out.unflatten(0, shape), lse.unflatten(1, shape).transpose(0, 1).contiguous() if return_lse else lse
    return (out, lse) if return_lse else out


def _checked(
    tensors: tuple[Any, ...],
    cu_seqlens: Any,
    *,
    causal: Any,
    softmax_scale: Any,
    mode: Any,
    max_workspace_bytes: Any,
    **placing: Any,
) -> tuple[Inputs, Settings]:
    """A call of (rows, ...). Checks all that needs no other rank and no values; a batch is flattened."""
    check_method(placing["mesh"], placing["method"])
    is_packed = cu_seqlens is not None
    check_prefill_tensors(tensors, is_packed, mode)
    q_nope, q_pe, kv_latent, _, w_uk, w_uv = tensors
    dim = 0 if is_packed else 1
    if kv_latent.shape[dim] != q_nope.shape[dim]:
        fail("kv_latent", f"q_nope's {q_nope.shape[dim]} rows", kv_latent.shape[dim])
    options = Options(
        check_softmax_scale(softmax_scale, q_nope.shape[-1] + q_pe.shape[-1]),
        check_bool("causal", causal),
        mode,
        check_int("max_workspace_bytes", max_workspace_bytes),
    )
    settings = settings_of(tensors, cu_seqlens, **placing)._replace(options=options)
    if any(settings.wanted):
        check_differentiable(q_nope, q_pe, w_uv)
        if mode == "absorbed":
            raise NotImplementedError("mode: 'absorbed' does not support gradients; 'fused' and 'materialized' do")
    rows = tensors[:4] if is_packed else [x.flatten(0, 1) for x in tensors[:4]]
    return Inputs(*rows, w_uk, w_uv, cu_seqlens), settings
