"""A process that runs a Llama through the kernel that `kernels` finds by LOCAL_KERNELS, which has one entry."""

import functools
import os

import torch
from kernels import get_kernel
from transformers import LlamaConfig, LlamaForCausalLM


def count_calls(kernel, names):
    """{name: calls so far}. transformers reads signatures, so they stay."""
    calls = dict.fromkeys(names, 0)

    def counted(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in names:
        setattr(kernel, name, counted(name, getattr(kernel, name)))
    return calls


if __name__ == "__main__":
    name, folder = os.environ["LOCAL_KERNELS"].split("=")
    kernel = get_kernel(name, version=1)
    assert kernel.__file__.startswith(folder)
    calls = count_calls(kernel, ("flash_attn_func", "flash_attn_varlen_func"))

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes, eos_token_id=None, pad_token_id=0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    ids, mask = torch.randint(1, 64, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    greedy = dict(attention_mask=mask, max_new_tokens=3, do_sample=False)
    plain, padded, tokens = model(ids).logits, model(ids, attention_mask=mask).logits, model.generate(ids, **greedy)

    model.set_attn_implementation(name)
    torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=1e-4)
    out = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[mask == 1], padded[mask == 1], atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(ids, **greedy), tokens)
    assert min(calls.values()) > 0, calls
