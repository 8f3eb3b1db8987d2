"""The README's search in four commands, run as written, prints what the README says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from command_calls import call
from PIL import Image
from sklearn.datasets import load_digits

from lfmcw_app.commands.report import report
from lfmcw_app.commands.run import run

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
COMMANDS = {"lfmcw_app.run": run, "lfmcw_app.report": report}


def block_under(heading):
    section = README.split(f"\n## {heading}\n")[1]
    return re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()


def write_pictures(folder, per_class=12):
    """Digits as PNG, one folder per class."""
    digits = load_digits()
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for index in np.flatnonzero(digits.target == label)[:per_class]:
            image = (digits.images[index] * 15).astype(np.uint8)
            Image.fromarray(image).resize((16, 16)).save(folder / str(label) / f"{index}.png")


def without_numbers(text):
    return re.sub(r"\d[\d,.]*", "0", " ".join(text.split()))


@pytest.mark.slow
def test_the_search_in_four_commands_prints_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    lines = block_under("The search in four commands")
    commands, shown = lines[::2], lines[1::2]
    assert len(commands) == len(shown) == 4
    for command, line in zip(commands, shown, strict=True):
        _, _, module, *arguments = shlex.split(command, comments=True)
        done = call(COMMANDS[module], *arguments)
        assert done.returncode == 0, done.words
        assert without_numbers(line.removeprefix("#")) in without_numbers(done.stdout), command
