"""The least memory that a recipe takes, by arithmetic, before anything is built.

All numbers are lower bounds, so that nothing that works is refused. They count convolutions without
norms and biases, and only the outputs of cells as activations. A recipe close to the limit is
caught by `--dry-run`, or ends with the message of memory.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from lfmcw_app.errors import InputError
from lfmcw_app.memory import memory_of
from lfmcw_app.recipe import Generator, Recipe, Search
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.nasbench201_network import STAGES
from lfmcw_app.search_space.operations import make_operation
from lfmcw_app.search_space.supernet import reduction_layers
from lfmcw_app.spaces import space_named
from lfmcw_app.stages import search_stages
from lfmcw_app.units import size

__all__ = [
    "check_sizes",
    "generator_weights",
    "least_memory",
    "network_weights",
    "primitive_weights",
    "supernet_weights",
]

FLOAT = 4
STEM_MULTIPLIER = 3
MODULE_BYTES = 1000
"""Size of an operation on an edge, beside its weights: Python's objects took 2,300 at least."""

WIDEST = 2**20
"""Channels up to which operations are counted: those of wider ones have more weights."""

SMALLEST = {
    "search.channels": 4, "search.layers": 3, "search.nodes": 1, "search.batch_size": 2,
    "search.generator.channels": 1, "search.generator.noise_dim": 1,
    "search.generator.warmup_discriminator_channels": 1,
    "evaluation.channels": 2, "evaluation.layers": 3, "evaluation.batch_size": 2,
    "data.image_size": 8,
}  # fmt: skip
"""Key that decides the memory of a recipe → a value with which it takes little."""

SUMS = "nasbench201"
"""The space whose nodes are sums: its cells have other edges, and its networks other stages."""


def check_sizes(
    recipe: Recipe,
    *,
    image_size: int,
    image_channels: int = 1,
    classes: int = 2,
    device: torch.device,
    searches: bool,
) -> None:
    """Refuses a recipe that cannot fit into the memory of a device.

    Args:
        recipe: the recipe.
        image_size: height and width of an image, at least.
        image_channels: channels of an image, at least.
        classes: number of classes, at least.
        device: where it is to run.
        searches: whether a search is to run, not only the training of a derived network.

    Raises:
        InputError: naming the key that makes it too large.
    """
    if space_named(recipe.search.space).network_of not in ("darts", SUMS):
        return  # of cells of another package nothing is known
    limit = memory_of(device)
    shape = (image_size, image_channels, classes)
    needed = least_memory(recipe, *shape, searches=searches)
    phase = max(needed, key=needed.__getitem__)
    if limit is None or needed[phase] <= limit:
        return

    # The key to blame is the one whose reduction saves most.
    def left(key: str) -> int:
        smaller = image_size if key != "data.image_size" else SMALLEST[key]
        of_key = least_memory(
            _with(recipe, key), smaller, image_channels, classes, searches=searches
        )
        return of_key[phase]

    key = min((key for key in SMALLEST if _may_be_small(recipe, key)), key=left)
    has = "the GPU has" if device.type == "cuda" else "this machine has, with its limits,"
    raise InputError(
        f"{key} is {_value(recipe, key) or image_size:,}, with which the {phase} takes at least "
        f"{' '.join(size(needed[phase]))} of memory for weights, optimizers and the outputs of "
        f"cells; {has} {' '.join(size(limit))}. Lower {key}."
    )


