"""Engines of the form inverse × products, and the two kinds of products.

Let F(θ, x) = ∇_θ L(θ, x), or for a game F_p = ∇_{θ_p} L_p for each player p, with A = ∂F/∂θ and
B = ∂F/∂x. The cotangent of the response's inputs is −Bᵀ q with q = A⁻ᵀ v. A subclass of `Engine`
says how q is found (the inverse); its products say how Aᵀ and Bᵀ are applied. For fixed u

    Aᵀ u = ∇_θ ⟨F, u⟩     and     Bᵀ u = ∇_x ⟨F, u⟩ ,

and ⟨F, u⟩ = Σ_p d/de L_p(θ_p + e u_p) at e = 0. `Autograd` differentiates F. `FiniteDifference`
takes the difference of the gradients of L_p at θ_p ± e u_p, which needs no second derivative.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError, nearest
from mlo.hypergradient.double_backward import is_about_double_backward, no_double_backward
from mlo.loss import gradients
from mlo.once import SharedResults
from mlo.optimizer_step import OptimizerStep, l2_penalty
from mlo.records import SolveReport
from mlo.response import Cotangent, Pullback, PullbackEngine, Stepped
from mlo.sharding import total_norm, whole

__all__ = [
    "Autograd",
    "Engine",
    "FiniteDifference",
    "FiniteDifferenceSystem",
    "LinearSystem",
    "Products",
    "Solve",
    "relative_residual",
]


class LinearSystem(ABC):
    """Products with Aᵀ and Bᵀ of one problem at one point.

    Args:
        call: the pullback that asks for it.

    Attributes:
        problem: name of the problem.
        names: its parameters, in the order of all lists of tensors here.
        players: player → its parameters.
        step: the optimizer's last step, where it is the step that is differentiated; else None.
    """

    def __init__(self, call: Pullback) -> None:
        solution = call.solution
        problem = solution.evaluation.loss.problem
        self.call = call
        self.problem = problem.name
        self.names = tuple(solution.evaluation.parameters)
        self.players = problem.player_parameters
        self.step: OptimizerStep | None = None
        self._decay: Sequence[float] = ()
        if isinstance(solution, Stepped):
            self.step = solution.step
        else:
            # The optimizer comes to rest where ∇L + decay · θ = 0, so its weight decay is part of
            # F, and of A.
            penalty = l2_penalty(problem)
            self._decay = [penalty[name] for name in self.names]

    def recall(self, what: str) -> Tensor | None:
        """What the engine kept when it last solved for the same reader, or None."""
        return self.call.solution.memory.get(f"{self.call.reading.reader}:{what}")

    def keep(self, what: str, value: Tensor) -> None:
        """Keeps a tensor for the next solve; it is saved with the state of the run."""
        key = f"{self.call.reading.reader}:{what}"
        self.call.solution.memory[key] = value.detach().clone()

    @property
    @abstractmethod
    def parameters(self) -> Sequence[Tensor]:
        """θ at the point, one tensor per parameter."""

    @abstractmethod
    def gradient(self) -> Sequence[Tensor]:
        """F at the point; differentiable where the pullback must be."""

    @abstractmethod
    def mixed_vjp(self, u: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Bᵀ u for every input of the response (None where it is not wanted)."""

    @abstractmethod
    def _hessian_vjp(self, u: Sequence[Tensor]) -> list[Tensor]:
        """Aᵀ u of the loss alone."""

    def transpose_product(self, u: Sequence[Tensor]) -> list[Tensor]:
        """Aᵀ u, with the optimizer's L2 penalty: F = ∇L + decay · θ adds decay · u."""
        return self._with_penalty(self._hessian_vjp(u), u)

    def _with_penalty(self, terms: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
        """The terms of the loss alone, plus decay · u."""
        if not self._decay:
            return list(terms)
        triples = zip(terms, self._decay, u, strict=True)
        return [term + decay * entry if decay else term for term, decay, entry in triples]

    def _by_player(self, u: Sequence[Tensor | None]) -> dict[str, dict[str, Tensor]]:
        """Player → parameter → entry of u, for the players of which any entry is not None."""
        entry_of = dict(zip(self.names, u, strict=True))
        found: dict[str, dict[str, Tensor]] = {}
        for player, members in self.players.items():
            for name in members:
                entry = entry_of[name]
                if entry is not None:
                    found.setdefault(player, {})[name] = entry
        return found


class Products(ABC):
    """How an engine takes products with the derivatives of F."""

    name: ClassVar[str]
    uses_second_derivatives: ClassVar[bool]

    @abstractmethod
    def linearize(self, call: Pullback) -> LinearSystem:
        """Returns the products at the point of `call`."""


@dataclass(frozen=True)
class Autograd(Products):
    """Exact products: one backward pass each, through a graph of F that is made once."""

    name: ClassVar[str] = "autograd"
    uses_second_derivatives: ClassVar[bool] = True

    def linearize(self, call: Pullback) -> LinearSystem:
        return _AutogradSystem(call)


@dataclass(frozen=True)
class FiniteDifference(Products):
    """Central finite differences of gradients: for any loss that has a first derivative.

    Across the kinks of ReLU or max-pooling a finite difference of gradients measures the kinks too.
    At no step size does it converge to the almost-everywhere derivative that `Autograd` takes.

    Attributes:
        step: "adaptive": the largest e that moves no parameter tensor by more than c of its own
            norm, e = c minᵢ ‖θᵢ‖ / ‖uᵢ‖. Here c is the cube root of the dtype's machine epsilon,
            which balances truncation against rounding (measured in docs/results.md).
            "darts": e = 0.01 / ‖u‖ (Liu et al. 2019, section 2.3).
            A positive number r: e = r / ‖u‖.

    Raises:
        EngineError: for another `step`.
    """

    step: float | str = "adaptive"

    name: ClassVar[str] = "finite_difference"
    uses_second_derivatives: ClassVar[bool] = False

    def __post_init__(self) -> None:
        valid = self.step in ("adaptive", "darts") if isinstance(self.step, str) else self.step > 0
        if not valid:
            raise EngineError(
                "FiniteDifference: step must be 'adaptive', 'darts' or a positive number, got "
                f"{self.step!r}."
            )

    def linearize(self, call: Pullback) -> FiniteDifferenceSystem:
        return FiniteDifferenceSystem(call, self)

    def step_size(
        self, parameters: Sequence[Tensor], direction: Sequence[Tensor], dtype: torch.dtype
    ) -> float:
        """Returns e for the perturbation θ ± e u of the parameters that u moves; 0 where u is zero.

        Args:
            parameters: θ, one tensor per parameter.
            direction: u, likewise.
            dtype: in which the loss is computed.
        """
        if self.step == "adaptive":
            moved = torch.stack([whole(tensor.detach().norm()) for tensor in direction]).tolist()
            norms = torch.stack([whole(tensor.detach().norm()) for tensor in parameters]).tolist()
            # A tensor that is still zero, like a new bias, counts as one with entries of 0.01.
            sizes = [
                max(norm, 0.01 * math.sqrt(t.numel()))
                for norm, t in zip(norms, parameters, strict=True)
            ]
            ratios = [size / u for size, u in zip(sizes, moved, strict=True) if u > 0.0]
            return math.cbrt(torch.finfo(dtype).eps) * min(ratios, default=0.0)
        norm = float(total_norm([tensor.detach() for tensor in direction]))
        radius = 0.01 if self.step == "darts" else float(self.step)
        return radius / norm if norm > 0.0 else 0.0


class _AutogradSystem(LinearSystem):
    def __init__(self, call: Pullback) -> None:
        super().__init__(call)
        self._gradients: dict[str, dict[str, Tensor]] = {}
        solution = call.solution
        evaluation = solution.evaluation
        graph = solution.graph if isinstance(solution, Stepped) else None
        if graph is not None and graph.gradients is not None and not call.differentiate:
            # A kept graph ends at constants, so it serves first derivatives only. With one, F is
            # at hand and the loss is not evaluated at all.
            self._theta, self._gradients = graph.parameters, graph.gradients
            self._inputs: list[Tensor] = []
            for item in evaluation.free_inputs:
                self._inputs += graph.reads[item.name].values()
            # Activation checkpoints in the graph run modules again, in which these must stand.
            evaluation.check_batches()
            call.stack.enter_context(evaluation.placed(graph.parameters, graph.reads))
            return

        # Otherwise the loss is evaluated once more, and stays open until the pullback ends.
        with torch.enable_grad():
            self._theta = call.parameter_aliases()
            self._inputs = call.input_aliases()
            self._losses = call.stack.enter_context(call.losses(self._theta, self._inputs))

    @property
    def parameters(self) -> Sequence[Tensor]:
        return list(self._theta.values())

    def gradient(self) -> Sequence[Tensor]:
        found: dict[str, Tensor] = {}
        for player in self.players:
            found |= self._player_gradient(player)
        return [found[name] for name in self.names]

    def mixed_vjp(self, u: Sequence[Tensor | None]) -> list[Tensor | None]:
        return self.call.scatter(self._vjp(self._by_player(u), self.call.select(self._inputs)))

    def _hessian_vjp(self, u: Sequence[Tensor]) -> list[Tensor]:
        return self._vjp(self._by_player(u), list(self._theta.values()))

    def _player_gradient(self, player: str) -> dict[str, Tensor]:
        if player not in self._gradients:
            members = self.players[player]
            own = [self._theta[name] for name in members]
            with torch.enable_grad():
                found = gradients(self._losses[player], own, create_graph=True)
            self._gradients[player] = dict(zip(members, found, strict=True))
        return self._gradients[player]

    def _vjp(self, u: Mapping[str, Mapping[str, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
        """∇_inputs ⟨F, u⟩."""
        # For all players together: autograd sums over the outputs.
        outputs: list[Tensor] = []
        entries: list[Tensor] = []
        for player, directions in u.items():
            gradient = self._player_gradient(player)
            for name, direction in directions.items():
                if gradient[name].requires_grad:  # a component that is constant has no derivative
                    outputs.append(gradient[name])
                    entries.append(direction)
        if not outputs or not inputs:
            return [torch.zeros_like(tensor) for tensor in inputs]
        try:
            found = torch.autograd.grad(
                outputs,
                list(inputs),
                grad_outputs=entries,
                retain_graph=True,
                create_graph=self.call.differentiate,
                allow_unused=True,
            )
        except RuntimeError as error:
            if not is_about_double_backward(error):
                raise
            raise no_double_backward(self.problem, str(error)) from error
        pairs = zip(found, inputs, strict=True)
        return [torch.zeros_like(tensor) if term is None else term for term, tensor in pairs]


class FiniteDifferenceSystem(LinearSystem):
    """Products from gradients at displaced parameters; it offers these gradients too."""

    def __init__(self, call: Pullback, products: FiniteDifference) -> None:
        super().__init__(call)
        self._products = products
        problem = call.solution.evaluation.loss.problem
        own = next(iter(problem.parameters.values()))
        # The rounding that a difference suffers is that of the loss, under autocast too.
        self._dtype = torch.bfloat16 if problem.precision == "bf16" else own.dtype
        self._theta = {name: value.detach() for name, value in call.parameter_aliases().items()}

    @property
    def parameters(self) -> Sequence[Tensor]:
        return list(self._theta.values())

    def gradient(self) -> Sequence[Tensor]:
        found: dict[str, Tensor] = {}
        for player, members in self.players.items():
            grads = dict(
                zip(
                    self.names, self._gradient_at(player, self._theta, in_inputs=False), strict=True
                )
            )
            found |= {name: grads[name] for name in members}
        return [found[name] for name in self.names]

    def step_size(self, u: Sequence[Tensor]) -> float:
        """The e at which θ ± e u is a suitable displacement; 0 where u is zero."""
        return self._products.step_size(self.parameters, u, self._dtype)

    def gradient_at(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """∇_θ of the loss at other `parameters`, with the optimizer's L2 penalty; no games."""
        theta = dict(zip(self.names, parameters, strict=True))
        found = self._gradient_at(self._player(), theta, in_inputs=False)
        return self._with_penalty(found, parameters)

    def input_gradient_at(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """∇ of the loss in the wanted inputs, at other `parameters`; no games."""
        theta = dict(zip(self.names, parameters, strict=True))
        return self._gradient_at(self._player(), theta, in_inputs=True)

    def _player(self) -> str:
        (player,) = self.players
        return player

    def mixed_vjp(self, u: Sequence[Tensor | None]) -> list[Tensor | None]:
        return self.call.scatter(self._difference(u, in_inputs=True))

    def _hessian_vjp(self, u: Sequence[Tensor]) -> list[Tensor]:
        return self._difference(u, in_inputs=False)

    def _difference(self, u: Sequence[Tensor | None], *, in_inputs: bool) -> list[Tensor]:
        """Σ_p (∇ L_p(θ_p + e u_p) − ∇ L_p(θ_p − e u_p)) / 2e, with ∇ in the inputs or in θ."""
        total: list[Tensor] | None = None
        # A player's loss is differenced along the player's own direction, with its own step size.
        for player, directions in self._by_player(u).items():
            e = self._products.step_size(
                [self._theta[name] for name in directions], list(directions.values()), self._dtype
            )
            if not e:
                continue
            terms = self._weighted_gradients(
                player, self._both_sides(directions, e), in_inputs=in_inputs
            )
            total = terms if total is None else [a + b for a, b in zip(total, terms, strict=True)]
        if total is None:
            of = self.call.select(self.call.inputs) if in_inputs else self.parameters
            return [torch.zeros_like(t) for t in of]
        return total

    def _gradient_at(
        self, player: str, parameters: Mapping[str, Tensor], *, in_inputs: bool
    ) -> list[Tensor]:
        """∇ of a player's loss at `parameters`, in the wanted inputs or in the parameters."""
        return self._weighted_gradients(player, [(1.0, parameters)], in_inputs=in_inputs)

    def _both_sides(
        self, directions: Mapping[str, Tensor], e: float
    ) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Yields (1 / 2e, θ + e u), then (−1 / 2e, θ − e u), both in the same memory."""
        moved: dict[str, Tensor] = {}
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for name, direction in directions.items():
                    # From θ each time: moving back by −2e would add the rounding of a second sum.
                    moved[name] = torch.add(
                        self._theta[name], direction, alpha=sign * e, out=moved.get(name)
                    )
            yield sign / (2.0 * e), {**self._theta, **moved}

    def _weighted_gradients(
        self, player: str, points: Iterable[tuple[float, Mapping[str, Tensor]]], *, in_inputs: bool
    ) -> list[Tensor]:
        """Σ w ∇L_p(θ), over pairs of a weight w and a point θ, for a player p.

        The gradient is taken in the wanted inputs, or in the parameters. What the loss computes
        from the inputs alone (`mlo.once`) is computed and differentiated once for all points.
        """
        inputs = [
            tensor.detach().requires_grad_(tensor.requires_grad and in_inputs)
            for tensor in self.call.input_aliases()
        ]
        of = self.call.select(inputs)
        # (`check_engines` refuses finite differences for a loss that reads a solution depending on
        # this problem: it would depend on θ, and is held fixed here.)
        problem = self.call.solution.evaluation.loss.problem
        shared = SharedResults(problem.name, problem.generators)
        total: list[Tensor] | None = None
        # The tensors of the first point stay in their places until the shared results have been
        # differentiated, since checkpointing would run modules again.
        with torch.enable_grad(), ExitStack() as stack:
            for weight, parameters in points:
                theta = {
                    name: tensor.detach().requires_grad_(not in_inputs)
                    for name, tensor in parameters.items()
                }
                losses = stack.enter_context(
                    self.call.losses(theta, inputs, players=(player,), shared=shared)
                )
                like = [*(of if in_inputs else theta.values()), *shared.leaves]
                scaled = [term * weight for term in gradients(losses[player], like)]
                if total is None:
                    total = scaled
                else:
                    total = [a + b for a, b in zip(total, scaled, strict=True)]
            assert total is not None
            if not shared.leaves:
                return total

            # L = f(θ, s(x), x): what flows through the shared s joins the rest (see `mlo.once`).
            direct, cotangents = total[: len(of)], total[len(of) :]
            found = []
            for term, more in zip(direct, shared.gradients(cotangents, of), strict=True):
                found.append(term if more is None else term + more)
            return found


_PRODUCTS: dict[str, type[Products]] = {"autograd": Autograd, "finite_difference": FiniteDifference}


def _products_from(choice: Products | str | Mapping[str, Any]) -> Products:
    """Makes products from themselves, their name, or a mapping `{"name": ..., option: ...}`.

    Raises:
        EngineError: for an unknown name or option.
    """
    if isinstance(choice, Products):
        return choice
    options = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = options.pop("name", None)
    if name not in _PRODUCTS:
        raise EngineError(f"Unknown products {name!r}. {nearest(str(name), _PRODUCTS)}")
    try:
        return _PRODUCTS[name](**options)
    except TypeError as error:
        raise EngineError(f"Products {name!r} do not take these options ({error}).") from None


# ------------------------------ engines: an inverse times products


@dataclass(frozen=True, kw_only=True)
class Solve:
    """The result of an inverse product: q ≈ A⁻ᵀ v, one entry per parameter, and how it went.

    An entry of None stands for zero.
    """

    q: Cotangent
    report: SolveReport


@dataclass(frozen=True, kw_only=True)
class Engine(PullbackEngine):
    """An inverse times products; a subclass says how q ≈ A⁻ᵀ v is found.

    Attributes:
        products: how products with derivatives of F are taken: an `Autograd()` or
            `FiniteDifference(...)`, or the name of one, or a mapping `{"name": ..., option: ...}`.
        inverts: whether it solves a system with A, which amplifies errors of the products.
    """

    products: Products = field(default_factory=Autograd)

    inverts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # Past the frozen dataclass: a name or a mapping becomes the object that it stands for.
        object.__setattr__(self, "products", _products_from(self.products))

    @property
    def differentiable(self) -> bool:
        return self.products.uses_second_derivatives

    @property
    def uses_second_derivatives(self) -> bool:
        return self.products.uses_second_derivatives

    @property
    def label(self) -> str:
        """The engine's name, with its products where they are not exact."""
        if isinstance(self.products, Autograd):
            return self.name
        return f"{self.name} × {self.products.name}"

    @abstractmethod
    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        """Returns q with Aᵀ q ≈ v.

        Args:
            system: the products with Aᵀ and Bᵀ at the solution, and the optimizer's step.
            cotangent: v, one tensor per parameter; None where nothing reads that parameter.
        """

    def pullback(
        self, call: Pullback, cotangent: Cotangent
    ) -> tuple[list[Tensor | None], SolveReport]:
        """Returns the cotangents of the response's inputs, −Bᵀ A⁻ᵀ v, and the solve's report.

        Raises:
            EngineError: if `solve` returned a q of another shape than the parameters.
        """
        system = self.products.linearize(call)
        with torch.set_grad_enabled(call.differentiate):
            solve = self.solve(system, cotangent)
            if not _fits(solve.q, system.parameters):
                raise EngineError(
                    f"Engine {self.name!r} returned a q that does not have one entry, of its "
                    f"shape, for each parameter of problem {system.problem!r}."
                )
            # The sign is applied to the result, which usually has fewer entries than q.
            pulled = system.mixed_vjp(solve.q)
            return [None if entry is None else -entry for entry in pulled], solve.report


def _fits(q: Cotangent, parameters: Sequence[Tensor]) -> bool:
    """Whether q has one entry per parameter, of its shape."""
    if len(q) != len(parameters):
        return False
    for entry, tensor in zip(q, parameters, strict=True):
        if entry is not None and entry.shape != tensor.shape:
            return False
    return True


def relative_residual(
    system: LinearSystem, q: Sequence[Tensor], cotangent: Sequence[Tensor]
) -> float:
    """Returns ‖Aᵀq − v‖ / ‖v‖ (the plain norm of Aᵀq where v is zero)."""
    with torch.no_grad():
        product = system.transpose_product(q)
        error = total_norm([a - b for a, b in zip(product, cotangent, strict=True)])
        size = total_norm(cotangent)
    return float(error / size) if size > 0 else float(error)
