"""Chains of problems that read both ways: their gradients, and what these cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mlo
from mlo.testing import relative_error

SIZE = 3


class Vector(nn.Module):
    """The parameters of one problem."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = 0.5 * torch.randn(SIZE, generator=generator, dtype=torch.float64)
        self.w = nn.Parameter(start)


def energy(place: int, own: Tensor, reads: dict[int, Tensor], *, quadratic: bool) -> Tensor:
    """The loss of one problem, in which everything that it reads meets everything else."""
    total = own
    for other, tensor in sorted(reads.items()):
        total = total + (0.6 + 0.1 * (place - other)) * tensor.roll(place + other)
    return (total.square() if quadratic else 2.0 * total.tanh().square()).sum() + own.square().sum()


def declare(
    places: dict[int, list[int]], make: Any, *, quadratic: bool = False, **options: Any
) -> list[mlo.Problem]:
    """One problem per place, which reads the problems at the given places."""

    def problem(place: int, reads: list[int]) -> mlo.Problem:
        def loss(own: nn.Module, batch: None, **others: nn.Module) -> Tensor:
            tensors = {other: others[f"p{other}"].w for other in reads}
            return energy(place, own.w, tensors, quadratic=quadratic)

        names = [f"p{other}" for other in reads]
        source = f"lambda own, batch, *, {', '.join(names)}: loss(own, batch, "
        source += ", ".join(f"{name}={name}" for name in names) + ")"
        module = Vector(place)
        return mlo.Problem(
            f"p{place}",
            module=module,
            optimizer=make(module.parameters()),
            loss=eval(source, {"loss": loss}),
            **options,
        )

    return [problem(place, reads) for place, reads in places.items()]


def both_ways(length: int) -> dict[int, list[int]]:
    """A chain in which every problem reads its neighbours."""
    return {
        place: [other for other in (place - 1, place + 1) if 0 <= other < length]
        for place in range(length)
    }


# ------------------------------ numbers, against plain autograd

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True
    ),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, eps=1e-3),
}


