"""`python -m perf gpu` over the stub driver: real launches, processes, journals and reports, with one or two cases per
stage.

    python gpu_run.py     runs the command lines of stdin, a line of JSON each: {"arguments": [...], "said": a file for
                          stdout and stderr, "environment": {...}}; prints the exit code of each

Tensors on "cuda" are CPU tensors. Nothing is computed, so every result counts as right except that of the function
STUB_WRONG, and every time is 1 ms. STUB_GPU is the GPU's name, STUB_SANITIZER the path of a compute-sanitizer.

Imports take most of the time. So each command line runs in a fork of this process, and so do its cases. Only the very
first case has a spawned process, as all have on a GPU.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / path) for path in ("", "tests/helpers", "tests/driver")]


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: on_cpu(x) for name, x in (kwargs or {}).items()}
        return function(*map(on_cpu, args), **kwargs)


def on_cpu(x):
    is_cuda = (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.startswith("cuda"))
    return torch.device("cpu") if is_cuda else x


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def elapsed_time(self, end):
        return 1.0


PROPERTIES = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
FAKES = {
    "is_available": lambda: True,
    "is_initialized": lambda: False,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "get_device_name": lambda *device: os.environ["STUB_GPU"],
    "get_device_capability": lambda *device: (9, 0),
    "get_device_properties": lambda *device: PROPERTIES,
    "synchronize": lambda *device: None,
    "empty_cache": lambda: None,
    "_sleep": lambda cycles: None,
    "device": lambda device: contextlib.nullcontext(),
    "Event": Event,
}
for name, fake in FAKES.items():
    setattr(torch.cuda, name, fake)
OnCpu().__enter__()

import triton_attn.testing  # noqa: E402

Closeness = namedtuple("Closeness", "error torch_error bound")


def take_for_right(*results, name="", **rule):
    if name and name == os.environ.get("STUB_WRONG"):
        raise AssertionError(f"{name} is wrong")
    return Closeness(0.0, 0.0, 0.0)


triton_attn.testing.assert_close_to_reference = take_for_right

import scale  # noqa: E402
from public_calls import use_stub  # noqa: E402

from perf import __main__  # noqa: E402
from perf.commands import gpu, sweep  # noqa: E402
from perf.harness import isolation, machine, measure, timing  # noqa: E402
from perf.model import candidates  # noqa: E402
from perf.results import OURS  # noqa: E402
from perf.workloads import gpu_cases, records  # noqa: E402
from perf.workloads.problems import LatentDecodeProblem, Problem  # noqa: E402

use_stub("sm_90")
scale.AT_SCALE = False
timing.L2_FLUSH_BYTES = 1
for roof in ("copy_bandwidth", "read_bandwidth", "matmul_rate"):
    setattr(machine, roof, partial(getattr(machine, roof), size=1024))
machine.launch_time = partial(machine.launch_time, calls=3)
machine.time_one = lambda function: timing.Percentiles(1.0, 1.0, 1.0)
for check in ("check_sample", "check_latent_decode"):
    setattr(measure, check, lambda *results, **options: Closeness(0.0, 0.0, 0.0))
gpu_cases.SMOKE_SEQLEN = 40
gpu_cases.find_sanitizer = lambda: os.environ.get("STUB_SANITIZER")
FLASH = Problem(1, 128, 2, 64, causal=True)


def record():
    """Of the kernel of hopper.py, at one length."""
    return [case for case in records.record_cases() if case["case"] == {"head_dim": 64, "causal": True}][:1]


def smoke_cases():
    functions = "copy_kv_pages", "append_kv_cache", "merge_attention"
    return [case for case in gpu_cases.smoke_cases() if case["function"] in functions and "Llama" in case["model"]]


def targets():
    return [gpu_cases._bench_case(LatentDecodeProblem(1, 8192, 16), {"FlashMLA", "FlashInfer"})]


def one_test():
    """Of all that pytest lists."""
    return [case for case in gpu_cases.test_cases() if "test_cache.py" in case["test"]][:1]


def benchmarks():
    return [gpu_cases._bench_case(FLASH, gpu_cases.PROVIDERS.keys() - {OURS, "SDPA flash", "SDPA cuDNN"})]


CASES = {"records": record, "smoke": smoke_cases, "targets": targets, "tests": one_test, "bench": benchmarks}
gpu.STAGES = tuple(replace(stage, cases=CASES.get(stage.name, stage.cases), workers=1) for stage in gpu.STAGES)
gpu.SWEEPS = tuple(replace(stage, cases=lambda: [gpu_cases.sweep_cases()[-1]]) for stage in gpu.SWEEPS)
candidates.FAMILIES["flash_hopper"] = replace(
    candidates.FAMILIES["flash_hopper"],
    problem=lambda seqlen, **case: FLASH,
    peers={name: gpu_cases.PROVIDERS[name] for name in ("SDPA flash", "SDPA cuDNN")},
    seqlens=(FLASH.seqlen,),
)
candidates.FAMILIES["flash"] = replace(
    candidates.FAMILIES["flash"],
    cases=lambda dtype, head_dims: [{"head_dim": FLASH.head_dim, "causal": True}],
    search_space=lambda *args, **case: candidates._flash_space(*args, **case)[:1],
    problem=lambda seqlen, **case: FLASH,
    seqlens=(FLASH.seqlen,),
)
sweep.map_in_processes = map


class ForkedCase(multiprocessing.get_context("fork").Process):
    def __init__(self, args, **options):
        pickle.dumps(args[1])  # the function must be picklable for a spawned process
        super().__init__(args=args, **options)

    def run(self):
        with OnCpu():  # of the thread, and the one that forks is another
            super().run()


class FirstSpawned:
    Pipe = staticmethod(multiprocessing.Pipe)
    processes = multiprocessing.get_context("spawn").Process, ForkedCase
    is_first = True

    @classmethod
    def Process(cls, **options):
        process = cls.processes[0 if cls.is_first else 1](**options)
        cls.is_first = False
        return process


isolation.multiprocessing = SimpleNamespace(get_context=lambda method: FirstSpawned)


def forked(arguments, said, environment):
    """The exit code of `python -m perf ...`."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ.update(environment)
        sys.exit(__main__.main(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_command(command, **options):
    """A sweep is forked too."""
    if command[:3] != [sys.executable, "-m", "perf"]:
        return subprocess.run(command, **options)
    said = Path(command[command.index("--out") + 1]) / "said"
    code = forked(command[3:], said, {})
    return subprocess.CompletedProcess(command, code, stdout="", stderr=said.read_text())


gpu_cases.subprocess = SimpleNamespace(run=run_command)


if __name__ == "__main__":
    for line in sys.stdin:
        print(forked(**json.loads(line)), flush=True)
        FirstSpawned.is_first = False
    os._exit(0)  # a normal exit of torch is slow
