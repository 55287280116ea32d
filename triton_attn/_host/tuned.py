"""Tuned configs: the tables that sweeps write, one per architecture in triton_attn/tuned/, and the user's own.

A table is JSON: `format`, `arch` and `entries`. An entry has the calls it is for (`family`, `dtype`, and the fields of
`case` and `buckets` that its Config names), its `config`, and its origin, see ABOUT.

A call takes the entry with its dtype and its case that was made with the same major and minor version of Triton,
because another compiler may spill. Entries of this GPU come first: those of others serve the cases that it has none
for. Of several a call takes the one with the nearest buckets, by the sum of |log2(the call's / the entry's)|; of two
that are equally near, the one with smaller buckets.

Tables are searched from the one added last to the package's. The first table that has the case decides. Without an
entry a call takes the default of the family's configs.py. The package's tables contain only configs measured on a GPU:
predictions are already in the defaults.

An entry of a kernel that may replace a portable one is also a record of it, and makes it the default if
- the entry was measured: its results were right, with the largest `error` beside the `bound` that it must not exceed;
- the portable kernel was not faster in the same run. Its figure is `portable`, and `peers` has those of other packages;
- `device` is this GPU by its full name. H100 SXM, H100 PCIe and H200 differ in SMs, clock, power and memory, so which
  kernel is faster on one is not known from another. If a machine has GPUs of the architecture with several names, no
  record counts. Without such a GPU, where calls are only compiled, all do;
- `kernel`, a digest of the code that the kernel is compiled from (sources.py), is that of this package.

On any other GPU and with any other code the entry still gives the kernel's config, and calls take the portable kernel.
"""

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .checks import fail
from .config import FAMILIES, check_config
from .gpu import gpu_arch, gpu_of
from .sources import kernel_digest

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "tuned"
DTYPES = "float16", "bfloat16"
MEASURED = "measured"


ABOUT = {
    "figure": (int, float),
    "unit": str,
    "source": str,  # measured, or how it was predicted
    "device": str,
    "triton": str,
    "torch": str,
    "commit": (str, type(None)),
}
RECORD = {
    "kernel": str,
    "date": str,
    "error": (int, float),
    "bound": (int, float),
    "portable": (int, float),
    "peers": dict,
}  # of a kernel that may replace a portable one; the first runs did not write all

_added = []  # indices of the user's tables, the last one first
_overrides = {}  # {family: {field: value}} of override_config
_plans = []  # functions whose results depend on tables and are remembered
generation = object()  # replaced each time that tables change


class Tuned(NamedTuple):
    """An entry of a table: its config, and the digest of the kernel that may replace the portable one, or None."""

    config: object
    kernel: str | None


def use_tuned(path: str | os.PathLike[str] | None) -> None:
    """Use the configs of your own table, ahead of the package's and of tables added earlier.

    `python -m perf sweep --table PATH` writes one. The environment variable TRITON_ATTN_TUNED names one that is added
    first. A call only looks its config up; it times nothing, so equal calls run equal code. Calls with an entry's
    dtype, head dims and mask take its config; of several entries, the one with the nearest lengths, page size and rows
    (in log2). Other calls, such as those with fp32, contiguous caches, softcap, ALiBi or dropout, take the defaults.

    Args:
        path: a JSON file; None removes all tables that were added.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a table, an entry is invalid, or no entry is for a GPU and the Triton of this
            machine. The tables in use stay.

    Example:
        >>> triton_attn.use_tuned("tuned.json")  # that a sweep has written
        >>> triton_attn.use_tuned(None)
    """
    _add_environment()
    if path is None:
        _added.clear()
    else:
        _added.insert(0, _index_of(Path(path)))
    forget_plans()


def settings():
    """The user's tables and overrides, to pass to another process."""
    _add_environment()
    return list(_added), dict(_overrides)


def take_settings(tables, overrides):
    """Use the tables and overrides of another process, and no others."""
    _add_environment()
    _added[:] = tables
    _overrides.clear()
    _overrides.update(overrides)
    forget_plans()


def remember(function):
    """functools.lru_cache for the plans of launches, which may depend on tables: it is cleared when they change.

    If another thread changes the tables during the computation, the result is computed again. Stored after the
    clearing, it would stay.
    """

    @functools.lru_cache(maxsize=1024)
    @functools.wraps(function)
    def plan(*args, **kwargs):
        while True:
            before = generation
            result = function(*args, **kwargs)
            if before is generation:
                return result

    _plans.append(plan)
    return plan


def forget_plans():
    global generation
    generation = object()
    for plan in _plans:
        plan.cache_clear()


