"""Scores and softmax of a tile in hopper.py's kernel: bit for bit those of _jit/, which the portable kernel takes."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from emulated_calls import MARKS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attn._jit.args import Scores, Window
from triton_attn._jit.masks import mask_scores, scale_scores
from triton_attn._jit.softmax import softmax_weights
from triton_attn.flash import hopper
from triton_attn.toolchain import emulate

pytestmark = [*MARKS, pytest.mark.oldest]

ROWS, COLUMNS = 64, 128
START_M, START_N = 192, 128


@triton.jit
def _portable_kernel(s_ptr, m_ptr, results, slope, scores, lengths, MASKED: tl.constexpr, SLACK: tl.constexpr):
    start_m, start_n, seqlen_k, offset = lengths
    p_ptr, alpha_ptr, m_new_ptr = results
    i = tl.arange(0, 64)
    tile = i[:, None] * 128 + tl.arange(0, 128)[None, :]
    s = tl.load(s_ptr + tile)
    FOLDS: tl.constexpr = scores.softcap is None and slope is None
    if not FOLDS:
        s = scale_scores(s, scores, slope, start_m + i, start_n, offset, False)
    if MASKED:
        s = mask_scores(s, start_m + i, start_n, seqlen_k, offset, scores.window)
    m_i = tl.load(m_ptr + i)
    p, alpha, m_i = softmax_weights(s, m_i, scores.scale_log2 if FOLDS else 1.0, MASKED, SLACK)
    tl.store(p_ptr + tile, p)
    tl.store(alpha_ptr + i, alpha)
    tl.store(m_new_ptr + i, m_i)


@gluon.jit
def _hopper_kernel(s_ptr, m_ptr, results, slope, scores, lengths, MASKED: gl.constexpr, LAZY: gl.constexpr):
    start_m, start_n, seqlen_k, offset = lengths
    p_ptr, alpha_ptr, m_new_ptr = results
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    i = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    tile = gl.expand_dims(i, 1) * 128 + gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, LAYOUT)), 0)
    of_head = hopper._HeadScores(scores.scale_log2, scores.softcap, slope, scores.window, float("-inf"), LAZY)
    coords = 0, 0, 0, 0
    work = hopper._Work(
        hopper._Head(coords, coords, 0, seqlen_k, offset, scores.window), None, start_m, hopper._Keys(start_n, 1, 0, 0)
    )
    m_i = gl.load(m_ptr + i)
    p, alpha, m_i = hopper._softmax_of(work, gl.load(s_ptr + tile), m_i, (start_m + i, start_n), of_head, MASKED)
    gl.store(p_ptr + tile, p)
    gl.store(alpha_ptr + i, alpha)
    gl.store(m_new_ptr + i, m_i)


def results_of(kernel, s, m_i, *options):
    """Weights, factors of earlier sums, and maxima."""
    results = torch.empty_like(s), torch.empty(ROWS), torch.empty(ROWS)
    with emulate("sm_90") as log:
        kernel[(1,)](s, m_i, results, *options, num_warps=4, enable_fp_fusion=True)
    assert len(log) == 1
    return results


CASES = list(itertools.product([(None, None), (None, 0), (20, None), (70, 5)], [None, 3.0], [None, 0.3]))


@pytest.mark.ci(but_each=9)
@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize(("window", "softcap", "slope"), CASES)
def test_a_tile(window, softcap, slope, masked, lazy):
    """Some rows have seen no key before it, and some see none of its keys."""
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(ROWS, COLUMNS, generator=generator) * 8
    m_i = torch.where(torch.arange(ROWS) % 3 == 0, float("-inf"), torch.randn(ROWS, generator=generator) * 8)
    scores = Scores(0.7, softcap, None, Window(*window))
    lengths = START_M, START_N, 250, 3
    expected = results_of(_portable_kernel, s, m_i, slope, scores, lengths, masked, 8 if lazy else 0)
    computed = results_of(_hopper_kernel, s, m_i, slope, scores, lengths, masked, lazy or None)
    assert not torch.equal(expected[2], m_i)
    if lazy:
        assert (computed[1] == 1).any()
        assert computed[0].max() < 2**8 * 1.001, "the maximum is at most 8 behind: more would overflow in fp16"
    for got, right in zip(computed, expected):
        assert torch.equal(got, right)
