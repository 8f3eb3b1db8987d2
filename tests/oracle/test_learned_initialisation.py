"""The five methods of `examples/few_shot.py`, and many tasks at once, against naive loops."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import mlo
from mlo.testing import Vector, relative_error

EXAMPLE = Path(__file__).parents[2] / "examples" / "few_shot.py"
TASKS = 3


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("few_shot", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TASKS", TASKS)
    monkeypatch.setattr(module, "HIDDEN", 6)
    return module


def tasks(example):
    images = 0.3 * torch.randn(200, 64)
    return example.draw_tasks(images, torch.arange(200) % 10, rounds=2, seed=3)


def declared(example, method, engine=None):
    """The optimizer of a method, of which theta stays, with the value and tasks of round 2."""
    support, query = tasks(example)
    problems, chosen = example.METHODS[method](support, query)
    problems[1].optimizers["theta"].param_groups[0]["lr"] = 0.0
    optimizer = mlo.MultilevelOptimizer(problems, engine or chosen)
    list(optimizer.run(2))
    theta = {name: p.detach().clone() for name, p in problems[1].module.named_parameters()}
    start = {name: tensor.requires_grad_() for name, tensor in theta.items()}
    return optimizer, start, support[1], query[1]


def error(example, weights, batch, task):
    """The cross-entropy of one task's network, unstacked."""
    logits = functional_call(example.Network(), weights, (batch[0][task],))
    return cross_entropy(logits, batch[1][task])


def descended(loss, weights, steps, rate, *, constant=False):
    """Steps of gradient descent; `constant` gradients have no derivative."""
    weights = {name: tensor.view_as(tensor) for name, tensor in weights.items()}
    for _ in range(steps):
        found = torch.autograd.grad(loss(weights), list(weights.values()), create_graph=True)
        step = dict(zip(weights, found, strict=True))
        if constant:
            step = {name: g.detach() for name, g in step.items()}
        rates = rate if isinstance(rate, dict) else dict.fromkeys(step, rate)
        weights = {name: weights[name] - rates[name] * step[name] for name in step}
    return weights


def check(optimizer, start, total):
    found = optimizer.gradient("theta")
    expected = torch.autograd.grad(total, list(start.values()))
    for name, gradient in zip(start, expected, strict=True):
        assert relative_error(found[name], gradient) < 1e-10, name


@pytest.mark.parametrize(("method", "constant"), [("MAML", False), ("FOMAML", True)])
def test_maml(example, method, constant):
    optimizer, start, support, query = declared(example, method)
    total = 0.0
    for task in range(TASKS):

        def fit(weights, task=task):
            return error(example, weights, support, task)

        adapted = descended(fit, start, 5, 1.0, constant=constant)
        total = total + error(example, adapted, query, task) / TASKS
    check(optimizer, start, total)


def test_anil(example):
    optimizer, start, support, query = declared(example, "ANIL")
    body = {name: tensor for name, tensor in start.items() if name.startswith("body")}
    head = {name: tensor for name, tensor in start.items() if name.startswith("head")}
    total = 0.0
    for task in range(TASKS):

        def fit(moved, task=task):
            return error(example, {**body, **moved}, support, task)

        adapted = descended(fit, head, 5, 1.0)
        total = total + error(example, {**body, **adapted}, query, task) / TASKS
    check(optimizer, start, total)


def test_meta_sgd(example):
    optimizer, theta, support, query = declared(example, "Meta-SGD")
    start = {k.removeprefix("start."): t for k, t in theta.items() if k.startswith("start.")}
    rates = {name: theta[f"log_rate.{name}"].exp() for name in start}
    total = 0.0
    for task in range(TASKS):

        def fit(weights, task=task):
            return error(example, weights, support, task)

        total = total + error(example, descended(fit, start, 5, rates), query, task) / TASKS
    check(optimizer, theta, total)


