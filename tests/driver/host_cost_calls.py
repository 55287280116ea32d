"""Host cost of public calls over Triton's own launcher and the stub driver, to which LD_LIBRARY_PATH points.

python host_cost_calls.py sm_90 [PATTERN]     prints of each call (that matches the pattern), with tabs between: name,
                                              microseconds, those of the bare launches that it makes, the ratio of both
                                              in one batch, and how many Python functions it calls; of a call in
                                              COUNTED the name and that number
"""

import ctypes
import functools
import re
import sys

import torch
from host_cost import bare_launches, compare, python_calls
from public_calls import use_stub

import triton_attn as ta
from triton_attn.cache.kernels import gather as gather_kernel
from triton_attn.dense import backward as flash_backward
from triton_attn.flash import autograd
from triton_attn.flash import forward as flash_forward
from triton_attn.merge import kernel as merge_kernel
from triton_attn.mla import absorbed, prefill, projections
from triton_attn.mla import autograd as mla_autograd
from triton_attn.paged import forward as paged_forward

BF16, INT32 = torch.bfloat16, torch.int32
MODULES = flash_forward, flash_backward, merge_kernel, absorbed, prefill, projections, paged_forward, gather_kernel


def flash(packed=False, trained=False, **options):
    q, k, v = (torch.empty(4, 64, heads, 128, dtype=BF16, requires_grad=trained) for heads in (32, 8, 8))
    if not packed:
        return lambda: ta.flash_attention(q, k, v, **options)
    q, k, v = (x.detach().flatten(0, 1).requires_grad_(trained) for x in (q, k, v))
    lengths = 2 * [torch.arange(5, dtype=INT32) * 64] + [64, 64]
    return lambda: ta.flash_attention_varlen(q, k, v, *lengths, **options)


def backward(packed=False, wants_sinks=False, has_dlse=False, deterministic=False):
    """What `backward_by_autograd` runs inside torch's engine."""
    q, k, v = (torch.empty(4, 64, heads, 128, dtype=BF16) for heads in (32, 8, 8))
    lse, lengths = torch.empty(4, 32, 64), (None,) * 4 + (64, 64)
    if packed:
        q, k, v, lse = *(x.flatten(0, 1) for x in (q, k, v)), torch.empty(32, 256)
        lengths = 2 * (torch.arange(5, dtype=INT32) * 64,) + (None, None, 64, 64)
    out, dout, dlse = torch.empty_like(q), torch.empty_like(q), torch.empty_like(lse) if has_dlse else None
    tensors = q, k, v, torch.empty(32) if wants_sinks else None, None, None, None
    numbers = 0.1, None, 0, None, 0.0, deterministic, [True, True, True, wants_sinks]
    return lambda: autograd.gradients_of(dout, dlse, out, lse, *tensors, *lengths, *numbers)


def backward_by_autograd(layers=1):
    """The whole backward pass: torch's engine too, and what torch.autograd.grad does before, once for all layers."""
    q = torch.empty(4, 64, 32, 128, dtype=BF16, requires_grad=True)
    kv = [torch.empty(4, 64, 8, 128, dtype=BF16, requires_grad=True) for _ in range(2 * layers)]
    dout = torch.empty_like(q)

    @functools.cache
    def out():
        x = q
        with torch.enable_grad():
            for k, v in zip(kv[::2], kv[1::2]):
                x = ta.flash_attention(x, k, v, causal=True)
        return x

    return lambda: torch.autograd.grad(out(), (q, *kv), dout, retain_graph=True)


def paged(seqlen_q=1, cache_dtype=BF16, **options):
    q, cache = torch.empty(4, seqlen_q, 32, 128, dtype=BF16), torch.empty(256, 16, 8, 128, dtype=cache_dtype)
    where = torch.empty(4, dtype=INT32), torch.empty(4, 64, dtype=INT32)
    return lambda: ta.paged_attention(q, cache, cache, *where, **options)


def paged_with_memory():
    """Nothing is allocated."""
    q, out, lse = torch.empty(4, 1, 32, 128, dtype=BF16), torch.empty(4, 1, 32, 128, dtype=BF16), torch.empty(4, 32, 1)
    cache, where = (
        torch.empty(256, 16, 8, 128, dtype=BF16),
        (torch.empty(4, dtype=INT32), torch.empty(4, 64, dtype=INT32)),
    )
    options = dict(num_splits=4, return_lse=True, out=out, lse=lse)

    @functools.cache
    def room():
        size = ta.workspace_bytes(ta.paged_attention, q, cache, cache, *where, **options)
        return torch.empty(size, dtype=torch.uint8)

    return lambda: ta.paged_attention(q, cache, cache, *where, workspace=room(), **options)


def contiguous_cache():
    q, cache = torch.empty(4, 1, 32, 128, dtype=BF16), torch.empty(4, 1024, 8, 128, dtype=BF16)
    lengths = torch.empty(4, dtype=INT32)
    return lambda: ta.paged_attention(q, cache, cache, lengths, num_splits=1)


def tree():
    shape = dict(num_heads_q=32, num_heads_kv=8, head_dim_v=128, token_bytes=4096, device="cpu")
    return ta.prefix_tree([[0, 1, 2, 3, 10 + i] for i in range(4)], [70] * 4, 16, always=True, **shape)


