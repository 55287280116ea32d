"""Compiled code of public calls at their default configs, from this commit's triton_attn or another commit's.

Nothing here imports triton_attn before a case is compiled.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import torch

from perf.model import loop_model
from perf.results.compare import number_kernels
from perf.results.tables import tile_name
from perf.workloads.calls import CALLS


@dataclass(frozen=True)
class Inspected:
    """A kernel that a case launches. `row` has its name and the figures of its machine code, `opcodes` the instructions
    of a trip of its hot loop. If the case does not compile, `error` gives the reason and there are no figures.
    """

    row: dict
    opcodes: Counter = field(default_factory=Counter)
    error: str = ""


@dataclass(frozen=True)
class Case:
    """A call of perf/workloads/calls.py: its family, its keywords (`shape`) and its target."""

    family: str
    arch: str
    dtype: str
    shape: dict

    @property
    def columns(self):
        """The columns of a row that identify it."""
        shape = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return {"family": self.family, "arch": self.arch, "dtype": self.dtype, "case": shape}

    def compile(self):
        """An `Inspected` for each kernel of the call that computes attention matmuls."""
        try:
            kernels = [self._inspect(launch) for launch in self._launches()]
            number_kernels([kernel.row for kernel in kernels])
            return kernels
        except (OSError, MemoryError):  # not an error of the case
            raise
        except Exception as error:  # the compiler can raise any exception, and the next case may compile
            message = f"{type(error).__name__}: {error}".split("\n")[0]
            return [Inspected(self.columns, error=message)]

    def _launches(self):
        import triton_attn  # another commit's package may fail to import: this is an error of the case

        try:
            from triton_attn.toolchain import compile_only
        except ImportError:  # the commit has no toolchain
            from triton_attn.testing import compile_only

        call = CALLS[self.family]
        # Only the portable kernels: the model cannot distinguish the loops of hopper.py.
        with mock.patch.dict(os.environ, TRITON_ATTN_KERNELS="portable"), compile_only(self.arch) as launches:
            call.make(triton_attn, getattr(torch, self.dtype), **self.shape)
        kernels = [launch for launch in launches if launch.name in call.kernels]
        if not kernels:
            raise LookupError(f"expected a launch of {' or '.join(call.kernels)}; got {[x.name for x in launches]}")
        return kernels

    def _inspect(self, launch):
        report = loop_model.analyze(launch.kernel)
        values = launch.constexprs
        tile = values["BLOCK_M"], values["BLOCK_N"], launch.num_warps, launch.num_stages
        row = self.columns | {"kernel": launch.name, "config": tile_name(*tile, values.get("USE_TMA"))} | report.row()
        return Inspected(row, report.opcodes)
