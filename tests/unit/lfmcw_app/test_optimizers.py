"""Optimizers take the implementation of their step that suits the device."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import search_split
from lfmcw_app.optimizers import step_options
from lfmcw_app.problems import build_search
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.testing import noise_dataset


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 3e-4}),
        (torch.optim.Adam, {"lr": 1e-3, "betas": (0.5, 0.999), "weight_decay": 1e-3}),
    ],
)
def test_on_a_cpu_the_step_has_the_bits_of_the_plain_one(kind, options):
    """On a CPU the chosen step gives the bits of the plain one."""

    def moved(**more):
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 4), (7,), (2, 3, 3, 3)] * 5
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        parameters = [torch.nn.Parameter(tensor) for tensor in drawn]
        optimizer = kind(parameters, **options, **more)
        for _ in range(5):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return parameters

    chosen = step_options("cpu")
    assert chosen == {"foreach": True}
    assert all(map(torch.equal, moved(**chosen), moved(foreach=False)))


def test_on_a_gpu_all_parameters_move_in_few_kernels():
    """On CUDA the fused step is taken; on a device of neither kind, PyTorch chooses."""
    assert step_options("cuda:1") == {"fused": True}
    assert step_options("meta") == {}


def test_every_optimizer_of_a_search_has_the_options():
    """Every optimizer of a search has the options of its device."""
    recipe, dataset = load_recipe("smoke"), noise_dataset(per_class=24)
    train, validation = search_split(dataset, None, 0, (0.5, 0.5))
    optimizer = build_search(
        recipe, dataset, train, validation, build_modules(recipe.search, dataset)
    )
    for problem in optimizer.problems.values():
        for moving in problem.optimizers.values():
            assert moving.defaults["foreach"] is True
