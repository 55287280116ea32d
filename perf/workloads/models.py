"""The models of the package, as the parts of `python -m perf` use them."""

from triton_attn.models import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    FALCON_7B,
    GEMMA_3_12B,
    GPT_OSS_120B,
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    MODELS,
    QWEN3_32B,
    Model,
)

__all__ = [
    "DEEPSEEK_V2_LITE",
    "DEEPSEEK_V3",
    "FALCON_7B",
    "GEMMA_3_12B",
    "GPT_OSS_120B",
    "LLAMA_2_7B",
    "LLAMA_3_8B",
    "LLAMA_3_70B",
    "MODELS",
    "QWEN3_32B",
    "Model",
]
