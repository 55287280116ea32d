from types import SimpleNamespace

import pytest

from perf import timing


class Clock:
    """A GPU whose time passes only in calls: events read it."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def function(self, name, milliseconds):
        def run():
            self.calls.append(name)
            self.now += milliseconds

        return run

    def torch(self):
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def elapsed_time(self, end):
                return end.at - self.at

        flush = SimpleNamespace(zero_=self.function("flush", 1000.0))
        cuda = SimpleNamespace(Event=Event, synchronize=lambda: None)
        return SimpleNamespace(empty=lambda *args, **kwargs: flush, int8=None, cuda=cuda)


def test_rounds_interleave_and_the_flush_is_not_timed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "torch", clock.torch())
    functions = {name: clock.function(name, ms) for name, ms in (("fast", 2.0), ("slow", 5.0))}
    times = timing.time_interleaved(functions, rounds=3, warmup=1)
    assert times == {"fast": timing.Percentiles(2.0, 2.0, 2.0), "slow": timing.Percentiles(5.0, 5.0, 5.0)}
    assert clock.calls == ["fast", "slow"] + ["flush", "fast", "flush", "slow"] * 3


def test_percentiles():
    assert timing.percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == timing.Percentiles(
        pytest.approx(2.0), pytest.approx(3.5), pytest.approx(5.0)
    )


def test_who_is_clearly_behind_is_timed_no_further(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "torch", clock.torch())
    functions = {name: clock.function(name, ms) for name, ms in (("slow", 5.0), ("near", 2.2), ("fast", 2.0))}
    times = timing.time_interleaved(functions, rounds=9, warmup=0, behind=1.2)
    assert {name: clock.calls.count(name) for name in functions} == {
        "slow": timing.SETTLED_ROUNDS,
        "near": 9,
        "fast": 9,
    }
    assert times["slow"] == timing.Percentiles(5.0, 5.0, 5.0)
