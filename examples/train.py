"""Train a small decoder on a real text, once with our attention and once with torch's. Both loss curves agree.

    TRITON_INTERPRET=1 python examples/train.py    # without a GPU the kernels run in Triton's interpreter

The text is six sonnets by Shakespeare, tokenized by character. The decoder is a Llama of two layers (RMSNorm, rotary
positions, grouped query heads, SwiGLU), in fp32, with one seed. A model that only knew the character frequencies would
reach the unigram entropy.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from triton_attn import flash_attention

TEXT = Path(__file__).parent / "sonnets.txt"
BOUND = 1e-2  # largest difference of the two losses at any step, in nats


def main(steps=150):
    """Print both curves and their largest difference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, vocabulary_size = read_text(device)
    curves = {name: [] for name in ATTENTIONS}
    for name, attention in ATTENTIONS.items():
        for step, loss in enumerate(train(attention, tokens, vocabulary_size, steps)):
            curves[name].append(loss)
            if step % 10 == 9:
                print(f"{name}, step {step + 1}: loss {loss:.3f} nats per character", flush=True)
    apart = max(abs(a - b) for a, b in zip(*curves.values()))
    print(f"unigram entropy: {unigram_entropy(tokens):.3f} nats per character")
    print(f"largest difference of the two losses at any step: {apart:.2g} nats")
    if not apart < BOUND:
        raise SystemExit(f"the two losses differ by more than {BOUND:g} nats")
    return curves


def read_text(device):
    """The text as character ids, and the number of different characters."""
    text = TEXT.read_text()
    characters = sorted(set(text))
    return torch.tensor([characters.index(c) for c in text], device=device), len(characters)


def unigram_entropy(tokens):
    """Entropy of the text's character frequencies, in nats per character."""
    frequencies = tokens.bincount().double() / len(tokens)
    return -torch.special.xlogy(frequencies, frequencies).sum().item()


def train(attention, tokens, vocabulary_size, steps, batch_size=2, seqlen=64, seed=0):
    """Yield the losses of `steps` steps of AdamW on random excerpts. Model and excerpts follow from the seed."""
    torch.manual_seed(seed)
    model = Decoder(vocabulary_size, attention).to(tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - seqlen, (batch_size, 1), generator=generator).to(tokens.device)
        excerpt = tokens[starts + torch.arange(seqlen + 1, device=tokens.device)]
        logits = model(excerpt[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), excerpt[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


class Decoder(nn.Module):
    def __init__(self, vocabulary_size, attention, dim=64, num_layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, dim)
        self.layers = nn.ModuleList(Layer(dim, attention) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary_size, bias=False)

    def forward(self, tokens, positions=None):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions)
        return self.head(self.norm(x))


class Layer(nn.Module):
    def __init__(self, dim, attention, num_heads_q=4, num_heads_kv=2, head_dim=16):
        super().__init__()
        self.attention = attention
        self.heads = (num_heads_q, num_heads_kv, num_heads_kv)
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, sum(self.heads) * head_dim, bias=False)
        self.out = nn.Linear(num_heads_q * head_dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * 3 * dim, bias=False)
        self.down = nn.Linear(3 * dim, dim, bias=False)

    def forward(self, x, positions):
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (sum(self.heads), -1))
        q, k, v = qkv.split(self.heads, dim=2)
        x = x + self.out(self.attention(rotate(q, positions), rotate(k, positions), v).flatten(2))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, positions, base=10000.0):
    """Rotary positions (arXiv:2104.09864) on (batch, seqlen, heads, head_dim), with halves as pairs."""
    half = x.shape[3] // 2
    frequencies = base ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _ours(q, k, v):
    return flash_attention(q, k, v, causal=True)


def _torchs(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


ATTENTIONS = {"triton_attn": _ours, "SDPA": _torchs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    main(**vars(parser.parse_args()))
