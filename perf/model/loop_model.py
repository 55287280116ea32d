"""How fast the hot loop of a compiled kernel can run: a static cycle model of one trip, from the machine code.

Per trip and warpgroup (four warps, one on each sub-partition of an SM) every unit of the SM is charged the cycles that
it is busy:

    tensor   matrix instructions, at the dense rate of the target (perf/model/gpus.py)
    smem     operands that wgmma reads from shared memory and plain accesses to it, at 128 B; SHFL at 32 lanes
    mufu     exp2, reciprocal and conversions: 16 lanes per clock and SM
    alu      min/max, compare, select, integer and packing: 64 lanes
    fma      fp32 multiply and add: 128 lanes (64 on sm_80); integer multiply-add: 64 lanes
    issue    one instruction per clock and sub-partition
    stall    the sum of the static stall counts: the least time one warp alone needs to issue the trip

(Instruction throughputs: CUDA C++ Programming Guide, "Arithmetic Instructions".) With G warpgroups resident on an SM,
the SM cycles of a warpgroup's trip lie between

    bound    max(tensor, smem, mufu, alu, fma, issue)                        all units overlap
    lock     max(tensor, smem) + max(stall / G, mufu, alu, fma, issue)       matmuls and softmax never overlap

Both are given as TFLOP/s of the matmuls in the loop. A matmul that several warps repeat counts once: a tile of 64 rows
has work for 4 warps of mma.sync, and 8 warps along its rows repeat all of it. The model ranks configs and catches
regressions. It does not predict time: memory, latency of copies, barriers, power, prologue, epilogue and masked tiles
are not in it. If the number of stages is known and the waits of the architecture were measured,

    expected   the trip with its waits for loads, matmuls and barriers, see perf/model/timeline.py

is the rate that a loop should reach. It also leaves out memory, power, prologue, epilogue and masked tiles.

The code does not show shared-memory addresses. smem therefore assumes no bank conflicts, unless the caller passes the
conflicts that the emulator counted (perf/commands/counts.py).
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from perf.model import amdgcn, sass, timeline
from perf.model.gpus import CAPACITY, RATES, REGISTER_ALLOCATION_UNIT, SHARED_BYTES_RESERVED_PER_CTA, Rates

WARPS_PER_WARPGROUP = 4
SMEM_BYTES_PER_CLOCK = 128
SFU_LANES, ALU_LANES = 16, 64

_MUFU = frozenset({"MUFU", "F2I", "I2F", "I2FP", "F2F", "FRND", "F2IP"})
_COMPARE = frozenset({"FMNMX", "FSEL", "FSETP", "FSET", "FCHK", "HMNMX2", "ISETP", "IMNMX", "VIMNMX", "SEL", "PLOP3"})
_INTEGER = frozenset({"IADD3", "VIADD", "IABS", "LEA", "LOP", "LOP3", "SHF", "SGXT", "BMSK", "POPC", "FLO"})
_MOVE = frozenset({"MOV", "PRMT", "F2FP", "P2R", "R2P", "CS2R", "VOTE"})
_ALU = _COMPARE | _INTEGER | _MOVE
_FP32 = frozenset(["FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA32I", "FMUL32I", "FADD32I", "FSWZADD"])
_INTEGER_MULTIPLY = frozenset({"IMAD", "IDP", "IMUL", "XMAD"})
_SHARED_ACCESS = frozenset({"LDS", "STS", "LDSM", "STSM"})
_ASYNC_COPY = frozenset({"UTMALDG", "UBLKCP", "LDGSTS"})

_WGMMA = re.compile(r"[HQIB]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")
_MMA_SYNC = re.compile(r"[HQI]MMA\.(\d+)")
_MMA_SYNC_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "16832": (16, 8, 32)}
# A matmul in TTGIR and the layout of its result: warps along rows and columns, and the shape of an instruction.
_PRODUCT = re.compile(r"(?:tt\.dot|warp_group_dot) .* \* \S+<(\d+)x\d+x.* -> tensor<(\d+)x(\d+)xf32, (#mma\d*)>")
_LAYOUT = re.compile(r"(#mma\d*) = .*warpsPerCTA = \[(\d+, \d+)\].*instrShape = \[([\d, ]+)\]")
_WGMMA_ELEMENT_BYTES = {8: 4, 16: 2, 32: 1}  # by K: tf32, fp16 and bf16, fp8


@dataclass(frozen=True)
class LoopModel:
    """A loop with matrix instructions, and the cost of its main trip (see `sass.Loop`)."""

    loop: sass.Loop
    rates: Rates | None
    useful: float = 1.0  # share of the matmul FLOP that no other warp repeats
    conflicts: float = 1.0  # shared-memory wavefronts over wavefronts without bank conflicts

    @property
    def addresses(self):
        return self.loop.always[0].address, self.loop.always[-1].address

    @cached_property
    def histogram(self):
        """Instructions per trip, by opcode."""
        return Counter(i.opcode for i in self.loop.always)

    @cached_property
    def mma_shapes(self):
        """Matrix instructions per trip, by opcode and shape."""
        return Counter(".".join(i.mnemonic.split(".")[:2]) for i in self.loop.always if i.opcode in sass.MMA_OPCODES)

    @property
    def instructions(self):
        return len(self.loop.always)

    @property
    def comparisons(self):
        """Comparisons and selections per trip."""
        return sum(self.histogram[opcode] for opcode in _COMPARE)

    @property
    def mma_instructions(self):
        return self.mma_shapes.total()

    @property
    def spills(self):
        """Loads and stores of local memory per trip."""
        return sum(self.histogram[opcode] for opcode in sass.SPILL_OPCODES)

    @property
    def async_copies(self):
        """TMA and cp.async instructions per trip, conditional ones included: one warp may issue for all."""
        return sum(i.opcode in _ASYNC_COPY for i in self.loop.always + self.loop.conditional)

    @property
    def flops(self):
        """Matmul FLOP per warpgroup and trip. 0 for tcgen05, whose shape is in a descriptor, not in the instruction."""
        return sum(_mma_flops(i) for i in self.loop.always)

    @cached_property
    def cycles(self):
        """{unit: busy cycles per warpgroup and trip}. None for a target without `RATES` or with tcgen05."""
        if self.rates is None or not self.flops:
            return None
        return unit_cycles(self.loop.always, self.rates, self.conflicts)

    @property
    def limiter(self):
        """The unit that sets `bound`."""
        busy = {unit: n for unit, n in self.cycles.items() if unit != "stall"}
        return max(busy, key=busy.get)

    def bound(self):
        """TFLOP/s of the whole GPU when every unit overlaps with every other."""
        return self._tflops(self.cycles[self.limiter])

    def lock(self, warpgroups):
        """TFLOP/s when matmuls and softmax never overlap, with `warpgroups` resident on an SM."""
        c = self.cycles
        return self._tflops(
            max(c["tensor"], c["smem"]) + max(c["stall"] / warpgroups, c["mufu"], c["alu"], c["fma"], c["issue"])
        )

    @cached_property
    def steps(self):
        """The steps of its timeline."""
        return timeline.steps_of(self.loop, lambda instructions: unit_cycles(instructions, self.rates, self.conflicts))

    def expected(self, warpgroups_per_cta, ctas, num_stages, waits):
        """TFLOP/s of a trip with its `waits`, with `ctas` resident on an SM."""
        cycles = timeline.sm_cycles(self.steps, warpgroups_per_cta, ctas, num_stages, waits)
        return self._tflops(cycles / (ctas * warpgroups_per_cta))

    def _tflops(self, cycles):
        return self.useful * self.flops / cycles * self.rates.num_sms * self.rates.clock_ghz / 1e3


@dataclass(frozen=True)
class Report:
    """The figures of a compiled kernel."""

    kernel: str
    arch: str
    threads: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    static_spills: int
    warp_specialized: bool
    ctas_per_sm_by: dict[str, int]
    loops: tuple[LoopModel, ...]
    num_stages: int | None = None  # of the software pipeline; a cubin does not contain it

    @property
    def hot(self):
        """The loop over full tiles. None if no loop has matmuls.

        It has the most FLOP per trip (with tcgen05 the most matmuls) and, among equals, the fewest comparisons and
        selections, since masks are made of them. Other instructions do not tell the loops apart: ptxas of Triton 3.6
        computes the descriptors of the second loop's matmuls anew, in more instructions than a mask takes.
        """

        def rank(loop):
            return loop.flops, loop.mma_instructions, -loop.comparisons, -loop.instructions

        return max(self.loops, key=rank, default=None)

    @property
    def opcodes(self):
        """Instructions of a trip of the hot loop, by opcode."""
        return self.hot.histogram if self.hot else Counter()

    @property
    def ctas_per_sm(self):
        return min(self.ctas_per_sm_by.values())

    @property
    def occupancy_limit(self):
        """The resource that limits the number of CTAs on an SM."""
        return min(self.ctas_per_sm_by, key=self.ctas_per_sm_by.get)

    @property
    def mma_warpgroups_per_sm(self):
        """Resident warpgroups that run the loop: all of them, or the consumers of a warp-specialized kernel."""
        per_cta = max(1, self.threads // (32 * WARPS_PER_WARPGROUP))
        if self.warp_specialized and per_cta > 1:
            per_cta = max(1, min(per_cta - 1, len(self.loops)))
        return self.ctas_per_sm * per_cta

    @property
    def bound(self):
        """`bound` in TFLOP/s (see the module); None where the model does not apply."""
        return self.hot.bound() if self._modelled else None

    @property
    def lock(self):
        """`lock` in TFLOP/s (see the module); None where the model does not apply."""
        return self.hot.lock(self.mma_warpgroups_per_sm) if self._modelled else None

    @property
    def expected(self):
        """`expected` in TFLOP/s (see the module). None where the model does not apply, and for a warp-specialized
        kernel, whose warps run different loops at the same time.
        """
        waits = timeline.WAITS.get(self.arch)
        if not self._modelled or self.warp_specialized or self.num_stages is None or waits is None:
            return None
        warpgroups = max(1, self.threads // (32 * WARPS_PER_WARPGROUP))
        return self.hot.expected(warpgroups, self.ctas_per_sm, self.num_stages, waits)

    @property
    def _modelled(self):
        return self.hot is not None and self.hot.cycles is not None and self.ctas_per_sm > 0

    def row(self):
        """One row of a table."""
        hot = self.hot
        return {
            "kernel": self.kernel,
            "arch": self.arch,
            "registers": self.registers,
            "stack B": self.stack_bytes,
            "shared B": self.shared_bytes,
            "CTAs/SM": self.ctas_per_sm,
            "limited by": self.occupancy_limit,
            "spills": self.static_spills,
            "spills in loop": hot and hot.spills,
            "loop instructions": hot and hot.instructions,
            "matmuls": hot and " ".join(f"{n} {shape}" for shape, n in hot.mma_shapes.items()),
            "async copies": hot and hot.async_copies,
            "useful share": hot and hot.useful,
            "bound by": hot.limiter if self._modelled else None,
            "bound TFLOP/s": self.bound,
            "lock TFLOP/s": self.lock,
            "expected TFLOP/s": self.expected,
        }


def analyze(kernel, shared_bytes=None, conflicts=1.0):
    """Report on `kernel`: a compiled Triton or Gluon kernel (with `.asm` and `.metadata`), or the bytes of a cubin.

    `shared_bytes` is the dynamic shared memory of a launch. A compiled kernel knows it and a cubin does not; without it
    the occupancy ignores shared memory. `conflicts` multiplies the shared-memory time of the loops. For an AMD kernel
    the result is an `amdgcn.Report`, which has counts and no model.
    """
    if isinstance(kernel, bytes | bytearray):
        cubin, useful, num_stages = kernel, 1.0, None
    elif "amdgcn" in kernel.asm:
        return amdgcn.analyze(kernel.asm["amdgcn"], kernel.metadata.shared)
    else:
        useful = useful_share(kernel.asm["ttgir"])
        cubin, num_stages = kernel.asm["cubin"], getattr(kernel.metadata, "num_stages", None)
        shared_bytes = kernel.metadata.shared if shared_bytes is None else shared_bytes
    code = sass.disassemble(cubin)
    shared_bytes = shared_bytes or 0
    opcodes = Counter(i.opcode for i in code.instructions)
    rates = RATES.get(code.arch)
    return Report(
        kernel=code.name,
        arch=code.arch,
        threads=code.threads,
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        shared_bytes=shared_bytes,
        static_spills=sum(opcodes[opcode] for opcode in sass.SPILL_OPCODES),
        warp_specialized=opcodes["USETMAXREG"] > 0,
        ctas_per_sm_by=_ctas_per_sm(code, shared_bytes),
        loops=tuple(LoopModel(loop, rates, useful, conflicts) for loop in code.mma_loops()),
        num_stages=num_stages,
    )


def unit_cycles(instructions, rates, conflicts=1.0):
    """{unit: busy cycles per warpgroup} of consecutive instructions, see the module."""
    count = Counter(i.opcode for i in instructions)
    shared = conflicts * sum(map(_shared_bytes, instructions)) / SMEM_BYTES_PER_CLOCK
    return {
        "tensor": sum(_mma_cycles(i, rates) for i in instructions),
        "smem": shared + WARPS_PER_WARPGROUP * count["SHFL"],
        "mufu": _warp_cycles(SFU_LANES) * sum(count[opcode] for opcode in _MUFU),
        "alu": _warp_cycles(ALU_LANES) * sum(count[opcode] for opcode in _ALU),
        "fma": _warp_cycles(rates.fp32_lanes) * sum(count[opcode] for opcode in _FP32)
        + _warp_cycles(ALU_LANES) * sum(count[opcode] for opcode in _INTEGER_MULTIPLY),
        "issue": len(instructions),
        "stall": sum(max(1, i.stall) for i in instructions),
    }


def useful_share(ttgir):
    """The share of a kernel's matmul FLOP that no other warp repeats, from the layouts of the results."""
    layouts = {name: [int(n) for n in f"{warps}, {shape}".split(",")] for name, warps, shape in _LAYOUT.findall(ttgir)}
    useful = executed = 0
    for k, m, n, name in _PRODUCT.findall(ttgir):
        k, m, n = int(k), int(m), int(n)
        warps_m, warps_n, rows, columns, *_ = layouts[name]
        useful += m * n * k
        executed += max(m, warps_m * rows) * max(n, warps_n * columns) * k
    return useful / executed if executed else 1.0


