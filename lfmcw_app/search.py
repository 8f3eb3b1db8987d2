"""The search of a run, stage by stage: from modules to a genotype and its pictures."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lfmcw_app.budget import warn_of_excess
from lfmcw_app.build_modules import SearchModules, build_modules
from lfmcw_app.collapse import WINDOW, CollapseDetector, observe
from lfmcw_app.data import Dataset, Images, short_name
from lfmcw_app.errors import NumbersWarning
from lfmcw_app.generator_quality import Judge, Quality
from lfmcw_app.generator_warmup import warm_up
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.gradient_terms import gradient_terms
from lfmcw_app.parts import SearchParts, search_parts
from lfmcw_app.phase import Phase, Round
from lfmcw_app.pictures import save_cells, save_samples, save_snapshot, snapshot_rounds
from lfmcw_app.printing import say
from lfmcw_app.problems import build_search, search_rounds
from lfmcw_app.recipe import StartingWeights
from lfmcw_app.run_files import GENOTYPE, NOTATION, SAMPLES
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_end import measure_end, quality_rounds
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.pdarts import (
    set_skip_drop_probability,
    skip_drop_probability,
)
from lfmcw_app.spaces import SearchStage, space_named
from lfmcw_app.stages import METHOD_LABELS, phases_of, search_stages
from lfmcw_app.starting_weights import (
    check_generator_fits,
    generator_weights,
    load_into_generator,
    load_into_supernets,
)
from mlo import Record

__all__ = ["search"]

STAGE_SEEDS = 1_000_003
"""Distance between the seeds of two stages. With 1, a later stage would have another run's seed."""


def search(folder: RunFolder, dataset: Dataset, console: Console, device: torch.device) -> Cells:
    """Searches for a cell; writes genotype.json, genotype.txt and their pictures.

    The pictures are cells.png and cells.svg and, with a generator, samples.png and samples/.
    """
    how = folder.recipe.search
    genotype, source = _searched(folder, dataset, console, device)
    folder.write(GENOTYPE, genotype.to_json())
    folder.write(NOTATION, genotype.notation() + "\n")
    warn_of_excess(folder.recipe, genotype, dataset)
    title = (
        f"{space_named(how.space).title}, {METHOD_LABELS[how.method]}, {short_name(dataset.name)}"
    )
    if not folder.draws:
        return genotype
    title = title if how.method == "random" else f"{title}, {how.order} order"
    save_cells(genotype, folder, title)
    if source is not None:
        with folder.attempting(SAMPLES):
            save_samples(source, dataset, folder.path / SAMPLES, device)
    return genotype


def _searched(
    folder: RunFolder, dataset: Dataset, console: Console, device: torch.device
) -> tuple[Cells, ImageGenerator | Images | None]:
    """Runs all stages; returns the genotype and the source of images, if any."""
    how = folder.recipe.search
    space = space_named(how.space)
    if how.method == "random":
        return space.random(how, folder.recipe.seed), None

    if not any(folder.checkpoints(phase).exists() for phase in phases_of(folder.recipe)):
        check_generator_fits(folder.recipe, dataset)  # a table's run arrives here unchecked
    parts = search_parts(folder.recipe, dataset)
    judge = Judge(*parts.rightly_labelled, dataset, seed=folder.recipe.seed, device=device)
    warmed = warm_up(folder, dataset, parts.train, judge, console, device)

    # A stage begins with new modules, and with the candidates that the stage before kept.
    candidates = space.candidates(how)
    for index, stage in enumerate(space.stages(how)):
        torch.manual_seed(folder.recipe.seed + index * STAGE_SEEDS)
        modules = build_modules(
            how, dataset, candidates=candidates, layers=stage.layers, device=device
        )
        if not folder.checkpoints(stage.name).exists():
            if index == 0:
                load_into_supernets(modules, folder.recipe)
            _begin_with_generator(modules, warmed, how.generator.init)
        _run_stage(
            stage,
            modules,
            candidates,
            parts,
            folder,
            dataset=dataset,
            judge=judge,
            console=console,
            device=device,
        )
        found, candidates = candidates, space.surviving(modules.arch(), candidates, stage)
    genotype = space.derive(how, modules.arch(), found)
    return genotype, _source(modules, parts)


def _source(modules: SearchModules, parts: SearchParts) -> ImageGenerator | Images | None:
    """The source of images: the generator or real images; None for plain DARTS."""
    return modules.gan.generator if modules.gan is not None else parts.unused


