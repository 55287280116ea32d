"""A GPU in software: kernels compiled for one run on CPU tensors, every access and every barrier checked.

`emulate`            ordinary launches run what the compiler made for a GPU that is not there
`EmulatedLaunch`     one of them: what it executed, what was wrong with it
`EmulationError`     raised at a launch with a fault
`run_ptx`            PTX written by hand
`count_ptx`          what it costs beside time, as `emulate(..., counts=True)` counts launches
`Counts`, `Tally`    instructions, sectors, wavefronts and FLOP, by source line
`SCHEDULES`          in what order warps run and when asynchronous work happens

The PTX of a kernel runs, not its machine code: faults of ptxas, spills and time are invisible. Matmuls accumulate in
fp32, and approximate functions are correctly rounded. The lanes of a warp run in lock step until they diverge, but the
checks do not rely on it: only barriers order their accesses to shared memory. The programs of a launch run one after
another. tcgen05 (sm_100), clusters and AMD are not emulated.
"""

from importlib import import_module

_LAUNCHES = ["SCHEDULES", "EmulatedLaunch", "EmulationError", "Fault", "count_ptx", "emulate", "run_ptx"]
_COUNTS = ["Counts", "Tally"]
__all__ = [*_LAUNCHES, *_COUNTS]


def __getattr__(name):  # needs Triton, and pytest's plugin is loaded without it
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'counts' if name in _COUNTS else 'launches'}"), name)
