"""The two phases of a run: the search of a cell, and the training of the derived network from scratch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.data import Batches, Dataset, in_order, load_dataset, search_split, subset
from lfmcw_app.errors import InputError
from lfmcw_app.gradient_terms import gradient_terms
from lfmcw_app.modules import SearchModules, build_modules
from lfmcw_app.pictures import save_samples
from lfmcw_app.problems import build_search, cosine_schedule, search_rounds
from lfmcw_app.progress import PhaseProgress
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.draw import draw_genotype
from lfmcw_app.search_space.genotype import Genotype, derive_genotype
from lfmcw_app.search_space.network import DerivedNetwork
from mlo import MultilevelOptimizer, Problem, Record

__all__ = ["read_data", "run", "search", "train_derived"]


def read_data(recipe: Recipe, root: Path, *, searches: bool = True) -> Dataset:
    """Reads the data set of a recipe, at its image size.

    Args:
        recipe: the recipe.
        root: folder of data files.
        searches: whether a search is to run, not only the training of a derived network.

    Raises:
        InputError: if it cannot be read, or has fewer images than a batch of the recipe.
    """
    dataset = load_dataset(recipe.dataset, root, recipe.data.image_size)
    available = len(dataset.train)
    needs = (
        ("search.batch_size", recipe.search.batch_size, min(recipe.data.search_images or available, available) // 2),
        ("evaluation.batch_size", recipe.evaluation.batch_size, min(recipe.data.train_images or available, available)),
    )
    for key, batch, images in needs if searches else needs[1:]:
        if images < batch:
            raise InputError(
                f"{key} is {batch}, but the recipe leaves only {images} images of {dataset.name} to draw from. Lower "
                f"{key}, or raise data.search_images or data.train_images."
            )
    cutout = recipe.evaluation.augmentation.cutout
    if cutout >= dataset.image_size:
        raise InputError(
            f"evaluation.augmentation.cutout is {cutout}, which would erase images of {dataset.image_size} pixels. Lower it."
        )
    return dataset


def _check_finite(record: Record) -> None:
    """Stops a run whose numbers are lost, before they are logged or saved.

    Raises:
        InputError: naming the problem and the round.
    """
    losses = {f"{name}.{p}" if p else name: value for name, loss in record.losses.items() for p, value in (
        loss.items() if isinstance(loss, dict) else [("", loss)])}  # fmt: skip
    lost = [name for name, value in losses.items() if not math.isfinite(value)]
    lost += [f"gradient of {name}" for name, norm in record.gradient_norms.items() if not math.isfinite(norm)]
    if lost:
        raise InputError(
            f"Round {record.round}: {', '.join(lost)} is not finite, so the run is stopped; the last checkpoint is older. "
            "Lower a learning rate or λ, or clip gradients, and start again in a new folder."
        )


def run(folder: RunFolder, dataset: Dataset, console: Console, device: torch.device) -> dict[str, Any]:
    """Runs both phases, from where the folder's checkpoints stand, and returns the result."""
    if folder.result is not None:
        return folder.result
    genotype = search(folder, dataset, console, device)
    return train_derived(folder, genotype, dataset, console, device)


# ------------------------------------------------------------------ search


def search(folder: RunFolder, dataset: Dataset, console: Console, device: torch.device) -> Genotype:
    """Searches a cell; writes genotype.json, cells.png, cells.svg and, with a generator, samples.png."""
    recipe = folder.recipe
    torch.manual_seed(recipe.seed)
    modules = build_modules(recipe.search, dataset, device=device)
    train, validation = search_split(dataset, recipe.data.search_images, recipe.seed)
    optimizer = build_search(recipe, dataset, train, validation, modules, device=device)
    rounds = search_rounds(recipe.search, len(train))
    every = recipe.search.gradient_terms_every
    folder.restore("search", optimizer, is_latest=not folder.has_checkpoint("evaluation"))
    with PhaseProgress(console, "search", rounds, optimizer.round) as progress:
        while optimizer.round < rounds:
            record = optimizer.step()
            _check_finite(record)
            entry = _search_entry(record, modules, recipe.checkpoint_every)
            if every and record.round % every == 0:
                entry["gradient_terms"] = gradient_terms(optimizer)
            folder.log(entry)
            if record.round % recipe.checkpoint_every == 0 or record.round == rounds:
                folder.save("search", optimizer)
            if "arch" in record.losses:
                error = 100.0 * (1.0 - record.metrics["arch"]["accuracy"])
                progress.update(record.round, {"loss": record.losses["arch"], "validation error %": error})
            else:  # the architecture rests in the first epochs
                progress.update(record.round, {"training loss": record.losses["w2"]})
    genotype = derive_genotype(modules.arch(), modules.arch.primitives)
    folder.write("genotype.json", genotype.to_json())
    method = "LFM-CW" if recipe.search.method == "lfmcw" else "DARTS"
    title = f"{method} on {dataset.name}, {recipe.search.order} order"
    for name in ("cells.png", "cells.svg"):
        draw_genotype(genotype, folder.path / name, title)
    if modules.gan is not None:
        save_samples(modules.gan.generator, dataset, folder.path / "samples.png", device)
    return genotype


