"""Hypergradients on problems that nobody here invented, against closed forms and dense oracles.

* BOLIB, the Bilevel Optimization LIBrary (Zhou, Zemkoho and Tin, version 2): the problems without
  lower-level constraints. * The families of the bilevel benchmark of benchopt: simulated
  quadratics, one regularisation strength per feature of a logistic regression, and data cleaning.

A hypergradient passes by its error, its direction (cosine) and its scale (ratio of norms) each.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlo
from mlo.testing import Vector, relative_error

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def frozen(module):
    """An optimizer that leaves a module where it is."""
    return torch.optim.SGD(module.parameters(), lr=0.0)


def assert_agrees(found, exact, bound):
    """Gates error, direction and scale: an error below `bound` makes 1 − cosine at most bound² / 2
    and rounding.
    """
    assert relative_error(found, exact) < bound
    assert (
        1.0 - float(F.cosine_similarity(found.flatten(), exact.flatten(), dim=0)) < bound**2 + 1e-14
    )
    assert float(found.norm() / exact.norm()) == pytest.approx(1.0, abs=bound)


# ------------------------------ BOLIB
#
# Formulas and best known values are those of the library's m-files and of its table
# InfomAllExamp.m, and the same in the independent BOLIB.jl. LuDebSinha2016f is left out: the table
# has no value for it (NaN), its lower solution y = 2.5 does not depend on x, and its optimum lies
# on the upper level's constraints.


def henrion_surowiec_2011(c):
    """F = x² + c y, f = (y / 2 − x) y, so y* = x."""
    return lambda x, y: x**2 + c * y, lambda x, y: (y / 2 - x) * y


def lampariello_sagratella_2017_ex_32():
    """F = x² + y², f = (x + y − 1)², so y* = 1 − x."""
    return lambda x, y: x**2 + y**2, lambda x, y: (x + y - 1) ** 2


def macal_hurter_1997():
    """F = (x − 1)² + (y − 1)², f = y² / 2 + 500 y − 50 x y, so y* = 50 x − 500."""
    return lambda x, y: (x - 1) ** 2 + (y - 1) ** 2, lambda x, y: 0.5 * y**2 + 500 * y - 50 * x * y


# Name → problem, best known F and f, the minimiser x, the learning rate below, the optimizer above,
# rounds. HenrionSurowiec2011 is a family in c. The library takes c = 0, where F does not depend on
# y at all; with y* = x, F = x² + c x has its minimum −c² / 4 at x = −c / 2 and f = −x² / 2 there
# (derived here, not published, for c = 1). MacalHurter1997: F = (x − 1)² + (50 x − 501)² is least
# at x = 25051 / 2501, where F = 81.32787 and f = −y² / 2 = −0.33593. BOLIB prints (81.327, −0.333),
# BASBLib (b_1998_04) (81.33, −0.336): f is the latter's.
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
BOLIB = {
    "HenrionSurowiec2011": (henrion_surowiec_2011(0.0), 0.0, 0.0, 0.0, 0.5, (SGD, 0.2), 20),
    "HenrionSurowiec2011 with c = 1": (
        henrion_surowiec_2011(1.0),
        -0.25,
        -0.125,
        -0.5,
        0.5,
        (SGD, 0.2),
        20,
    ),
    "LamparielloSagratella2017Ex32": (
        lampariello_sagratella_2017_ex_32(),
        0.5,
        0.0,
        0.5,
        0.3,
        (ADAM, 0.05),
        150,
    ),
    "MacalHurter1997": (macal_hurter_1997(), 81.327, -0.336, 25051 / 2501, 0.8, (SGD, 1e-4), 40),
}


@pytest.mark.parametrize("engine", ["direct", "cg"])
@pytest.mark.parametrize("name", BOLIB)
def test_bolib_reaches_the_published_optimum(name, engine):
    (upper, lower), best, lower_best, minimiser, lr, (above, upper_lr), rounds = BOLIB[name]
    # The library's starting point is (1, 1).
    x, y = (Vector(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    problems = [
        mlo.Problem(
            "y",
            module=y,
            optimizer=torch.optim.SGD(y.parameters(), lr=lr),
            loss=lambda y, _, *, x: lower(x.v, y.v).sum(),
            steps=10,
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=above(x.parameters(), lr=upper_lr),
            loss=lambda x, _, *, y: upper(x.v, y.v).sum(),
        ),
    ]
    for record in mlo.MultilevelOptimizer(problems, engine).run(rounds):
        assert all(report.converged for report in record.solves.values())
    at = x.v.detach(), y.v.detach()
    assert float(upper(*at)) == pytest.approx(best, abs=1e-3)
    assert float(lower(*at)) == pytest.approx(lower_best, abs=1e-3)
    assert float(at[0]) == pytest.approx(minimiser, abs=1e-2)


# ------------------------------ simulated quadratics


@lru_cache
def quadratic(condition, seed, inner=20, outer=15):
    """½ wᵀAw + wᵀCx + dᵀw below and ½ wᵀA'w + ½ xᵀBx + wᵀC'x + d'ᵀw + e'ᵀx above, at w* = −A⁻¹ (Cx
    + d).

    A has eigenvalues from 1 / condition to 1. The gradient is Bx + C'ᵀw + e' − Cᵀ A⁻¹ (A'w + C'x +
    d').
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def spd(dim, condition):
        basis, _ = torch.linalg.qr(normal(dim, dim))
        return (basis * torch.logspace(0, -1, dim, base=condition, dtype=torch.float64)) @ basis.T

    a, a_up, b = spd(inner, condition), spd(inner, 10.0), spd(outer, 10.0)
    c, c_up = normal(inner, outer) / outer**0.5, normal(inner, outer) / outer**0.5
    d, d_up, e_up, x0 = normal(inner), normal(inner), normal(outer), normal(outer)
    w0 = -torch.linalg.solve(a, c @ x0 + d)
    cotangent = a_up @ w0 + c_up @ x0 + d_up
    exact = b @ x0 + c_up.T @ w0 + e_up - c.T @ torch.linalg.solve(a, cotangent)

    def lower(w, _, *, x):
        return 0.5 * w.v @ a @ w.v + w.v @ (c @ x.v) + d @ w.v

    def upper(x, _, *, w):
        return (
            0.5 * w.v @ a_up @ w.v
            + 0.5 * x.v @ b @ x.v
            + w.v @ (c_up @ x.v)
            + d_up @ w.v
            + e_up @ x.v
        )

    w, x = Vector(w0), Vector(x0)
    problems = [
        mlo.Problem("w", module=w, optimizer=frozen(w), loss=lower),
        mlo.Problem("x", module=x, optimizer=frozen(x), loss=upper),
    ]
    return problems, exact


def hypergradient_and_report(problems, engine):
    optimizer = mlo.MultilevelOptimizer(problems, engine)
    gradient = optimizer.gradient("x")["v"]
    return gradient, optimizer.step().solves["w"]  # the learning rates are zero


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        *(
            (name, condition)
            for name in ("direct", "cg", "minres", "gmres", "nystrom")
            for condition in (1e1, 1e3, 1e5)
        ),
        ("neumann", 1e1),
        ("neumann", 1e3),
    ],
)
def test_converged_engines_equal_the_closed_form(name, condition):
    """Converged engines equal the closed form of simulated quadratics.

    Each engine, let run to its end. Rounding leaves about 1e-16 × condition; one leaves more.

    `neumann` leaves (1 − 1 / condition)^K of the component along the least eigenvector. At 1e3
    that is e⁻⁵ after 5000 terms, and at 1e5 it would take a million (see the next test for what
    it says of itself there).
    """
    engine, bound = {
        "direct": (mlo.Direct(), 1e-10),
        "cg": (mlo.ConjugateGradient(max_steps=200, tol=1e-12), 1e-10),
        "minres": (mlo.Minres(max_steps=200, tol=1e-12), 1e-10),
        "gmres": (mlo.Gmres(max_steps=60, tol=1e-12), 1e-10),
        "nystrom": (mlo.Nystrom(max_steps=60, tol=1e-12), 1e-10),
        "neumann": (
            mlo.Neumann(num_terms=300 if condition < 100 else 5000),
            1e-10 if condition < 100 else 2e-2,
        ),
    }[name]
    for seed in range(1 if name == "neumann" else 4):
        problems, exact = quadratic(condition, seed)
        gradient, report = hypergradient_and_report(problems, engine)
        assert report.converged == (report.residual <= 1e-6) and not report.failed
        assert report.converged or (name, condition) == ("neumann", 1e3)
        assert_agrees(gradient, exact, bound)


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "engine",
    [
        mlo.ConjugateGradient(max_steps=15),
        mlo.Minres(max_steps=15),
        mlo.Gmres(max_steps=15),
        mlo.Nystrom(rank=2, max_steps=5),
        mlo.Neumann(),
    ],
    ids=lambda engine: engine.name,
)
def test_engines_that_miss_an_ill_conditioned_solution_say_so(engine, seed):
    """At condition 1e5 with few products: q lies along the least eigenvectors, which a short Krylov
    space does not hold.

    In exact arithmetic 20 products would do in 20 dimensions; rounding takes the orthogonality of
    the directions of CG and MINRES, which need about 55. The terms of `neumann` shrink by 1 − 1e-5.
    """
    problems, exact = quadratic(1e5, seed)
    gradient, report = hypergradient_and_report(problems, engine)
    assert relative_error(gradient, exact) > 0.05
    assert not report.converged and (report.failed or report.engine == "neumann")
    assert float(F.cosine_similarity(gradient, exact, dim=0)) > 0.7  # short, but no other direction


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("name", ["direct", "cg", "minres", "gmres", "neumann", "nystrom"])
def test_a_small_reported_residual_bounds_the_error(name, condition):
    """‖q − q*‖ ≤ ‖A⁻¹‖ ‖residual‖, and ‖q*‖ ≥ ‖v‖ / ‖A‖: the error of q is below condition ×
    relative residual.
    """
    for seed in range(3):
        problems, exact = quadratic(condition, seed)
        gradient, report = hypergradient_and_report(problems, name)
        assert report.residual is not None
        # So for q; Cᵀ and the direct part add a factor, and the quotient is at most 0.13 here.
        assert relative_error(gradient, exact) < condition * max(report.residual, 1e-15)


