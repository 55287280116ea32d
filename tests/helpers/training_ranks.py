"""A small Llama that trains over gloo processes on a CPU, and its losses on one process."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.train import Decoder, read_text
from triton_attn import flash_attention
from triton_attn.parallel import context_parallel_attention, shard_sequence


@dataclass(frozen=True, kw_only=True)
class Run:
    """A mesh of (batches, sequences), and how the model trains."""

    mesh_shape: tuple = (1, 4)
    method: str = "auto"
    load_balance: str | None = "head_tail"
    fsdp: bool = False
    micro_batches: int = 1
    checkpointing: bool = False
    steps: int = 20
    seqlen: int = 46  # the ranks do not divide it


def check_losses(run, mesh):
    """The losses of all steps are those of one process, and so is what every rank has learnt."""
    losses = train(run, init_device_mesh("cpu", run.mesh_shape, mesh_dim_names=("dp", "cp")))
    expected = train(run, None)
    torch.testing.assert_close(losses, expected, atol=2e-4, rtol=1e-4)
    assert losses[-1] < 0.9 * losses[0], "the model learns"


def train(run, mesh):
    """The losses of AdamW on excerpts of a text. mesh None: on this process alone."""
    torch.manual_seed(0)
    text, vocabulary_size = read_text("cpu")
    tokens_of = _Tokens(run, mesh, text)
    model = Decoder(vocabulary_size, tokens_of.attention)
    if run.checkpointing:
        for layer in model.layers:
            layer.forward = _checkpointed(layer.forward)
    if run.fsdp and mesh is not None:
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(run.steps):
        whole = torch.zeros(())
        for micro in range(run.micro_batches):
            tokens, targets, positions = tokens_of.batch(step * run.micro_batches + micro)
            logits = model(tokens, positions)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / tokens_of.number
            loss.backward()
            whole += loss.detach()
        if mesh is not None:
            _sum_gradients(model, mesh, run.fsdp)
            dist.all_reduce(whole)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(whole)
    return torch.stack(losses)


class _Tokens:
    """This rank's part of the batches: two excerpts of the text each."""

    def __init__(self, run, mesh, text):
        self.run, self.mesh, self.text = run, mesh, text
        self.number = 2 * run.seqlen * run.micro_batches

    def attention(self, q, k, v):
        if self.mesh is None:
            return flash_attention(q, k, v, causal=True)
        run = self.run
        options = dict(method=run.method, load_balance=run.load_balance, seqlen=run.seqlen, causal=True)
        return context_parallel_attention(q, k, v, mesh=self.mesh["cp"], **options)

    def batch(self, i):
        seqlen = self.run.seqlen
        starts = [(37 * (2 * i + j)) % (len(self.text) - seqlen - 1) for j in range(2)]
        excerpts = torch.stack([self.text[start : start + seqlen + 1] for start in starts])
        parts = excerpts[:, :-1], excerpts[:, 1:], torch.arange(seqlen).expand(2, -1)
        if self.mesh is None:
            return parts[0], parts[1], parts[2][0]
        own = slice(self.mesh.get_local_rank("dp"), None, self.mesh["dp"].size())
        tokens, targets, positions = (
            shard_sequence(x[own], self.mesh["cp"], load_balance=self.run.load_balance) for x in parts
        )
        return tokens, targets, positions[0]


def _checkpointed(forward):
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def _sum_gradients(model, mesh, fsdp):
    """Over all ranks. FSDP has averaged over "dp" what it sharded there."""
    for parameter in model.parameters():
        gradient = parameter.grad.to_local() if fsdp else parameter.grad
        if fsdp:
            gradient *= mesh["dp"].size()
            dist.all_reduce(gradient, group=mesh["cp"].get_group())
        else:
            dist.all_reduce(gradient)
