"""The tests mirror the tree, their names are short enough to be read, and no clock decides."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
UNIT = TESTS / "unit"

MIRRORED = {
    "mlo": UNIT / "mlo",
    "lfmcw_app": UNIT / "lfmcw_app",
    "lfmcw_app/search_space": UNIT / "search_space",
    "lfmcw_app/generators": UNIT / "generators",
    "lfmcw_app/ops": UNIT / "ops",
    "lfmcw_app/report": UNIT / "report",
}
"""Folder of a package → folder of its tests; folders below are mirrored too."""

WITHOUT_TESTS = {
    f"lfmcw_app/{name}.py": "only names the command in lfmcw_app/commands"
    for name in ("run", "evaluate", "predict", "export", "sample", "draw", "table")
}
"""Module → why it has no test file of its name."""

WITHOUT_MODULE = {
    "tests/unit/mlo/hypergradient/test_contract.py": "of all engines: they keep one contract",
    "tests/unit/ops/test_triton_kernels.py": "of lfmcw_app/ops/_triton.py, which is private",
}
"""Test file → why no module has its name."""

LONGEST_NAME = 60
"""Letters of the name of a test; its docstring has room for a sentence."""


def expected_files():
    """Module → its test file, both relative to the repository."""
    found = {}
    for package in ("mlo", "lfmcw_app"):
        for module in (ROOT / package).rglob("*.py"):
            if not module.name.startswith("_"):
                found[str(module.relative_to(ROOT))] = str(mirrored(module).relative_to(ROOT))
    return found


def mirrored(module):
    """The place of a module's test file: below that of the nearest package in `MIRRORED`."""
    for folder in module.parents:
        start = MIRRORED.get(str(folder.relative_to(ROOT)))
        if start is not None:
            return start / module.parent.relative_to(folder) / f"test_{module.name}"
    raise AssertionError(f"{module} is in no package of MIRRORED")


def test_every_module_has_a_test_file_of_its_name():
    files = expected_files()
    assert len(files) > 90
    assert set(WITHOUT_TESTS) <= set(files)
    missing = [f"{module} → {test}" for module, test in files.items() if not (ROOT / test).exists()]
    assert sorted(missing) == sorted(f"{module} → {files[module]}" for module in WITHOUT_TESTS)


def test_every_test_file_in_a_mirrored_folder_has_a_module():
    present = {
        str(path.relative_to(ROOT))
        for folder in set(MIRRORED.values())
        for path in folder.rglob("test_*.py")
    }
    assert present - set(expected_files().values()) == set(WITHOUT_MODULE)


def names_of_tests(path):
    """The names of the tests in a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name


def test_every_test_file_has_tests():
    # A class that inherits a contract has its tests from there.
    files = [path for path in UNIT.rglob("test_*.py") if "EngineContract" not in path.read_text()]
    assert [str(path) for path in files if not list(names_of_tests(path))] == []


def test_names_of_tests_are_short():
    long = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for name in names_of_tests(path)
        if len(name) > LONGEST_NAME
    ]
    assert long == []


# ------------------------------ clocks

CLOCKS = {
    "tests/started_processes.py": "waits for events, with one bound far above what they take",
    "tests/faults/campaign.py": "no test: interrupts runs at random moments",
    "tests/faults/forked_runs.py": "waits for the ends of the campaign's runs",
    "tests/oracle/test_threads.py": "looks a while whether something comes too early",
}
"""File that asks a clock, or waits for some seconds → why this fails on no busy machine."""


def by_the_clock(path):
    """Lines that sleep, read a clock, or wait for so many seconds."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = [entry.value for entry in node.keywords if entry.arg == "timeout"]
        if name.rpartition(".")[2] in ("wait", "join", "communicate"):
            given += node.args
        seconds = [value for value in given if isinstance(value, ast.Constant)]
        numbers = [value for value in seconds if isinstance(value.value, int | float)]
        if numbers or name in ("time.sleep", "time.time", "time.monotonic", "time.perf_counter"):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def test_no_test_depends_on_the_clock():
    """What is slow on a busy machine is right all the same: tests wait for events."""
    found = {str(path.relative_to(ROOT)): list(by_the_clock(path)) for path in TESTS.rglob("*.py")}
    assert {file: lines for file, lines in found.items() if lines and file not in CLOCKS} == {}
    assert [file for file in CLOCKS if not found[file]] == []