# ------------------------------ one regularisation strength per feature


def stationary(loss, start):
    """Minimises a smooth, strictly convex function by LBFGS and then Newton's method; returns the
    minimiser.
    """
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=400,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(point)
        value.backward()
        return value

    optimizer.step(closure)
    point = point.detach()
    for _ in range(2):
        gradient = torch.autograd.functional.jacobian(loss, point)
        hessian = torch.autograd.functional.hessian(loss, point, vectorize=True)
        point = point - torch.linalg.solve(hessian, gradient)
    assert float(torch.autograd.functional.jacobian(loss, point).norm()) < 1e-12
    return point


def dense_hypergradient(train, valid, weights, upper):
    """−(∂²train/∂w∂x)ᵀ (∂²train/∂w²)⁻¹ ∂valid/∂w on flat vectors, with every matrix written out."""
    hessian = torch.autograd.functional.hessian(lambda w: train(w, upper), weights, vectorize=True)

    def gradient(x):
        w = weights.clone().requires_grad_()
        return torch.autograd.grad(train(w, x), w, create_graph=True)[0]

    mixed = torch.autograd.functional.jacobian(gradient, upper, vectorize=True)
    return -mixed.T @ torch.linalg.solve(
        hessian, torch.autograd.functional.jacobian(valid, weights)
    )