class PlainChain:
    """The chain of `both_ways` in plain autograd: every response is a step with its graph."""

    def __init__(self, length: int, optimizer: str, clip: float | None, quadratic: bool) -> None:
        self.length, self.optimizer, self.clip, self.quadratic = length, optimizer, clip, quadratic
        self.now = [Vector(place).w.detach() for place in range(length)]
        self.before: list[Tensor] = list(self.now)
        self.states: list[dict[str, Tensor]] = [{} for _ in self.now]
        self.made = 0

    def total(self, place: int, own: Tensor, above: Tensor | None) -> Tensor:
        """The gradient of a problem with all solutions below as functions of its own value."""
        reads = {} if above is None else {place + 1: above}
        if place > 0:
            reads[place - 1] = self.response(place - 1, own)
        value = energy(place, own, reads, quadratic=self.quadratic)
        return torch.autograd.grad(value, own, create_graph=True)[0]

    def response(self, place: int, above: Tensor) -> Tensor:
        """What the last step has made, as a function of the value above."""
        own = self.before[place].clone().requires_grad_()
        gradient = self.total(place, own, above)
        return self.step(own.detach(), gradient, self.states[place], self.made)[0]

    def step(
        self, own: Tensor, gradient: Tensor, state: dict[str, Tensor], made: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.clip is not None:
            gradient = gradient * (self.clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
        if self.optimizer == "sgd":
            return own - 0.1 * gradient, {}
        if self.optimizer == "momentum":
            g = gradient + 0.05 * own
            buffer = 0.9 * state["b"] + g if state else g
            return own - 0.1 * (g + 0.9 * buffer), {"b": buffer}
        zero = torch.zeros_like(own)
        m = 0.9 * state.get("m", zero) + 0.1 * gradient
        v = 0.999 * state.get("v", zero) + 0.001 * gradient.square()
        scaled = (v / (1.0 - 0.999 ** (made + 1))).sqrt() + 1e-3
        return own - 0.05 * (m / (1.0 - 0.9 ** (made + 1))) / scaled, {"m": m, "v": v}

    def round(self) -> None:
        """One round, the innermost problem first."""
        states = []
        for place in range(self.length):
            own = self.now[place].clone().requires_grad_()
            above = self.now[place + 1] if place + 1 < self.length else None
            gradient = self.total(place, own, above).detach()
            moved, state = self.step(own.detach(), gradient, self.states[place], self.made)
            self.before[place], self.now[place] = own.detach(), moved
            states.append({key: value.detach() for key, value in state.items()})
        # The last states are needed until the round is over: they are those before the steps.
        self.next_states = states

    def advance(self) -> None:
        """Begins the next round."""
        self.states, self.made = self.next_states, self.made + 1


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    ("optimizer", "clip"), [("sgd", None), ("momentum", None), ("adam", None), ("sgd", 0.3)]
)
def test_a_chain_moves_as_in_plain_autograd(length, optimizer, clip):
    quadratic = length % 2 == 0
    problems = declare(
        both_ways(length), OPTIMIZERS[optimizer], quadratic=quadratic, grad_clip=clip
    )
    ours = mlo.MultilevelOptimizer(problems, hypergradient="one_step")
    plain = PlainChain(length, optimizer, clip, quadratic)
    for _ in range(2):
        ours.step()
        plain.round()
        for place, problem in enumerate(problems):
            assert relative_error(problem.parameters["w"], plain.now[place]) < 1e-12, place
        plain.advance()


def closed_form(length: int, values: list[Tensor], engine: str) -> Tensor:
    """The outermost gradient of a quadratic chain, by the matrices of its second derivatives."""
    jacobian = torch.zeros(SIZE, SIZE, dtype=torch.float64)  # of the solution below, in `own`
    for place in range(length):
        reads = {other: values[other] for other in both_ways(length)[place]}

        def of(flat: Tensor, place: int = place, reads: dict[int, Tensor] = reads) -> Tensor:
            parts = dict(zip(sorted([place, *reads]), flat.split(SIZE), strict=True))
            return energy(place, parts.pop(place), parts, quadratic=True)

        point = torch.cat([values[other] for other in sorted([place, *reads])])
        below = SIZE * (place > 0)
        own, above = slice(below, below + SIZE), slice(below + SIZE, None)
        # How the point moves with the own value: the solution below moves with it.
        along = torch.zeros(len(point), SIZE, dtype=torch.float64)
        along[own] = torch.eye(SIZE, dtype=torch.float64)
        along[:below] = jacobian[:below]
        if place == length - 1:
            return along.T @ torch.autograd.functional.jacobian(of, point)
        hessian = torch.autograd.functional.hessian(of, point)
        mixed = along.T @ hessian[:, above]
        inverse = torch.eye(SIZE, dtype=torch.float64)
        if engine != "identity":
            inverse = torch.linalg.inv(along.T @ hessian @ along)
        jacobian = -inverse @ mixed
    raise AssertionError


@pytest.mark.parametrize(
    ("length", "engine"),
    [
        *[(length, "identity") for length in (2, 3, 4, 5, 6)],
        *[(length, "direct") for length in (2, 3, 4)],
        *[(length, "cg") for length in (2, 3)],
    ],
)
def test_a_quadratic_chain_has_its_closed_form(length, engine):
    problems = declare(both_ways(length), OPTIMIZERS["sgd"], quadratic=True)
    chosen = mlo.ConjugateGradient(tol=1e-14) if engine == "cg" else engine
    optimizer = mlo.MultilevelOptimizer(problems, hypergradient=chosen)
    optimizer.step()
    values = [problem.parameters["w"].detach().clone() for problem in problems]
    found = optimizer.gradient(f"p{length - 1}")["w"]
    assert relative_error(found, closed_form(length, values, engine)) < 1e-9
