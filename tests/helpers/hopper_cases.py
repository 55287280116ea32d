"""Random calls that the kernels of hopper.py support. Nothing here needs hypothesis, which a machine with a GPU may not
have."""

import contextlib
import json
import random
from dataclasses import replace
from unittest import mock

import attention_cases
import decode_cases
import torch
import triton

from triton_attn import override_config
from triton_attn._host import tuned
from triton_attn._host.config import FAMILIES
from triton_attn._host.sources import kernel_digest
from triton_attn.dense.tiles import FlashCase
from triton_attn.flash import hopper
from triton_attn.flash.configs import HOPPER_HEAD_DIMS, HopperConfig

LATENT_WIDTHS = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, kv_lora_rank=512, v_head_dim=128)


def write_record(path, **entry):
    """Write a table of sm_90 with one measured entry of the installed Triton and of the package's kernel to the path,
    and return it."""
    about = {"figure": 600.0, "portable": 500.0, "unit": "TFLOP/s", "source": "measured", "device": "NVIDIA H100"}
    about |= {"kernel": kernel_digest(FAMILIES[entry["family"]].kernel)}
    about |= {"triton": triton.__version__, "torch": torch.__version__, "commit": None}
    path.write_text(json.dumps({"format": tuned.FORMAT, "arch": "sm_90", "entries": [about | entry]}))
    return path


@contextlib.contextmanager
def launched(module, launcher):
    """TRITON_ATTN_KERNELS is hopper, and the module calls this launcher of hopper.py."""
    launch = mock.Mock(wraps=getattr(module, launcher))
    with (
        mock.patch.dict("os.environ", TRITON_ATTN_KERNELS="hopper"),
        mock.patch.object(module, launcher, launch),
    ):
        yield
    assert launch.called


@contextlib.contextmanager
def several_tiles(tiles=None):
    """Programs of flash/hopper.py compute as many tiles of queries as their config says, however few programs that
    leaves; tiles is the config's, None keeps it."""
    fields = {} if tiles is None else {"tiles": tiles}
    with (
        mock.patch.object(hopper, "_tiles_per_program", lambda most, *_: most),
        override_config("flash_hopper", **fields),
    ):
        yield


def series(number):
    """A call of flash attention whose programs have up to 8 tiles of queries; see `attention`."""
    draw = random.Random(f"series {number}")
    lengths_q, lengths_k = (0, 1, 64, 129, 200, 330, 700), (0, 1, 128, 129, 330, 700)
    case = attention(number, lengths_q, lengths_k, draw.choice((64, 96, 128)), most=2)
    shape = FlashCase("sm_90", case.dtype, case.head_dim, case.head_dim_v, case.causal)
    config = replace(case.config, tiles=draw.choice((2, 3, 4, 8)))
    while config.obstacle(shape):
        config = replace(config, num_stages=config.num_stages - 1)
    return replace(case, config=config)


def attention(seed, lengths_q, lengths_k, head_dim=None, most=3):
    """A call of flash_attention or flash_attention_varlen with sequences of these lengths, at most so many sequences
    and KV heads, and at most twice as many query heads for each. head_dim None: drawn."""
    draw = random.Random(seed)
    head_dim = head_dim or draw.choice(list(HOPPER_HEAD_DIMS))
    dtype, causal, varlen = draw.choice((torch.bfloat16, torch.float16)), draw.random() < 0.7, draw.random() < 0.5
    configs = HopperConfig.search_space(FlashCase("sm_90", dtype, head_dim, HOPPER_HEAD_DIMS[head_dim], causal))
    batch = draw.randint(1, most)
    # Not all are empty: the kernel would have nothing to do.
    of_batch = [(draw.choice([n for n in lengths_q if n]), draw.choice([n for n in lengths_k if n]))]
    if varlen:
        of_batch += [(draw.choice(lengths_q), draw.choice(lengths_k)) for _ in range(batch - 1)]
    else:
        of_batch *= batch
    seqlens_q, seqlens_k = zip(*of_batch)
    return replace(
        attention_cases.PLAIN,
        varlen=varlen,
        dtype=dtype,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        num_heads_kv=draw.randint(1, most),
        group_size=draw.choice((1, 2, 2 * most)),
        head_dim=head_dim,
        head_dim_v=HOPPER_HEAD_DIMS[head_dim],
        causal=causal,
        **_scores(draw, dtype),
        shards=_shards(draw, batch, max(lengths_k)),
        softmax_scale=draw.choice((None, 0.01, 1.0)),
        layouts=tuple(draw.choice(("contiguous", "heads first", "sliced and aligned")) for _ in range(3)),
        poison=draw.choice((attention_cases.NAN, float("inf"))),
        poisoned_sequence=draw.randrange(batch) if varlen and batch > 1 else None,
        spare_rows=draw.choice((0, 1, 150)) if varlen else 0,
        config=draw.choice(configs),
        seed=seed,
    )


def _scores(draw, dtype):
    """Options of the scores; a third of the calls have none."""
    if draw.random() < 0.33:
        return {}
    sides = (-1, 0, 1, 20, 100, 128, 300, 1000)
    return {
        "window_size": (draw.choice(sides), draw.choice(sides)) if draw.random() < 0.6 else (-1, -1),
        "softcap": draw.choice((1.0, 20.0)) if draw.random() < 0.4 else 0.0,
        "alibi": draw.choice(("per head", "per sequence")) if draw.random() < 0.4 else None,
        "sinks": draw.choice((torch.float32, dtype)) if draw.random() < 0.4 else None,
    }


def _shards(draw, batch, longest):
    """Parts of longer sequences, some of whose queries come before or after all keys; or None."""
    if draw.random() < 0.75:
        return None
    return tuple((draw.randint(0, longest), draw.randint(0, longest), 0) for _ in range(batch))


def decode(seed, lengths, dtype=None, most=5):
    """A call that hopper.py supports, with contexts of these lengths, and at most so many sequences and queries of
    each. dtype is that of the cache, of which float8_e4m3fn stands for rows of bytes; None draws it."""
    draw = random.Random(seed)
    weights = draw.random() < 0.3
    dtype = dtype or draw.choice((torch.bfloat16, torch.float16, torch.float8_e4m3fn))
    is_fp8, page_size = dtype == torch.float8_e4m3fn, draw.choice((64, 128, 192))
    key_shard = (draw.randint(0, 2), 3, draw.choice((1, page_size))) if draw.random() < 0.3 else None
    return decode_cases.Case(
        dtype=torch.bfloat16 if is_fp8 else dtype,
        is_fp8=is_fp8,
        page_size=page_size,
        seqlen_q=draw.choice((1, 1, 2, most)),
        seqlens_k=tuple(draw.choice(lengths) for _ in range(draw.randint(1, most))),
        num_heads=draw.choice((64, 128, 192)),
        causal=draw.random() < 0.7,
        num_splits=draw.choice((0, 1, 2, 5, 20)),
        q_layout=draw.choice(("contiguous", "heads first")),
        rotary_dim=draw.choice((0, 64)) if weights and key_shard is None else 0,
        with_uk=weights,
        with_uv=weights,
        softmax_scale=None if weights else draw.choice((0.01, 0.07, 1.0)),
        key_shard=key_shard,
        seed=seed,
        **LATENT_WIDTHS,
    )
