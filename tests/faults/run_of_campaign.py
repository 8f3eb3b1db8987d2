"""Resumes a run of the campaign in a process of its own: `python run_of_campaign.py FOLDER`.

Options of the command line follow. What the campaign leaves out of its runs is left out here.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

from lfmcw_app import generator_quality, processes  # noqa: E402 - after the path
from lfmcw_app.commands.run import main  # noqa: E402
from lfmcw_app.search_space import draw  # noqa: E402

JUDGE_STEPS = 10
"""Of the training of a judge of pictures, which takes 300 and most of the time."""


def be_quick() -> None:
    """Leaves out what takes longer than all else, and decides nothing."""
    draw.draw_genotype = lambda *arguments: None
    generator_quality.STEPS = JUDGE_STEPS


if __name__ == "__main__":
    be_quick()
    _, folder, *options = sys.argv
    if options[:1] == ["--patience"]:
        processes.PATIENCE = timedelta(seconds=float(options[1]))
        options = options[2:]
    sys.argv = [sys.argv[0], *([] if options else ["--resume", folder]), *options]
    sys.argv += ["--threads=1"]
    main()
