"""Where figures are kept, and the one table layout of everything that is a speed.

A row says what ran (family, provider, pass, shape), how fast, on what, and whether it was measured or predicted. Rows
are on the disk as soon as they are known: an interrupted run leaves what it had finished.
"""

import csv
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parent / "results"
OURS = "triton_attn"  # as a provider
MEASURED = "measured"
PREDICTED = "predicted from compiled code, not measured"
MODELLED = "predicted by the cost model of mla_prefill, not measured"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a results CSV; None is an empty cell.

    `gbps` is GB/s, `roof_share` the share of the roof measured on that machine, of a prediction the share of the data
    sheet's memory bandwidth; `cache_dtype` is empty without a cache and may be where it is `dtype`; `note` says which
    config ran, or why a provider has no figure.
    """

    family: str
    provider: str
    direction: str  # forward, backward, both, decode, prefill; called pass in the CSV, which no column can be in Python
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
    source: str  # MEASURED, PREDICTED or MODELLED
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LatentPrefillRow(Row):
    """`ms` is p50_ms or its prediction. Of our schedules also: bytes taken beside inputs and outputs, those that all
    heads at once would take, and whether "auto" chooses it."""

    schedule: str | None
    ms: float | None
    workspace_bytes: int | None
    all_heads_bytes: int | None
    is_auto: bool


def columns_of(row_type):
    return ["pass" if field.name == "direction" else field.name for field in fields(row_type)]


COLUMNS = columns_of(Row)


class Table:
    """A CSV that grows by a row at a time and replaces an older file of its name."""

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
