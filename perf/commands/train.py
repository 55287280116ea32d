"""A small decoder learns a real text, once with our attention and once with torch's: the same curve, both directions.

Six sonnets by Shakespeare, character by character; a decoder with grouped query heads, rotary positions and two layers,
in fp32, from one seed. A model that knew only how often each character comes would stay at the unigram entropy.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import trange

import triton_attn
from perf import results
from perf.harness.device import has_gpu, provenance
from perf.results import plot
from perf.results.tables import print_table

TEXT = Path(__file__).parents[1] / "data" / "sonnets.txt"
COLUMNS = ["step", "provider", "loss", "unigram_entropy", "bound", "device", "driver", "torch", "triton", "commit"]
BOUND = 1e-2  # nats by which the two losses may be apart at any step


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=150)


def run(out_dir, steps=150):
    """Write `training.csv` and its picture, print the ends of both curves; exits with an error if they part."""
    device = "cuda" if has_gpu() else "cpu"
    tokens, vocabulary_size = read_text(device)
    entropy = unigram_entropy(tokens)
    path = out_dir / "training.csv"
    curves = {name: [] for name in ATTENTIONS}
    with results.Table(path, COLUMNS) as table:
        for name, attention in ATTENTIONS.items():
            for step, loss in enumerate(train(attention, tokens, vocabulary_size, steps, name)):
                table.append([step, name, loss, entropy, BOUND, *provenance().values()])
                curves[name].append(loss)
    ours, theirs = curves.values()
    rows = [{"provider": name, "first loss": losses[0], "last loss": losses[-1]} for name, losses in curves.items()]
    print_table([row | {"unigram entropy": entropy} for row in rows])
    apart = max(abs(a - b) for a, b in zip(ours, theirs))
    print(f"largest difference of the two losses at any step: {apart:.2g} nats, bound {BOUND:g}")
    pictures = plot.draw(path)
    if not apart < BOUND:
        sys.exit("the two losses are further apart than their bound")
    return [path, *pictures]


def read_text(device):
    """The text as character ids, and how many different characters there are."""
    text = TEXT.read_text()
    characters = sorted(set(text))
    return torch.tensor([characters.index(c) for c in text], device=device), len(characters)


def unigram_entropy(tokens):
    """Nats per character of the text's own character frequencies."""
    frequencies = tokens.bincount().double() / len(tokens)
    return -torch.special.xlogy(frequencies, frequencies).sum().item()


def train(attention, tokens, vocabulary_size, steps, name, batch_size=2, seqlen=64, seed=0):
    """Yield the losses of `steps` steps of AdamW on random excerpts; model and excerpts follow from the seed."""
    torch.manual_seed(seed)
    model = Decoder(vocabulary_size, attention).to(tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in (bar := trange(steps, desc=f"train, {name}")):
        starts = torch.randint(len(tokens) - seqlen, (batch_size, 1), generator=generator).to(tokens.device)
        excerpt = tokens[starts + torch.arange(seqlen + 1, device=tokens.device)]
        logits = model(excerpt[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), excerpt[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        yield loss.item()


class Decoder(nn.Module):
    def __init__(self, vocabulary_size, attention, dim=64, num_layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, dim)
        self.layers = nn.ModuleList(Layer(dim, attention) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary_size, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Layer(nn.Module):
    def __init__(self, dim, attention, num_heads_q=4, num_heads_kv=2, head_dim=16):
        super().__init__()
        self.attention = attention
        self.heads = (num_heads_q, num_heads_kv, num_heads_kv)
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, sum(self.heads) * head_dim, bias=False)
        self.out = nn.Linear(num_heads_q * head_dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (sum(self.heads), -1))
        q, k, v = qkv.split(self.heads, dim=2)
        x = x + self.out(self.attention(rotate(q), rotate(k), v).flatten(2))
        return x + self.mlp(self.norm_2(x))


def rotate(x, base=10000.0):
    """Rotary positions (arXiv:2104.09864) on (batch, seqlen, heads, head_dim), halves as pairs."""
    seqlen, half = x.shape[1], x.shape[3] // 2
    frequencies = base ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(seqlen, device=x.device)[:, None, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _ours(q, k, v):
    return triton_attn.flash_attention(q, k, v, causal=True)


def _torchs(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


ATTENTIONS = {results.OURS: _ours, "SDPA": _torchs}
