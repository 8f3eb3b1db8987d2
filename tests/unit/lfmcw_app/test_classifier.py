"""A run's network in a user's own program: the numbers are those of the run."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from callers_torch import CALLERS, caller
from PIL import Image
from trained_runs import copied

import lfmcw_app
from lfmcw_app.classifier import load_network, network_path
from lfmcw_app.data import in_order
from lfmcw_app.errors import InputError
from lfmcw_app.run_files import NETWORK
from lfmcw_app.runs import Run


@torch.no_grad()
def test_logits_and_error_are_those_of_the_runs_test(trained):
    network, preprocess, class_names = load_network(trained.path)
    files = [
        (path, label)
        for label, name in enumerate(class_names)
        for path in sorted((trained.pictures / "test" / name).iterdir())
    ]
    images = torch.stack([preprocess(path) for path, _ in files])
    labels = torch.tensor([label for _, label in files])
    ((expected_images, expected_labels),) = in_order(trained.dataset.test, trained.dataset, 256)
    assert torch.equal(images, expected_images)
    assert torch.equal(labels, expected_labels)

    tested = trained.networks[0].eval()
    logits = network(images)
    assert torch.equal(logits, tested(expected_images)[0])
    error = 100.0 * float((logits.argmax(1) != labels).double().mean())
    result = json.loads((trained.path / "result.json").read_text("utf-8"))
    assert error == pytest.approx(result["test_error_percent"], abs=1e-9)


def test_an_image_is_taken_in_every_form(trained):
    _, preprocess, _ = load_network(trained.path / NETWORK)
    path = next((trained.pictures / "test" / "cat").iterdir())
    expected = preprocess(str(path))
    assert expected.shape == (3, 8, 8)
    assert expected.dtype == torch.float32
    with Image.open(path) as image:
        array = np.array(image)
        forms = [path, image.copy(), array, torch.from_numpy(array).movedim(-1, 0)]
    assert all(torch.equal(preprocess(form), expected) for form in forms)
    grey = array[..., 0]
    forms = [Image.fromarray(grey), grey, grey[..., None], torch.from_numpy(grey)]
    forms.append(torch.from_numpy(grey)[None])
    results = [preprocess(form) for form in forms]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8, 3), np.float32), np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 2), np.uint8), np.zeros((8, 8, 3), np.uint16), torch.zeros(3, 8, 8),
        torch.zeros(8, 8, 3, dtype=torch.uint8), np.zeros(8, np.uint8), 3, None,
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_image_is_refused(wrong, trained):
    _, preprocess, _ = load_network(trained.path)
    with pytest.raises(InputError, match=r"An (array of an )?image"):
        preprocess(wrong)


def test_a_file_that_is_no_image_is_refused(trained, tmp_path):
    (tmp_path / "notes.png").write_text("notes")
    _, preprocess, _ = load_network(trained.path)
    for name in ("notes.png", "missing.png"):
        with pytest.raises(InputError, match=rf"{name} cannot be read .*\. Give another one\.$"):
            preprocess(tmp_path / name)


@pytest.mark.parametrize("shape", [(0, 8, 3), (8, 0, 3), (0, 0)])
def test_an_array_without_pixels_is_refused(shape, trained):
    _, preprocess, _ = load_network(trained.path)
    with pytest.raises(InputError, match="it has no pixels"):
        preprocess(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("name", CALLERS)
def test_a_network_does_not_depend_on_the_callers_torch(name, trained):
    image = sorted((trained.pictures / "test").rglob("*.png"))[0]
    usual, preprocess, _ = load_network(trained.path)
    expected = Run(trained.path).predict(image)
    with caller(name):
        network, preprocess, _ = load_network(trained.path)
        pixels, predicted = preprocess(image), Run(trained.path).predict(image)
    assert pixels.dtype == torch.float32 and torch.equal(predicted, expected)
    wanted, found = usual.state_dict(), network.state_dict()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    network(pixels[None].clone()).sum().backward()


def test_the_network_returns_logits_alone_and_can_be_trained(trained):
    network, _, _ = load_network(trained.path)
    assert not network.training
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    network.train()
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("present", "words"),
    [
        ([], "is not a run folder"),
        (["config.yaml"], "lfmcw_app.run --resume"),
        (["config.yaml", "evaluated.json"], "has no trained network yet .*evaluate --resume"),
        (["config.yaml", "evaluated.json", "result.json"], "is complete but has no network.pt"),
    ],
)
def test_a_run_without_a_network_says_what_to_do(present, words, trained, tmp_path):
    path = copied(trained, tmp_path)
    for entry in path.iterdir():
        if entry.is_file() and entry.name not in present:
            entry.unlink()
    with pytest.raises(InputError, match=words):
        network_path(path)


def test_a_run_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="There is no run folder and no file"):
        load_network(tmp_path / "nothing")


def test_the_package_alone_imports_no_torch():
    assert lfmcw_app.load_network is load_network
    with pytest.raises(AttributeError, match="load_netwrok"):
        _ = lfmcw_app.load_netwrok
    code = "import sys, lfmcw_app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
