"""The second phase of a run: the training of the derived network, and its result."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.assessment import assessed
from lfmcw_app.budget import budget_result
from lfmcw_app.data import Batches, Dataset, resident, subset
from lfmcw_app.network_file import NetworkPlan, write_network
from lfmcw_app.optimizers import step_options
from lfmcw_app.parts import training_labels, training_part
from lfmcw_app.phase import Phase
from lfmcw_app.problems import learning_rate_schedule
from lfmcw_app.processes import parallelism
from lfmcw_app.provenance import made_by
from lfmcw_app.recipe import Evaluation, Recipe
from lfmcw_app.result import as_json, of_run
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_end import generator_result
from lfmcw_app.search_space.cost import network_cost
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.network import ImageNetwork
from lfmcw_app.search_space.operations import primitive_named
from lfmcw_app.spaces import space_named
from lfmcw_app.stages import TRAINING, phases_of
from lfmcw_app.starting_weights import load_into_network
from mlo import MultilevelOptimizer, Problem
from mlo.distributed import SyncBatchNorm, rank_and_size

__all__ = ["build_training", "train_derived", "training_rounds"]


def training_rounds(how: Evaluation, per_epoch: int) -> int:
    """Number of rounds of the derived network's training, of which an epoch has `per_epoch`."""
    if how.steps is not None:
        return how.steps
    assert how.epochs is not None
    # With small data there are more epochs, so that the schedules of learning rate and drop-path
    # are complete.
    return max(how.epochs, math.ceil(how.min_steps / per_epoch)) * per_epoch


def build_training(
    recipe: Recipe, genotype: Cells | None, dataset: Dataset, device: torch.device
) -> tuple[MultilevelOptimizer, int]:
    """Declares the training of a derived network; also returns its number of rounds.

    The weights are drawn from the global random state.

    Args:
        recipe: the recipe.
        genotype: the cells; None for random ones, to measure the cost of a training.
        dataset: the data to train on.
        device: where.
    """
    how = recipe.evaluation

    # Drawn from the global random state before anything else draws from it.
    genotype = genotype or space_named(recipe.search.space).random(recipe.search, 0)
    plan = NetworkPlan.of(recipe, genotype, dataset)
    network = plan.build(auxiliary=how.auxiliary_weight > 0).to(device)
    if recipe.distributed.sync_batchnorm:
        SyncBatchNorm.convert(network)

    images = training_part(recipe, dataset)
    batches = Batches(
        resident(images, how.augmentation, device),
        dataset,
        batch_size=how.batch_size,
        seed=recipe.seed,
        augmentation=how.augmentation,
        device=device,
        part=rank_and_size(),
    )

    rounds = training_rounds(how, batches.per_epoch)
    weights = torch.optim.SGD(
        network.parameters(),
        lr=how.weights.lr,
        momentum=how.weights.momentum,
        weight_decay=how.weights.weight_decay,
        **step_options(device),
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
    draws = any(primitive_named(name).draws for name in genotype.primitives)
    parallel = parallelism(recipe, own_noise=draws or how.drop_path > 0)
    return MultilevelOptimizer([problem], distributed=parallel), rounds


def train_derived(
    folder: RunFolder, genotype: Cells, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Trains the derived network from scratch and writes its test error as the run's result."""
    recipe = folder.recipe
    torch.manual_seed(recipe.seed)
    optimizer, rounds = build_training(recipe, genotype, dataset, device)
    network = optimizer.problems["network"].module
    assert isinstance(network, ImageNetwork)
    if not folder.checkpoints(TRAINING).exists():
        load_into_network(network, recipe, dataset)
    _train(folder, optimizer, network, dataset, rounds, console, device)

    train = training_part(recipe, dataset)
    test = subset(dataset.test, recipe.data.test_images, recipe.seed)
    measured = assessed(
        network,
        train,
        test,
        dataset,
        device,
        augmentation=recipe.evaluation.augmentation,
        seed=recipe.seed,
    )
    cost = network_cost(network, dataset.image_size, dataset.channels)
    budget = budget_result(recipe, cost)
    result = {
        "dataset": dataset.name,
        **measured,
        "parameters": network.parameter_count(),
        "multiply_adds_millions": round(cost.multiply_adds, 3),
        **({"budget": budget} if budget else {}),
        **generator_result(folder),
        **({"init": recipe.evaluation.init.model_dump()} if recipe.evaluation.init.run else {}),
        **of_run(folder, genotype),
    }
    plan = NetworkPlan.of(recipe, genotype, dataset)
    write_network(folder, network, plan, dataset, result)
    folder.complete(as_json(result), made_by(device))
    return result


def _train(
    folder: RunFolder,
    optimizer: MultilevelOptimizer,
    network: ImageNetwork,
    dataset: Dataset,
    rounds: int,
    console: Console,
    device: torch.device,
) -> None:
    """Runs the rounds of the training, resumed from its checkpoint."""
    how = folder.recipe.evaluation
    per_epoch = len(training_labels(folder.recipe, dataset)) // how.batch_size
    epochs = math.ceil(rounds / per_epoch)
    phase = Phase(
        folder,
        TRAINING,
        optimizer,
        rounds=rounds,
        save_every=per_epoch,
        phases=phases_of(folder.recipe),
        judged_by="network",
        console=console,
        device=device,
    )

    def set_drop_probability() -> None:
        network.drop_probability = how.drop_path * (optimizer.round // per_epoch) / epochs

    # Over the last epoch, because in earlier ones the network was different.
    seen: deque[tuple[float, float]] = deque(maxlen=per_epoch)
    for done in phase.rounds(set_drop_probability):
        if not done.record.skipped:
            accuracy = done.record.metrics["network"]["accuracy"]
            seen.append((done.record.losses["network"], 100.0 * (1.0 - accuracy)))
            done.shown.update(_means(seen))


def _means(seen: Collection[tuple[float, float]]) -> dict[str, float]:
    """The means of loss and error over some rounds, under names that say of how many they are."""
    losses, errors = zip(*seen, strict=True)
    of = "round" if len(seen) == 1 else f"{len(seen):,} rounds"
    return {
        f"mean of the last {of}: loss": sum(losses) / len(seen),
        "error on training batches %": sum(errors) / len(seen),
    }


def _derived_loss(auxiliary_weight: float, label_smoothing: float) -> Any:
    """Makes the loss: cross entropy, plus that of the auxiliary head with its weight."""

    def loss(network: ImageNetwork, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        images, labels = batch
        logits, auxiliary = network(images)
        total = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if auxiliary is not None:
            second = F.cross_entropy(auxiliary, labels, label_smoothing=label_smoothing)
            total = total + auxiliary_weight * second
        return total, {"accuracy": (logits.detach().argmax(1) == labels).float().mean()}

    return loss
