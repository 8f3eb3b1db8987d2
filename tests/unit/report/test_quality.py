"""What the generated pictures are worth, in a report."""

from __future__ import annotations

import json

import pytest
from made_run_folders import make_folder

from lfmcw_app.report.curves import Rounds
from lfmcw_app.report.page import run_page
from lfmcw_app.report.quality import MOST_ROWS, generator_quality
from lfmcw_app.report.reading import read_run


def measured(gan_test=50.0, variety=0.75, classes=3):
    column = [gan_test] * (classes - 1) + [None]
    others = {"gan_train": [35.5] * classes, "real": [80.0] * classes, "variety": column}
    by_class = {"gan_test": column, **others}
    return {
        "gan_test": gan_test, "gan_train": 35.5, "real": 80.0, "variety": variety,
        "by_class": by_class,
    }  # fmt: skip


def folder_of(tmp_path, qualities, rounds=4, stages=("search",), **options):
    """A run folder with qualities: (stage, round) → quality."""
    folder = make_folder(tmp_path / "run", dict.fromkeys(stages, (8, rounds)), **options)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if (line["phase"], line["round"]) in qualities:
            line["quality"] = qualities[line["phase"], line["round"]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def found_in(folder):
    run = read_run(folder)
    return generator_quality(run, Rounds(run))


def test_the_last_measures_stand_class_by_class(tmp_path):
    folder = folder_of(tmp_path, {("search", 2): measured(10.0), ("search", 4): measured(50.0)})
    found = found_in(folder)
    assert (found.phase, found.round, found.last.gan_test) == ("search", 4, 50.0)
    assert [(row.name, row.gan_test, row.variety) for row in found.rows] == [
        ("cat", "50.0", "50.00"), ("dog", "50.0", "50.00"), ("cow", "–", "–"),
    ]  # fmt: skip
    assert len(found.charts) == 2
    html = run_page(read_run(folder))
    assert 'data-label="GAN-test" data-value="50"' in html
    assert 'data-label="variety" data-value="0.75"' in html
    assert "After round 4 of search" in html
    assert 'data-class-quality="dog"' in html
    assert "data-collapsed" not in html


def test_a_collapsed_generator_is_told_of(tmp_path):
    folder = folder_of(tmp_path, {("search", 4): measured(variety=0.02)})
    (text,) = found_in(folder).doubts
    assert "are all alike" in text
    html = run_page(read_run(folder))
    assert html.count("data-collapsed") == 1
    assert text in html
    head = html[html.index("<header>") : html.index("</header>")]
    assert "47.1%). The generator has collapsed: its pictures of a class are all alike" in head


def test_one_measurement_has_no_curve(tmp_path):
    assert found_in(folder_of(tmp_path, {("search", 4): measured()})).charts == []


def test_the_last_stage_that_was_measured_counts(tmp_path):
    stages = ("search-1", "search-2")
    qualities = {("search-1", 4): measured(10.0), ("search-2", 3): measured(20.0)}
    found = found_in(folder_of(tmp_path, qualities, stages=stages))
    assert (found.phase, found.round) == ("search-2", 3)


def test_many_classes_are_cut(tmp_path):
    names = [f"class {k}" for k in range(MOST_ROWS + 5)]
    folder = folder_of(tmp_path, {("search", 4): measured(classes=len(names))}, names=names)
    found = found_in(folder)
    assert (len(found.rows), found.classes) == (MOST_ROWS, MOST_ROWS + 5)
    assert f"the first {MOST_ROWS} of {MOST_ROWS + 5} classes" in run_page(read_run(folder))


def test_a_run_that_measured_nothing_has_no_such_part(tmp_path):
    folder = folder_of(tmp_path, {})
    assert found_in(folder) is None
    assert "GAN-train" not in run_page(read_run(folder))


@pytest.mark.parametrize("logged", [{}, {("search", 2): measured(10.0)}])
def test_what_only_the_end_of_the_search_has_is_shown(tmp_path, logged):
    """Real images in the place of generated ones are judged there alone."""
    folder = folder_of(tmp_path, logged)
    end = {"stage": "search", "round": 4, "generator": measured(40.0), "w1_confusion": None}
    (folder / "search.json").write_text(json.dumps(end))
    found = found_in(folder)
    assert (found.phase, found.round, found.last.gan_test) == ("search", 4, 40.0)
    html = run_page(read_run(folder))
    assert "After round 4 of search" in html
    assert 'data-class-quality="dog"' in html


def test_a_variety_that_no_class_has_is_no_column(tmp_path):
    none = measured(variety=None)
    none["by_class"] = none["by_class"] | {"variety": [None] * 3}
    html = run_page(read_run(folder_of(tmp_path, {("search", 4): none})))
    assert 'data-class-quality="dog"' in html
    assert ">variety</th>" not in html


@pytest.mark.parametrize("value", [None, 0.5])
def test_no_variety_is_a_dash(tmp_path, value):
    html = run_page(read_run(folder_of(tmp_path, {("search", 4): measured(variety=value)})))
    row = html[html.index("<tr data-quality>") :].split("</tr>")[0]
    assert ("<b>–</b>" in row) == (value is None)


def test_a_warm_up_that_was_measured_has_its_curves(tmp_path):
    """Beside those of its losses; where the search was not measured, its last measures count."""
    folder = folder_of(tmp_path, {})
    lines = [
        {
            "phase": "generator",
            "round": n,
            "losses": {},
            "metrics": {},
            "quality": measured(10.0 * n),
        }
        for n in (1, 2)
    ]
    rest = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + rest)
    html = run_page(read_run(folder))
    assert 'data-label="GAN-test" data-value="20"' in html[html.index('id="warmup"') :]
    assert "After round 2 of generator" in html


@pytest.mark.parametrize("number", [[[]], "x", None, 1.5])
def test_a_round_that_is_no_number_is_named_in_the_page(tmp_path, number):
    folder = folder_of(tmp_path, {})
    end = {"stage": "search", "round": number, "generator": measured(40.0), "w1_confusion": None}
    (folder / "search.json").write_text(json.dumps(end))
    assert "what images are worth (" in run_page(read_run(folder))
