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
    )
