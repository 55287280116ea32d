"""A whole decode step of a small Llama over a paged cache as one graph, which is not recompiled for lengths and
batches.
"""

import os

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from triton_attn import PagedKVCache, append_kv_cache, paged_attention

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
VOCAB, WIDTH, LAYERS, HEADS, HEADS_KV, DIM, PAGE = 50, 32, 2, 4, 2, 16, 4


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, (HEADS + 2 * HEADS_KV) * DIM, bias=False)
        self.out = torch.nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x, k_cache, v_cache, step, rope):
        rows = self.qkv(rms_norm(x, (WIDTH,))).unflatten(-1, (-1, DIM))
        q, k, v = rows.split([HEADS, HEADS_KV, HEADS_KV], dim=-2)
        positions, slots, cache_seqlens, block_table = step
        append_kv_cache(k, v, k_cache, v_cache, slots, positions=positions, **rope)
        cos, sin = (table[positions].unsqueeze(1) for table in rope.values())
        a, b = q.chunk(2, dim=-1)
        q = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        out = paged_attention(q.unsqueeze(1), k_cache, v_cache, cache_seqlens, block_table)
        x = x + self.out(out.flatten(1))
        gate, up = self.up(rms_norm(x, (WIDTH,))).chunk(2, dim=-1)
        return x + self.down(silu(gate) * up)


class Llama(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        angles = torch.arange(64)[:, None] * 100.0 ** -torch.linspace(0, 1, DIM // 2)
        self.register_buffer("rope_cos", angles.cos())
        self.register_buffer("rope_sin", angles.sin())

    def forward(self, tokens, k_cache, v_cache, step):
        rope = {"rope_cos": self.rope_cos, "rope_sin": self.rope_sin}
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, k_cache[i], v_cache[i], step, rope)
        return rms_norm(x, (WIDTH,)) @ self.embed.weight.T


def generate(model, batches):
    """Logits of every step. In each, as many sequences as the batch size get their own token."""
    cache = PagedKVCache(
        32, PAGE, num_layers=LAYERS, num_kv_heads=HEADS_KV, head_dim=DIM, dtype=torch.float32, device=DEVICE
    )
    seqs = [cache.create([])[0] for _ in range(max(batches))]
    logits = []
    for step, batch in enumerate(batches):
        here = seqs[:batch]
        tokens = [[(7 * step + 3 * i) % VOCAB] for i in range(batch)]
        positions = torch.tensor([len(seq) for seq in here], device=DEVICE)
        slots = cache.extend(here, tokens)
        # Twice as wide, since a width of 1 cannot be marked dynamic. The second half is never read.
        where = positions, slots, cache.cache_seqlens(here), cache.block_table(here).repeat(1, 2)
        tokens = torch.tensor(tokens, device=DEVICE)[:, 0]
        for x in (tokens, *where):
            torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(where[-1], 1)
        logits.append(model(tokens, cache.k_cache, cache.v_cache, where))
        cache.commit(here)
    return logits


@pytest.mark.ci
@torch.no_grad()
def test_a_decode_step_is_one_graph():
    torch.manual_seed(0)
    model = Llama().to(DEVICE)
    batches = [3, 3, 2, 2, 4, 4, 3]
    expected = generate(model, batches)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        actual = generate(compiled, batches)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    finally:
        torch._dynamo.reset()
    for x, y in zip(actual, expected):
        torch.testing.assert_close(x, y)
    assert not torch.equal(expected[0][0], expected[1][0])
