"""The pretended GPU is there for the whole session, in a process that was started for it."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

if os.environ.get("PRETENDED_GPU") != "1":
    collect_ignore_glob = ["test_*.py"]  # tests/integration/test_pretended_gpu.py runs them

PRETENDED = pytest.StashKey()


def pytest_configure(config):
    if os.environ.get("PRETENDED_GPU") == "1":
        from pretended_gpu.pretence import pretended_gpu

        stack = ExitStack()
        config.stash[PRETENDED] = stack.enter_context(pretended_gpu())
        config.add_cleanup(stack.close)


@pytest.fixture(scope="session")
def gpu(pytestconfig):
    """The pretended GPU."""
    return pytestconfig.stash[PRETENDED]
