"""Time of a trip of the hot loop with its waits, from a timeline of the machine code.

The units of an SM (perf/model/loop_model.py) say how busy a trip keeps them, not when. Here a trip is walked in the
order of its instructions, for one CTA alone with its warpgroups in step:

    wgmma       is queued behind earlier ones; WARPGROUP.DEPBAR waits for all but the last groups
    loads       arrive `latency` cycles after issue. The wait for a TMA load of stage s is s - 1 trips later, with one
                stage in the same trip; cp.async groups are counted by DEPBAR
    BAR.SYNC    costs `barrier` cycles
    the rest    between two of these: the stall counts of one warp, or the time of its busiest unit for all warpgroups,
                times `stretch`

With several CTAs on an SM, a trip also waits for units that other CTAs keep busy: on average half of the other's work
there, whenever the other uses it.

The timeline leaves out the size of a load (a fit gave it no weight), DRAM, clock drops under load, masked tiles,
prologues and the last wave, which make a pass slower than its loop.
"""

import re
from dataclasses import dataclass, field
from math import sqrt

TRIPS = 8  # trips of a timeline; it is periodic after half of them
VECTOR_UNITS = ("smem", "mufu", "alu", "fma", "issue")

_PENDING = re.compile(r", 0x([0-9a-f]+)")  # DEPBAR.LE SB0, 0x1: how many groups may still be pending


@dataclass(frozen=True)
class Waits:
    """Constants of an architecture, in cycles; `stretch` is a ratio."""

    latency: float
    barrier: float
    stretch: float


# Fitted together on an H100 80GB HBM3 (SXM, driver 580, Triton 3.6, 1.755 GHz assumed) to 79 times of forward, backward
# and MLA decode with head_dim 128 or latent 512, in bf16 and fp8. The fit counted whole passes, masked tiles and waves,
# 2500 cycles for a program outside its loop, and the times of launches and merges. Its error is 6 % in the median and
# 18 % at worst. With each family left out in turn it is: forward 6 and 18 %, backward 3 and 11 %, MLA 14 and 19 %.
# `stretch` then stays at 1.7, while `latency` (419 to 665) and `barrier` (28 to 109) trade off: only their sum is
# determined. Forward with two stages of 128x128 is predicted some 10 % too fast. No fit has other GPUs, Tritons or head
# dimensions.
WAITS = {
    "sm_90": Waits(
        latency=500,  # near the latency of an L2 hit; key tiles are mostly in L2, since neighbours read them too
        barrier=85,  # includes the wait for the slowest warp, fences and address arithmetic
        stretch=1.7,  # results of SHFL, MUFU and LDS wait on scoreboards, which stall counts do not include
    ),
}


@dataclass(frozen=True)
class Step:
    """Work up to an event, per warpgroup: `stall` cycles of one warp, `busy` cycles of units, then the event.

    `cycles` is the duration of a wgmma, `pending` the number of groups that a wait allows, and `commits` says whether a
    wgmma ends a group.
    """

    stall: float
    busy: dict
    event: str = ""
    cycles: float = 0.0
    pending: int = 0
    commits: bool = False


def steps_of(loop, price):
    """The steps of a trip of a `sass.Loop`. price(instructions) gives the cycles of units, as `LoopModel.cycles`."""
    steps, since = [], []
    # A copy that only some warps or trips execute is off the main path.
    off_path = [i for i in loop.conditional if _event(i) in ("load", "commit")]
    kept = {i.address for i in off_path}
    for instruction in sorted([*loop.always, *off_path], key=lambda i: i.address):
        event = _event(instruction)
        if event != "matmul" and instruction.address not in kept:
            since.append(instruction)
        if event:
            steps.append(_step(since, price, instruction, event))
            since = []
    return [*steps, _step(since, price)]


def _step(instructions, price, last=None, event=""):
    busy = price(instructions)
    stall = busy.pop("stall")
    if event == "matmul":
        own = price([last])
        cycles = max(own["tensor"], own["smem"])
        return Step(stall + max(1, last.stall), busy, event, cycles, commits="gsb0" in last.operands)
    pending = _PENDING.search(last.operands) if event in ("matmuls done", "groups here") else None
    return Step(stall, busy, event, pending=int(pending.group(1), 16) if pending else 0)


