"""Attention over the GPUs of a DeviceMesh. In training and prefill the sequence of a batch is sharded, and each rank
attends for its rows; in decode the keys of a cache are, and each rank attends to its own.
"""

from .api import context_parallel_attention, context_parallel_attention_varlen
from .balance import shard_sequence, unshard_sequence
from .decode import context_parallel_mla_decode, context_parallel_paged_attention
from .mla import context_parallel_mla_prefill

__all__ = [
    "context_parallel_attention",
    "context_parallel_attention_varlen",
    "context_parallel_mla_decode",
    "context_parallel_mla_prefill",
    "context_parallel_paged_attention",
    "shard_sequence",
    "unshard_sequence",
]
