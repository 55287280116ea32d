"""Counts from the assembly of an AMD kernel: registers, spills, matrix instructions. There is no cycle model."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

_BLOCK = re.compile(r"(?:\.L(BB\w+)|; %bb\.\d+):")
_LOOP_HEADER = re.compile(r"=>\s*This (?:Inner )?Loop Header: Depth=(\d+)")
_LOOP_MEMBER = re.compile(r"in Loop: Header=(BB\w+) Depth=(\d+)")
_INSTRUCTION = re.compile(r"\s+([a-z]\w+)")


@dataclass(frozen=True)
class Report:
    """Registers are per lane. `vgprs` is the unified register file, with accumulation registers."""

    kernel: str
    arch: str
    vgprs: int
    accumulation_vgprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    shared_bytes: int
    mfma: Counter
    opcodes: Counter  # per trip of the hot loop

    @property
    def loop_spills(self):
        """Loads and stores of scratch memory per trip."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith("scratch_"))

    def row(self):
        """One row of a table."""
        return {
            "kernel": self.kernel,
            "arch": self.arch,
            "registers": self.vgprs,
            "AGPRs": self.accumulation_vgprs,
            "SGPRs": self.sgprs,
            "spills": self.vgpr_spills,
            "SGPR spills": self.sgpr_spills,
            "scratch B": self.scratch_bytes,
            "shared B": self.shared_bytes,
            "spills in loop": self.loop_spills,
            "loop instructions": self.opcodes.total() or None,
            "matmuls": " ".join(f"{n} {name}" for name, n in self.mfma.items()),
        }


def analyze(assembly, shared_bytes):
    """The report on the assembly text of a compiled AMD kernel. `shared_bytes` is the shared memory of a launch."""

    def metadata(key):
        return re.search(rf"^\s+(?:- )?\.{key}:\s+(\S+)$", assembly, re.MULTILINE).group(1)

    return Report(
        kernel=metadata("symbol").removesuffix(".kd"),
        arch=re.search(r"^amdhsa\.target:.*-(gfx\w+)", assembly, re.MULTILINE).group(1),
        vgprs=int(metadata("vgpr_count")),
        accumulation_vgprs=int(re.search(r"^; NumAgprs: (\d+)$", assembly, re.MULTILINE).group(1)),
        sgprs=int(metadata("sgpr_count")),
        vgpr_spills=int(metadata("vgpr_spill_count")),
        sgpr_spills=int(metadata("sgpr_spill_count")),
        scratch_bytes=int(metadata("private_segment_fixed_size")),
        shared_bytes=shared_bytes,
        mfma=Counter(re.findall(r"^\s+v_s?mfma(?:c)?_(\w+)", assembly, re.MULTILINE)),
        opcodes=_hot_loop(assembly),
    )


def _hot_loop(assembly):
    """The instructions of the loop over full tiles by opcode, conditional ones included. Empty if no loop has matmuls.

    Of the innermost loops with matmuls it is the one with the most matmuls and, among equals, the fewest instructions,
    since masks only add instructions.
    """
    loops = {loop: opcodes for loop, opcodes in _loops(assembly).items() if _matmuls(opcodes)}
    return loops[max(loops, key=lambda x: (x[0], _matmuls(loops[x]), -loops[x].total()))] if loops else Counter()


def _matmuls(opcodes):
    return sum(n for opcode, n in opcodes.items() if "mfma" in opcode)


def _loops(assembly):
    """{(depth, header): instructions by opcode} of every loop, without the instructions of its inner loops.

    LLVM says in a comment to which loop a block belongs. The blocks of a loop need not be contiguous.
    """
    loops = defaultdict(Counter)
    block = loop = None
    for line in assembly.splitlines():
        if start := _BLOCK.match(line):
            block, loop = start.group(1), None
        if header := _LOOP_HEADER.search(line):
            loop = int(header.group(1)), block
        elif member := _LOOP_MEMBER.search(line):
            loop = int(member.group(2)), member.group(1)
        elif loop and (instruction := _INSTRUCTION.match(line)):
            loops[loop][instruction.group(1)] += 1
    return loops
