"""Sizes that depend on the device: thousands of tokens on a GPU, a few in the interpreter."""

import torch
from attention_cases import DEVICE
from torch.utils.checkpoint import checkpoint

from perf.workloads.models import DEEPSEEK_V3, FALCON_7B, GEMMA_3_12B, GPT_OSS_120B, LLAMA_2_7B, LLAMA_3_8B, QWEN3_32B
from triton_attn._host.definition import attend

AT_SCALE = DEVICE == "cuda"
DTYPES = (torch.bfloat16, torch.float16)
CACHED_MODELS = (LLAMA_3_8B, LLAMA_2_7B, QWEN3_32B, FALCON_7B, GEMMA_3_12B, GPT_OSS_120B)
MODELS = (*CACHED_MODELS, DEEPSEEK_V3)


def at_scale(on_gpu, interpreted):
    return on_gpu if AT_SCALE else interpreted


def heads_of(model):
    """The heads of a case; in the interpreter one KV head with at most two query heads."""
    group_size = model.num_heads_q // model.num_heads_kv
    return {
        "num_heads_kv": at_scale(model.num_heads_kv, 1),
        "group_size": at_scale(group_size, min(group_size, 2)),
        "head_dim": model.head_dim,
        "head_dim_v": model.head_dim_v or model.head_dim,
        "sinks": torch.float32 if model.sinks else None,
        "window_size": (at_scale(model.window, 20) - 1, -1) if model.window else (-1, -1),
    }


def attend_by_heads(q, k, v, *, alibi_slopes=None, sinks=None, keep=None, **options):
    """`attend`, one query head at a time. Only its inputs are kept for the backward pass, since the scores of all heads
    do not fit in memory at these lengths.
    """
    group_size = q.shape[2] // k.shape[2]
    outs, lses = [], []
    for head in range(q.shape[2]):
        one, its_kv = slice(head, head + 1), slice(head // group_size, head // group_size + 1)
        of_head = {
            "alibi_slopes": None if alibi_slopes is None else alibi_slopes[..., one],
            "sinks": None if sinks is None else sinks[one],
            "keep": None if keep is None else keep[:, one],
        }
        tensors = q[:, :, one], k[:, :, its_kv], v[:, :, its_kv]
        out, lse = checkpoint(attend, *tensors, **of_head, **options, use_reentrant=False)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=1)
