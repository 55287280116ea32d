"""How long work may take."""

import math
import time


class Budget:
    """Minutes from now on, None for no end."""

    def __init__(self, minutes):
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def seconds_left(self):
        return max(0.0, self._end - time.monotonic())

    def is_over(self):
        return self.seconds_left() == 0
