"""Plans are cached by what they follow from: after any other call, a call launches what it would launch as the first.

Each neighbour differs from a call in one thing. Nothing is compiled: launches are recorded and not made.
"""

import contextlib
import functools

import pytest
import torch
from plans import check_neighbour, kernels, launches_of, matmul_precision, padded, unaligned

from triton_attn import flash_attention, flash_attention_varlen, override_config
from triton_attn.dense import backward
from triton_attn.flash import forward, hopper
from triton_attn.flash.passes import backward_pass, forward_pass

pytestmark = pytest.mark.compiled

BF16 = torch.bfloat16


def heads_first(x):
    return torch.empty(x.transpose(-2, -3).shape, dtype=x.dtype).transpose(-2, -3)


def broadcast(x):
    """The same rows for each head, which TMA cannot address."""
    return x[..., :1, :].expand(x.shape)


def call(
    dtype=BF16,
    rows=(2, 256),
    rows_k=(2, 256),
    heads=(4, 2),
    head_dims=(64, 64),
    change=None,
    packed=None,
    wanted=("q", "k", "v"),
    like_inputs=False,
    **options,
):
    """Of flash attention, and its backward pass for the gradients that are wanted.

    change: {tensor: function} of q, k, v, dout, and of out, which is then written in place, without a backward pass.
    packed: sequences, and the longest of queries and of keys. like_inputs: gradients have the strides of their inputs.
    """
    shapes = (*rows, heads[0], head_dims[0]), (*rows_k, heads[1], head_dims[0]), (*rows_k, heads[1], head_dims[1])
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in zip("qkv", shapes)}
    tensors["dout"] = tensors["out"] = torch.empty(*rows, heads[0], head_dims[1], dtype=dtype)
    if packed:
        tensors = {name: x.flatten(0, 1) for name, x in tensors.items()}
    tensors |= {name: of_tensor(tensors[name]) for name, of_tensor in (change or {}).items()}
    q, k, v, dout, out = tensors.values()
    leaves = [tensors[name].requires_grad_() for name in wanted]
    if change and "out" in change:
        forward_pass(q, k, v, (None, None, rows[1], rows_k[1]), **options, out=out)
        return
    if packed:
        sequences, *longest = packed
        bounds = torch.zeros(sequences + 1, dtype=torch.int32)
        out = flash_attention_varlen(q, k, v, bounds, bounds, *longest, **options)
    else:
        out = flash_attention(q, k, v, **options)
    if like_inputs:
        lse = torch.empty(rows[0], heads[0], rows[1])
        backward_pass(dout, None, out.detach(), lse, q, k, v, (None, None, rows[1], rows_k[1]), **options)
    elif leaves:
        torch.autograd.grad(out, leaves, dout)


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def hopper_kernel_with(**fields):
    with kernels("hopper"), override_config("flash_hopper", **fields):
        yield


