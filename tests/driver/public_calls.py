"""Public calls through Triton's own driver and launcher, over the stub driver to which LD_LIBRARY_PATH points.

    python public_calls.py sm_90 [PATTERN]     prints the name of each call (that matches the pattern), then a line for
                                               each of its launches

CPU tensors replace GPU tensors, since nothing is computed. With STUB_DEVICE=1 they claim to be on cuda:1. Each launch
must then go there although cuda:0 is current.
"""

import contextlib
import ctypes
import os
import re
import sys
import traceback
from unittest import mock

import torch
import triton
from parameters import SIZES, arguments_of, compare, listed_in
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import CompiledKernel

import triton_attn as ta
from triton_attn._host import device as host_device
from triton_attn._host.call import call_of
from triton_attn._host.options import AttentionOptions
from triton_attn.dense.backward import launch_flash_bwd

BF16 = torch.bfloat16
ON_SECOND_GPU = os.environ.get("STUB_DEVICE") == "1"
current_device = 0


def use_stub(arch):
    number = int(arch.removeprefix("sm_"))
    driver = CudaDriver()
    driver.get_device_capability = lambda device=0: (number // 10, number % 10)
    driver.get_current_stream = lambda device=0: 0
    driver.get_current_device = lambda: current_device
    driver.set_current_device = lambda device: None
    driver.get_current_target = lambda: GPUTarget("cuda", number, 32)
    triton.runtime.driver.set_active(driver)


def check_parameters():
    """Make every launch fail whose parameters differ from the arguments in order, type or size according to its PTX."""
    stub = ctypes.CDLL("libcuda.so.1")
    init_handles, launch = CompiledKernel._init_handles, host_device._launch

    def tell_sizes(kernel):
        is_new = kernel.module is None
        init_handles(kernel)
        if is_new:
            sizes = [SIZES[kind] for kind in listed_in(kernel.asm["ptx"])]
            stub.stub_expect(ctypes.c_void_p(kernel.function), len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def launch_and_compare(function, grid, args, constants, alike):
        kernel = launch(function, grid, args, constants, alike)
        values = dict(zip(function.arg_names, args)) | constants
        listed = listed_in(kernel.asm["ptx"])
        handed = (ctypes.c_ubyte * sum(SIZES[kind] for kind in listed)).in_dll(stub, "stub_parameters")
        compare(kernel.name, listed, list(arguments_of(kernel.src.signature, values)), bytes(handed))
        return kernel

    CompiledKernel._init_handles, host_device._launch = tell_sizes, launch_and_compare


class OnSecondGpu(torch.Tensor):
    device = torch.device("cuda:1")
    is_cuda = True


class TensorsOnSecondGpu(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(kwargs.get("device"), "type", None) == "cuda":
            kwargs = kwargs | {"device": "cpu"}
        result = function(*args, **kwargs)
        return result.as_subclass(OnSecondGpu) if type(result) is torch.Tensor else result


@contextlib.contextmanager
def on_second_gpu(arch):
    """Tensors claim to be on cuda:1. A launch fails unless it goes there."""
    launch = host_device._launch

    @contextlib.contextmanager
    def switched(device):
        global current_device
        before, current_device = current_device, device.index
        try:
            yield
        finally:
            current_device = before

    def launch_there(*args):
        if current_device != 1:
            raise AssertionError(f"a launch on cuda:{current_device} of tensors on cuda:1")
        return launch(*args)

    with contextlib.ExitStack() as patches:
        properties = mock.Mock(multi_processor_count=132)
        of_torch = dict(
            current_device=lambda: current_device, device=switched, get_device_properties=lambda device: properties
        )
        patches.enter_context(mock.patch.multiple(torch.cuda, **of_torch))
        patches.enter_context(mock.patch.object(host_device, "gpu_arch", return_value=arch))
        patches.enter_context(mock.patch.object(host_device, "_launch", launch_there))
        patches.enter_context(TensorsOnSecondGpu())
        yield
    if current_device != 0:
        raise AssertionError("the current device has changed")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def flash(head_dim, dtype=BF16, seqlen_k=256, grads=True, packed=False, **options):
    q, k, v = (torch.randn(1, n, h, head_dim, dtype=dtype) for n, h in ((256, 4), (seqlen_k, 2), (seqlen_k, 2)))
    inputs = [x[0] if packed else x for x in (q, k, v)]
    grads = grads and not ON_SECOND_GPU  # torch operators are called with plain tensors
    if grads:
        inputs = [x.detach().requires_grad_() for x in inputs]
    if packed:
        inputs += [int32(0, 100, 256), int32(0, 100, seqlen_k), 156, 156]
    function = ta.flash_attention_varlen if packed else ta.flash_attention
    out, lse = function(*inputs, return_lse=True, **options)
    if grads:
        (out.sum() + lse.sum()).backward()


def backward_alone():
    q = torch.randn(1, 256, 4, 64, dtype=BF16)
    lse = torch.zeros(1, 4, 256)
    call = call_of(q, q, q, AttentionOptions(1.0, (None, 0), None, None, None))
    launch_flash_bwd(call, q, None, q, lse)


def many_heads():
    """More heads than the second dimension of a grid can have."""
    q = torch.randn(1, 1, 70000, 16, dtype=BF16, requires_grad=True)
    ta.flash_attention(q, q, q).sum().backward()


def paged(seqlen_q, cache_dtype=BF16, head_dim=128, contiguous=False, packed=False, **options):
    q = torch.randn(2, seqlen_q, 8, head_dim, dtype=BF16)
    cache = torch.zeros(64, 16, 2, head_dim, dtype=torch.float32).to(cache_dtype)
    table = torch.arange(64, dtype=torch.int32).view(2, 32)
    if contiguous:
        cache, table = cache.view(2, 512, 2, head_dim), None
    if packed:
        q = q.flatten(0, 1)
        options |= {"cu_seqlens_q": int32(0, 1, len(q)), "max_seqlen_q": len(q) - 1}
    ta.paged_attention(q, cache, cache, int32(300, 5), table, **options)


def prefix_tree(seqlens_q):
    """Of two sequences that share three pages of 16 tokens."""
    shape = dict(num_heads_q=8, num_heads_kv=2, head_dim_v=128, token_bytes=1024, device="cpu")
    return ta.prefix_tree([[0, 1, 2, 3], [0, 1, 2, 4]], [64, 64], 16, seqlens_q=seqlens_q, always=True, **shape)


def append(cache_dtype, **options):
    k, cache = torch.randn(5, 2, 128, dtype=BF16), torch.zeros(4, 16, 2, 128).to(cache_dtype)
    angles = torch.randn(64, 32)
    rope = {"rope_cos": angles, "rope_sin": angles, "positions": torch.arange(5)}
    ta.append_kv_cache(k, k, cache, cache.clone(), torch.arange(5), **rope, **options)
    ta.gather_kv_cache(cache, cache, int32(0, 1)[None], int32(0, 20), 20, **options)
    ta.copy_kv_pages((cache, cache.clone()), int32(0), int32(1))


def append_latent(dtype, width, **scales):
    latents, rope = torch.randn(5, 512, dtype=BF16), torch.randn(5, 64, dtype=BF16)
    cache = torch.zeros(2, 64, width, dtype=dtype)
    ta.append_latent_cache(latents, rope, cache, torch.arange(5), **scales)
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64)
    ta.gather_latent_cache(cache, int32(0, 1)[None], int32(0, 70), 70, **sizes, **scales)
    ta.copy_kv_pages((cache,), int32(0), int32(1))


def merge():
    ta.merge_attention(torch.randn(3, 1, 4, 2, 64, dtype=BF16), torch.randn(3, 1, 2, 4))


def mla_decode(num_heads, cache_dtype=BF16, weights=False, **options):
    widths = (128, 64) if weights else (512, 64)
    q_nope, q_pe = (torch.randn(1, 1, num_heads, n, dtype=BF16) for n in widths)
    cache = torch.zeros(8, 64, 656 if cache_dtype == torch.uint8 else 576, dtype=cache_dtype)
    options |= {"w_uk": torch.randn(num_heads, 128, 512, dtype=BF16)} if weights else {"softmax_scale": 0.1}
    options |= {"w_uv": torch.randn(num_heads, 128, 512, dtype=BF16)} if weights else {}
    ta.mla_decode(q_nope, q_pe, cache, int32(400), torch.arange(8, dtype=torch.int32)[None], **options)


def mla_decode_packed(rope, cache_dtype=BF16, **scales):
    """Rotary keys in a cache of their own, or none."""
    queries = (torch.randn(70, 16, n, dtype=BF16) for n in (512, rope))
    caches = [torch.zeros(8, 64, n, dtype=cache_dtype) for n in (512, rope)]
    where = int32(200, 90), torch.arange(8, dtype=torch.int32).view(2, 4)
    lengths = {"cu_seqlens_q": int32(0, 30, 70), "max_seqlen_q": 70} | scales
    ta.mla_decode(*queries, caches[0], *where, rope_cache=caches[1], softmax_scale=0.1, **lengths)


def mla_prefill(mode, grads=False):
    shapes = (1, 70, 4, 128), (1, 70, 4, 64), (1, 70, 512), (1, 70, 64), (4, 128, 512), (4, 128, 512)
    inputs = [torch.randn(shape, dtype=BF16) for shape in shapes]
    grads = grads and not ON_SECOND_GPU
    inputs = [x.requires_grad_(grads) for x in inputs]
    out = ta.mla_prefill(*inputs, mode=mode)
    if grads:
        out.sum().backward()


def mla_prefill_packed():
    """Every schedule, with gradients if it has them. Widths are small, since everything is compiled for this call
    alone.
    """
    shapes = (70, 2, 32), (70, 2, 16), (90, 64), (90, 16), (2, 32, 64), (2, 32, 64)
    inputs = [torch.randn(shape, dtype=BF16) for shape in shapes]
    lengths = {"cu_seqlens_q": int32(0, 30, 70), "cu_seqlens_k": int32(0, 50, 90)}
    lengths |= {"max_seqlen_q": 40, "max_seqlen_k": 50}
    ta.mla_prefill(*inputs, **lengths, mode="absorbed")
    inputs = [x.requires_grad_() for x in inputs]
    ta.mla_prefill(*inputs, **lengths, mode="materialized")
    ta.mla_prefill(*inputs, **lengths, mode="fused").sum().backward()


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
    "flash 64, slopes per sequence": lambda: flash(
        64, packed=True, grads=False, causal=True, alibi_slopes=torch.ones(2, 4)
    ),
    "flash 64, shards": lambda: flash(64, causal=True, dropout_p=0.1, shard=torch.zeros(1, 3, dtype=torch.int32)),
    "flash 64, backward alone": backward_alone,
    "flash 128, no keys": lambda: flash(128, seqlen_k=0, causal=True),
    "flash 32, fp32": lambda: flash(32, torch.float32, causal=True),
    "flash, many heads": many_heads,
    "paged decode": lambda: paged(1),
    "paged decode, four splits": lambda: paged(1, num_splits=4, return_lse=True),
    "paged chunk, fp8": lambda: paged(40, torch.float8_e4m3fn, k_scale=torch.ones(1), v_scale=torch.ones(1)),
    "paged, prefix tree": lambda: paged(1, prefix_tree=prefix_tree(1)),
    "paged, contiguous": lambda: paged(1, head_dim=64, contiguous=True),
    "paged, packed": lambda: paged(20, head_dim=64, packed=True, alibi_slopes=torch.ones(2, 8)),
    "paged, packed, prefix tree": lambda: paged(20, head_dim=64, packed=True, prefix_tree=prefix_tree((1, 39))),
    "append": lambda: append(BF16),
    "append, fp8": lambda: append(torch.float8_e4m3fn, k_scale=0.5, v_scale=0.5),
    "append, fp8, scales of heads": lambda: append(torch.float8_e4m3fn, k_scale=torch.ones(2), v_scale=torch.ones(1)),
    "append latent": lambda: append_latent(BF16, 576),
    "append latent, fp8": lambda: append_latent(torch.uint8, 656),
    "append latent, plain fp8": lambda: append_latent(torch.float8_e4m3fn, 576, k_scale=0.5),
    "append latent, scales on the device": lambda: append_latent(
        torch.float8_e5m2, 576, k_scale=torch.ones(1), k_pe_scale=torch.ones(1)
    ),
    "merge": merge,
    "mla decode, 16 heads": lambda: mla_decode(16),
    "mla decode, 128 heads, splits": lambda: mla_decode(128, num_splits=2, return_lse=True),
    "mla decode, 64 heads, fp8 rows": lambda: mla_decode(64, torch.uint8, num_splits=2),
    "mla decode, fp8, weights": lambda: mla_decode(16, torch.uint8, weights=True),
    "mla decode, rope": lambda: mla_decode(
        16, weights=True, rope_cos=torch.ones(400, 32), rope_sin=torch.ones(400, 32)
    ),
    "mla decode, plain fp8": lambda: mla_decode(16, torch.float8_e4m3fn, k_scale=0.5),
    "mla decode, scales on the device": lambda: mla_decode(
        128, torch.float8_e5m2, weights=True, k_scale=torch.ones(1), k_pe_scale=torch.ones(1)
    ),
    "mla decode, packed": lambda: mla_decode_packed(64),
    "mla decode, packed, plain fp8": lambda: mla_decode_packed(64, torch.float8_e4m3fn, k_pe_scale=2.0),
    "mla decode, packed, no rope": lambda: mla_decode_packed(0),
    "mla prefill, packed": mla_prefill_packed,
    "mla prefill, fused": lambda: mla_prefill("fused"),
    "mla prefill, materialized": lambda: mla_prefill("materialized", grads=True),
    "mla prefill, absorbed": lambda: mla_prefill("absorbed"),
}


def main(arch, pattern=""):
    use_stub(arch)
    check_parameters()
    with on_second_gpu(arch) if ON_SECOND_GPU else contextlib.nullcontext():
        return call_all(pattern)


def call_all(pattern):
    failed = 0
    for name, call in CALLS.items():
        if not re.search(pattern, name):
            continue
        print(f"call {name}", flush=True)
        try:
            call()  # by the JIT
            call()  # of what it compiled
        except Exception:
            failed += 1
            traceback.print_exc()
            print("failed", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
