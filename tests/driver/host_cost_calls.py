"""Host cost of public calls over Triton's own launcher and the stub driver, to which LD_LIBRARY_PATH points.

python host_cost_calls.py sm_90 [PATTERN]     prints of each call (that matches the pattern), with tabs between: name,
                                              microseconds, those of the bare launches that it makes, the ratio of both
                                              in one batch, and how many Python functions it calls
"""

import ctypes
import re
import sys

import torch
from host_cost import bare_launches, compare, python_calls
from public_calls import use_stub

import triton_attn as ta
from triton_attn.flash import forward as flash_forward
from triton_attn.merge import kernel as merge_kernel
from triton_attn.mla import absorbed, prefill, projections
from triton_attn.paged import forward as paged_forward

BF16, INT32 = torch.bfloat16, torch.int32
MODULES = flash_forward, merge_kernel, absorbed, prefill, projections, paged_forward


def flash(packed=False, **options):
    q, k, v = (torch.empty(4, 64, heads, 128, dtype=BF16) for heads in (32, 8, 8))
    if not packed:
        return lambda: ta.flash_attention(q, k, v, **options)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    lengths = 2 * [torch.arange(5, dtype=INT32) * 64] + [64, 64]
    return lambda: ta.flash_attention_varlen(q, k, v, *lengths, **options)


def paged(seqlen_q=1, cache_dtype=BF16, **options):
    q, cache = torch.empty(4, seqlen_q, 32, 128, dtype=BF16), torch.empty(256, 16, 8, 128, dtype=cache_dtype)
    where = torch.empty(4, dtype=INT32), torch.empty(4, 64, dtype=INT32)
    return lambda: ta.paged_attention(q, cache, cache, *where, **options)


def tree():
    shape = dict(num_heads_q=32, num_heads_kv=8, head_dim_v=128, token_bytes=4096, device="cpu")
    return ta.prefix_tree([[0, 1, 2, 3, 10 + i] for i in range(4)], [70] * 4, 16, always=True, **shape)


def decode(num_heads=16, cache_dtype=BF16, weights=False, **options):
    queries = [torch.empty(4, 1, num_heads, n, dtype=BF16) for n in ((128, 64) if weights else (512, 64))]
    cache = torch.empty(64, 64, 656 if cache_dtype == torch.uint8 else 576, dtype=cache_dtype)
    where = torch.empty(4, dtype=INT32), torch.empty(4, 16, dtype=INT32)
    options |= {"softmax_scale": 0.1}
    more = [torch.empty(num_heads, 128, 512, dtype=BF16) for _ in range(2 * weights)]
    return lambda: ta.mla_decode(*queries, cache, *where, *more, **options)


def latent_prefill(mode):
    shapes = (2, 64, 16, 128), (2, 64, 16, 64), (2, 64, 512), (2, 64, 64), (16, 128, 512), (16, 128, 512)
    tensors = [torch.empty(shape, dtype=BF16) for shape in shapes]
    return lambda: ta.mla_prefill(*tensors, mode=mode)


def merge():
    outs, lses = torch.empty(3, 4, 4, 32, 128, dtype=BF16), torch.empty(3, 4, 32, 4)
    return lambda: ta.merge_attention(outs, lses)


CALLS = {
    "flash": flash(causal=True),
    "flash, lse": flash(causal=True, return_lse=True),
    "flash, window, sinks": flash(causal=True, window_size=(100, 0), sinks=torch.empty(32)),
    "varlen": flash(packed=True, causal=True),
    "varlen, lse": flash(packed=True, causal=True, return_lse=True),
    "paged": paged(num_splits=1),
    "paged, lse": paged(num_splits=1, return_lse=True),
    "paged, splits": paged(num_splits=4),
    "paged, prefix tree": paged(num_splits=1, prefix_tree=tree()),
    "paged, chunk": paged(128, num_splits=1),
    "paged, fp8": paged(cache_dtype=torch.float8_e4m3fn, num_splits=1, k_scale=0.5, v_scale=0.5),
    "mla decode": decode(num_splits=1),
    "mla decode, splits": decode(num_splits=4),
    "mla decode, fp8": decode(128, torch.uint8, num_splits=1),
    "mla decode, weights": decode(weights=True, num_splits=1),
    "mla prefill, fused": latent_prefill("fused"),
    "mla prefill, absorbed": latent_prefill("absorbed"),
    "merge": merge(),
}


def main(arch, pattern=""):
    use_stub(arch)
    stub = ctypes.CDLL("libcuda.so.1")
    # A launch does what cuInit does, which returns 0, and prints nothing.
    ctypes.c_void_p.in_dll(stub, "stub_launch").value = ctypes.cast(stub.cuInit, ctypes.c_void_p).value
    for name, call in CALLS.items():
        if re.search(pattern, name):
            with torch.no_grad():
                cost = compare(call, bare_launches(call, MODULES))
                print(name, *cost, python_calls(call), sep="\t", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
