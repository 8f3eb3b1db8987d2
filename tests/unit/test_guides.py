"""The guides from other libraries: their programs end where ours do, and no member is left out."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from code_blocks import BLOCKS, ROOT, require, run
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch.nn.functional import softplus

# ------------------------------ the same programs by plain autograd


def naive_maml():
    """MAML on sine curves: the loss, and the start after 20 steps down the gradient through five
    steps of each task.
    """
    torch.manual_seed(0)
    x = 6 * torch.rand(6, 20, 1, dtype=torch.float64) - 3
    y = torch.sin(x + torch.arange(6, dtype=torch.float64).view(6, 1, 1) / 3)
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)
    ).double()
    names, start = zip(*net.named_parameters(), strict=True)

    def loss(weights, task, part):
        named = dict(zip(names, weights, strict=True))
        return ((torch.func.functional_call(net, named, x[task, part]) - y[task, part]) ** 2).mean()

    for _ in range(20):
        total = 0.0
        for task in range(6):
            weights = start
            for _ in range(5):
                slopes = torch.autograd.grad(
                    loss(weights, task, slice(0, 10)), weights, create_graph=True
                )
                weights = [w - 0.1 * slope for w, slope in zip(weights, slopes, strict=True)]
            total = total + loss(weights, task, slice(10, 20)) / 6
        slopes = torch.autograd.grad(total, start)
        start = [
            (w - 0.1 * slope).detach().requires_grad_()
            for w, slope in zip(start, slopes, strict=True)
        ]
    return total, torch.cat([w.detach().flatten() for w in start])


def diabetes(correction):
    """The diabetes data, normalised with n or n - 1 in the variance."""
    data = load_diabetes()
    x, y = torch.tensor(data.data), torch.tensor(data.target)
    y = (y - y.mean()) / y.std(correction=correction)
    return (x - x.mean(0)) / x.std(0, correction=correction), y


def ridge_loss(log, x, y):
    """The validation loss of a ridge regression, through its closed form."""
    a, b = x[:40], y[:40]
    solution = torch.linalg.solve(a.T @ a / 40 + log.exp().diag(), a.T @ b / 40)
    return ((x[40:240] @ solution - y[40:240]) ** 2).mean()


def naive_ridge():
    """The loss and the decays after 20 steps through the closed form of the ridge regression."""
    x, y = diabetes(correction=1)
    log = torch.full((10,), -1.0, dtype=torch.float64)
    for _ in range(20):
        log.requires_grad_()
        loss = ridge_loss(log, x, y)
        log = (log - 50.0 * torch.autograd.grad(loss, log)[0]).detach()
    return loss, log


def naive_ridge_slope():
    """The loss and its derivative in the decays, through the closed form."""
    x, y = diabetes(correction=0)
    log = torch.full((10,), -1.0, dtype=torch.float64, requires_grad=True)
    loss = ridge_loss(log, x, y)
    return loss, torch.autograd.grad(loss, log)[0]


def naive_scikit_learn_slope():
    """The same of the ridge regression that scikit-learn solves in the guide."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 8, dtype=torch.float64), torch.randn(60, dtype=torch.float64)
    log = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    a = x[:30]
    w = torch.linalg.solve(a.T @ a + log.exp() * torch.eye(8), a.T @ y[:30])
    loss = ((x[30:] @ w - y[30:]) ** 2).mean()
    return loss, torch.autograd.grad(loss, log)[0]


def naive_logistic_slope():
    """The loss and its derivative through Newton's steps, of which the last are differentiated."""
    data = load_breast_cancer()
    x, y = torch.tensor(data.data), torch.tensor(data.target)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    log = torch.full((30,), -3.0, dtype=torch.float64, requires_grad=True)

    def log_loss(w, part):
        return softplus((1 - 2 * y[part]) * (x[part] @ w)).mean()

    def objective(w, log):
        return log_loss(w, slice(0, 200)) + (log.exp() * w**2).sum()

    w = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    for step in range(12):
        hyper = log if step > 9 else log.detach()
        slope = torch.autograd.grad(objective(w, hyper), w, create_graph=True)[0]
        hessian = torch.func.hessian(objective)(w, hyper)
        w = w - torch.linalg.solve(hessian, slope)
        if step <= 9:
            w = w.detach().requires_grad_()
    loss = log_loss(w, slice(200, 569))
    return loss, torch.autograd.grad(loss, log)[0]


