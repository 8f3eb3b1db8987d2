"""What each test costs: seconds of processor time of its process and of the processes it started.

Wall time depends on what else the machine does, processor time hardly. The rule: a test of more
than `LIMIT` seconds is marked slow, and `make test` leaves it out.
"""

from __future__ import annotations

import resource
from collections import defaultdict
from pathlib import Path

import pytest

LIMIT = 3.0
PROPERTY = "processor_seconds"


def spent():
    """Seconds of this process, and of those it started that have ended and were waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def add_options(parser):
    group = parser.getgroup("processor time")
    group.addoption("--cost", metavar="FILE", help="write what each test costs, dearest first")
    group.addoption(
        "--cost-limit",
        type=float,
        metavar="SECONDS",
        help="fail if a test that is not marked slow takes more processor time than this",
    )


class ProcessorTime:
    """Counts per phase of a test; workers of pytest-xdist send their counts with their reports.

    A fixture that several tests share is counted in the set-up of the first of them, so the limit
    is for what a test itself does.
    """

    def __init__(self, config):
        self._file = config.getoption("cost")
        self._limit = config.getoption("cost_limit")
        self._since = spent()
        self._phases = defaultdict(dict)  # test: phase: seconds
        self._slow = set()

    def pytest_runtest_logstart(self):
        self._since = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = spent()
        report.user_properties.append((PROPERTY, now - self._since))
        self._since = now
        return report

    def pytest_runtest_logreport(self, report):
        seconds = dict(report.user_properties).get(PROPERTY, 0.0)
        self._phases[report.nodeid][report.when] = seconds
        if "slow" in report.keywords:
            self._slow.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self._too_dear() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter):
        # After pytest's own list of what was skipped: the end of a long output is what is read.
        yield
        if self._file is not None:
            self._write()
        dear = self._too_dear()
        if dear:
            terminalreporter.section("not marked slow, and dear", red=True)
            for test, seconds in dear.items():
                terminalreporter.line(f"{seconds:7.2f} s  {test}")
            terminalreporter.line(
                f"These took more than {self._limit:g} s of processor time. "
                f"Make them cheaper; mark as slow what needs more than {LIMIT:g} s."
            )

    def _too_dear(self):
        if self._limit is None:
            return {}
        calls = {test: phases.get("call", 0.0) for test, phases in self._phases.items()}
        return {
            test: seconds
            for test, seconds in calls.items()
            if seconds > self._limit and test not in self._slow
        }

    def _write(self):
        lines = ["seconds\tset-up\tcall\tteardown\tslow\ttest"]
        dearest = sorted(self._phases.items(), key=lambda pair: -sum(pair[1].values()))
        for test, phases in dearest:
            each = [phases.get(phase, 0.0) for phase in ("setup", "call", "teardown")]
            numbers = "\t".join(f"{seconds:.2f}" for seconds in (sum(each), *each))
            lines.append(f"{numbers}\t{'slow' if test in self._slow else ''}\t{test}")
        Path(self._file).write_text("\n".join(lines) + "\n")
