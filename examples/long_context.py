"""Train a small decoder on a text that is longer than one rank holds.

    torchrun --nproc-per-node 4 examples/long_context.py    # GPUs, or processes on a CPU

Every rank has the whole model and a part of the sequence. Only attention needs the other ranks: it gets the keys and
values from them (`triton_attn.parallel`). The gradients of the model are summed over the ranks.
"""

import argparse
import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.train import Decoder, read_text
from triton_attn.parallel import context_parallel_attention, shard_sequence


def main(steps=20, seqlen=1024, method="auto"):
    """Print the loss, and each rank's rows, their loss and its memory. Returns the losses of the whole sequence."""
    backend, device = ("nccl", "cuda") if torch.cuda.is_available() else ("gloo", "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    text, vocabulary_size = read_text(device)
    tokens, targets, positions = (
        shard_sequence(x[None], mesh)
        for x in (text[:seqlen], text[1 : seqlen + 1], torch.arange(seqlen, device=device))
    )

    def attention(q, k, v):
        return context_parallel_attention(q, k, v, mesh=mesh, method=method, seqlen=seqlen, causal=True)

    torch.manual_seed(0)
    model = Decoder(vocabulary_size, attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses, host_memory = [], _peak_of_host()
    bar = tqdm(range(steps), unit="step", disable=dist.get_rank() > 0)
    for _ in bar:
        logits = model(tokens, positions[0])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / seqlen
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f} nats per character")
    own = loss.item() * seqlen / max(tokens.shape[1], 1)
    memory = _memory(device, host_memory)
    rows = f"{tokens.shape[1]} of {seqlen} rows, their loss {own:.3f} nats per character"
    for line in _on_first_rank(f"rank {dist.get_rank()}: {rows}, {memory}"):
        print(line)
    dist.destroy_process_group()
    return losses


def _on_first_rank(line):
    """The lines of all ranks on rank 0; on other ranks nothing."""
    lines = [None] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    return lines if dist.get_rank() == 0 else []


def _memory(device, host_memory):
    if device == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB of GPU memory at most"
    return f"{(_peak_of_host() - host_memory) / 2**10:.0f} MiB of host memory at most, besides torch and the model"


def _peak_of_host():
    """KiB of the process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--method", default="auto", choices=["auto", "all_gather", "ring", "ulysses"])
    losses = main(**vars(parser.parse_args()))
    if int(os.environ["RANK"]) == 0:
        print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f} nats per character")
