"""A DeepSeek of transformers that generates over a paged cache of latent vectors.

    python examples/deepseek.py --model v3 --prompts 6

All prompts begin alike: the first batch computes the common prefix, the second finds it in the cache. Weights are
random, so the text means nothing. The example shows that the tokens equal those of transformers, the cache bytes per
token, and how many tokens of the second batch were cached.

On the CPU the torch reference runs; with TRITON_INTERPRET=1 the kernels run in Triton's interpreter.
"""

import argparse
import time

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from triton_attn import kv_cache_bytes_per_token
from triton_attn.interop.deepseek import PagedDeepseek

MODELS = {"v2": (DeepseekV2ForCausalLM, DeepseekV2Config), "v3": (DeepseekV3ForCausalLM, DeepseekV3Config)}


def random_model(name):
    """V3's heads and latent vectors at an eighth of their widths; YaRN as in its checkpoint."""
    model_class, config_class = MODELS[name]
    rope = dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=4096)
    config = config_class(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=192,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=163840,
        initializer_range=0.1,
        rope_parameters=rope | dict(mscale=1.0, mscale_all_dim=1.0),
        eos_token_id=None,
    )
    return model_class(config)


def generated_alone(model, prompt, max_new_tokens):
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="v3")
    parser.add_argument("--prompts", type=int, default=6, help="in each of two batches")
    parser.add_argument("--shared-tokens", type=int, default=70, help="common prefix of all prompts")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--num-pages", type=int, default=64)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = random_model(args.model).to(args.device)
    paged = PagedDeepseek(model, args.num_pages, args.page_size)
    config = model.config
    sizes = dict(num_layers=config.num_hidden_layers, dtype=model.dtype)
    latent = dict(kv_lora_rank=config.kv_lora_rank, qk_rope_head_dim=config.qk_rope_head_dim)
    heads = dict(num_kv_heads=config.num_attention_heads, head_dim=config.qk_head_dim, head_dim_v=config.v_head_dim)
    latent_bytes, head_bytes = (kv_cache_bytes_per_token(**sizes, **kind) for kind in (latent, heads))
    print(f"per token: {latent_bytes} bytes as latent vectors, {head_bytes} bytes as keys and values of every head")

    shared = torch.randint(config.vocab_size, (args.shared_tokens,)).tolist()
    found = 0
    for batch in ("first", "second"):
        tails = [torch.randint(config.vocab_size, (1 + 3 * i,)).tolist() for i in range(args.prompts)]
        prompts = [shared + tail for tail in tails]
        start = time.perf_counter()
        outputs = paged.generate(prompts, args.new_tokens)
        rate = sum(map(len, outputs)) / (time.perf_counter() - start)
        same = sum(out == generated_alone(model, prompt, args.new_tokens) for prompt, out in zip(prompts, outputs))
        stats = paged.cache.stats()
        print(
            f"{batch} batch: {rate:.0f} tokens per second, {stats.tokens_found - found} of "
            f"{sum(map(len, prompts))} prompt tokens found, {same} of {len(prompts)} equal to transformers' own"
        )
        found = stats.tokens_found


if __name__ == "__main__":
    main()
