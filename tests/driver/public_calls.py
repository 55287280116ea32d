"""Public calls through Triton's own driver and launcher, over the stub driver that LD_LIBRARY_PATH leads to.

    python public_calls.py sm_90 [WORD]     prints the name of each call (with the word in it), then a line for each of
                                            its launches

CPU tensors stand for those of a GPU, since nothing computes.
"""

import sys
import traceback

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

import triton_attn as ta

BF16 = torch.bfloat16


def use_stub(arch):
    number = int(arch.removeprefix("sm_"))
    driver = CudaDriver()
    driver.get_device_capability = lambda device=0: (number // 10, number % 10)
    driver.get_current_stream = lambda device=0: 0
    driver.get_current_device = lambda: 0
    driver.set_current_device = lambda device: None
    driver.get_current_target = lambda: GPUTarget("cuda", number, 32)
    triton.runtime.driver.set_active(driver)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def flash(head_dim, dtype=BF16, seqlen_k=256, grads=True, packed=False, **options):
    q, k, v = (torch.randn(1, n, h, head_dim, dtype=dtype) for n, h in ((256, 4), (seqlen_k, 2), (seqlen_k, 2)))
    inputs = [x[0] if packed else x for x in (q, k, v)]
    if grads:
        inputs = [x.detach().requires_grad_() for x in inputs]
    if packed:
        inputs += [int32(0, 100, 256), int32(0, 100, seqlen_k), 156, 156]
    function = ta.flash_attention_varlen if packed else ta.flash_attention
    out, lse = function(*inputs, return_lse=True, **options)
    if grads:
        (out.sum() + lse.sum()).backward()


def many_heads():
    """More heads than the second dimension of a grid holds."""
    q = torch.randn(1, 1, 70000, 16, dtype=BF16, requires_grad=True)
    ta.flash_attention(q, q, q).sum().backward()


def paged(seqlen_q, cache_dtype=BF16, **options):
    q = torch.randn(2, seqlen_q, 8, 128, dtype=BF16)
    cache = torch.zeros(64, 16, 2, 128, dtype=torch.float32).to(cache_dtype)
    table = torch.arange(64, dtype=torch.int32).view(2, 32)
    ta.paged_attention(q, cache, cache, int32(300, 5), table, **options)


def append(cache_dtype, **options):
    k, cache = torch.randn(5, 2, 128, dtype=BF16), torch.zeros(4, 16, 2, 128).to(cache_dtype)
    angles = torch.randn(64, 32)
    rope = {"rope_cos": angles, "rope_sin": angles, "positions": torch.arange(5)}
    ta.append_kv_cache(k, k, cache, cache.clone(), torch.arange(5), **rope, **options)
    ta.copy_kv_pages((cache, cache.clone()), int32(0), int32(1))


def append_latent(dtype, width):
    latents, rope = torch.randn(5, 512, dtype=BF16), torch.randn(5, 64, dtype=BF16)
    ta.append_latent_cache(latents, rope, torch.zeros(2, 64, width, dtype=dtype), torch.arange(5))


def merge():
    ta.merge_attention(torch.randn(3, 1, 4, 2, 64, dtype=BF16), torch.randn(3, 1, 2, 4))


def mla_decode(num_heads, cache_dtype=BF16, weights=False, **options):
    widths = (128, 64) if weights else (512, 64)
    q_nope, q_pe = (torch.randn(1, 1, num_heads, n, dtype=BF16) for n in widths)
    cache = torch.zeros(8, 64, 656 if cache_dtype == torch.uint8 else 576, dtype=cache_dtype)
    options |= {"w_uk": torch.randn(num_heads, 128, 512, dtype=BF16)} if weights else {"softmax_scale": 0.1}
    options |= {"w_uv": torch.randn(num_heads, 128, 512, dtype=BF16)} if weights else {}
    ta.mla_decode(q_nope, q_pe, cache, int32(400), torch.arange(8, dtype=torch.int32)[None], **options)


def mla_prefill(mode, grads=False):
    shapes = (1, 70, 4, 128), (1, 70, 4, 64), (1, 70, 512), (1, 70, 64), (4, 128, 512), (4, 128, 512)
    inputs = [torch.randn(shape, dtype=BF16, requires_grad=grads) for shape in shapes]
    out = ta.mla_prefill(*inputs, mode=mode)
    if grads:
        out.sum().backward()


CALLS = {
    "flash 64": lambda: flash(64, causal=True),
    "flash 96, two pieces": lambda: flash(96, causal=True),
    "flash 128, deterministic": lambda: flash(128, deterministic=True),
    "flash 64, packed": lambda: flash(64, packed=True, causal=True),
    "flash 64, every option": lambda: flash(
        64,
        window_size=(100, 5),
        softcap=20.0,
        alibi_slopes=torch.ones(4),
        sinks=torch.ones(4),
        dropout_p=0.1,
    ),
    "flash 128, no keys": lambda: flash(128, seqlen_k=0, causal=True),
    "flash 32, fp32": lambda: flash(32, torch.float32, causal=True),
    "flash, many heads": many_heads,
    "paged decode": lambda: paged(1),
    "paged decode, four splits": lambda: paged(1, num_splits=4, return_lse=True),
    "paged chunk, fp8": lambda: paged(40, torch.float8_e4m3fn, k_scale=torch.ones(1), v_scale=torch.ones(1)),
    "paged, shared prefix": lambda: paged(1, shared_prefix_len=16),
    "append": lambda: append(BF16),
    "append, fp8": lambda: append(torch.float8_e4m3fn, k_scale=0.5, v_scale=0.5),
    "append latent": lambda: append_latent(BF16, 576),
    "append latent, fp8": lambda: append_latent(torch.uint8, 656),
    "merge": merge,
    "mla decode, 16 heads": lambda: mla_decode(16),
    "mla decode, 128 heads, splits": lambda: mla_decode(128, num_splits=2, return_lse=True),
    "mla decode, fp8, weights": lambda: mla_decode(16, torch.uint8, weights=True),
    "mla prefill, fused": lambda: mla_prefill("fused"),
    "mla prefill, materialized": lambda: mla_prefill("materialized", grads=True),
    "mla prefill, absorbed": lambda: mla_prefill("absorbed"),
}


def main(arch, word=""):
    use_stub(arch)
    failed = 0
    for name, call in CALLS.items():
        if word not in name:
            continue
        print(f"call {name}", flush=True)
        try:
            call()
        except Exception:
            failed += 1
            traceback.print_exc()
            print("failed", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
