"""Runs from a script. Whole ones on own tensors are tried in tests/integration."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from callers_torch import CALLERS, caller
from PIL import Image

import lfmcw_app
from lfmcw_app import from_python, own_datasets
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.runs import Run
from lfmcw_app.stopping import Stopped

SETTINGS = {
    "search.steps": 2,
    "search.order": "first",
    "search.batch_size": 8,
    "search.channels": 4,
    "search.layers": 3,
    "search.nodes": 1,
    "search.primitives": ["none", "skip_connect", "sep_conv_3x3"],
    "evaluation.epochs": 1,
    "evaluation.batch_size": 32,
    "evaluation.channels": 4,
    "evaluation.layers": 3,
}


def squares(shift=0):
    """Images of two classes: bright on the left, or on the right."""
    labels = torch.arange(80) % 2
    images = torch.randint(60, (80, 1, 8, 8), generator=torch.Generator().manual_seed(shift))
    images[labels == 0, :, :, :4] += 150
    images[labels == 1, :, :, 4:] += 150
    return (images.byte(), labels), None, ("left", "right")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(own_datasets, "_REGISTERED", {})
    monkeypatch.setattr("lfmcw_app.generator_quality.STEPS", 10)
    lfmcw_app.register_dataset("squares", lambda root: squares())


def searched(folder, **options):
    return lfmcw_app.run_search(
        "squares", folder, preset="smoke", settings=SETTINGS, device="cpu", **options
    )


def learned(folder):
    """What the rounds of a run have computed."""
    kept = ("phase", "round", "losses", "metrics", "alpha")
    return [{key: entry.get(key) for key in kept} for entry in Run(folder).metrics]


@contextmanager
def stopping(monkeypatch):
    """A signal stops the run in the body after its first round."""
    from lfmcw_app.progress import PhaseProgress

    update = PhaseProgress.update

    def signalled(self, *args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        update(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PhaseProgress, "update", signalled)
        with pytest.raises(SystemExit) as stop:
            yield
    assert stop.value.code == 0


def test_a_script_runs_is_stopped_and_resumes(tmp_path, monkeypatch, capsys):
    """Stopped after a round by SIGTERM, it resumes from there, to the result of a run in one go.

    The latter's program has set all that it can of torch, and gets it back.
    """
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with ExitStack() as stack:
        for name in CALLERS:
            stack.enter_context(caller(name))
        whole = searched(tmp_path / "whole", quiet=True)
        assert torch.get_default_dtype() == torch.float64
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "whole" / "report.html").exists()
    assert whole == json.loads((tmp_path / "whole" / "result.json").read_text())

    with stopping(monkeypatch):
        searched(tmp_path / "run")
    shown = capsys.readouterr().out
    assert "80 images, 2 classes, 64 train / 16 test, 8×8, 1 channel" in shown
    assert "Run the same script again to resume." in shown
    assert not (tmp_path / "run" / "result.json").exists()

    def stopped(*_):
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(from_python, "run", stopped)  # before it has loaded its checkpoint
        with pytest.raises(SystemExit):
            searched(tmp_path / "run")
    assert "The run resumes from its last checkpoint." in capsys.readouterr().out

    lfmcw_app.register_dataset("squares", lambda root: squares(shift=1))
    with pytest.raises(lfmcw_app.InputError, match="class 'left' has other images"):
        searched(tmp_path / "run")
    lfmcw_app.register_dataset("squares", lambda root: squares())
    assert searched(tmp_path / "run") == whole
    assert learned(tmp_path / "run") == learned(tmp_path / "whole")


@pytest.mark.slow
def test_pictures_in_any_form_are_the_same_data_to_a_run(tmp_path, monkeypatch):
    """It begins with a data set and resumes with files, to the result of a run with an iterator."""
    (images, labels), _, names = squares()
    pictures = [Image.fromarray(image[0].numpy()) for image in images]
    for place, picture in enumerate(pictures):
        picture.save(tmp_path / f"{place}.png")
    paths = [tmp_path / f"{place}.png" for place in range(len(pictures))]

    class Squares:
        def __len__(self):
            return len(pictures)

        def __getitem__(self, place):
            return pictures[place % len(pictures)], int(labels[place])

    def register(part):
        lfmcw_app.register_dataset("squares", lambda root: (part(), None, names))

    register(lambda: zip(pictures, labels.tolist(), strict=True))
    whole = searched(tmp_path / "whole", quiet=True)
    register(Squares)
    with stopping(monkeypatch):
        searched(tmp_path / "run", quiet=True)
    register(lambda: (paths, labels))
    Image.fromarray(255 - images[1, 0].numpy()).save(paths[1])
    with pytest.raises(lfmcw_app.InputError, match="class 'right' has other images"):
        searched(tmp_path / "run")
    pictures[1].save(paths[1])
    assert searched(tmp_path / "run", quiet=True) == whole
    assert learned(tmp_path / "run") == learned(tmp_path / "whole")


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    """Threads share PyTorch's random state; the first run is not disturbed by the attempt."""
    refused = []

    def meanwhile(root):
        before = torch.get_rng_state()
        with ThreadPoolExecutor(1) as pool:
            refused.append(pool.submit(searched, tmp_path / "other").exception())
        assert torch.equal(torch.get_rng_state(), before)

    lfmcw_app.register_dataset("squares", meanwhile)
    for _ in range(2):  # a run that has ended, also by an error, is in nobody's way
        with pytest.raises(lfmcw_app.InputError, match="must return"):
            searched(tmp_path / "run")
    assert len(refused) == 2
    for error in refused:
        assert isinstance(error, lfmcw_app.InputError)
        assert "Another run_search is under way in this process" in str(error)