def rows_class(num_rows):
    """Rows of a tile for num_rows rows: 16, 32, 64, or 128 for all above."""
    return next((rows for rows in (16, 32, 64) if num_rows <= rows), 128)


@remember
def choose(config, case):
    """The config of a call, of the class config: from a tuned table if one has the case, otherwise the default. Fields
    of `override_config` replace its own."""
    chosen = find(config, case) if case.is_tuned else None
    if chosen is None:
        chosen = config.default(case)
    if config.family in _overrides:
        chosen = chosen.with_fields(_overrides[config.family])
        if (obstacle := chosen.obstacle(case)) is not None:
            fail(f"override_config({config.family!r})", "a config that can run", f"{chosen}: {obstacle}")
    return chosen


def find(config, case):
    """The config of the first table that has the case; None if none has."""
    found = _find(config, case)
    return None if found is None else found.config


def _find(config, case):
    _add_environment()
    key = case.arch, config.family, _name(case.dtype), tuple(_name(getattr(case, name)) for name in config.case_types)
    entries = next((table[key] for table in (*_added, _shipped(case.arch)) if key in table), {})
    buckets = [getattr(case, name) for name in config.buckets]
    nearest = min(entries, key=lambda of_entry: (_distance(of_entry, buckets), of_entry), default=None)
    return entries.get(nearest)


def describe(config, case):
    """The fields of a table's entry that say which calls it is for."""
    return {
        "family": config.family,
        "dtype": _name(case.dtype),
        "case": {name: _name(getattr(case, name)) for name in config.case_types},
        "buckets": {name: getattr(case, name) for name in config.buckets},
    }


def _name(value):
    """A value as tables write it: dtypes by name."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def is_chosen(config, case):
    """Whether calls take the kernel of this config: a table says that this code of it may replace the portable one, or
    the user overrides the config."""
    if config.family in _overrides:
        return True
    found = _find(config, case)
    return found is not None and found.kernel is not None and found.kernel == kernel_digest(config.kernel)


def may_replace(portable, config):
    """Whether a kernel may replace the portable one: not if the user overrides only the portable kernel's config."""
    return portable.family not in _overrides or config.family in _overrides


@contextlib.contextmanager
def override_config(family: str, **fields: int | dict[str, int] | None) -> Iterator[None]:
    """Context manager in which these fields replace those of the config that a call would take. Other fields stay.

    It is for trying a config; `python -m perf sweep` searches for the best. Like `use_tuned` it holds for the whole
    process. Contexts nest. The first call inside it, and the first after it, may compile.

    Args:
        family: "flash", "flash_backward" (fields "dkdv", "dq" and "fused", which are dicts), "paged", "mla",
            "mla_prefill"; and on sm_90 "flash_hopper" and "mla_hopper". With "flash" or "mla" overridden, calls take
            the portable kernels.
        fields: fields of the family's config: block_m, block_n, num_warps, num_stages, ...

    Raises:
        ValueError: unknown family or field, or a value that no kernel takes. Raised by a call inside: the config cannot
            run, for instance because its tiles do not fit in shared memory. That is an estimate; if the compiled kernel
            needs more, triton.runtime.errors.OutOfResources is raised. Nothing was launched in either case.

    Example:
        >>> q = torch.randn(1, 64, 2, 64)
        >>> with triton_attn.override_config("flash", block_m=32, num_warps=4):
        ...     out = triton_attn.flash_attention(q, q, q)
    """
    if family not in FAMILIES:
        fail("family", " or ".join(sorted(FAMILIES)), repr(family))
    check_config(f"override_config({family!r})", FAMILIES[family], fields, whole=False)
    before = _overrides.get(family)
    _override(family, fields if before is None else _merged(before, fields))
    try:
        yield
    finally:
        _override(family, before)


def _override(family, fields):
    if fields is None:
        _overrides.pop(family, None)
    else:
        _overrides[family] = fields
    forget_plans()


def _merged(old, new):
    """old updated with new; dicts in both are merged."""
    both_dicts = {name for name, x in new.items() if isinstance(x, dict) and isinstance(old.get(name), dict)}
    return old | {name: _merged(old[name], x) if name in both_dicts else x for name, x in new.items()}


def _distance(of_entry, wanted):
    return sum(abs(math.log2(max(size, 1) / bucket)) for bucket, size in zip(of_entry, wanted))


@functools.cache
def _add_environment():
    if path := os.environ.get("TRITON_ATTN_TUNED"):
        try:
            _added.append(_index_of(Path(path)))
        except (OSError, ValueError) as error:
            raise ValueError(f"TRITON_ATTN_TUNED: {error}") from error


@functools.cache
def _shipped(arch):
    path = SHIPPED / f"{arch}.json"
    return _index(read_table(path)) if path.exists() else {}


