"""Reads the argument GENOTYPE of a command: a name, random:N, a file, a run, or a text."""

from __future__ import annotations

from pathlib import Path

from lfmcw_app.errors import InputError, shown
from lfmcw_app.near_paths import near_paths
from lfmcw_app.search_space.darts_notation import is_notation
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.named import NAMED_GENOTYPES
from lfmcw_app.spaces import Settings, space_named
from mlo.errors import nearest

__all__ = ["GENOTYPE_HELP", "read_genotype"]

GENOTYPE_HELP = (
    f"A published genotype ({', '.join(NAMED_GENOTYPES)}), random:N, a file (JSON, or the space's "
    "notation), a run folder, or a text: Genotype(normal=[…], …), or |operation~0|+… of "
    "nasbench201."
)


def read_genotype(text: str, how: Settings) -> Cells:
    """Reads the argument.

    Args:
        text: what was given.
        how: the settings of the search: its space, whose cells files and texts hold, and what a
            random genotype is drawn from.

    Raises:
        InputError: if it is none of these; the message names the first thing that is wrong.
    """
    if text in NAMED_GENOTYPES:
        return NAMED_GENOTYPES[text]
    kind, colon, number = text.partition(":")
    if colon and kind == "random":
        return _random(number, how)
    cells = space_named(how.space).genotype
    if is_notation(text) or text.lstrip().startswith(("{", "|")):
        return cells.from_text(text)
    # A name that is neither a file nor published is probably mistyped.
    if Path(text).suffix or _exists(text):
        return cells.load(text)
    raise InputError(
        f"No file, run folder or published genotype is called {shown(text)}."
        f"{near_paths(Path(text))} {nearest(shown(text), NAMED_GENOTYPES)} A random one is "
        "random:N, with a number N."
    )


def _random(number: str, how: Settings) -> Cells:
    if not number.isascii() or not number.isdecimal() or len(number) > 19 or int(number) >= 2**62:
        raise InputError(
            "A random genotype is random:N with a whole number N below 2**62, got "
            f"{shown(f'random:{number}')}."
        )
    return space_named(how.space).random(how, int(number))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # longer than a file's name can be
        return False
