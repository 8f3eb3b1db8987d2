"""The command that draws more samples. Generators are tried in test_sampling.py."""

from __future__ import annotations

import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from lfmcw_app import sampling
from lfmcw_app.commands.sample import sample
from lfmcw_app.sampling import TrainedGenerator


class Noise(torch.nn.Module):
    """Grey images, brighter for later classes."""

    mean, std = torch.tensor(0.0), torch.tensor(1.0)

    def show(self, labels):
        return (labels.view(-1, 1, 1, 1) + torch.rand(len(labels), 1, 4, 4)) / 4


def invoke(monkeypatch, *arguments, measured=None):
    made = TrainedGenerator(
        generator=Noise(), class_names=("cat", "dog", "cow"), stage="search", rounds=5
    )
    monkeypatch.setattr(sampling, "load_generator", lambda run, device: made)
    monkeypatch.setattr(sampling, "measured_quality", lambda run, trained: measured)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(sample)
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def words(text):
    return " ".join(text.split())


def test_the_ending_decides_between_a_sheet_and_files(monkeypatch, tmp_path):
    sheet, folder = tmp_path / "sheet.PNG", tmp_path / "made"
    result = invoke(monkeypatch, "--out", sheet)
    assert result.exit_code == 0, result.stderr
    assert "48 images of cat, dog, cow, from the generator after round 5" in words(result.stdout)
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    options = ["--class", "cow", "--class", "cat", "--class", "cow", "--count", 3]
    assert invoke(monkeypatch, "--out", folder, *options).exit_code == 0
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert files == [f"{name}/000{number}.png" for name in ("cat", "cow") for number in range(3)]
    with Image.open(folder / "cow" / "0000.png") as image:
        assert image.getextrema()[0] >= 127


def test_seeds_decide_and_can_be_repeated(monkeypatch, tmp_path):
    content = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        invoke(monkeypatch, "--out", tmp_path / name, "--count", 1, "--seed", seed)
        content.append((tmp_path / name / "dog" / "0000.png").read_bytes())
    assert content[0] == content[1] != content[2]


def test_what_cannot_be_done_is_one_paragraph(monkeypatch, tmp_path):
    cases = {
        ("--class", "dgo"): "Did you mean 'dog'",
        ("--count", 2000): "6,000 images are too many for one sheet",
        ("--device", "tpu"): "--device must be cpu, cuda or auto",
    }
    for arguments, said in cases.items():
        result = invoke(monkeypatch, "--out", tmp_path / "a.png", *arguments)
        assert result.exit_code == 2
        assert said in words(result.stderr)
    result = invoke(monkeypatch, "--out", tmp_path / "a.jpg")
    assert result.exit_code == 2
    assert "a sheet of images is a PNG file, named FILE.png" in words(result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_what_the_images_are_worth_is_told(monkeypatch, tmp_path):
    """As the run measured it, with what is doubtful."""
    result = invoke(monkeypatch, "--out", tmp_path / "a.png", measured=(4, "GAN-test 30%", []))
    assert "Measured after round 4: GAN-test 30%" in words(result.stdout)
    assert "Doubtful" not in result.stdout
    measured = (4, "GAN-test 30%", ["They are alike."])
    result = invoke(monkeypatch, "--out", tmp_path / "b.png", measured=measured)
    assert "Doubtful: They are alike." in words(result.stdout)
    unmeasured = invoke(monkeypatch, "--out", tmp_path / "c.png")
    assert "Measured" not in unmeasured.stdout
