"""Keyword arguments of the attention functions, for the overloads that say what they return."""

from typing import Literal, TypedDict

from torch import Tensor

from .prefix_tree import PrefixTree

Mode = Literal["auto", "fused", "materialized", "absorbed"]


class Common(TypedDict, total=False):
    causal: bool
    softmax_scale: float | None


class Masked(Common, total=False):
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None


class Flash(Masked, total=False):
    dropout_p: float
    dropout_seed: int | Tensor | None
    deterministic: bool
    shard: Tensor | None
    out: Tensor | None


class FlashVarlen(Flash, total=False):
    check_values: bool | None


class Paged(Masked, total=False):
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | Tensor | None
    tree_mask: Tensor | None
    k_scale: float | Tensor | None
    v_scale: float | Tensor | None
    num_splits: int
    prefix_tree: PrefixTree | None
    batch_invariant: bool | None
    key_shard: tuple[int, int, int] | None
    out: Tensor | None
    lse: Tensor | None
    workspace: Tensor | None
    check_values: bool | None


class LatentDecode(Common, total=False):
    rope_cache: Tensor | None
    k_scale: float | Tensor | None
    k_pe_scale: float | Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | Tensor | None
    tree_mask: Tensor | None
    rope_cos: Tensor | None
    rope_sin: Tensor | None
    rope_interleaved: bool
    num_splits: int
    prefix_tree: PrefixTree | None
    batch_invariant: bool | None
    key_shard: tuple[int, int, int] | None
    out: Tensor | None
    lse: Tensor | None
    workspace: Tensor | None
    check_values: bool | None


class LatentPrefill(Common, total=False):
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | Tensor | None
    max_seqlen_k: int | Tensor | None
    mode: Mode
    max_workspace_bytes: int
    check_values: bool | None
