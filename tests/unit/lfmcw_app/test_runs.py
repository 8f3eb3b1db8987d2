"""A run folder as an object."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from made_run_folders import add_classes, make_folder
from trained_runs import trained_run

import lfmcw_app
from lfmcw_app.errors import InputError
from lfmcw_app.search_space.genotype import random_genotype


def text_of(run):
    """The words that a notebook shows."""
    return " ".join(ET.fromstring(run._repr_html_()).itertext())


def test_a_complete_run_has_what_its_folder_holds(tmp_path):
    run = lfmcw_app.Run(make_folder(tmp_path / "run", {"search": (8, 3)}))
    assert run.is_complete
    assert run.genotype == random_genotype(2, 0)
    assert run.result["test_error_percent"] == 12.5
    assert [(entry["phase"], entry["round"]) for entry in run.metrics] == [
        ("search", 1), ("search", 2), ("search", 3),
        ("training", 1), ("training", 2), ("training", 3),
    ]  # fmt: skip
    assert run.recipe.dataset == "digits"
    assert repr(run) == f"Run({str(run.path)!r}: digits, complete)"


def test_a_run_that_is_still_running_says_where_it_is(tmp_path):
    run = lfmcw_app.Run(make_folder(tmp_path / "run", {"search": (8, 3)}, finished=False))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "search", "rou')  # while it writes
    assert len(run.metrics) == 3
    assert repr(run).endswith("digits, search after round 3)")
    for missing in ("result", "genotype"):
        with pytest.raises(InputError, match="resume"):
            getattr(run, missing)
    assert "search after round 3" in text_of(run)
    (run.path / "metrics.jsonl").unlink()
    assert repr(run).endswith("no round yet)")
    assert run.metrics == []


def test_an_evaluation_says_its_own_command(tmp_path):
    folder = make_folder(tmp_path / "run", {}, evaluated=True)
    run = lfmcw_app.Run(folder)
    assert run.genotype == random_genotype(2, 0)
    (folder / "result.json").unlink()
    with pytest.raises(InputError, match=r"lfmcw_app\.evaluate --resume"):
        run.result  # noqa: B018


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="There is no run in"):
        lfmcw_app.Run(tmp_path)


@pytest.mark.parametrize("line", ["[1]", "{", '{"a": 1e99}'])
def test_a_damaged_line_is_named(tmp_path, line):
    run = lfmcw_app.Run(make_folder(tmp_path / "run", {"search": (8, 2)}))
    path = run.path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(InputError, match=r"metrics.jsonl is damaged: line 2 "):
        run.metrics  # noqa: B018


def test_a_notebook_shows_the_result_and_the_cells(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    run = lfmcw_app.Run(add_classes(folder, [0.0, 20.0, 10.0]))
    shown = text_of(run)
    for words in ("digits", "12.50%", "1,234", "cow 10.0%", "dog 20.0%", "normal cell"):
        assert words in shown, words
    assert shown.index("dog 20.0%") < shown.index("cow 10.0%")
    assert "cat" not in shown
    assert len(list(ET.fromstring(run._repr_html_()).iter("svg"))) == 2


def test_a_name_of_a_class_is_text(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    folder = make_folder(tmp_path / "<b>run", {"search": (8, 1)}, names=(name, "b", "c"))
    html = lfmcw_app.Run(add_classes(folder, [50.0, 20.0, 10.0]))._repr_html_()
    assert "<img" not in html
    assert "<b>" not in html
    assert name in text_of(lfmcw_app.Run(folder))


def test_a_result_without_some_figures_is_shown_all_the_same(tmp_path):
    run = lfmcw_app.Run(make_folder(tmp_path / "run", {"search": (8, 1)}))
    result = run.result
    del result["parameters"]
    result["doubt"] = "it guesses"
    (run.path / "result.json").write_text(json.dumps(result))
    shown = text_of(run)
    assert "it guesses" in shown
    assert "parameters" not in shown


def test_the_network_predicts_what_load_network_does(tmp_path, monkeypatch):
    trained = trained_run(tmp_path, monkeypatch)
    run = lfmcw_app.Run(trained.path)
    image = sorted((trained.pictures / "test").rglob("*.png"))[0]
    network, preprocess, class_names = lfmcw_app.load_network(trained.path)
    with torch.no_grad():
        expected = network(preprocess(image)[None]).softmax(1)
    assert torch.equal(run.predict(image), expected)
    assert run.network()[2] == class_names
    assert run.predict(image, image).shape == (2, len(class_names))
    with pytest.raises(InputError, match="at least one image"):
        run.predict()


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"parameters": "many", "classes": []}', '{"classes": 1}']
)
def test_a_damaged_result_is_said_where_it_is_shown(tmp_path, text):
    run = lfmcw_app.Run(make_folder(tmp_path / "run", {"search": (8, 1)}))
    (run.path / "result.json").write_text(text)
    assert "cannot be shown" in text_of(run)
    assert "normal cell" in text_of(run)


def test_a_damaged_last_line_is_no_error_of_what_shows_it(tmp_path):
    run = lfmcw_app.Run(make_folder(tmp_path / "run", {"search": (8, 1)}, finished=False))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("{]\n")
    assert repr(run).endswith("digits, metrics.jsonl is damaged)")
    assert "metrics.jsonl is damaged" in text_of(run)
