"""Products of a problem whose loss reads responses to the problem itself, by one sweep downwards.

A problem in the middle of a chain that reads both ways has a loss L(s(θ), θ, x), where s(θ) is the
response of the problems below it, which are conditioned on its own value θ. Its total gradient is F
= ∂_θ L + (∂s/∂θ)ᵀ ∂_s L. The obvious way to B = ∂F/∂x makes F with its graph. It differentiates the
derivative of a response, which itself contains the derivative of a response, and so on down the
chain. The work of one product then grows with the square of the depth.

If s does not depend on x, second derivatives may be taken in the other order,

    Bᵀ q = ∂_x ⟨∂_(s,θ) L, (ṡ, q)⟩     with ṡ = (∂s/∂θ) q,
    B ẋ  = ∂_θ ⟨∂_x L, ẋ⟩ + (∂s/∂θ)ᵀ ∂_s ⟨∂_x L, ẋ⟩ .

Here s is constant while L is differentiated, and each product takes one product of the problem
below, with its Jacobian or with the transpose. So a gradient costs a constant number of operators
per problem that it passes through. F itself is not needed, because the step's result is known.
(∂_(s,θ) stands for both parts; products are those of the second derivative of L.)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mlo.hypergradient.double_backward import explains_double_backward
from mlo.hypergradient.products import Autograd, AutogradSystem, Engine, LinearSystem
from mlo.response import Pullback
from mlo.solution import Input, Stationary, Stepped
from mlo.tensors import add, zeros_for_none

__all__ = ["SweepEngine", "SweptSystem"]

Entries = list[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class SweepEngine(Engine):
    """An engine whose q is −Mᵀ v with an M that is known without A, so that dθ*/dx = M B."""

    @property
    def sweeps(self) -> bool:
        return isinstance(self.products, Autograd)

    @abstractmethod
    def applied(self, system: LinearSystem, direction: Sequence[Tensor]) -> list[Tensor]:
        """Returns M u.

        Args:
            system: the products of the problem, with its step if that is what is differentiated.
            direction: u, one entry per parameter.
        """

    def linearize(self, call: Pullback) -> LinearSystem:
        evaluation = call.solution.evaluation
        swept = not call.differentiate and evaluation.dependent and evaluation.inner
        swept = swept and call.solution.sweeps
        return SweptSystem(call) if swept else super().linearize(call)


class SweptSystem(LinearSystem):
    """Products with B and Bᵀ for which nothing below is differentiated twice.

    Products with A, and F itself, come from the ordinary system, which is made on request.
    """

    def __init__(self, call: Pullback) -> None:
        super().__init__(call)
        evaluation = call.solution.evaluation
        with torch.enable_grad():
            self._inputs = call.input_aliases()
            self._theta = call.parameter_aliases()
            self._below = call.stack.enter_context(call.reading_at(self._theta, self._inputs))
            reads = {name: self._below.tensors(name) for name in evaluation.loss.reads}
            # s as a function of θ, and the leaves that stand for it in the loss.
            self._read = [name for name in reads if name in evaluation.dependent]
            self._responses: list[Tensor] = []
            self._leaves: list[Tensor] = []
            for name in self._read:
                cut = {key: s.detach().requires_grad_() for key, s in reads[name].items()}
                self._responses += reads[name].values()
                self._leaves += cut.values()
                reads[name] = cut
            self._losses = call.stack.enter_context(evaluation.losses(self._theta, reads))

    @cached_property
    def _ordinary(self) -> AutogradSystem:
        return AutogradSystem(self.call)

    @property
    def parameters(self) -> Sequence[Tensor]:
        return list(self._theta.values())

    def gradient(self) -> Sequence[Tensor]:
        return self._ordinary.gradient()

    def _hessian_vjp(self, u: Sequence[Tensor]) -> list[Tensor]:
        return self._ordinary._hessian_vjp(u)

    def _jacobian_product(self, u: Sequence[Tensor]) -> list[Tensor]:
        return self._ordinary._jacobian_product(u)

    def mixed_vjp(self, u: Sequence[Tensor | None]) -> Entries:
        gradients: Entries = []
        directions: Entries = []
        for player, own in self._by_player(u).items():
            # F of a player is the gradient of its loss in its own parameters, through s too.
            names = self.players[player]
            at = [*[self._theta[name] for name in names], *self._leaves]
            gradients += self._first(player, at)
            directions += [own.get(name) for name in names]
            directions += self._tangents_read(own)
        inputs = self.call.select(self._inputs)
        found = self._second(gradients, inputs, directions)
        return self.call.scatter(zeros_for_none(found, inputs))

    def mixed_product(self, tangents: Sequence[Tensor | None]) -> list[Tensor]:
        """B ẋ.

        Args:
            tangents: ẋ, one entry per input; None where the input does not move.
        """
        moving = [tangent is not None for tangent in tangents]
        inputs = [x for x, moves in zip(self._inputs, moving, strict=True) if moves]
        directions = [tangent for tangent in tangents if tangent is not None]
        found: dict[str, Tensor | None] = {}
        for player, names in self.players.items():
            own = [self._theta[name] for name in names]
            terms = self._second(self._first(player, inputs), [*own, *self._leaves], directions)
            through = self._second(self._responses, own, terms[len(own) :])
            found |= zip(names, map(add, terms, through), strict=False)
        return self._signed(zeros_for_none([found[name] for name in self.names], self.parameters))

    def _first(self, player: str, at: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The first derivatives of a player's loss alone, with their graph."""
        loss = self._losses[player]
        if not loss.requires_grad or not at:
            return [None] * len(at)
        return torch.autograd.grad(loss, at, create_graph=True, allow_unused=True)

    def _second(
        self,
        outputs: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        entries: Sequence[Tensor | None],
    ) -> Entries:
        """Σ (∂output/∂input)ᵀ entry for every input, over the pairs in which neither is None."""
        reached: list[Tensor] = []
        cotangents: list[Tensor] = []
        for output, entry in zip(outputs, entries, strict=True):
            if output is not None and entry is not None and output.requires_grad:
                reached.append(output)
                cotangents.append(entry)
        if not reached or not inputs:
            return [None] * len(inputs)
        with explains_double_backward(self.problem, self.advice):
            found = torch.autograd.grad(
                reached, inputs, cotangents, retain_graph=True, allow_unused=True
            )
        return list(found)

    # ------------------------------ how the responses move with the parameters

    def _tangents_read(self, directions: Mapping[str, Tensor]) -> Entries:
        """ṡ = (∂s/∂θ) u of what the loss reads, for a direction u of the parameters by name."""
        known: dict[int, Entries] = {}
        found: Entries = []
        for name in self._read:
            found += self._tangent(Input(name, None), directions, known)
        return found

    def _tangent(
        self, item: Input, directions: Mapping[str, Tensor], known: dict[int, Entries]
    ) -> Entries:
        """How one input of a solution below moves, one entry per tensor; None: it does not."""
        if item.solution is None and item.name == self.problem:
            return [directions.get(name) for name in self.names]
        solution = item.solution or self.call.solution.evaluation.solutions[item.name]
        if not self.call.solution.evaluation.depends(solution):
            return [None] * len(solution.value)
        if id(solution) not in known:
            assert isinstance(solution, (Stationary, Stepped))
            moved: Entries = []
            for lower in solution.evaluation.free_inputs:
                moved += self._tangent(lower, directions, known)
            known[id(solution)] = self._pushed(solution, moved)
        return known[id(solution)]

    def _pushed(self, solution: Stationary | Stepped, tangents: Entries) -> Entries:
        """(dθ*/dx) ẋ of a solution below."""
        engine, wanted = solution.engine, [tangent is not None for tangent in tangents]
        assert isinstance(engine, SweepEngine)
        if not any(wanted):
            return [None] * len(solution.value)
        inputs: list[Tensor] = []
        for item in solution.evaluation.free_inputs:
            inputs += self._below.of(item).values()
        with ExitStack() as stack:
            call = Pullback(
                solution=solution,
                outputs=tuple(solution.constants().values()),
                inputs=inputs,
                wanted=wanted,
                differentiate=False,
                reading=self._below,
                stack=stack,
            )
            system = SweptSystem(call)
            pushed = engine.applied(system, system.mixed_product(tangents))
        self._below.note(engine.report(solution.name))
        return list(pushed)