def five_steps(rate, loss):
    """Five steps of gradient descent with momentum 0.9 from a new linear layer, with a graph."""
    weights, buffers = list(torch.nn.Linear(5, 1).double().parameters()), None
    for _ in range(5):
        slopes = torch.autograd.grad(loss(*weights), weights, create_graph=True)
        if buffers is None:
            buffers = slopes
        else:
            buffers = [0.9 * b + slope for b, slope in zip(buffers, slopes, strict=True)]
        weights = [w - rate * b for w, b in zip(weights, buffers, strict=True)]
    return weights


def naive_descent(initial, weight_of, rate_of, step):
    """Ten steps down the gradient through five steps; the unknown weighs examples or sets the rate.

    Args:
        initial: the unknown.
        weight_of: unknown → weight of each training example.
        rate_of: unknown → learning rate.
        step: learning rate of the unknown.
    """
    torch.manual_seed(0)
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64)
    state = torch.get_rng_state()
    unknown = initial

    def squares(weight, bias, part):
        return ((x[part] @ weight.T + bias - y[part]) ** 2).squeeze(1)

    def weighted(weight_of_each, weight, bias):
        return (weight_of_each * squares(weight, bias, slice(0, 20))).mean()

    for _ in range(10):
        torch.set_rng_state(state)  # the same layer again
        unknown.requires_grad_()
        examples = partial(weighted, weight_of(unknown))
        weights = five_steps(rate_of(unknown), examples)
        loss = squares(*weights, slice(20, 40)).mean()
        unknown = (unknown - step * torch.autograd.grad(loss, unknown)[0]).detach()
    return loss, unknown


def naive_scores():
    """Weights of examples, learned."""
    zeros = torch.zeros(20, dtype=torch.float64)
    return naive_descent(zeros, torch.sigmoid, lambda _: 0.1, 1.0)


def naive_rate():
    """The logarithm of a learning rate, learned."""
    initial = torch.tensor([-2.0], dtype=torch.float64)
    return naive_descent(initial, lambda _: 1.0, torch.exp, 0.5)


PAIRS = [
    ("torchopt", naive_ridge, "decay"),
    ("torchopt", naive_scikit_learn_slope, "slope"),
    ("torchopt", naive_scores, "scores"),
    ("higher", naive_rate, ("log_rate", "rate")),
    ("higher", naive_maml, "start"),
    ("jaxopt", naive_logistic_slope, "slope"),
    ("jaxopt", naive_ridge_slope, "slope"),
]
"""Of each guide in order: the oracle of a pair of programs, and the name of what they learn (theirs
and ours, if they differ).
"""


def page_of(package):
    return f"migrating-from-{package}.md"


def pairs_on(package):
    """Their program, ours, and what both are said to print, for each pair on the guide."""
    page = page_of(package)
    codes = [code for path, _, code in BLOCKS if path.name == page]
    starts = [k for k, code in enumerate(codes) if code.startswith(f"# needs {package}\n")]
    text = (ROOT / "docs" / page).read_text("utf-8")
    said = re.findall(r"Both print\n\n```text\n(.*?)```", text, re.DOTALL)
    return [
        (codes[start], codes[start + 1], line) for start, line in zip(starts, said, strict=True)
    ]


def vector(learned):
    """A module, a tensor or an array of JAX as a flat tensor."""
    if isinstance(learned, torch.nn.Module):
        return torch.nn.utils.parameters_to_vector(learned.parameters()).detach()
    if isinstance(learned, torch.Tensor):
        return learned.detach().flatten()
    return torch.tensor(np.asarray(learned)).flatten()


