"""Configs that sweeps found best: the tables of triton_attn/tuned/, one per architecture, and the user's own.

A table is JSON: `format`, `arch` and `entries`. An entry says what it is for (`family`, `dtype`, and under `case` and
`buckets` what FAMILIES names), its `config`, and where that comes from, see ABOUT.

Which entry serves a call: its dtype and case are the call's, its Triton has the same major and minor version, since
another compiler spills elsewhere, and its buckets are the nearest, by the sum of |log2(the call's / the entry's)|; of
two that are equally near the one with smaller buckets. A call without one has the default of the family's configs.py.
The table that was added last comes first, the package's last; the first that has the case serves it alone.
All come before the defaults. The package's tables hold what a GPU measured and nothing that was predicted: defaults
are chosen by the model that predicts.
"""

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from .checks import fail
from .gpu import gpu_arch, gpu_of

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "tuned"
DTYPES = "float16", "bfloat16"


class Family(NamedTuple):
    """What an entry holds: {name: type} of `case` and of a config, names of `buckets`; with `parts` several configs, of
    which the last may be null."""

    case: dict
    buckets: tuple
    config: dict
    parts: tuple = ()


_TILE = {"block_m": int, "block_n": int, "num_warps": int, "num_stages": int}
_FLASH_CASE = {"head_dim": int, "head_dim_v": int, "causal": bool}
FAMILIES = {
    "flash": Family(_FLASH_CASE, ("seqlen_k",), _TILE | {"use_tma": bool}),
    "flash_hopper": Family(
        {"head_dim": int, "causal": bool}, ("seqlen_k",), {"block_n": int, "groups": int, "num_stages": int}
    ),
    "flash_backward": Family(_FLASH_CASE, ("seqlen_k",), _TILE | {"use_tma": bool}, parts=("dkdv", "dq", "fused")),
    # rows are those of a sequence for one KV head, tile_rows their `rows_class`.
    "paged": Family(
        {"head_dim": int, "head_dim_v": int, "tile_rows": int, "cache_dtype": str},
        ("seqlen_k", "page_size", "rows"),
        _TILE,
    ),
    "mla": Family(
        {"kv_lora_rank": int, "qk_rope_head_dim": int, "tile_rows": int, "cache_dtype": str},
        ("seqlen_k", "page_size", "rows"),
        _TILE,
    ),
    # rows as in "paged".
    "mla_hopper": Family({"kv_lora_rank": int, "qk_rope_head_dim": int}, ("seqlen_k", "rows"), {"num_stages": int}),
    "mla_prefill": Family(
        {"fused": bool, "qk_nope_head_dim": int, "qk_rope_head_dim": int, "v_head_dim": int},
        ("seqlen_k",),
        _TILE | {"block_c": int},
    ),
}
ABOUT = {
    "figure": (int, float),
    "unit": str,
    "source": str,  # measured, or how it was predicted
    "device": str,
    "triton": str,
    "torch": str,
    "commit": (str, type(None)),
}

_added = []  # indices of the user's tables, the last one first
_plans = []  # functions that remember what follows from tables
_generation = object()  # another one each time that tables change


def use_tuned(path: str | os.PathLike[str] | None) -> None:
    """Let the configs of a table of one's own serve, before those of the package and of tables added earlier.

    `python -m perf sweep --table PATH` writes one; the environment variable TRITON_ATTN_TUNED names one that is added
    before all others. Nothing is searched or timed in a call: a config is a look-up, and equal calls run equal code.
    An entry serves calls of its dtype, head dims and mask; lengths, page sizes and rows go to the nearest (log2). All
    others, fp32, contiguous caches, and calls with softcap, ALiBi or dropout have the package's defaults.

    Args:
        path: of a JSON file; None removes all tables that were added.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table of ours, an entry is broken, or none is for a GPU and the Triton of this machine.
            What was in use stays.
    """
    _add_environment()
    if path is None:
        _added.clear()
    else:
        _added.insert(0, _index_of(Path(path)))
    _forget_plans()


def added_tables():
    """Those of the user, for another process to take."""
    _add_environment()
    return list(_added)


def take_tables(tables):
    """Let the user's tables of another process serve, and no others."""
    _add_environment()
    _added[:] = tables
    _forget_plans()


def remember(function):
    """functools.lru_cache for what follows from tables: it forgets when they change.

    What another thread's change of tables overtakes is computed again, since it would be kept after the forgetting.
    """

    @functools.lru_cache(maxsize=1024)
    @functools.wraps(function)
    def plan(*args, **kwargs):
        while True:
            generation = _generation
            result = function(*args, **kwargs)
            if generation is _generation:
                return result

    _plans.append(plan)
    return plan


def _forget_plans():
    global _generation
    _generation = object()
    for plan in _plans:
        plan.cache_clear()


def rows_class(num_rows):
    """Rows that a tile is to hold: 16, 32, 64, or 128 for all above."""
    return next((rows for rows in (16, 32, 64) if num_rows <= rows), 128)


