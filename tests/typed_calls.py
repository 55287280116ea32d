"""Types of calls as a type checker sees them, checked by `make lint`. Nothing here runs.

A line marked `pyright: ignore` must be an error. A needless mark is reported.
"""

from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import triton_attn as ta
from triton_attn.cache.sequences import Sequence


def lse_follows_the_argument(x: Tensor, wanted: bool) -> None:
    assert_type(ta.flash_attention(x, x, x, causal=True), Tensor)
    assert_type(ta.flash_attention(x, x, x, window_size=(15, 0), return_lse=True), tuple[Tensor, Tensor])
    assert_type(ta.flash_attention(x, x, x, return_lse=wanted), Tensor | tuple[Tensor, Tensor])
    assert_type(ta.flash_attention_varlen(x, x, x, x, x, 7, x, dropout_p=0.1, dropout_seed=x), Tensor)
    assert_type(ta.flash_attention_varlen(x, x, x, x, x, 7, 7, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ta.paged_attention(x, x, x, x, x, k_scale=0.5, v_scale=x), Tensor)
    assert_type(ta.paged_attention(x, x, x, x, prefix_tree=None, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ta.mla_prefill(x, x, x, x, x, x, mode="fused"), Tensor)
    assert_type(ta.mla_prefill(x, x, x, x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ta.mla_decode(x, x, x, x, x, x, x), Tensor)
    assert_type(ta.mla_decode(x, x, x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ta.merge_attention(x, x), tuple[Tensor, Tensor])


def wrong_arguments_are_found(x: Tensor) -> None:
    ta.flash_attention(x, x, x, casual=True)  # pyright: ignore[reportCallIssue]
    ta.flash_attention(x, x, x, window_size=15)  # pyright: ignore[reportArgumentType]
    ta.mla_prefill(x, x, x, x, x, x, mode="fuse")  # pyright: ignore[reportArgumentType]
    ta.append_kv_cache(x, x, x, x)  # pyright: ignore[reportCallIssue]


def caches(x: Tensor) -> None:
    cache = ta.PagedKVCache(64, num_layers=2, num_kv_heads=2, head_dim=64, dtype=torch.float8_e4m3fn, device="cuda")
    sequence, cached = cache.create([1, 2, 3], salt="tenant")
    assert_type(cached, int)
    assert_type(cache.extend([sequence], [[4, 5]]), Tensor)
    assert_type(cache.extend([sequence], 2), Tensor)
    assert_type(cache.extend([sequence, cache.fork(sequence)], [1, [4]]), Tensor)
    assert_type(cache.block_table([sequence]), Tensor)
    assert_type(cache.stats().pages_free, int)
    assert_type(cache.fork([sequence, sequence]), list[Sequence])
    assert_type(ta.BlockPool(8).allocate(2), NDArray[np.int64])
    ta.copy_kv_pages((cache.k_cache, cache.v_cache), x, x)
    assert_type(ta.warmup("llama-3-8b", arch="sm_90", report=print).compiled, int)
