"""What makes Triton kernels testable without a GPU, for this package's tests and for anyone's own kernels.

`fix_interpreter`            bf16 and fp8 arithmetic of TRITON_INTERPRET=1 as a GPU does it
`guard`                      every memory access and integer of interpreted launches checked, bytes counted
`compile_only`               ordinary launches compile for a GPU that is not there; registers, spills, instructions
`emulate`                    the compiled code runs on CPU tensors, every access and barrier checked
`record_specializations`     which kernels launches would compile, without compiling them

Names import what needs Triton when they are first used. `triton_attn.testing` has assertions and poisoned tensors.
"""

from importlib import import_module

_PLACES = {
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

__all__ = [*_PLACES]


def __getattr__(name):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
