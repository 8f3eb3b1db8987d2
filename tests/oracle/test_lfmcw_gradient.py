"""The architecture's gradient of a tiny, real LFM-CW instance against Eqs. 6-10 differentiated as
one plain program.
"""

from __future__ import annotations

import copy

import pytest
import torch
from gradient_of_update import gradient_of_next_round
from naive_lfmcw import architecture_gradient

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset, search_places
from lfmcw_app.gradient_terms import PATHS, gradient_terms
from lfmcw_app.problems import build_search
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.cell import edge_count
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.pdarts import set_skip_drop_probability
from mlo.testing import check_gradient_changes_nothing, relative_error

SMOOTH = ("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")
FEW = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")
"""One primitive of each kind: what is compared does not depend on how many there are, its cost
does."""


def make(
    *,
    candidates=None,
    primitives=FEW,
    activation="relu",
    engine="one_step",
    grad_clip=None,
    batch_size=12,
    **search,
):
    if primitives is not None:
        search["primitives"] = list(primitives)
    recipe = load_recipe(
        "smoke",
        overrides={
            "search.channels": 4,
            "search.nodes": 2,
            "search.batch_size": batch_size,
            "search.lambda": 0.7,
            "search.hypergradient": engine,
            "search.weights.grad_clip": grad_clip,
            "search.generator.channels": 4,
            "search.generator.noise_dim": 6,
            **{f"search.{key}": value for key, value in search.items()},
        },
    )
    torch.manual_seed(3)
    dataset = load_dataset("digits")
    first, second = search_places(dataset, 200, seed=1)
    train, validation = dataset.train[first], dataset.train[second]
    places = torch.arange(len(dataset.train))
    unused = dataset.train[~torch.isin(places, torch.cat([first, second]))]
    modules = build_modules(
        recipe.search, dataset, candidates=candidates, activation=activation, dtype=torch.float64
    )
    with torch.no_grad():  # away from α = 0, where all primitives are mixed alike
        for parameter in modules.arch.parameters():
            parameter.mul_(500.0)
    optimizer = build_search(
        recipe, dataset, train, validation, modules, unused=unused, dtype=torch.float64
    )
    return recipe, modules, optimizer


def oracle(recipe, modules, optimizer):
    """The naive gradient from the current state; the copies keep it from touching anything of the
    optimizer's.
    """
    w2 = optimizer.problems["w2"]
    training = w2.data if modules.w1 is None else w2.data._streams[0]
    validation = optimizer.problems["arch"].data
    batches = training.batch(w2.data.position) + validation.batch(validation.position)
    if recipe.search.draws_real:
        batches += w2.data._streams[2].batch(w2.data.position)[:1]
    with torch.random.fork_rng():
        copies = copy.deepcopy(modules)
        # The optimizers' state is keyed by the live parameters, so the formulas read it from the
        # live problems.
        search = recipe.search
        return architecture_gradient(
            copies,
            optimizer.problems,
            batches,
            search.lam,
            synthetic_only=search.synthetic_only,
            game=search.generator.name,
        )


@pytest.mark.parametrize(
    "grad_clip",
    [pytest.param(None, id="unclipped"), pytest.param(0.5, id="clipped", marks=pytest.mark.slow)],
)
def test_one_step_equals_the_equations_differentiated_naively(grad_clip):
    recipe, modules, optimizer = make(grad_clip=grad_clip, primitives=None)
    expected = oracle(recipe, modules, optimizer)
    assert relative_error(optimizer.gradient("arch"), expected) < 1e-9


def test_the_update_of_a_round_uses_the_same_gradient():
    """So it is with momentum and the state of Adam."""
    recipe, modules, optimizer = make()
    for _ in range(2):
        optimizer.step()
    expected = oracle(recipe, modules, optimizer)
    assert relative_error(gradient_of_next_round(optimizer), expected) < 1e-9


