"""Whole runs on a GPU, called in this process: every space and stage, what resumes them, and the
commands that use what they leave.
"""

from __future__ import annotations

import json

import pytest
import torch
from made_cell_tables import write_csv
from small_pictures import write_classes
from tiny_runs import called, settings

from lfmcw_app.commands.predict import predict
from lfmcw_app.commands.run import run
from lfmcw_app.commands.sample import sample
from lfmcw_app.run_folder import RunFolder

FEW = {"search.steps": 2, "evaluation.epochs": 1, "checkpoint_every": 1}


def start(device, folder, *given, dataset="digits", **changes):
    """A tiny run on the device; its result."""
    options = ["--threads=1", f"--device={device.type}", "--out", folder, *given]
    done = called(run, dataset, *options, *settings(**{**FEW, **changes}))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


def rounds_of(folder):
    """Phase → the numbers of its rounds in metrics.jsonl."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["phase"], []).append(entry["round"])
    return found


@pytest.fixture(scope="module")
def warmed(tmp_path_factory, request):
    """A run with a warm-up of its generator, whose quality is measured in each snapshot."""
    if not torch.cuda.is_available():
        pytest.skip("NO GPU: runs not verified on hardware")
    folder = tmp_path_factory.mktemp("runs") / "warmed"
    changes = {"search.generator.warmup_rounds": 2, "search.generator.quality": "snapshots"}
    return folder, start(torch.device("cuda"), folder, **changes)


def test_a_run_warms_up_searches_trains_and_is_tested(device, warmed):
    folder, result = warmed
    assert result["test_images"] == 50
    assert set(rounds_of(folder)) == {"generator", "search", "training"}
    gpu = json.loads((folder / "environment.json").read_text())["gpu"]
    assert gpu == torch.cuda.get_device_name()
    measured = json.loads((folder / "search.json").read_text())["generator"]
    assert {"gan_test", "gan_train", "variety"} <= set(measured)


def test_a_finished_network_predicts(device, warmed, tmp_path):
    write_classes(tmp_path / "pictures", {"a": 3}, size=(9, 8))
    found = []
    for where in ("cpu", device.type):
        done = called(
            predict, warmed[0], tmp_path / "pictures", "--json", f"--device={where}", "--top=10"
        )
        assert done.returncode == 0, done.stderr
        images = json.loads(done.stdout)["images"]
        found.append(
            [{entry["class"]: entry["probability"] for entry in image["top"]} for image in images]
        )
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_finished_generator_draws(device, warmed, tmp_path):
    sheet = tmp_path / "sheet.png"
    done = called(sample, warmed[0], "--out", sheet, "--count=2", f"--device={device.type}")
    assert done.returncode == 0, done.stderr
    assert sheet.stat().st_size > 0


def test_a_run_that_died_resumes_where_it_was(device, tmp_path, monkeypatch):
    """The rounds that were done stay, and the others follow."""

    class Died(BaseException):
        pass

    log, logged = RunFolder.log, []

    def dying(self, entry):
        log(self, entry)
        logged.append(entry)
        if len(logged) == 3:
            raise Died

    folder, changes = tmp_path / "run", {"search.steps": 4, "checkpoint_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", dying)
        with pytest.raises(Died):
            start(device, folder, **changes)
    begun = (folder / "metrics.jsonl").read_text().splitlines()[:2]
    done = called(run, "--threads=1", "--resume", folder, f"--device={device.type}")
    assert done.returncode == 0, done.stderr
    assert (folder / "metrics.jsonl").read_text().splitlines()[:2] == begun
    assert rounds_of(folder)["search"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("space", "changes"),
    [
        ("pdarts", {"search.steps": 1, "search.primitives": None}),
        ("pcdarts", {"search.architecture.warmup_epochs": 0}),
    ],
)
def test_the_other_spaces_run(device, space, changes, tmp_path):
    found = start(
        device, tmp_path / "run", f"--space={space}", "--preset=smoke", "--method=darts", **changes
    )
    assert found["test_images"] == 50


def test_a_search_is_looked_up(device, tmp_path):
    table = write_csv(tmp_path / "cells.csv")
    options = ("--preset=smoke", "--space=nasbench201", f"--lookup={table}", "--method=darts")
    changes = {"search.nodes": 3, "search.layers": 3, "search.primitives": None}
    found = start(device, tmp_path / "run", *options, **changes)
    assert found["lookup"]["cells"] == 125


def test_images_in_files_run_with_the_changes_of_imagenet(device, tmp_path):
    """Windows, colours and mirroring, without padding."""
    pictures = tmp_path / "pictures"
    for part, count in (("train", 20), ("test", 4)):
        write_classes(pictures / part, {"cat": count, "dog": count}, size=(20, 16))
    changed = (
        "{crop_padding: 0, flip: true, resized_crop: true, color_jitter: [0.4, 0.4, 0.4, 0.2]}"
    )
    changes = {
        "data.image_size": 8,
        "data.search_images": None,
        "data.train_images": None,
        "data.test_images": None,
        "search.augmentation": changed,
        "evaluation.augmentation": changed,
        "evaluation.label_smoothing": 0.1,
    }
    found = start(
        device, tmp_path / "run", "--method=darts", dataset=f"folder:{pictures}", **changes
    )
    assert found["test_images"] == 8
