"""The command that exports a network. Formats are tried in test_exporting.py."""

from __future__ import annotations

import sys

import pytest
import torch
import typer
from trained_runs import copied
from typer.testing import CliRunner

from lfmcw_app.classifier import load_network
from lfmcw_app.commands.export import export


def invoke(*arguments):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(export)
    return CliRunner().invoke(app, list(map(str, arguments)))


def words(text):
    return " ".join(text.split())


def test_a_network_is_exported_beside_its_file(trained, tmp_path):
    """Compared on random images, and on the real ones that the run keeps."""
    run = copied(trained, tmp_path)
    result = invoke(run, "--to", "torch")
    assert result.exit_code == 0, result.stderr
    assert "On 14 images, 6 of them real" in words(result.stdout)
    assert "0.0e+00" not in result.stdout
    program = torch.export.load(run / "network.pt2").module()
    network, preprocess, _ = load_network(run)
    pixels = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    assert torch.allclose(program(pixels), network(preprocess.normalised(pixels)), atol=1e-6)
    again = invoke(run, "--to", "torch")
    assert again.exit_code == 2
    assert "nothing is overwritten" in words(again.stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "onxx"], "Did you mean 'onnx'"),
        (["--to", "torch", "--input", "pixel"], "Did you mean 'pixels'"),
        (["--to", "torch", "--out", "nowhere/a.pt2"], "there is no folder nowhere"),
        (["--to", "torch", "--out", f"{'a' * 250}.pt2"], "(File name too long)"),
        (["--to", "onnx", "--out", "a.onnx"], "pip install 'torch-mlo[export]'"),
    ],
)
def test_what_cannot_be_done_is_one_paragraph(arguments, said, trained, monkeypatch):
    """Before anything is exported, which takes long."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(torch.export, "export", None)
    result = invoke(trained.path, *arguments)
    assert result.exit_code == 2
    assert said in words(result.stderr)
    assert result.stdout == ""
