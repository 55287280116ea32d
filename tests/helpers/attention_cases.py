"""Calls of flash_attention and flash_attention_varlen, each checked against fp64."""

import contextlib
import itertools
import math
from dataclasses import asdict, dataclass
from unittest import mock

import pytest
import torch
import triton
from scores import Scores

from triton_attn import flash_attention, flash_attention_varlen, override_config
from triton_attn._host.definition import attend, visible_keys
from triton_attn._host.tuned import forget_plans
from triton_attn.dense import backward
from triton_attn.dense.backward_configs import BackwardConfig
from triton_attn.flash import forward
from triton_attn.flash.configs import FlashConfig, HopperConfig
from triton_attn.flash.reference import dropout_mask
from triton_attn.testing import assert_close_to_reference, poisoned_empty
from triton_attn.toolchain import guard

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (1, 3, 16, 24, 40, 64, 71, 80, 96, 112, 128, 160, 192, 256, 320, 512)
GROUP_SIZES = (1, 2, 3, 5, 6, 7, 16)
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Case(Scores):
    """One call. In a dense call all sequences have the same lengths."""

    varlen: bool
    dtype: torch.dtype
    seqlens_q: tuple
    seqlens_k: tuple
    num_heads_kv: int
    group_size: int
    head_dim: int
    head_dim_v: int
    layouts: tuple  # of q, k, v: keys of LAYOUTS
    poison: float  # fills the rows that must have no effect
    poisoned_sequence: int | None
    spare_rows: int  # after the last sequence
    config: FlashConfig | HopperConfig
    seed: int
    dropout_p: float = 0.0
    shards: tuple | None = None  # (query_start, key_start, dropout_row) of each sequence; None: whole sequences
    out_layout: str | None = None  # of an out that is given: a key of LAYOUTS but "expanded"

    def shard(self, i):
        """The shard of sequence i; a whole sequence is one too."""
        if self.shards is None:
            return self.seqlens_k[i] - self.seqlens_q[i], 0, i * self.num_heads_q
        return self.shards[i]

    def visible(self, i, device="cpu"):
        """(seqlen_q, seqlen_k) bool of sequence i: which keys its queries see."""
        query_start, key_start, _ = self.shard(i)
        lengths = self.seqlens_q[i], self.seqlens_k[i]
        return visible_keys(*lengths, self.causal, self.window_size, device, query_start - key_start)[0]

    @property
    def num_heads_q(self):
        return self.num_heads_kv * self.group_size

    @property
    def options(self):
        return super().options | {"dropout_p": self.dropout_p}


PLAIN = Case(
    varlen=False,
    dtype=torch.float16,
    seqlens_q=(33,),
    seqlens_k=(47,),
    num_heads_kv=1,
    group_size=1,
    head_dim=32,
    head_dim_v=32,
    layouts=("contiguous",) * 3,
    poison=NAN,
    poisoned_sequence=None,
    spare_rows=0,
    config=FlashConfig(block_m=32, block_n=32, num_warps=4, num_stages=1),
    seed=0,
)
# Many options at once, with empty sequences, rows after the last one, and a sequence of NaN.
_MANY_OPTIONS = dict(varlen=True, softcap=20.0, poisoned_sequence=1, spare_rows=9)
BIT_OF_EVERYTHING = _MANY_OPTIONS | dict(
    seqlens_q=(70, 0, 5, 33),
    seqlens_k=(100, 40, 0, 20),
    num_heads_kv=2,
    group_size=3,
    head_dim=80,
    head_dim_v=96,
    window_size=(30, -1),
    alibi="per sequence",
)
WIDE_BIT_OF_EVERYTHING = _MANY_OPTIONS | dict(
    dtype=torch.bfloat16,
    seqlens_q=(70, 0, 5),
    seqlens_k=(100, 40, 7),
    group_size=2,
    window_size=(30, 0),
    alibi="per head",
    sinks=torch.float32,
)


def _sliced(x, dim_padding):
    """A view into the middle of a larger tensor of NaN."""
    rows, heads, dim = x.shape[-3:]
    larger = torch.nn.functional.pad(x, (0, dim_padding, 1, 2, 2, 1), value=NAN)
    return larger[..., 2 : 2 + rows, 1 : 1 + heads, :dim]


# Every memory layout of (..., rows, heads, dim); "expanded" makes all heads equal.
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "heads first": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "sliced": lambda x: _sliced(x, 3),
    "sliced and aligned": lambda x: _sliced(x, 16 - x.shape[-1] % 16),
    "expanded": lambda x: x[..., :1, :].expand_as(x),
}


