"""What tests cost is counted with their processes, and a test that is too dear is named."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
from processor_time import ProcessorTime, add_options

def pytest_addoption(parser):
    add_options(parser)

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: dear")
    config.pluginmanager.register(ProcessorTime(config))
"""

TESTS = """
import subprocess, sys, time
import pytest

BURN = "import time\\nwhile time.process_time() < 0.3: pass"

def burn():
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass

def test_cheap():
    time.sleep(0.4)

def test_dear():
    burn()

def test_dear_by_its_process():
    subprocess.run([sys.executable, "-S", "-c", BURN])

@pytest.mark.slow
def test_slow():
    burn()

@pytest.fixture
def made():
    burn()

def test_of_what_is_made(made):
    pass
"""


@pytest.fixture
def run(pytester):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    return lambda *options: pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


def test_what_is_dear_and_not_slow_fails_and_is_named(run):
    done = run("--cost-limit=0.25")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    named = [line.split("::")[1] for line in done.outlines if " s  " in line]
    assert sorted(named) == ["test_dear", "test_dear_by_its_process"]
    done.assert_outcomes(passed=5)


def test_what_is_dear_is_named_after_the_list_of_the_skipped(run, pytester):
    pytester.makepyfile(test_other="import pytest\n\ndef test_skipped():\n    pytest.skip('why')\n")
    lines = run("--cost-limit=0.25", "-rs").outlines
    (dear,) = (n for n, line in enumerate(lines) if "not marked slow" in line)
    (skipped,) = (n for n, line in enumerate(lines) if line.startswith("SKIPPED"))
    assert skipped < dear


def test_a_limit_that_is_kept_says_nothing(run):
    done = run("--cost-limit=100")
    assert done.ret == pytest.ExitCode.OK
    done.stdout.no_fnmatch_line("*dear*==*")


def test_costs_are_written_dearest_first(run, pytester):
    run("--cost=cost.tsv")
    head, *rows = (pytester.path / "cost.tsv").read_text().splitlines()
    assert head.split("\t") == ["seconds", "set-up", "call", "teardown", "slow", "test"]
    rows = [row.split("\t") for row in rows]
    total = {row[5].split("::")[1]: float(row[0]) for row in rows}
    assert list(total.values()) == sorted(total.values(), reverse=True)
    assert list(total)[-1] == "test_cheap"
    assert total["test_dear_by_its_process"] > 0.25
    by_name = {row[5].split("::")[1]: row for row in rows}
    assert by_name["test_slow"][4] == "slow"
    assert float(by_name["test_of_what_is_made"][1]) > 0.25 > total["test_cheap"]
