"""Trees of draft tokens, as the bits of tree_mask."""

import torch

KINDS = ("tree", "chain", "any")


def bits_of_tree(parents):
    """(tokens,) int64 of a tree whose token i follows token parents[i], an earlier one, or, with -1, the context."""
    bits = []
    for i, parent in enumerate(parents):
        bits.append((bits[parent] if parent >= 0 else 0) | 1 << i)
    return signed(bits)


def signed(bits):
    """int64 of the unsigned bits."""
    return torch.tensor([x - 2**64 if x >= 2**63 else x for x in bits], dtype=torch.int64)


def random_parents(num_tokens, generator):
    """Each token follows an earlier one or the context."""
    return [int(torch.randint(-1, i, (), generator=generator)) if i else -1 for i in range(num_tokens)]


def bits_of(kind, num_tokens, generator):
    """The bits of num_tokens tokens. Those from num_tokens on, which do not count, are random."""
    if num_tokens > 64:  # spare rows after the last sequence
        return torch.randint(-(2**63), 2**63 - 1, (num_tokens,), generator=generator)
    if kind == "tree":
        bits = bits_of_tree(random_parents(num_tokens, generator))
    elif kind == "chain":
        bits = bits_of_tree(range(-1, num_tokens - 1))
    else:  # each token sees any of the others, or none
        bits = torch.randint(-(2**63), 2**63 - 1, (num_tokens,), generator=generator)
    noise = torch.randint(-(2**63), 2**63 - 1, (num_tokens,), generator=generator)
    return bits | noise << num_tokens if num_tokens < 64 else bits
