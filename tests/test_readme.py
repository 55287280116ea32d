"""The README is true: its code runs, it shows every public name, what it links to exists."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
import triton

import triton_attn
from triton_attn._host import tuned
from triton_attn.flash.configs import FlashConfig

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL))


def small_model(name, **options):
    """In place of weights to download."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes, **options)
    return transformers.LlamaForCausalLM(config)


def tuned_table():
    """As a sweep writes it."""
    case, tile = {"head_dim": 64, "head_dim_v": 64, "causal": True}, FlashConfig(64, 64, 4, 2)
    about = {"figure": 1.0, "unit": "TFLOP/s", "source": "measured", "device": "a test", "commit": None}
    about |= {"triton": triton.__version__, "torch": torch.__version__}
    entry = {"family": "flash", "dtype": "bfloat16", "case": case, "buckets": {"seqlen_k": 64}, "config": asdict(tile)}
    return json.dumps({"format": tuned.FORMAT, "arch": "sm_90", "entries": [entry | about]})


def test_its_code_runs(device, monkeypatch, tmp_path):
    (tmp_path / "tuned.json").write_text(tuned_table())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuned, "_archs_here", lambda: ["sm_90"])
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", small_model)
    names = {}
    try:
        exec(CODE.replace('device = "cuda"', f'device = "{device}"'), names)
    finally:
        triton_attn.use_tuned(None)
    assert all(names[tensor].grad.isfinite().all() for tensor in ("q", "k", "v", "sinks"))
    assert names["model"].config._attn_implementation == "triton_attn"


def test_it_shows_every_public_name():
    assert [name for name in triton_attn.__all__ if not re.search(rf"\b{name}\b", CODE)] == []


def test_what_it_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
