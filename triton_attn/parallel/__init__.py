"""Attention over the GPUs of a DeviceMesh: the sequence of a batch is sharded, and each rank attends for its rows."""

from .api import context_parallel_attention, context_parallel_attention_varlen
from .balance import shard_sequence, unshard_sequence

__all__ = [
    "context_parallel_attention",
    "context_parallel_attention_varlen",
    "shard_sequence",
    "unshard_sequence",
]
