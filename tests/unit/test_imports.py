"""What an import and `--help` bring in: no more than they need. (benchmarks/import_times.py)"""

from __future__ import annotations

import subprocess
import sys

HELP = """
import contextlib, io, runpy, sys
sys.argv = ["run", "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    runpy.run_module("lfmcw_app.run", run_name="__main__")
"""

HEAVY = (
    "torch", "numpy", "scipy", "PIL", "matplotlib", "torchvision", "pydantic", "yaml", "filelock",
    "mlo",
)  # fmt: skip
"""Modules that the options of a command line do not need."""

SELDOM = ("betty", "compat", "graph_picture", "info", "testing")
"""Modules of mlo that few programs need."""


def imported_by(code):
    """The modules that code imports beside those that Python has when it starts."""
    code = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.split())


def test_mlo_imports_nothing_but_torch_and_its_own_modules():
    found = imported_by("import torch\nbefore = set(sys.modules)\nimport mlo")
    assert "mlo.optimizer" in found
    assert {name for name in found if name.partition(".")[0] != "mlo"} == set()
    assert {f"mlo.{name}" for name in SELDOM} & found == set()


def test_help_imports_neither_torch_nor_recipes():
    found = imported_by(HELP)
    assert "lfmcw_app.commands.run" in found
    assert set(HEAVY) & found == set()
    assert "lfmcw_app.recipe" not in found
    assert "lfmcw_app.recipe_loading" not in found
