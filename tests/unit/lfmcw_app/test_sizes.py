"""What a recipe takes at least: never more than it does, and enough to refuse what cannot fit."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app import sizes
from lfmcw_app.errors import InputError
from lfmcw_app.generators import GAMES
from lfmcw_app.names import PRESETS
from lfmcw_app.recipe import SPACES
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.sizes import (
    check_sizes,
    generator_weights,
    least_memory,
    network_weights,
    supernet_weights,
)
from lfmcw_app.stages import search_stages

CPU = torch.device("cpu")
SHAPES = {"cifar10": (32, 3, 10), "imagenet": (224, 3, 1000)}
CHECKED = [name for name in SPACES if SPACES[name].network_of in ("darts", "nasbench201")]
"""Spaces whose cells the arithmetic is for; others are not checked."""

PAIRS = [
    (space, dataset)
    for space in CHECKED
    for dataset in SHAPES
    if (SPACES[space].network_of, dataset) != ("nasbench201", "imagenet")  # its stem is another
]


def counted(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("space", "dataset"), PAIRS)
@pytest.mark.parametrize("preset", ["smoke", "paper"])
def test_weights_are_never_overestimated(preset, space, dataset):
    recipe = load_recipe(preset, space=space, overrides={"dataset": dataset})
    how, trained = recipe.search, recipe.evaluation
    _, channels, classes = SHAPES[dataset]
    entry = SPACES[space]
    genotype = entry.random(how, 0)
    with torch.device("meta"):  # nothing is allocated
        supernet = entry.supernet(
            how,
            entry.candidates(how),
            layers=search_stages(how)[0].layers,
            in_channels=channels,
            num_classes=classes,
            style=OperationStyle(),
        )
        network = entry.network(
            genotype,
            in_channels=channels,
            num_classes=classes,
            channels=trained.channels,
            layers=trained.layers,
            auxiliary=False,
            stem=trained.stem,
        )
    assert 0.9 < supernet_weights(how, classes) / counted(supernet) <= 1.0
    least = 0.05 if entry.network_of == "nasbench201" else 0.15  # its cells may be empty
    assert least < network_weights(recipe, channels, classes) / counted(network) <= 1.0


@pytest.mark.parametrize("image_size", [8, 12, 16, 32])
@pytest.mark.parametrize("game", GAMES)
def test_a_generator_is_never_overestimated(game, image_size):
    settings = {"search.generator.name": game, "search.generator.channels": 16}
    how = load_recipe("small", overrides=settings).search.generator
    with torch.device("meta"):
        generator = GAMES[game].generator(
            num_classes=2, image_size=image_size, image_channels=1, mean=(0.5,), std=(0.5,),
            noise_dim=how.noise_dim, channels=how.channels,
        )  # fmt: skip
    assert 0.01 < generator_weights(how) / counted(generator) <= 1.0


@pytest.mark.parametrize(("space", "dataset"), PAIRS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_recipe_passes_with_eight_gigabytes(monkeypatch, preset, dataset, space):
    recipe = load_recipe(preset, space=space, overrides={"dataset": dataset})
    monkeypatch.setattr(sizes, "memory_of", lambda device: 8 * 10**9)
    size, channels, classes = SHAPES[dataset]
    check_sizes(
        recipe,
        image_size=size,
        image_channels=channels,
        classes=classes,
        device=CPU,
        searches=True,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("search.channels", 10**6),
        ("search.batch_size", 10**9),
        ("search.generator.channels", 10**6),
        ("search.generator.noise_dim", 10**9),
        ("evaluation.channels", 10**6),
        ("evaluation.batch_size", 10**9),
        ("data.image_size", 10**6),
    ],
)
@pytest.mark.parametrize("space", ["darts", "nasbench201"])
def test_what_cannot_fit_is_refused_by_its_key(monkeypatch, space, key, value):
    monkeypatch.setattr(sizes, "memory_of", lambda device: 64 * 10**9)
    recipe = load_recipe("smoke", space=space, overrides={key: value})
    size = value if key == "data.image_size" else 16
    with pytest.raises(InputError, match=rf"^{key} is {value:,}, .*64 GB. Lower {key}\.$"):
        check_sizes(recipe, image_size=size, device=CPU, searches=True)


@pytest.mark.parametrize(
    ("space", "settings", "key"),
    [
        ("darts", {"search.channels": 9 * 10**15}, "search.channels"),
        ("darts", {"search.nodes": 64, "search.layers": 1000}, "search.nodes"),
        ("pcdarts", {"search.nodes": 64, "search.layers": 1000}, "search.nodes"),
        ("s1", {"search.channels": 9 * 10**15}, "search.channels"),
        ("nasbench201", {"search.channels": 9 * 10**15}, "search.channels"),
        (
            "darts",
            {
                "search.generator.warmup_rounds": 1,
                "search.generator.warmup_discriminator_channels": 10**6,
            },
            "search.generator.warmup_discriminator_channels",
        ),
    ],
)
def test_what_could_not_even_be_built_is_refused(monkeypatch, space, settings, key):
    monkeypatch.setattr(sizes, "memory_of", lambda device: 16 * 10**9)
    recipe = load_recipe("smoke", space=space, overrides=settings)
    with pytest.raises(InputError, match=rf"^{key} is .* of memory .*Lower {key}\.$"):
        check_sizes(recipe, image_size=16, device=CPU, searches=True)


def test_the_objects_of_operations_count(monkeypatch):
    """64 nodes have 2,144 edges of 8 operations: in three supernets of 9 cells 463,104."""
    recipe = load_recipe("smoke", overrides={"search.nodes": 64, "search.layers": 9})
    least = least_memory(recipe, 16, 1, 10, searches=True)["search"]
    monkeypatch.setattr(sizes, "MODULE_BYTES", 0)
    of_objects = least - least_memory(recipe, 16, 1, 10, searches=True)["search"]
    assert of_objects == 3 * 9 * 2144 * 8 * 1000


def test_only_what_is_run_counts(monkeypatch):
    monkeypatch.setattr(sizes, "memory_of", lambda device: 64 * 10**9)
    recipe = load_recipe("smoke", overrides={"search.channels": 10**6})
    check_sizes(recipe, image_size=16, device=CPU, searches=False)
    monkeypatch.setattr(sizes, "memory_of", lambda device: None)  # not known: nothing is refused
    check_sizes(recipe, image_size=16, device=CPU, searches=True)


def test_a_search_without_a_game_holds_no_players():
    """Neither a generator, nor the trunk of a discriminator with its optimizer."""
    needed = {}
    for name in ("dcgan", "real"):
        how = {"search.generator.name": name, "search.generator.channels": 10**4}
        recipe = load_recipe("smoke", overrides=how)
        needed[name] = least_memory(recipe, 16, 1, 10, searches=True)["search"]
    assert needed["real"] < 0.1 * needed["dcgan"]


def test_a_batch_is_shared_by_the_processes(monkeypatch):
    recipe = load_recipe("smoke", overrides={"evaluation.batch_size": 4096})
    alone = least_memory(recipe, 16, 1, 10, searches=False)["training"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = least_memory(recipe, 16, 1, 10, searches=False)["training"]
    assert 3.5 < alone / shared < 4.0
