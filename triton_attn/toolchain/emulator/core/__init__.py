"""Builds the C++ core with the host's compiler, and keeps it in Triton's cache under a hash of its source."""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import triton
from triton.runtime import build
from triton.runtime.cache import get_cache_manager

HERE = Path(__file__).parent

INSTRUCTION_FIELDS = 16
FAULTS = (
    "global memory out of bounds",
    "shared memory out of bounds",
    "misaligned access",
    "write to read-only memory",
    "use of shared memory that nobody has written",
    "access to shared memory that an asynchronous copy has not finished with",
    "race: read after write",
    "race: write after read",
    "race: write after write",
    "read by the async proxy without a proxy fence",
    "overwritten under an asynchronous operation that reads it",
    "register of a wgmma in flight is read",
    "no wgmma.fence since a register was accessed",
    "wrong number of transaction bytes",
    "misused barrier",
    "deadlock",
    "lanes diverge at an aligned instruction",
    "trap",
    "too many instructions",
    "race between programs",
    "misused tensor map",
    "not supported",
)


# Of one instruction, in the order of the core's Counts.
COUNTS = ("lanes", "bytes", "sectors", "least_sectors", "wavefronts", "least_wavefronts", "flops")


class Region(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("reachable", ctypes.c_void_p),
    ]


class Report(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "pc", "warp", "lane", "cta", "other_pc")),
        ("address", ctypes.c_uint64),
        ("detail", ctypes.c_char * 232),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("program", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("length", "rows", "predicates")),
        ("pool", ctypes.c_void_p),
        ("constants", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("num_constants", "num_special")),
        ("special", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("param_bytes", "shared_bytes", "threads", "local_bytes")),
        ("grid", ctypes.c_int32 * 3),
        ("num_regions", ctypes.c_int32),
        ("regions", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("completion", "order")),
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_int64),
        ("reports", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("max_reports", "first_cta", "last_cta", "unused2")),
        *((name, ctypes.c_void_p) for name in ("executed", "counts", "traffic")),
    ]


def address_of(array: np.ndarray) -> int:
    return array.ctypes.data


@functools.cache
def library() -> ctypes.CDLL:
    """The core. The first call on a machine compiles it, which takes 10 to 20 seconds."""
    path = built("emulator.cpp", "libtriton_attn_emulator.so", ["-std=c++20", "-ffp-contract=off"], ["stdc++"])
    loaded = ctypes.CDLL(str(path))
    loaded.emulator_spellings.restype = loaded.emulator_signature.restype = ctypes.c_char_p
    sizes = [loaded.emulator_sizeof(i) for i in range(4)]
    assert sizes == [4 * INSTRUCTION_FIELDS, *map(ctypes.sizeof, (Region, Report, Launch))], sizes
    return loaded


@functools.cache
def entries() -> dict[str, tuple[int, str]]:
    """{PTX opcode: (number, signature)}; names of instructions that opcodes.py decodes begin with @."""
    loaded = library()
    return {
        spelling: (i, loaded.emulator_signature(i).decode())
        for i in range(loaded.emulator_entries())
        for spelling in loaded.emulator_spellings(i).decode().split()
    }


@functools.cache
def names() -> list[str]:
    loaded = library()
    return [loaded.emulator_spellings(i).decode().split()[0] for i in range(loaded.emulator_entries())]


def built(source: str, name: str, flags: list[str], libraries: list[str] = ()) -> Path:
    """Path of the shared library of a source in this folder. It is compiled unless Triton's cache has it.

    Raises:
        RuntimeError: it must be compiled, and there is no compiler or the compiler fails.
    """
    files = sorted(path for path in HERE.iterdir() if path.suffix in (".c", ".cpp", ".h"))
    content = b"".join(path.name.encode() + path.read_bytes() for path in files)
    settings = repr((source, name, flags, list(libraries), build.platform_key(), triton.__version__)).encode()
    cache = get_cache_manager(hashlib.sha256(content + settings).hexdigest())
    if found := cache.get_file(name):
        return Path(found)
    # Those that Triton's helper takes; it compiles C++ with them too.
    if not (triton.knobs.build.impl or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise RuntimeError("emulate needs a C++ compiler: expected gcc or clang on PATH, or a path in CC, found none")
    include = [str(HERE), str(Path(triton.__file__).parent / "backends/nvidia/include")]
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = build._build("library", str(HERE / source), folder, [], include, list(libraries), flags)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"emulate needs a C++ compiler (gcc 11 or clang 14, or later), which failed on {source}: "
                f"{' '.join(error.cmd)}"
            ) from error
        cache.put(Path(path).read_bytes(), name, binary=True)
    return Path(cache.get_file(name))


@contextlib.contextmanager
def environment(variables, owner):
    """Inside it, variables of os.environ have these values."""
    before = {name: owner.get(name) for name in variables}
    owner.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                owner.pop(name, None)
            else:
                owner[name] = value