def _event(instruction):
    opcode, mnemonic = instruction.opcode, instruction.mnemonic
    if opcode in ("HGMMA", "QGMMA", "IGMMA"):
        return "matmul"
    if opcode == "WARPGROUP":
        return "matmuls done" if "DEPBAR" in mnemonic else ""
    if opcode == "SYNCS":
        return "load here" if "TRYWAIT" in mnemonic else ""
    if opcode == "DEPBAR":
        return "groups here" if "SB0" in instruction.operands else ""
    return {"BAR": "barrier", "UTMALDG": "load", "LDGDEPBAR": "commit"}.get(opcode, "")


@dataclass
class _Clock:
    """One CTA on its timeline."""

    steps: list
    warpgroups: int
    distance: int  # trips from the issue of a TMA load to its wait
    waits: Waits
    now: float = 0.0
    matmuls_end: float = 0.0
    matmul_groups: list = field(default_factory=list)
    loads: list = field(default_factory=list)  # arrival times
    copy_groups: list = field(default_factory=list)

    def trip(self, number):
        """Walk the steps of a trip; trips are numbered from 0."""
        loads = sum(step.event == "load" for step in self.steps)
        load_waits = sum(step.event == "load here" for step in self.steps)
        waited = 0
        for step in self.steps:
            self.now += _cycles(step, self.warpgroups, self.waits)
            if step.event == "matmul":
                self.matmuls_end = max(self.matmuls_end, self.now) + self.warpgroups * step.cycles
                if step.commits:
                    self.matmul_groups.append(self.matmuls_end)
            elif step.event == "matmuls done":
                self._wait(self.matmul_groups, step.pending)
            elif step.event == "barrier":
                self.now += self.waits.barrier
            elif step.event == "load":
                self.loads.append(self.now + self.waits.latency)
            elif step.event == "load here":
                waited += 1
                issued = (number - self.distance) * loads + -(-waited * loads // load_waits)  # waits share the loads
                if 0 < issued <= len(self.loads):
                    self.now = max(self.now, self.loads[issued - 1])
            elif step.event == "commit":
                self.copy_groups.append(self.now + self.waits.latency)
            elif step.event == "groups here":
                self._wait(self.copy_groups, step.pending)

    def _wait(self, groups, pending):
        done = groups[: len(groups) - pending]
        self.now = max([self.now, *done[-1:]])


def _cycles(step, warpgroups, waits):
    """Time from the previous event to a step's event. mma.sync is no event, since a warp waits for it in place."""
    vector = max(step.busy[unit] for unit in VECTOR_UNITS)
    return max(waits.stretch * max(step.stall, warpgroups * vector), warpgroups * step.busy["tensor"])


def trip_cycles(steps, warpgroups, num_stages, waits):
    """Cycles per trip of a CTA with this many warpgroups that is alone on its SM."""
    clock = _Clock(steps, warpgroups, max(0, num_stages - 1), waits)
    ends = []
    for number in range(TRIPS):
        clock.trip(number)
        ends.append(clock.now)
    half = TRIPS // 2
    return (ends[-1] - ends[half - 1]) / (TRIPS - half)


def sm_cycles(steps, warpgroups, ctas, num_stages, waits):
    """Cycles in which each CTA of an SM makes a trip."""
    alone = trip_cycles(steps, warpgroups, num_stages, waits)
    tensor = warpgroups * sum(step.cycles + step.busy["tensor"] for step in steps)
    vector = warpgroups * waits.stretch * max(sum(step.busy[unit] for step in steps) for unit in VECTOR_UNITS)
    # Another CTA uses a unit for `busy` of `together` cycles, and the wait is then half of `busy`: together = alone +
    # (ctas - 1) * sum(busy * busy / 2) / together.
    others = (ctas - 1) * (tensor**2 + vector**2) / 2
    together = (alone + sqrt(alone**2 + 4 * others)) / 2
    return max(together, ctas * tensor, ctas * vector)
