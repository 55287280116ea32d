"""Exact counts of a launch, by instruction and by source line: instructions, memory requests, FLOP."""

import re
from typing import NamedTuple

import numpy as np

from . import core

SECTOR = 32


class Tally(NamedTuple):
    """Counts of one instruction, or sums over several. A request is one access of a warp by one instruction, or the box
    of a tensor copy.

    Attributes:
        executed: how many warps executed it with at least one active lane.
        lanes: their active lanes.
        bytes: bytes of global memory; a byte counts once in a request.
        sectors: sectors of 32 bytes that hold these bytes; a sector counts once in a request, which moves it.
        least_sectors: the fewest sectors that hold as many bytes, summed over requests. `sectors` is larger if sectors
            were not full.
        wavefronts: cycles in which shared memory served the requests. 32 lanes with up to 4 bytes each are served
            together, 16 lanes with 8 bytes, 8 lanes with 16 bytes or with a row of a matrix; a bank serves 4 bytes in a
            cycle. Operands of wgmma count as matrices of 8 rows; an operand that four warps share counts once. Tensor
            copies count 0.
        least_wavefronts: the cycles without bank conflicts.
        flops: FLOP of tensor cores, useful or not.
    """

    executed: int
    lanes: int
    bytes: int
    sectors: int
    least_sectors: int
    wavefronts: int
    least_wavefronts: int
    flops: int


class Counts:
    """The counts of a launch.

    Attributes:
        program: the decoded kernel.
        by_instruction: int64 (n, 8), a row for each instruction of `program`, with the columns of Tally.
        read, written: {tensor: bytes of global memory that the launch read or wrote, each sector of 32 bytes once}: the
            minimum that DRAM moves. An atomic or a reduction both reads and writes its elements. Tensors that share a
            storage have one entry, their names joined by commas.
    """

    def __init__(self, program, by_instruction, read, written):
        self.program, self.by_instruction, self.read, self.written = program, by_instruction, read, written

    @property
    def bytes_read(self) -> int:
        return sum(self.read.values())

    @property
    def bytes_written(self) -> int:
        return sum(self.written.values())

    def total(self, chosen=slice(None)) -> Tally:
        """Sums over all instructions, or over those that an index or a mask chooses."""
        return Tally(*map(int, self.by_instruction[chosen].sum(axis=0)))

    def by_kind(self) -> dict[str, Tally]:
        """{`kind_of` an instruction: sums}, the most frequent first."""
        return self._grouped(lambda pc: kind_of(self.program.text[pc]))

    def by_line(self) -> dict[tuple[str, str], Tally]:
        """{(source line, `kind_of` an instruction): sums}, the most frequent first; a line is `file.py:12`."""
        return self._grouped(lambda pc: (self.program.where(pc), kind_of(self.program.text[pc])))

    def hot(self) -> np.ndarray:
        """bool (n,): which instructions are in a hot loop, an innermost loop with products of tensor cores."""
        products = self.by_instruction[:, Tally._fields.index("flops")] > 0
        loops = sorted(self.program.loops(), key=lambda loop: loop[1] - loop[0])
        chosen = []
        for first, last in loops:
            holds_another = any(first <= inner[0] and inner[1] <= last for inner in chosen)
            if products[first : last + 1].any() and not holds_another:
                chosen.append((first, last))
        hot = np.zeros(len(products), bool)
        for first, last in chosen:
            hot[first : last + 1] = True
        return hot

    def _grouped(self, key_of):
        places = {}
        for pc in np.flatnonzero(self.by_instruction[:, 0]):
            places.setdefault(key_of(pc), []).append(pc)
        tallies = {key: self.total(pcs) for key, pcs in places.items()}
        return dict(sorted(tallies.items(), key=lambda item: -item[1].executed))


def kind_of(text: str) -> str:
    """The kind of a PTX instruction: the first word of its opcode, with the memory space (`ld.global`) or the kind of a
    copy or product (`cp.async.bulk.tensor`, `wgmma.mma_async`)."""
    opcode = re.sub(r"^@!?\S+\s+", "", text).split()[0].rstrip(";")
    first, *rest = opcode.split(".")
    telling = _TELLING.get(first, ())
    return ".".join([first, *(word for word in (word.split("::")[0] for word in rest) if word in telling)])


_SPACES = ("global", "shared", "param", "local")
_ASYNC = ("reduce", "async", "bulk", "tensor", "commit_group", "wait_group", "wait_all", "mma_async", "fence")
_TELLING = {
    **dict.fromkeys(("ld", "st", "atom", "red"), _SPACES),
    **dict.fromkeys(("cp", "wgmma"), _ASYNC),
    "mbarrier": ("init", "inval", "arrive", "expect_tx", "try_wait", "test_wait"),
}


def counted(program, executed, of_core, traffic, names) -> Counts:
    """The Counts of what the core counted. Of the instructions that one statement became, only the last one counts as
    executed."""
    by_instruction = np.concatenate([executed[:, None], of_core], axis=1)
    by_instruction[~program.ends, :2] = 0
    read, written = {}, {}
    for name, (sectors_read, sectors_written) in zip(names, traffic.tolist()):
        for where, sectors in ((read, sectors_read), (written, sectors_written)):
            if sectors and name is not None:
                where[name] = where.get(name, 0) + SECTOR * sectors
    return Counts(program, by_instruction, read, written)


def buffers(program, regions):
    """Zeros for the core: (by instruction, by region)."""
    return np.zeros((len(program.instructions), len(core.COUNTS)), np.int64), np.zeros((regions, 2), np.int64)