@lru_cache
def tabular(name):
    """Standardised features (constant ones left out) and labels of scikit-learn's data, halved in a
    seeded order.
    """
    from sklearn import datasets

    data = {"breast_cancer": datasets.load_breast_cancer, "digits": datasets.load_digits}[name]()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:800]
    x, y = torch.from_numpy(data.data).double()[order], torch.from_numpy(data.target).long()[order]
    x = x[:, x.std(0) > 0.5] if name == "digits" else x
    x = (x - x.mean(0)) / x.std(0)
    half = len(y) // 2
    return x[:half], y[:half], x[half:], y[half:]


@lru_cache
def regularised_regression(name):
    """Features, the stationary weights [classes, features] at some log-decays, and the oracle's
    hypergradient in these.

    Two classes have one row of weights (the logit of class 1), ten have ten.
    """
    x, y, x_valid, y_valid = tabular(name)
    rows, features = (1 if name == "breast_cancer" else 10), x.shape[1]
    decays = torch.linspace(-5.0, -1.0, features, dtype=torch.float64)

    def nll(flat, x, y):
        logits = x @ flat.view(rows, features).T
        if rows == 1:  # −log σ(±logit) = log(1 + e^(∓logit))
            return F.softplus(torch.where(y == 1, -1.0, 1.0) * logits[:, 0]).mean()
        return (logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).mean()

    def train(flat, decays):
        return nll(flat, x, y) + 0.5 * (decays.exp() * flat.view(rows, features) ** 2).sum()

    weights = stationary(
        lambda flat: train(flat, decays), torch.zeros(rows * features, dtype=torch.float64)
    )
    exact = dense_hypergradient(train, lambda flat: nll(flat, x_valid, y_valid), weights, decays)
    return decays, weights.view(rows, features), exact


