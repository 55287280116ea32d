"""python -m triton_attn COMMAND. `warmup` compiles a model's kernels ahead, as `triton_attn.warmup` does."""

import argparse
import inspect
import os
import sys

import torch

from ._warmup import warmup
from .models import MODELS

DTYPES = ("float16", "bfloat16", "float32")
CACHE_DTYPES = (*DTYPES, "float8_e4m3fn", "float8_e5m2")
# Shapes and options with one integer each, named as in `warmup`.
NUMBERS = {
    "num_heads_q": int,
    "num_heads_kv": int,
    "head_dim": int,
    "head_dim_v": int,
    "kv_lora_rank": int,
    "qk_rope_head_dim": int,
    "tensor_parallel_size": int,
    "context_parallel_size": int,
    "interleave": int,
    "page_size": int,
    "softcap": float,
    "rotary_dim": int,
    "dropout_p": float,
    "max_seqlen": int,
}


def main(argv=None):
    options = vars(_parser().parse_args(argv))
    options.pop("command")
    for name in ("dtype", "kv_cache_dtype"):
        if name in options:
            options[name] = getattr(torch, options[name])
    try:
        result = warmup(**options, report=print)
    except (TypeError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"{result.compiled} kernels compiled, {result.cached} in the cache, {result.seconds:.0f} s")


def _parser():
    """Options that are not given keep the defaults of `warmup`."""
    commands = argparse.ArgumentParser("python -m triton_attn", description="Commands of triton_attn.")
    parser = commands.add_subparsers(dest="command", metavar="COMMAND", required=True).add_parser(
        "warmup",
        help="compile the kernels of a model's calls ahead",
        description=inspect.getdoc(warmup),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--model", help=", ".join(model.name.lower() for model in MODELS))
    parser.add_argument("--arch", help='"sm_90", "gfx942", ... (default: the GPU here)')
    parser.add_argument("--functions", nargs="+", metavar="NAME")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES)
    for name, kind in NUMBERS.items():
        parser.add_argument(_flag(name), type=kind)
    parser.add_argument("--window-size", type=int, nargs=2, metavar=("LEFT", "RIGHT"))
    for name in ("causal", "sinks"):
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction)
    for name in ("alibi", "rope_interleaved", "deterministic", "batch_invariant"):
        parser.add_argument(_flag(name), action="store_true")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count(), help="default: %(default)s")
    return commands


def _flag(name):
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    main()
