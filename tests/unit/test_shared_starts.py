"""Tests that share a start run in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import shared_starts
from shared_starts import TOGETHER, scope_of

pytest_plugins = ["pytester"]

CONFTEST = """
import pytest
import shared_starts

shared_starts.TOGETHER = {"test_shared.py": "a start"}

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return shared_starts.make_scheduler(config, log)
"""

TESTS = """
import os
import pytest

@pytest.mark.parametrize("number", range(8))
def test_one(number):
    with open("processes.txt", "a") as file:
        file.write(f"{os.getpid()}\\n")
"""


def test_the_files_are_there():
    root = Path(__file__).parents[2]
    assert [file for file in TOGETHER if not (root / file).exists()] == []
    for file in TOGETHER:
        assert scope_of(f"{file}::test_it[a::b]") == file
    assert scope_of("tests/unit/test_docs.py::test_it") == "tests/unit/test_docs.py::test_it"


@pytest.mark.slow
def test_what_shares_a_start_runs_in_one_process(pytester, monkeypatch):
    pytest.importorskip("xdist")
    # The process that is started does not read the settings of this project.
    monkeypatch.setenv("PYTHONPATH", str(Path(shared_starts.__file__).parent))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_shared=TESTS, test_alone=TESTS.replace("processes", "alone"))
    done = pytester.runpytest_subprocess("-n", "2", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=16)
    processes = (pytester.path / "processes.txt").read_text().split()
    alone = (pytester.path / "alone.txt").read_text().split()
    assert (len(processes), len(set(processes))) == (8, 1)
    assert (len(alone), len({*processes, *alone})) == (8, 2)
