"""vLLM's batches for tests of the door: paged caches in its layouts, and attention over them in fp64."""

from types import SimpleNamespace

import torch

HEADS, HEADS_KV, DIM, PAGE = 4, 2, 32, 16
LAYER = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(2.0))
RANK, ROPE, NOPE, V_DIM = 128, 32, 16, 24
# (keys before, new tokens): decode, a draft of 3, a chunk, a prompt, a chunk of one page, padding.
MIXED = ((20, 1), (33, 3), (17, 21), (0, 19), (16, 16), (0, 0))


def randn(*shape, seed=0, dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Batch:
    """Requests of (keys before, new tokens) with pages in any order; tensors are named as in CommonAttentionMetadata.
    `padding` tokens follow the last one, with slots of -1.
    """

    def __init__(self, requests, page=PAGE, padding=0, causal=True):
        before, new = (torch.tensor(lengths, dtype=torch.int32) for lengths in zip(*requests))
        self.seq_lens = before + new
        self.query_start_loc = torch.cat([torch.zeros(1, dtype=torch.int32), new.cumsum(0, dtype=torch.int32)])
        self.num_reqs, self.num_actual_tokens = len(requests), int(new.sum())
        self.max_query_len, self.max_seq_len = int(new.max()), int(self.seq_lens.max())
        self.causal, self.mm_req_doc_ranges = causal, None
        self.query_start_loc_cpu, self.seq_lens_cpu_upper_bound = self.query_start_loc, self.seq_lens
        self.page, self.width = page, -(-self.max_seq_len // page) + 1
        self.num_blocks = self.num_reqs * self.width + 1
        pages = torch.randperm(self.num_blocks - 1, generator=torch.Generator().manual_seed(1)) + 1
        self.block_table_tensor = pages[: self.num_reqs * self.width].view(self.num_reqs, self.width).int()
        slots = [self.slots(i, int(before[i])) for i in range(self.num_reqs)]
        self.slot_mapping = torch.cat([*slots, torch.full((padding,), -1)])
        self.num_tokens = len(self.slot_mapping)

    def slots(self, i, start=0):
        positions = torch.arange(start, int(self.seq_lens[i]))
        return self.block_table_tensor[i].long()[positions // self.page] * self.page + positions % self.page

    def queries(self, i):
        return slice(int(self.query_start_loc[i]), int(self.query_start_loc[i + 1]))


class Shard(Batch):
    """What one rank holds of a Batch with decode context parallelism: `interleave` keys of each request in turn. The
    other keys have slots of -1.
    """

    def __init__(self, requests, rank, world_size, interleave=1, **options):
        self.rank, self.world_size, self.interleave = rank, world_size, interleave
        super().__init__(requests, **options)

    def slots(self, i, start=0):
        positions = torch.arange(start, int(self.seq_lens[i]))
        turns = positions // self.interleave
        positions = turns // self.world_size * self.interleave + positions % self.interleave
        slots = self.block_table_tensor[i].long()[positions // self.page] * self.page + positions % self.page
        return slots.where(turns % self.world_size == self.rank, -1)


def cache_of(batch, layout="HND", kv_cache_dtype="auto"):
    """A `new_cache` as vLLM makes it for a kv_cache_dtype. With scales in its rows all bytes are those of NaN."""
    if not kv_cache_dtype.endswith("per_token_head"):
        return new_cache(batch, layout, torch.float16 if kv_cache_dtype == "auto" else torch.uint8)
    cache = new_cache(batch, layout, torch.uint8, dim=DIM + 4).fill_(0xFF)
    return cache.view(torch.int8) if kv_cache_dtype.startswith("int8") else cache


def new_cache(batch, layout="HND", dtype=torch.float16, heads_kv=HEADS_KV, dim=DIM):
    """(num_blocks, heads, page, 2 * dim) of NaN in either physical layout; uint8 is fp8."""
    shape = batch.num_blocks, heads_kv, batch.page, 2 * dim
    if layout == "NHD":
        shape = batch.num_blocks, batch.page, heads_kv, 2 * dim
    cache = torch.full(shape, 0x7F if dtype == torch.uint8 else torch.nan, dtype=dtype)
    return cache if layout == "HND" else cache.transpose(1, 2)


def fill_cache(impl, batch, cache, dtype=torch.float16, heads_kv=HEADS_KV, dim=DIM):
    """The keys of all requests, by the layer's own update: those before the batch, then the batch's, padded."""
    for i in range(batch.num_reqs):
        slots = batch.slots(i)
        pair = (randn(len(slots), heads_kv, dim, seed=seed + 7 * i, dtype=dtype) for seed in (2, 3))
        impl.do_kv_cache_update(LAYER, *pair, cache, slots)
    pair = (randn(batch.num_tokens, heads_kv, dim, seed=seed, dtype=dtype) for seed in (4, 5))
    impl.do_kv_cache_update(LAYER, *pair, cache, batch.slot_mapping)


def attend(q, k, v, scale, causal=True, window=None, softcap=0.0, slopes=None, sinks=None):
    """(out (new, heads, dim), lse (new, heads)) of one request in fp64; k and v have as many heads as q."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))
    if slopes is not None:
        scores = scores - torch.tensor(slopes).double()[:, None, None] * distance.abs()
    hidden = (distance > 0) & bool(causal)
    if window:
        hidden = hidden | (distance.abs() >= window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sinks = sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([sinks, scores], dim=-1)
        v = torch.cat([torch.zeros_like(v[:1]) if len(v) else v.new_zeros(1, *v.shape[1:]), v])
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0)
    return torch.einsum("hij,jhd->ihd", weights, v), lse.T


def expected_attention(batch, q, cache, kv_cache_dtype="auto", dim=DIM, **options):
    """What `forward` computes, from the cache's own contents, in fp64."""
    fp8 = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}.get(kv_cache_dtype)
    k_scale, v_scale = (1, 1) if fp8 is None else (LAYER._k_scale, LAYER._v_scale)
    if kv_cache_dtype.endswith("per_token_head"):  # elements and the bytes of a scale, for keys and for values
        k_cache, k_scale, v_cache, v_scale = cache.transpose(1, 2).flatten(0, 1).split([dim, 4, dim, 4], dim=-1)
        dtype = torch.int8 if kv_cache_dtype.startswith("int8") else torch.float8_e4m3fn
        k_cache, v_cache = (x.contiguous().view(dtype).double() for x in (k_cache, v_cache))
        k_scale, v_scale = (x.contiguous().view(torch.float32).double() for x in (k_scale, v_scale))
    else:
        cache = cache if fp8 is None else cache.view(fp8)
        k_cache, v_cache = cache.transpose(1, 2).double().flatten(0, 1).split(dim, dim=-1)
    out = torch.zeros(batch.num_actual_tokens, *q.shape[1:], dtype=torch.float64)
    for i in range(batch.num_reqs):
        rows, slots = batch.queries(i), batch.slots(i)
        group = q.shape[1] // cache.shape[1]
        k, v = (x[slots].repeat_interleave(group, dim=1) for x in (k_cache * k_scale, v_cache * v_scale))
        out[rows] = attend(q[rows], k, v, dim**-0.5, causal=batch.causal, **options)[0]
    return out


class Projection(torch.nn.Module):
    """kv_b_proj of a small model with MLA."""

    def __init__(self, heads=HEADS, dtype=torch.float16):
        super().__init__()
        self.weight = randn(heads * (NOPE + V_DIM), RANK, seed=6, dtype=dtype) * RANK**-0.5

    def forward(self, x):
        return x @ self.weight.T.to(x.dtype), None


def new_latent_cache(batch, kv_cache_dtype="auto"):
    width, dtype, fill = RANK + ROPE, torch.float16, torch.nan
    if kv_cache_dtype != "auto":
        dtype, fill = torch.uint8, 0x7F
    if kv_cache_dtype == "fp8_ds_mla":
        width = RANK + 4 * (RANK // 128) + 2 * ROPE
    return torch.full((batch.num_blocks, batch.page, width), fill, dtype=dtype)


def latents_of(batch, i, kv_cache_dtype="auto"):
    """The latent vectors and rotary keys of a request, as they are after rounding."""
    seqlen = int(batch.seq_lens[i])
    latents, ropes = randn(seqlen, RANK, seed=20 + i), randn(seqlen, ROPE, seed=40 + i)
    if kv_cache_dtype == "auto":
        return latents, ropes
    if kv_cache_dtype == "fp8":
        scale = LAYER._k_scale
        return tuple((x.float() / scale).to(torch.float8_e4m3fn).float() * scale for x in (latents, ropes))
    blocks = latents.float().unflatten(-1, (-1, 128))
    scales = torch.exp2((blocks.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-4).log2().ceil())
    return ((blocks / scales).to(torch.float8_e4m3fn).float() * scales).flatten(-2), ropes.bfloat16().float()


def fill_latent_cache(impl, batch, cache, kv_cache_dtype="auto"):
    """Writes all requests; returns the new tokens' latent vectors and rotary keys, packed."""
    new_latents, new_ropes = [], []
    for i in range(batch.num_reqs):
        latents, ropes = latents_of(batch, i)
        impl.do_kv_cache_update(latents, ropes.unsqueeze(1), cache, batch.slots(i), kv_cache_dtype, LAYER._k_scale)
        rows = batch.queries(i)
        start = len(latents) - (rows.stop - rows.start)
        new_latents.append(latents[start:])
        new_ropes.append(ropes[start:])
    return torch.cat(new_latents), torch.cat(new_ropes)


def expected_latent(batch, q_nope, q_pe, scale, causal=True, kv_cache_dtype="auto"):
    """(out (tokens, heads, RANK), lse) of absorbed queries in fp64."""
    out, lses = [], []
    for i in range(batch.num_reqs):
        rows, (latents, ropes) = batch.queries(i), latents_of(batch, i, kv_cache_dtype)
        heads = q_nope.shape[1]
        keys = torch.cat([latents, ropes], dim=-1).unsqueeze(1).expand(-1, heads, -1)
        values = latents.unsqueeze(1).expand(-1, heads, -1)
        part = attend(torch.cat([q_nope[rows], q_pe[rows]], dim=-1), keys, values, scale, causal=causal)
        out.append(part[0])
        lses.append(part[1])
    return torch.cat(out), torch.cat(lses)


def expected_prefill(batch, q, projection, scale, kv_cache_dtype="auto"):
    """(tokens, heads, V_DIM) of prefills in fp64: new tokens are exact, context is as it is in the cache."""
    out = []
    for i in range(batch.num_reqs):
        start = int(batch.seq_lens[i]) - len(q[batch.queries(i)])
        pairs = zip(latents_of(batch, i, kv_cache_dtype), latents_of(batch, i))
        latents, ropes = (torch.cat([cached[:start].double(), exact[start:].double()]) for cached, exact in pairs)
        projected = projection(latents.double())[0].unflatten(-1, (q.shape[1], -1))
        k_nope, v = projected.split([NOPE, V_DIM], dim=-1)
        k = torch.cat([k_nope, ropes.double().unsqueeze(1).expand(-1, q.shape[1], -1)], dim=-1)
        out.append(attend(q[batch.queries(i)], k, v, scale)[0])
    return torch.cat(out)


def prefill_metadata(batch, chunk=16):
    """Prefills as vLLM's builder plans them, with context of at most `chunk` keys of one request per chunk."""
    chunks = []
    for i in range(batch.num_reqs):
        rows = batch.queries(i)
        before = int(batch.seq_lens[i]) - (rows.stop - rows.start)
        for start in range(0, before, chunk):
            size = min(chunk, before - start)
            chunks.append(
                SimpleNamespace(
                    request_slice=slice(i, i + 1),
                    token_slice=rows,
                    num_context_tokens=size,
                    query_start_loc=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
                    max_query_len=rows.stop - rows.start,
                    cu_seq_lens=torch.tensor([0, size], dtype=torch.int32),
                    starts=torch.tensor([start], dtype=torch.int32),
                    max_seq_len=size,
                    token_to_seq=torch.zeros(size, dtype=torch.int32),
                )
            )
    prefill = SimpleNamespace(
        block_table=batch.block_table_tensor,
        query_start_loc=batch.query_start_loc,
        max_query_len=batch.max_query_len,
        chunked_context=SimpleNamespace(chunks=chunks) if chunks else None,
    )
    return SimpleNamespace(prefill=prefill)
