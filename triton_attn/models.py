"""Attention shapes of real models, from the config.json of each on the Hugging Face hub."""

from dataclasses import dataclass
from typing import Literal

from ._host.checks import fail


@dataclass(frozen=True)
class Model:
    """`head_dim_v` is None if it equals `head_dim`. `num_windowed_layers` of the `num_layers` see only `window` keys.

    With `kv_lora_rank` the model uses MLA: it caches `kv_lora_rank + qk_rope_head_dim` elements per token and layer,
    and prefills with `num_heads_q` heads of `head_dim` (the query-key width) and `head_dim_v`.
    """

    name: str
    num_layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int | None = None
    window: int | None = None
    num_windowed_layers: int = 0
    sinks: bool = False
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None

    @property
    def attention(self) -> Literal["MHA", "GQA", "MQA", "MLA"]:
        """MHA, GQA, MQA or MLA."""
        if self.kv_lora_rank is not None:
            return "MLA"
        if self.num_heads_kv == 1:
            return "MQA"
        return "MHA" if self.num_heads_kv == self.num_heads_q else "GQA"


LLAMA_2_7B = Model("Llama-2-7B", 32, 32, 32, 128)  # meta-llama/Llama-2-7b-hf
LLAMA_3_8B = Model("Llama-3-8B", 32, 32, 8, 128)  # meta-llama/Meta-Llama-3-8B
LLAMA_3_70B = Model("Llama-3-70B", 80, 64, 8, 128)  # meta-llama/Meta-Llama-3-70B
QWEN3_32B = Model("Qwen3-32B", 64, 64, 8, 128)  # Qwen/Qwen3-32B
FALCON_7B = Model("Falcon-7B", 32, 71, 1, 64)  # tiiuae/falcon-7b
# google/gemma-3-12b-pt: five layers of six see a window.
GEMMA_3_12B = Model("Gemma-3-12B", 48, 16, 8, 256, window=1024, num_windowed_layers=40)
# openai/gpt-oss-120b: every other layer sees a window.
GPT_OSS_120B = Model("gpt-oss-120b", 36, 64, 8, 64, window=128, num_windowed_layers=18, sinks=True)
# deepseek-ai/DeepSeek-V2-Lite and DeepSeek-V3: 128 + 64 wide queries and keys, 128 wide values.
DEEPSEEK_V2_LITE = Model("DeepSeek-V2-Lite", 27, 16, 16, 192, head_dim_v=128, kv_lora_rank=512, qk_rope_head_dim=64)
DEEPSEEK_V3 = Model("DeepSeek-V3", 61, 128, 128, 192, head_dim_v=128, kv_lora_rank=512, qk_rope_head_dim=64)

MODELS = (
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    QWEN3_32B,
    FALCON_7B,
    GEMMA_3_12B,
    GPT_OSS_120B,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
)


def model_named(name: str) -> Model:
    """The model with this name, in any case. ValueError lists the names."""
    found = next((model for model in MODELS if model.name.lower() == str(name).lower()), None)
    if found is None:
        fail("model", " or ".join(model.name.lower() for model in MODELS), repr(name))
    return found
