"""Starting weights from another run, for a derived network, a search's supernets, or its generator.

`evaluation.init` takes the network of a run (its network.pt), `search.init` the weights W1 and W2
of a search (the checkpoint of its first stage), `search.generator.init` the generator of a warm-up.
All weights must fit, and nothing is loaded in part. One exception is a classifier for other
classes: a new one is initialised, and a message says so. The recipe holds a digest of the weights,
so a run is still a function of its recipe.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mlo
from lfmcw_app.batchnorm import without_statistics
from lfmcw_app.bounded_files import read_object
from lfmcw_app.build_modules import SearchModules, build_modules, generator_for
from lfmcw_app.classifier import network_path
from lfmcw_app.data import Dataset
from lfmcw_app.errors import InputError, shown
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.generators.average import MovingAverage
from lfmcw_app.near_paths import near_runs
from lfmcw_app.network_file import NetworkFile, NetworkPlan
from lfmcw_app.plain_yaml import parse_yaml
from lfmcw_app.recipe import Recipe, StartingWeights
from lfmcw_app.recipe_loading import validate_recipe
from lfmcw_app.run_files import DATASET
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.network import ImageNetwork
from lfmcw_app.stages import WARMUP, search_stages
from mlo.randomness import preserved

__all__ = [
    "averaged_generator", "check_generator_fits", "check_network_fits", "check_supernets_fit",
    "generator_weights", "load_into_generator", "load_into_network", "load_into_supernets",
    "weights_digest", "with_digests",
]  # fmt: skip

SEARCHES = ("search", "search-1")
"""Checkpoints of a search's first stage, which has the candidates of any search of its space."""

CLASSIFIER = "classifier."


# ------------------------------ digests


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A digest of named tensors: of names, types, shapes and values, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def with_digests(recipe: Recipe) -> Recipe:
    """The recipe with the digests of the weights that it starts from.

    Raises:
        InputError: if there are no such weights, or the recipe has another digest of them.
        CheckpointError: if their file is damaged.
    """
    if recipe.search.init.run is not None:
        init = _named(recipe.search.init, "search", _supernets(recipe.search.init.run))
        recipe = recipe.model_copy(
            update={"search": recipe.search.model_copy(update={"init": init})}
        )
    of_generator = recipe.search.generator.init
    if of_generator.run is not None:
        init = _named(of_generator, "search.generator", _warmed_up(of_generator.run)[0])
        generator = recipe.search.generator.model_copy(update={"init": init})
        search = recipe.search.model_copy(update={"generator": generator})
        recipe = recipe.model_copy(update={"search": search})
    if recipe.evaluation.init.run is not None:
        init = _named(
            recipe.evaluation.init, "evaluation", _network(recipe.evaluation.init.run).weights
        )
        recipe = recipe.model_copy(
            update={"evaluation": recipe.evaluation.model_copy(update={"init": init})}
        )
    return recipe


def _named(init: StartingWeights, section: str, weights: Mapping[str, Tensor]) -> StartingWeights:
    """The section with the digest of the weights, which must equal any that it already has."""
    digest = weights_digest(weights)
    if init.digest not in (None, digest):
        raise InputError(
            f"The weights in {init.run} are not those of the recipe: {section}.init.digest is "
            f"{init.digest}, but theirs is {digest}. Name the original run with "
            f"{section}.init.run, or set {section}.init.digest to null."
        )
    return StartingWeights(run=init.run, digest=digest)


# ------------------------------ the derived network


def _network(run: str) -> NetworkFile:
    return NetworkFile.load(network_path(run))


