"""Triton's own launcher over a stub of libcuda, also in a process that has loaded a real one."""

import ctypes
import functools
import importlib.util
import os
import sys
from pathlib import Path

from triton.runtime import build

from . import core

# Triton's C code finds a loaded library and a module by their names, which others have.
LIBRARY = "libtriton_attn_stub.so"
MODULE = f"{__package__}.nvidia_driver"


@functools.cache
def library() -> ctypes.CDLL:
    """The stub. Its variable `stub_launch` is the function that takes the launches."""
    return ctypes.CDLL(str(core.built("stub_libcuda.c", LIBRARY, ["-Wl,-Bsymbolic", f"-Wl,-soname,{LIBRARY}"])))


@functools.cache
def nvidia_driver():
    """A second instance of the module of Triton's NVIDIA driver, whose C code calls the stub.

    It has its own state. The first instance keeps the libcuda that it has, or will have.
    """
    from triton.backends.nvidia import driver

    folder = str(Path(library()._name).parent)
    spec = importlib.util.spec_from_file_location(MODULE, driver.__file__)
    copy = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.libraries = [LIBRARY]
    copy.library_dirs = lambda: [folder]
    copy.compile_module_from_src = copy.compile_module_from_file = _compile_module  # Triton 3.6 has only the first
    return copy


def _compile_module(*, src=None, src_path=None, **options):
    """The module of C code, which finds the stub and the second instance where it looks for libcuda and the first."""
    src = Path(src_path).read_text() if src is None else src
    for name, other in ("libcuda.so.1", LIBRARY), ("triton.backends.nvidia.driver", MODULE):
        src = src.replace(f'"{name}"', f'"{other}"')
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_DEEPBIND)  # a libcuda that was loaded before all others does not come first
    try:
        return build.compile_module_from_src(src, **options)
    finally:
        sys.setdlopenflags(flags)
