"""Cases in processes of their own: one that crashes, hangs or leaves the GPU in an error takes no other with it."""

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

START_LIMIT = 180  # seconds to import torch and triton


@dataclass(frozen=True)
class Outcome:
    """What the function returned, or why it did not: `failure` is empty where it did."""

    result: object
    failure: str
    seconds: float


def map_isolated(function, items, *, limit, budget, end, workers=1):
    """(item, Outcome) of function(item), as they finish, from `workers` processes that take one item after the other.

    A process is replaced when an item takes more than `limit` seconds, raises, or ends it. No item is started once the
    `budget` is over; one that the `end`, a budget too, cuts short comes to nothing, as if it had not been started.
    function and items must be picklable; leaving early ends the processes at once.
    """
    waiting, finished = deque(items), queue.SimpleQueue()
    processes = [_Worker(function) for _ in range(min(workers, len(waiting)))]

    def work(worker):
        try:
            while waiting and not budget.is_over() and not end.is_over():
                item = waiting.popleft()
                outcome = worker.run(item, min(limit, end.seconds_left()))
                if not (outcome.failure and end.is_over()):
                    finished.put((item, outcome))
        except IndexError:  # another thread took the last one
            pass
        finally:
            worker.stop()
            finished.put(None)

    for worker in processes:
        threading.Thread(target=work, args=(worker,), daemon=True).start()
    running = len(processes)
    try:
        while running:
            done = finished.get()
            if done is None:
                running -= 1
            else:
                yield done
    finally:
        waiting.clear()
        for worker in processes:
            worker.stop()


class _Worker:
    """A process that runs the function for one item at a time."""

    def __init__(self, function):
        self._function = function
        self._process = self._pipe = None

    def run(self, item, limit):
        start = time.monotonic()
        try:
            if self._process is None:
                self._start()
                start = time.monotonic()
            self._pipe.send(item)
            if not self._pipe.poll(limit):
                raise TimeoutError(f"not done after {limit:.0f} s")
            result, failure = self._pipe.recv()
        except TimeoutError as error:
            result, failure = None, str(error)
        except (EOFError, OSError):  # the other end of the pipe is gone
            result, failure = None, f"the process ended, {self._exit()}"
        if failure:
            self.stop()
        return Outcome(result, failure, time.monotonic() - start)

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_LIMIT):
            raise TimeoutError(f"the process did not start in {START_LIMIT} s")
        self._pipe.recv()

    def _exit(self):
        process = self._process
        if process is None:
            return "stopped"
        process.join()
        return f"exit code {process.exitcode}"

    def stop(self):
        """At once, with the processes that it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _serve(pipe, function):
    os.setsid()  # Ctrl-C is for the parent, and one signal ends all that this process starts
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            pipe.send(_attempt(function, pipe.recv()))


def _attempt(function, item):
    """(what it returned, why it did not)"""
    try:
        result = function(item)
        _free_gpu()
    except Exception as error:
        return None, describe(error)
    return result, ""


def describe(error):
    """In one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _free_gpu():
    """For other processes; raises what an earlier launch did wrong."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
