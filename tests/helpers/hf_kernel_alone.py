"""A process that checks the folder of packaging/hf_kernels: FOLDER, and the checkout's root for its last lines.

Its first part cannot import triton_attn. All variants share the process, since torch's operators do.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention


class NoTritonAttn:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton_attn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load(variant):
    """As `kernels` does."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_functions(kernel):
    """All three, with gradients if the kernel runs."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 7, 2, 16)
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    check(kernel.flash_attn_func(q, k, v, causal=True), expected)
    lengths = torch.tensor([0, 7], dtype=torch.int32)
    check(kernel.flash_attn_varlen_func(q[0], k[0], v[0], lengths, lengths, 7, 7, causal=True), expected[0])

    caches = torch.zeros(2, 3, 4, 2, 16)
    table, seqlens = torch.tensor([[2, 0]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    call = dict(cache_seqlens=seqlens, block_table=table, causal=True)
    check(kernel.flash_attn_with_kvcache(q, *caches, k, v, **call), expected)
    check(caches[:, (2, 0)].flatten(1, 2)[:, :7], torch.cat((k, v)))


def check_gradients(kernel):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 1, 16, requires_grad=True) for _ in range(3))
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    out = kernel.flash_attn_func(q, k, v, causal=True)
    check(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)))


def check(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def operators(namespace):
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")}


if __name__ == "__main__":
    folder, root = map(Path, sys.argv[1:])
    sys.meta_path.insert(0, NoTritonAttn())
    kernels = [load(variant) for variant in sorted((folder / "build").iterdir())]
    assert len(kernels) == 3
    os.environ["TRITON_ATTN_BACKEND"] = "reference"
    for kernel in kernels:
        check_functions(kernel)
        assert f"{kernel.__name__}::paged_attention" in operators(kernel.__name__)
    os.environ["TRITON_ATTN_BACKEND"] = "triton"
    check_functions(kernels[0])
    check_gradients(kernels[0])
    assert f"{kernels[0].__name__}::flash_attention_backward" in operators(kernels[0].__name__)

    assert operators("triton_attn") == set()
    assert not any(name.partition(".")[0] == "triton_attn" for name in sys.modules)
    sys.meta_path.pop(0)
    sys.path.insert(0, str(root))
    import triton_attn.flash.autograd  # noqa: F401  beside the others

    assert "triton_attn::flash_attention" in operators("triton_attn")
