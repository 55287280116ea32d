"""NVIDIA machine code (SASS) as instructions and loops, read from a cubin with the tools of the triton wheel.

Works without a GPU and for any target of nvdisasm. Bits 105 to 108 of an instruction (128 bits, since sm_70) are its
stall count: the cycles that the warp's next instruction has to wait.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property

SPILL_OPCODES = frozenset({"LDL", "STL"})
MMA_OPCODES = frozenset(["HMMA", "QMMA", "IMMA", "HGMMA", "QGMMA", "IGMMA", "BGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA"])

_JUMPS = frozenset({"BRA", "JMP", "BRX", "BRXU"})
_ENDS = frozenset({"EXIT", "RET"})

_SECTION = re.compile(r"\.text\.(\S+):")
_LABEL = re.compile(r"(\.?\w+):\s*$")
_INSTRUCTION = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<mnemonic>[A-Z][\w.]*)\s*"
    r"(?P<operands>.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/\s*$"
)
_CONTROL_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
_STALL_BIT = 105 - 64
_JUMP_TARGET = re.compile(r"\.L_\w+")
_PREDICATE_OPERAND = re.compile(r"!?U?P\d")


@dataclass
class Instruction:
    """One SASS instruction; `stall` is its static stall count in cycles."""

    address: int
    predicate: str | None
    mnemonic: str
    operands: str
    stall: int = 1

    @cached_property
    def opcode(self):
        return self.mnemonic.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """An innermost natural loop: the instructions of the trip with the most matmuls, and those of other trips."""

    always: tuple[Instruction, ...]
    conditional: tuple[Instruction, ...]


@dataclass(frozen=True)
class Kernel:
    """A disassembled kernel with its launch resources."""

    name: str
    arch: str
    threads: int
    registers: int
    stack_bytes: int
    instructions: list[Instruction]
    labels: dict[str, int]

    def mma_loops(self):
        return find_mma_loops(self.instructions, self.labels)


def disassemble(cubin):
    """The kernel in `cubin` (bytes), a cubin with one entry function as Triton writes them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _run("nvdisasm", "-c", "-hex", file.name)
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        elf = _run("cuobjdump", "-elf", file.name)
    arch = re.search(r"(?:\.target\s+sm_|EF_CUDA_SM)(\d+)", listing).group(1)
    name, registers, stack = re.search(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", usage).groups()
    threads = re.search(r"EIATTR_(?:REQNTID|MAX_THREADS)\b.*?Value:\s*0x([0-9a-f]+)", elf, re.DOTALL).group(1)
    instructions, labels = parse(listing)[name]
    return Kernel(name, f"sm_{arch}", int(threads, 16), int(registers), int(stack), instructions, labels)


def parse(listing):
    """{function: (instructions, {label: index of the next instruction})} of an `nvdisasm -c -hex` listing."""
    functions = {}
    instructions, labels = [], {}
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            instructions, labels = functions[section.group(1)] = [], {}
        elif label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            address, predicate, mnemonic, operands = found.group("address", "predicate", "mnemonic", "operands")
            instructions.append(Instruction(int(address, 16), predicate, mnemonic, operands))
        elif (control := _CONTROL_WORD.match(line)) and instructions:
            instructions[-1].stall = int(control.group(1), 16) >> _STALL_BIT & 0xF
    return functions


def find_mma_loops(instructions, labels):
    """The innermost loops that hold matrix instructions, in program order."""
    blocks, successors = _control_flow(instructions, labels)
    dominators = _dominators(successors)
    matmuls = [sum(instructions[i].opcode in MMA_OPCODES for i in block) for block in blocks]
    bodies = {
        header: (body, latches)
        for header, (body, latches) in _natural_loops(successors, dominators).items()
        if any(matmuls[b] for b in body)
    }
    loops = []
    for header, (body, latches) in sorted(bodies.items()):
        if any(other != header and inner < body for other, (inner, _) in bodies.items()):
            continue  # not innermost
        forward = {b: (successors[b] & body) - dominators[b] for b in body}
        path = _main_path(header, latches, forward, matmuls, [len(block) for block in blocks])
        always, conditional = (
            tuple(instructions[i] for b in sorted(part) for i in blocks[b]) for part in (path, body - path)
        )
        loops.append(Loop(always, conditional))
    return loops


def _main_path(header, latches, successors, matmuls, sizes):
    """The blocks, header to latch, of the trip with the most matmuls and, among equals, the fewest instructions."""
    best = {}  # block -> ((matmuls, -instructions) from there on, next block)
    stack, entered = [header], set()
    while stack:
        block = stack[-1]
        entered.add(block)
        if missing := successors[block] - entered:
            stack += missing
            continue
        stack.pop()
        ways = [(best[b][0], b) for b in successors[block] if best.get(b) is not None]
        if block in latches:
            ways.append(((0, 0), None))
        if ways:
            (more_matmuls, fewer), following = max(ways, key=lambda way: way[0])
            best[block] = (matmuls[block] + more_matmuls, fewer - sizes[block]), following
        else:
            best[block] = None  # leads out of the loop
    path, block = set(), header
    while block is not None:
        path.add(block)
        block = best[block][1]
    return path


def _run(tool, *args):
    from triton import knobs  # not at the top: parsing a listing needs no triton

    result = subprocess.run([getattr(knobs.nvidia, tool).path, *args], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{tool} failed: {result.stderr.strip()}")
    return result.stdout


def _control_flow(instructions, labels):
    """Basic blocks as ranges of instruction indices, and the successors of each."""
    starts = {0} | {index for index in labels.values() if index < len(instructions)}
    starts |= {
        i + 1 for i, x in enumerate(instructions[:-1]) if x.opcode in _JUMPS or x.opcode in _ENDS or x.opcode == "BREAK"
    }
    starts = sorted(starts)
    blocks = [range(start, end) for start, end in zip(starts, [*starts[1:], len(instructions)])]
    block_at = {start: number for number, start in enumerate(starts)}
    successors = []
    for number, block in enumerate(blocks):
        last = instructions[block[-1]]
        following = {number + 1} & set(range(len(blocks)))
        if last.opcode in _JUMPS:
            targets = {block_at[labels[t]] for t in _JUMP_TARGET.findall(last.operands) if labels.get(t) in block_at}
            successors.append(targets | following if _is_conditional(last) else targets)
        elif last.opcode in _ENDS:
            successors.append(following if last.predicate else set())
        else:
            successors.append(following)
    return blocks, successors


def _is_conditional(jump):
    if jump.predicate is None:
        return _PREDICATE_OPERAND.match(jump.operands) is not None  # BRA P0, `(.L_x_1)
    return jump.predicate not in ("PT", "UPT")


def _dominators(successors):
    """For each block, the set of blocks on every path from an entry to it, itself included."""
    count = len(successors)
    predecessors = _predecessors(successors)
    entries = _entries(successors, predecessors)
    dominators = [{b} if b in entries else set(range(count)) for b in range(count)]
    changed = True
    while changed:
        changed = False
        for b in range(count):
            if b in entries:
                continue
            new = {b} | set.intersection(*(dominators[p] for p in predecessors[b]))
            if new != dominators[b]:
                dominators[b], changed = new, True
    return dominators


def _entries(successors, predecessors):
    """Block 0, and the blocks that only an indirect jump reaches (the dispatch of a warp-specialized kernel)."""
    entries, reached = set(), set()
    orphans = [b for b, before in enumerate(predecessors) if not before]
    for start in (0, *orphans, *range(len(successors))):
        if start not in reached:
            entries.add(start)
            reached |= _reachable(start, successors)
    return entries


def _natural_loops(successors, dominators):
    """{header: (blocks of the loop, blocks that jump back)}. A back edge leads to a block that dominates its origin."""
    predecessors = _predecessors(successors)
    loops = {}
    for latch, targets in enumerate(successors):
        for header in targets & dominators[latch]:
            body, latches = loops.setdefault(header, ({header}, set()))
            latches.add(latch)
            body |= _reachable(latch, predecessors, stop=header)
    return loops


def _predecessors(successors):
    predecessors = [set() for _ in successors]
    for block, targets in enumerate(successors):
        for target in targets:
            predecessors[target].add(block)
    return predecessors


def _reachable(start, edges, stop=None):
    reached, todo = set(), [start]
    while todo:
        block = todo.pop()
        if block not in reached:
            reached.add(block)
            if block != stop:
                todo += edges[block]
    return reached
