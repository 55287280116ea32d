"""A kernel of the parts that all families share, tested without a GPU. docs/guides/new-family.md explains it.

    TRITON_INTERPRET=1 python examples/new_family.py    # interpreted, under guard
    python examples/new_family.py                       # compiled for three GPUs, then emulated

The kernel computes the log-sum-exp of attention scores without the output: how much weight the keys have together.
"""

import torch
import triton
import triton.language as tl

from triton_attn._jit.masks import mask_scores
from triton_attn._jit.softmax import LOG2_E, softmax_finish, softmax_init, softmax_step
from triton_attn._jit.tiles import dot_transposed, load_tile, row_pointers
from triton_attn.testing import assert_close_to_reference, poisoned_empty
from triton_attn.toolchain import compile_only, emulate, fix_interpreter, guard


def scores_lse_reference(q, k):
    """lse[i] = log sum_j exp(q[i] . k[j] / sqrt(head_dim)), (seqlen_q,)."""
    return (q @ k.T * q.shape[1] ** -0.5).logsumexp(1)


@triton.jit
def scores_lse_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    seqlen_q,
    seqlen_k,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes BLOCK_M elements of lse. Grid: tiles of queries. q and k are contiguous."""
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_tile = load_tile(row_pointers(q_ptr, queries, HEAD_DIM, False), queries < seqlen_q, HEAD_DIM)
    m_i, l_i = softmax_init(None, 0, BLOCK_M)  # (BLOCK_M,)
    for start_n in tl.range(0, seqlen_k, BLOCK_N):
        keys = start_n + tl.arange(0, BLOCK_N)
        k_tile = load_tile(row_pointers(k_ptr, keys, HEAD_DIM, False), keys < seqlen_k, HEAD_DIM)
        s = dot_transposed(q_tile, k_tile, "ieee")  # (BLOCK_M, BLOCK_N)
        s = mask_scores(s, queries, start_n, seqlen_k, 0, (None, None))
        _, _, m_i, l_i = softmax_step(s, m_i, l_i, scale_log2, True)
    _, lse = softmax_finish(m_i, l_i)
    tl.store(lse_ptr + queries, lse, mask=queries < seqlen_q)


def scores_lse(q, k):
    lse = torch.empty(q.shape[0], dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(q.shape[0], 32),)
    scale_log2 = q.shape[1] ** -0.5 * LOG2_E.value
    scores_lse_kernel[grid](q, k, lse, q.shape[0], k.shape[0], scale_log2, q.shape[1], BLOCK_M=32, BLOCK_N=32)
    return lse


def check(seqlen_q=37, seqlen_k=50, head_dim=48):
    """A prime, a length of no whole tile and a head dimension of two pieces find more than round numbers do."""
    q, k = torch.randn(seqlen_q, head_dim), torch.randn(seqlen_k, head_dim)
    with poisoned_empty():  # what the kernel leaves out is NaN
        lse = scores_lse(q, k)
    expected = scores_lse_reference(q.double(), k.double())
    assert_close_to_reference(lse, expected, torch_out=scores_lse_reference(q, k), floor=1e-6)


def main():
    torch.manual_seed(0)
    if triton.knobs.runtime.interpret:
        fix_interpreter()
        with guard():
            check()
            check(seqlen_k=0)
        print("interpreted: right, and no access out of bounds")
        return
    q, k = torch.randn(37, 48), torch.randn(50, 48)
    for arch in ("sm_80", "sm_90", "gfx942"):
        with compile_only(arch) as launches:
            scores_lse(q, k)  # computes nothing
        print(f"{arch}: {launches[0].registers} registers, {launches[0].spill_bytes} bytes spilled")
    with emulate("sm_90"):
        check()
    print("emulated on sm_90: right, and no race")


if __name__ == "__main__":
    main()
