"""The second phase of a run: the training of the derived network from scratch, and its test
error.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.data import Batches, Dataset, in_order, resident, subset
from lfmcw_app.phase import Phase, entry_of
from lfmcw_app.problems import learning_rate_schedule
from lfmcw_app.processes import gathered, parallelism, share
from lfmcw_app.progress import PhaseProgress
from lfmcw_app.recipe import Evaluation, Recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.cost import network_cost
from lfmcw_app.search_space.genotype import Genotype, random_genotype
from lfmcw_app.search_space.network import DerivedNetwork
from lfmcw_app.stages import EVALUATION, phases_of
from lfmcw_app.timings import TIMINGS, Timings
from mlo import MultilevelOptimizer, Problem
from mlo.distributed import SyncBatchNorm

__all__ = ["build_training", "train_derived", "training_images", "training_rounds"]


def training_images(recipe: Recipe, dataset: Dataset) -> int:
    """How many images the derived network is trained on."""
    return min(recipe.data.train_images or len(dataset.train), len(dataset.train))


def training_rounds(how: Evaluation, per_epoch: int) -> int:
    """Number of rounds of the derived network's training, of which an epoch has `per_epoch`."""
    if how.steps is not None:
        return how.steps
    assert how.epochs is not None
    return how.epochs * per_epoch


def build_training(
    recipe: Recipe, genotype: Genotype | None, dataset: Dataset, device: torch.device
) -> tuple[MultilevelOptimizer, int]:
    """Declares the training of a derived network, initialised from the global random state; and its
    number of rounds.

    Args:
        recipe: the recipe.
        genotype: the cells; None for random ones, to see what a training costs.
        dataset: what is trained on.
        device: where.
    """
    how = recipe.evaluation
    network = DerivedNetwork(
        genotype or random_genotype(recipe.search.nodes, 0),
        in_channels=dataset.channels,
        num_classes=dataset.num_classes,
        channels=how.channels,
        layers=how.layers,
        auxiliary=how.auxiliary_weight > 0,
        stem=how.stem,
    ).to(device)
    if recipe.distributed.sync_batchnorm:
        SyncBatchNorm.convert(network)
    batches = Batches(
        resident(
            subset(dataset.train, recipe.data.train_images, recipe.seed), how.augmentation, device
        ),
        dataset,
        batch_size=how.batch_size,
        seed=recipe.seed,
        augmentation=how.augmentation,
        device=device,
        part=share(),
    )
    rounds = training_rounds(how, batches.per_epoch)
    weights = torch.optim.SGD(
        network.parameters(),
        lr=how.weights.lr,
        momentum=how.weights.momentum,
        weight_decay=how.weights.weight_decay,
    )
    problem = Problem(
        "network",
        module=network,
        optimizer=weights,
        scheduler=learning_rate_schedule(weights, how.weights, rounds, batches.per_epoch),
        grad_clip=how.weights.grad_clip,
        loss=_derived_loss(how.auxiliary_weight, how.label_smoothing),
        precision=how.precision,
        data=batches,
    )
    return MultilevelOptimizer(
        [problem], distributed=parallelism(recipe, own_noise=how.drop_path > 0)
    ), rounds


def train_derived(
    folder: RunFolder, genotype: Genotype, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Trains the derived network from scratch and writes its test error as the run's result."""
    recipe = folder.recipe
    how = recipe.evaluation
    torch.manual_seed(recipe.seed)
    optimizer, rounds = build_training(recipe, genotype, dataset, device)
    network = optimizer.problems["network"].module
    assert isinstance(network, DerivedNetwork)
    per_epoch = training_images(recipe, dataset) // how.batch_size
    epochs = math.ceil(rounds / per_epoch)
    phase = Phase(
        folder, EVALUATION, optimizer, rounds=rounds, save_every=per_epoch, phases=phases_of(recipe)
    )
    timings = Timings(folder.path, "training", optimizer, device)
    accuracy: list[float] = []
    with PhaseProgress(console, "training", rounds, optimizer.round) as progress:
        while optimizer.round < rounds:
            network.drop_probability = how.drop_path * (optimizer.round // per_epoch) / epochs
            record = phase.step()
            if record is None:
                continue
            if folder.writes and phase.is_due(record.round):
                with folder.attempting(TIMINGS):
                    timings.write()
            phase.finish_round(
                record, {"phase": "training", **entry_of(record)}, loss=record.losses.get("network")
            )
            if record.skipped:
                continue
            accuracy = [*accuracy[-99:], record.metrics["network"]["accuracy"]]
            error = 100.0 * (1.0 - sum(accuracy) / len(accuracy))
            progress.update(record.round, record.losses, {"training error %": error})
    test = subset(dataset.test, recipe.data.test_images, recipe.seed)
    rank, size = share()
    own = [
        _ranks(network, batch)
        for i, batch in enumerate(in_order(test, dataset, 256, device))
        if i % size == rank
    ]
    ranks = torch.cat([part for parts in gathered(own) for part in parts])
    cost = network_cost(network, dataset.image_size, dataset.channels)
    result = {
        "dataset": dataset.name,
        "test_error_percent": 100.0 * float((ranks >= 1).double().mean()),
        # Of five guesses; meaningless for fewer classes.
        "test_top5_error_percent": 100.0 * float((ranks >= 5).double().mean())
        if dataset.num_classes > 5
        else None,
        "test_images": len(test),
        "parameters": network.parameter_count(),
        "multiply_adds_millions": round(cost.multiply_adds, 3),
        "seed": recipe.seed,
        **({"trial": True} if recipe.trial else {}),
        "genotype": genotype.to_data(),
    }
    folder.write("result.json", json.dumps(result, indent=1) + "\n")
    return result


def _derived_loss(auxiliary_weight: float, label_smoothing: float) -> Any:
    def loss(
        network: DerivedNetwork, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        images, labels = batch
        logits, auxiliary = network(images)
        total = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if auxiliary is not None:
            total = total + auxiliary_weight * F.cross_entropy(
                auxiliary, labels, label_smoothing=label_smoothing
            )
        return total, {"accuracy": (logits.detach().argmax(1) == labels).float().mean()}

    return loss


@torch.no_grad()
def _ranks(network: DerivedNetwork, batch: tuple[Tensor, Tensor]) -> Tensor:
    """For each image the number of classes that the network finds likelier than the right one,
    [B].
    """
    images, labels = batch
    network.eval()
    logits, _ = network(images)
    network.train()
    right = logits.gather(1, labels.unsqueeze(1))
    # Of equal logits the class listed first counts as likelier, as argmax has it.
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    ranks = ((logits > right) | ((logits == right) & earlier)).sum(1)
    lost = logits.isnan().any(1)  # comparisons with NaN are all false, which would be rank 0: right
    return torch.where(lost, logits.shape[1], ranks).cpu()