def test_each_pair_of_programs_has_an_oracle():
    for package in ("torchopt", "higher", "jaxopt"):
        assert len(pairs_on(package)) == len([pair for pair in PAIRS if pair[0] == package])


@pytest.mark.parametrize(("package", "naive", "learned"), PAIRS)
@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_programs_of_other_libraries_end_at_the_same_place(package, naive, learned, whose, capsys):
    """Programs from other libraries end where plain autograd does.

    The outer optimizer is gradient descent, so that a gradient of the wrong length ends
    elsewhere too.
    """
    if whose == "theirs":
        require(package)
    index = [other for other, *_ in PAIRS].index(package)
    number = [oracle for _, oracle, _ in PAIRS].index(naive) - index
    theirs, ours, said = pairs_on(package)[number]
    found = run(theirs if whose == "theirs" else ours, f"{page_of(package)}: {whose}")
    loss, expected = naive()
    names = (learned, learned) if isinstance(learned, str) else learned
    end = vector(found[names[whose == "ours"]])
    assert float((end - expected).norm() / expected.norm()) < 1e-7
    assert capsys.readouterr().out == f"{float(loss):.6f} {float(expected[0]):.6f}\n" == said


# ------------------------------ a row for every public member


def modules_of(package):
    """The public modules of a package, imported."""
    root = importlib.import_module(package)
    yield root
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            with contextlib.suppress(ImportError):  # an optional dependency of theirs
                yield importlib.import_module(found.name)


def public_names(module):
    """`__all__`, or what a module without it defines or hands on from its package."""
    listed = getattr(module, "__all__", None)
    package = module.__name__.partition(".")[0]
    if listed is not None and package != "higher":  # of higher's names it lists one
        foreign = set(getattr(sys.modules.get("optree"), "__all__", ()))
        return [name for name in listed if name not in foreign]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and (getattr(value, "__module__", "").startswith(package) or name.startswith("tree_"))
    ]


def public_methods(kind):
    """What a class of the package adds to those that it inherits from elsewhere."""
    package = kind.__module__.partition(".")[0]
    own = [base for base in kind.__mro__ if base.__module__.startswith(package)]
    inherited = {
        name
        for base in kind.__mro__
        if not base.__module__.startswith(package)
        for name in vars(base)
    }
    for base in own:
        for name, value in vars(base).items():
            called = inspect.isfunction(value) or isinstance(value, (property, classmethod))
            if called and not name.startswith("_") and name not in inherited:
                yield name


def members_of(package):
    """Every public name of a package, without the modules that it stands in."""
    for module in modules_of(package):
        for name in public_names(module):
            yield name
            value = getattr(module, name)
            if inspect.isclass(value) and value.__module__.startswith(package):
                yield from public_methods(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "count"), [("torchopt", 170), ("higher", 20), ("jaxopt", 150)])
def test_a_guide_has_a_row_for_every_public_member(package, count):
    require(package)
    text = (ROOT / "docs" / page_of(package)).read_text("utf-8")
    first_cells = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    spans = " ".join(" ".join(re.findall(r"`([^`]+)`", cell)) for cell in first_cells)
    named = set(re.findall(r"\w+", spans))
    members = sorted(set(members_of(package)))
    assert len(members) > count
    assert [name for name in members if name not in named] == []


# ------------------------------ the comparison


def test_each_program_that_is_served_names_its_test():
    text = (ROOT / "docs" / "comparison.md").read_text("utf-8")
    rows = re.findall(r"^\| ([a-zA-Z].*?) \| (\S+) \| .* \| (.*?) \|$", text, re.MULTILINE)
    assert len(rows) > 25
    for program, ours, tests in rows:
        assert ours == "✓", program
        assert re.search(r"`tests/\S+\.py`", tests), program


def test_every_note_of_the_comparison_is_referred_to():
    text = (ROOT / "docs" / "comparison.md").read_text("utf-8")
    tables, notes = text.split("## Notes")
    cells = set(re.findall(r"(?<=\| )\d+(?= \|)", tables))
    assert cells == set(re.findall(r"^(\d+)\. ", notes, re.MULTILINE))