def test_imaml(example, monkeypatch):
    monkeypatch.setattr(example, "PULL", 2.0)  # the Hessian is positive definite at once
    engine = mlo.ConjugateGradient(max_steps=1000, tol=1e-13)
    optimizer, start, support, query = declared(example, "iMAML", engine)
    names = list(start)
    total = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    for task in range(TASKS):

        def pulled(*values, task=task):
            weights = dict(zip(names, values, strict=True))
            apart = sum(((weights[k] - start[k].detach()) ** 2).sum() for k in names)
            return error(example, weights, support, task) + 0.5 * example.PULL * apart

        phi = optimizer.problems["phi"].parameters
        at = [phi[name][task].detach() for name in names]
        # (∂²/∂φ²)⁻¹ v, times the derivative of the pull in theta, which is −PULL.
        blocks = torch.autograd.functional.hessian(pulled, tuple(at))
        sizes = [tensor.numel() for tensor in at]
        rows = [
            torch.cat([b.reshape(size, -1) for b in row], 1)
            for row, size in zip(blocks, sizes, strict=True)
        ]
        leaves = [tensor.requires_grad_() for tensor in at]
        loss = error(example, dict(zip(names, leaves, strict=True)), query, task) / TASKS
        v = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
        q = torch.linalg.solve(torch.cat(rows), v)
        for name, part in zip(names, q.split(sizes), strict=True):
            total[name] += example.PULL * part.view_as(start[name])
    found = optimizer.gradient("theta")
    for name, gradient in total.items():
        assert relative_error(found[name], gradient) < 1e-10, name


def test_each_method_is_declared_in_fifteen_lines(example):
    functions = [f for f in ast.parse(EXAMPLE.read_text()).body if isinstance(f, ast.FunctionDef)]
    lines = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    for method in example.METHODS.values():
        assert lines[method.__name__] <= 15


# ------------------------------ many tasks


def ridge_tasks(count):
    noise = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=noise)

    return draw(count, 8, 5), draw(count, 8), draw(count, 8, 5), draw(count, 8)


def proximal(w, start, x, y):
    return ((x @ w - y) ** 2).mean() + 0.5 * ((w - start) ** 2).sum()


def ridge_gradient(start, x, y, xq, yq):
    """The gradient of the mean query error of the exact solutions."""
    start = start.detach().clone().requires_grad_()
    total = 0.0
    for task in range(len(x)):
        matrix = 2 * x[task].T @ x[task] / 8 + torch.eye(5)
        w = torch.linalg.solve(matrix, 2 * x[task].T @ y[task] / 8 + start)
        total = total + ((xq[task] @ w - yq[task]) ** 2).mean() / len(x)
    return torch.autograd.grad(total, start)[0]


def sgd(module, lr=0.1):
    return torch.optim.SGD(module.parameters(), lr=lr)


def test_a_hundred_tasks_as_a_hundred_problems():
    data = ridge_tasks(100)
    x, y, xq, yq = data
    start = Vector(0.1 * torch.randn(5))
    names = [f"task{k}" for k in range(100)]

    def fit(k):
        return lambda w, _, *, start: proximal(w.v, start.v, x[k], y[k])

    def mean_query(start, _, **tasks):
        found = [((xq[k] @ tasks[name].v - yq[k]) ** 2).mean() for k, name in enumerate(names)]
        return torch.stack(found).mean()

    problems = []
    for k, name in enumerate(names):
        module = Vector(torch.linalg.solve(  # the solution, so that few steps do
            2 * x[k].T @ x[k] / 8 + torch.eye(5), 2 * x[k].T @ y[k] / 8 + start.v.detach()
        ))  # fmt: skip
        problems.append(mlo.Problem(name, module=module, optimizer=sgd(module), loss=fit(k)))
    problems.append(
        mlo.Problem("start", module=start, optimizer=sgd(start, 0.0), loss=mean_query, reads=names)
    )
    optimizer = mlo.MultilevelOptimizer(problems, {"name": "cg", "tol": 1e-12})
    optimizer.step()
    found = optimizer.gradient("start")["v"]
    assert relative_error(found, ridge_gradient(start.v, *data)) < 1e-10