@pytest.mark.parametrize("engine", ["direct", "cg", "minres", "gmres"])
@pytest.mark.parametrize("name", ["breast_cancer", "digits"])
def test_hypergradient_of_per_feature_decays(name, engine):
    """mlo's own losses, from torch.nn modules, against the dense oracle of the same functions
    written out.
    """
    decays, weights, exact = regularised_regression(name)
    x, y, x_valid, y_valid = tabular(name)
    rows, features = weights.shape
    classifier = nn.Linear(features, rows, bias=False, dtype=torch.float64)
    with torch.no_grad():
        classifier.weight.copy_(weights)

    def nll(logits, y):
        if rows == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0], y.double())
        return F.cross_entropy(logits, y)

    def train_loss(w, batch, *, x):
        images, labels = batch
        return nll(w(images), labels) + 0.5 * (w.weight**2 @ x.v.exp()).sum()

    def valid_loss(x, batch, *, w):
        images, labels = batch
        return nll(w(images), labels)

    reg = Vector(decays)
    problems = [
        mlo.Problem(
            "w", module=classifier, optimizer=frozen(classifier), loss=train_loss, data=[(x, y)]
        ),
        mlo.Problem(
            "x", module=reg, optimizer=frozen(reg), loss=valid_loss, data=[(x_valid, y_valid)]
        ),
    ]
    options = {} if engine == "direct" else {"max_steps": 300, "tol": 1e-10}
    optimizer = mlo.MultilevelOptimizer(problems, {"name": engine, **options})
    if engine == "direct" and rows > 1:
        gradient = optimizer.gradient("x")["v"]  # several hundred products: once is enough
    else:
        gradient, report = hypergradient_and_report(problems, {"name": engine, **options})
        assert report.converged and report.residual < 1e-9
    assert_agrees(gradient, exact, 1e-9 if engine == "direct" else 1e-7)


# ------------------------------ data cleaning

TRAIN, VALID, CLASSES = 400, 200, 10


