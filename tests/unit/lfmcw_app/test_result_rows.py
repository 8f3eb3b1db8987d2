"""The row of a results file that belongs to a run."""

from __future__ import annotations

import json
import re

import pytest
import torch

from lfmcw_app.errors import InputError
from lfmcw_app.provenance import made_by
from lfmcw_app.recipe_loading import load_recipe, parsed_settings
from lfmcw_app.result_rows import columns_of, row_of
from lfmcw_app.run_folder import RunFolder

RESULT = {
    "test_error_percent": 41.5, "parameters": 1234, "multiply_adds_millions": 0.5,
    "lookup": {
        "file": "table.csv", "dataset": "pictures", "seeds": [0], "regret_percent": 2.5,
        "rank": 17, "cells": 125, "best_cell": "|none~0|",
    },
    "generator": {"gan_test": 80.0, "gan_train": 30.5, "variety": 0.25},
}  # fmt: skip

SMALL = {"dataset": "folder:/somewhere/private/pictures", "seed": 7}


def complete(path, *, result=None, timings=(), assignments=(), **overrides):
    """The folder of a complete run."""
    settings = {**SMALL, **overrides, **parsed_settings(assignments)}
    recipe = load_recipe("small", overrides=settings)
    folder = RunFolder.create(path / "pictures-darts-lfmcw-seed7-0123456789ab", recipe)
    folder.write("result.json", json.dumps(RESULT if result is None else result))
    lines = [json.dumps({"phase": phase, "seconds": seconds}) for phase, seconds in timings]
    folder.write("timings.jsonl", "".join(f"{line}\n" for line in lines))
    return folder


def test_a_row_says_what_made_it(tmp_path):
    folder = complete(
        tmp_path,
        timings=[("generator", 1.0), ("search", 10.0), ("search", 5.06), ("training", 2.0)],
        assignments=("search.steps=100", "search.channels=8"),
    )
    folder.record_completion(made_by(torch.device("cpu")))
    row = row_of("table2", "LFM-CW", folder.path)
    assert (row.table, row.arm, row.seed, row.dataset) == ("table2", "LFM-CW", 7, "pictures")
    assert (row.preset, row.space, row.order, row.method) == ("small", "darts", "first", "lfmcw")
    assert row.settings == "search.channels=8 search.steps=100"
    assert (row.test_error_percent, row.regret_percent, row.rank) == (41.5, 2.5, 17)
    assert (row.parameters, row.multiply_adds_millions) == (1234, 0.5)
    assert (row.gan_test_percent, row.gan_train_percent, row.variety) == (80.0, 30.5, 0.25)
    assert (row.search_seconds, row.training_seconds) == (16.1, 2.0)
    assert (row.recipe, row.run) == ("0123456789ab", folder.path.name)
    made = made_by(torch.device("cpu"))
    assert (row.device, row.commit, row.torch) == (made["device"], made["commit"], made["torch"])
    assert "private" not in row.model_dump_json()


def test_times_are_unknown_where_a_line_of_them_was_cut(tmp_path):
    folder = complete(tmp_path, timings=[("search", 10.0)])
    file = folder.path / "timings.jsonl"
    file.write_text(f'{{"phase": "sea{file.read_text()}')
    assert row_of("table2", "LFM-CW", folder.path).search_seconds is None


def test_what_does_not_apply_is_empty(tmp_path):
    result = {key: RESULT[key] for key in ("test_error_percent", "generator")}
    folder = complete(tmp_path, result=result, **{"search.method": "random"})
    row = row_of("controls", "random cells", folder.path)
    empty = ("order", "generator", "condition", "settings", "regret_percent", "rank", "parameters")
    assert {name: getattr(row, name) for name in empty} == dict.fromkeys(empty)
    assert row.gan_test_percent is None  # it has no generator
    assert (row.search_seconds, row.training_seconds) == (None, None)


@pytest.mark.parametrize("dataset", ["imagenet", "random:imagenet", "cifar10"])
@pytest.mark.parametrize("space", ["darts", "pcdarts"])
def test_a_presets_own_settings_are_not_listed(dataset, space):
    recipe = load_recipe("paper", space=space, overrides={"dataset": dataset})
    assert columns_of(recipe)["settings"] is None
    few = {"dataset": dataset, "search.primitives": ["none", "skip_connect"]}
    told = columns_of(load_recipe("paper", space=space, overrides=few))["settings"]
    assert told == 'search.primitives=["none","skip_connect"]'


def test_conditions_of_the_data_have_a_column_of_their_own(tmp_path):
    folder = complete(
        tmp_path,
        assignments=("data.class_shares={cat: 0.25}", "data.imbalance=0.5", "search.nodes=3"),
    )
    row = row_of("ablation", "LFM-CW", folder.path)
    assert row.condition == "data.class_shares.cat=0.25 data.imbalance=0.5"
    assert row.settings == "search.nodes=3"


def test_weights_of_another_run_are_told_and_not_which(tmp_path):
    """With {seed} in the place, each run of an arm has another one."""
    found = []
    for seed in (0, 1):
        warm = {"search.generator.init.run": f"/home/somebody/warm/{seed}", "seed": seed}
        digest = "search.generator.init.digest=" + "ab"[seed] * 64
        folder = complete(tmp_path / str(seed), assignments=(digest,), **warm)
        found.append(row_of("table2", "LFM-CW", folder.path).settings)
    assert found == ["search.generator.warmup_rounds=0 search.generator.init=run"] * 2


def test_what_conditions_apply_to_is_told_where_it_matters(tmp_path):
    table = tmp_path / "cells.csv"
    apply, small = "data.conditions_apply_to=search", "data.class_shares={cat: 0.25}"
    looked_up = (f"lookup.file={table}", "search.space=nasbench201")
    told = {
        (apply,): None,
        (apply, small): "data.class_shares.cat=0.25 data.conditions_apply_to=search",
        (apply, small, *looked_up): "data.class_shares.cat=0.25",
    }
    for place, (assignments, condition) in enumerate(told.items()):
        folder = complete(tmp_path / str(place), assignments=assignments)
        row = row_of("ablation", "LFM-CW", folder.path)
        assert row.condition == condition
        assert not {"data", "lookup"} & set(re.split(r"[ .]", row.settings or ""))


def test_a_run_of_an_earlier_version_has_what_it_began_with(tmp_path):
    folder = complete(tmp_path)
    began = json.loads((folder.path / "environment.json").read_text())
    row = row_of("table2", "LFM-CW", folder.path)
    assert (row.date, row.commit) == (began["started"][:10], None)


def test_a_run_that_cannot_have_a_row_is_refused(tmp_path):
    folder = complete(tmp_path)
    (folder.path / "environment.json").write_text("{")
    with pytest.raises(InputError, match=r"environment\.json, which says what made the result"):
        row_of("table2", "LFM-CW", folder.path)
    (folder.path / "result.json").unlink()
    with pytest.raises(InputError, match="has no result yet"):
        row_of("table2", "LFM-CW", folder.path)
