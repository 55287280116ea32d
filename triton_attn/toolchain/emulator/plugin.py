"""`pytest --emulate sm_90`: the tests of a process run their kernels as compiled, in `emulate`.

Loaded by `pytest -p triton_attn.toolchain.emulator.plugin`, or by a line of the conftest.py at the tests' root:

    pytest_plugins = ["triton_attn.toolchain.emulator.plugin"]

Tests make CPU tensors, and open neither `emulate` nor `compile_only` themselves. The last line of a run says how many
tests launched nothing. Those marked `emulated` fail if they launch nothing.
"""

import pytest

PARAMETER = "schedule of the emulator"  # no argument of a test has such a name


def pytest_addoption(parser):
    group = parser.getgroup("emulator", "kernels as compiled, on CPU tensors")
    group.addoption("--emulate", metavar="ARCH", help="sm_80, sm_86, sm_89, sm_90 or sm_120")
    group.addoption("--emulate-schedule", default="random", help="a key of triton_attn.toolchain.emulator.SCHEDULES")
    group.addoption("--emulate-seed", type=int, default=0, help="of the random schedules")
    group.addoption("--emulate-schedules", type=int, metavar="N", help="run each test in N schedules instead of one")


def pytest_configure(config):
    config.addinivalue_line("markers", "emulated: launches a kernel, and fails under --emulate where it does not")
    if not config.getoption("--emulate"):
        return
    emulation = Emulation(config)
    try:
        with emulation.opened(emulation.schedules[0]):
            pass
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise pytest.UsageError(f"--emulate: {error}") from error
    config.pluginmanager.register(emulation)


class Emulation:
    """Wraps each test. A launch with a fault fails the test that made it; so does none in a test marked `emulated`."""

    def __init__(self, config):
        from .launches import first_schedules

        self.arch = config.getoption("--emulate")
        self.schedules = [(config.getoption("--emulate-schedule"), config.getoption("--emulate-seed"))]
        if (num_schedules := config.getoption("--emulate-schedules")) is not None:
            if num_schedules < 1:
                raise pytest.UsageError(f"--emulate-schedules: expected at least 1, got {num_schedules}")
            self.schedules = first_schedules(num_schedules)

    def opened(self, schedule):
        from . import emulate

        name, seed = schedule
        return emulate(self.arch, schedule=name, seed=seed)

    def pytest_generate_tests(self, metafunc):
        if len(self.schedules) > 1:
            metafunc.fixturenames.append(PARAMETER)
            metafunc.parametrize(PARAMETER, self.schedules, ids=[f"{name}-{seed}" for name, seed in self.schedules])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        with self.opened(parameters.get(PARAMETER, self.schedules[0])) as log:
            try:
                result = yield
            finally:
                # A worker's reports are all that the process with the summary gets.
                item.user_properties.append(("emulated", [len(log), sum(launch.instructions for launch in log)]))
        if not log and item.get_closest_marker("emulated"):
            pytest.fail("expected a launch of a test marked emulated, got none", pytrace=False)
        return result

    def pytest_terminal_summary(self, terminalreporter):
        reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
        counts = [value for report in reports for name, value in report.user_properties if name == "emulated"]
        launches, instructions = (sum(count[i] for count in counts) for i in range(2))
        without = sum(count[0] == 0 for count in counts)
        terminalreporter.write_line(
            f"emulated {self.arch}, {self._order()}: {launches} launches, {instructions} warp instructions"
            + (f"; {without} of {len(counts)} tests launched nothing" if without else "")
        )

    def _order(self):
        return self.schedules[0][0] if len(self.schedules) == 1 else f"{len(self.schedules)} schedules"