def test_settings_that_cannot_change_are_refused(tmp_path):
    searched(tmp_path / "run", quiet=True)
    with pytest.raises(lfmcw_app.InputError, match="another recipe: seed"):
        searched(tmp_path / "run", seed=3)


def test_settings_of_a_script_are_taken_as_values(tmp_path, monkeypatch):
    def told(console, recipe, *_, **__):
        raise RuntimeError(recipe)

    monkeypatch.setattr("lfmcw_app.from_python.read_and_tell", told)
    settings = {
        "search.space": "pcdarts",
        "data.groups": "😀 #1.csv",
        "search.weights.min_lr": 1e-5,
    }
    with pytest.raises(RuntimeError) as found:
        lfmcw_app.run_search("squares", tmp_path / "run", preset="smoke", settings=settings)
    (recipe,) = found.value.args
    assert recipe == load_recipe("smoke", overrides={"dataset": "squares", **settings})
    assert recipe.search == load_recipe("smoke", space="pcdarts", overrides=settings).search


def test_a_script_is_told_of_settings_that_change_nothing(tmp_path, monkeypatch, capsys):
    def stop(console, recipe, root, *, device):
        raise lfmcw_app.InputError("this far")

    monkeypatch.setattr("lfmcw_app.from_python.read_and_tell", stop)
    settings = {"search": {"partial_channels": 2}, "search.steps": 2}
    with pytest.raises(lfmcw_app.InputError, match="this far"):
        lfmcw_app.run_search("squares", tmp_path / "run", preset="smoke", settings=settings)
    told = "search.partial_channels changes nothing here: only the space pcdarts has partial"
    assert told in " ".join(capsys.readouterr().out.split())


def test_paths_numbers_and_devices_of_a_script_are_taken(tmp_path, monkeypatch):
    def told(console, recipe, data, *, device):
        raise RuntimeError(recipe, data, device)

    monkeypatch.setattr("lfmcw_app.from_python.read_and_tell", told)
    with pytest.raises(RuntimeError) as found:
        lfmcw_app.run_search(
            tmp_path / "pets", tmp_path / "run", preset="smoke", seed=np.int64(3),
            settings={"search.steps": np.int64(2)}, data=tmp_path, device=torch.device("cpu"),
        )  # fmt: skip
    recipe, data, device = found.value.args
    wanted = {"dataset": f"folder:{tmp_path}/pets", "seed": 3, "search.steps": 2}
    assert recipe == load_recipe("smoke", overrides=wanted)
    assert (data, device) == (tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dataset": None}, "dataset is a name or a path, got None"),
        ({"folder": 3}, "folder is a name or a path, got 3"),
        ({"data": None}, "data is a name or a path, got None"),
        ({"settings": "search.steps=2"}, "settings is a mapping of keys to values, got 'search"),
        ({"device": torch.device("meta")}, "--device meta has shapes but no numbers"),
        ({"device": None}, "--device must be cpu, cuda or auto, got 'None'"),
        ({"seed": 4, "settings": {"seed": 3}}, "--seed is 4, and --set seed is 3"),
    ],
)
def test_arguments_of_another_kind_are_refused(wrong, words, tmp_path):
    with pytest.raises(lfmcw_app.InputError, match=words):
        lfmcw_app.run_search(**{"dataset": "squares", "folder": tmp_path / "run", **wrong})


def test_names_of_the_package_are_found():
    assert set(lfmcw_app.PLACES) == set(lfmcw_app.__all__)
    for name in lfmcw_app.__all__:
        assert callable(getattr(lfmcw_app, name))
    with pytest.raises(AttributeError, match="no attribute 'run_serach'"):
        lfmcw_app.run_serach  # noqa: B018
