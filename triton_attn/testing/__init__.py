"""What makes Triton kernels testable without a GPU, for this package's tests and for anyone's own kernels.

`fix_interpreter`            bf16 and fp8 arithmetic of TRITON_INTERPRET=1 as a GPU does it
`guard`                      every memory access and integer of interpreted launches checked, bytes counted
`compile_only`               ordinary launches compile for a GPU that is not there; registers, spills, instructions
`emulate`                    the compiled code runs on CPU tensors, every access and barrier checked
`record_specializations`     which kernels launches would compile, without compiling them
`poisoned_empty`, `padded`   outputs nobody wrote, and writes beside a tensor, made visible
`assert_close_to_reference`  error against fp64, judged by the error that torch makes in the same dtype

Names that need Triton import it when they are first used.
"""

from importlib import import_module

from triton_attn.testing.tensors import Closeness, assert_close_to_reference, padded, poisoned_empty

_NEEDS_TRITON = {
    "Accesses": "memory",
    "DeviceArithmeticError": "arithmetic",
    "EmulationError": "emulator",
    "Launch": "compilation",
    "MemoryAccessError": "memory",
    "Specialization": "compilation",
    "compile_only": "compilation",
    "emulate": "emulator",
    "fix_interpreter": "interpreter",
    "guard": "memory",
    "record_specializations": "compilation",
    "shared_memory_limit": "compilation",
}

__all__ = ["Closeness", "assert_close_to_reference", "padded", "poisoned_empty", *_NEEDS_TRITON]


def __getattr__(name):
    if name not in _NEEDS_TRITON:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEEDS_TRITON[name]}"), name)
