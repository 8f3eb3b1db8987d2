"""A problem that begins anew from an upper problem's value, and the same by plain autograd."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

import mlo

LR, META = 0.05, 0.1


class Net(nn.Module):
    """A smooth network with a body and a head."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))[:, 0]


def task_data(seed=7):
    """Support and query sets."""
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=noise).double()

    return draw(8, 3), draw(8), draw(8, 3), draw(8)


def squared(one, other):
    return sum(((a - b) ** 2).sum() for a, b in zip(one, other, strict=True))


def bilevel(
    engine, *, steps, make=None, pull=0.0, data=None, order="lower_first", reads=True, **options
):
    """init learns where `task` begins its steps; returns optimizer, init, task."""
    x, y, xq, yq = data or task_data()
    init, task = Net(0), Net(1)
    make = make or (lambda parameters: torch.optim.SGD(parameters, lr=LR))

    def fit(task, _, *, init):
        loss = ((task(x) - y) ** 2).mean()
        return loss + pull * squared(task.parameters(), init.parameters())

    def fit_alone(task, _):
        return ((task(x) - y) ** 2).mean()

    problems = [
        mlo.Problem(
            "task",
            module=task,
            optimizer=make(task.parameters()),
            loss=fit if reads else fit_alone,
            steps=steps,
            restart_from="init",
            **options,
        ),
        mlo.Problem(
            "init",
            module=init,
            optimizer=torch.optim.SGD(init.parameters(), lr=META),
            loss=lambda init, _, *, task: ((task(xq) - yq) ** 2).mean(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine, order=order), init, task


def values(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def meta_gradients(optimizer, init, rounds=2):
    """The meta-gradient of each round, read off its step; with the value that it was taken at."""
    for _ in range(rounds):
        before = values(init)
        optimizer.step()
        after = values(init)
        yield before, {name: (before[name] - after[name]) / META for name in before}


def other_tensors(theta):
    """Equal tensors, so that a derivative in them is none in what they were made of."""
    return {name: tensor.view_as(tensor) for name, tensor in theta.items()}


def adam_steps(loss, theta, count, *, first_order=False):
    """`count` steps of Adam, differentiable."""
    theta = other_tensors(theta)
    first = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    second = dict(first)
    for t in range(1, count + 1):
        found = torch.autograd.grad(loss(theta), list(theta.values()), create_graph=True)
        for name, g in zip(theta, found, strict=True):
            g = g.detach() if first_order else g
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
        moved = {}
        for name, tensor in theta.items():
            root = (second[name] / (1 - 0.999**t)).sqrt() + 1e-8
            moved[name] = tensor - LR * first[name] / (1 - 0.9**t) / root
        theta = moved
    return theta


def momentum_steps(loss, theta, count, *, momentum=0.0, first_order=False):
    """`count` steps of SGD, differentiable."""
    theta = other_tensors(theta)
    buffer = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    for _ in range(count):
        found = torch.autograd.grad(loss(theta), list(theta.values()), create_graph=True)
        for name, g in zip(theta, found, strict=True):
            buffer[name] = momentum * buffer[name] + (g.detach() if first_order else g)
        theta = {name: tensor - LR * buffer[name] for name, tensor in theta.items()}
    return theta


def oracle(value, descend, *, pull=0.0, data=None):
    """The meta-gradient by plain autograd through `descend(loss, theta)`."""
    x, y, xq, yq = data or task_data()
    net = Net(2)
    start = {name: tensor.clone().requires_grad_() for name, tensor in value.items()}

    def fit(theta):
        loss = ((functional_call(net, theta, x) - y) ** 2).mean()
        return loss + pull * squared(theta.values(), start.values())

    adapted = descend(fit, dict(start))
    loss = ((functional_call(net, adapted, xq) - yq) ** 2).mean()
    found = torch.autograd.grad(loss, list(start.values()), allow_unused=True)
    return dict(zip(start, found, strict=True))