def least_memory(
    recipe: Recipe, image_size: int, image_channels: int, classes: int, *, searches: bool
) -> dict[str, int]:
    """Phase → the least number of bytes that it takes."""
    found = {}
    how = recipe.search
    if searches and how.method != "random":
        weights = supernet_weights(how, classes)
        # SGD keeps one momentum per weight, Adam two; one gradient exists at a time.
        kept = weights * (2 if how.weights.momentum else 1)
        if how.method == "lfmcw":
            kept += kept
            if not how.draws_real:
                kept += 3 * weights + 3 * generator_weights(how.generator)
        supernets = 1 + (how.method == "lfmcw") + _plays(how)
        outputs = (
            _sum_outputs(how.layers, how.nodes - 1, how.channels, image_size)
            if _has_sums(how)
            else _outputs(
                search_stages(how)[0].layers, how.nodes, how.channels, how.stem, image_size
            )
        )
        passed = _batch(how.batch_size) * (outputs + image_channels * image_size**2)
        found["search"] = (
            FLOAT * (kept + weights)
            + MODULE_BYTES * supernets * operations(how)
            + _bytes(how.precision) * passed
        )
        if _plays(how) and how.generator.warmup_rounds:
            # Adam keeps two of every weight, beside a gradient.
            players = generator_weights(how.generator)
            players += 9 * how.generator.warmup_discriminator_channels**2
            found["warm-up of the generator"] = FLOAT * 4 * players

    trained = recipe.evaluation
    weights = network_weights(recipe, image_channels, classes)
    kept = weights * (3 if trained.weights.momentum else 2)
    outputs = (
        _sum_outputs(STAGES, 1, trained.channels, image_size)  # cells may have no operation
        if _has_sums(how)
        else _outputs(trained.layers, how.nodes, trained.channels, trained.stem, image_size)
    )
    passed = _batch(trained.batch_size) * (outputs + image_channels * image_size**2)
    found["training"] = FLOAT * kept + _bytes(trained.precision) * passed
    return found


def supernet_weights(how: Search, classes: int) -> int:
    """Number of a supernet's weights, at least; of P-DARTS's the first stage's."""
    if _has_sums(how):
        return _sum_supernet_weights(how, classes)
    space = space_named(how.space)
    layers, part = space.stages(how)[0].layers, space.partial_channels(how)
    candidates = space.candidates(how)

    sources = [source for node in range(how.nodes) for source in range(2 + node)]

    @cache  # most cells are alike
    def mixed(reduces: bool, channels: int) -> int:
        seen, total = channels // part, 0
        for source, edge in zip(
            sources, candidates.reduction if reduces else candidates.normal, strict=True
        ):
            stride = 2 if reduces and source < 2 else 1
            total += sum(primitive_weights(name, seen, stride) for name in edge)
        return total

    widths = list(_widths(layers, how.channels))
    reductions = reduction_layers(layers)
    cells = sum(mixed(layer in reductions, channels) for layer, channels in enumerate(widths))
    inputs = _preprocessing(widths, how.nodes, STEM_MULTIPLIER * how.channels)
    return cells + inputs + how.nodes * widths[-1] * classes


def operations(how: Search) -> int:
    """Number of operations in a supernet; of P-DARTS's of the first stage."""
    candidates: Any = space_named(how.space).candidates(how)
    edges = candidates.cell if _has_sums(how) else candidates.normal
    return search_stages(how)[0].layers * len(edges) * min(map(len, edges))


def _plays(how: Search) -> bool:
    """Whether a generator and a discriminator play."""
    return how.method == "lfmcw" and not how.draws_real


@cache
def primitive_weights(name: str, channels: int, stride: int) -> int:
    """Number of weights of a primitive on one edge of a supernet."""
    if name == "none":
        return 0
    with torch.device("meta"):  # nothing is allocated
        layer = make_operation(name, min(channels, WIDEST), stride, OperationStyle())
    return sum(parameter.numel() for parameter in layer.parameters())


def generator_weights(how: Generator) -> int:
    """Number of a generator's weights, at least: a linear layer to 3×3 pixels, two convolutions."""
    return 9 * how.noise_dim * how.channels + 18 * how.channels**2


def network_weights(recipe: Recipe, image_channels: int, classes: int) -> int:
    """Number of a derived network's weights, at least, whatever its cells are."""
    how, nodes = recipe.evaluation, recipe.search.nodes
    if _has_sums(recipe.search):
        return 9 * how.channels * image_channels + _sum_skeleton(how.channels, classes)
    widths = list(_widths(how.layers, how.channels))
    stem = how.channels * (STEM_MULTIPLIER if how.stem == "cifar" else 1)
    inputs = _preprocessing(widths, nodes, stem)
    return 9 * stem * image_channels // 2 + inputs + nodes * widths[-1] * classes


