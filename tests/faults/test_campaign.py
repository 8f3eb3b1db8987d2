"""The campaign of faults in short: each kind once, and that it sees what is lost or unclear."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fault_kinds import KINDS, _edited
from forked_runs import TRACEBACK, Runs, ended
from number_faults import grown
from process_faults import PROCESS_KINDS
from trials import said

CAMPAIGN = Path(__file__).with_name("campaign.py")


LONG = ("1,000 rounds of a search", *PROCESS_KINDS)
"""Kinds that take a minute, or the processes of torchrun."""


def tried(folder, kinds):
    """Kind → what became of one fault of it."""
    command = [sys.executable, CAMPAIGN, "--recipes", "darts", "--most", "1", "--out", folder]
    command += ["--kinds", *kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| "): row[1:] for row in rows}


@pytest.mark.slow
def test_a_fault_of_each_kind_is_survived(tmp_path):
    kinds = [kind for kind in KINDS if kind not in LONG]
    found = tried(tmp_path / "out", kinds)
    for kind in kinds:
        assert found[kind] == ["1", "0", "0 |"], kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESS_KINDS)
def test_a_fault_of_several_processes_is_survived(kind, tmp_path):
    assert tried(tmp_path / "out", [kind])[kind] == ["1", "0", "0 |"]


def test_growth_is_what_is_more_than_noise():
    before = {"objects": 10, "descriptors": 5, "threads": 1, "bytes": 0}
    after = {"objects": 11, "descriptors": 6, "threads": 1, "bytes": 10**7}
    assert grown(before, before) == ""
    assert grown(before, after) == "1 descriptors, 10,000,000 bytes"


def test_a_run_that_ends_otherwise_is_lost(tmp_path):
    runs = Runs(folder=tmp_path, settings={})
    for name in ("whole", "one"):
        (tmp_path / name).mkdir()
        for file in ("metrics.jsonl", "genotype.json", "result.json", "config.yaml"):
            (tmp_path / name / file).write_text(file)
    assert runs.difference(tmp_path / "one") == ""
    (tmp_path / "one" / ".search.pt.1.part").touch()
    assert runs.difference(tmp_path / "one") == ".search.pt.1.part"
    (tmp_path / "one" / "result.json").write_text("other")
    assert runs.difference(tmp_path / "one") == "result.json"
    (tmp_path / "one" / "metrics.jsonl").unlink()
    assert runs.difference(tmp_path / "one") == "metrics.jsonl"


def test_a_traceback_is_unclear(tmp_path):
    def broken():
        raise ZeroDivisionError

    runs = Runs(folder=tmp_path, settings={})
    code = ended(runs.started(broken))
    assert code == TRACEBACK
    assert said(code, 0, 2) == "a traceback"
    assert said(0, 0, 2) == ""
    assert said(75, 0, 2) == "exit code 75"


def test_an_edit_changes_one_entry_of_a_copy():

    tree = {"a": {"b": [1, 2, {"c": 3}]}, "d": "e"}
    edited = [_edited(tree, random.Random(seed)) for seed in range(50)]
    assert sum(other != tree for other in edited) > 40  # a few get what they had
    assert tree == {"a": {"b": [1, 2, {"c": 3}]}, "d": "e"}
