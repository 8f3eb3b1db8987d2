"""Do class weights follow W1's mistakes? The tables of docs/results.md, from docs/data."""

from __future__ import annotations

import statistics
from itertools import groupby

from results_data import Results
from results_markdown import NOTHING, table
from scipy.stats import spearmanr

SEEDS = "class_weights_seeds.csv"
"""All classes of several searches: data, labels, rounds, seed, class, weight, wrong_percent."""


def weights_and_errors(results: Results) -> str:
    """Weight and W1's error of every class, means over the seeds; how they are ordered by seed."""
    entries = results.rows_of(SEEDS)
    parts = []
    for (data, labels, rounds), group in groupby(
        entries, key=lambda entry: (entry["data"], entry["labels"], entry["rounds"])
    ):
        found = list(group)
        seeds = list(dict.fromkeys(entry["seed"] for entry in found))
        head = ("class", f"weight, mean of {len(seeds)} seeds", "W1's error on D_val, %")
        parts.append(f"*{data}, labels: {labels}, {rounds} rounds*")
        parts.append(table(head, _rows(found)))
        parts.append(_correlations(found, seeds))
    return "\n\n".join(parts) or NOTHING


def _rows(entries: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """A row for each class, the heaviest first."""
    rows = []
    for name in dict.fromkeys(entry["class"] for entry in entries):
        own = [entry for entry in entries if entry["class"] == name]
        weight, wrong = (
            statistics.fmean(float(entry[key]) for entry in own)
            for key in ("weight", "wrong_percent")
        )
        rows.append((weight, name, wrong))
    return [(name, f"{weight:.2f}", f"{wrong:.1f}") for weight, name, wrong in sorted(rows)[::-1]]


def _correlations(entries: list[dict[str, str]], seeds: list[str]) -> str:
    """Spearman's correlation of weight and error over the classes, seed by seed."""
    found = []
    for seed in seeds:
        own = [entry for entry in entries if entry["seed"] == seed]
        weights, errors = (
            [float(entry[key]) for entry in own] for key in ("weight", "wrong_percent")
        )
        found.append(float(spearmanr(weights, errors).statistic))
    listed = ", ".join(f"{value:+.2f}" for value in found)
    return (
        f"Rank correlation of weight and error over the classes: {listed} (seeds "
        f"{', '.join(seeds)}), mean {statistics.fmean(found):+.2f}."
    )
