"""A run whose last checkpoint is damaged resumes from the one before, to the same bytes."""

from __future__ import annotations

import pytest
from interrupted_runs import flip, outcome, truncate

import mlo


def test_a_run_is_repeated_bit_for_bit_within_one_process(runs, whole, tmp_path):
    runs.start(tmp_path / "again")
    assert outcome(tmp_path / "again") == whole


@pytest.mark.parametrize(
    "harm", [flip, truncate, lambda path: path.unlink()], ids=["flipped", "truncated", "gone"]
)
@pytest.mark.parametrize("lines", [5, 13], ids=["in the search", "in the training"])
def test_a_damaged_last_checkpoint_changes_nothing(runs, whole, tmp_path, lines, harm):
    """A damaged last checkpoint falls back to the one before, and the run ends the same."""
    folder = tmp_path / "run"
    runs.start(folder, die_after=lines)
    harm(folder / ("search.pt" if lines < 7 else "training.pt"))
    with pytest.warns(mlo.CheckpointWarning, match="takes its place"):
        runs.resume(folder)
    assert outcome(folder) == whole


def test_a_damaged_search_is_mended_beside_the_training(runs, whole, tmp_path):
    """A damaged search is mended, while the training resumes from its own checkpoint."""
    folder = tmp_path / "run"
    runs.start(folder, die_after=13)
    flip(folder / "search.pt")
    with pytest.warns(mlo.CheckpointWarning, match=r"search\.previous\.pt"):
        runs.resume(folder, die_after=3)
    assert mlo.load_checkpoint(folder / "search.pt")["optimizer"]["round"] == 6
    runs.resume(folder, die_after=2)
    for name in ("training.pt", "training.previous.pt", "training.best.pt"):
        (
            folder / name
        ).unlink()  # the training from its beginning, where the mended search says that it began
    runs.resume(folder)
    assert outcome(folder) == whole


def test_if_all_checkpoints_are_damaged_the_last_is_named(runs, tmp_path):
    """Where every checkpoint is damaged, the error names the last one."""
    folder = tmp_path / "run"
    runs.start(folder, die_after=5)
    for path in folder.glob("search*.pt"):
        truncate(path)
    with pytest.raises(mlo.CheckpointError, match=r"search\.pt"):
        runs.resume(folder)


def test_a_checkpoint_of_lines_that_were_cut_costs_them_alone(runs, whole, tmp_path):
    """The last checkpoint is whole again after the lines that it counts were cut."""
    folder = tmp_path / "run"
    runs.start(folder, die_after=5)
    flip(folder / "search.pt")
    with pytest.warns(mlo.CheckpointWarning):
        runs.resume(folder, die_after=1)
    flip(folder / "search.pt")  # whole again
    with pytest.warns(mlo.CheckpointWarning, match="The lines in between are lost"):
        runs.resume(folder)
    found = outcome(folder)
    lines, all_lines = found.pop("metrics.jsonl"), whole["metrics.jsonl"]
    assert found.items() <= whole.items()
    assert set(lines.splitlines()) < set(all_lines.splitlines())


def test_a_checkpoint_of_another_run_is_passed_over(runs, whole, tmp_path):
    """A checkpoint of another run is passed over for the one before it."""
    runs.start(tmp_path / "run", die_after=5)
    runs.start(tmp_path / "other", die_after=3, seed=1)
    (tmp_path / "other" / "search.pt").replace(tmp_path / "run" / "search.pt")
    with pytest.warns(mlo.CheckpointWarning, match="a recipe that this run has never had"):
        runs.resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == whole


def test_the_recipe_says_which_checkpoints_stay(runs, tmp_path):
    folder = tmp_path / "run"
    runs.start(folder, checkpoint_keep_every=2)
    kept = {path.name for path in folder.glob("*.round-*.pt")}
    assert kept == {"search.round-4.pt", "training.round-6.pt"}
    for path in (
        folder / "training.pt",
        folder / "training.previous.pt",
        folder / "result.json",
    ):
        path.unlink()
    with pytest.warns(mlo.CheckpointWarning, match="round-6"):
        runs.resume(folder)


def test_the_best_checkpoint_has_the_lowest_mean_loss(runs, tmp_path):
    """It is the one with the lowest mean loss, however often the run was stopped."""
    runs.start(tmp_path / "whole")
    runs.start(tmp_path / "run", die_after=3)
    runs.resume(tmp_path / "run", die_after=4)
    runs.resume(tmp_path / "run")
    for phase in ("search", "training"):
        best = [
            mlo.load_checkpoint(tmp_path / run / f"{phase}.best.pt") for run in ("whole", "run")
        ]
        assert best[0]["optimizer"]["round"] == best[1]["optimizer"]["round"]
        assert best[0]["standing"] == best[1]["standing"]
    import json

    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["losses"]["network"] for line in lines if line["phase"] == "training"]
    means = [sum(losses[i : i + 3]) / 3 for i in range(0, 9, 3)]
    assert best[0]["standing"]["best"] == pytest.approx(min(means))
    assert best[0]["optimizer"]["round"] == 3 * (1 + means.index(min(means)))
