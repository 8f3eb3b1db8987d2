"""`once`: computes part of a loss once while the loss is evaluated at several own parameters.

A finite difference evaluates a loss L(θ, x) at θ ± e u. Where L(θ, x) = f(θ, s(x)), both sides
share s, and by the chain rule

    ∇_x [f(θ₊, s) − f(θ₋, s)] = (∂s/∂x)ᵀ [∇_s f(θ₊, s) − ∇_s f(θ₋, s)],

plus the term by which f depends on x itself. This takes one forward and one backward pass through s
instead of two, and no graph of f outlives its own side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from mlo.errors import ProblemError
from mlo.randomness import RandomState
from mlo.tensors import add_all, map_tensors

__all__ = ["CURRENT", "RecordedResults", "SharedResults", "once", "sharing"]

P = ParamSpec("P")
R = TypeVar("R")


def once(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Returns `function(*args, **kwargs)`, which must not depend on the problem's own parameters.

    It is called inside a loss. An engine may evaluate that loss at several values of the problem's
    own parameters, with everything else the same. The function is then called once. Its result is
    reused, together with the random state that it left, and its effect on buffers happens once.
    Gradients with respect to what the function does depend on stay the same.

        def student_loss(student, batch, *, teacher):
            # `teacher` is another problem: no function of the student's parameters.
            targets = mlo.once(teacher, batch).softmax(1)
            return cross_entropy(student(batch), targets)

    Args:
        function: anything that returns tensors, or dicts, lists and tuples of them.
        args: its arguments. One that the loss has computed itself, and also uses elsewhere, must
            come from `once` as well.
        kwargs: its keyword arguments.

    Raises:
        ProblemError: in the problem's first update, if the result does depend on the problem's own
            parameters.
    """
    shared = CURRENT.get()
    if shared is None:
        return function(*args, **kwargs)
    return shared.call(partial(function, *args, **kwargs))


class RecordedResults:
    """Keeps what `once` returned in an evaluation, to check it."""

    def __init__(self, problem: str) -> None:
        self._problem = problem
        self._outputs: list[Tensor] = []

    def call(self, function: Callable[[], R]) -> R:
        """Calls the function and keeps the tensors that it returns."""
        result = function()
        map_tensors(result, self._keep)
        return result

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            self._outputs.append(tensor)
        return tensor

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Refuses parts that depend on the problem's own `parameters`.

        Raises:
            ProblemError: if one does.
        """
        if not self._outputs:
            return
        # Any cotangents do: what matters is whether the graph has a path to a parameter.
        cotangents = [torch.ones_like(output) for output in self._outputs]
        found = torch.autograd.grad(
            self._outputs, list(parameters), cotangents, retain_graph=True, allow_unused=True
        )
        if any(gradient is not None for gradient in found):
            raise ProblemError(
                f"The loss of problem {self._problem!r} calls mlo.once on something that depends "
                "on the problem's own parameters, and these differ between evaluations. Call it "
                "without mlo.once."
            )


class SharedResults:
    """The results of `once` that several evaluations of one loss share.

    The k-th call of `once` is the same in each of them.

    Args:
        problem: its name, for messages.
        generators: the problem's random generators.
    """

    def __init__(self, problem: str, generators: Sequence[torch.Generator]) -> None:
        self._problem = problem
        self._generators = generators
        self._results: list[_Result] = []
        self._next = self._before = 0

    @property
    def leaves(self) -> list[Tensor]:
        """The parts' differentiable tensors as evaluations see them, detached from their graphs."""
        return [leaf for part in self._results for leaf in part.leaves]

    def begin(self) -> None:
        """Begins another evaluation."""
        self._next, self._before = 0, len(self._results)

    def begin_again(self) -> None:
        """Begins an evaluation that failed anew, without what it added."""
        del self._results[self._before :]
        self._next = 0

    def call(self, function: Callable[[], R]) -> R:
        """Calls the function in the first evaluation; in later ones returns what it returned."""
        if self._next == len(self._results):
            self._results.append(_Result.of(function(), self._generators))
        else:
            # The rest of the loss must draw what it drew after the function had been called.
            self._results[self._next].after.restore(self._generators)
        result = self._results[self._next].result
        self._next += 1
        copies: R = map_tensors(result, torch.clone)  # a loss may change what it got
        return copies

    def gradients(
        self, cotangents: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients in `inputs` that flow through the parts, given the leaves' `cotangents`.

        Raises:
            ProblemError: if a part was made of something that an evaluation has differentiated
                already.
        """
        total: list[Tensor | None] = [None] * len(inputs)
        due: dict[int, Tensor] = {
            id(leaf): v for leaf, v in zip(self.leaves, cotangents, strict=True)
        }
        # Last part first: one that is made of earlier ones adds to the cotangents of their leaves.
        for index in reversed(range(len(self._results))):
            part = self._results[index]
            if not part.leaves:
                continue
            # Through this part to the inputs, and to the leaves of parts that it was made of.
            earlier = [leaf for before in self._results[:index] for leaf in before.leaves]
            try:
                found = torch.autograd.grad(
                    part.outputs,
                    [*inputs, *earlier],
                    [due[id(leaf)].to(leaf.dtype) for leaf in part.leaves],
                    allow_unused=True,
                )
            except RuntimeError as error:
                if "backward through the graph a second time" not in str(error):
                    raise
                raise ProblemError(
                    f"The loss of problem {self._problem!r} passes to mlo.once something that the "
                    "loss has computed itself and also uses elsewhere. Compute that with "
                    "mlo.once as well."
                ) from error
            total = add_all(total, found[: len(inputs)])
            for leaf, more in zip(earlier, found[len(inputs) :], strict=True):
                if more is not None:
                    due[id(leaf)] = due[id(leaf)] + more
        return total


@dataclass(frozen=True)
class _Result:
    """What a function returned.

    Attributes:
        result: what it returned, with leaves in place of the differentiable tensors.
        outputs: these tensors.
        leaves: what represents them.
        after: the random state in which it ended.
    """

    result: Any
    outputs: list[Tensor]
    leaves: list[Tensor]
    after: RandomState

    @classmethod
    def of(cls, result: Any, generators: Sequence[torch.Generator]) -> _Result:
        outputs: list[Tensor] = []
        leaves: list[Tensor] = []

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor.detach()
            outputs.append(tensor)
            leaves.append(tensor.detach().requires_grad_())
            return leaves[-1]

        return cls(map_tensors(result, cut), outputs, leaves, RandomState.capture(generators))


CURRENT: ContextVar[RecordedResults | SharedResults | None] = ContextVar(
    "results of once", default=None
)


class sharing:
    """A context in which calls of `once` go to `shared`."""

    __slots__ = ("_shared", "_token")

    def __init__(self, shared: RecordedResults | SharedResults | None) -> None:
        self._shared = shared

    def __enter__(self) -> None:
        self._token = CURRENT.set(self._shared)

    def __exit__(self, *_: object) -> None:
        CURRENT.reset(self._token)
