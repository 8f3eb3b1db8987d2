"""Engines of the form inverse × products, and the two kinds of products.

Let F(θ, x) = ∇_θ L(θ, x), or for a game F_p = ∇_{θ_p} L_p for each player p, with A = ∂F/∂θ and B =
∂F/∂x. (F may be another map that vanishes at the solution, see `mlo.solution.Residual`. Then only
`Autograd` serves. The components of parameters that their optimizer maximizes are those of −L, so
that A is positive definite at a maximum.) The cotangent of the inputs is −Bᵀ q with q = A⁻ᵀ v. A
subclass of `Engine` defines how q is found (the inverse); its products define how Aᵀ and Bᵀ are
applied. For fixed u

    Aᵀ u = ∇_θ ⟨F, u⟩     and     Bᵀ u = ∇_x ⟨F, u⟩ ,

and ⟨F, u⟩ = Σ_p d/de L_p(θ_p + e u_p) at e = 0. `Autograd` differentiates F. `FiniteDifference`
takes the difference of the gradients of L_p at θ_p ± e u_p, which needs no second derivative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.backward import grad, gradients
from mlo.errors import EngineError, nearest, warn_user
from mlo.gradient_norm import total_norm
from mlo.hypergradient.batch_bias import halves_of, is_mean
from mlo.hypergradient.custom_gradient import find_custom_gradient
from mlo.hypergradient.double_backward import (
    EVERYWHERE,
    SecondDerivative,
    check_compiled,
    check_silent_operations,
    check_third_derivative,
    explains_double_backward,
)
from mlo.hypergradient.hidden_parts import find_hidden_part, functions_of
from mlo.hypergradient.kinks import find_kink
from mlo.optimizer_step import OptimizerStep
from mlo.optimizer_traits import l2_penalty, maximized
from mlo.problem import Problem
from mlo.records import SolveReport
from mlo.response import Cotangent, Pullback, PullbackEngine
from mlo.solution import AbstractEngine, Stationary, Stepped
from mlo.tensors import add, zeros_for_none

__all__ = [
    "Autograd",
    "AutogradSystem",
    "Engine",
    "LinearSystem",
    "Products",
    "Solve",
    "register_products",
    "relative_residual",
]


class LinearSystem(ABC):
    """Products with Aᵀ, A and Bᵀ of one problem at one point.

    Args:
        call: the pullback that asks for it.

    Attributes:
        problem: name of the problem.
        advice: names other engines that could serve the problem.
        names: its parameters, in the order of all lists of tensors here.
        players: player → its parameters.
        step: the optimizer's last step, if it is the step that is differentiated; otherwise None.
        assumes: whether `check_assumptions` has anything to look at.
    """

    def __init__(self, call: Pullback) -> None:
        solution = call.solution
        problem = solution.evaluation.loss.problem
        self.call = call
        self.problem = problem.name
        self.advice = solution.evaluation.loss.advice
        self.names = tuple(solution.evaluation.parameters)
        self.players = problem.player_parameters
        self.step: OptimizerStep | None = None
        self.assumes = not isinstance(solution, Stepped)
        self._decay: Sequence[float] = ()
        self._negated: frozenset[str] = frozenset()
        if isinstance(solution, Stepped):
            self.step = solution.step
        elif call.residual is None:
            # The optimizer converges to ∇L + decay · θ = 0, so its weight decay is part of F, and
            # of A. (A residual is complete.)
            penalty = l2_penalty(problem)
            self._negated = _negated(solution.engine, problem)
            self._decay = [
                -penalty[name] if name in self._negated else penalty[name] for name in self.names
            ]

    def check_assumptions(self, u: Cotangent, found: Sequence[Tensor | None], engine: str) -> None:
        """Reports what the products show of a loss that violates an engine's assumptions.

        Args:
            u: a direction, one entry per parameter.
            found: Bᵀ u.
            engine: label of the engine.
        """
        loss = self.call.solution.evaluation.loss
        if isinstance(self.call.solution, Stepped) or not loss.checks.is_due("smooth"):
            return
        kink = find_kink(self.names, self.parameters, self.gradient)
        if kink:
            loss.checks.dismiss("smooth")
            warn_user(
                f"Problem {self.problem!r}: {kink} The engine {engine!r} differentiates the "
                "condition that the gradient is zero, as if these entries could move. Multiply the "
                "parameters by the mask of the active set in both losses "
                "(docs/choosing-an-engine.md, 'A lower problem that is not smooth')."
            )

    def loss_value(self) -> Tensor:
        """The value of the loss at the point, all players together."""
        inputs = [tensor.detach() for tensor in self.call.input_aliases()]
        point = self.call.solution.evaluation.parameters
        with torch.enable_grad(), self.call.losses(point, inputs) as losses:
            return torch.stack([value.detach() for value in losses.values()]).sum()

    def recall(self, what: str) -> Tensor | None:
        """What the engine kept when it last solved for the same reader, or None."""
        return self.call.solution.memory.get(f"{self.call.reading.reader}:{what}")

    def keep(self, what: str, value: Tensor) -> None:
        """Keeps a tensor for the next solve; it is saved with the state of the run.

        One that is not finite would spoil every later solve, so it is forgotten instead.
        """
        key, memory = f"{self.call.reading.reader}:{what}", self.call.solution.memory
        if value.is_floating_point() and not bool(value.isfinite().all()):
            memory.pop(key, None)
        else:
            memory[key] = value.detach().clone()

    @property
    @abstractmethod
    def parameters(self) -> Sequence[Tensor]:
        """θ at the point, one tensor per parameter."""

    @abstractmethod
    def gradient(self) -> Sequence[Tensor]:
        """The losses' gradient at the point; differentiable where the pullback must be."""

    @abstractmethod
    def mixed_vjp(self, u: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Bᵀ u for every input of the response (None where it is not wanted)."""

    @abstractmethod
    def _hessian_vjp(self, u: Sequence[Tensor]) -> list[Tensor]:
        """Aᵀ u of F without the optimizer's L2 penalty."""

    def transpose_product(self, u: Sequence[Tensor]) -> list[Tensor]:
        """Aᵀ u, with the optimizer's L2 penalty: F = ∇L + decay · θ adds decay · u."""
        return self._with_penalty(self._hessian_vjp(u), u)

    @abstractmethod
    def _jacobian_product(self, u: Sequence[Tensor]) -> list[Tensor]:
        """A u of F without the optimizer's L2 penalty."""

    def product(self, u: Sequence[Tensor]) -> list[Tensor]:
        """A u, with the optimizer's L2 penalty; of a loss's Hessian it equals Aᵀ u."""
        return self._with_penalty(self._jacobian_product(u), u)

    def both_products(self, u: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Aᵀ u, as `transpose_product`, and Bᵀ u, as `mixed_vjp`."""
        return self.transpose_product(u), self.mixed_vjp(u)

    def _with_penalty(self, terms: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
        """The terms of the loss alone, plus decay · u."""
        if not self._decay:
            return list(terms)
        triples = zip(terms, self._decay, u, strict=True)
        return [term + decay * entry if decay else term for term, decay, entry in triples]

    def _by_player(self, u: Sequence[Tensor | None]) -> dict[str, dict[str, Tensor]]:
        """Player → parameter → entry of u, for the players of which any entry is not None."""
        # Entries of None drop out, as do players with no other entries: they cost no backward pass.
        entry_of = dict(zip(self.names, u, strict=True))
        found: dict[str, dict[str, Tensor]] = {}
        for player, members in self.players.items():
            for name in members:
                entry = entry_of[name]
                if entry is not None:
                    # ⟨F, u⟩ with a component of F negated is ⟨∇L, u⟩ with that entry of u negated.
                    entry = -entry if name in self._negated else entry
                    found.setdefault(player, {})[name] = entry
        return found

    def _signed(self, of_losses: Sequence[Tensor]) -> list[Tensor]:
        """Entries of F or of its derivative, from those of the losses' gradient."""
        if not self._negated:
            return list(of_losses)
        pairs = zip(self.names, of_losses, strict=True)
        return [-entry if name in self._negated else entry for name, entry in pairs]


def _negated(engine: AbstractEngine, problem: Problem) -> frozenset[str]:
    """The parameters whose components of F are those of −L, because their optimizer maximizes."""
    found = maximized(problem)
    # With rows of different signs the Hessian of one loss would not be symmetric any more.
    mixed = bool(found) and len(found) < len(problem.parameters)
    return frozenset() if engine.needs_symmetry and mixed else found


class Products(ABC):
    """How an engine takes products with the derivatives of F."""

    name: ClassVar[str]
    uses_second_derivatives: ClassVar[bool]

    @abstractmethod
    def linearize(self, call: Pullback) -> LinearSystem:
        """Returns the products at the point of `call`."""


@dataclass(frozen=True)
class Autograd(Products):
    """Exact products: one backward pass per product, through a graph of F that is made once."""

    name: ClassVar[str] = "autograd"
    uses_second_derivatives: ClassVar[bool] = True

    def linearize(self, call: Pullback) -> AutogradSystem:
        return AutogradSystem(call)


class AutogradSystem(LinearSystem):
    """Products by backward passes through F: the gradient of the loss, or a residual."""

    def __init__(self, call: Pullback) -> None:
        super().__init__(call)
        self._gradients: dict[str, dict[str, Tensor]] = {}
        self._losses: dict[str, Tensor] = {}
        self._transposed: tuple[list[Tensor], list[Tensor]] | None = None
        solution = call.solution
        evaluation = solution.evaluation
        # (A kept graph is of the loss's gradient, which a residual is not.)
        graph = solution.graph if call.residual is None else None
        if graph is not None and graph.gradients is not None and not call.differentiate:
            # A kept graph ends at constants, so it serves first derivatives only. With one, F is
            # at hand and the loss is not evaluated at all.
            self._theta, self._gradients = graph.parameters, graph.gradients
            self._inputs: list[Tensor] = []
            for item in evaluation.free_inputs:
                self._inputs += graph.reads[item.name].values()
            # Activation checkpoints in the graph run modules again, and these must be in them then.
            evaluation.check_batches()
            call.stack.enter_context(evaluation.replayed_at(graph.parameters, graph.reads))
            return

        # Otherwise the loss is evaluated again, and stays open until the pullback ends.
        with torch.enable_grad():
            self._inputs = call.input_aliases()
            self._theta = call.parameter_aliases(self._inputs)
            if call.residual is None:
                self._losses = call.stack.enter_context(call.losses(self._theta, self._inputs))
                loss = evaluation.loss
                if call.differentiate and self.advice.third and loss.checks.is_due("third"):
                    variables = [*self._theta.values(), *self._inputs]
                    check_third_derivative(
                        self.problem, self._losses.values(), variables, self.advice
                    )
                return
            # F as given: it replaces the players' gradients.
            found = call.stack.enter_context(call.residuals(self._theta, self._inputs))
            for player, members in self.players.items():
                self._gradients[player] = {name: found[name] for name in members}

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
        theta = list(self._theta.values())
        return zeros_for_none(self._vjp(self._by_player(u), theta), theta)

    def _jacobian_product(self, u: Sequence[Tensor]) -> list[Tensor]:
        # w ↦ Aᵀ w is linear, so the derivative of ⟨Aᵀ w, u⟩ in w is A u, whatever w is. The graph
        # of Aᵀ w is made once, and each product is one more backward pass through it. (At w = 0 a
        # solver behind a response in F would stop before it began, and leave no graph.)
        if self._transposed is None:
            theta = list(self._theta.values())
            with torch.enable_grad():
                w = [entry.detach().requires_grad_() for entry in u]
                found = self._vjp(self._by_player(w), theta, create_graph=True)
                image = zeros_for_none(found, theta)
            self._transposed = w, image
        w, image = self._transposed
        pairs = [(one, entry) for one, entry in zip(image, u, strict=True) if one.requires_grad]
        if not pairs:
            return [torch.zeros_like(entry) for entry in u]
        outputs, entries = zip(*pairs, strict=True)
        found = grad(
            outputs,
            w,
            entries,
            retain_graph=True,
            create_graph=self.call.differentiate and torch.is_grad_enabled(),
        )
        return zeros_for_none(found, w)

    def both_products(self, u: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        # One backward pass for both.
        theta = list(self._theta.values())
        found = self._vjp(self._by_player(u), [*theta, *self.call.select(self._inputs)])
        hessian, mixed = zeros_for_none(found[: len(theta)], theta), found[len(theta) :]
        return self._with_penalty(hessian, u), self.call.scatter(mixed)

    def loss_value(self) -> Tensor:
        if not self._losses:  # a kept graph is of the gradient alone
            return super().loss_value()
        return torch.stack([value.detach() for value in self._losses.values()]).sum()

    def input_gradient_norm(self) -> float:
        """The norm of the loss's gradient in the wanted inputs, all players together."""
        with torch.enable_grad():
            loss = torch.stack(list(self._losses.values())).sum()
            found = gradients(loss, self.call.select(self._inputs), retain_graph=True)
        return float(total_norm([entry.detach() for entry in found])) if found else 0.0

    def check_silent_operations(self) -> None:
        """Refuses a loss whose second derivative exists and is wrong, or whose code is compiled.

        Raises:
            EngineError: naming the operation.
        """
        for loss in self._losses.values():
            check_compiled(self.problem, loss, EVERYWHERE, self.advice)
            check_silent_operations(self.problem, loss, advice=self.advice)

    def hides_a_part(self) -> bool:
        """Whether a `torch.autograd.Function` in the loss hides a part of its backward."""
        taken = SecondDerivative(second=self.call.select(self._inputs))
        functions = functions_of(self._losses.values(), taken)
        if not functions or self.call.solution.evaluation.loss.parallel is not None:
            return False
        inputs = self.call.input_aliases()
        taken = SecondDerivative(second=self.call.select(inputs))
        losses = self.call.displaced_losses(self.call.parameter_aliases(), inputs)
        return find_hidden_part(losses, functions, taken) is not None

    def _player_gradient(self, player: str) -> dict[str, Tensor]:
        # With its graph, once: every product is a further backward pass through it.
        if player not in self._gradients:
            members = self.players[player]
            own = [self._theta[name] for name in members]
            with torch.enable_grad():
                found = gradients(self._losses[player], own, create_graph=True)
            self._gradients[player] = dict(zip(members, found, strict=True))
        return self._gradients[player]

    def _vjp(
        self,
        u: Mapping[str, Mapping[str, Tensor]],
        inputs: Sequence[Tensor],
        *,
        create_graph: bool = False,
    ) -> Sequence[Tensor | None]:
        """∇_inputs ⟨F, u⟩; with its graph on request, or if the call needs one.

        None where F does not depend on an input: what is below it then takes no part.
        """
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
            return [None] * len(inputs)
        with explains_double_backward(self.problem, self.advice):
            found: Sequence[Tensor | None] = grad(
                outputs,
                inputs,
                entries,
                retain_graph=True,
                create_graph=create_graph or (self.call.differentiate and torch.is_grad_enabled()),
            )
        return found


_PRODUCTS: dict[str, type[Products]] = {"autograd": Autograd}
"""Name → kind of products; a file that offers another kind adds it."""


OTHER_PRODUCTS = {"exact": "autograd", "fd": "finite_difference", "hvp": "autograd"}
"""What else the kinds of products are called → the kind: a suggestion, no name."""


def register_products(kind: type[Products]) -> None:
    """Makes a kind of products available to configurations, by its name."""
    _PRODUCTS[kind.name] = kind


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
        raise EngineError(
            f"Unknown products {name!r}. {nearest(str(name), _PRODUCTS, OTHER_PRODUCTS)}"
        )
    try:
        return _PRODUCTS[name](**options)
    except TypeError as error:
        raise EngineError(f"Products {name!r} do not take these options ({error}).") from None


# ------------------------------ engines: an inverse times products


@dataclass(frozen=True, kw_only=True)
class Solve:
    """The result of an inverse product, and its report.

    Attributes:
        q: A⁻ᵀ v approximately, one entry per parameter; None stands for zero.
        report: of the solve.
        pulled: Bᵀ q, where the engine has taken it already.
        direct: what the inputs' cotangents have besides −Bᵀ q, one entry per input; None: nothing.
    """

    q: Cotangent
    report: SolveReport
    pulled: list[Tensor | None] | None = None
    direct: Sequence[Tensor | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Engine(PullbackEngine):
    """An inverse times products; a subclass defines how q ≈ A⁻ᵀ v is found.

    Attributes:
        products: how products with derivatives of F are taken: an `Autograd()` or
            `FiniteDifference(...)`, or the name of one, or a mapping `{"name": ..., option: ...}`.
        inverts: whether it solves a system with A, which amplifies errors of the products.
    """

    products: Products = field(default_factory=Autograd)

    inverts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # Bypasses the frozen dataclass: a name or a mapping becomes the object that it denotes.
        object.__setattr__(self, "products", _products_from(self.products))

    @property
    def differentiable(self) -> bool:
        return self.products.uses_second_derivatives

    @property
    def uses_second_derivatives(self) -> bool:
        return self.products.uses_second_derivatives

    @property
    def takes_residuals(self) -> bool:
        return self.products.uses_second_derivatives

    @property
    def label(self) -> str:
        """The engine's name, with its products where they are not exact."""
        if isinstance(self.products, Autograd):
            return self.name
        return f"{self.name} × {self.products.name}"

    def linearize(self, call: Pullback) -> LinearSystem:
        """The products at the point of `call`."""
        return self.products.linearize(call)

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
        system = self.linearize(call)
        if torch.is_grad_enabled() == call.differentiate:
            return self._pulled(system, call, cotangent)
        with torch.set_grad_enabled(call.differentiate):
            return self._pulled(system, call, cotangent)

    def _pulled(
        self, system: LinearSystem, call: Pullback, cotangent: Cotangent
    ) -> tuple[list[Tensor | None], SolveReport]:
        """What `pullback` returns."""
        solve = self.solve(system, cotangent)
        if not _fits(solve.q, system.parameters):
            raise EngineError(
                f"Engine {self.name!r} returned a q that does not have one entry, of its "
                f"shape, for each parameter of problem {system.problem!r}."
            )
        # The sign is applied to the result, which usually has fewer entries than q.
        pulled = system.mixed_vjp(solve.q) if solve.pulled is None else solve.pulled
        if system.assumes:
            system.check_assumptions(solve.q, pulled, self.label)
            if self.inverts and not call.differentiate:
                self._check_gradient(system, solve.q)
                self._check_bias(system, cotangent, pulled)
        total = [None if entry is None else -entry for entry in pulled]
        if solve.direct is not None:
            total = list(map(add, total, solve.direct))
        return total, solve.report

    def _check_gradient(self, system: LinearSystem, u: Cotangent) -> None:
        """Warns, at a problem's first solve, of a loss whose gradient is not that of its value."""
        evaluation = system.call.solution.evaluation
        loss, problem = evaluation.loss, evaluation.loss.problem
        # Finite differences have a comparison of their own; a residual has no value, and that of a
        # loss lacks the response of a solution that depends on its problem.
        if not self.products.uses_second_derivatives or system.call.residual is not None:
            return
        if evaluation.dependent or loss.sharded or problem.runs_compiled or problem.precision:
            return
        if any(theta.dtype.itemsize < 4 for theta in system.parameters):
            return
        if not loss.checks.is_due("custom gradient", once=True):
            return
        parameters = dict(zip(system.names, system.parameters, strict=True))
        found = find_custom_gradient(system.call, parameters, system.players, system._by_player(u))
        if found is None:
            return
        told = (
            f"Problem {system.problem!r}: along a direction its loss changes by "
            f"{found.change:.3g}, and its gradient says {found.slope:.3g}, so its gradient is "
            "not that of its value (.detach(), a straight-through estimator, gradient "
            f"reversal, samples that depend on the parameters). The engine {self.label!r} "
            "treats what is detached as constant, although the solution depends on it"
        )
        step = system.advice.phrase("; or use {}, which differentiates the step", "one_step")
        if found.of_others:
            warn_user(
                f"{told}. The direction is one of the other players' parameters, in the loss of "
                f"player {found.player!r}: do not detach what comes from them (its step moves no "
                f"parameters but its own){step}."
            )
        else:
            warn_user(
                f"{told}, and the second derivative of what is reversed has the wrong sign. Give "
                "parts that follow different losses to the players of a game (players=), each "
                "with its own loss; with implicit_solution state the condition "
                f"(stationarity=){step}."
            )

    def _check_bias(
        self, system: LinearSystem, cotangent: Cotangent, pulled: Sequence[Tensor | None]
    ) -> None:
        """Estimates, at a problem's first solve, the bias of solving on its batch; warns of it."""
        call, solution = system.call, system.call.solution
        evaluation, loss = solution.evaluation, solution.evaluation.loss
        if not isinstance(solution, Stationary) or solution.fresh:
            return  # (with products on fresh batches nothing is biased)
        if loss.problem.solves_on_all_data:
            return
        if not loss.checks.is_due("batch bias", once=True):
            return
        halves = halves_of(evaluation)
        if halves is None:
            return
        # A loss may need batches of one size (weights of its examples), or a half may be singular.
        # Then there is no estimate.
        try:
            values = [system.loss_value()]
            terms = []
            for half in halves:
                with ExitStack() as stack:
                    memory = dict(solution.memory)
                    part = replace(solution, evaluation=half, memory=memory, graph=None)
                    system = self.products.linearize(replace(call, solution=part, stack=stack))
                    values.append(system.loss_value())
                    terms.append(system.mixed_vjp(self.solve(system, cotangent).q))
        except (RuntimeError, ValueError, LookupError, TypeError):
            return
        if not is_mean(*values):
            return
        whole = present(pulled)
        first, second = map(present, terms)
        triples = zip(first, second, whole, strict=True)
        bias = total_norm([(one + other) / 2.0 - full for one, other, full in triples])
        size = total_norm(whole)
        if float(bias) > BIAS * float(size):
            warn_user(
                f"Problem {solution.name!r}: a solve on one batch is biased, E[Â⁻¹] ≠ A⁻¹, here "
                f"by about {min(float(bias / size), 10.0):.0%} of the implicit term (estimated "
                f"from the halves of the batch). Give the engine {self.label!r} larger batches or "
                "several: Problem(solve_data=..., solve_batches=...), or accumulate=; or "
                f"damping{system.advice.phrase(AVERAGING, 'soba')}."
            )


AVERAGING = ", or an engine that averages over batches as it runs, such as {}"

BIAS = 0.1
"""Relative bias of a solve on one batch that causes a warning."""


def present(entries: Sequence[Tensor | None]) -> list[Tensor]:
    """The entries of a cotangent that are present; None stands for a zero."""
    return [entry for entry in entries if entry is not None]


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
