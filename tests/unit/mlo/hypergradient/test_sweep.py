"""Chains of problems that read both ways: their gradients, and what these cost."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mlo
from mlo.testing import relative_error

PAGE = Path(__file__).parents[4] / "docs" / "choosing-an-engine.md"

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


class Plain:
    """The same problems in plain autograd: every response is a step with its whole graph.

    A step is differentiated at what it saw, so the values of then are kept.
    """

    def __init__(
        self, places: dict[int, list[int]], optimizer: str, clip: float | None, quadratic: bool
    ) -> None:
        self.reads, self.optimizer = places, optimizer
        self.clip, self.quadratic = clip, quadratic
        self.now = {place: Vector(place).w.detach() for place in places}
        self.before = dict(self.now)
        self.seen: dict[int, dict[int, Tensor]] = {}
        self.states: dict[int, dict[str, Tensor]] = {place: {} for place in places}
        self.made = 0

    def tensor(self, place: int, values: dict[int, Tensor]) -> Tensor:
        """What stands for a problem where some are seen by value: else its response."""
        if place in values:
            return values[place]
        # The problem sees those above it as they are seen here, and those below anew.
        own = self.before[place].clone().requires_grad_()
        inside = {place: own}
        for other in self.reads:
            if other > place and (other in values or other in self.reads[place]):
                inside[other] = self.tensor(other, values)
        gradient, _ = self.total(place, inside, seen=self.seen[place])
        moved, _ = self.step(own.detach(), gradient, self.states[place])
        return self.now[place] + (moved - moved.detach())

    def total(
        self, place: int, values: dict[int, Tensor], seen: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The gradient of a problem, all solutions below included; and what its loss read."""
        reads = {other: self.tensor(other, values) for other in self.reads[place]}
        if seen is not None:
            reads = {other: seen[other] + (t - t.detach()) for other, t in reads.items()}
        value = energy(place, values[place], reads, quadratic=self.quadratic)
        gradient = torch.autograd.grad(value, values[place], create_graph=True)[0]
        return gradient, {other: tensor.detach() for other, tensor in reads.items()}

    def step(
        self, own: Tensor, gradient: Tensor, state: dict[str, Tensor]
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
        scaled = (v / (1.0 - 0.999 ** (self.made + 1))).sqrt() + 1e-3
        return own - 0.05 * (m / (1.0 - 0.9 ** (self.made + 1))) / scaled, {"m": m, "v": v}

    def round(self) -> None:
        """One round, the innermost problem first."""
        # The states before the steps are what the responses of this round need.
        states = {}
        for place in self.reads:
            values = {place: self.now[place].clone().requires_grad_()}
            values |= {other: self.now[other] for other in self.reads if other > place}
            gradient, seen = self.total(place, values)
            moved, state = self.step(self.now[place], gradient.detach(), self.states[place])
            self.before[place], self.now[place], self.seen[place] = self.now[place], moved, seen
            states[place] = state
        self.after = states

    def advance(self) -> None:
        """Begins the next round."""
        self.states, self.made = self.after, self.made + 1


def assert_moves_as_plain(
    places: dict[int, list[int]], optimizer: str, clip: float | None = None, *, quadratic: bool
) -> None:
    """Two rounds of both, compared after each."""
    problems = declare(places, OPTIMIZERS[optimizer], quadratic=quadratic, grad_clip=clip)
    ours = mlo.MultilevelOptimizer(problems, hypergradient="one_step")
    plain = Plain(places, optimizer, clip, quadratic)
    for _ in range(2):
        ours.step()
        plain.round()
        for place, problem in enumerate(problems):
            assert relative_error(problem.parameters["w"], plain.now[place]) < 1e-12, place
        plain.advance()


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    ("optimizer", "clip"), [("sgd", None), ("momentum", None), ("adam", None), ("sgd", 0.3)]
)
def test_a_chain_moves_as_in_plain_autograd(length, optimizer, clip):
    assert_moves_as_plain(both_ways(length), optimizer, clip, quadratic=length % 2 == 0)


def ring(length: int) -> dict[int, list[int]]:
    """A chain that reads both ways, whose ends read each other too."""
    return {place: [(place - 1) % length, (place + 1) % length] for place in range(length)}


