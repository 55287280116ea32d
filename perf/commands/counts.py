"""Memory traffic, bank conflicts and FLOP of the default configs, relative to the minimum of the call.

Needs no GPU: the emulator of triton_attn.toolchain runs the code compiled for sm_80 and sm_90 and counts. Calls are
small, with real widths (perf/workloads/counted.py). For each kernel:

    instructions       PTX instructions that its warps executed
    read, written      bytes of global memory, each 32-byte sector counted once per launch, over the bytes that the call
                       needs: the minimum DRAM traffic
    sectors            sectors of all requests, over the minimum for their bytes: above 1, sectors are partly used
    wavefronts         of shared-memory requests in the hot loop (in a kernel without matmuls: everywhere), over the
                       wavefronts without bank conflicts
    issued             tensor-core FLOP over the FLOP of the tiles with at least one visible pair: above 1, warps repeat
                       each other's matmuls or fully masked tiles are computed
    useful share       share of the issued FLOP that belongs to visible pairs

--lines gives the same by source line. --update-counts writes the figures that a test compares, for the installed
Triton.
"""

import os
from dataclasses import dataclass
from pathlib import PurePath
from unittest import mock

import torch

from perf.commands.inspect import cases_of, write
from perf.harness.parallel import map_in_processes
from perf.harness.progress import tqdm
from perf.model.candidates import FAMILIES
from perf.results.baseline import COUNTED
from perf.results.compare import number_kernels
from perf.results.tables import print_table, tile_name
from triton_attn.flash.configs import HOPPER_HEAD_DIMS

ARCHS = ("sm_80", "sm_90")
# A figure above its bar needs a reason, which is printed beside it.
BARS = {"read": 1.02, "written": 1.02, "sectors": 1.0, "wavefronts": 1.0, "issued": 1.0}
DIGITS = 4
DTYPE, FLOAT8 = "bfloat16", "float8_e4m3fn"
HEAD_DIMS = 64, 128, 256, 512
CHUNK = 128  # queries of a chunk of a prompt
INSPECTED = ("flash", "paged", "mla")
FAMILY_NAMES = ("flash", "flash_backward", "paged", "paged_prefill", "mla", "mla_prefill")
FAMILY_NAMES += ("append", "append_latent", "copy", "gather", "gather_latent", "merge")

_HALVES = "16 elements of fp8 a thread: a load of 16-bit rows has a sector in two requests, the second hits L1"
_ROWS_OF_656 = "rows of 656 bytes are not aligned to sectors"
_REDUCED = "Triton 3.6: warps that share rows exchange maxima and sums, 2 lanes to a bank; 3.9 has no conflict"
_REPEATED = "8 warps on a tile of 64 rows repeat matmuls; 4 warps spill"
# (kernel, figure, part of the case, reason)
REASONS = (
    ("_append_kv_cache_kernel", "sectors", FLOAT8, _HALVES),
    ("_append_latent_cache_kernel", "sectors", FLOAT8, f"{_HALVES}; {_ROWS_OF_656}"),
    ("_gather_cache_kernel", "sectors", "page_size=64", _ROWS_OF_656),
    ("_mla_absorbed_kernel", "sectors", FLOAT8, f"{_ROWS_OF_656}, and their scales are half a sector"),
    (
        "_mla_absorbed_kernel",
        "wavefronts",
        FLOAT8,
        "decoded values are stored to shared memory by Triton's layout of bytes, 2 lanes to a bank",
    ),
    ("_mla_absorbed_kernel", "wavefronts", f"cache_dtype={DTYPE}", _REDUCED),
    ("_flash_fwd_kernel", "wavefronts", "head_dim=256", _REDUCED),
    (
        "_append_kv_cache_kernel",
        "wavefronts",
        "interleaved",
        "Triton 3.6: one layout conversion through shared memory has conflicts; 3.9 has none",
    ),
    (
        "_merge_kernel",
        "sectors",
        "num_heads",
        "lse is stored by head and a program's rows by query: 4 bytes of a sector are used, the rest hits L2",
    ),
    (
        "_merge_kernel",
        "wavefronts",
        "num_heads",
        "reductions across threads outside the loop; on sm_90 an eighth of them conflict",
    ),
    ("_merge_project_kernel", "sectors", "weights", "the lse of 4 tokens are 64 bytes apart"),
    (
        "_flash_bwd_dkdv_kernel",
        "wavefronts",
        "deterministic=False",
        "4 lanes hold 32 bytes of an fp32 row of dQ and the tensor map swizzles 16 bytes: pairs of rows share a bank",
    ),
    ("_flash_bwd_dkdv_kernel", "issued", "head_dim=256", _REPEATED),
    (
        "_mla_decode_hopper_kernel",
        "issued",
        "num_heads",
        "the first matmul of a program has zero weights: one extra tile of values per program",
    ),
    (
        "_mla_decode_hopper_kernel",
        "sectors",
        FLOAT8,
        f"{_ROWS_OF_656}, their scales are loaded one by one, and out half a sector a request; the rest hits L1 or L2",
    ),
    (
        "_mla_decode_hopper_kernel",
        "sectors",
        "num_heads",
        "out is stored in the accumulator layout, half a sector per request; the next request has the other half",
    ),
)


