"""Every text architecture of transformers: the same results as with its own attention, or a clear refusal.

Each model is made tiny from its default configuration, through the names of its sizes. The reference computes the
attention, so the test checks which keys each query sees.
"""

import inspect
import re

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from triton_attn.interop.transformers import register

register()

SEQLEN = 9
SIZES = {
    64: "vocab_size encoder_vocab_size decoder_vocab_size text_vocab_size vocab_size_per_layer_input "
    "max_position_embeddings n_positions n_ctx max_seq_len max_position",
    32: "hidden_size n_embd d_model dim word_embed_proj_dim embedding_size emb_dim attention_hidden_size "
    "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner hidden_dim ffn_hidden_size "
    "moe_intermediate_size shared_expert_intermediate_size dense_intermediate_size intermediate_size_mlp "
    "shared_intermediate_size expert_ffn_hidden_size mamba_d_head",
    16: "head_dim attention_head_dim kv_channels d_kv global_head_dim kv_lora_rank q_lora_rank v_head_dim qk_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_d_state",
    4: "sliding_window num_local_experts num_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads "
    "num_experts_per_tok moe_k moe_topk top_k_experts mamba_n_heads linear_num_value_heads linear_num_key_heads "
    "eos_token_id",
    1: "num_key_value_heads num_kv_heads multi_query_group_num n_group topk_group n_shared_experts num_shared_experts "
    "bos_token_id decoder_start_token_id",
    0: "pad_token_id",
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
# The defaults of these fit no tiny model, or no model at all.
LATENT = {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SPECIAL = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"], LATENT),
    **dict.fromkeys(["glm_moe_dsa", "longcat_flash", "minicpm3", "mistral4", "youtu", "sarvam_mla"], LATENT),
    **dict.fromkeys(["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text"], HYBRID),
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "codegen": {"n_head": 4},  # before 5.24 its heads are in four groups
    "diffllama": {"num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "led": {"attention_window": 4},
    "longformer": {"attention_window": 4},
    "pegasus_x": {"block_size": 4},
    "xmod": {"default_language": "en_XX"},
}


def config_of(name):
    return _tiny(CONFIG_MAPPING[name], **SPECIAL.get(name, {}))


def _tiny(config_class, **special):
    default = config_class()
    sizes = {
        field: TINY[field]
        for field, value in default.to_dict().items()
        if field in TINY and isinstance(value, int) and not isinstance(value, bool)
    }
    parts = {
        field: _tiny(type(getattr(default, field))).to_dict()
        for field in getattr(config_class, "sub_configs", ())
        if isinstance(getattr(default, field, None), PreTrainedConfig)
    }
    return config_class(**{**sizes, **parts, **special})


def model_class_of(config):
    """The class with a text head, if there is one."""
    kinds = ["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM"]
    if config.is_encoder_decoder:
        kinds[:2] = kinds[1::-1]
    for kind in kinds:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING")
        if type(config) in mapping:
            return mapping[type(config)]
    return TEXT_TOWERS.get(config.model_type) or modeling_auto.MODEL_MAPPING[type(config)]


TEXT_TOWERS = {"align_text_model": transformers.AlignTextModel, "clap_text_model": transformers.ClapTextModel}
ALL = sorted(
    {"splinter", "clip_text_model", "siglip_text_model", *TEXT_TOWERS}.union(
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    & set(CONFIG_MAPPING)
)


class NotMade(Exception):
    """This architecture has no tiny model that runs with its own attention."""


def models_of(name):
    """A function that makes the model with an attention, always with the same weights."""
    with torch.device("meta"):
        model_class = model_class_of(config_of(name))
        num_parameters = sum(weight.numel() for weight in model_class(config_of(name)).parameters())
    if num_parameters > 6e6:
        raise NotMade(f"{num_parameters} parameters")

    def make(implementation):
        torch.manual_seed(0)
        model = model_class._from_config(config_of(name), attn_implementation=implementation).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.2)  # so that outputs differ from token to token
        return model

    return make


def outputs_of(model):
    """Outputs at the tokens of whole and of padded rows, and the change of earlier ones when the last token changes."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 60, (2, SEQLEN))
    padding = torch.ones_like(tokens)
    padding[0, :3] = padding[1, -2:] = 0
    changed = tokens.clone()
    changed[:, -1] = tokens[:, -1] % 50 + 4
    encoder_decoder = "decoder_input_ids" in inspect.signature(model.forward).parameters

    def call(tokens, **inputs):
        if encoder_decoder:
            inputs |= {"input_ids": first_tokens.flip(1), "decoder_input_ids": tokens}
        else:
            inputs |= {"input_ids": tokens}
        with torch.no_grad():
            return model(**inputs)[0]

    first_tokens = tokens
    whole, padded, moved = call(tokens), call(tokens, attention_mask=padding), call(changed)
    if not encoder_decoder:  # if the padding is in the encoder, every output counts
        padded = padded[padding.bool()]
    return {"whole": whole, "padded": padded, "moved": (moved - whole)[:, :-1]}


def judge(name):
    """ "right" or the refusal. Fails for anything else, and raises NotMade."""
    try:
        make = models_of(name)
        expected = outputs_of(make("eager"))
        if not all(x.isfinite().all() for x in expected.values()):
            raise NotMade("not finite")
    except Exception as error:
        raise NotMade(f"{type(error).__name__}: {error}") from error
    try:
        got = outputs_of(make("triton_attn"))
    except NotImplementedError as refusal:
        if re.search("triton_attn.*(eager|sdpa)", str(refusal)):
            return str(refusal)
        raise
    except KeyError as error:  # models with a separate class for each attention, which transformers looks up
        if error.args == ("triton_attn",):
            return str(error)
        raise
    assert expected["whole"].std() > 1e-3
    for case, x in expected.items():
        assert (got[case] - x).abs().max() < 2e-3, f"{name}: {case}"
    return "right"


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("TRITON_ATTN_BACKEND", "reference")


@pytest.mark.parametrize(
    "name",
    [
        *["llama", "gpt_oss", "gemma2", "phimoe", "cohere2", "qwen2_moe", "gpt2", "opt", "deepseek_v2"],
        *["bart", "pegasus_x", "nllb-moe", "m2m_100", "t5gemma", "mllama"],  # decoders, cross-attention
        *["bert", "modernbert", "splinter", "clap_text_model", "align_text_model"],  # encoders
    ],
)
def test_right(name):
    assert judge(name) == "right"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bloom", "BloomModel reads its attention mask by itself"),
        ("xglm", "XGLMModel reads its attention mask by itself"),
        ("gpt_neox_japanese", "GPTNeoXJapaneseModel reads its attention mask by itself"),
        ("mvp", "MvpModel reads its attention mask by itself"),
        ("led", "LEDModel reads its attention mask by itself"),
        ("bigbird_pegasus", "BigBirdPegasusModel reads its attention mask by itself"),
        ("doge", "DogeModel reads its attention mask by itself"),
        ("deepseek_v32", "DeepseekV32Model reads its attention mask by itself"),
        ("t5", "position_bias"),
        ("git", "triton_attn"),
    ],
)
def test_refused(name, message):
    assert message in judge(name)


@pytest.mark.full
def test_every_architecture(record_property):
    """No model is wrong, and none fails otherwise."""
    outcomes, wrong = {}, []
    for name in ALL:
        try:
            outcomes[name] = judge(name)
        except NotMade as error:
            outcomes[name] = error
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    right = [name for name, outcome in outcomes.items() if outcome == "right"]
    not_made = [name for name, outcome in outcomes.items() if isinstance(outcome, NotMade)]
    refused = outcomes.keys() - {*right, *not_made}
    record_property(
        "figure",
        f"transformers {transformers.__version__}: of {len(ALL)} architectures {len(right)} right, {len(refused)} "
        f"refused, {len(wrong)} wrong, {len(not_made)} without a tiny model",
    )
    assert not wrong, "\n".join(wrong)
    assert len(right) > 150
