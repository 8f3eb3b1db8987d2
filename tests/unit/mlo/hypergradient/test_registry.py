"""Engines by name: configuration, registrations of third parties, and what is refused."""

from __future__ import annotations

import pytest

import mlo
from mlo.testing import diamond


def test_engines_are_chosen_by_name_mapping_object_and_problem():
    problems = diamond().problems
    optimizer = mlo.MultilevelOptimizer(
        problems,
        hypergradient={
            "default": "darts",
            "gan": "first_order",
            "w2": {"name": "direct", "damping": 0.1},
            "w1": mlo.OneStep(),
        },
    )
    assert optimizer.engines["gan"] == mlo.FirstOrder()
    assert optimizer.engines["w2"] == mlo.Direct(damping=0.1)
    assert optimizer.engines["w1"] == mlo.OneStep()
    assert optimizer.engines["arch"] == mlo.darts()


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("dart", ["dart", "Did you mean 'darts'"]),
        ({"default": "darts", "w3": "direct"}, ["'w3'", "Did you mean"]),
        ({"name": "direct", "dampening": 1.0}, ["'direct'", "dampening", "mean 'damping'"]),
        ({"name": "cg", "cg_iterations": 3}, ["cg_iterations", "Its options: "]),
        ({"name": "direct", "products": "autograds"}, ["autograds", "Did you mean 'autograd'"]),
        (3, ["int"]),
        ({"w1": 3}, ["3"]),
    ],
)
def test_a_wrong_engine_is_refused_with_the_nearest_name(choice, words):
    with pytest.raises(mlo.EngineError) as caught:
        mlo.MultilevelOptimizer(diamond().problems, hypergradient=choice)
    assert all(word in str(caught.value) for word in words)


def test_a_third_party_engine_registers_by_name(monkeypatch):
    from mlo.hypergradient import registry

    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    mlo.register_engine("mine", lambda strength=1.0: mlo.Direct(damping=strength))
    assert mlo.engine_from({"name": "mine", "strength": 2.0}) == mlo.Direct(damping=2.0)
    with pytest.raises(mlo.EngineError, match="registered already"):
        mlo.register_engine("mine", mlo.Direct)


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (mlo.FirstOrder, "Its options: none"),
        (lambda strength=1.0: mlo.Direct(damping=strength), "Its options: strength"),
        (lambda **options: mlo.Direct(**options), "Its documentation lists them"),
        (zip, "Its documentation lists them"),  # has no signature
    ],
)
def test_an_unknown_option_is_told_those_that_there_are(factory, options, monkeypatch):
    from mlo.hypergradient import registry

    monkeypatch.setitem(registry._FACTORIES, "mine", factory)
    with pytest.raises(mlo.EngineError, match=rf"'mine' does not take .*maxiter.*\. {options}\."):
        mlo.engine_from({"name": "mine", "maxiter": 3})


def test_an_installed_package_offers_engines_by_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    from mlo.hypergradient import registry

    points = [
        EntryPoint("theirs", "mlo.hypergradient:Direct", registry.ENTRY_POINTS),
        EntryPoint("broken", "no_such_package:Engine", registry.ENTRY_POINTS),
        EntryPoint("cg", "mlo.hypergradient:Direct", registry.ENTRY_POINTS),
    ]
    monkeypatch.setattr(
        registry, "entry_points", lambda group: points if group == registry.ENTRY_POINTS else []
    )
    assert "theirs" in mlo.available_engines()
    assert mlo.engine_from({"name": "theirs", "damping": 2.0}) == mlo.Direct(damping=2.0)
    assert isinstance(mlo.engine_from("cg"), mlo.ConjugateGradient)
    with pytest.raises(
        mlo.EngineError, match="'broken' of no_such_package:Engine could not be imported"
    ):
        mlo.engine_from("broken")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("conjugate_gradient", "cg"),
        ("ConjugateGradient", "cg"),
        ("NormalConjugateGradient", "normal_cg"),
        ("ift", "cg"),
        ("implicit", "cg"),
        ("unrolled", "unroll"),
        ("ITD", "unroll"),
        ("finite-difference", "darts"),
        ("jacobian free", "identity"),
        ("neuman", "neumann"),
    ],
)
def test_a_methods_usual_name_suggests_its_engine(given, meant):
    with pytest.raises(mlo.EngineError, match=rf"{given!r}\. Did you mean {meant!r}\?"):
        mlo.engine_from(given)


def test_every_usual_name_suggests_an_engine_and_is_none():
    from mlo.hypergradient import products, registry

    assert set(registry.OTHER_NAMES.values()) <= set(registry._FACTORIES)
    assert set(products.OTHER_PRODUCTS.values()) <= set(products._PRODUCTS)
    for other in registry.OTHER_NAMES:
        assert other == "".join(filter(str.isalnum, other.lower()))
        assert other not in mlo.available_engines()


def test_the_usual_name_of_exact_products_suggests_autograd():
    with pytest.raises(mlo.EngineError, match=r"'exact'\. Did you mean 'autograd'"):
        mlo.engine_from({"name": "cg", "products": "exact"})