@dataclass(frozen=True)
class CountedCase:
    """A call of perf/workloads/counted.py: its family, its keywords (`shape`), the target, and the value of
    TRITON_ATTN_KERNELS.
    """

    family: str
    arch: str
    dtype: str
    shape: dict
    kernels: str = "portable"

    @property
    def columns(self):
        shape = " ".join(f"{name}={value}" for name, value in self.shape.items())
        family = self.family if self.kernels == "portable" else f"{self.family}_{self.kernels}"
        return {"family": family, "arch": self.arch, "dtype": self.dtype, "case": shape}

    def count(self):
        """(row, rows of its source lines) for each kernel of the call."""
        from perf.workloads.counted import CALLS  # imports triton_attn
        from triton_attn.toolchain.emulator import emulate

        torch.manual_seed(0)
        call, work = CALLS[self.family](getattr(torch, self.dtype), **self.shape)
        with (
            mock.patch.dict(os.environ, TRITON_ATTN_KERNELS=self.kernels),
            emulate(self.arch, schedule="late", counts=True) as log,
        ):
            call()
        found = [(launch, work[task]) for launch in log if (task := task_of(launch)) in work]
        if not found:
            raise LookupError(f"expected a launch of {' or '.join(work)}; got {[x.name for x in log]}")
        rows = [self._row(*x) for x in found]
        number_kernels(rows)
        return [(row, self._lines(launch)) for row, (launch, _) in zip(rows, found)]

    def _row(self, launch, work):
        counts = launch.counts
        total, hot = counts.total(), counts.total(counts.hot())
        counted = hot if hot.flops else total
        return self.columns | {
            "kernel": launch.name,
            "config": config_of(launch),
            "instructions": total.executed,
            "read": _ratio(counts.bytes_read, work.reads),
            "written": _ratio(counts.bytes_written, work.writes),
            "sectors": _ratio(total.sectors, total.least_sectors),
            "wavefronts": _ratio(counted.wavefronts, counted.least_wavefronts),
            "issued": _ratio(total.flops, work.tiles(launch) if work.tiles else None),
            "useful share": _ratio(work.flops, total.flops),
            "bytes read": counts.bytes_read,
            "bytes written": counts.bytes_written,
            "sectors requested": total.sectors,
            "wavefronts counted": counted.wavefronts,
            "FLOP issued": total.flops,
        }

    def _lines(self, launch):
        counts = launch.counts
        hot = {counts.program.where(pc) for pc in counts.hot().nonzero()[0]}
        lines = [
            {"kernel": launch.name, "line": _short(where), "hot": where in hot, "kind": kind} | tally._asdict()
            for (where, kind), tally in counts.by_line().items()
        ]
        return [self.columns | line for line in lines]


def task_of(launch):
    """The key of a launch's `Work`: the kernel's name, and of the dkdv kernel whether it computes dQ too, or dK or dV
    alone.
    """
    gradients = {name[:2] for name in launch.counts.written}  # dq.ptr or dq_desc
    variants = {("dk",): ", dk", ("dv",): ", dv", ("dk", "dv"): ""}
    is_dkdv = launch.name == "_flash_bwd_dkdv_kernel"
    return launch.name + (variants.get(tuple(sorted(gradients)), ", fused") if is_dkdv else "")


def config_of(launch):
    """The `tile_name` of a kernel, or its number of warps if it has no such tiles."""
    values = launch.constexprs
    if "BLOCK_M" not in values or "BLOCK_N" not in values:
        return f"w{launch.num_warps}"
    return tile_name(values["BLOCK_M"], values["BLOCK_N"], launch.num_warps, launch.num_stages, values.get("USE_TMA"))


def _ratio(of, to):
    return round(of / to, DIGITS) if to else None


def _short(where):
    path, _, line = where.rpartition(":")
    return f"{'/'.join(PurePath(path).parts[-2:])}:{line}"


