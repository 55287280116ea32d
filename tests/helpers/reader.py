"""What somebody has who types the code of the docs: the table of a sweep, and weights to download."""

import contextlib
import json
import os
from dataclasses import asdict
from unittest import mock

import torch
import transformers
import triton

import triton_attn
from triton_attn._host import tuned
from triton_attn.flash.configs import FlashConfig


def small_model(name, **options):
    """A model instead of downloaded weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes, **options)
    return transformers.LlamaForCausalLM(config)


def tuned_table():
    """A table as a sweep writes it."""
    case, tile = {"head_dim": 64, "head_dim_v": 64, "causal": True}, FlashConfig(64, 64, 4, 2)
    about = {"figure": 1.0, "unit": "TFLOP/s", "source": "measured", "device": "a test", "commit": None}
    about |= {"triton": triton.__version__, "torch": torch.__version__}
    entry = {"family": "flash", "dtype": "bfloat16", "case": case, "buckets": {"seqlen_k": 64}, "config": asdict(tile)}
    return json.dumps({"format": tuned.FORMAT, "arch": "sm_90", "entries": [entry | about]})


@contextlib.contextmanager
def at_the_desk_of_a_reader(folder):
    """The working directory is the folder, with tuned.json of an H100 in it."""
    (folder / "tuned.json").write_text(tuned_table())
    before = os.getcwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.object(tuned, "_gpus_here", return_value=[("sm_90", "NVIDIA H100")]),
            mock.patch.object(transformers.AutoModelForCausalLM, "from_pretrained", small_model),
        ):
            yield
    finally:
        os.chdir(before)
        triton_attn.use_tuned(None)
