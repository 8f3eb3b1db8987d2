"""How the pages of results are written: tables, and figures that say what they show."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from lfmcw_app.drawing import drawing

NOT_RUN = "not run here"
NOTHING = f"*{NOT_RUN.capitalize()}.*"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; what stands for nothing where it has no rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if not lines:
        return NOTHING
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])


def folded(summary: str, text: str) -> str:
    """A block that opens at a click; text that stands for nothing stays as it is."""
    if text == NOTHING:
        return text
    opening = '<details markdown="1">'
    return f"{opening}\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def digest(parts: Iterable[object]) -> str:
    """Names what a figure shows."""
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:16]


def save_figure(figure: Figure, path: Path, shown: str) -> None:
    """Writes an SVG that names a digest of what it shows; the same bytes each time."""
    # Text stays text: small, and found by a search in the page.
    with drawing(), rc_context({"svg.hashsalt": "results", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": shown})
    text = path.read_text("utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", "utf-8")