def _ctas_per_sm(code, shared_bytes):
    capacity = CAPACITY[code.arch]
    warps = code.threads // 32
    registers_per_warp = -(-code.registers * 32 // REGISTER_ALLOCATION_UNIT) * REGISTER_ALLOCATION_UNIT
    return {
        "registers": capacity.registers // (registers_per_warp * warps),
        "shared memory": capacity.shared_bytes // (shared_bytes + SHARED_BYTES_RESERVED_PER_CTA),
        "warps": capacity.warps // warps,
        "CTAs": capacity.ctas,
    }


def _warp_cycles(lanes_per_sm):
    """Cycles for which an instruction of one warp occupies its sub-partition's share of the lanes."""
    return 32 * WARPS_PER_WARPGROUP // lanes_per_sm


def _mma_flops(instruction):
    """FLOP of a warpgroup: one wgmma, or the mma.sync of its four warps."""
    if found := _WGMMA.match(instruction.mnemonic):
        m, n, k = map(int, found.groups())
        return 2 * m * n * k
    if found := _MMA_SYNC.match(instruction.mnemonic):
        m, n, k = _MMA_SYNC_SHAPES[found.group(1)]
        return WARPS_PER_WARPGROUP * 2 * m * n * k
    return 0


def _mma_cycles(instruction, rates):
    rate = rates.mma_flops
    if instruction.opcode in ("QGMMA", "IGMMA", "QMMA", "IMMA"):
        rate *= 2
    if ".TF32" in instruction.mnemonic:
        rate /= 2
    if not _WGMMA.match(instruction.mnemonic):
        rate *= rates.mma_sync_share
    return _mma_flops(instruction) / rate


def _shared_bytes(instruction):
    """Shared-memory traffic of a warpgroup: the operands of one wgmma, or the accesses of its four warps."""
    if found := _WGMMA.match(instruction.mnemonic):
        m, n, k = map(int, found.groups())
        a_in_registers = re.match(r"R\d+, R\d+", instruction.operands)
        return (n * k + (0 if a_in_registers else m * k)) * _WGMMA_ELEMENT_BYTES[k]
    if instruction.opcode not in _SHARED_ACCESS:
        return 0
    modifiers = instruction.mnemonic.split(".")
    if instruction.opcode in ("LDSM", "STSM"):
        per_warp = 128 * (4 if "4" in modifiers else 2 if "2" in modifiers else 1)  # 8x8 tiles of 2 bytes
    else:
        per_warp = 32 * (16 if "128" in modifiers else 8 if "64" in modifiers else 4)
    return WARPS_PER_WARPGROUP * per_warp