def test_the_gradient_is_exact_without_some_classes():
    """Classes missing from a batch keep their running loss and an exact gradient."""
    recipe, modules, optimizer = make(batch_size=4)  # at most four of ten classes are present
    optimizer.step()
    expected = oracle(recipe, modules, optimizer)
    assert relative_error(gradient_of_next_round(optimizer), expected) < 1e-9


@pytest.mark.parametrize(
    "search", [{"method": "darts"}, {"synthetic_only": True}], ids=["plain DARTS", "Eq. 19"]
)
@pytest.mark.parametrize("rounds", [0, 2])
def test_the_baseline_and_the_ablation_equal_their_own_equations(search, rounds):
    recipe, modules, optimizer = make(**search)
    list(optimizer.run(rounds))
    expected = oracle(recipe, modules, optimizer)
    assert relative_error(gradient_of_next_round(optimizer), expected) < 1e-9


@pytest.mark.parametrize("method", ["lfmcw", "darts"])
@pytest.mark.parametrize("rounds", [0, 2])
def test_an_architecture_that_moves_first_looks_ahead(method, rounds):
    """An architecture that moves first looks at the step that comes."""
    recipe, modules, optimizer = make(method=method, **{"architecture.moves_first": True})
    list(optimizer.run(rounds))
    expected = oracle(recipe, modules, optimizer)
    assert (
        relative_error(
            optimizer.gradient("arch") if rounds == 0 else gradient_of_next_round(optimizer),
            expected,
        )
        < 1e-9
    )


def left_by_a_stage():
    """Different primitives on every edge, as a stage of P-DARTS leaves them."""
    kept = [DARTS_PRIMITIVES[1 + k % 4 :][:3] for k in range(edge_count(2))]
    return Candidates(normal=tuple(kept), reduction=tuple(reversed(kept)))


@pytest.mark.parametrize("method", ["lfmcw", "darts"])
@pytest.mark.parametrize("space", ["pdarts", "pcdarts", "s4"])
def test_every_space_equals_the_equations(space, method):
    """With the dropout of P-DARTS, and the noise of S4, drawn in the same order."""
    options = {"space": space, "method": method}
    options |= {"candidates": left_by_a_stage()} if space == "pdarts" else {}
    options |= {"primitives": None} if space != "pcdarts" else {}
    recipe, modules, optimizer = make(**options)
    if space == "pdarts":
        for module in modules:
            if module is not None:
                set_skip_drop_probability(module, 0.3)
    optimizer.step()
    expected = oracle(recipe, modules, optimizer)
    assert relative_error(gradient_of_next_round(optimizer), expected) < 1e-9
    names = {"normal", "reduction"} | (
        {"normal_edges", "reduction_edges"} if space == "pcdarts" else set()
    )
    assert set(expected) == names
    assert all(bool(part.any()) for part in expected.values())


@pytest.mark.parametrize("norm", [None, "instance"], ids=["usual norm", "instance norm"])
@pytest.mark.parametrize("game", ["wgan_gp", "biggan"])
def test_every_generator_equals_the_equations(game, norm):
    options = {
        "generator.name": game,
        "generator.discriminator_norm": norm,
        "generator.noise_dim": 8,
    }
    recipe, modules, optimizer = make(**options)
    optimizer.step()
    expected = oracle(recipe, modules, optimizer)
    assert relative_error(gradient_of_next_round(optimizer), expected) < 1e-9


@pytest.mark.parametrize("only", [False, True], ids=["Eq. 3", "Eq. 19"])
def test_real_images_equal_the_equations_without_a_game(only):
    """With generator real there is no problem gan, and A's routes run through W1 and W2 alone."""
    recipe, modules, optimizer = make(**{"generator.name": "real", "synthetic_only": only})
    assert modules.gan is None and list(optimizer.problems) == ["w1", "w2", "arch"]
    optimizer.step()
    expected = oracle(recipe, modules, optimizer)
    assert relative_error(gradient_of_next_round(optimizer), expected) < 1e-9


