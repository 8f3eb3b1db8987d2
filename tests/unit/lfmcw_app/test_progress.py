"""What a person sees while a run lasts."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lfmcw_app import progress as module
from lfmcw_app.progress import PhaseProgress
from lfmcw_app.search_space.genotype import random_genotype

LOSSES = {"w1": 1.25, "gan": {"generator": 0.5, "discriminator": 1.5}, "w2": 2.0, "arch": 3.0}


def show(
    *, terminal=False, quiet=False, rounds=(1, 2), interval=0.0, monkeypatch=None, derived=None
):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=110, quiet=quiet)
    monkeypatch.setattr(module, "PLAIN_INTERVAL", interval)
    monkeypatch.setattr(module, "LIVE_INTERVAL", interval)

    def cells():
        if derived is not None:
            derived.append(1)
        return random_genotype(2, 0)

    with PhaseProgress(console, "search", 4) as progress:
        for number in rounds:
            progress.update(number, LOSSES, {"error on the validation batch %": 40.0}, cells=cells)
    return output.getvalue()


def test_plain_lines_tell_losses_and_the_time_left(monkeypatch):
    """Plain lines tell losses, the time left, and the cell when it changes."""
    begins, *told, first, normal, reduction, second = show(monkeypatch=monkeypatch).splitlines()
    cells = [normal, reduction]
    assert begins == "search: 4 rounds to come"  # the first may take long
    assert first.startswith(
        "search 1/4 rounds;  losses w1 1.250  gan generator 0.500, discriminator 1.500  w2 2.000  "
        "arch 3.000;  error on the validation batch 40.0%;  "
    )
    assert [line.split(":")[0] for line in told] == ["  w1", "  gan", "  w2", "  arch"]
    assert first.endswith("s left")
    assert [line.split(":")[0].strip() for line in cells] == [
        "normal cell now",
        "reduction cell now",
    ]
    edge = random_genotype(2, 0).normal[0]
    assert edge.primitive in cells[0]
    assert second.startswith("search 2/4")


def test_a_terminal_shows_a_bar_the_losses_and_both_cells(monkeypatch):
    shown = show(terminal=True, monkeypatch=monkeypatch)
    for words in (
        "search",
        "2/4",
        "left",
        "discriminator 1.500",
        "arch 3.000",
        "normal cell now",
        "reduction cell now",
    ):
        assert words in shown
    assert "\x1b[" in shown


def test_lines_in_between_are_left_out_but_never_the_last(monkeypatch):
    derived = []
    shown = show(rounds=(1, 2, 3, 4), interval=1000.0, monkeypatch=monkeypatch, derived=derived)
    assert [line.split()[1] for line in shown.splitlines() if "/4" in line] == [
        "1/4",
        "4/4",
    ]
    assert len(derived) == 2  # the cell of a round that is not shown is not derived


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_quiet(terminal, monkeypatch):
    assert show(terminal=terminal, quiet=True, monkeypatch=monkeypatch) == ""


@pytest.mark.parametrize("generates", [True, False])
def test_generated_images_are_named_where_there_are_some(monkeypatch, generates):
    output = io.StringIO()
    losses = {"gan": {"generator": 1.0}, "w2": 1.0} if generates else {"w2": 1.0, "arch": 1.0}
    with PhaseProgress(Console(file=output, width=80), "search", 1) as progress:
        progress.update(1, losses, {})
    assert ("plus its loss on generated ones" in output.getvalue()) == generates


def test_every_loss_of_a_run_is_explained_once(monkeypatch):
    """When it first occurs: the architecture may rest in the first epochs."""
    monkeypatch.setattr(module, "PLAIN_INTERVAL", 0.0)
    output = io.StringIO()
    with PhaseProgress(Console(file=output, width=80), "search", 4) as progress:
        for number, losses in enumerate([{"w1": 1.0}, {"w1": 1.0, "arch": 2.0}, {"arch": 2.0}], 1):
            progress.update(number, losses, {})
    lines = output.getvalue().splitlines()
    told = [line.split(":")[0].strip() for line in lines if "the loss of" in line]
    assert told == ["w1", "arch"]
    assert [line.split(";")[1].strip() for line in lines if "/4" in line] == [
        "loss w1 1.000",
        "losses w1 1.000  arch 2.000",
        "loss arch 2.000",
    ]
