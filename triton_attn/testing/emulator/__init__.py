"""A GPU in software: kernels compiled for one run on CPU tensors, every access and every barrier checked.

`emulate`            ordinary launches run what the compiler made for a GPU that is not there
`EmulatedLaunch`     one of them: what it executed, what was wrong with it
`EmulationError`     raised at a launch with a fault
`run_ptx`            PTX written by hand
`SCHEDULES`          in what order warps run and when asynchronous work happens

The PTX of a kernel runs, not its machine code: faults of ptxas, spills and time are invisible. Sums are in fp32, and
approximate functions give rounded results. Lanes of a warp run in lock step where they do not diverge. The programs of
a launch run one after another. tcgen05 (sm_100), clusters and AMD are not emulated.
"""

from importlib import import_module

__all__ = ["SCHEDULES", "EmulatedLaunch", "EmulationError", "Fault", "emulate", "run_ptx"]


def __getattr__(name):  # needs Triton, and pytest's plugin is loaded without it
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.launches"), name)
