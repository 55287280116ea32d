"""Run cases in separate processes, so that one that crashes, hangs or breaks the GPU context does not affect the
others.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass

START_LIMIT = 180  # seconds to import torch and triton
TRACEBACK_LINES = 40  # the last lines of a failure's traceback that are kept
STDERR_LINES = 20  # the first and the last lines of stderr that are kept: the error may precede a dump of the code
COMPILE_ERRORS = re.compile(r"\b(Compil\w+|UnsupportedLanguageConstruct|PTXASError|InductorError)\b")


@dataclass(frozen=True)
class Outcome:
    """What the function returned, or why it failed. `failure` is empty on success. `log` is the traceback and stderr,
    where a compiler says more than in its exception.
    """

    result: object
    failure: str
    seconds: float
    log: str = ""


def map_isolated(function, items, *, limit, budget, end, workers=1):
    """(item, Outcome) of function(item) in order of completion, from `workers` processes.

    A process is replaced when an item takes more than `limit` seconds, raises, or kills it. No item is started once the
    `budget` is used up. An item that is running at the `end` (also a budget) is stopped and counts as not started.
    function and items must be picklable. Leaving the loop early ends the processes at once.
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
        self._stderr = tempfile.NamedTemporaryFile(prefix="stderr-")  # noqa: SIM115, it lives as long as the worker

    def run(self, item, limit):
        start = time.monotonic()
        log = ""
        self._stderr.truncate(0)
        try:
            if self._process is None:
                self._start()
                start = time.monotonic()
            self._pipe.send(item)
            if not self._pipe.poll(limit):
                self._show_where_it_is()
                raise TimeoutError(f"not done after {limit:.0f} s")
            result, failure, log = self._pipe.recv()
        except TimeoutError as error:
            result, failure = None, str(error)
        except (EOFError, OSError):  # the other end of the pipe is gone
            result, failure = None, f"the process ended, {self._exit()}"
        seconds = time.monotonic() - start
        if failure:
            self.stop()
            log += self._said()
        return Outcome(result, failure, seconds, log)

    def _show_where_it_is(self):
        """Make the process print its stack to stderr, since a hang has no traceback."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.5)

    def _said(self):
        with open(self._stderr.name, errors="replace") as file:
            lines = file.read().strip().splitlines()
        if len(lines) > 2 * STDERR_LINES:
            lines = [*lines[:STDERR_LINES], "...", *lines[-STDERR_LINES:]]
        return "\n".join(["", "stderr:", *lines]) if lines else ""

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._function, self._stderr.name), daemon=True)
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
        """Kill the process at once, with all processes that it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _serve(pipe, function, stderr):
    os.setsid()  # Ctrl-C then reaches only the parent, and one signal ends this process with its children
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            pipe.send(_attempt(function, pipe.recv()))


def _attempt(function, item):
    """(result, reason of the failure, traceback)."""
    try:
        result = function(item)
        _free_gpu()
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        return None, describe(error), "\n".join(lines[-TRACEBACK_LINES:])
    return result, "", ""


def describe(error):
    """The exception in one line."""
    return headline(f"{type(error).__name__}: {error}")


def headline(message):
    """The first line of a message. A compiler's message begins with a position in the code: then also its last line
    with "error", or simply its last line.
    """
    first, *others = [line.strip() for line in message.strip().splitlines() if line.strip()] or [""]
    if not others or not COMPILE_ERRORS.search(first):
        return first
    telling = [line for line in others if re.search("error|fatal", line, re.IGNORECASE)] or others
    return f"{first} ... {telling[-1]}"


def _free_gpu():
    """Wait for the GPU. Raises the errors of earlier launches."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
