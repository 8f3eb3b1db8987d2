"""Compiled searches compute what the others do, and compile once."""

from __future__ import annotations

import shutil

import pytest
import torch

from lfmcw_app.build_modules import build_modules
from lfmcw_app.compilation import compile_discriminator, compile_options
from lfmcw_app.data import search_split
from lfmcw_app.errors import InputError
from lfmcw_app.problems import build_search
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.cell import Cell
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.testing import noise_dataset
from mlo.testing import relative_error

SMALL = {
    "primitives": ["skip_connect", "sep_conv_3x3"],
    "nodes": 1,
    "layers": 3,
    "channels": 4,
    "batch_size": 4,
    "generator.channels": 4,
    "architecture.warmup_epochs": 0,
}


def recipe_of(*, space="darts", **options):
    overrides = {f"search.{key}": value for key, value in options.items()}
    return load_recipe("smoke", space=space, overrides=overrides)


def rounds(count, **options):
    """The parameters after each of some rounds, and how often the compiler was called until it."""
    recipe, dataset = recipe_of(**SMALL, **options), noise_dataset()
    # Here, since the import takes seconds.
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    train, validation = search_split(dataset, None, 0, (0.5, 0.5))
    modules = build_modules(recipe.search, dataset, activation="silu")
    optimizer = build_search(recipe, dataset, train, validation, modules)
    for _ in range(count):
        optimizer.step()
        parameters = {
            f"{name}/{key}": value.detach().clone()
            for name, problem in optimizer.problems.items()
            for key, value in problem.parameters.items()
        }
        yield parameters, counters["stats"]["unique_graphs"]


# ------------------------------ what is compiled


def test_nothing_is_compiled_by_default():
    recipe = recipe_of(**SMALL)
    assert compile_options(recipe.search) == {}
    modules = build_modules(recipe.search, noise_dataset())
    assert compile_discriminator(recipe.search, modules) == {}
    assert modules.gan.discriminator._compiled_call_impl is None


@pytest.mark.parametrize(
    ("game", "compiled"),
    [
        # Imports the compiler, which takes seconds.
        pytest.param("dcgan", True, marks=pytest.mark.slow),
        ("wgan_gp", False),
    ],
)
def test_a_discriminator_whose_gradient_is_penalized_is_not(game, compiled):
    """A discriminator whose gradient is part of a loss stays as it is."""
    recipe = recipe_of(**SMALL, **{"order": "first", "compile": "eager", "generator.name": game})
    modules = build_modules(recipe.search, noise_dataset())
    options = compile_discriminator(recipe.search, modules)
    assert bool(options) is compiled
    assert (modules.gan.discriminator._compiled_call_impl is not None) is compiled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "second"}, "engine 'one_step': compiled modules have no second derivatives"),
        ({"order": "second", "hypergradient": {"w2": "darts"}}, "the engine 'one_step'"),
        (
            {"order": "second", "hypergradient": {"default": "darts", "w2": "neumann"}},
            "the engine 'neumann'",
        ),
        ({"order": "first", "checkpointing": True}, "checkpointing"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options, message):
    """Second derivatives, and cells that run again, are refused."""
    with pytest.raises(InputError, match=message):
        recipe_of(compile="inductor", **options)


def test_supernets_that_change_with_every_epoch_are_refused():
    recipe = recipe_of(compile="inductor", order="first", space="pdarts")
    with pytest.raises(InputError, match="skip_dropout"):
        compile_options(recipe.search)


def test_finite_differences_of_every_problem_can_be_compiled():
    """Finite differences can be compiled, as the default engine and beside others of the kind."""
    for engine in ("darts", {"default": "darts"}, {"default": "darts", "w1": "first_order"}):
        recipe_of(compile="inductor", order="second", hypergradient=engine)


# ------------------------------ what it computes


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "darts", "order": "second", "hypergradient": "darts"},
        {"method": "lfmcw", "order": "first"},
    ],
    ids=["finite_differences", "lfmcw"],
)
def test_a_compiled_search_has_the_same_bits_and_compiles_once(options):
    """Rounds of a compiled search are those of a plain one; after the first nothing is compiled."""
    plain = list(rounds(5, **options))
    compiled = list(rounds(5, compile="eager", **options))
    assert all(graphs == 0 for _, graphs in plain)
    assert len({graphs for _, graphs in compiled}) == 1
    assert compiled[0][1] > 0
    for (one, _), (other, _) in zip(plain, compiled, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_cell_compiled_to_machine_code_has_its_gradients(tmp_path, monkeypatch):
    """A cell that inductor has compiled gives the gradients of the plain one."""
    # One cell: machine code of a supernet takes a processor minutes.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    cell = Cell(
        (4, 4),
        4,
        nodes=1,
        reduces=False,
        reduced_before=False,
        primitives=[("skip_connect", "dil_conv_3x3")] * 2,
        style=OperationStyle(),
    )
    (before, last), mixing = torch.randn(2, 2, 4, 8, 8), torch.rand(2, 2)
    inputs = {"before": before, "last": last, "mixing": mixing, **dict(cell.named_parameters())}

    def gradient():
        loss = cell(before, last, mixing).square().mean()
        found = torch.autograd.grad(loss, list(inputs.values()))
        return dict(zip(inputs, found, strict=True))

    for tensor in inputs.values():
        tensor.requires_grad_()
    plain = gradient()
    cell.compile(**compile_options(recipe_of(order="first", compile="inductor").search))
    assert relative_error(gradient(), plain) < 1e-4
