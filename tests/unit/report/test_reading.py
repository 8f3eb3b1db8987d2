"""Reading a run folder for a report."""

from __future__ import annotations

import html
import json
import re

import pytest
from made_run_folders import make_folder
from PIL import Image

from lfmcw_app.errors import InputError
from lfmcw_app.report import reading
from lfmcw_app.report.page import run_page
from lfmcw_app.report.reading import read_run
from lfmcw_app.search_space.genotype import random_genotype


def test_everything_in_the_folder_is_read(tmp_path):
    run = read_run(make_folder(tmp_path / "run", {"search": (8, 3)}))
    assert run.name == "run"
    assert [stage.name for stage in run.searched] == ["search"]
    assert [entry["round"] for entry in run.searched[0].entries] == [1, 2, 3]
    assert [entry["round"] for entry in run.training.entries] == [1, 2, 3]
    assert run.genotype == random_genotype(2, 0)
    assert run.result["test_error_percent"] == 12.5
    assert [shot.round for shot in run.snapshots] == [1, 2, 3]
    assert (run.evaluated, run.real.name) == (False, "real.png")


def test_what_is_missing_is_empty(tmp_path):
    folder = make_folder(tmp_path / "run", {}, finished=False)
    for path in ("metrics.jsonl", "dataset.json", "samples/real.png"):
        (folder / path).unlink()
    run = read_run(folder)
    assert (list(run.searched), list(run.training.entries), list(run.snapshots)) == ([], [], [])
    assert (run.genotype, run.result, run.real) == (None, None, None)
    assert (run.dataset, run.environment) == ({}, {})


def test_a_line_without_its_end_is_left_out(tmp_path):
    """A run was killed while it wrote."""
    folder = make_folder(tmp_path / "run", {"search": (8, 2)}, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "sea')
    assert [entry["round"] for entry in read_run(folder).searched[0].entries] == [1, 2]


def test_stages_are_told_apart(tmp_path):
    """The sheets of search-1 are not those of a stage called search."""
    folder = make_folder(tmp_path / "run", {"search-1": (8, 1), "search-2": (5, 2)})
    run = read_run(folder)
    assert [stage.name for stage in run.searched] == ["search-1", "search-2"]
    shots = [(shot.phase, shot.round) for shot in run.snapshots]
    assert shots == [("search-1", 1), ("search-2", 1), ("search-2", 2)]
    Image.new("L", (2, 2)).save(folder / "samples" / "search-1-old.png")
    assert len(read_run(folder).snapshots) == 3


def test_an_evaluation_has_the_genotype_that_was_given(tmp_path):
    run = read_run(make_folder(tmp_path / "run", {}, evaluated=True))
    assert run.evaluated
    assert run.genotype == random_genotype(2, 0)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics.jsonl", "nonsense\n", r"1 lines of metrics\.jsonl \(1; the first: Expecting"),
        ("metrics.jsonl", '{"phase": "search"}\n', "the first: it lacks round"),
        ("metrics.jsonl", '{"phase": 3, "round": 1, "losses": {}, "metrics": {}}\n', "phase is 3"),
        (
            "metrics.jsonl",
            '{"phase": "search", "round": -1, "losses": {}, "metrics": {}}\n',
            "round is -1",
        ),
        ("result.json", "[1]", "holds a list, not an object"),
        ("environment.json", "{", r"environment\.json \(Expecting"),
        ("genotype.json", "{}", r"genotype\.json \("),
        ("changes.jsonl", "{}", r"changes\.jsonl \("),
    ],
)
def test_what_is_damaged_is_left_out_and_named(tmp_path, name, text, words):
    folder = make_folder(tmp_path / "run", {"search": (8, 1)})
    (folder / name).write_text(text)
    run = read_run(folder)
    (said,) = run.unreadable
    assert re.search(words, said)
    assert said in html.unescape(run_page(run))


def test_a_folder_whose_recipe_is_damaged_is_refused(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 1)})
    (folder / "config.yaml").write_text("search: [")
    with pytest.raises(InputError, match="not valid YAML"):
        read_run(folder)


def test_damaged_lines_cost_the_others_nothing(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 8)})
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    lines[3] = b"\0" * 40 + b"\n"
    lines[5] = b"\xff\n"
    metrics.write_bytes(b"".join(lines))
    run = read_run(folder)
    assert [entry["round"] for entry in run.searched[0].entries] == [1, 2, 3, 5, 7, 8]
    assert "2 lines of metrics.jsonl (4, 6; the first:" in run.unreadable[0]


def test_of_very_long_runs_some_rounds_are_read(tmp_path, monkeypatch):
    """Those with α, and the last of each phase, are never missed."""
    folder = make_folder(tmp_path / "run", {"search-1": (8, 1), "search-2": (8, 1)})
    entry = {"losses": {"w2": 1.0}, "metrics": {}, "gradient_norms": {}, "solves": {}}
    made = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    alpha, candidates = made[0]["alpha"], made[0]["candidates"]
    lines = []
    for phase, count in (("search-1", 50), ("search-2", 33)):
        for number in range(1, count + 1):
            more = {"alpha": alpha, "candidates": candidates} if number == 7 else {}
            lines.append(json.dumps({"phase": phase, "round": number, **entry, **more}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert read_run(folder).stride == 1
    monkeypatch.setattr(reading, "MOST_LINES", 10)
    run = read_run(folder)
    assert run.stride == 9
    found = [[entry["round"] for entry in stage.entries] for stage in run.searched]
    assert found == [[7, 9, 18, 27, 36, 45, 50], [4, 7, 13, 22, 31, 33]]
    assert "Curves show one of 9 rounds" in run_page(run)


def with_warm_up(folder):
    """A run folder whose metrics begin with two rounds of a warm-up."""
    made = make_folder(folder, {"search": (8, 2)}, finished=False)
    lines = []
    for number in (1, 2):
        entry = {
            "phase": "generator", "round": number,
            "losses": {"gan": {"generator": 0.5 * number, "discriminator": 1.0}},
            "metrics": {"gan": {"real_score": 0.25, "fake_score": -0.25}},
            "gradient_norms": {"gan": 1.0}, "solves": {},
        }  # fmt: skip
        lines.append(json.dumps(entry) + "\n")
    metrics = made / "metrics.jsonl"
    metrics.write_text("".join(lines) + metrics.read_text())
    return made


def test_a_warm_up_is_no_stage_of_the_search(tmp_path):
    run = read_run(with_warm_up(tmp_path / "run"))
    assert [stage.name for stage in run.searched] == ["search"]
    assert [entry["round"] for entry in run.warmup.entries] == [1, 2]
    page = run_page(run)
    assert 'id="warmup"' in page
    assert "Warm-up: losses of the players" in page
    assert "Warm-up: mean scores of the discriminator" in page


def test_without_a_warm_up_there_is_no_section_of_it(tmp_path):
    run = read_run(make_folder(tmp_path / "run", {"search": (8, 2)}))
    assert list(run.warmup.entries) == []
    assert 'id="warmup"' not in run_page(run)


def test_of_a_log_without_end_the_beginning_is_read(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "run", {"search": (8, 6)}, finished=False)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    monkeypatch.setattr(reading, "MOST_BYTES", sum(map(len, lines[:2])))
    run = read_run(folder)
    assert [entry["round"] for entry in run.searched[0].entries] == [1, 2]
    assert run.unreadable == ["metrics.jsonl from line 3 on (it is too long)"]