def decode_with_memory(weights=False):
    """Nothing is allocated."""
    call = decode(weights=weights, num_splits=4, return_lse=True)
    out, lse = torch.empty(4, 1, 16, 128 if weights else 512, dtype=BF16), torch.empty(4, 16, 1)
    call = functools.partial(call, out=out, lse=lse)

    @functools.cache
    def room():
        return torch.empty(ta.workspace_bytes(call), dtype=torch.uint8)

    return lambda: call(workspace=room())


def gather(**options):
    cache, table = torch.empty(256, 16, 8, 128, dtype=BF16), torch.empty(4, 64, dtype=INT32)
    bounds = torch.empty(5, dtype=INT32)
    return lambda: ta.gather_kv_cache(cache, cache, table, bounds, 64, **options)


def decode(num_heads=16, cache_dtype=BF16, weights=False, **options):
    queries = [torch.empty(4, 1, num_heads, n, dtype=BF16) for n in ((128, 64) if weights else (512, 64))]
    cache = torch.empty(64, 64, 656 if cache_dtype == torch.uint8 else 576, dtype=cache_dtype)
    where = torch.empty(4, dtype=INT32), torch.empty(4, 16, dtype=INT32)
    options |= {"softmax_scale": 0.1}
    more = [torch.empty(num_heads, 128, 512, dtype=BF16) for _ in range(2 * weights)]
    return functools.partial(ta.mla_decode, *queries, cache, *where, *more, **options)


def latent_prefill(mode, trained=False):
    shapes = (2, 64, 16, 128), (2, 64, 16, 64), (2, 64, 512), (2, 64, 64), (16, 128, 512), (16, 128, 512)
    tensors = [torch.empty(shape, dtype=BF16, requires_grad=trained) for shape in shapes]
    return lambda: ta.mla_prefill(*tensors, mode=mode)


def backward_of_prefill():
    """Without torch's engine."""
    shapes = (1, 16, 2, 32), (1, 16, 2, 16), (1, 16, 64), (1, 16, 16), (2, 32, 64), (2, 32, 64)
    tensors, wanted = [torch.zeros(shape, dtype=BF16) for shape in shapes], [True] * 6
    out, lse = torch.zeros(1, 16, 2, 32, dtype=BF16), torch.zeros(1, 2, 16)
    numbers = None, None, None, None, 16, 16, 0.1, True, 2**28
    return lambda: mla_autograd.gradients_of(out, None, out, lse, *tensors, *numbers, wanted)


def merge():
    outs, lses = torch.empty(3, 4, 4, 32, 128, dtype=BF16), torch.empty(3, 4, 32, 4)
    return lambda: ta.merge_attention(outs, lses)


CALLS = {
    "flash": flash(causal=True),
    "flash, lse": flash(causal=True, return_lse=True),
    "flash, window, sinks": flash(causal=True, window_size=(100, 0), sinks=torch.empty(32)),
    "varlen": flash(packed=True, causal=True),
    "varlen, lse": flash(packed=True, causal=True, return_lse=True),
    "flash with gradients": flash(trained=True, causal=True),
    "varlen with gradients": flash(packed=True, trained=True, causal=True),
    "backward": backward(),
    "backward, gradient of lse": backward(has_dlse=True),
    "backward, sinks": backward(wants_sinks=True),
    "backward, deterministic": backward(deterministic=True),
    "backward, varlen": backward(packed=True),
    "backward, varlen, gradient of lse": backward(packed=True, has_dlse=True),
    "backward by autograd": backward_by_autograd(),
    "backward by autograd, eight layers": backward_by_autograd(layers=8),
    "paged": paged(num_splits=1),
    "paged, lse": paged(num_splits=1, return_lse=True),
    "paged, splits": paged(num_splits=4),
    "paged, memory of the caller's": paged_with_memory(),
    "paged, contiguous cache": contiguous_cache(),
    "paged, prefix tree": paged(num_splits=1, prefix_tree=tree()),
    "paged, chunk": paged(128, num_splits=1),
    "paged, fp8": paged(cache_dtype=torch.float8_e4m3fn, num_splits=1, k_scale=0.5, v_scale=0.5),
    "mla decode": decode(num_splits=1),
    "mla decode, splits": decode(num_splits=4),
    "mla decode, fp8": decode(128, torch.uint8, num_splits=1),
    "mla decode, weights": decode(weights=True, num_splits=1),
    "mla decode, memory of the caller's": decode_with_memory(),
    "mla decode, weights, memory of the caller's": decode_with_memory(weights=True),
    "mla prefill, fused": latent_prefill("fused"),
    "mla prefill, absorbed": latent_prefill("absorbed"),
    "mla prefill with gradients": latent_prefill("fused", trained=True),
    "merge": merge(),
    "gather": gather(),
    "gather, memory of the caller's": gather(out=tuple(torch.empty(2, 64, 8, 128, dtype=BF16))),
}
# Between their launches are products of torch's, on this CPU.
COUNTED = {
    "mla prefill, materialized": latent_prefill("materialized"),
    "mla prefill, backward": backward_of_prefill(),
}


def main(arch, pattern=""):
    use_stub(arch)
    stub = ctypes.CDLL("libcuda.so.1")
    # A launch does what cuInit does, which returns 0, and prints nothing.
    ctypes.c_void_p.in_dll(stub, "stub_launch").value = ctypes.cast(stub.cuInit, ctypes.c_void_p).value
    for name, call in (CALLS | COUNTED).items():
        if re.search(pattern, name):
            with torch.set_grad_enabled("with gradients" in name):
                call()  # what the first call caches, and the forward pass
                cost = compare(call, bare_launches(call, MODULES)) if name in CALLS else ()
                print(name, *cost, python_calls(call), sep="\t", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
