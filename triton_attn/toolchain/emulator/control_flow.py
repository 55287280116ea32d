"""Where the lanes of a warp that a branch has parted come together again."""

import itertools

import networkx as nx  # torch needs it too

from . import core


def joins(instructions, pool):
    """{branch: the first instruction that all lanes execute after it, whichever way each goes}: its immediate
    post-dominator. A branch after which lanes may end one by one has none.

    Source: Fung et al., Dynamic Warp Formation and Scheduling for Efficient GPU Control Flow, MICRO 2007.
    """
    end = len(instructions)
    targets = {pc: found for pc in range(end) if (found := _targets(instructions, pool, pc)) is not None}
    starts = sorted({0, end, *(pc + 1 for pc in targets), *itertools.chain(*targets.values())})
    backwards = nx.DiGraph()  # of blocks of instructions, each named by its first one
    backwards.add_node(end)
    last = {}
    for start, following in itertools.pairwise(starts):
        last[start] = following - 1
        backwards.add_edges_from((to, start) for to in targets.get(following - 1, [following]))
    after = nx.immediate_dominators(backwards, end)
    return {last[start]: join for start, join in after.items() if start != end and join != end}


def _targets(instructions, pool, pc):
    """Where an instruction may go that is the last one of its block, otherwise None."""
    name, guard, (first, second) = core.names()[instructions[pc, 0]], instructions[pc, 1], instructions[pc, 8:10]
    next_one = [pc + 1] if guard >= 0 else []
    match name:
        case "@bra":
            return [int(first), *next_one]
        case "@brx":
            return [*map(int, pool[second : second + first]), *next_one]
        case "@ret" | "@trap":
            return [len(instructions), *next_one]
    return None
