"""What the networks of a search are worth at its end: search.json.

Of the generator its quality (generator_quality.py). Of W1, whose mistakes on D_val are the class
weights, the confusion matrix on D_val, by the labels that D_val has in the search.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lfmcw_app.assessment import MOST_CLASSES
from lfmcw_app.batchnorm import give_statistics, recompute_statistics
from lfmcw_app.build_modules import SearchModules
from lfmcw_app.data import Dataset, Images, in_order, subset
from lfmcw_app.errors import InputError
from lfmcw_app.generator_quality import Judge, Quality
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.parts import SearchParts
from lfmcw_app.pictures import snapshot_rounds
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_folder import RunFolder
from mlo.randomness import preserved

__all__ = [
    "SEARCH_END", "confusion_of_w1", "generator_result", "measure_end", "quality_rounds",
    "read_search_end",
]  # fmt: skip

SEARCH_END = "search.json"

MOST_IMAGES = 5000
"""Pictures of D_val, and of D_tr for the statistics, at most."""

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
    """Measures what is not in search.json yet, and writes it there.

    Args:
        folder: of the run.
        modules: as they are at the end of the search.
        parts: the images of the search.
        source: what images are drawn from.
        dataset: gives normalisation and classes.
        judge: of the source.
        at: the stage and the round where the search ended; what is recorded for others is replaced.
        measured: the generator's quality, where it was measured after this round.

    Returns:
        The source's quality; None where there is none, where it is not to be measured, or where
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
    """What `measure_end` wrote; None where there is nothing.

    Raises:
        InputError: if the file is damaged.
    """
    path = folder.path / SEARCH_END
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}). Delete it and resume: it is measured again."
        ) from None
    return found


def generator_result(folder: RunFolder) -> dict[str, Any]:
    """The entry `generator` of a run's result; empty where no generator was measured."""
    generator = (read_search_end(folder) or {}).get("generator")
    return {} if generator is None else {"generator": generator}


def confusion_of_w1(
    modules: SearchModules, train: Images, validation: Images, dataset: Dataset
) -> list[list[int]]:
    """What W1 takes the images of D_val for; columns: the class that it names.

    The rows are the labels that D_val has in the search, by which W1's mistakes weigh the classes:
    the right ones, unless `data.wrong_labels` makes some wrong in D_val too (in: both).

    A copy of it has running statistics, computed on images of D_tr: an answer does not depend on
    the images beside it. Modules and random state are left as they are.

    Returns:
        Counts, [classes][classes]. Answers that are no numbers are in none.
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
