"""Files whose tests share what is dear to make, and the processes of pytest-xdist that run them.

The tests of such a file go to one process, which makes what they share once. All others go, one by
one, to the process that has nothing left to do. pytest-xdist's own `--dist loadgroup` is for this,
but its version 3.8 groups nothing under pytest 9.2.
"""

from __future__ import annotations

TOGETHER = {
    "tests/integration/test_data_parallel.py": "groups of processes, which find everything at once",
    "tests/integration/test_own_operations.py": "a run with what another package brings",
    "tests/integration/test_report.py": "a run, and a browser",
    "tests/integration/test_run.py": "a whole run, with which others are compared",
    "tests/integration/test_torchrun.py": "the searches of two processes",
}
"""File → what its tests share."""


def scope_of(nodeid):
    """What runs in one process with this test: its file, or the test alone."""
    file = nodeid.split("::")[0]
    return file if file in TOGETHER else nodeid


def make_scheduler(config, log):
    """A scheduler of pytest-xdist that keeps scopes together, the largest first."""
    from xdist.scheduler import LoadScopeScheduling

    class SharedStarts(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return scope_of(nodeid)

    return SharedStarts(config, log)
