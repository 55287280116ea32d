"""Cases in processes of their own: one that crashes, hangs or leaves the GPU in an error takes no other with it."""

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
TRACEBACK_LINES = 40  # as many of a failure's are kept, the last ones
STDERR_LINES = 20  # as many of its first and of its last ones: a compiler's error comes before a dump of its code
COMPILE_ERRORS = re.compile(r"\b(Compil\w+|UnsupportedLanguageConstruct|PTXASError|InductorError)\b")


@dataclass(frozen=True)
class Outcome:
    """What the function returned, or why it did not: `failure` is empty where it did, `log` is the traceback and what
    was written to stderr, where a compiler says more than its exception does."""

    result: object
    failure: str
    seconds: float
    log: str = ""


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
        """Its stack goes to stderr: a hang has no traceback of its own."""
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
        """At once, with the processes that it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _serve(pipe, function, stderr):
    os.setsid()  # Ctrl-C is for the parent, and one signal ends all that this process starts
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            pipe.send(_attempt(function, pipe.recv()))


def _attempt(function, item):
    """(what it returned, why it did not, the traceback)"""
    try:
        result = function(item)
        _free_gpu()
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        return None, describe(error), "\n".join(lines[-TRACEBACK_LINES:])
    return result, "", ""


def describe(error):
    """In one line."""
    return headline(f"{type(error).__name__}: {error}")


def headline(message):
    """The first line of a message; of a compiler's, which begins with a place in the code, also the line that says what
    is wrong there: the last one that speaks of an error, or simply the last."""
    first, *others = [line.strip() for line in message.strip().splitlines() if line.strip()] or [""]
    if not others or not COMPILE_ERRORS.search(first):
        return first
    telling = [line for line in others if re.search("error|fatal", line, re.IGNORECASE)] or others
    return f"{first} ... {telling[-1]}"


def _free_gpu():
    """For other processes; raises what an earlier launch did wrong."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