def _index_of(path):
    """The index of a user's table. Raises ValueError if no entry is for this machine."""
    table = read_table(path)
    archs = sorted({arch for arch, _ in _gpus_here()})
    if archs and table["arch"] not in archs:
        fail(f"{path}, arch", f"that of a GPU of this machine, {' or '.join(archs)}", table["arch"])
    index = _index(table)
    if not index:
        versions = sorted({entry["triton"] for entry in table["entries"]})
        fail(f"{path}, triton", f"an entry of Triton {_triton_version()}", ", ".join(versions) or "no entry")
    return index


def _index(table):
    """{(arch, family, dtype, values of the case): {values of the buckets: Tuned}} for this Triton, for each case of
    this GPU's entries if it has any."""
    names = {name for arch, name in _gpus_here() if arch == table["arch"]}
    entries = [entry for entry in table["entries"] if _series(entry["triton"]) == _series(_triton_version())]
    own = [entry for entry in entries if names <= {entry["device"]}]
    others = [entry for entry in entries if entry not in own]
    return _index_entries(table["arch"], others, False) | _index_entries(table["arch"], own, True)


def _index_entries(arch, entries, are_own):
    index = {}
    for entry in entries:
        config = FAMILIES[entry["family"]]
        case = tuple(entry["case"][name] for name in config.case_types)
        buckets = tuple(entry["buckets"][name] for name in config.buckets)
        same_case = index.setdefault((arch, entry["family"], entry["dtype"], case), {})
        replaces = are_own and entry["source"] == MEASURED and entry["figure"] >= entry.get("portable", math.inf)
        same_case[buckets] = Tuned(config.from_dict(entry["config"]), entry.get("kernel") if replaces else None)
    return index


def _gpus_here():
    """(architecture, name) of each GPU of this machine."""
    if not torch.cuda.is_available():
        return []
    return [(gpu_arch(i), torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]


def _triton_version():
    import triton  # here, so that this module can be imported without it

    return triton.__version__


def _series(version):
    return version.split(".")[:2]


def read_table(path):
    """Read and check a table. Raises ValueError that names the invalid entry and the reason."""
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        fail(path, "JSON", error)
    _check_fields(path, table, {"format": int, "arch": str, "entries": list})
    if table["format"] != FORMAT:
        fail(f"{path}, format", FORMAT, table["format"])
    if re.fullmatch(r"sm_\d+|gfx\w+", table["arch"]) is None:
        fail(f"{path}, arch", "a name as sm_90 or gfx942", repr(table["arch"]))
    seen = set()
    for i, entry in enumerate(table["entries"]):
        name = f"{path}, entries[{i}]"
        _check_entry(name, entry, gpu_of(table["arch"]))
        fields = "family", "dtype", "case", "buckets", "device"
        key = json.dumps([entry[field] for field in fields] + _series(entry["triton"]))
        if key in seen:
            fail(name, "an entry of its own", "one that an earlier entry is for too")
        seen.add(key)
    return table


def _check_entry(name, entry, gpu):
    fields = {"family": str, "dtype": str, "case": dict, "buckets": dict, "config": dict}
    record = {field: types for field, types in RECORD.items() if isinstance(entry, dict) and field in entry}
    _check_fields(name, entry, fields | ABOUT | record)
    for field, known in (("family", sorted(FAMILIES)), ("dtype", DTYPES)):
        if entry[field] not in known:
            fail(f"{name}, {field}", " or ".join(known), repr(entry[field]))
    config = FAMILIES[entry["family"]]
    _check_fields(f"{name}, case", entry["case"], config.case_types)
    _check_fields(f"{name}, buckets", entry["buckets"], dict.fromkeys(config.buckets, int))
    for bucket, size in entry["buckets"].items():
        if size < 1:
            fail(f"{name}, buckets, {bucket}", "1 or more", size)
    check_config(f"{name}, config", config, entry["config"], whole=True)
    parts = [entry["config"], *(part for part in entry["config"].values() if isinstance(part, dict))]
    if not gpu.tma and any(part.get("use_tma") for part in parts):
        fail(f"{name}, config, use_tma", "false, this architecture has no TMA", True)


def _check_fields(name, value, types):
    """Check that value is a dict with exactly these names and types. A bool is not an int."""
    if not isinstance(value, dict) or value.keys() != types.keys():
        fail(name, f"an object with {', '.join(types)}", f"{', '.join(value) if isinstance(value, dict) else value!r}")
    for field, expected in types.items():
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if type(value[field]) not in kinds:
            fail(f"{name}, {field}", " or ".join(kind.__name__ for kind in kinds), repr(value[field]))