def wide(layers: int) -> dict[int, list[int]]:
    """Layers of two problems that read both of the layer below and both of the layer above."""
    return {
        place: [other for other in range(2 * layers) if abs(other // 2 - place // 2) == 1]
        for place in range(2 * layers)
    }


SHAPES = {"ring of 3": ring(3), "ring of 5": ring(5), "layers of 2": wide(3)}


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_move_as_in_plain_autograd(shape, optimizer):
    assert_moves_as_plain(SHAPES[shape], optimizer, quadratic=False)


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


# ------------------------------ what it costs


class Operators(TorchDispatchMode):
    """Counts the operators that run in its body."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operators(places: dict[int, list[int]], engine: str) -> tuple[int, int]:
    """The operators of one round, and of the outermost gradient."""
    problems = declare(places, OPTIMIZERS["sgd"])
    optimizer = mlo.MultilevelOptimizer(problems, hypergradient=engine)
    list(optimizer.run(2))  # the checks of the first two rounds are over
    for loss in optimizer._history.losses.values():
        loss.checks.dismiss("repeats")
    with Operators() as of_round:
        optimizer.step()
    with Operators() as of_gradient:
        optimizer.gradient(problems[-1].name)
    return of_round.count, of_gradient.count


@pytest.mark.parametrize(
    ("row", "engine"), [("first_order`", "first_order"), ("one_step` (SGD)", "one_step")]
)
def test_the_page_has_the_operators_of_a_round(row, engine):
    start = rf"^\| `{re.escape(row)} \| (\d.*)"
    (found,) = re.findall(start, PAGE.read_text("utf-8"), re.MULTILINE)
    said = [int(cell) for cell in found.split(" | ")[:3]]
    counted = [operators(both_ways(length), engine)[0] for length in (2, 3, 4)]
    assert counted == pytest.approx(said, rel=0.1)  # another PyTorch may need a few more


@pytest.mark.parametrize("engine", ["one_step", "identity"])
def test_a_gradient_costs_the_same_per_problem_of_a_chain(engine):
    costs = [operators(both_ways(length), engine)[1] for length in (4, 8, 16)]
    # Twice as many problems more cost twice as much more.
    assert (costs[2] - costs[1]) < 2.1 * (costs[1] - costs[0])


@pytest.mark.parametrize("engine", ["one_step", "identity"])
def test_a_round_of_a_chain_is_quadratic_in_its_length(engine):
    costs = [operators(both_ways(length), engine)[0] for length in (4, 8, 12, 16)]
    growth = [after - before for before, after in pairwise(costs)]
    # A quadratic has second differences that are constant; those of a cubic grow.
    first, second = (after - before for before, after in pairwise(growth))
    assert second < 1.05 * first


def test_a_round_without_implicit_terms_is_linear():
    costs = [operators(both_ways(length), "first_order")[0] for length in (4, 8, 16)]
    assert costs[2] - costs[1] == 2 * (costs[1] - costs[0])


def one_way(length: int) -> dict[int, list[int]]:
    """A chain in which each problem reads the one below, and the innermost the outermost."""
    return {place: [place - 1] if place else [length - 1] for place in range(length)}


def layered(layers: int) -> dict[int, list[int]]:
    """Layers of two problems between one above all and the two innermost, which read it."""
    last = 2 * layers
    places = {}
    for place in range(last):
        layer = place // 2
        places[place] = [2 * layer - 2, 2 * layer - 1] if layer else [last]
    return {**places, last: [last - 2, last - 1]}


def diamond(middle: int) -> dict[int, list[int]]:
    """So many problems between one above and one below."""
    between = {place: [0, middle + 1] for place in range(1, middle + 1)}
    return {0: [middle + 1], **between, middle + 1: list(between)}


@pytest.mark.parametrize("shape", [one_way, layered, diamond])
def test_graphs_that_read_down_are_linear(shape):
    costs = [operators(shape(size), "one_step")[0] for size in (3, 6, 12)]
    assert costs[2] - costs[1] == 2 * (costs[1] - costs[0])


def test_a_ring_is_no_worse_than_cubic():
    costs = [operators(ring(length), "one_step")[0] for length in (4, 8)]
    assert costs[1] < 8.0 * costs[0]
