"""Decodes PTX text into the instructions that the core executes. Everything unknown raises Unsupported."""

import copy
import ctypes
import re

import numpy as np

from . import core
from .control_flow import joins
from .opcodes import SHARED_BASE, Unsupported, decoder_of

# Rows of 32 lanes hold the registers: one row for up to 32 bits, two for 64. Immediates are registers that are set
# before a program starts. The core numbers the special ones in this order.
_AXES = [f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid", "ntid") for axis in "xyz"]
SPECIAL = {name: number for number, name in enumerate([*_AXES, "%laneid", "%warpid"])}
SYNCHRONIZATIONS = {
    "@bar",
    "@warp_sync",
    "@membar",
    "@fence_proxy_async",
    "@bulk_commit",
    "@bulk_wait",
    "@cp_commit",
    "@cp_wait",
}
SYNCHRONIZATIONS |= {"@mbarrier_init", "@mbarrier_arrive", "@mbarrier_try_wait"}
SYNCHRONIZATIONS |= {"@wgmma_fence", "@wgmma_commit", "@wgmma_wait"}


class Program:
    """A kernel, decoded.

    Attributes:
        name: of the entry point.
        parameters: (offset, bytes) of each.
        threads: of one program.
        local_bytes: of one thread.
        instructions: int32 (n, 16), the fields of core.Instruction.
        text: PTX of each instruction.
        lines: (file, line) of each, or None.
        ends: whether each is the last of those that its statement became.
    """

    def __init__(self, ptx: str):
        entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{", ptx, re.DOTALL)
        self.name = entry.group(1)
        self.parameters, self._parameter_offset = _parameters(entry.group(2))
        self.parameter_bytes = sum(self.parameters[-1]) if self.parameters else 0
        self.threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry.group(3)).group(1))
        if self.threads % 32:
            raise Unsupported(f"{self.name}: expected a multiple of 32 threads, got {self.threads}")
        self._files = {int(n): path for n, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)}
        self.tables = {
            name: np.array([int(x) for x in values.split(",")], np.uint8)
            for name, values in re.findall(r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\}", ptx)
        }
        self._bits = {}  # declared registers; 1 for predicates
        self._rows, self._predicates, self._constants, self._special = {}, {}, {}, {}
        self._num_rows = 0
        self._labels, self._branches, self._targets = {}, [], {}
        self.local_bytes, self._local_offset = 0, {}
        self._instructions, self._pool, self.text, self.lines = [], [], [], []
        self._ends = []
        _Body(self, ptx[entry.end() :])
        self.instructions = np.array(self._instructions, np.int32)
        self.pool = np.array([*self._pool, 0], np.int32)
        together = joins(self.instructions, self.pool)
        for branch, _ in self._branches:
            self.instructions[branch, 9] = together.get(branch, -1)
        self.constants = np.array([pair for pair in self._constants.items()], np.uint32).reshape(-1, 2)
        self.special = np.array([pair for pair in self._special.items()], np.int32).reshape(-1, 2)
        self.num_rows, self.num_predicates = self._num_rows, len(self._predicates)
        self.ends = np.array(self._ends, bool)
        self.executed = np.zeros(len(self.instructions), np.int64)

    def where(self, pc: int) -> str:
        """The source line of an instruction, `file.py:12`."""
        return _place(self.lines[pc]) if 0 <= pc < len(self.lines) else _place(None)

    def copy(self) -> "Program":
        """A copy whose instructions may be changed, with its own counts."""
        other = copy.copy(self)
        other.instructions, other.executed = self.instructions.copy(), np.zeros_like(self.executed)
        return other

    def remove(self, pc: int) -> None:
        """Make an instruction do nothing. A wait for an mbarrier says at once that the phase is over."""
        left = "@mbarrier_not_waited" if self.name_of(pc) == "@mbarrier_try_wait" else "@nothing"
        self.instructions[pc, 0] = core.entries()[left][0]

    def synchronizations(self) -> list[int]:
        """Instructions whose only effect is the order of others: barriers, arrivals, waits, commits and fences."""
        return [pc for pc in range(len(self.instructions)) if self.name_of(pc) in SYNCHRONIZATIONS]

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) instruction of each loop: the target of a backward branch, and the branch."""
        branch = core.entries()["@bra"][0]
        backward = (self.instructions[:, 0] == branch) & (self.instructions[:, 8] <= np.arange(len(self.instructions)))
        return [(int(self.instructions[pc, 8]), int(pc)) for pc in np.flatnonzero(backward)]

    def name_of(self, pc: int) -> str:
        """What the core calls an instruction: `@bar`, `@cp_wait`, or the PTX opcode."""
        return core.names()[self.instructions[pc, 0]]


def _place(line):
    return f"{line[0]}:{line[1]}" if line else "an unknown line"


def _parameters(text):
    parameters, offsets, end = [], {}, 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        match = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+).*?([\w$]+)(?:\[(\d+)\])?$", declaration)
        alignment, bits, name, count = match.groups()
        size = int(bits) // 8 * int(count or 1)
        step = int(alignment or 1) if count else int(bits) // 8  # .ptr .align n is of what the pointer points to
        end = -(-end // step) * step
        parameters.append((end, size))
        offsets[name] = end
        end += size
    return parameters, offsets


_TOKEN = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*|(?P<label>[\w$%]+):(?!:)"
    r"|(?P<statement>[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);)",
    re.DOTALL,
)
# LLVM counts its lines on from that of the statement it stands for, as though the source had them.
_INLINE_ASSEMBLY = re.compile(r"// begin inline asm.*?// end inline asm", re.DOTALL)


class _Body:
    """Decodes the statements of one entry point into its program."""

    def __init__(self, program, text):
        self.program = program
        self.scopes = [{}]  # names of registers that a block of inline assembly declares for itself
        self.num_scopes = 0
        self.line = self.guard = self.statement = None
        text = _INLINE_ASSEMBLY.sub(lambda match: re.sub(r"(?m)^\s*\.loc\s[^\n]*$", "", match[0]), text)
        text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", text), flags=re.DOTALL)
        at = 0
        while self.scopes:
            match = _TOKEN.match(text, at)
            if not match:
                raise Unsupported(f"PTX that cannot be parsed: {text[at : at + 100]!r}")
            at = match.end()
            self.take(match)
        for instruction, label in program._branches:
            program._instructions[instruction][8] = program._labels[label]
        for place, labels in program._targets.values():
            program._pool[place : place + len(labels)] = [program._labels[label] for label in labels]

    def take(self, match):
        if match["open"]:
            self.num_scopes += 1
            self.scopes.append({"": self.num_scopes})
        elif match["close"]:
            self.scopes.pop()
        elif match["line"]:
            self.line = self.program._files.get(int(match["file"]), "?"), int(match["line"])
        elif match["label"]:
            self.last_label = self.label(match["label"])
            self.program._labels[self.last_label] = len(self.program._instructions)
        else:
            self.statement = " ".join(match["statement"].split())
            if self.statement:
                self.decode_statement()

    def decode_statement(self):
        # A directive for lines and a label may stand before a statement in one token.
        while match := re.match(
            r"\.loc (\d+) (\d+) \d+(?:, function_name \S+, inlined_at \d+ \d+ \d+)? ", self.statement
        ):
            self.line = self.program._files.get(int(match[1]), "?"), int(match[2])
            self.statement = self.statement[match.end() :]
        if self.statement.startswith("."):
            return self.directive(self.statement)
        self.guard, statement = -1, self.statement
        if match := re.match(r"@(!?)([\w%$]+)\s+", statement):
            self.guard = 2 * self.predicate(match[2]) + bool(match[1])
            statement = statement[match.end() :]
        opcode, _, rest = statement.partition(" ")
        try:
            self.decode(opcode, _split(rest))
            if self.program._ends:
                self.program._ends[-1] = True
        except Unsupported as error:
            raise Unsupported(f"{error}: {self.statement!r}, made from {_place(self.line)}") from None

    def directive(self, text):
        kind, _, rest = text.partition(" ")
        if kind == ".reg":
            type_, _, names = rest.partition(" ")
            bits = 1 if type_ == ".pred" else int(re.sub(r"\D", "", type_))
            for name in map(str.strip, names.split(",")):
                if numbered := re.match(r"([\w$%]+)<(\d+)>", name):
                    self.program._bits.update((f"{numbered[1]}{i}", bits) for i in range(int(numbered[2])))
                else:
                    full = f"{self.scopes[-1]['']}:{name}" if len(self.scopes) > 1 else name
                    self.scopes[-1][name] = full
                    self.program._bits[full] = bits
        elif kind == ".branchtargets":
            labels = [self.label(name.strip()) for name in rest.split(",")]
            place = len(self.program._pool)
            self.program._pool.extend([0] * len(labels))
            self.program._targets[self.last_label] = place, labels
        elif match := re.fullmatch(r"\.local \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", text):
            self.program._local_offset[match[2]] = -(-self.program.local_bytes // int(match[1])) * int(match[1])
            self.program.local_bytes = self.program._local_offset[match[2]] + int(match[3])
        elif kind not in (".pragma",):
            raise Unsupported(f"directive {text[:60]!r} of {self.program.name} (calls are not emulated)")

    # ---- operands

    def label(self, name):
        return name if name.startswith("$") or len(self.scopes) < 2 else f"{self.scopes[-1]['']}:{name}"

    def full_name(self, name):
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def bits(self, text):
        """Declared bits of a register, None for what is none."""
        return self.program._bits.get(self.full_name(text.strip()))

    def new_rows(self, count):
        self.program._num_rows += count
        return self.program._num_rows - count

    def constant(self, value, bits):
        key = "#", value, bits
        if key not in self.program._rows:
            row = self.program._rows[key] = self.new_rows(max(1, bits // 32))
            for i in range(max(1, bits // 32)):
                self.program._constants[row + i] = value >> 32 * i & 0xFFFFFFFF
        return self.program._rows[key]

    def row(self, text, bits=32):
        """The (first) row of an operand of that many bits; -1 for `_`."""
        text = text.strip()
        program = self.program
        if text == "_":
            return -1
        if text in SPECIAL:
            if text not in program._rows:
                program._rows[text] = self.new_rows(1)
                program._special[program._rows[text]] = SPECIAL[text]
            return program._rows[text]
        name = self.full_name(text)
        if declared := program._bits.get(name):
            if declared == 1 or (declared == 64) != (bits == 64):
                raise Unsupported(f"{text}: expected {bits} bits, got {declared}")
            if name not in program._rows:
                program._rows[name] = self.new_rows(max(1, declared // 32))
            return program._rows[name]
        if text in program._parameter_offset:
            return self.constant(program._parameter_offset[text], bits)
        if text == "global_smem":
            return self.constant(SHARED_BASE, bits)
        if text in program._local_offset:
            return self.constant(program._local_offset[text], bits)
        if text in program.tables:
            return self.constant(program.tables[text].ctypes.data, bits)
        if text in ("%cluster_ctarank", "%cluster_ctaid.x", "%clusterid.x"):
            return self.constant(0, bits)
        return self.constant(_immediate(text) & ((1 << bits) - 1), bits)

    def predicate(self, text):
        text = text.strip()
        name = self.full_name(text.removeprefix("!"))
        if self.program._bits.get(name) != 1:
            if not re.fullmatch(r"-?\d+", text):
                raise Unsupported(f"{text} is no predicate")
            result = self.new_predicate()
            zero = self.constant(0, 32)
            self.simple("setp.ne.b32", result, self.constant(int(text), 32), zero)
            return result
        predicate = self.program._predicates.setdefault(name, len(self.program._predicates))
        if not text.startswith("!"):
            return predicate
        result = self.new_predicate()
        self.simple("not.pred", result, predicate)
        return result

    def new_predicate(self):
        count = len(self.program._predicates)
        return self.program._predicates.setdefault(("#", count), count)

    def address(self, text):
        """(row, offset, whether of 64 bits) of `[base+offset]`."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match:
            raise Unsupported(f"address {text}")
        wide = self.bits(match[1]) == 64 or match[1] in self.program.tables
        return self.row(match[1], 64 if wide else 32), int(match[2] or "0", 0), wide

    # ---- instructions

    def add(self, name, operands=(), m=(), uses=(), defs=()):
        program = self.program

        def pooled(values):
            program._pool.extend(values)
            return [len(program._pool) - len(values), len(values)]

        modifiers = [int(x) for x in m]
        row = [core.entries()[name][0], self.guard, *pooled(list(operands))]
        row += [*pooled(list(uses)), *pooled([d for d in defs if d >= 0]), *modifiers, *[0] * (8 - len(modifiers))]
        program._instructions.append(row)
        program.text.append(self.statement)
        program.lines.append(self.line)
        program._ends.append(False)
        return len(program._instructions) - 1

    def simple(self, opcode, *operands):
        """An instruction of arithmetic.h, its operands as rows and predicates."""
        _, signature = core.entries()[opcode]
        rows = [_rows_of(operand, letter) for operand, letter in zip(operands, signature)]
        self.add(opcode, operands, uses=[r for of_one in rows[1:] for r in of_one], defs=rows[0])

    def decode(self, opcode, operands):
        if found := decoder_of(opcode):
            method, match = found
            return method(self, match, operands)
        if opcode not in core.entries():
            raise Unsupported(f"instruction {opcode}")
        if len(operands) == 4 and _OF_THREE.fullmatch(opcode):
            first_two = self.new_rows(1)
            result, *rows = (self.operand(text, "r") for text in operands)
            self.simple(opcode, first_two, *rows[:2])
            self.simple(opcode, result, first_two, rows[2])
            return
        _, signature = core.entries()[opcode]
        if len(signature) != len(operands):
            raise Unsupported(f"{opcode} with {len(operands)} operands")
        # Operand Size Exceeding Instruction-Type Size: what is converted may stand in a wider register, whose low half
        # is the first of its rows.
        wide = opcode.startswith("cvt.") and self.bits(operands[1]) == 64
        letters = signature[:1] + "d" if wide else signature
        self.simple(opcode, *(self.operand(text, letter) for text, letter in zip(operands, letters)))

    def operand(self, text, letter):
        return self.predicate(text) if letter == "p" else self.row(text, {"h": 16, "r": 32, "d": 64}[letter])


def _rows_of(operand, letter):
    return () if letter == "p" else (operand, operand + 1) if letter == "d" else (operand,)


def _immediate(text):
    if re.match(r"0[fFdD][0-9a-fA-F]+$", text):
        return int(text[2:], 16)
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        raise Unsupported(f"operand {text}") from None


_OF_THREE = re.compile(r"(min|max)(\.ftz)?(\.NaN)?\.f32")  # from sm_100 on they take three operands
_BRACKET = re.compile(r"[{\[(]")


def _split(text):
    """Operands, at the commas that stand outside all brackets."""
    if not _BRACKET.search(text):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text.strip() else []


def parameters_row(program: Program) -> int | None:
    """Row of the address of the parameters, where the program takes it."""
    return program._rows.get("%parameters")


def mapped_constants(program: Program, parameters: ctypes.Array) -> np.ndarray:
    """The program's constants, with the address of this launch's parameters among them."""
    row = parameters_row(program)
    if row is None:
        return program.constants
    address = ctypes.addressof(parameters)
    extra = np.array([[row, address & 0xFFFFFFFF], [row + 1, address >> 32]], np.uint32)
    return np.concatenate([program.constants, extra])
