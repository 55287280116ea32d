"""A GPU in software: kernels compiled for one run on CPU tensors, every access and every barrier checked.

`emulate`            ordinary launches run what the compiler made for a GPU that is not there
`EmulatedLaunch`     one of these launches: what it executed, and its faults
`EmulationError`     raised by a launch with a fault
`run_ptx`            runs PTX written by hand
`count_ptx`          counts what PTX written by hand executes, as `emulate(..., counts=True)` does for launches
`Counts`, `Tally`    instructions, sectors, wavefronts and FLOP, by source line
`SCHEDULES`          the order of warps, and the time of asynchronous work

The PTX of a kernel runs, not its machine code: faults of ptxas, spills and time are invisible. Matmuls accumulate in
fp32, and approximate functions are correctly rounded. The lanes of a warp run in lock step until a branch parts them,
and again from the first instruction that all of them reach, but the checks do not rely on it: only barriers order their
accesses to memory. The programs of a launch run one after another. tcgen05 (sm_100), clusters and AMD are not emulated.
"""

from importlib import import_module

_LAUNCHES = ["SCHEDULES", "EmulatedLaunch", "EmulationError", "Fault", "count_ptx", "emulate", "run_ptx"]
_COUNTS = ["Counts", "Tally"]
__all__ = [*_LAUNCHES, *_COUNTS]


def __getattr__(name):  # needs Triton, and pytest's plugin is loaded without it
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'counts' if name in _COUNTS else 'launches'}"), name)
