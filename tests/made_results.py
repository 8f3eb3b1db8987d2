"""Made-up results in the files' formats: what the page of results is tested on."""

from __future__ import annotations

import numpy as np

from lfmcw_app.cell_table_file import CellTableFile
from lfmcw_app.cell_table_file import Row as CellRow
from lfmcw_app.results_file import Row, write_results

METHODS = {"no LFM-CW": "darts", "no LFM-CW, 4 times the rounds": "darts", "random cells": "random"}

ABLATION = {
    "no LFM-CW": 0.0, "LFM-CW": -0.5, "λ = 0": 0.0, "uniform class weights": -0.5,
    "synthetic only": 1.0, "random cells": 2.0,
}  # fmt: skip
"""Arm → its error above the first arm's, percentage points."""


def made_row(arm, seed, error, **other):
    """A run; of arms without a generator it has none."""
    method = METHODS.get(arm, "lfmcw")
    values = {
        "table": "ablation", "arm": arm, "seed": seed, "dataset": "cifar10-jpeg",
        "preset": "small", "space": "darts", "order": None if method == "random" else "first",
        "generator": "dcgan" if method == "lfmcw" else None, "method": method, "condition": None,
        "settings": None, "test_error_percent": round(error, 4), "regret_percent": None,
        "rank": None, "parameters": 10_000 + seed, "multiply_adds_millions": 1.5,
        "gan_test_percent": None, "gan_train_percent": None, "variety": None,
        "search_seconds": 60.0, "training_seconds": 30.0, "version": "0.1.0",
        "commit": "abc1234", "torch": "2.14.1", "device": "a CPU", "date": "2026-11-29",
        "recipe": "0123456789ab", "run": f"{arm}-seed{seed}",
    }  # fmt: skip
    if method != "lfmcw":
        other = {key: value for key, value in other.items() if key != "generator"}
    return Row(**{**values, **other})


def made_runs(path, *, offsets=ABLATION, seeds=12, spread=0.3, base=50.0, **other):
    """Writes an experiment whose arms differ by `offsets`, with an SD of `spread` of each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, spread, (len(offsets), seeds))
    rows = [
        made_row(
            arm, seed, base + offset + float(noise[place, seed]),
            **{"run": f"{path.stem}-{arm}-seed{seed}", **other},
        )
        for place, (arm, offset) in enumerate(offsets.items())
        for seed in range(seeds)
    ]  # fmt: skip
    write_results(path, rows)
    return path


def made_looked_up_runs(path, ranks, *, least=40.0, step=0.1, **other):
    """Writes an experiment on a table of cells, whose cell of rank r errs by (r − 1) `step` more.

    Args:
        ranks: arm → rank of the cell of each seed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        made_row(
            arm, seed, least + step * (rank - 1),
            **{"space": "nasbench201", "rank": rank, "regret_percent": step * (rank - 1),
               "run": f"{path.stem}-{arm}-seed{seed}", **other},
        )
        for arm, places in ranks.items()
        for seed, rank in enumerate(places)
    ]  # fmt: skip
    write_results(path, rows)
    return path


def made_cells(path, *, count=125, seeds=2, noise=0.2, least=40.0, step=0.1):
    """Writes a table of cells, each with so many trainings."""
    file = CellTableFile.open(
        path, space="nasbench201", nodes=3, cells=count, seeds=seeds, dataset="cifar10", about={}
    )
    errors = np.random.default_rng(0).normal(0, noise, (count, seeds))
    rows = [
        CellRow(
            cell=f"|cell{cell}~0|",
            seed=seed,
            test_error_percent=round(least + step * cell + float(errors[cell, seed]), 2),
            parameters=10_000 + cell,
            multiply_adds_millions=1.0,
        )
        for cell in range(count)
        for seed in range(seeds)
    ]
    file.append(*rows)  # at once: each call waits for the disk
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    return path