HOPPER = {"inside": lambda: kernels("hopper"), "wanted": ()}
PACKED = {"packed": (2, 256, 256)}
FP32 = {"dtype": torch.float32}
WRITTEN = {"wanted": (), "change": {"out": torch.empty_like}}
# (what a call has, what a neighbour of it has besides)
NEIGHBOURS = {
    "dtype": ({}, {"dtype": torch.float16}),
    "fp32": ({}, FP32),
    "batch": ({}, {"rows": (3, 256), "rows_k": (3, 256)}),
    "seqlen_q": ({}, {"rows": (2, 250)}),
    "seqlen_k": ({"causal": True}, {"rows_k": (2, 4096)}),
    "query heads": ({}, {"heads": (6, 2)}),
    "KV heads": ({}, {"heads": (4, 1)}),
    "head_dim": ({}, {"head_dims": (80, 64)}),
    "head_dim_v": ({}, {"head_dims": (64, 80)}),
    **{f"strides of {x}": ({}, {"change": {x: heads_first}}) for x in ("q", "k", "v", "dout")},
    **{f"rows of {x}": ({}, {"change": {x: padded}}) for x in ("q", "k", "v", "dout")},
    **{f"stride 0 of {x}": ({}, {"change": {x: broadcast}}) for x in ("q", "k", "v", "dout")},
    **{f"start of {x}": ({}, {"change": {x: unaligned}}) for x in ("q", "k", "v", "dout")},
    "causal": ({}, {"causal": True}),
    "left": ({"causal": True}, {"window_size": (64, 0)}),
    "right": ({"window_size": (64, 0)}, {"window_size": (64, 1)}),
    "softmax_scale": ({}, {"softmax_scale": 0.5}),
    "softcap": ({}, {"softcap": 30.0}),
    "bound of softcap": ({"softcap": 30.0}, {"softcap": 20.0}),
    "ALiBi": ({}, {"alibi_slopes": torch.ones(4)}),
    "ALiBi of each sequence": ({"alibi_slopes": torch.ones(4)}, {"alibi_slopes": torch.ones(2, 4)}),
    "sinks": ({}, {"sinks": torch.ones(4)}),
    "dtype of sinks": ({"sinks": torch.ones(4)}, {"sinks": torch.ones(4, dtype=BF16)}),
    "dropout": ({}, {"dropout_p": 0.1, "dropout_seed": 1}),
    "dropout_p": ({"dropout_p": 0.1, "dropout_seed": 1}, {"dropout_p": 0.2}),
    "lse": ({"wanted": ()}, {"return_lse": True}),
    "gradients of k and v": ({}, {"wanted": ("k", "v")}),
    "gradient of q": ({}, {"wanted": ("q",)}),
    "gradient of v": ({"wanted": ("k",)}, {"wanted": ("v",)}),
    **{f"strides of d{x}": ({"change": {x: heads_first}}, {"like_inputs": True}) for x in ("q", "k", "v")},
    "strides of dq, deterministic": ({"change": {"q": heads_first}, "deterministic": True}, {"like_inputs": True}),
    "deterministic": ({}, {"deterministic": True}),
    "deterministic algorithms": ({}, {"inside": deterministic_algorithms}),
    "packed": ({}, PACKED),
    "sequences": (PACKED, {"packed": (3, 256, 256)}),
    "max_seqlen_q": (PACKED, {"packed": (2, 400, 256)}),
    "max_seqlen_k": (PACKED | {"causal": True}, {"packed": (2, 256, 400)}),
    "precision of fp32": (FP32, {"inside": lambda: matmul_precision("high")}),
    "architecture": ({}, {"arch": "sm_80"}),
    "AMD": ({}, {"arch": "gfx942"}),
    "config": ({}, {"inside": lambda: override_config("flash", block_m=64)}),
    "config of the backward pass": ({}, {"inside": lambda: override_config("flash_backward", fused=None)}),
    "strides of out": (WRITTEN, {"change": {"out": heads_first}}),
    "rows of out": (WRITTEN, {"change": {"out": padded}}),
    "kernel": ({"inside": lambda: kernels("portable"), "wanted": ()}, HOPPER),
    "kernel, window": (HOPPER, {"window_size": (64, 64)}),
    "kernel, softcap": (HOPPER, {"softcap": 30.0}),
    "kernel, ALiBi": (HOPPER, {"alibi_slopes": torch.ones(4)}),
    "kernel, sinks": (HOPPER, {"sinks": torch.ones(4)}),
    "kernel, dropout": (HOPPER, {"dropout_p": 0.1, "dropout_seed": 1}),
    "kernel, start of q": (HOPPER, {"change": {"q": unaligned}}),
    "kernel, start of out": (HOPPER | WRITTEN, {"change": {"out": unaligned}}),
    "kernel, strides of out": (HOPPER | WRITTEN, {"change": {"out": heads_first}}),
    "kernel, start of v": (HOPPER, {"change": {"v": unaligned}}),
    "kernel, scale": (HOPPER, {"softmax_scale": 0.5}),
    "kernel, config": (HOPPER, {"inside": lambda: hopper_kernel_with(num_stages=1)}),
    "kernel, lazy": (HOPPER, {"inside": lambda: hopper_kernel_with(lazy=False)}),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_plan_is_not_that_of_a_neighbour(name):
    check_neighbour(functools.partial(launches_of, call, (forward, hopper, backward)), *NEIGHBOURS[name])
