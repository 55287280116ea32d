from types import SimpleNamespace

import pytest

from perf.harness import timing


class Clock:
    """A host that launches and a GPU that follows, and starts nothing before its launch: milliseconds of both."""

    def __init__(self):
        self.host = self.gpu = 0.0
        self.calls = []

    def function(self, name, milliseconds, launch=0.0):
        def run():
            self.calls.append(name)
            self.host += launch
            self.gpu = max(self.gpu, self.host) + milliseconds

        return run

    def sleep(self, cycles):
        self.gpu = max(self.gpu, self.host) + cycles / timing.CYCLES_PER_MS

    def synchronize(self):
        self.host = self.gpu = max(self.gpu, self.host)

    def torch(self):
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.gpu = max(clock.gpu, clock.host)

            def elapsed_time(self, end):
                return end.at - self.at

        flush = SimpleNamespace(zero_=self.function("flush", 0.1))
        cuda = SimpleNamespace(Event=Event, synchronize=self.synchronize, _sleep=self.sleep)
        return SimpleNamespace(empty=lambda *args, **kwargs: flush, int8=None, cuda=cuda)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "torch", clock.torch())
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.host / 1e3))
    return clock


def approx(milliseconds):
    return timing.Percentiles(*[pytest.approx(milliseconds)] * 3)


def test_rounds_interleave_and_the_flush_is_not_timed(clock):
    functions = {name: clock.function(name, ms) for name, ms in (("fast", 2.0), ("slow", 5.0))}
    times = timing.time_interleaved(functions, rounds=3, warmup=1)
    assert times == {"fast": approx(2.0), "slow": approx(5.0)}
    assert clock.calls == ["fast"] * 2 + ["slow"] * 2 + ["flush", "fast", "flush", "slow"] * 3


@pytest.mark.parametrize("launch", [0.0, 0.01, 0.3, 2.0])
def test_the_time_of_a_short_kernel_is_not_that_of_its_launch(clock, launch):
    assert timing.time_one(clock.function("short", 0.005, launch)) == approx(0.005)


def test_the_sleep_before_a_call_that_waits_has_an_end(clock, monkeypatch):
    slept = []
    monkeypatch.setattr(timing.torch.cuda, "_sleep", slept.append)
    timing.time_one(clock.function("waits", 1.0, launch=400.0), rounds=2)
    assert slept == [timing.MAX_SLEEP_MS * timing.CYCLES_PER_MS] * 2


def test_percentiles():
    assert timing.percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == timing.Percentiles(
        pytest.approx(2.0), pytest.approx(3.5), pytest.approx(5.0)
    )


def test_who_is_clearly_behind_is_timed_no_further(clock):
    functions = {name: clock.function(name, ms) for name, ms in (("slow", 5.0), ("near", 2.2), ("fast", 2.0))}
    times = timing.time_interleaved(functions, rounds=9, warmup=0, behind=1.2)
    assert {name: clock.calls.count(name) for name in functions} == {
        "slow": 1 + timing.SETTLED_ROUNDS,
        "near": 1 + 9,
        "fast": 1 + 9,
    }
    assert times["slow"] == approx(5.0)
