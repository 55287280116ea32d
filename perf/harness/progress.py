"""Progress and remaining time, by tqdm. Without tqdm a line is printed from time to time."""

import sys
import time

try:
    from tqdm import tqdm
except ModuleNotFoundError:  # a GPU machine may have little besides torch
    SECONDS_BETWEEN_LINES = 10

    class tqdm:
        """The part of tqdm's interface that is used here."""

        def __init__(self, iterable=(), total=None, initial=0, desc="", unit="it", **_):
            self._iterable, self._total, self._desc, self._unit = iterable, total, desc, unit
            if total is None and hasattr(iterable, "__len__"):
                self._total = len(iterable)
            self.n, self._first, self._start = initial, initial, time.monotonic()
            self._said = self._start

        def __iter__(self):
            for item in self._iterable:
                yield item
                self.update()

        def update(self, n=1):
            self.n += n
            now = time.monotonic()
            if self.n == self._total or now - self._said >= SECONDS_BETWEEN_LINES:
                self._said = now
                done = f"{self.n}/{self._total}" if self._total else self.n
                print(f"{self._desc}: {done} {self._unit}{self._left(now)}", file=sys.stderr, flush=True)

        def _left(self, now):
            if not self._total or self.n == self._first:
                return ""
            return f", {(now - self._start) / (self.n - self._first) * (self._total - self.n):.0f} s left"

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass
