"""The search on a GPU: supernets and steps equal to those of a CPU in float64, steps that do not
wait for the device, and the command line.
"""

from __future__ import annotations

import json
import signal
import sys

import pytest
import torch
from gpu_cases import search
from interrupted_command import command as interrupted
from started_processes import finished
from torch.nn import functional as F

from lfmcw_app.data import Batches, load_dataset, resident
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.recipe import Augmentation
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import Architecture, Supernet
from mlo.testing import relative_error

CPU = torch.device("cpu")


@pytest.fixture
def fixed_noise(monkeypatch):
    """Generators that draw the same noise on every device, whose random streams differ."""

    def noise(generator, labels):
        entries = torch.arange(len(labels) * generator.noise_dim, dtype=torch.float64).sin()
        return entries.view(len(labels), -1).to(labels.device, generator.mean.dtype)

    monkeypatch.setattr(ImageGenerator, "noise", noise)


def on_cpu(tensors):
    """The tensors of a mapping, detached and on the CPU."""
    return {key: tensor.detach().cpu() for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"order": "first"},
        {"order": "second"},
        {"order": "second", "hypergradient": "cg", "method": "darts"},
        {"order": "first", "space": "pcdarts"},
    ],
    ids=lambda options: ", ".join(options.values()),
)
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_rounds_of_a_search_equal_those_on_the_cpu(device, fixed_noise, options):
    searches = [search(where, **options) for where in (CPU, device)]
    for _ in range(2):
        losses = [optimizer.step().losses for optimizer in searches]
        assert set(losses[0]) == set(losses[1])
        gradients = [on_cpu(optimizer.gradient("arch")) for optimizer in searches]
        assert relative_error(gradients[1], gradients[0]) < 1e-8
    for name, problem in searches[1].problems.items():
        assert problem.device.type == device.type
        moved = on_cpu(problem.parameters)
        expected = on_cpu(searches[0].problems[name].parameters)
        assert relative_error(moved, expected) < 1e-8


@pytest.mark.parametrize("partial_channels", [1, 4], ids=["darts", "pcdarts"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_supernet_and_its_derivatives_equal_those_on_the_cpu(
    device, partial_channels, checkpointing
):
    torch.manual_seed(0)
    options = {
        "partial_channels": partial_channels,
        "checkpointing": checkpointing,
        "primitives": DARTS_PRIMITIVES,
    }
    network = Supernet(
        in_channels=3, num_classes=10, channels=8, layers=3, nodes=3, **options
    ).double()
    arch = Architecture(3, DARTS_PRIMITIVES, edge_weights=partial_channels > 1, scale=0.5).double()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.arange(6)
    found = []
    for where in (CPU, device):
        network.to(where)
        arch.to(where)
        variables = [*network.parameters(), *arch.parameters()]
        logits = network(images.to(where), arch())
        gradient = torch.autograd.grad(
            F.cross_entropy(logits, labels.to(where)), variables, create_graph=True
        )
        product = sum((g * g.detach().sin()).sum() for g in gradient)
        second = torch.autograd.grad(product, variables, allow_unused=True)
        found.append([t.detach().cpu() for t in (logits, *gradient, *second) if t is not None])
    assert len(found[0]) == len(found[1]) > 2 * len(list(arch.parameters()))
    assert relative_error(dict(enumerate(found[1])), dict(enumerate(found[0]))) < 1e-10


def test_a_first_order_round_does_not_wait_for_the_device(device):
    """But for the check for numbers that are lost, which is off."""
    optimizer = search(device, torch.float32, order="first")
    optimizer.on_nonfinite = None
    for _ in range(2):
        optimizer.step()  # compiles kernels, and makes the optimizers' states
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        record = optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(
        parameter.isfinite().all()
        for p in optimizer.problems.values()
        for parameter in p.parameters.values()
    )
    assert set(record.losses) == {"w1", "gan", "w2", "arch"}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"crop_padding": 2, "flip": True, "cutout": 4},
        {"flip": True, "color_jitter": (0.4, 0.4, 0.4, 0.1)},
        {"resized_crop": True},
    ],
    ids=lambda how: ", ".join(how) or "plain",
)
def test_batches_equal_those_on_the_cpu(device, how):
    dataset, augmentation = load_dataset("digits"), Augmentation(**how)
    images = resident(dataset.train, augmentation, device)
    assert images.pixels.device.type == ("cpu" if how.get("resized_crop") else device.type)
    streams = [
        Batches(pixels, dataset, batch_size=16, seed=3, augmentation=augmentation, device=where)
        for pixels, where in ((dataset.train, CPU), (images, device))
    ]
    for _, (expected, labels), (found, found_labels) in zip(range(3), *streams, strict=False):
        assert found.device.type == found_labels.device.type == device.type
        assert torch.equal(found_labels.cpu(), labels)
        assert torch.allclose(found.cpu(), expected, atol=1e-5)


def command(*arguments):
    return [sys.executable, "-m", "lfmcw_app.run", "--threads=1", *map(str, arguments)]


def test_a_killed_run_resumes_where_it_was(device, tmp_path):
    settings = {
        "search.channels": 4, "search.nodes": 1, "search.steps": 12, "search.batch_size": 8,
        "search.generator.channels": 2, "search.generator.noise_dim": 4, "checkpoint_every": 2,
        "data.search_images": 80, "data.train_images": 60, "data.test_images": 50,
        "evaluation.channels": 4, "evaluation.epochs": 2, "evaluation.batch_size": 16,
    }  # fmt: skip
    where = f"--device={device.type}"
    folder, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    options = [f"--set={key}={value}" for key, value in settings.items()]
    given = ("--threads=1", "digits", where, "--out", folder, *options)
    killed = finished(interrupted(signal.SIGKILL, 4, *given))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = log.read_text().splitlines()[:2]
    assert not (folder / "result.json").exists()
    resumed = finished(command("--resume", folder, where))
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads((folder / "result.json").read_text())
    assert result["test_images"] == 50
    lines = log.read_text().splitlines()
    assert lines[:2] == before
    rounds = [entry["round"] for entry in map(json.loads, lines) if entry["phase"] == "search"]
    assert rounds == list(range(1, settings["search.steps"] + 1))
    gpu = json.loads((folder / "environment.json").read_text())["gpu"]
    assert gpu == (torch.cuda.get_device_name() if device.type == "cuda" else None)
