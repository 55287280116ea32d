"""Work on all cores, in processes: Triton's interpreter and compiler hold the GIL and have global state."""

import multiprocessing
import os
import signal

import torch


def map_in_processes(function, items):
    """Results of function(item) in the order of the items, each yielded as soon as it and its predecessors are known.

    Leaving the loop early (an exception, Ctrl-C) ends the processes at once.
    """
    with multiprocessing.get_context("spawn").Pool(min(len(items), os.cpu_count()), _prepare) as pool:
        yield from pool.imap(function, items)


def _prepare():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    torch.set_num_threads(1)