def _widths(layers: int, channels: int) -> Iterator[int]:
    """Channels of a node of each cell: doubled where the resolution is halved."""
    reductions = reduction_layers(layers)
    for layer in range(layers):
        yield channels * 2 ** sum(layer >= reduction for reduction in reductions)


def _preprocessing(widths: list[int], nodes: int, stem: int) -> int:
    """Weights of the 1×1 convolutions that bring both inputs of each cell to its channels."""
    outputs = [stem, stem, *(nodes * channels for channels in widths)]
    return sum(
        (outputs[layer] + outputs[layer + 1]) * channels for layer, channels in enumerate(widths)
    )


def _outputs(layers: int, nodes: int, channels: int, stem: str, image_size: int) -> int:
    """Numbers in the outputs of all cells for an image, which a backward pass needs."""
    reductions = reduction_layers(layers)
    side = image_size if stem == "cifar" else image_size // 8
    total = 0
    for layer, width in enumerate(_widths(layers, channels)):
        halvings = sum(layer >= reduction for reduction in reductions)
        total += nodes * width * (side // 2**halvings) ** 2
    return total


# ------------------------------ cells whose nodes are sums


def _has_sums(how: Search) -> bool:
    return space_named(how.space).network_of == SUMS


def _sum_supernet_weights(how: Search, classes: int) -> int:
    edges: Any = space_named(how.space).candidates(how)
    cells = sum(
        how.layers // STAGES * len(edges.cell) * primitive_weights(name, how.channels << stage, 1)
        for stage in range(STAGES)
        for name in edges.cell[0]
    )
    return cells + _sum_skeleton(how.channels, classes)


def _sum_skeleton(channels: int, classes: int) -> int:
    """Weights of what leads from stage to stage, and of the classifier."""
    widths = [channels << stage for stage in range(STAGES)]
    # Convolutions of 3×3 to twice the channels and of these, and one of 1×1 beside them.
    reductions = sum((9 * 2 + 9 * 4 + 2) * width**2 for width in widths[:-1])
    return reductions + widths[-1] * classes


def _sum_outputs(layers: int, states: int, channels: int, image_size: int) -> int:
    """Numbers in so many states of each cell for an image, in three stages of half the side."""
    maps = ((channels << stage) * (image_size >> stage) ** 2 for stage in range(STAGES))
    return layers // STAGES * states * sum(maps)


def _batch(examples: int) -> int:
    """Examples of a batch that this process works on."""
    return examples // int(os.environ.get("WORLD_SIZE", "1"))


def _bytes(precision: str | None) -> int:
    return FLOAT if precision is None else 2


def _value(recipe: Recipe, key: str) -> int | None:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value  # type: ignore[no-any-return]


def _may_be_small(recipe: Recipe, key: str) -> bool:
    """Whether the space allows few nodes: some have candidates for each edge of a cell."""
    if key != "search.nodes":
        return True
    try:
        space_named(recipe.search.space).candidates(_with(recipe, key).search)
    except ValueError:
        return False
    return True


def _with(recipe: Recipe, key: str) -> Recipe:
    """The recipe with a small value of a key. It is not validated, because it is never run."""
    *sections, last = key.split(".")
    parts: list[Any] = [recipe]
    for name in sections:
        parts.append(getattr(parts[-1], name))
    # (A cell of sums has a state beside its input.)
    smallest = 2 if key == "search.nodes" and _has_sums(recipe.search) else SMALLEST[key]
    changed = parts.pop().model_copy(update={last: smallest})
    for part, name in zip(reversed(parts), reversed(sections), strict=True):
        changed = part.model_copy(update={name: changed})
    return changed  # type: ignore[no-any-return]
