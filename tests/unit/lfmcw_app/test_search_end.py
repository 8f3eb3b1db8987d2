"""What is measured of a search's networks: when, what is kept, and that nothing else changes."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from made_generators import bars
from rich.console import Console

import mlo
from lfmcw_app.build_modules import build_modules
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.generator_quality import Judge, Quality
from lfmcw_app.parts import search_parts
from lfmcw_app.pictures import snapshot_rounds
from lfmcw_app.recipe_loading import load_recipe, parsed_settings
from lfmcw_app.run_files import SEARCH_END
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search import search
from lfmcw_app.search_end import (
    confusion_of_w1,
    generator_result,
    measure_end,
    quality_rounds,
    read_search_end,
)

SMALL = (
    "search.nodes=1", "search.channels=4", "search.batch_size=8", "search.steps=3",
    "search.primitives=[skip_connect,sep_conv_3x3]", "search.generator.channels=4",
    "checkpoint_every=2",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Trainings of a few steps and no pictures: they do not matter here."""
    monkeypatch.setattr("lfmcw_app.generator_quality.STEPS", 5)
    for name in ("save_cells", "save_samples", "save_snapshot"):
        monkeypatch.setattr(f"lfmcw_app.search.{name}", lambda *given: None)


def searched(path, *settings, dataset=None):
    """A search of three rounds; its folder and what it printed."""
    folder = RunFolder.create(
        path, load_recipe("smoke", overrides=parsed_settings((*SMALL, *settings)))
    )
    output = io.StringIO()
    search(folder, dataset or bars(), Console(file=output, width=500), CPU)
    return folder, output.getvalue()


def entries(folder):
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def end_of(folder):
    """The arguments of `measure_end`, for fresh modules."""
    dataset = bars()
    torch.manual_seed(0)
    modules = build_modules(folder.recipe.search, dataset)
    judge = Judge.of(dataset, folder.recipe)
    return modules, search_parts(folder.recipe, dataset), dataset, judge


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_measurements(tmp_path):
    """Bit for bit: lines, checkpoints, cells."""
    found = {}
    for when in ("never", "snapshots"):
        folder, _ = searched(tmp_path / when, f"search.generator.quality={when}")
        state = mlo.load_checkpoint(folder.path / "search.pt")
        lines = entries(folder)
        measured = [line["round"] for line in lines if line.pop("quality", None)]
        found[when] = (lines, state["optimizer"], (folder.path / "genotype.json").read_text())
        assert measured == {"never": [], "snapshots": [1, 2, 3]}[when]
    first, other = flat(found["never"]), flat(found["snapshots"])
    assert list(first) == list(other)
    for key, value in first.items():
        same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
        assert same, key


def flat(tree, prefix=""):
    """The leaves of a tree, by their path."""
    if isinstance(tree, dict):
        pairs = tree.items()
    elif isinstance(tree, (list, tuple)):
        pairs = enumerate(tree)
    else:
        return {prefix: tree}
    found = {}
    for key, value in pairs:
        found |= flat(value, f"{prefix}/{key}")
    return found


def test_the_end_of_a_search_is_recorded_and_told(tmp_path):
    folder, printed = searched(tmp_path / "run")
    found = read_search_end(folder)
    assert (found["stage"], found["round"]) == ("search", 3)
    assert found["generator"] == entries(folder)[-1]["quality"]
    assert f"generator: {Quality.from_data(found['generator'])}" in printed
    assert [sum(row) for row in found["w1_confusion"]] == [30] * 4
    measured = generator_result(folder)["generator"]
    doubts = measured.pop("doubts")
    assert measured == Quality.from_data(found["generator"]).to_data()
    assert [doubt[:44] for doubt in doubts] == ["The generated pictures do not show their cla"]


@pytest.mark.parametrize(("lines", "mark"), [(None, True), ("", False), ("{\n[]\n", False)])
def test_a_result_tells_doubts_of_its_generator(tmp_path, lines, mark):
    """A mark is seen with W2's last rounds of metrics.jsonl; without these no mark is claimed."""
    folder, _ = searched(tmp_path / "run")
    found = read_search_end(folder)
    by_class = found["generator"]["by_class"] | {"gan_test": [25.0] * 4, "real": [100.0] * 4}
    measured = found["generator"] | {"by_class": by_class, "variety": 0.01}
    (folder.path / SEARCH_END).write_text(json.dumps(found | {"generator": measured}))
    logged = entries(folder)
    for line in logged:
        line["metrics"]["w2"]["generated_accuracy"] = 0.95
    logged[-1]["quality"] = measured
    text = "".join(json.dumps(line) + "\n" for line in logged)
    folder.metrics.write_text(text if lines is None else lines)
    first, second = generator_result(folder)["generator"]["doubts"]
    assert first.startswith("The generator has collapsed: its pictures of a class are all alike")
    assert ("W2 recognises 95% of them" in second) == mark
    assert "recognises only 25% of them and 100% of other real ones" in second


def test_drawn_real_pictures_are_judged_at_the_end(tmp_path):
    how = ("search.generator.name=real", "data.search_images=120")
    folder, printed = searched(tmp_path / "run", *how)
    found = read_search_end(folder)
    quality = Quality.from_data(found["generator"])
    assert 0.5 < quality.variety < 1.5
    assert f"generator: {quality}" in printed
    assert sum(map(sum, found["w1_confusion"])) == 60


def test_a_search_without_a_generator_has_no_such_end(tmp_path):
    folder, printed = searched(tmp_path / "run", "search.method=darts")
    assert not (folder.path / SEARCH_END).exists()
    assert generator_result(folder) == {}
    assert "generator" not in printed