def test_class_weights_lead_from_a_through_w1_with_real_images():
    """A → W1 → W2 has its part of the gradient; with λ = 0 it has none."""
    for lam, flows in ((0.7, True), (0.0, False)):
        _, _, optimizer = make(**{"generator.name": "real", "lambda": lam})
        terms = gradient_terms(optimizer)
        assert tuple(terms) == ("direct", "w2", "w1_w2")
        assert (terms["w1_w2"]["norm"] > 0.0) == flows


def test_generators_and_spaces_go_together():
    options = {
        "space": "pcdarts",
        "generator.name": "wgan_gp",
        "synthetic_only": True,
        "generator.noise_dim": 8,
    }
    recipe, modules, optimizer = make(**options)
    optimizer.step()
    expected = oracle(recipe, modules, optimizer)
    assert relative_error(gradient_of_next_round(optimizer), expected) < 1e-9


def test_first_order_keeps_the_direct_gradient():
    """Plain DARTS has two problems; first order keeps the direct gradient."""
    _, modules, optimizer = make(method="darts", order="first")
    assert list(optimizer.problems) == ["w2", "arch"]
    assert modules.w1 is modules.gan is None
    assert optimizer.step().solves == {}


@pytest.mark.slow
def test_the_parts_of_the_gradient_add_up_and_each_path_has_one():
    # The round moves both architectures to the same place: nowhere.
    still = {"architecture.lr": 1e-30}
    *_, optimizer = make(**still)
    optimizer.step()
    terms = gradient_terms(optimizer)
    assert tuple(terms) == PATHS
    total = torch.cat([part.flatten() for part in optimizer.gradient("arch").values()])
    assert all(term["norm"] > 0 for term in terms.values())
    # Σ_path ‖part‖ cos(part, total) is the projection of the total on itself.
    assert sum(term["norm"] * term["cosine"] for term in terms.values()) == pytest.approx(
        float(total.norm()), rel=1e-9
    )
    cut = copy.deepcopy(terms)
    *_, other = make(engine={"default": "one_step", "gan": "first_order"}, **still)
    other.step()
    without = gradient_terms(other)
    assert without["gan_w2"]["norm"] == 0
    assert without["w1_w2"]["norm"] == pytest.approx(cut["w1_w2"]["norm"], rel=1e-9)


def test_the_architecture_rests_while_only_weights_move():
    _, modules, optimizer = make(**{"architecture.warmup_epochs": 1})
    before = modules.arch.normal.detach().clone()
    per_epoch = optimizer.problems["w1"].data.per_epoch
    records = list(optimizer.run(per_epoch + 1))
    assert all("arch" not in record.losses for record in records[:-1])
    assert "arch" in records[-1].losses
    assert not torch.equal(modules.arch.normal, before)


@pytest.mark.slow
def test_darts_agrees_with_one_step_on_a_smooth_network():
    *_, exact = make(primitives=list(SMOOTH), activation="silu")
    *_, difference = make(primitives=list(SMOOTH), activation="silu", engine="darts")
    assert relative_error(difference.gradient("arch"), exact.gradient("arch")) < 1e-3


def test_every_route_contributes():
    """Cutting any one of the routes through w2, w1 and gan changes the gradient."""
    *_, optimizer = make()
    full = optimizer.gradient("arch")
    for cut in ("w1", "gan", "w2"):
        *_, other = make(engine={"default": "one_step", cut: "first_order"})
        assert relative_error(other.gradient("arch"), full) > 1e-6


def test_gradient_changes_nothing():
    *_, optimizer = make()
    check_gradient_changes_nothing(optimizer, "arch")


def test_each_inverse_product_is_done_once_per_round():
    *_, optimizer = make()
    assert sorted(optimizer.step().solves) == ["gan", "w1", "w2"]
