"""Makes the pictures of docs/examples.md and of the site's first page, in docs/gallery.

    make gallery                                  # all of them, about two minutes
    python benchmarks/gallery.py gan_game         # one example's

An example's picture is what the example itself draws, with its default settings. The first page's
shows its program beside every fixed weight decay.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "docs" / "gallery"
FIRST = "first_problem"
OPTIONS = {"data_reweighting": ["--dataset", "digits"]}
"""Example → options: the data set that it reads by default is not on every machine."""


def examples() -> list[str]:
    """The names of the examples, in alphabetical order."""
    return sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def draw_example(name: str, picture: Path) -> None:
    """Runs an example, which draws its picture.

    Raises:
        subprocess.CalledProcessError: if the example fails.
    """
    options = [*OPTIONS.get(name, []), "--picture", str(picture)]
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options]
    with TemporaryDirectory() as settings:
        # Equal figures make equal files: names within come from this salt, and no date is told.
        Path(settings, "matplotlibrc").write_text("svg.hashsalt: mlo\n", "utf-8")
        added = {"MATPLOTLIBRC": settings, "MPLBACKEND": "agg", "SOURCE_DATE_EPOCH": "0"}
        subprocess.run(command, env=os.environ | added, check=True)


def first_program() -> dict[str, Any]:
    """Runs the program of the first page, and returns its names."""
    page = (ROOT / "docs" / "index.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/index.md", "exec"), names)
    return names


def ridge_loss(x: Tensor, y: Tensor, decay: float) -> float:
    """The validation loss of the first page's program for a fixed decay, by a dense solve.

    Args:
        x: [64, features]; the first 32 rows are for training, the others for validation.
        y: [64, 1].
        decay: weight of the squared norm of the coefficients. The intercept has none.
    """
    train, valid = x[:32] - x[:32].mean(0), x[32:] - x[:32].mean(0)
    mean = y[:32].mean(0)
    gram = train.T @ train / 32 + decay * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, train.T @ (y[:32] - mean) / 32)
    return float((valid @ weights + mean - y[32:]).square().mean())


def draw_first(picture: Path) -> None:
    """Draws the validation loss over fixed decays, and where the first page's program ends."""
    names = first_program()
    x, y, learned = names["x"], names["y"], float(names["decay"]["log"].detach().exp())
    fixed = torch.logspace(-2.2, 0.3, 80).tolist()
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.semilogx(fixed, [ridge_loss(x, y, decay) for decay in fixed], label="a fixed decay")
    start = float(torch.tensor(-4.0).exp())
    axes.plot(start, ridge_loss(x, y, start), "o", color="grey", label="where it begins")
    axes.plot(learned, ridge_loss(x, y, learned), "o", color="tab:orange", label="what is learned")
    axes.set(xlabel="weight decay", ylabel="validation loss")
    axes.legend()
    plt.rcParams["svg.hashsalt"] = "mlo"
    figure.savefig(picture, metadata={"Date": None})


def main(names: list[str]) -> None:
    """Draws these pictures; without names, all."""
    GALLERY.mkdir(exist_ok=True)
    drawings: dict[str, Callable[[Path], None]] = {FIRST: draw_first}
    for name in examples():
        drawings[name] = lambda picture, name=name: draw_example(name, picture)
    for name in names or list(drawings):
        if name not in drawings:
            raise SystemExit(f"There is no example {name!r}. Choose from: {', '.join(drawings)}")
        drawings[name](GALLERY / f"{name}.svg")
        print(f"docs/gallery/{name}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