def check_network_fits(recipe: Recipe, genotype: Cells, dataset: Dataset) -> str:
    """Compares the network of `evaluation.init` with the one that is to be trained.

    Returns:
        What is taken, in words; empty where nothing is.

    Raises:
        InputError: naming the first thing that differs, or that there are no such weights.
        CheckpointError: if their file is damaged.
    """
    init = recipe.evaluation.init
    if init.run is None:
        return ""
    file = _network(init.run)
    _named(init, "evaluation", file.weights)
    plan, theirs = NetworkPlan.of(recipe, genotype, dataset), file.plan
    if theirs.genotype != plan.genotype:
        raise InputError(
            f"The network in {init.run} does not have the cells of the genotype to train. Give "
            f"that run as the genotype too: python -m lfmcw_app.evaluate {init.run} …"
        )
    for key, own, other in (
        ("evaluation.channels", plan.channels, theirs.channels),
        ("evaluation.layers", plan.layers, theirs.layers),
        ("evaluation.stem", plan.stem, theirs.stem),
        ("the channels of an image (data.channels)", plan.in_channels, theirs.in_channels),
    ):
        if own != other:
            raise InputError(
                f"The network in {init.run} does not fit: {key} is {own} here, but {other} there. "
                "Use the same value, or train from scratch without --init."
            )
    kept = file.class_names == dataset.class_names
    classifier = (
        "its classifier too"
        if kept
        else (f"a new classifier for {dataset.num_classes} classes, because its classes differ")
    )
    return (
        f"Starting weights: the network in {init.run} (digest {init.digest}), trained on "
        f"{file.about['dataset']} to {file.about['test_error_percent']:.2f}% test error; "
        f"{classifier}."
    )


def load_into_network(network: ImageNetwork, recipe: Recipe, dataset: Dataset) -> None:
    """Loads the weights of `evaluation.init`; an auxiliary head keeps its own.

    Args:
        network: the recipe's network, with its own weights.
        recipe: says which weights.
        dataset: whose classes are compared with theirs.

    Raises:
        InputError: if the weights no longer exist, or do not fit.
        CheckpointError: if their file is damaged.
    """
    init = recipe.evaluation.init
    if init.run is None:
        return
    file = _network(init.run)
    _named(init, "evaluation", file.weights)
    kept = file.class_names == dataset.class_names
    _load(network, file.weights, init.run, with_classifier=kept, missing=("auxiliary.",))


# ------------------------------ supernets


def _supernets(run: str) -> dict[str, Tensor]:
    """The supernet weights in a run's search, as w1.NAME (not in plain DARTS) and w2.NAME."""
    stores = [mlo.CheckpointStore(Path(run), name) for name in SEARCHES]
    store = next((store for store in stores if store.exists()), None)
    if store is None:
        raise InputError(
            f"{run} has no search to take weights from (no {SEARCHES[0]}.pt). Name the folder of "
            f"a run with a search.{near_runs(Path(run))}"
        )
    state = store.load(lambda _: None)
    found = {}
    try:
        problems = state["optimizer"]["problems"] if state is not None else {}
        for name, prefix in (("w1", ""), ("w2", "network.")):
            for key, tensor in problems.get(name, {}).get("module", {}).items():
                if key.startswith(prefix) and isinstance(tensor, Tensor):
                    found[f"{name}.{key.removeprefix(prefix)}"] = tensor
    except (KeyError, TypeError, AttributeError):
        found = {}
    if not any(key.startswith("w2.") for key in found):
        raise InputError(f"The checkpoint of the search in {run} holds no weights of supernets.")
    return found


def check_supernets_fit(recipe: Recipe, dataset: Dataset) -> str:
    """Compares the supernets of `search.init` with those of a search.

    Returns:
        What is taken, in words; empty where nothing is.

    Raises:
        InputError: naming the first weight that does not fit, or that there are none; also if the
            recipe has a network to start from, whose cells a search does not know.
        CheckpointError: if their file is damaged.
    """
    if recipe.evaluation.init.run is not None:
        raise InputError(
            "evaluation.init gives a network to start from, but nobody knows which cells a "
            "search will find. Use it with python -m lfmcw_app.evaluate, or drop it."
        )
    if recipe.search.init.run is None or recipe.search.method == "random":
        return ""
    with preserved():
        modules = build_modules(
            recipe.search, dataset, layers=search_stages(recipe.search)[0].layers
        )
    return load_into_supernets(modules, recipe)


def load_into_supernets(modules: SearchModules, recipe: Recipe) -> str:
    """Loads the weights of `search.init` into W1 and W2; a plain DARTS run gives both its W2.

    Returns:
        What was taken, in words; empty where nothing is.

    Raises:
        InputError: if the weights no longer exist, or do not fit, naming the first one.
        CheckpointError: if their file is damaged.
    """
    init = recipe.search.init
    if init.run is None:
        return ""
    weights = _supernets(init.run)
    _named(init, "search", weights)
    own = "w1" if any(key.startswith("w1.") for key in weights) else "w2"
    said = ""
    for source, network in ((own, modules.w1), ("w2", modules.w2.network)):
        if network is None:
            continue
        taken = {
            key.removeprefix(f"{source}."): tensor
            for key, tensor in weights.items()
            if key.startswith(f"{source}.")
        }
        classifier = taken.get(f"{CLASSIFIER}weight")
        kept = classifier is not None and classifier.shape == network.classifier.weight.shape
        _load(network, taken, init.run, with_classifier=kept)
        said = "their classifiers too" if kept else "new classifiers, for another number of classes"
    return f"Starting weights: the supernets in {init.run} (digest {init.digest}); {said}."