@lru_cache
def fashion_mnist():
    """Seeded training and validation images of 7×7 means of 4×4 pixels with a constant feature: [N,
    50] and labels.
    """
    if not FASHION_MNIST.is_dir():
        pytest.skip(
            f"Fashion-MNIST is not installed in {FASHION_MNIST} (Debian package "
            "dataset-fashion-mnist)"
        )
    from lfmcw_app.readers import DATASETS

    images, *_ = DATASETS["fashion-mnist"](Path("data"))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: TRAIN + VALID]
    small = F.avg_pool2d(images.pixels[order].double() / 255.0, 4).flatten(1)
    small = torch.cat([(small - 0.3) * 3.0, torch.ones(len(small), 1, dtype=torch.float64)], 1)
    labels = images.labels[order]
    return small[:TRAIN], labels[:TRAIN], small[TRAIN:], labels[TRAIN:]


def corrupted_labels(labels, fraction):
    """Gives a seeded share of the examples another label each; returns the labels and who was
    hit.
    """
    generator = torch.Generator().manual_seed(1)
    hit = torch.zeros(len(labels), dtype=torch.bool)
    hit[torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]] = True
    other = (labels + torch.randint(1, CLASSES, labels.shape, generator=generator)) % CLASSES
    return torch.where(hit, other, labels), hit


def auc(scores, positive):
    """The probability that a positive example's score is above a negative one's."""
    above = scores[positive][:, None] - scores[~positive][None, :]
    return float((above > 0).double().mean() + 0.5 * (above == 0).double().mean())


# Measured at this seed, in the order of the fractions: 0.932, 0.932, 0.916.
@pytest.mark.parametrize(("fraction", "least_auc"), [(0.5, 0.88), (0.7, 0.88), (0.9, 0.86)])
def test_data_cleaning_raises_the_weights_of_clean_examples(fraction, least_auc):
    """The linear softmax minimises Σ σ(x_i) CE_i / N + decay; a corrupted example's weight should
    fall.
    """
    x, clean, x_valid, y_valid = fashion_mnist()
    y, hit = corrupted_labels(clean, fraction)
    decay, features = 0.02, x.shape[1]
    scores = torch.zeros(TRAIN, dtype=torch.float64)

    def each(flat, x, y):
        logits = x @ flat.view(CLASSES, features).T
        return logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]

    def train(flat, scores):
        return (torch.sigmoid(scores) * each(flat, x, y)).mean() + 0.5 * decay * (flat**2).sum()

    weights = stationary(
        lambda flat: train(flat, scores), torch.zeros(CLASSES * features, dtype=torch.float64)
    )
    exact = dense_hypergradient(
        train, lambda flat: each(flat, x_valid, y_valid).mean(), weights, scores
    )

    classifier, example_weights = (
        nn.Linear(features, CLASSES, bias=False, dtype=torch.float64),
        Vector(scores),
    )
    with torch.no_grad():
        classifier.weight.copy_(weights.view(CLASSES, features))

    def train_loss(w, batch, *, x):
        images, labels = batch
        loss = (torch.sigmoid(x.v) * F.cross_entropy(w(images), labels, reduction="none")).mean()
        return loss + 0.5 * decay * w.weight.square().sum()

    def valid_loss(x, batch, *, w):
        images, labels = batch
        return F.cross_entropy(w(images), labels)

    problems = [
        mlo.Problem(
            "w", module=classifier, optimizer=frozen(classifier), loss=train_loss, data=[(x, y)]
        ),
        mlo.Problem(
            "x",
            module=example_weights,
            optimizer=frozen(example_weights),
            loss=valid_loss,
            data=[(x_valid, y_valid)],
        ),
    ]
    gradient, report = hypergradient_and_report(
        problems, mlo.ConjugateGradient(max_steps=300, tol=1e-10)
    )
    assert report.converged and report.curvature > 0.0
    assert_agrees(gradient, exact, 1e-7)
    # Descent lowers the weight where the gradient is positive.
    assert float(gradient[hit].mean()) > 0.0 > float(gradient[~hit].mean())
    assert auc(gradient, hit) > least_auc
