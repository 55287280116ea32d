"""A small kernel in the place of vLLM's: `install` writes it as the package vllm."""

from pathlib import Path

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def kernel_unified_attention(q_ptr, k_ptr, v_ptr, out_ptr, num_keys, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
                             TILE_SIZE: tl.constexpr):
    columns = tl.arange(0, HEAD_SIZE)[None, :]
    rows = tl.arange(0, BLOCK_M)[:, None] * HEAD_SIZE
    q = tl.load(q_ptr + rows + columns)
    acc = tl.zeros([BLOCK_M, HEAD_SIZE], tl.float32)
    for start in range(0, num_keys, TILE_SIZE):
        offsets = (start + tl.arange(0, TILE_SIZE))[:, None] * HEAD_SIZE + columns
        weights = tl.math.exp2(tl.dot(q, tl.load(k_ptr + offsets).T))
        acc = tl.dot(weights.to(q.dtype), tl.load(v_ptr + offsets), acc)
    tl.store(out_ptr + rows + columns, acc.to(q.dtype))


def unified_attention(*, q, k, v, out, max_seqlen_q, max_seqlen_k, block_table, seq_threshold_3D,
                      num_par_softmax_segments, softmax_segm_output, **others):
    assert block_table.shape[1] * k.shape[1] == max_seqlen_k and others["causal"] and max_seqlen_q == len(q)
    assert softmax_segm_output.shape == (*q.shape[:2], num_par_softmax_segments, q.shape[2])
    assert seq_threshold_3D * k.shape[2] == 128
    config = dict(TILE_SIZE=16, num_warps=4) if max_seqlen_q == 1 else dict(TILE_SIZE=32, num_warps=2)
    kernel_unified_attention[(1,)](q, k, v, out, max_seqlen_k, HEAD_SIZE=q.shape[2], BLOCK_M=16, **config)
"""


def install(folder: Path):
    """Write the package into a folder."""
    module = folder / "vllm/v1/attention/ops/triton_unified_attention.py"
    module.parent.mkdir(parents=True)
    module.write_text(SOURCE)
    (folder / "vllm/__init__.py").write_text('__version__ = "0.0.stand-in"\n')
    return folder
