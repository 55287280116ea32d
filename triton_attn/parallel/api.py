"""Public API of context parallelism: argument checks, and which method a call takes."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._host.backend import should_check_values
from .._host.checks import check_bool, check_number, check_same_kind, fail
from .._host.mesh import compare_ranks
from .._host.observers import autocast
from .._host.options import attention_options
from . import gather, ring, ulysses
from .balance import check_mesh, check_sharding
from .local import Problem, Results, Rows

METHODS = ("auto", "all_gather", "ring", "ulysses")
# "auto" gathers no more keys and values than this on a rank.
MOST_GATHERED = 2**30


@torch.compiler.disable
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    method: str = "auto",
    load_balance: str | None = "head_tail",
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
    | "ulysses" | (1 - 1/R) S Q e / R | the same | whole sequences of its heads |

    R is the number of ranks, S the length of the whole sequence, n the number of keys that the rank's queries see and
    other ranks hold, and e the bytes of an element. One key and value of each sequence are K = batch * num_heads_kv *
    (head_dim + head_dim_v) elements, and Q = batch * (num_heads_q + max(num_heads_kv, R)) * (head_dim + head_dim_v).
    Under a window all_gather returns gradients of fewer keys: those that other ranks see. The ring overlaps its
    transfers with attention; the others do not.

    Args:
        q, k, v: this rank's rows, (batch, rows, heads, dim); the rest as in `flash_attention`. Queries and keys have
            the same positions.
        mesh: a DeviceMesh of one dimension, such as mesh["cp"].
        method: "auto" is "ring" if the keys and values that this rank's queries see would take more than 1 GiB, and
            "all_gather" otherwise. "ulysses" needs query heads in multiples of the ranks, and KV heads that divide the
            ranks or are multiples of them.
        load_balance: how `shard_sequence` has sharded the rows.
        seqlen: the length of the whole sequence. None: all ranks hold the same number of rows.
        check_values: compare the call with that of the other ranks first, which costs a collective of its own and a
            device-to-host sync. None follows the environment variable TRITON_ATTN_CHECK=1.
        dropout_seed: needed with dropout, and the same on all ranks: the mask is the one of a single GPU.
        The rest as in `flash_attention`.

    Returns:
        out and lse of this rank's rows, as `flash_attention`. The gradient of sinks is this rank's part; sum it over
        the mesh, as of any parameter that all ranks have.

    Raises: as `flash_attention`; ValueError: the rows are not those of `shard_sequence`; with check_values, on every
    rank: ranks differ in a shape, a dtype or an option. Without check_values the results of such ranks are undefined.

    torch.compile breaks the graph here.
    """
    q, k, v = autocast(q, k, v)
    check_same_kind(q, k, v)
    rank, num_ranks = check_mesh(mesh)
    if method not in METHODS:
        fail("method", " or ".join(map(repr, METHODS)), repr(method))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            fail(name, "4 dimensions (batch, rows, heads, dim)", f"shape {tuple(x.shape)}")
        if x.shape[1] != q.shape[1]:
            fail(name, f"q's {q.shape[1]} rows", x.shape[1])
    sharding = check_sharding(seqlen, q.shape[1], rank, num_ranks, load_balance)
    checked = attention_options(q.shape[-1], causal, softmax_scale, softcap, window_size)
    if check_number("dropout_p", dropout_p) > 0 and dropout_seed is None:
        fail("dropout_seed", "an int or a tensor, the same on all ranks, with dropout", None)
    left, right = (-1 if side is None else side for side in checked.window)
    options = dict(
        softmax_scale=checked.softmax_scale,
        softcap=checked.softcap or 0.0,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    deterministic, return_lse = check_bool("deterministic", deterministic), check_bool("return_lse", return_lse)
    problem = Problem(sharding, (left, right), options, deterministic, mesh.get_group(), rank)
    if should_check_values(check_values):
        _compare_ranks(problem, method, q, k, v, sinks)
    if method == "auto":
        method = _choose(problem, k, v)
    if method == "ulysses":
        out, lse = ulysses.attend(problem, Rows(q, k, v, sinks))
    else:
        out, lse = _Attention.apply(q, k, v, sinks, problem, gather if method == "all_gather" else ring)
    return (out, lse) if return_lse else out


def _compare_ranks(problem, method, q, k, v, sinks):
    """Raise on every rank if the calls of the ranks differ."""
    own = dict(method=method, **problem.sharding._asdict(), window_size=problem.window, **problem.options)
    own |= dict(deterministic=problem.deterministic)
    for name, x in (("q", q), ("k", k), ("v", v)):
        batch, _, *shape = x.shape
        own[name] = (batch, *shape), x.dtype
    own |= {name: x.tolist() for name, x in (own | dict(sinks=sinks)).items() if isinstance(x, Tensor)}
    compare_ranks(own, problem.group)


def _choose(problem, k, v):
    """The same on all ranks: by the rank whose queries see most keys."""
    keys = gather.most_keys_seen(problem.sharding, problem.window)
    size = keys * k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.dtype.itemsize
    return "all_gather" if size <= MOST_GATHERED else "ring"


class _Attention(torch.autograd.Function):
    """The passes of a method, a module with `forward` and `backward`."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, problem: Problem, method: Any) -> Any:
        out, lse = method.forward(problem, Rows(q, k, v, sinks))
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.problem, ctx.method = problem, method
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> Any:
        *rows, out, lse = ctx.saved_tensors
        results = Results(out, lse, torch.zeros_like(out) if dout is None else dout, dlse)
        return *ctx.method.backward(ctx.problem, Rows(*rows), results), None, None