def _begin_with_generator(
    modules: SearchModules, warmed: dict[str, Tensor] | None, init: StartingWeights
) -> None:
    """Gives a stage's generator the weights of the warm-up, or those of another run's."""
    if modules.gan is None:
        return
    if warmed is None and init.run is not None:
        warmed = generator_weights(init)
    if warmed is not None:
        load_into_generator(modules.gan.generator, warmed, init.run or "the warm-up")


def _run_stage(
    stage: SearchStage,
    modules: SearchModules,
    candidates: Any,
    parts: SearchParts,
    folder: RunFolder,
    *,
    dataset: Dataset,
    judge: Judge,
    console: Console,
    device: torch.device,
) -> None:
    """Runs the rounds of a stage, resumed from its checkpoint."""
    recipe = folder.recipe
    how, train = recipe.search, parts.train
    optimizer = build_search(
        recipe, dataset, train, parts.validation, modules, unused=parts.unused, device=device
    )
    rounds = search_rounds(how, len(train))
    per_epoch = len(train) // how.batch_size
    epochs, frozen = math.ceil(rounds / per_epoch), how.architecture.warmup_epochs

    phase = Phase(
        folder,
        stage.name,
        optimizer,
        rounds=rounds,
        save_every=recipe.checkpoint_every,
        phases=phases_of(recipe),
        judged_by="arch",
        console=console,
        device=device,
    )
    detector = (
        CollapseDetector(game=how.generator.name, recipe=recipe) if recipe.detect_collapse else None
    )
    source = _source(modules, parts)
    snapshots = snapshot_rounds(rounds) if modules.gan is not None else frozenset({1})
    ends_search = stage.name == search_stages(how)[-1].name
    judged = quality_rounds(recipe, rounds, ends_search=ends_search)
    quality: Quality | None = None

    def set_skip_dropout() -> None:
        # A function of the epoch alone, so that a resumed run has the same.
        if stage.skip_dropout:
            epoch = optimizer.round // per_epoch
            probability = skip_drop_probability(
                stage.skip_dropout, epoch, epochs=epochs, frozen=frozen
            )
            for module in modules:
                if module is not None:
                    set_skip_drop_probability(module, probability)

    def cells() -> Cells:
        return space_named(how.space).derive_now(modules.arch(), candidates)

    for done in phase.rounds(set_skip_dropout, cells):
        record = done.record
        done.entry.update(_of_architecture(done, modules, candidates))
        if how.gradient_terms_every and record.round % how.gradient_terms_every == 0:
            done.entry["gradient_terms"] = gradient_terms(optimizer)
        if "arch" in record.losses:  # the architecture may rest in the first epochs
            accuracy = record.metrics["arch"]["accuracy"]
            done.shown["error on the validation batch %"] = 100.0 * (1.0 - accuracy)

        if source is not None and folder.draws and record.round in snapshots:
            path = folder.samples / f"{stage.name}-{record.round:06d}.png"
            with folder.attempting(path.name):
                save_snapshot(source, dataset, path, device)
        quality = None
        if modules.gan is not None and folder.writes and record.round in judged:
            with folder.attempting("the generator's quality"), phase.measuring():
                quality = judge.measure(modules.gan.generator)
                done.entry["quality"] = quality.to_data()
        if detector is not None:
            # A generator that has just begun does not draw pictures yet; that is not a collapse.
            begins = record.round < min(WINDOW, rounds)
            _warn_of_collapse(detector, record, cells(), None if begins else quality)

    if ends_search and folder.writes:
        at = {"stage": stage.name, "round": rounds}
        quality = measure_end(
            folder, modules, parts, source, dataset, judge, at=at, measured=quality
        )
        if quality is not None:
            say(console, f"generator: {quality}")


def _warn_of_collapse(
    detector: CollapseDetector, record: Record, cells: Cells, quality: Quality | None
) -> None:
    told = detector.update(observe(record, cells))
    if quality is not None:
        told += detector.measured(quality)
    for text in told:
        warnings.warn(f"Round {record.round}: {text}", NumbersWarning, stacklevel=2)


def _of_architecture(done: Round, modules: SearchModules, candidates: Any) -> dict[str, Any]:
    """Entries of the architecture: α at intervals, and first the meaning of its columns."""
    entry: dict[str, Any] = {}
    if done.is_due or done.record.round == 1:
        entry["alpha"] = {
            kind: _rounded(weights) for kind, weights in modules.arch()._asdict().items()
        }
    if done.record.round == 1:
        entry["candidates"] = asdict(candidates)
    return entry


def _rounded(values: Tensor) -> list[list[float]]:
    def row(of_edge: list[float]) -> list[float]:
        return [round(value, 6) for value in of_edge]

    return list(map(row, values.detach().tolist()))
