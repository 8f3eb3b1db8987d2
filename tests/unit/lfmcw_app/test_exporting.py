"""Exported networks give the original's numbers without this package, or are not kept."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lfmcw_app import exporting
from lfmcw_app.decoding import Decoding
from lfmcw_app.errors import InputError
from lfmcw_app.exporting import FORMATS, INPUTS, Comparison, export_network, real_images
from lfmcw_app.network_file import NetworkFile, NetworkPlan
from lfmcw_app.run_files import NETWORK
from lfmcw_app.search_space.genotype import Edge, Genotype
from lfmcw_app.search_space.operations import PRIMITIVES

NEEDED = FORMATS["onnx"].packages
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason=f"needs {', '.join(NEEDED)} (pip install 'torch-mlo[export]')",
)
FORMAT = [
    pytest.param("torch"), pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow])
]  # fmt: skip


def all_primitives():
    """A genotype with every operation that is a function of images, at stride 1 and 2."""
    names = [name for name in PRIMITIVES if name not in ("none", "noise")]
    edges = tuple(
        Edge(names[(2 * node + source) % len(names)], source)
        for node in range((len(names) + 1) // 2)
        for source in (0, 1)
    )
    assert {edge.primitive for edge in edges} == set(names)
    return Genotype(normal=edges, reduction=edges)


def network_file(stem="cifar", size=8, channels=3, genotype=None):
    torch.manual_seed(0)
    plan = NetworkPlan(
        genotype=genotype or all_primitives(),
        in_channels=channels,
        num_classes=3,
        channels=4,
        layers=3,
        stem=stem,
    )
    network = plan.build()
    network(torch.randn(8, channels, size, size))  # the running statistics are no longer 0 and 1
    return NetworkFile(
        plan=plan,
        weights=network.state_dict(),
        class_names=("cat", "dog $", "cow"),
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        decoding=Decoding(size=size, channels=channels),
        about={"dataset": "made"},
    )


@pytest.mark.parametrize("kind", FORMAT)
@pytest.mark.parametrize(("stem", "size"), [("cifar", 8), ("imagenet", 32)])
def test_every_operation_and_stem_is_exported(kind, stem, size, tmp_path):
    path = tmp_path / f"network{FORMATS[kind].suffix}"
    found = export_network(network_file(stem, size), kind, path)
    assert found.images == 8
    assert found.difference < 1e-5
    assert found.largest > 1e-3
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize("takes", INPUTS)
def test_a_program_runs_without_this_package(takes, tmp_path):
    """In another process, on any number of images; it names the classes itself."""
    file = network_file()
    export_network(file, "torch", tmp_path / "network.pt2", takes=takes)
    code = """
import json, sys, torch
extra = {"lfmcw.json": ""}
program = torch.export.load("network.pt2", extra_files=extra).module()
images = torch.load("images.pt", weights_only=True)
torch.save(program(images).detach(), "logits.pt")
assert not [name for name in sys.modules if name.partition(".")[0] in ("lfmcw_app", "mlo")]
print(extra["lfmcw.json"])
"""
    pixels = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (file.mean, file.std))
    normalised = (pixels / 255.0 - mean) / std
    torch.save(pixels if takes == "pixels" else normalised, tmp_path / "images.pt")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={"PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    described = json.loads(done.stdout)
    assert described["class_names"] == ["cat", "dog $", "cow"]
    assert described["input"]["shape"] == ["batch", 3, 8, 8]
    with torch.no_grad():
        expected, _ = file.network()(normalised)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.allclose(logits, expected, atol=1e-6)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("takes", INPUTS)
def test_an_onnx_file_describes_itself(takes, tmp_path):
    import onnx
    import onnxruntime

    file = network_file(channels=1)
    path = tmp_path / "network.onnx"
    export_network(file, "onnx", path, takes=takes)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    described = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert described["class_names"] == ["cat", "dog $", "cow"]
    assert described["mean"] == [0.4]
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 1, 8, 8]
    assert given.type == ("tensor(uint8)" if takes == "pixels" else "tensor(float)")
    images = np.zeros((9, 1, 8, 8), np.uint8 if takes == "pixels" else np.float32)
    assert session.run(None, {"images": images})[0].shape == (9, 3)


# ------------------------------ what is refused


def test_a_file_that_differs_is_removed(tmp_path, monkeypatch):
    def read(path):
        return lambda images: torch.zeros(len(images), 3)

    torch_format = FORMATS["torch"]
    other = exporting.Format(suffix=".pt2", packages=(), write=torch_format.write, read=read)
    monkeypatch.setitem(FORMATS, "torch", other)
    with pytest.raises(InputError, match="is not the original"):
        export_network(network_file(), "torch", tmp_path / "network.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("difference", "largest", "equal"),
    [
        (0.0, 1.0, True), (9e-5, 0.1, True), (2e-4, 0.1, False), (2e-4, 10.0, True),
        (float("nan"), 1.0, False), (float("inf"), 1.0, False),
    ],
)  # fmt: skip
def test_differences_are_judged_by_the_size_of_logits(difference, largest, equal):
    found = Comparison(images=1, difference=difference, largest=largest)
    assert found.is_equal == equal


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    def write(network, example, metadata, path):
        path.symlink_to("/dev/full")
        torch_format.write(torch.nn.Flatten(), example, metadata, path)

    torch_format = FORMATS["torch"]
    full = exporting.Format(suffix=".pt2", packages=(), write=write, read=torch_format.read)
    monkeypatch.setitem(FORMATS, "torch", full)
    edges = tuple(Edge("skip_connect", source) for source in (0, 1))
    file = network_file(genotype=Genotype(normal=edges, reduction=edges))
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device"):
        export_network(file, "torch", tmp_path / "network.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_network_with_noise_is_refused(tmp_path):
    """Its output is no function of the images, so nothing can be compared."""
    edges = tuple(Edge("noise", source) for source in (0, 1))
    file = network_file(genotype=Genotype(normal=edges, reduction=edges))
    with pytest.raises(InputError, match="differs from one call to the next"):
        export_network(file, "torch", tmp_path / "network.pt2")
    assert list(tmp_path.iterdir()) == []


def test_lost_numbers_in_any_batch_count(tmp_path, monkeypatch):
    outputs = iter([0.0, float("nan"), 0.0])

    def exported(images):
        return network(images) + next(outputs)

    network = torch.nn.Flatten()
    found = exporting._compared(network, exported, [torch.ones(2, 1)] * 3)
    assert not found.is_equal


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"needs .*onnxscript.* pip install 'torch-mlo\[export\]'"):
        exporting.check_packages("onnx")


def test_real_images_are_those_of_the_run(trained, tmp_path):
    file = NetworkFile.load(trained.path / NETWORK)
    found = real_images(trained.path, file)
    assert found.shape == (6, 3, 8, 8)
    train = trained.dataset.train
    expected = [train.pixels[(train.labels == label).nonzero()[:2, 0]] for label in range(3)]
    assert torch.equal(found, torch.cat(expected))
    (tmp_path / "samples").mkdir()
    assert real_images(tmp_path, file) is None
    Image.new("L", (16, 16)).save(tmp_path / "samples" / "real.png")
    assert real_images(tmp_path, file) is None
