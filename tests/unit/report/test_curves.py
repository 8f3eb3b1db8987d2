"""The curves of a report."""

from __future__ import annotations

import json

from made_run_folders import make_folder

from lfmcw_app.report.curves import Rounds, at, loss_charts, training_charts, w2_on_real
from lfmcw_app.report.page import run_page
from lfmcw_app.report.reading import read_run


def test_parts_of_a_gradient_are_drawn_where_recorded(tmp_path):
    """The parts of the architecture's gradient are drawn where they were recorded."""
    folder = make_folder(tmp_path / "run", {"search": (8, 3)})
    assert "Parts of A" not in run_page(read_run(folder))
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    entries[1]["gradient_terms"] = {
        "direct": {"norm": 0.5, "cosine": 0.9},
        "gan_w2": {"norm": 0.25, "cosine": -0.1},
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    html = run_page(read_run(folder))
    assert 'data-label="direct" data-value="0.5"' in html
    assert 'data-label="through G → W2" data-value="-0.1"' in html


def test_rounds_of_stages_are_counted_through(tmp_path):
    run = read_run(make_folder(tmp_path / "run", {"search-1": (8, 2), "search-2": (5, 3)}))
    rounds = Rounds(run)
    assert rounds.offsets == {"search-1": 0, "search-2": 2}
    assert rounds.boundaries == [(1.0, "search-1"), (3.0, "search-2")]
    assert [x for x, _ in rounds.points(at("losses", "w2"))] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_one_stage_has_no_boundaries(tmp_path):
    run = read_run(make_folder(tmp_path / "run", {"search": (8, 2)}))
    assert Rounds(run).boundaries == []


def test_a_line_that_lacks_a_value_has_no_point(tmp_path):
    run = read_run(make_folder(tmp_path / "run", {"search": (8, 3)}))
    del run.searched[0].entries[1]["losses"]["w1"]
    assert [x for x, _ in Rounds(run).points(at("losses", "w1"))] == [1.0, 3.0]


def test_values_are_read_by_their_keys():
    entry = {"metrics": {"w2": {"accuracy": 0.75, "name": "x"}}}
    assert at("metrics", "w2", "accuracy")(entry) == 0.75
    assert at("metrics", "w2", "accuracy", percent_wrong=True)(entry) == 25.0
    assert at("metrics", "w2", "name")(entry) is None
    assert at("metrics", "w3", "accuracy")(entry) is None


def test_a_search_without_a_generator_has_fewer_charts(tmp_path):
    counts = []
    for method in ("lfmcw", "darts"):
        folder = make_folder(
            tmp_path / method, {"search": (8, 3)}, settings=(f"search.method={method}",)
        )
        counts.append(len(loss_charts(Rounds(read_run(folder)))))
    assert counts == [4, 2]


def test_the_training_has_its_loss_and_its_error(tmp_path):
    run = read_run(make_folder(tmp_path / "run", {}))
    loss, error = training_charts(run.training.entries)
    assert 'data-value="0.333333"' in loss
    assert 'data-value="50"' in error
    assert training_charts([]) == []


def test_losses_of_w2_are_compared_on_real_images():
    """That of a plain search has no other part; that of LFM-CW is not its total."""
    ours = {"losses": {"w2": 1.75}, "metrics": {"w2": {"real": 0.9, "synthetic": 0.85}}}
    assert w2_on_real(ours) == 0.9
    assert w2_on_real({"losses": {"w2": 0.93}, "metrics": {"w2": {"accuracy": 0.5}}}) == 0.93
    assert w2_on_real({"losses": {"w2": 0.8}, "metrics": {"w2": {"synthetic": 0.8}}}) is None
    assert w2_on_real({"losses": {}, "metrics": {}}) is None
