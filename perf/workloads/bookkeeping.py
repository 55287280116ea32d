"""The same page bookkeeping by `PagedKVCache` and by vLLM's own `KVCacheManager`, for `python -m perf cache --peer`.

Both find and allocate pages, name full ones by a hash of their tokens, and keep counts. Ours also makes the tensors of
slots, block tables and lengths in a decode step, which vLLM leaves to its workers.
"""

import random
import time
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from triton_attn import PagedKVCache

PAGE_SIZE = 16
STEPS_PER_ROUND = 2 * PAGE_SIZE  # each sequence fills two pages
CALLS_PER_ROUND = 8


class Ours:
    def __init__(self, num_pages):
        shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1}
        self.cache = PagedKVCache(num_pages, PAGE_SIZE, **shape, dtype=torch.float16, device="cpu")
        self.cache._copy_pages = lambda src_pages, dst_pages: None  # it is the GPU's work
        self.step = self.cache.step(max_batch=256, max_seqlen=2**13)

    def admit(self, prompt):
        seq, cached = self.cache.create(prompt)
        self.cache.extend([seq], [prompt[cached:]])
        self.cache.commit([seq])
        return seq

    def decode(self, seqs, tokens):
        self.step.extend(seqs, [[token] for token in tokens])

    def free(self, seqs):
        self.cache.free(seqs)

    def fork(self, seqs, tokens):
        """Beams that continue `seqs`, each by one token."""
        beams = self.cache.fork(seqs)
        self.cache.extend(beams, [[token] for token in tokens])
        return beams

    def allocate(self):
        return self.cache.pool.allocate(1)

    def release(self, pages):
        for page in pages:
            self.cache.pool.release(page)


class Beam(NamedTuple):
    """A fork that is made by hand: vLLM has none."""

    blocks: list
    token_ids: list


class Vllm:
    """vLLM as its scheduler calls it, with its default hash. A fork is made by hand of its pool's operations."""

    def __init__(self, num_pages):
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request

        hash_of = get_hash_fn_by_name("sha256")
        init_none_hash(hash_of)
        spec = FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float16)
        config = KVCacheConfig(num_pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(config, 2**20, scheduler_block_size=PAGE_SIZE, hash_block_size=PAGE_SIZE)
        self.request = partial(
            Request,
            sampling_params=SamplingParams(max_tokens=2**20),
            pooling_params=None,
            block_hasher=get_request_block_hasher(PAGE_SIZE, hash_of),
        )
        self.num_requests = 0

    def admit(self, prompt):
        self.num_requests += 1
        request = self.request(str(self.num_requests), prompt)
        blocks, cached, _ = self.manager.get_computed_blocks(request)
        self._allocate(request, len(prompt) - cached, num_new_computed_tokens=cached, new_computed_blocks=blocks)
        request.num_computed_tokens = len(prompt)
        return request

    def decode(self, requests, tokens):
        for request, token in zip(requests, tokens):
            request.append_output_token_ids(token)
            self._allocate(request, 1)
            request.num_computed_tokens += 1

    def free(self, requests):
        for request in requests:
            if isinstance(request, Beam):
                self.manager.block_pool.free_blocks(reversed(request.blocks))
            else:
                self.manager.free(request)

    def fork(self, beams, tokens):
        """Full blocks are shared, and the last one, which is not full, is copied. Full ones are not hashed."""
        pool, forks, copies = self.manager.block_pool, [], []
        for beam, token in zip(beams, tokens):
            if not isinstance(beam, Beam):
                blocks = self.manager.get_blocks(beam.request_id).blocks[0]
                beam = Beam(list(blocks), list(beam.all_token_ids))
            pool.touch(beam.blocks[:-1])
            (last,) = pool.get_new_blocks(1)
            copies.append((beam.blocks[-1].block_id, last.block_id))
            forks.append(Beam([*beam.blocks[:-1], last], [*beam.token_ids, token]))
        return forks

    def allocate(self):
        return self.manager.block_pool.get_new_blocks(1)

    def release(self, blocks):
        for block in blocks:
            self.manager.block_pool.free_blocks(block)

    def _allocate(self, request, num_new_tokens, **cached):
        if self.manager.allocate_slots(request, num_new_tokens, **cached) is None:
            raise RuntimeError("vLLM's pool is full: expected room for the workload")


MANAGERS = {"triton_attn": Ours, "vllm": Vllm}


@dataclass(frozen=True)
class Decode:
    """A token for each of `batch` sequences, which end at different places of their pages."""

    batch: int
    bar: float
    context: int = 1024

    @property
    def name(self):
        return f"decode step, {self.batch} sequences"

    def __call__(self, manager):
        tokens = Tokens()
        seqs = [manager.admit(tokens(self.context - i % PAGE_SIZE)) for i in range(self.batch)]

        def measure():
            """Of all steps together: most have nothing to allocate, and a median would not see the others."""
            new = [tokens(self.batch) for _ in range(STEPS_PER_ROUND)]
            return [_timed(lambda: [manager.decode(seqs, step) for step in new])[0] / STEPS_PER_ROUND]

        return measure


@dataclass(frozen=True)
class Admit:
    """A prompt that is found whole, or not at all; or its end."""

    what: str
    bar: float = 1.3
    length: int = 4096

    @property
    def name(self):
        return f"{self.what}, {self.length} tokens"

    def __call__(self, manager):
        tokens = Tokens()
        prompt = tokens(self.length)

        def measure():
            times = []
            for _ in range(CALLS_PER_ROUND):
                admitted, seq = _timed(manager.admit, prompt if self.what == "admit, found" else tokens(self.length))
                freed, _ = _timed(manager.free, [seq])
                times.append(freed if self.what == "free" else admitted)
            return times

        return measure


@dataclass(frozen=True)
class Beams:
    """A step of beam search: forks of some beams replace all, and each gets a token."""

    width: int = 8
    bar: float = 1.0
    context: int = 1029

    @property
    def name(self):
        return f"beam step, {self.width} beams"

    def __call__(self, manager):
        tokens = Tokens()

        def measure():
            prompt = manager.admit(tokens(self.context))
            beams, times = manager.fork([prompt] * self.width, tokens(self.width)), []
            manager.free([prompt])
            for _ in range(CALLS_PER_ROUND):
                parents = [tokens.rng.choice(beams) for _ in beams]
                taken, children = _timed(manager.fork, parents, tokens(self.width))
                freed, _ = _timed(manager.free, beams)
                times.append(taken + freed)
                beams = children
            manager.free(beams)
            return times

        return measure


class Allocate:
    """One page."""

    name = "allocate, 1 page"
    bar = 0.5

    def __call__(self, manager):
        def measure():
            taken, pages = _timed(lambda: [manager.allocate() for _ in range(200)])
            manager.release(pages)
            return [taken / 200]

        return measure


class Tokens:
    """Lists of token ids, the same for every manager."""

    def __init__(self):
        self.rng = random.Random(0)

    def __call__(self, n):
        return [self.rng.randrange(2**17) for _ in range(n)]


# The peer's time is to be at least `bar` of ours.
WORKLOADS = [
    Decode(1, bar=0.8),
    Decode(8, bar=1.0),
    Decode(64, bar=2.0),
    Decode(256, bar=5.0),
    *map(Admit, ("admit, new", "admit, found", "free")),
    Beams(),
    Allocate(),
]


def _timed(function, *args):
    """(seconds of this thread, result)"""
    start = time.thread_time()
    result = function(*args)
    return time.thread_time() - start, result