def baseline_cases(arch):
    """Every family at its default configs. Shapes are those of perf/commands/inspect.py for the families it has."""
    shapes = {family: [case.shape for case in cases_of(family, arch, DTYPE, HEAD_DIMS)] for family in INSPECTED}
    shapes["flash"] = [shape for shape in shapes["flash"] if shape["causal"]]
    schedules = (False, True) if arch == "sm_90" else (False,)  # fused, split
    shapes["flash_backward"] = [
        {"head_dim": shape["head_dim"], "deterministic": split}
        for shape in shapes["flash"]
        for split in schedules[: 1 if shape["head_dim"] == 512 else 2]  # never fused
    ]
    one_model = shapes["paged"][1]
    shapes["paged_prefill"] = [shape | {"seqlen_q": CHUNK} for shape in shapes["paged"]]
    shapes["paged"] = [*shapes["paged"], one_model | {"num_splits": 4}]
    shapes["mla"] = [*shapes["mla"], shapes["mla"][0] | {"weights": True}]
    shapes["mla_prefill"] = [{"num_heads": 4, "fused": fused} for fused in (False, True)]
    cached = {name: one_model[name] for name in ("num_heads_kv", "head_dim", "page_size")}
    shapes["append"] = [
        {"cache_dtype": dtype, **cached, "rope": rope}
        for dtype, rope in ((DTYPE, "none"), (DTYPE, "halves"), (DTYPE, "interleaved"), (FLOAT8, "halves"))
    ]
    shapes["append_latent"] = [{"cache_dtype": x, "page_size": 64, "rope": "interleaved"} for x in (DTYPE, FLOAT8)]
    shapes["copy"] = [cached]
    shapes["gather"] = [{"cache_dtype": x, **cached} for x in (DTYPE, FLOAT8)]
    shapes["gather_latent"] = [{"cache_dtype": x, "page_size": 64} for x in (DTYPE, FLOAT8)]
    shapes["merge"] = [{"num_heads": one_model["num_heads_q"], "head_dim": one_model["head_dim"]}]
    cases = [CountedCase(family, arch, DTYPE, shape) for family in shapes for shape in shapes[family]]
    if arch == "sm_90":
        dims = [head_dim for head_dim, head_dim_v in HOPPER_HEAD_DIMS.items() if head_dim == head_dim_v]
        hopper = [("flash", shape) for shape in FAMILIES["flash_hopper"].cases(DTYPE, dims)]
        hopper += [("mla", {"num_heads": 128, "cache_dtype": x, "page_size": 64}) for x in (DTYPE, FLOAT8)]
        cases += [CountedCase(family, arch, DTYPE, shape, kernels="hopper") for family, shape in hopper]
    return cases


def count_all(cases, description):
    """The results of `count` for all cases, computed on all cores."""
    counted = map_in_processes(CountedCase.count, cases)
    return [kernel for kernels in tqdm(counted, description, len(cases), unit="case") for kernel in kernels]


def misses(row):
    """{figure over its bar: the reason, or None}."""
    over = [figure for figure, bar in BARS.items() if row[figure] is not None and row[figure] > bar]
    return {figure: reason_of(row, figure) for figure in over}


def reason_of(row, figure):
    return next(
        (why for kernel, of, cases, why in REASONS if (kernel, of) == (row["kernel"], figure) and cases in row["case"]),
        None,
    )


def add_arguments(parser):
    parser.add_argument("--family", dest="families", choices=FAMILY_NAMES, nargs="+", default=FAMILY_NAMES, metavar="F",
                        help=f"families: {', '.join(FAMILY_NAMES)}; default: all")  # fmt: skip
    parser.add_argument("--arch", choices=ARCHS, default="sm_90")
    parser.add_argument("--lines", action="store_true", help="also print a table by source line")
    parser.add_argument(
        "--update-counts",
        action="store_true",
        help="only write tests/perf/counts.csv; other options are ignored",
    )


def run(out_dir, families=FAMILY_NAMES, arch="sm_90", lines=False, update_counts=False):
    """Print the table and write `counts-<arch>.csv`; with lines also `lines-<arch>.csv`."""
    if update_counts:
        return [write_counts()]
    cases = [case for case in baseline_cases(arch) if case.family in families]
    kernels = count_all(cases, f"emulating {arch}")
    rows = [row for row, _ in kernels]
    print_table([_printed(row) for row in rows])
    _print_reasons(rows)
    paths = [write(out_dir / f"counts-{arch}.csv", rows)]
    if lines:
        of_lines = [line for _, of_kernel in kernels for line in of_kernel]
        print_table([_printed(line) for line in of_lines if line["sectors"] or line["wavefronts"] or line["flops"]])
        paths.append(write(out_dir / f"lines-{arch}.csv", of_lines))
    return paths


def _printed(row):
    return {name: value for name, value in row.items() if name not in ("arch", "dtype")}


def _print_reasons(rows):
    found = [(row, figure, why) for row in rows for figure, why in misses(row).items()]
    for kernel, figure, why in dict.fromkeys((row["kernel"], figure, why) for row, figure, why in found):
        print(f"{kernel}, {figure}: {why or 'over the bar, no reason given'}")


def write_counts():
    """Count the cases of the file, and replace the figures of the installed Triton."""
    rows = [row for arch in ARCHS for row, _ in count_all(baseline_cases(arch), f"emulating {arch}")]
    COUNTED.update(rows)
    return COUNTED.path
