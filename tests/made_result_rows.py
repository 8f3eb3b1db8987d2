"""A row of a results file, for tests."""

from __future__ import annotations

from lfmcw_app.results_file import Row


def result_row(**other):
    """A row with all that matters in it, and other values where they are given."""
    values = {
        "table": "table2", "arm": "LFM-CW", "seed": 3, "dataset": "cifar", "preset": "small",
        "space": "darts", "order": "first", "generator": "dcgan", "method": "lfmcw",
        "condition": None, "settings": "search.steps=100", "test_error_percent": 49.75,
        "regret_percent": None, "rank": None, "parameters": 10165,
        "multiply_adds_millions": 1.25, "gan_test_percent": 81.5, "gan_train_percent": None,
        "variety": 0.5, "search_seconds": 12.5, "training_seconds": None, "version": "0.1",
        "commit": "abc1234", "torch": "2.14.1", "device": "a CPU, 2 cores", "date": "2026-11-29",
        "recipe": "0123456789ab", "run": "cifar-darts-lfmcw-seed3-0123456789ab",
    }  # fmt: skip
    return Row(**{**values, **other})