def tuned_config(arch, family, dtype, case, buckets):
    """The config that serves, a dict (of dicts where the family has parts), or None.

    case and buckets hold values in the order of the family's names.
    """
    _add_environment()
    key = arch, family, str(dtype).removeprefix("torch."), tuple(case)
    entries = next((table[key] for table in (*_added, _shipped(arch)) if key in table), {})
    nearest = min(entries, key=lambda of_entry: (_distance(of_entry, buckets), of_entry), default=None)
    return entries.get(nearest)


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
    """The index of a user's table; refused where nothing of it can serve."""
    table = read_table(path)
    archs = _archs_here()
    if archs and table["arch"] not in archs:
        fail(f"{path}, arch", f"that of a GPU of this machine, {' or '.join(archs)}", table["arch"])
    index = _index(table)
    if not index:
        versions = sorted({entry["triton"] for entry in table["entries"]})
        fail(f"{path}, triton", f"an entry of Triton {_triton_version()}", ", ".join(versions) or "no entry")
    return index


def _index(table):
    """{(arch, family, dtype, values of the case): {values of the buckets: config}} of what serves this Triton."""
    index = {}
    for entry in table["entries"]:
        if _series(entry["triton"]) != _series(_triton_version()):
            continue
        kind = FAMILIES[entry["family"]]
        case = tuple(entry["case"][name] for name in kind.case)
        buckets = tuple(entry["buckets"][name] for name in kind.buckets)
        index.setdefault((table["arch"], entry["family"], entry["dtype"], case), {})[buckets] = entry["config"]
    return index


def _archs_here():
    if not torch.cuda.is_available():
        return []
    return sorted({gpu_arch(i) for i in range(torch.cuda.device_count())})


def _triton_version():
    import triton  # not at the top: the package can be imported without it

    return triton.__version__


def _series(version):
    return version.split(".")[:2]


def read_table(path):
    """A table, checked: ValueError says which entry is broken, and how."""
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        fail(path, "JSON", error)
    _check_fields(path, table, {"format": int, "arch": str, "entries": list})
    if table["format"] != FORMAT:
        fail(f"{path}, format", FORMAT, table["format"])
    if re.fullmatch(r"sm_\d+|gfx\w+", table["arch"]) is None:
        fail(f"{path}, arch", "a name as sm_90 or gfx942", repr(table["arch"]))
    may_use_tma = gpu_of(table["arch"]).tma
    seen = set()
    for i, entry in enumerate(table["entries"]):
        name = f"{path}, entries[{i}]"
        _check_entry(name, entry, may_use_tma)
        key = json.dumps([entry[field] for field in ("family", "dtype", "case", "buckets")] + _series(entry["triton"]))
        if key in seen:
            fail(name, "an entry of its own", "one that an earlier entry is for too")
        seen.add(key)
    return table


def _check_entry(name, entry, may_use_tma):
    fields = {"family": str, "dtype": str, "case": dict, "buckets": dict, "config": dict}
    _check_fields(name, entry, fields | ABOUT)
    for field, known in (("family", tuple(FAMILIES)), ("dtype", DTYPES)):
        if entry[field] not in known:
            fail(f"{name}, {field}", " or ".join(known), repr(entry[field]))
    kind = FAMILIES[entry["family"]]
    _check_fields(f"{name}, case", entry["case"], kind.case)
    _check_fields(f"{name}, buckets", entry["buckets"], dict.fromkeys(kind.buckets, int))
    for bucket, size in entry["buckets"].items():
        if size < 1:
            fail(f"{name}, buckets, {bucket}", "1 or more", size)
    configs = {f"{name}, config": entry["config"]}
    if kind.parts:
        _check_fields(f"{name}, config", entry["config"], dict.fromkeys(kind.parts, (dict, type(None))))
        configs = {f"{name}, config, {part}": entry["config"][part] for part in kind.parts}
        if entry["config"][kind.parts[-1]] is None:
            configs.popitem()
    for config_name, config in configs.items():
        _check_config(config_name, config, kind.config)
        if config.get("use_tma") and not may_use_tma:
            fail(f"{config_name}, use_tma", "false, this architecture has no TMA", True)


def _check_config(name, config, fields):
    _check_fields(name, config, fields)
    for field, value in config.items():
        if field.startswith("block") and not (16 <= value <= 256 and value & (value - 1) == 0):
            fail(f"{name}, {field}", "a power of two from 16 to 256", value)
        if field == "num_warps" and value not in (1, 2, 4, 8, 16):
            fail(f"{name}, {field}", "1, 2, 4, 8 or 16", value)
        if field == "num_stages" and not 1 <= value <= 8:
            fail(f"{name}, {field}", "1 to 8", value)


def _check_fields(name, value, types):
    """A dict with these names and no others; a bool is no int."""
    if not isinstance(value, dict) or value.keys() != types.keys():
        fail(name, f"an object with {', '.join(types)}", f"{', '.join(value) if isinstance(value, dict) else value!r}")
    for field, expected in types.items():
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if type(value[field]) not in kinds:
            fail(f"{name}, {field}", " or ".join(kind.__name__ for kind in kinds), repr(value[field]))