@pytest.mark.parametrize("engine", ["unroll", "cg"])
def test_a_hundred_tasks_as_one_problem_by_vmap(engine):
    data = ridge_tasks(100)
    x, y, xq, yq = data
    start, tasks = Vector(0.1 * torch.randn(5)), Vector(torch.zeros(100, 5))

    def fit(tasks, _, *, start):
        return torch.vmap(proximal, in_dims=(0, None, 0, 0))(tasks.v, start.v, x, y).sum()

    def mean_query(start, _, *, tasks):
        return torch.vmap(lambda w, x, y: ((x @ w - y) ** 2).mean())(tasks.v, xq, yq).mean()

    steps = 3 if engine == "unroll" else 150
    problems = [
        mlo.Problem(
            "tasks",
            module=tasks,
            optimizer=sgd(tasks, 0.2),
            loss=fit,
            steps=steps,
            restart_from="start",
        ),
        mlo.Problem("start", module=start, optimizer=sgd(start, 0.0), loss=mean_query),
    ]
    solve = mlo.ConjugateGradient(tol=1e-13, max_steps=300)
    optimizer = mlo.MultilevelOptimizer(
        problems, mlo.Unroll(steps=3) if engine == "unroll" else solve
    )
    optimizer.step()
    found = optimizer.gradient("start")["v"]
    if engine == "cg":
        expected = ridge_gradient(start.v, *data)
    else:
        begun, total = start.v.detach().clone().requires_grad_(), 0.0
        for k in range(100):

            def fit_one(weights, k=k):
                return proximal(weights["v"], begun, x[k], y[k])

            w = descended(fit_one, {"v": begun}, 3, 0.2)["v"]
            total = total + ((xq[k] @ w - yq[k]) ** 2).mean() / 100
        (expected,) = torch.autograd.grad(total, begun)
    assert relative_error(found, expected) < 1e-10


def test_a_module_for_every_task_by_functional_call():
    # Stacked parameters of any module: one call of it per task, under vmap.
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    stack = nn.Module()
    for name, parameter in net.named_parameters():
        copies = parameter.detach().expand(TASKS, *parameter.shape).clone()
        inner = stack
        *path, last = name.split(".")
        for key in path:
            if not hasattr(inner, key):
                inner.add_module(key, nn.Module())
            inner = getattr(inner, key)
        inner.register_parameter(last, nn.Parameter(copies))
    x, y, xq, yq = (torch.randn(TASKS, 6, size) for size in (3, 1, 3, 1))

    def of_tasks(stack, x, y):
        def one(weights, x, y):
            return ((functional_call(net, weights, (x,)) - y) ** 2).mean()

        return torch.vmap(one)(dict(stack.named_parameters()), x, y)

    # (The base network itself is the one that learns where the tasks begin.)
    problems = [
        mlo.Problem(
            "tasks",
            module=stack,
            optimizer=sgd(stack, 0.2),
            loss=lambda tasks, _: of_tasks(tasks, x, y).sum(),
            steps=3,
            restart_from="start",
        ),
        mlo.Problem(
            "start",
            module=net,
            optimizer=sgd(net, 0.0),
            loss=lambda start, _, *, tasks: of_tasks(tasks, xq, yq).mean(),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, "unroll")
    optimizer.step()
    found = optimizer.gradient("start")
    begun = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    total = 0.0
    for k in range(TASKS):

        def fit_one(weights, k=k):
            return ((functional_call(net, weights, (x[k],)) - y[k]) ** 2).mean()

        adapted = descended(fit_one, begun, 3, 0.2)
        total = total + ((functional_call(net, adapted, (xq[k],)) - yq[k]) ** 2).mean() / TASKS
    for name, gradient in zip(begun, torch.autograd.grad(total, list(begun.values())), strict=True):
        assert relative_error(found[name], gradient) < 1e-10, name
