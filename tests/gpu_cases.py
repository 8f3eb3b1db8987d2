"""What is run on a GPU, a real one or a pretended one."""

from __future__ import annotations

import torch

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset, search_split
from lfmcw_app.problems import build_search
from lfmcw_app.recipe_loading import load_recipe

SMOOTH = ("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")
"""Without ReLU and max pooling, where a rounding chooses another branch."""


def search(device, dtype=torch.float64, **options):
    """The search of a small recipe on digits."""
    recipe = load_recipe(
        "smoke",
        overrides={
            "search.channels": 4,
            "search.nodes": 1,
            "search.primitives": list(SMOOTH),
            "search.batch_size": 12,
            "search.generator.channels": 4,
            "search.generator.noise_dim": 6,
            **{f"search.{key}": value for key, value in options.items()},
        },
    )
    torch.manual_seed(3)
    dataset = load_dataset("digits", image_size=8)
    train, validation = search_split(dataset, 200, seed=1)
    # The initial values are drawn on the CPU.
    modules = build_modules(recipe.search, dataset, activation="silu", device=device, dtype=dtype)
    return build_search(recipe, dataset, train, validation, modules, device=device, dtype=dtype)


def on_device(closed, device):
    """Brings a problem in closed form to a device, with what its losses have closed over."""
    for problem in closed.problems:
        problem.module.to(device)
        _brought(problem.loss, device)
    return closed


def _brought(value, device):
    """A tensor, the values of a dict, or a function, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _brought(entry, device) for key, entry in value.items()}
    for cell in getattr(value, "__closure__", None) or ():
        cell.cell_contents = _brought(cell.cell_contents, device)
    return value
