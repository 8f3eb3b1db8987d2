"""The warm-up of the generator: its game is played alone, before the search.

The paper has none: its generator learns within the search (Algorithm 1). In a short search it draws
one pattern per class, so W2 does not learn from pictures of the class. The warm-up plays the game
of `search.generator.name` on D_tr with its own small discriminator. The search starts with the
generator's weights, averaged over the warm-up's last rounds, and a new discriminator with the
architecture.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lfmcw_app.build_modules import generator_for
from lfmcw_app.collapse import advised, doubts_about_pictures
from lfmcw_app.data import Batches, Dataset, Images, resident
from lfmcw_app.errors import NumbersWarning
from lfmcw_app.generator_quality import Judge, Quality
from lfmcw_app.generators import GAMES, ImageGenerator, PlayerLosses
from lfmcw_app.generators.average import MovingAverage
from lfmcw_app.generators.warmup_discriminator import WarmupDiscriminator
from lfmcw_app.optimizers import step_options
from lfmcw_app.phase import Phase
from lfmcw_app.pictures import save_snapshot, snapshot_rounds
from lfmcw_app.processes import parallelism
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_end import quality_rounds
from lfmcw_app.stages import WARMUP, phases_of
from lfmcw_app.starting_weights import (
    averaged_generator,
    generator_weights,
    load_into_generator,
)
from mlo import MultilevelOptimizer, Problem
from mlo.distributed import rank_and_size

__all__ = ["WarmupPlayers", "build_warmup", "warm_up"]

SEED = 500_000_003
"""Between the seeds of a run and of its warm-up, so that no search draws the same numbers."""

STREAM = 2**65
"""A stream of batches has the seed 2 · seed + stream; see problems.py."""

AVERAGED = 0.1
"""The weights are averaged over roughly this share of the rounds."""


class WarmupPlayers(nn.Module):
    """The two players, and the moving average of the generator's weights.

    Args:
        generator: the one player.
        discriminator: the other.
        rounds: of the warm-up, over the last part of which weights are averaged.
    """

    def __init__(
        self, generator: ImageGenerator, discriminator: WarmupDiscriminator, rounds: int
    ) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        # The weights of half-way then have a share of e^-5 in the average.
        self.average = MovingAverage(
            dict(generator.named_parameters()),
            decay=max(0.0, 1.0 - 1.0 / (AVERAGED * rounds)),
            start=rounds // 2,
        )


def build_warmup(
    recipe: Recipe,
    dataset: Dataset,
    train: Images,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MultilevelOptimizer:
    """Declares the warm-up's one problem, a game, from the global random state.

    Args:
        recipe: of the run.
        dataset: gives classes, channels and image size.
        train: D_tr.
        device: where it runs.
        dtype: of weights and images.
    """
    search, how = recipe.search, recipe.search.generator
    generator = generator_for(how, dataset)
    discriminator = WarmupDiscriminator(
        num_classes=dataset.num_classes,
        image_size=dataset.image_size,
        image_channels=dataset.channels,
        channels=how.warmup_discriminator_channels,
        augments=how.warmup_augmentation,
    )
    players = WarmupPlayers(generator, discriminator, how.warmup_rounds)
    players.to(device=device, dtype=dtype)

    def adam(module: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(
            module.parameters(), lr=lr, betas=how.warmup_betas, **step_options(device)
        )

    problem = Problem(
        "gan",
        module=players,
        players={"generator": "generator", "discriminator": "discriminator"},
        player_steps={"discriminator": how.discriminator_steps},
        optimizer={
            "generator": adam(generator, how.warmup_lr),
            "discriminator": adam(discriminator, how.warmup_discriminator_lr),
        },
        precision=search.precision,
        loss=_warmup_loss(how.name),
        data=Batches(
            resident(train, search.augmentation, device),
            dataset,
            batch_size=how.warmup_batch_size or search.batch_size,
            seed=2 * recipe.seed + STREAM,
            augmentation=search.augmentation,
            device=device,
            dtype=dtype,
            part=rank_and_size(),
        ),
    )
    return MultilevelOptimizer([problem], distributed=parallelism(recipe, own_noise=False))


def _warmup_loss(name: str) -> Callable[..., PlayerLosses]:
    """Makes the loss of the two players on a training batch; no architecture is in it."""
    loss = GAMES[name].loss
    no_architecture: Any = None  # the small discriminator has no architecture

    def warmup_loss(players: WarmupPlayers, batch: tuple[Tensor, Tensor]) -> PlayerLosses:
        images, labels = batch
        generator = players.generator
        players.average.update(dict(generator.named_parameters()), generator.evaluations_per_update)
        return loss(players.discriminator, generator, images, labels, no_architecture)

    return warmup_loss


def warm_up(
    folder: RunFolder,
    dataset: Dataset,
    train: Images,
    judge: Judge,
    console: Console,
    device: torch.device,
) -> dict[str, Tensor] | None:
    """Runs the remaining rounds of the warm-up, on the images `train` of D_tr.

    Checkpoints and measures are of the generator as it would enter the search.

    Returns:
        The generator's weights for the search; None where the recipe has no warm-up.
    """
    recipe = folder.recipe
    if WARMUP not in phases_of(recipe):
        return None
    torch.manual_seed(recipe.seed + SEED)
    optimizer = build_warmup(recipe, dataset, train, device=device)
    players: Any = optimizer.problems["gan"].module
    init = recipe.search.generator.init
    if init.run is not None and not folder.checkpoints(WARMUP).exists():
        load_into_generator(players.generator, generator_weights(init), init.run)

    rounds = recipe.search.generator.warmup_rounds
    phase = Phase(
        folder,
        WARMUP,
        optimizer,
        rounds=rounds,
        # Its rounds are many and short.
        save_every=max(recipe.checkpoint_every, rounds // 10),
        phases=phases_of(recipe),
        judged_by=None,
        console=console,
        device=device,
    )
    snapshots = snapshot_rounds(rounds)
    judged = quality_rounds(recipe, rounds, ends_search=False)
    for done in phase.rounds():
        if folder.draws and done.record.round in snapshots:
            path = folder.samples / f"{WARMUP}-{done.record.round:06d}.png"
            with folder.attempting(path.name):
                save_snapshot(players.generator, dataset, path, device)
        if folder.writes and done.record.round in judged:
            with folder.attempting("the generator's quality"), phase.measuring():
                quality = judge.measure(_averaged(players))
                done.entry["quality"] = quality.to_data()
                if recipe.detect_collapse and done.record.round == rounds:
                    _warn_of_pictures(quality, recipe)
    return averaged_generator(players.state_dict())


def _averaged(players: WarmupPlayers) -> ImageGenerator:
    """The generator as it would go into the search."""
    generator = copy.deepcopy(players.generator)
    load_into_generator(generator, averaged_generator(players.state_dict()), "the warm-up")
    return generator


def _warn_of_pictures(quality: Quality, recipe: Recipe) -> None:
    for text in advised(list(doubts_about_pictures(quality, None).values()), recipe):
        warnings.warn(f"After the warm-up: {text}", NumbersWarning, stacklevel=2)
