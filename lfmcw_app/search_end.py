"""Measures the networks of a search at its end, for search.json.

For the generator it is the quality (generator_quality.py). For W1, whose mistakes on D_val are the
class weights, it is the confusion matrix on D_val, with the labels that D_val has in the search.
"""

from __future__ import annotations

import copy
import json
import math
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lfmcw_app.assessment import MOST_CLASSES
from lfmcw_app.batchnorm import give_statistics, recompute_statistics
from lfmcw_app.bounded_files import lines_of, parse_object, read_object
from lfmcw_app.build_modules import SearchModules
from lfmcw_app.collapse import WINDOW, advised, doubts_about_pictures, last_quality
from lfmcw_app.data import Dataset, Images, in_order, subset
from lfmcw_app.errors import InputError
from lfmcw_app.generator_quality import Judge, Quality
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.parts import SearchParts
from lfmcw_app.pictures import snapshot_rounds
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_files import METRICS, SEARCH_END
from lfmcw_app.run_folder import RunFolder
from mlo.randomness import preserved

__all__ = [
    "confusion_of_w1", "generator_result", "measure_end", "quality_rounds",
    "read_search_end",
]  # fmt: skip

MOST_IMAGES = 5000
"""Largest number of pictures of D_val, and of D_tr for the statistics."""

BATCH = 256


def quality_rounds(recipe: Recipe, rounds: int, *, ends_search: bool) -> frozenset[int]:
    """The rounds of a phase after which the generator's quality is measured.

    Args:
        recipe: of the run.
        rounds: of the phase.
        ends_search: whether it is the last phase before the training.
    """
    when = recipe.search.generator.quality
    if recipe.search.method != "lfmcw" or when == "never":
        return frozenset()
    if when == "snapshots":
        return snapshot_rounds(rounds)
    return frozenset({rounds}) if ends_search else frozenset()


def measure_end(
    folder: RunFolder,
    modules: SearchModules,
    parts: SearchParts,
    source: ImageGenerator | Images | None,
    dataset: Dataset,
    judge: Judge,
    *,
    at: Mapping[str, Any],
    measured: Quality | None,
) -> Quality | None:
    """Measures what search.json does not have yet, and writes it there.

    Args:
        folder: of the run.
        modules: as they are at the end of the search.
        parts: the images of the search.
        source: the source of images.
        dataset: gives normalisation and classes.
        judge: of the source.
        at: the stage and round where the search ended; entries recorded for others are replaced.
        measured: the generator's quality, if it was measured after this round.

    Returns:
        The source's quality; None if there is no source, if it is not to be measured, or if
        measuring failed, of which there was a warning.

    Raises:
        InputError: if the file cannot be written.
    """
    if modules.w1 is None or source is None:
        return None
    found = None
    with folder.attempting(SEARCH_END):
        known = read_search_end(folder) or {}
        if any(known.get(key) != value for key, value in at.items()):
            known = {}
        quality = measured
        if quality is None and known.get("generator") is not None:
            quality = Quality.from_data(known["generator"])
        if quality is None and folder.recipe.search.generator.quality != "never":
            quality = judge.measure(source)
        confusion = known.get("w1_confusion")
        if confusion is None and dataset.num_classes <= MOST_CLASSES:
            confusion = confusion_of_w1(modules, parts.train, parts.validation, dataset)
        found = {
            **at,
            "generator": None if quality is None else quality.to_data(),
            "w1_confusion": confusion,
        }
    if found is None:
        return None
    # The result is made from it, so that a full disk stops the run: it is measured on resume.
    folder.write(SEARCH_END, json.dumps(found) + "\n")
    return quality


def read_search_end(folder: RunFolder) -> dict[str, Any] | None:
    """What `measure_end` wrote; None if it wrote nothing.

    Raises:
        InputError: if the file is damaged.
    """
    path = folder.path / SEARCH_END
    try:
        found = read_object(path)
        if found.get("generator") is not None:
            Quality.from_data(found["generator"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}). Delete it and resume. It is then measured again."
        ) from None
    return found


def generator_result(folder: RunFolder) -> dict[str, Any]:
    """The entry `generator` of a run's result: the measures, and the doubts about its pictures.

    Empty if no generator was measured.
    """
    end = read_search_end(folder) or {}
    if end.get("generator") is None:
        return {}
    measured = Quality.from_data(end["generator"]).to_data()
    doubts = advised(_doubts(folder, end), folder.recipe)
    return {"generator": {**measured, "doubts": doubts}}


def _doubts(folder: RunFolder, end: Mapping[str, Any]) -> list[str]:
    """What is wrong with the pictures that were measured at the end of the search.

    W2's part in them is that of its last rounds in metrics.jsonl. Without these, which no run
    needs, it is not known.
    """
    try:
        last = last_quality(_last_rounds(folder.path / METRICS, end["stage"]), end["round"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # edited, or not there
        last = None
    if last is not None and last[0] == end["round"]:
        return last[2]
    return list(doubts_about_pictures(Quality.from_data(end["generator"]), None).values())


def _last_rounds(path: Path, stage: str) -> list[dict[str, Any]]:
    """The lines of the last `WINDOW` rounds of a stage in metrics.jsonl.

    Raises:
        OSError: if it cannot be read.
        ValueError: if one of them is no JSON.
    """
    begin = f'{{"phase": {json.dumps(stage)}, '.encode()
    with path.open("rb") as file:
        kept = deque((line for line in lines_of(file) if line.startswith(begin)), maxlen=WINDOW)
    return [parse_object(line.decode("utf-8")) for line in kept]


def confusion_of_w1(
    modules: SearchModules, train: Images, validation: Images, dataset: Dataset
) -> list[list[int]]:
    """W1's confusion matrix on D_val; columns: the class that it answers.

    The rows are the labels of D_val in the search, on which the class weights are based: the
    correct ones, unless `data.wrong_labels` changes some in D_val too (in: both).

    A copy of W1 has running statistics, computed on images of D_tr, so an answer does not depend on
    the other images of its batch. Modules and random state do not change.

    Returns:
        Counts, [classes][classes]. Answers that are not numbers are left out.
    """
    assert modules.w1 is not None
    device = next(modules.w1.parameters()).device
    network = copy.deepcopy(modules.w1)
    give_statistics(network)
    with preserved(), torch.no_grad():
        mixing = modules.arch()
        some = subset(train, MOST_IMAGES, 0)
        size = math.ceil(len(some) / math.ceil(len(some) / BATCH))  # no small batch at the end
        batches = in_order(some, dataset, size, device)
        recompute_statistics(network, (partial(network, x, mixing) for x, _ in batches))
        network.eval()
        counts = torch.zeros(dataset.num_classes, dataset.num_classes, dtype=torch.int64)
        for images, labels in in_order(subset(validation, MOST_IMAGES, 0), dataset, BATCH, device):
            logits = network(images, mixing)
            given = ~logits.isnan().any(1)
            pairs = torch.stack([labels[given], logits[given].argmax(1)]).cpu()
            counts.index_put_(tuple(pairs), torch.ones(pairs.shape[1]).long(), accumulate=True)
    rows: list[list[int]] = counts.tolist()
    return rows
