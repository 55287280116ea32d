"""The README is true: its code runs, it shows every public name, what it links to exists."""

import re
from pathlib import Path

import transformers

import triton_attn

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL))


def small_model(name, **options):
    """In place of weights to download."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes, **options)
    return transformers.LlamaForCausalLM(config)


def test_its_code_runs(device, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", small_model)
    names = {}
    exec(CODE.replace('device = "cuda"', f'device = "{device}"'), names)
    assert all(names[tensor].grad.isfinite().all() for tensor in ("q", "k", "v", "sinks"))
    assert names["model"].config._attn_implementation == "triton_attn"


def test_it_shows_every_public_name():
    assert [name for name in triton_attn.__all__ if not re.search(rf"\b{name}\b", CODE)] == []


def test_what_it_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
