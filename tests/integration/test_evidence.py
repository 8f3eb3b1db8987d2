"""The script of the measurements behind docs/results.md, in miniature."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lfmcw_app.arms import TABLES
from lfmcw_app.results_file import read_results

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evidence.sh"


def call(*arguments, **environment):
    settings = {**os.environ, "PYTHON": sys.executable, "SHORT": "1", **environment}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], env=settings, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_campaign_runs_through_and_is_not_repeated(tmp_path):
    first = call("digits", tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    tables = sorted(path.name for path in (tmp_path / "tables").iterdir())
    kinds = ["nasbench201-gan-hard-second", "nasbench201-real-hard-second"]
    assert tables == [*kinds, "table2-darts-second"]
    for name in tables:
        rows = read_results(tmp_path / "tables" / name / "runs.csv")
        table = "ablation" if name in kinds else name.partition("-")[0]
        assert {row.arm for row in rows} == set(TABLES[table])
        assert all((row.rank is not None) == (name in kinds) for row in rows)
    judged = read_results(tmp_path / "tables" / kinds[0] / "runs.csv")
    assert any(row.gan_test_percent is not None for row in judged)

    again = call("digits", tmp_path, "ablation")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("6 runs, 6 of them already complete") == len(kinds)

    # Another machine has the results files and the table of cells only.
    reused, other = tmp_path / "reused", tmp_path / "other"
    reused.mkdir()
    other.mkdir()
    shutil.copy(tmp_path / "tables" / kinds[1] / "runs.csv", reused / f"{kinds[1]}.csv")
    shutil.copy(tmp_path / "cells.csv", other)
    taken = call("digits", other, "ablation", REUSE=str(reused), GENERATORS="real")
    assert taken.returncode == 0, taken.stdout + taken.stderr
    assert "6 of 6 runs are taken from" in taken.stdout
    assert not (other / "runs").exists()


FAILING_WARM_UP = """#!/usr/bin/env bash
# Stands for the interpreter: the warm-up of seed 0 waits to be stopped, and that of seed 1 fails.
cd "{folder}"
case "$*" in
*"--seed 0 "*)
    trap 'touch stopped; exit' TERM
    touch begun
    for _ in {{1..500}}; do sleep 0.02; done
    ;;
*"--seed 1 "*)
    until [ -e begun ]; do sleep 0.02; done
    exit 7
    ;;
*) touch more ;;
esac
"""


def test_a_warm_up_that_fails_stops_those_beside_it(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAILING_WARM_UP.format(folder=tmp_path), encoding="utf-8")
    python.chmod(0o755)
    only = {"KINDS": "plain", "GENERATORS": "gan", "ORDERS": "first", "JOBS": "2", "SHORT": ""}
    ended = call("digits", tmp_path / "out", "ablation", PYTHON=str(python), **only)
    assert ended.returncode == 7
    assert (tmp_path / "stopped").exists()
    assert not (tmp_path / "more").exists()


def test_controls_take_over_the_arms_of_table_2(tmp_path):
    python, held = tmp_path / "python", tmp_path / "held"
    python.write_text('#!/usr/bin/env bash\necho "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    held.mkdir()
    (held / "table2-darts-first.csv").touch()

    def of(tables):
        said = call("digits", tmp_path, "paper", PYTHON=str(python), REUSE=str(held), PAPERS=tables)
        assert said.returncode == 0, said.stderr
        return said.stdout

    taken = f"--reuse {held}/table2-darts-first.csv"
    assert of("controls-darts-first").count(taken) == 1
    assert of("table2-darts-first").count(taken) == 1
    assert taken not in of("controls-darts-second")


def test_what_the_script_does_not_know_is_refused(tmp_path):
    assert call("digits", tmp_path, "everything").returncode == 2
    assert "everything" in call("digits", tmp_path, "everything").stderr
    assert "SEEDS" in call("digits").stdout
