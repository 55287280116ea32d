"""Compiled launches of flash attention in words, and their figures."""

from dataclasses import replace

from perf.model import sass


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


def lock_of_all(report):
    """`lock` if a trip of the hot loop took every branch: a loop of one trip without matmuls is a branch to the model,
    which takes the shortest way through a loop that has all matmuls."""
    loop = report.hot.loop
    everything = replace(loop, always=loop.always + loop.conditional, conditional=())
    return replace(report.hot, loop=everything).lock(report.mma_warpgroups_per_sm)


def spills_of_all(report):
    """Spill instructions of the hot loop in all its branches."""
    loop = report.hot.loop
    return sum(i.opcode in sass.SPILL_OPCODES for i in loop.always + loop.conditional)