# ------------------------------ the generator


def averaged_generator(players: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's weights after a warm-up: the average of its parameters, and its buffers.

    Args:
        players: the state of `WarmupPlayers`.

    Returns:
        Copies, by their names in the generator.
    """
    found = {}
    for key, tensor in players.items():
        name = key.removeprefix("generator.")
        if name != key:
            average = players.get("average." + name.replace(".", "/"), tensor)
            found[name] = average.detach().clone()
    return found


def _warmed_up(run: str) -> tuple[dict[str, Tensor], Recipe]:
    """The generator of a run's complete warm-up, and the run's recipe."""
    store = mlo.CheckpointStore(Path(run), WARMUP)
    state = store.load() if store.exists() else None
    if state is None:
        raise InputError(
            f"{run} has no generator to take (no {WARMUP}.pt). Name the folder of a run with its "
            f"own warm-up: search.generator.warmup_rounds above 0.{near_runs(Path(run))}"
        )
    try:
        recipe = validate_recipe(parse_yaml(state["recipe"]))
        weights = averaged_generator(state["optimizer"]["problems"]["gan"]["module"])
        done = int(state["optimizer"]["round"])
    except (KeyError, TypeError, AttributeError, ValueError):
        weights = {}
    if not weights:
        raise InputError(f"The checkpoint {WARMUP}.pt in {run} holds no generator.")
    rounds = recipe.search.generator.warmup_rounds
    if done < rounds:
        raise InputError(
            f"The warm-up in {run} has made {done} of its {rounds} rounds. Finish it first: "
            f"python -m lfmcw_app.run --resume {shlex.quote(str(run))}"
        )
    return weights, recipe


def generator_weights(init: StartingWeights) -> dict[str, Tensor]:
    """The generator of the run that `search.generator.init` names.

    Raises:
        InputError: if it no longer exists, or has changed.
        CheckpointError: if its file is damaged.
    """
    assert init.run is not None
    weights, _ = _warmed_up(init.run)
    _named(init, "search.generator", weights)
    return weights


def check_generator_fits(recipe: Recipe, dataset: Dataset) -> str:
    """Compares the generator of `search.generator.init` with that of a search.

    A generator that has seen images of D_val, or labels of other conditions, would invalidate what
    is measured there. So the settings of D_tr must be the same.

    Returns:
        What is taken, in words; empty where nothing is.

    Raises:
        InputError: naming the first thing that differs, or that there are no such weights.
        CheckpointError: if their file is damaged.
    """
    how = recipe.search.generator
    if how.init.run is None or recipe.search.method != "lfmcw":
        return ""
    weights, theirs = _warmed_up(how.init.run)
    _named(how.init, "search.generator", weights)
    described = _described(Path(how.init.run))
    other = theirs.search.generator
    for key, own, there in (
        ("search.generator.name", how.name, other.name),
        ("search.generator.noise_dim", how.noise_dim, other.noise_dim),
        ("search.generator.channels", how.channels, other.channels),
        ("the size of an image (data.image_size)", dataset.image_size, described["image_size"]),
        ("the channels of an image (data.channels)", dataset.channels, described["channels"]),
        ("the classes", list(dataset.class_names), described["class_names"]),
    ):
        if own != there:
            raise InputError(
                f"The generator in {how.init.run} does not fit: {key} is {shown(own)} here, but "
                f"{shown(there)} there. Use the same value, or make a warm-up without "
                "search.generator.init."
            )
    _check_same_images(recipe, theirs, dataset, described["digest"])
    with preserved():
        generator = generator_for(how, dataset)
    load_into_generator(generator, weights, how.init.run)
    return (
        f"Starting weights: the generator in {how.init.run} (digest {how.init.digest}), after "
        f"{other.warmup_rounds} rounds of warm-up."
    )


def _check_same_images(recipe: Recipe, theirs: Recipe, dataset: Dataset, digest: str) -> None:
    """Checks that a warm-up learned on the D_tr of a search, so that it has seen nothing of D_val.

    Args:
        recipe: of the search.
        theirs: of the warm-up.
        dataset: of the search.
        digest: of the warm-up's data.

    Raises:
        InputError: naming the difference.
    """
    run = recipe.search.generator.init.run
    own, there = _of_the_parts(recipe), _of_the_parts(theirs)
    different = [key for key in own if own[key] != there[key]]
    if different:
        told = "; ".join(
            f"{key} is {shown(own[key])} here, but {shown(there[key])} there" for key in different
        )
        raise InputError(
            f"The generator in {run} did not learn on this search's D_tr, and may have seen "
            f"images of its D_val: {told}. Name the run of a warm-up with the same settings, or "
            "make a new warm-up, without search.generator.init."
        )
    if digest != dataset.fingerprint.digest:
        raise InputError(
            f"The generator in {run} did not learn on {dataset.name} as it is read here (digest "
            f"{dataset.fingerprint.digest} here, but {digest} there), so it may have seen images "
            "of this search's D_val. Make a warm-up on these data, without search.generator.init."
        )


def _of_the_parts(recipe: Recipe) -> dict[str, Any]:
    """Settings that decide which images are in D_tr, and with which labels: key → value."""
    how = recipe.data
    keys = ("search_images", "search_fractions", "groups", "imbalance", "class_shares")
    # A generator does not learn whether the labels are wrong in D_val too.
    wrong = [label.model_dump(by_alias=True, exclude={"in_"}) for label in how.wrong_labels]
    return {
        "seed": recipe.seed,
        **{f"data.{key}": getattr(how, key) for key in keys},
        "data.wrong_labels": wrong,
    }


def _described(run: Path) -> dict[str, Any]:
    """The needed entries of a run's dataset.json."""
    try:
        described = read_object(run / DATASET)
        found = {key: described[key] for key in ("image_size", "channels", "class_names")}
        return {**found, "digest": described["fingerprint"]["digest"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{run / 'dataset.json'}, which describes the images of the generator, cannot be used "
            f"({error}). Resume the run, which writes it again."
        ) from None


def load_into_generator(
    generator: ImageGenerator, weights: Mapping[str, Tensor], where: str
) -> None:
    """Loads all of a warm-up's weights, or none. The generator's own averages restart.

    Args:
        generator: the one to load them into.
        weights: as `averaged_generator` returns them.
        where: they are from, for messages.

    Raises:
        InputError: naming the first weight that does not fit.
    """
    averages = {
        f"{name}.": module
        for name, module in generator.named_modules()
        if isinstance(module, MovingAverage)
    }
    kept = {
        name: tensor for name, tensor in weights.items() if not name.startswith(tuple(averages))
    }
    _load(generator, kept, where, with_classifier=True, missing=tuple(averages))
    for prefix, average in averages.items():
        above = prefix.removesuffix(".").rpartition(".")[0]
        now = generator.state_dict()
        average.restart(
            {name: now[f"{above}.{name}" if above else name] for name in average.tensors()}
        )


def _load(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    where: str,
    *,
    with_classifier: bool,
    missing: tuple[str, ...] = (),
) -> None:
    """Loads all weights, or none.

    Args:
        network: the one to load them into.
        weights: name → tensor.
        where: they are from, for messages.
        with_classifier: whether the classifier is among them.
        missing: prefixes of names that the network has but the weights lack.

    Raises:
        InputError: naming the first weight that does not fit.
    """
    own = network.state_dict()
    weights, _ = without_statistics(weights, own)
    kept = missing if with_classifier else (*missing, CLASSIFIER)
    wanted = {name: tensor for name, tensor in own.items() if not name.startswith(kept)}
    given = {
        name: tensor
        for name, tensor in weights.items()
        if with_classifier or not name.startswith(CLASSIFIER)
    }
    for name in sorted({*wanted, *given}):
        here, there = (
            f"has the shape {list(table[name].shape)}" if name in table else "is missing"
            for table in (wanted, given)
        )
        if here != there:
            raise InputError(
                f"The weights in {where} do not fit: {shown(name)} {there} there, and here it "
                f"{here}. Channels, layers, nodes, stem and candidate operations must be the same."
            )
    network.load_state_dict({**own, **given})
