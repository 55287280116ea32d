"""What the assembly of an AMD kernel says about itself: registers, spills, matrix instructions. Counts, not a model."""

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Registers are per lane; `vgprs` is the unified file, accumulation registers included."""

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
    opcodes: Counter  # of a trip of the hot loop

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
            "products": " ".join(f"{n} {name}" for name, n in self.mfma.items()),
        }


def analyze(assembly, shared_bytes):
    """Report on the assembly text of a compiled AMD kernel; `shared_bytes` is what a launch gives it."""

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
    """The interior loop's instructions by opcode: of innermost loops it has the most products and, among equals, the
    fewest instructions, since masks only add some. Empty if no loop multiplies matrices."""
    loops = [Counter(re.findall(r"^\s+([a-z]\w+)", body, re.MULTILINE)) for body in _innermost_loops(assembly)]
    hot = max(loops, key=lambda loop: (_products(loop), -loop.total()), default=Counter())
    return hot if _products(hot) else Counter()


def _products(opcodes):
    return sum(n for opcode, n in opcodes.items() if "mfma" in opcode)


def _innermost_loops(assembly):
    """The text of each, from its header to the last jump back there."""
    for label in re.findall(r"^(\.\w+):.*Inner Loop Header", assembly, re.MULTILINE):
        jump = rf"s_c?branch\w* {re.escape(label)}$"
        yield re.search(rf"^{re.escape(label)}:.*{jump}", assembly, re.MULTILINE | re.DOTALL).group()
