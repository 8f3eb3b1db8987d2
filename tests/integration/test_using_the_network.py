"""From a folder of pictures to numbers without this package: run, predict, export, sample."""

from __future__ import annotations

import json
import sys

import pytest
from small_pictures import write_classes
from started_processes import finished
from tiny_runs import TINY

PROGRAM = """
import json, sys, torch
extra = {"lfmcw.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
pixels = torch.load(sys.argv[2], weights_only=True)
probabilities = program(pixels).double().softmax(1).tolist()
assert "lfmcw_app" not in sys.modules
print(json.dumps([json.loads(extra["lfmcw.json"])["class_names"], probabilities]))
"""

PIXELS = """
import json, sys, torch, lfmcw_app
_, preprocess, _ = lfmcw_app.load_network(sys.argv[1])
paths = [entry["path"] for entry in json.load(open(sys.argv[2]))["images"]]
torch.save(torch.stack([preprocess.pixels(path) for path in paths]), sys.argv[3])
"""


def python(*arguments, cwd, env=None, rc=0):
    done = finished([sys.executable, *arguments], cwd=cwd, env=env)
    assert done.returncode == rc, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_a_folder_to_numbers_without_the_package(tmp_path):
    write_classes(tmp_path / "pictures", {"cat": 40, "dog": 40, "cost $": 40}, size=(14, 10))
    changes = {"data.image_size": 8, "data.search_images": 60, "data.train_images": None}
    settings = {**TINY, **changes, "data.test_images": None, "search.steps": 3}
    arguments = [
        f"--set={key}={'null' if value is None else value}" for key, value in settings.items()
    ]
    base = ["-m", "lfmcw_app.run", "folder:pictures", "--preset=smoke", "--out=run", "--quiet"]
    python(*base, *arguments, cwd=tmp_path)

    # What the command says is what the network says.
    found = python("-m", "lfmcw_app.predict", "run", "pictures", "--json", "--top=3", cwd=tmp_path)
    (tmp_path / "found.json").write_text(found)
    data = json.loads(found)
    assert data["error"]["images"] == len(data["images"]) == 120

    # Without this package: the same numbers.
    python("-m", "lfmcw_app.export", "run", "--to=torch", "--out=alone.pt2", cwd=tmp_path)
    python("-c", PIXELS, "run", "found.json", "pixels.pt", cwd=tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    text = python(
        "-c", PROGRAM, "../alone.pt2", "../pixels.pt", cwd=outside,
        env={"OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    class_names, probabilities = json.loads(text)
    assert class_names == data["class_names"] == ["cat", "cost $", "dog"]
    for image, row in zip(data["images"], probabilities, strict=True):
        expected = {entry["class"]: entry["probability"] for entry in image["top"]}
        assert dict(zip(class_names, row, strict=True)) == pytest.approx(expected, abs=1e-6)

    # The generator draws a folder of the same classes, which the network takes.
    python("-m", "lfmcw_app.sample", "run", "--out=made", "--count=4", cwd=tmp_path)
    drawn = json.loads(python("-m", "lfmcw_app.predict", "run", "made", "--json", cwd=tmp_path))
    assert drawn["error"]["images"] == 12