class Inputs:
    """q, k, v of a case: `clean` per sequence (1, rows, heads, dim) for the reference, `given` to the kernel."""

    def __init__(self, case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        shapes = (
            (case.seqlens_q, case.num_heads_q, case.head_dim),
            (case.seqlens_k, case.num_heads_kv, case.head_dim),
            (case.seqlens_k, case.num_heads_kv, case.head_dim_v),
        )
        tensors = (self._tensor(*shape, LAYOUTS[name]) for shape, name in zip(shapes, case.layouts))
        self.clean, self.given = zip(*tensors)
        per_head = (case.num_heads_q,)
        batch = len(case.seqlens_q)
        self.alibi_slopes = self.sinks = None
        if case.alibi:
            slopes_shape = (batch, *per_head) if case.alibi == "per sequence" else per_head
            self.alibi_slopes = torch.rand(slopes_shape, generator=self.generator).to(DEVICE)
        if case.sinks:
            self.sinks = torch.randn(per_head, generator=self.generator).to(DEVICE, case.sinks)

    def _tensor(self, seqlens, heads, dim, layout):
        case = self.case
        total = sum(seqlens) + case.spare_rows
        packed = torch.randn(total, heads, dim, generator=self.generator).to(DEVICE, case.dtype)
        clean = [x[None] for x in layout(packed)[: sum(seqlens)].split(seqlens)] if seqlens else []
        if not case.varlen:
            shape = (len(seqlens), seqlens[0] if seqlens else 5, heads, dim)
            return clean, layout(packed.reshape(shape))
        poisoned = packed.clone()
        for i, rows in enumerate(poisoned.split((*seqlens, case.spare_rows))):
            if i in (case.poisoned_sequence, len(seqlens)):
                rows.fill_(case.poison)
        return clean, layout(poisoned)

    def expected(self, compute_dtype, upcast):
        """out (rows, heads, dim) and lse (rows, heads) of the sequences that are not poisoned."""
        outs, lses = [], []
        for i, qkv in enumerate(zip(*self.clean)):
            if i != self.case.poisoned_sequence:
                out, lse = self.attend(i, *(x.to(upcast) for x in qkv), self.sinks, compute_dtype)
                outs.append(out[0])
                lses.append(lse[0].T)
        return torch.cat(outs), torch.cat(lses)

    def attend(self, i, q, k, v, sinks, compute_dtype):
        """out (1, rows, heads, dim) and lse (1, heads, rows) of sequence i, by definition."""
        case = self.case
        query_start, key_start, row = case.shard(i)
        offset = query_start - key_start
        keep = None
        if case.dropout_p:
            first_query = 0 if case.shards is None else query_start
            ends = first_query + q.shape[1], key_start + k.shape[1]
            whole = dropout_mask(case.seed, case.dropout_p, 1, row + case.num_heads_q, *ends)
            keep = whole[:, row:, first_query:, key_start:]
        slopes = self.alibi_slopes[i] if case.alibi == "per sequence" else self.alibi_slopes
        tensors = dict(alibi_slopes=slopes, sinks=sinks, keep=keep)
        return attend(q, k, v, compute_dtype=compute_dtype, offset=offset, **tensors, **case.options)

    def call(self):
        """out (rows, heads, dim) and lse (rows, heads) of the public function, for sequences that are not poisoned."""
        case = self.case
        options = {}
        if case.out_layout is not None:
            q = self.given[0]
            options["out"] = LAYOUTS[case.out_layout](q.new_full((*q.shape[:-1], case.head_dim_v), NAN))
        out, lse = self.call_with(*self.given, self.sinks, **options)
        assert out is options.get("out", out)
        if not case.varlen:
            return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        end = sum(case.seqlens_q)
        assert (out[end:] == 0).all()
        assert (lse[:, end:] == -math.inf).all()
        kept = [i != case.poisoned_sequence for i, seqlen in enumerate(case.seqlens_q) for _ in range(seqlen)]
        kept += [False] * case.spare_rows
        return out[kept], lse.T[kept]

    def call_with(self, q, k, v, sinks, **options):
        """out and lse of the public function, with other tensors."""
        case = self.case
        options |= {"alibi_slopes": self.alibi_slopes, "sinks": sinks, "return_lse": True, **case.options}
        if case.dropout_p:
            options["dropout_seed"] = case.seed
        if case.shards is not None:
            shard = torch.tensor(case.shards, dtype=torch.int32, device=DEVICE)
            options["shard"] = shard.reshape(len(case.seqlens_q), 3)
        if not case.varlen:
            return flash_attention(q, k, v, **options)
        cu_seqlens = [
            torch.tensor([0, *itertools.accumulate(seqlens)], dtype=torch.int32, device=DEVICE)
            for seqlens in (case.seqlens_q, case.seqlens_k)
        ]
        longest = (max(seqlens, default=0) for seqlens in (case.seqlens_q, case.seqlens_k))
        return flash_attention_varlen(q, k, v, *cu_seqlens, *longest, **options)


@contextlib.contextmanager
def using(config, backward_config=None):
    """Kernels run with these tiles, and backward ones with config, by default. On a GPU they use their own, which fit;
    but those of a HopperConfig, which has no interpreter, are used there."""
    if isinstance(config, HopperConfig):
        with override_config(config.family, **asdict(config)):
            yield
        return
    if not INTERPRETED:
        yield
        return
    backward_config = backward_config or BackwardConfig(config, config, config)
    with (
        mock.patch.object(forward, "choose", return_value=config),
        mock.patch.object(backward, "choose", return_value=backward_config),
    ):
        forget_plans()
        yield
    forget_plans()


_LARGE = 2**31 + 64
far_apart = pytest.mark.parametrize(
    ("dim", "size", "stride"),
    [
        pytest.param(0, 2, _LARGE, id="batch"),
        pytest.param(1, 2, _LARGE, id="row"),
        pytest.param(1, 33, 2**26 + 32, id="rows of one tile"),
        pytest.param(2, 2, _LARGE, id="head"),
    ],
)


def lying_far_apart(x, dim, stride):
    """x (any values) with `stride` elements between indices of `dim`, in memory that is never touched."""
    strides = list(x.contiguous().stride())
    strides[dim] = stride
    memory = torch.empty((x.shape[dim] - 1) * stride + x.numel(), dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, strides).copy_(x)


def check(case):
    """The call is right in every row, writes each element once, and reads exactly the visible tiles.

    Returns the largest error over its bound.
    """
    inputs = Inputs(case)
    with using(case.config), poisoned_empty(), guard() if INTERPRETED else contextlib.nullcontext() as accesses:
        out, lse = inputs.call()
    share = check_values(case, inputs, out, lse) if out.numel() else 0.0
    if INTERPRETED:
        check_accesses(case, accesses)
    return share


def share_of_bound(closeness):
    """0 if the bound and the error are 0."""
    return closeness.error / closeness.bound if closeness.bound else 0.0


def check_values(case, inputs, out, lse):
    out64, lse64 = inputs.expected(torch.float64, torch.float64)
    torch_out, _ = inputs.expected(case.dtype, case.dtype)
    _, torch_lse = inputs.expected(torch.float32, case.dtype)
    # Weights sum to 1 and each is rounded once: an output may be off by this share of the values, even if they cancel.
    # In fp32 the rounding of the scores counts; in half precision, tanh through exp2 is exact to the rounding of
    # softcap.
    score_error = torch.finfo(torch.float32).eps * (4 + (case.dtype != torch.float32) * case.softcap)
    largest = max((v.abs().max().item() for v in inputs.clean[2] if v.numel()), default=0.0)
    floor = max(torch.finfo(case.dtype).eps, score_error) * largest
    of_out = assert_close_to_reference(out, out64, torch_out=torch_out, floor=floor)
    floor = score_error * max(1.0, lse64[lse64.isfinite()].abs().amax().item() if lse64.isfinite().any() else 0.0)
    of_lse = assert_close_to_reference(lse, lse64, torch_out=torch_lse, floor=floor, name="lse")
    return max(map(share_of_bound, (of_out, of_lse)))


def check_accesses(case, accesses):
    element_size = case.dtype.itemsize
    # The kernel clears rows after the last sequence, if there is a sequence.
    spare_rows = case.spare_rows if case.varlen and case.seqlens_q else 0
    num_rows = (sum(case.seqlens_q) + spare_rows) * case.num_heads_q
    assert accesses.bytes_stored["out.ptr"] == num_rows * case.head_dim_v * element_size
    assert accesses.bytes_stored["lse_ptr"] == num_rows * 4
    loaded = accesses.bytes_loaded
    num_keys = rows_loaded(case, case.config)
    for name, head_dim in (("k", case.head_dim), ("v", case.head_dim_v)):
        assert of_argument(loaded, name) == num_keys * head_dim * element_size, name


def of_argument(bytes_by_name, name):
    """Bytes read through a pointer or through the descriptors of one or two pieces."""
    return sum(bytes_by_name[key] for key in (f"{name}.ptr", f"{name}_desc", f"{name}_desc_rest"))


def rows_loaded(case, config, of_queries=False, own=False):
    """Keys read by the programs that own tiles of queries, or queries by those that own tiles of keys; with own the
    rows of their own tiles, if they are read again with each tile.

    Each reads whole tiles, from the first to the last row that is visible to one of its own rows (or sees one), for
    every head.
    """
    block, block_read = (config.block_n, config.block_m) if of_queries else (config.block_m, config.block_n)
    align = 4 if case.dropout_p and not of_queries else 1  # the dropout mask is computed for four keys at a time
    num_rows = 0
    for i in range(len(case.seqlens_q)):
        visible = case.visible(i).T if of_queries else case.visible(i)
        for rows in visible.split(block) if len(visible) else ():
            seen = rows.any(0).nonzero()
            if len(seen):
                lo, hi = int(seen[0]) // align * align, int(seen[-1]) + 1
                num_tiles = -(-(hi - lo) // block_read)
                num_rows += num_tiles * len(rows) if own else min(num_tiles * block_read, visible.shape[1] - lo)
    return num_rows * case.num_heads_q
