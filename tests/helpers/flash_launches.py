"""Compiled launches of flash attention in words."""


def describe(launch, report, name):
    """One line for the summary of the test run. name: of the kernel or of a variant."""
    constants = launch.constexprs
    head_dims = f"{constants['HEAD_DIM']}/{constants['HEAD_DIM_V']}"
    tile = f"{constants['BLOCK_M']}x{constants['BLOCK_N']} w{launch.num_warps} s{launch.num_stages}"
    line = f"{launch.arch:7} {head_dims:>7} {name:8} {tile:13} {'tma' if constants['USE_TMA'] else '':4}"
    line += f"{launch.registers:4} registers {launch.spill_bytes:5} B spilled {launch.shared_bytes:7} B shared"
    if getattr(report, "lock", None):
        line += f"  bound {report.bound:4.0f}  lock {report.lock:4.0f}"
    return line