def test_the_end_is_measured_once(tmp_path):
    """What stands in search.json is not measured again; of another round it is."""
    folder = RunFolder.create(
        tmp_path / "run", load_recipe("smoke", overrides=parsed_settings(SMALL))
    )
    modules, parts, dataset, judge = end_of(folder)

    def end(number, given=judge):
        at = {"stage": "search", "round": number}
        source = modules.gan.generator
        return measure_end(folder, modules, parts, source, dataset, given, at=at, measured=None)

    class Unasked:
        def measure(self, generator):
            raise AssertionError

    first = end(3)
    assert end(3, Unasked()) == first
    with pytest.warns(mlo.CheckpointWarning, match=r"search\.json cannot be made \(AssertionError"):
        assert end(4, Unasked()) is None
    assert end(4) == first
    assert read_search_end(folder)["round"] == 4


def test_an_end_that_cannot_be_written_stops_the_run(tmp_path, monkeypatch):
    """The result is made from it: without it a run would have another result."""
    folder = RunFolder.create(
        tmp_path / "run", load_recipe("smoke", overrides=parsed_settings(SMALL))
    )
    modules, parts, dataset, judge = end_of(folder)
    (folder.path / SEARCH_END).mkdir()  # a name that no file can take
    monkeypatch.setattr("lfmcw_app.search_end.read_search_end", lambda folder: None)
    at, source = {"stage": "search", "round": 3}, modules.gan.generator
    with pytest.raises(InputError, match=r"search\.json cannot be written"):
        measure_end(folder, modules, parts, source, dataset, judge, at=at, measured=None)


@pytest.mark.parametrize("text", ["{", "[]", '{"generator": {"gan_test": 1}}', '{"generator": 3}'])
def test_a_damaged_file_is_an_error_of_the_user(tmp_path, text):
    folder = RunFolder.create(
        tmp_path / "run", load_recipe("smoke", overrides=parsed_settings(SMALL))
    )
    (folder.path / SEARCH_END).write_text(text)
    with pytest.raises(InputError, match=r"search.json is damaged .* Delete it and resume"):
        generator_result(folder)


@pytest.mark.parametrize(
    ("when", "ends", "expected"),
    [
        ("snapshots", False, snapshot_rounds(80)),
        ("snapshots", True, snapshot_rounds(80)),
        ("end", False, frozenset()),
        ("end", True, {80}),
        ("never", True, frozenset()),
    ],
)
def test_rounds_of_measurements(when, ends, expected):
    recipe = load_recipe("smoke", overrides={"search.generator.quality": when})
    assert quality_rounds(recipe, 80, ends_search=ends) == expected
    plain = load_recipe("smoke", overrides={"search.method": "darts"})
    assert quality_rounds(plain, 80, ends_search=True) == frozenset()


def test_w1_is_measured_with_settled_statistics(tmp_path):
    """A copy of W1 is given them. W1 and the random state stay as they are."""
    folder = RunFolder.create(
        tmp_path / "run", load_recipe("smoke", overrides=parsed_settings(SMALL))
    )
    modules, parts, dataset, _ = end_of(folder)
    train, validation = parts.train, parts.validation
    before = {name: value.clone() for name, value in modules.w1.state_dict().items()}
    state = torch.get_rng_state()
    found = torch.tensor(confusion_of_w1(modules, train, validation, dataset))
    assert torch.equal(torch.get_rng_state(), state)
    now = modules.w1.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    assert modules.w1.training
    assert found.sum() == len(validation)
    assert int((found.sum(0) > 0).sum()) > 1  # it does not give one answer to all

    # Its mode does not matter.
    modules.w1.eval()
    again = torch.tensor(confusion_of_w1(modules, train, validation, dataset))
    assert torch.equal(again, found)


def test_a_row_of_w1s_confusion_is_a_label_of_d_val(tmp_path):
    """W1 that always says 2 has its counts in column 2."""
    folder = RunFolder.create(
        tmp_path / "run", load_recipe("smoke", overrides=parsed_settings(SMALL))
    )
    modules, parts, dataset, _ = end_of(folder)
    train, validation = parts.train, parts.validation
    with torch.no_grad():
        modules.w1.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1e6, 0.0]))
    kept = validation[validation.labels != 3]
    found = confusion_of_w1(modules, train, replace(kept), dataset)
    assert found == [[0, 0, 30, 0]] * 3 + [[0] * 4]


def test_a_lost_end_is_measured_again_as_it_was(tmp_path):
    """A run whose search is over, and whose search.json is lost, finds the same again."""
    folder, _ = searched(tmp_path / "run")
    expected = (folder.path / SEARCH_END).read_text()
    (folder.path / SEARCH_END).unlink()
    search(RunFolder.open(folder.path), bars(), Console(quiet=True), CPU)
    assert (folder.path / SEARCH_END).read_text() == expected


def test_a_collapsed_generator_is_warned_of_at_the_end(tmp_path, monkeypatch):
    """If that is asked for; not in the first rounds, where no generator draws yet."""
    monkeypatch.setattr("lfmcw_app.collapse.ALIKE", 100.0)
    settings = ("detect_collapse=true", "search.generator.quality=snapshots")
    with pytest.warns(NumbersWarning) as told:
        searched(tmp_path / "run", *settings)
    texts = [str(one.message) for one in told if one.category is NumbersWarning]
    assert [text[:44] for text in texts] == [
        "Round 3: The generator has collapsed: its pi",
        "Round 3: The generated pictures do not show ",
    ]
    searched(tmp_path / "unasked", "search.generator.quality=snapshots")