def _search_entry(record: Record, modules: SearchModules, alpha_every: int) -> dict[str, Any]:
    entry = {"phase": "search", **_entry(record)}
    if record.round % alpha_every == 0 or record.round == 1:
        entry["alpha"] = {kind: _rounded(weights) for kind, weights in modules.arch()._asdict().items()}
    return entry


def _entry(record: Record) -> dict[str, Any]:
    """A record as plain data; nothing in it depends on the clock, so equal runs have equal files."""
    return {
        "round": record.round,
        "losses": record.losses,
        "metrics": record.metrics,
        "gradient_norms": record.gradient_norms,
        "solves": {
            name: {"engine": report.engine, "iterations": report.iterations, "residual": report.residual}
            for name, report in sorted(record.solves.items())
        },
    }


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in values.detach().tolist()]


# ------------------------------------------------------------------ training of the derived network


def train_derived(
    folder: RunFolder, genotype: Genotype, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Trains the derived network from scratch and writes its test error as the run's result."""
    recipe = folder.recipe
    how = recipe.evaluation
    torch.manual_seed(recipe.seed)
    network = DerivedNetwork(
        genotype,
        in_channels=dataset.channels,
        num_classes=dataset.num_classes,
        channels=how.channels,
        layers=how.layers,
        auxiliary=how.auxiliary_weight > 0,
    ).to(device)
    batches = Batches(
        subset(dataset.train, recipe.data.train_images, recipe.seed),
        dataset,
        batch_size=how.batch_size,
        seed=recipe.seed,
        augmentation=how.augmentation,
        device=device,
    )
    rounds = how.epochs * batches.per_epoch
    weights = torch.optim.SGD(
        network.parameters(), lr=how.weights.lr, momentum=how.weights.momentum, weight_decay=how.weights.weight_decay
    )
    problem = Problem(
        "network",
        module=network,
        optimizer=weights,
        scheduler=cosine_schedule(weights, how.weights, rounds, batches.per_epoch),
        grad_clip=how.weights.grad_clip,
        loss=_derived_loss(how.auxiliary_weight),
        data=batches,
    )
    optimizer = MultilevelOptimizer([problem])
    folder.restore("evaluation", optimizer)
    accuracy: list[float] = []
    with PhaseProgress(console, "training", rounds, optimizer.round) as progress:
        while optimizer.round < rounds:
            network.drop_probability = how.drop_path * (optimizer.round // batches.per_epoch) / how.epochs
            record = optimizer.step()
            _check_finite(record)
            folder.log({"phase": "training", **_entry(record)})
            accuracy = [*accuracy[-99:], record.metrics["network"]["accuracy"]]
            error = 100.0 * (1.0 - sum(accuracy) / len(accuracy))
            progress.update(record.round, {"loss": record.losses["network"], "training error %": error})
            if record.round % batches.per_epoch == 0:
                folder.save("evaluation", optimizer)
    test = subset(dataset.test, recipe.data.test_images, recipe.seed)
    wrong = sum(_wrong(network, batch) for batch in in_order(test, dataset, 256, device))
    result = {
        "dataset": dataset.name,
        "test_error_percent": 100.0 * wrong / len(test),
        "test_images": len(test),
        "parameters": network.parameter_count(),
        "seed": recipe.seed,
        "genotype": genotype.to_data(),
    }
    folder.write("result.json", json.dumps(result, indent=1) + "\n")
    return result


def _derived_loss(auxiliary_weight: float) -> Any:
    def loss(network: DerivedNetwork, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        images, labels = batch
        logits, auxiliary = network(images)
        total = F.cross_entropy(logits, labels)
        if auxiliary is not None:
            total = total + auxiliary_weight * F.cross_entropy(auxiliary, labels)
        return total, {"accuracy": (logits.detach().argmax(1) == labels).float().mean()}

    return loss


@torch.no_grad()
def _wrong(network: DerivedNetwork, batch: tuple[Tensor, Tensor]) -> int:
    images, labels = batch
    network.eval()
    logits, _ = network(images)
    network.train()
    return int((logits.argmax(1) != labels).sum())
