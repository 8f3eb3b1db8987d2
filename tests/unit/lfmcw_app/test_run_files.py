"""The names of a run folder's files."""

from __future__ import annotations

import sys

from started_processes import finished

from lfmcw_app import run_files


def test_the_table_of_files_has_every_name():
    names = [getattr(run_files, name) for name in run_files.__all__ if name != "KEEP"]
    files = {file for name in names for file in ((name,) if isinstance(name, str) else name)}
    assert {"config.yaml", "result.json", "cells.svg", ".lock"} <= files
    for file in files - {run_files.REAL_IMAGES}:  # in the folder samples/
        assert file in run_files.__doc__, file


def test_what_says_that_a_run_is_complete_is_always_kept():
    for removed in run_files.KEEP.values():
        assert not {run_files.CONFIG, run_files.RESULT, run_files.ENVIRONMENT} & set(removed)


def test_names_are_imported_without_torch():
    code = "import sys, lfmcw_app.run_files, lfmcw_app.names; print('torch' in sys.modules)"
    assert finished([sys.executable, "-c", code]).stdout.strip() == "False"
