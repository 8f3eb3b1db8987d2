"""The files of a run folder, by name.

config.yaml        the resolved recipe, as it is now
environment.json   versions and hardware, how numbers are computed (numerics.py), and the recipe
                   that the run began with; of a complete run what completed it
changes.jsonl      settings that were changed on --resume, where there are any (resuming.py)
metrics.jsonl      one line per round of search and training, a function of recipe and seed alone
search.pt          last checkpoint of the search; training.pt: of the derived network's training.
                   Of both also .previous.pt (the one before), .best.pt and, if the recipe says so,
                   .round-N.pt (docs/checkpoints.md)
search.json        what the generator and W1 are worth at the end of the search (search_end.py)
genotype.json      the derived cells; genotype.txt: in DARTS's notation
cells.png          their picture, or that of the given cells; also cells.svg
nonfinite-*.pt     what is known of a loss or gradient that was not finite, for the first few
evaluated.json     in a folder of lfmcw_app.evaluate, the genotype that was given
samples.png        generated images, one row per class; samples/: smaller ones of the rounds in
                   between, and real ones
dataset.json       class names and sizes
tensorboard/       event files, with --tensorboard
timings.jsonl      time and memory of each problem's updates
report.html        all of it as one page (lfmcw_app.report); resuming a complete run makes it
log.txt            of a table's run: what it printed
.lock              held by the process that runs here
network.pt         the trained network, as it was tested (network_file.py)
result.json        the test error; written when all of the above but the report is there, so its
                   presence means that the run is complete. What need not be kept is removed after
                   it, by whoever comes next if the run is stopped before
"""

from __future__ import annotations

__all__ = [
    "CELLS",
    "CHANGES",
    "CONFIG",
    "DATASET",
    "ENVIRONMENT",
    "EVALUATED",
    "GENOTYPE",
    "KEEP",
    "LOCK",
    "LOG",
    "METRICS",
    "NETWORK",
    "NOTATION",
    "REAL_IMAGES",
    "REPORT",
    "RESULT",
    "SAMPLES",
    "SAMPLES_FOLDER",
    "SEARCH_END",
    "TENSORBOARD",
    "TIMINGS",
]  # fmt: skip

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
CHANGES = "changes.jsonl"
METRICS = "metrics.jsonl"
SEARCH_END = "search.json"
GENOTYPE, NOTATION = "genotype.json", "genotype.txt"
CELLS = ("cells.png", "cells.svg")
EVALUATED = "evaluated.json"
SAMPLES, SAMPLES_FOLDER = "samples.png", "samples"
REAL_IMAGES = f"{SAMPLES_FOLDER}/real.png"
DATASET = "dataset.json"
TENSORBOARD = "tensorboard"
TIMINGS = "timings.jsonl"
REPORT = "report.html"
LOG = "log.txt"
LOCK = ".lock"
NETWORK = "network.pt"
RESULT = "result.json"

_PICTURES = (f"{SAMPLES_FOLDER}/*.png", SAMPLES, *CELLS, REPORT)

KEEP = {
    "all": (),
    "metrics": ("*.pt", *_PICTURES),
    "results": ("*.pt", *_PICTURES, METRICS),
}
"""What is kept of a complete run → what is removed, or not made in the first place."""
