"""Folders of results, and the one table layout of all speeds: written, read and checked here.

A row says what ran (family, provider, pass, shape), how fast, on what, and whether it was measured or predicted. Rows
are written to disk as soon as they are known, so an interrupted run keeps what it finished.
"""

import csv
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import get_args

ROOT = Path(__file__).parent  # committed results; docs/performance.md is written from them
LOCAL = ROOT.parent / "out"  # default output of runs; git ignores it
OURS = "triton_attn"  # our name as a provider
BOUND, LOCK = f"{OURS}, bound", f"{OURS}, lock"  # predicted: matmuls and softmax overlap fully, or never
MEASURED = "measured"
PREDICTED = "predicted from compiled code, not measured"
MODELLED = "predicted by the cost model of mla_prefill, not measured"
MODELLED_PARALLEL = "predicted by the cost model of triton_attn.parallel, not measured"
PUBLISHED = "published by ring-flash-attention, measured by its authors"
SOURCES = (MEASURED, PREDICTED, MODELLED)
SPEEDS = {"tflops": "TFLOP/s", "gbps": "GB/s"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a results CSV; None is an empty cell.

    `gbps` is GB/s. `roof_share` is the share of the roof measured on that machine; for a prediction, of the data
    sheet's memory bandwidth. `cache_dtype` is empty without a cache and may be empty if it equals `dtype`. `note` has
    the config, or the reason why a provider has no figure.
    """

    family: str
    provider: str
    direction: str  # forward, backward, both, decode, prefill; the CSV calls it pass, a reserved word in Python
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool
    window: int | None = None
    page_size: int | None = None
    cache_dtype: str | None = None
    dtype: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    roof_share: float | None = None
    gpu: str
    driver: str | None
    torch: str
    triton: str
    commit: str | None
    source: str  # one of SOURCES
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LatentPrefillRow(Row):
    """`ms` is p50_ms or its prediction. Our own schedules also have: bytes of workspace beside inputs and outputs, the
    bytes for all heads at once, and whether "auto" chooses the schedule.
    """

    schedule: str | None
    ms: float | None
    workspace_bytes: int | None
    all_heads_bytes: int | None
    is_auto: bool


@dataclass(frozen=True, kw_only=True)
class ParallelRow:
    """One row of a results CSV of context-parallel attention: one layer, one causal sequence in bf16.

    A share is the time that one GPU would take for its part of the FLOPs, over the time of the call. received: bytes
    that a rank receives from others. memory: bytes on a GPU at the peak, its rows included and, for both passes, their
    gradients. None is an empty cell. With "ring+ulysses" the mesh has two dimensions, and the second is a node.
    """

    model: str
    num_gpus: int
    seqlen: int
    method: str
    is_auto: bool  # whether the cost model chooses the method, of those with its mesh
    forward_ms: float
    both_ms: float
    forward_share: float
    both_share: float
    forward_received: int | None = None
    both_received: int | None = None
    forward_memory: int | None = None
    both_memory: int | None = None
    gpu: str
    driver: str | None = None
    torch: str | None = None
    triton: str | None = None
    commit: str | None = None
    source: str  # MEASURED, MODELLED_PARALLEL or PUBLISHED


def columns_of(row_type):
    return ["pass" if field.name == "direction" else field.name for field in fields(row_type)]


COLUMNS = columns_of(Row)
VERSIONS = ["driver", "torch", "triton", "commit"]


def holds_speeds(path):
    """Whether a CSV is a table of speeds, valid or not. Only such tables have the columns family and provider."""
    with open(path, newline="") as file:
        return {"family", "provider"} <= set(next(csv.reader(file), ()))


def has_rows(path):
    """Whether a CSV has a row below its header. A run that was interrupted at once has none."""
    with open(path, newline="") as file:
        return len(list(islice(csv.reader(file), 2))) == 2


def read_any(path):
    """Any CSV of results as a pandas DataFrame. Versions are text: a commit may be all digits, or look like 1.2e34."""
    import pandas as pd  # here, since a GPU run writes rows and may have no pandas

    return pd.read_csv(path, dtype=dict.fromkeys(VERSIONS, str))


def read(path):
    """A table of speeds as a pandas DataFrame. Columns beside those of `Row` are kept.

    Raises:
        ValueError: a column is missing, a required cell is empty or of the wrong type, a source is unknown, a measured
            speed has no times, or a row has neither a speed nor a note. The message names file, column and line.
    """
    status = Path(path).stat()
    return _read(Path(path), status.st_mtime_ns, status.st_size).copy()


@lru_cache(maxsize=256)  # a report reads each table for every plot that may show its measurements
def _read(path, mtime, size):
    import pandas as pd  # here, since a GPU run writes rows and may have no pandas

    kinds = {column: get_args(field.type) or (field.type,) for column, field in zip(COLUMNS, fields(Row))}
    data = pd.read_csv(path, dtype={column: str for column, kind in kinds.items() if str in kind})
    if missing := [column for column in COLUMNS if column not in data]:
        raise ValueError(f"{path}: expected the columns {', '.join(missing)} in a table of speeds")
    data["note"] = data["note"].fillna("")
    for column, kind in kinds.items():
        if NoneType not in kind:
            _check(path, data[column], data[column].notna(), f"expected {kind[0].__name__}")
        if kind[0] in (int, float):
            numbers = pd.to_numeric(data[column], errors="coerce")
            right = data[column].isna() | (numbers % 1 == 0 if kind[0] is int else numbers.notna())
            _check(path, data[column], right, f"expected {kind[0].__name__}")
    _check(path, data["causal"], data["causal"].astype(str).isin(["True", "False"]), "expected True or False")
    _check(path, data["source"], data["source"].isin(SOURCES), f"expected one of {', '.join(SOURCES)}")
    has_speed = data[list(SPEEDS)].notna().any(axis=1)
    for column in ("p20_ms", "p50_ms", "p80_ms"):
        timed = data[column].notna() | ~has_speed | (data["source"] != MEASURED)
        _check(path, data[column], timed, "expected the time of a measured speed")
    _check(path, data["note"], has_speed | (data["note"] != ""), "expected the reason why there is no speed")
    return data


def _check(path, column, right, expected):
    if not right.all():
        row = int(right.argmin())
        raise ValueError(f"{path}: column {column.name}, line {row + 2}: {expected}, got {column.iloc[row]!r}")


class Table:
    """A CSV that grows one row at a time. It replaces an older file of its name."""

    def __init__(self, path, columns):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self.append(columns)

    def append(self, row):
        self._writer.writerow(row)
        self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()
