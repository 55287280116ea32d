"""What there is to attend with: the plain case of each family and of each of its schedules, and what checks a case."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import attention_cases
import backward_cases
import decode_cases
import paged_cases
import prefill_cases
import torch

from triton_attn.mla.schedule import MODES


@dataclass(frozen=True)
class Family:
    plain: Any  # a Case
    check: Callable  # of a Case: against fp64, outputs poisoned, what is loaded and stored counted
    dense: bool = True  # whether all sequences have as many queries

    def takes(self, options):
        return options.keys() <= {field.name for field in fields(self.plain)}

    def with_options(self, options):
        return replace(self.plain, **options)

    def with_lengths(self, seqlens_q, seqlens_k):
        if isinstance(self.plain, decode_cases.Case):
            return replace(self.plain, seqlen_q=seqlens_q[0] if seqlens_q else 1, seqlens_k=seqlens_k)
        return replace(self.plain, seqlens_q=seqlens_q, seqlens_k=seqlens_k)


def _packed(case, **fields):
    return replace(case, seqlens_q=(5, 0, 33), seqlens_k=(40, 3, 20), **fields)


def _families():
    flash, backward, paged = attention_cases.PLAIN, backward_cases.PLAIN, paged_cases.PLAIN
    yield "flash", Family(flash, attention_cases.check)
    yield "flash packed", Family(_packed(flash, varlen=True), attention_cases.check, dense=False)
    yield "backward split", Family(backward, backward_cases.check)
    yield "backward fused", Family(replace(backward, deterministic=False), backward_cases.check)
    packed = _packed(backward, varlen=True, sinks=torch.float32)
    yield "backward split packed", Family(packed, backward_cases.check, dense=False)
    yield "backward fused packed", Family(replace(packed, deterministic=False), backward_cases.check, dense=False)
    yield "paged", Family(paged, paged_cases.check)
    yield "paged splits", Family(replace(paged, num_splits=3), paged_cases.check)
    tree = dict(forks=(None, (0, 1), (0, 2)), part=1)
    yield "paged packed", Family(_packed(paged, varlen=True, **tree), paged_cases.check, dense=False)
    yield "mla decode", Family(decode_cases.Case(), decode_cases.check)
    yield "mla decode splits", Family(decode_cases.Case(num_splits=3), decode_cases.check)
    for mode in MODES:
        yield f"mla prefill {mode}", Family(prefill_cases.Case(mode), prefill_cases.check)
        case = _packed(prefill_cases.Case(mode), packed=True)
        yield f"mla prefill {mode} packed", Family(case, prefill_cases.check, dense=False)


FAMILIES = dict(_families())
