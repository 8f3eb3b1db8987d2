"""The sentences at the head of a report, for each kind of run."""

from __future__ import annotations

import json

import pytest
from made_run_folders import add_classes, make_folder

from lfmcw_app.report.page import comparison_page, run_page
from lfmcw_app.report.reading import read_run
from lfmcw_app.report.summary import comparison_summary, searched_rounds, summary

SEARCH = {"search": (8, 4)}


def sentences(folder):
    return summary(read_run(folder))


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_entries(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def without_result(folder, *more):
    for name in ("result.json", *more):
        (folder / name).unlink()
    return folder


def searched_only(folder):
    write_entries(folder, [line for line in entries(folder) if line["phase"] != "training"])
    return without_result(folder)


def test_a_complete_run_says_what_it_found(tmp_path):
    folder = add_classes(make_folder(tmp_path / "run", SEARCH), [30.0, 0.0, 10.0])
    assert sentences(folder) == (
        "LFM-CW searched the DARTS space on digits for 4 rounds. "
        "The test error of the derived network is 12.50% (1 of 8 images; 95% interval 2.2 "
        "to 47.1%). Whether the generated images show their classes was not measured. "
        "The search's own network, W2, had an error of 75.0% on the validation batch of the last "
        "round (32 images). No class is clearly harder than the others. “cat” has the largest "
        "error (3 of 10 test images wrong), but chance alone can explain that."
    )


def test_the_classes_that_weigh_most_are_named(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH, names=("a", "b", "c", "d"))
    lines = entries(folder)
    for line in lines:
        if line["phase"] == "search":
            line["metrics"]["w2"]["class_weights"] = [1.0, 4.0, 2.0, 3.0]
    write_entries(folder, lines)
    assert sentences(folder).endswith(
        "The classes with the largest weights at the end of the search are “b” (4.00), “d” (3.00) "
        "and “c” (2.00)."
    )


@pytest.mark.parametrize(
    ("images", "errors", "said"),
    [
        (10, [0.0, 0.0, 0.0], "No test image of any class is wrong."),
        (100, [0.0, 0.0, 12.0], "The hardest class is “cow” (12 of 100 test images wrong)."),
        (
            1000, [1.0, 8.0, 12.0],
            "The hardest class is “cow” (120 of 1,000 test images wrong).",
        ),
        (
            1, [0.0, 0.0, 100.0],
            "No class is clearly harder than the others. “cow” has the largest error (1 of 1 test "
            "image wrong), but chance alone can explain that.",
        ),
        (
            100, [None, 2.0, 5.0],
            "No class is clearly harder than the others. “cow” has the largest error (5 of 100 "
            "test images wrong), but chance alone can explain that.",
        ),
    ],
)  # fmt: skip
def test_a_class_is_hard_if_chance_does_not_explain_it(tmp_path, images, errors, said):
    folder = add_classes(make_folder(tmp_path / "run", SEARCH), [1.0, 1.0, 1.0])
    result = json.loads((folder / "result.json").read_text())
    for entry, error in zip(result["classes"], errors, strict=True):
        entry["error_percent"] = error
        entry["images"] = 0 if error is None else images
    (folder / "result.json").write_text(json.dumps(result))
    assert said in sentences(folder)


@pytest.mark.parametrize(
    ("settings", "finished", "said"),
    [
        ((), True, True),
        ((), False, False),
        (("search.generator.name=real",), True, False),
        (("search.method=darts",), True, False),
    ],
)
def test_a_generator_that_was_not_measured_is_not_judged(tmp_path, settings, finished, said):
    """It is said of a search that has ended with a generator."""
    folder = make_folder(tmp_path / "run", SEARCH, settings=settings, finished=finished)
    assert ("show their classes was not measured" in sentences(folder)) == said


def test_a_mean_says_of_how_many_rounds_it_is(tmp_path):
    """Of one round there is no mean, in the sentences and in the strips of class weights."""
    for rounds, own, end in (
        (
            4,
            "on the validation batch of the last round (32 images)",
            "The column “end” has the last round.",
        ),
        (
            30,
            "on the validation batches of the last 3 rounds (32 images each)",
            "The column “end” has the mean of the last 3 rounds.",
        ),
    ):
        folder = make_folder(tmp_path / f"{rounds}", {"search": (8, rounds)})
        assert own in sentences(folder)
        assert end in run_page(read_run(folder))


def test_a_search_without_the_method_is_a_baseline(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH, settings=("search.method=darts",))
    said = sentences(folder)
    assert said.startswith("The baseline without LFM-CW searched the DARTS space on digits for 4 ")
    assert "weights" not in said


def test_real_images_in_the_generators_place_are_named(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH, settings=("search.generator.name=real",))
    assert sentences(folder).startswith(
        "LFM-CW, with real images in the place of generated ones, searched the DARTS space"
    )


def test_stages_are_counted_together(tmp_path):
    stages = {"search-1": (8, 3), "search-2": (5, 3), "search-3": (3, 3)}
    said = sentences(make_folder(tmp_path / "run", stages))
    assert said.startswith("LFM-CW searched the P-DARTS space on digits for 9 rounds, in 3 stages.")


def test_an_unfinished_search_says_how_far_it_is(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH, finished=False, settings=("search.steps=15",))
    assert sentences(folder).startswith(
        "LFM-CW has searched the DARTS space on digits for 4 of 15 rounds. The run is not "
        "complete: it is still running, or it was stopped. There are no cells and no test error "
        "yet. The search's own network"
    )
    epochs = make_folder(
        tmp_path / "epochs", SEARCH, finished=False,
        settings=("search.steps=null", "search.epochs=2"),
    )  # fmt: skip
    assert sentences(epochs).startswith(
        "LFM-CW has searched the DARTS space on digits for 4 rounds. The run is not complete"
    )


def test_a_run_that_has_not_begun_says_so(tmp_path):
    folder = make_folder(tmp_path / "run", {}, finished=False)
    assert sentences(folder) == (
        "LFM-CW has completed no round of a search of the DARTS space on digits. The run is not "
        "complete: it is still running, or it was stopped. There are no cells and no test error "
        "yet."
    )


def test_a_warm_up_says_how_far_it_is(tmp_path):
    folder = make_folder(
        tmp_path / "run", {}, finished=False, settings=("search.generator.warmup_rounds=20",)
    )
    line = {"phase": "generator", "round": 7, "losses": {}, "metrics": {}}
    write_entries(folder, [line])
    assert "The warm-up of the generator has come to round 7 of 20." in sentences(folder)


def test_a_search_whose_network_is_not_trained_says_so(tmp_path):
    said = sentences(searched_only(make_folder(tmp_path / "run", SEARCH)))
    assert said.startswith("LFM-CW searched the DARTS space on digits for 4 rounds. Its cells are")
    assert "found, but their network is not trained, so there is no test error." in said


def test_an_unfinished_training_says_how_far_it_is(tmp_path):
    folder = without_result(make_folder(tmp_path / "run", SEARCH))
    assert (
        "LFM-CW searched the DARTS space on digits for 4 rounds. The training of the derived "
        "network has come to round 3. The run is not complete"
    ) in sentences(folder)
    steps = make_folder(
        tmp_path / "steps", SEARCH,
        settings=("evaluation.epochs=null", "evaluation.steps=50"),
    )  # fmt: skip
    assert "has come to round 3 of 50." in sentences(without_result(steps))


def test_given_and_random_cells_had_no_search(tmp_path):
    given = sentences(make_folder(tmp_path / "given", {}, evaluated=True))
    assert given == (
        "There was no search: the cells were given. The test error of the derived network is "
        "12.50% (1 of 8 images; 95% interval 2.2 to 47.1%)."
    )
    drawn = make_folder(tmp_path / "drawn", {}, settings=("search.method=random",))
    assert sentences(drawn).startswith("There was no search: the cells were drawn at random. The ")


def test_an_error_that_was_looked_up_says_where(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH)
    result = json.loads((folder / "result.json").read_text())
    del result["test_images"]
    result["lookup"] = {
        "file": "table.csv", "dataset": "digits", "seeds": [0, 1], "regret_percent": 6.75,
        "rank": 1024, "cells": 15625, "best_cell": "|none~0|",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    assert (
        "The test error of the found cell is 12.50%. It was not trained here, but looked up in "
        "table.csv (mean of 2 trainings). The cell has rank 1,024 of 15,625, 6.75 percentage "
        "points behind the best."
    ) in sentences(folder)


def test_a_trial_says_nothing(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH, settings=("trial=true",))
    assert sentences(folder).startswith("This is a trial of a few rounds: its numbers say nothing.")


def test_a_run_that_lost_its_numbers_says_where(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH, finished=False)
    (folder / "nonfinite-w2-round-5.pt").write_bytes(b"")
    said = sentences(folder)
    assert (
        "It stopped in round 5 of the search: a loss or gradient of W2 was not a finite number. "
        "There is no test error."
    ) in said
    assert "still running" not in said


def test_lost_numbers_that_were_skipped_did_not_end_the_run(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH, finished=False)
    (folder / "nonfinite-w2-round-2.pt").write_bytes(b"")
    (folder / "nonfinite-network-round-5.pt").write_bytes(b"")  # of no phase that has begun
    (folder / "nonfinite-other.pt").write_bytes(b"")
    assert "It stopped" not in sentences(folder)
    complete = make_folder(tmp_path / "complete", SEARCH)
    (complete / "nonfinite-network-round-4.pt").write_bytes(b"")
    assert "It stopped" not in sentences(complete)


def test_lost_numbers_in_the_first_round_of_a_phase_are_seen(tmp_path):
    begun = make_folder(tmp_path / "begun", {}, finished=False)
    (begun / "nonfinite-arch-round-1.pt").write_bytes(b"")
    assert "It stopped in round 1 of the search" in sentences(begun)
    trained = searched_only(make_folder(tmp_path / "trained", SEARCH))
    (trained / "nonfinite-network-round-1.pt").write_bytes(b"")
    assert "It stopped in round 1 of the training" in sentences(trained)
    given = searched_only(make_folder(tmp_path / "given", {}, evaluated=True))
    (given / "nonfinite-network-round-1.pt").write_bytes(b"")
    assert "It stopped in round 1 of the training" in sentences(given)


def test_a_result_that_cannot_be_read_is_not_a_missing_one(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH)
    (folder / "result.json").write_text("[1]")
    said = sentences(folder)
    assert "Its result cannot be read." in said
    assert "not complete" not in said


def test_the_sentences_stand_at_the_head_of_the_page(tmp_path):
    folder = make_folder(tmp_path / "run", SEARCH, names=("<b>", "dog", "cow"))
    add_classes(folder, [30.0, 0.0, 10.0])
    page = run_page(read_run(folder))
    head = page[page.index("<header>") : page.index("</header>")]
    assert "data-summary>LFM-CW searched" in head
    assert "“&lt;b&gt;” has the largest error (3 of 10" in head


# ------------------------------ several runs


def test_a_comparison_says_which_run_is_better_and_which_shorter(tmp_path):
    long = make_folder(tmp_path / "long", {"search": (8, 6)})
    short = make_folder(tmp_path / "short", SEARCH)
    open_run = make_folder(tmp_path / "open", {"search": (8, 6)}, finished=False)
    result = json.loads((short / "result.json").read_text()) | {"test_error_percent": 0.0}
    (short / "result.json").write_text(json.dumps(result))
    runs = [read_run(path) for path in (long, short, open_run)]
    assert list(map(searched_rounds, runs)) == [6, 4, 6]
    said = comparison_summary(["long", "short", "open"], runs)
    assert said == (
        "The test errors, the lowest first: 0.00% (short: 0 of 8 images; 95% interval 0.0 to "
        "32.4%) and 12.50% (long: 1 of 8 images; 95% interval 2.2 to 47.1%). Chance alone can "
        "explain the difference (Fisher's exact test, p = 1.00). open is without a result. "
        "short (4 rounds) has a shorter search than the longest, which has 6 rounds: "
        "its curves end earlier."
    )
    page = comparison_page(runs)
    assert said.replace("'", "&#39;") in page
    assert "ends earlier: short at round 4" in page


def test_errors_on_different_data_are_not_ranked(tmp_path):
    one = make_folder(tmp_path / "one", SEARCH)
    other = make_folder(tmp_path / "other", SEARCH, dataset="fashion-mnist")
    said = comparison_summary(["one", "other"], [read_run(one), read_run(other)])
    assert said == (
        "The test errors are of different data sets or tables, so they cannot be compared."
    )


def test_trials_are_not_ranked(tmp_path):
    one = make_folder(tmp_path / "one", SEARCH)
    other = make_folder(tmp_path / "other", SEARCH, settings=("trial=true",))
    said = comparison_summary(["one", "other"], [read_run(one), read_run(other)])
    assert said == "The only test error is 12.50% (one: 1 of 8 images; 95% interval 2.2 to 47.1%)."


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((2, 3), "Chance alone can explain the difference (Fisher's exact test, p = 1.00)."),
        (
            (10, 60), "Chance hardly explains that run0 is lower than run1 (Fisher's exact test, "
            "p = 5e-14). Each is one training: another seed gives another error.",
        ),
        (
            (10, 14, 60), "Chance hardly explains that run0 is lower than run2 (Fisher's exact "
            "test, p = 1.5e-13, corrected for all pairs), but it can explain that run0 is lower "
            "than run1. Each is one training: another seed gives another error.",
        ),
        (
            (8, 9, 18), "Chance alone can explain the differences (Fisher's exact test, p = 0.17, "
            "corrected for all pairs).",
        ),
    ],
)  # fmt: skip
def test_a_ranking_says_whether_chance_explains_it(tmp_path, wrong, said):
    """Of 100 images; a pair among three needs three times as small a p."""
    runs = []
    for index, errors in enumerate(wrong):
        folder = make_folder(tmp_path / f"run{index}", SEARCH)
        result = json.loads((folder / "result.json").read_text())
        counts = {"test_error_percent": float(errors), "test_images": 100}
        (folder / "result.json").write_text(json.dumps(result | counts))
        runs.append(read_run(folder))
    assert comparison_summary([run.name for run in runs], runs).endswith(said)
