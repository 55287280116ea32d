"""`pytest --emulate sm_90`: the tests of a process run their kernels as compiled, in `emulate`.

In a conftest.py:

    from triton_attn.testing.emulator.plugin import Emulation, add_options

    def pytest_addoption(parser):
        add_options(parser)

    def pytest_configure(config):
        if config.getoption("--emulate"):
            config.pluginmanager.register(Emulation(config))
"""

import pytest


def add_options(parser):
    group = parser.getgroup("emulator", "kernels as compiled, on CPU tensors")
    group.addoption("--emulate", metavar="ARCH", help="sm_80, sm_86, sm_89 or sm_90")
    group.addoption("--emulate-schedule", default="random", help="a key of triton_attn.testing.emulator.SCHEDULES")
    group.addoption("--emulate-seed", type=int, default=0, help="of the random schedules")


class Emulation:
    """Wraps each test. A launch with a fault fails the test that made it; so does none in a test marked `emulated`."""

    def __init__(self, config):
        self.arch = config.getoption("--emulate")
        self.schedule, self.seed = config.getoption("--emulate-schedule"), config.getoption("--emulate-seed")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        from triton_attn.testing.emulator import emulate

        with emulate(self.arch, schedule=self.schedule, seed=self.seed) as log:
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
        terminalreporter.write_line(
            f"emulated {self.arch}, {self.schedule}: {launches} launches, {instructions} warp instructions"
        )
