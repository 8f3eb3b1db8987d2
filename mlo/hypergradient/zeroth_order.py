"""`zeroth_order`: the response by repeating the optimizer's last steps at perturbed reads.

Let θ_K(x) be the parameters that the last K steps of the optimizer make of θ_0, as a function of
all that their gradients read. For a cotangent v let φ(x) = ⟨v, θ_K(x)⟩, whose gradient is wanted.
With S random directions u_s the estimate is

    ĝ = (1/S) Σ_s u_s (φ(x + r u_s) − φ(x − r u_s)) / 2r .

This takes 2 S K gradients of the lower loss in θ, and no derivative in x: x may enter through a
table, a simulation or a sort. Let x have d entries, let g be the gradient of φ, and let the entries
of u be independent and standard normal (`directions="gaussian"`). Then

- E ĝ is the gradient of the smoothed function φ_r(x) = E φ(x + r u), which exists even where φ has
  jumps;
- where φ'' has the Lipschitz constant M, the bias ‖E ĝ − g‖ is at most (r²/6) M (d + 4)²
  (Nesterov and Spokoiny, Lemma 3); where φ is linear or quadratic it is zero;
- where φ is linear, the variance E‖ĝ − g‖² is (d + 1) ‖g‖² / S.

Orthogonal directions of length √d (the default) have E u uᵀ = I too, and the variance (d/S − 1)
‖g‖² for linear φ and S ≤ d. With S = d they are a basis, and ĝ is a central difference in each of
its directions. More than d come in whole blocks of d.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.backward import gradients
from mlo.errors import EngineError, nearest
from mlo.hypergradient.options import count, number_or_auto
from mlo.hypergradient.tf32 import without_tf32
from mlo.optimizer_step import StateKey
from mlo.problem import Tensors
from mlo.response import Pullback
from mlo.sharding import sharded_like, whole
from mlo.solution import Input, Reading, RecordedStep, Solution, StepEngine, Stepped
from mlo.tensors import real_inner

__all__ = ["ZerothOrder"]

DIRECTIONS = ("orthogonal", "gaussian")


Place = tuple[str, int]
"""An input of a solution: the problem, and the identity of its solution or of None."""


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(StepEngine):
    """Repeats the last steps at reads perturbed both ways along random directions.

    For losses that have a gradient in their own parameters, but none in what they read. The cost of
    a good estimate grows with the number of entries that are read. So they should be few (tens), or
    the upper learning rate small. Each solve has other directions, and a repeated run has the same
    ones.

    Attributes:
        samples: S, the number of directions, each of two evaluations.
        steps: K, as in `unroll`: no more than the problem's own `steps`.
        radius: r, the size of the displacement of an entry. "auto" suits a smooth dependence: the
            cube root of the machine epsilon, times the root mean square of the tensor whose entries
            are smallest. For a dependence with jumps, give the distance over which they should be
            averaged.
        directions: "orthogonal" or "gaussian".

    Raises:
        EngineError: for other directions.

    Reference: Sow, Ji, Liang, On the Convergence Theory for Hessian-Free Bilevel Algorithms (2022),
    Algorithm 1 (PZOBO), with differences to both sides; Nesterov and Spokoiny, Random Gradient-Free
    Minimization of Convex Functions (2017), section 2; for orthogonal directions Choromanski et
    al., Structured Evolution (2018).
    """

    samples: int = count(10)
    steps: int = count(1)
    radius: float | str = number_or_auto()
    directions: str = "orthogonal"

    name: ClassVar[str] = "zeroth_order"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions not in DIRECTIONS:
            raise EngineError(
                f"Engine 'zeroth_order': directions must be one of {', '.join(DIRECTIONS)}, got "
                f"{self.directions!r}. {nearest(str(self.directions), DIRECTIONS)}"
            )

    @property
    def recorded_steps(self) -> int:
        return self.steps

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def uses_second_derivatives(self) -> bool:
        return False

    def respond(self, solution: Solution, reading: Reading) -> Tensors:
        assert isinstance(solution, Stepped)
        inputs: list[Tensor] = []
        for item in solution.free_inputs:
            inputs += reading.of(item).values()
        made = _Estimate.apply(self, solution, reading, *inputs)
        return dict(zip(solution.value, made, strict=True))

    def estimate(
        self, solution: Stepped, reading: Reading, inputs: Sequence[Tensor | None], v: Tensors
    ) -> tuple[list[Tensor], int]:
        """The estimate ĝ, one tensor per input that is not None, and the steps made for it.

        Args:
            solution: what is differentiated.
            reading: of the loss whose gradient is taken.
            inputs: what the solution is a function of, flat; None where no derivative is wanted.
            v: the cotangent, by parameter.
        """
        wanted = [tensor for tensor in inputs if tensor is not None]
        if any(tensor.is_complex() for tensor in wanted):
            raise EngineError(
                f"Problem {solution.name!r} reads a complex tensor, but 'zeroth_order' perturbs "
                "along real directions only. Keep it as a real tensor of one more dimension "
                "(torch.view_as_real), or use 'one_step' or 'unroll'."
            )
        r = self._radius(wanted, solution)
        total = [torch.zeros_like(tensor) for tensor in wanted]
        drawn = self._draw(wanted, solution, reading)
        for u in drawn:
            sides = []
            for sign in (1.0, -1.0):
                moves = iter([sign * r * entry for entry in u])
                shifts = [None if tensor is None else next(moves) for tensor in inputs]
                end = _end(solution, reading, shifts)
                sides.append(sum(_inner(v[name], end[name]) for name in v))
            slope = (sides[0] - sides[1]) / (2.0 * r * len(drawn))
            total = [entry + slope * direction for entry, direction in zip(total, u, strict=True)]
        return total, 2 * len(drawn) * len(solution.history)

    def _radius(self, inputs: Sequence[Tensor], solution: Stepped) -> float:
        if not isinstance(self.radius, str):
            return float(self.radius)
        problem = solution.evaluation.loss.problem
        dtype = torch.bfloat16 if problem.precision == "bf16" else inputs[0].dtype
        sizes = [float(whole(t.square().mean()).sqrt()) for t in inputs]
        return math.cbrt(torch.finfo(dtype).eps) * min(max(size, 0.01) for size in sizes)

    def _draw(
        self, inputs: Sequence[Tensor], solution: Stepped, reading: Reading
    ) -> list[list[Tensor]]:
        """The directions of this solve, each with one tensor per input."""
        # They depend on the number of the solve, which is part of the run's state. So all
        # processes, a resumed run and a repeated gradient have the same ones.
        key = f"{reading.reader}:solves"
        solves = int(solution.memory.get(key, torch.tensor(0)))
        solution.memory[key] = torch.tensor(solves + 1)
        seed = zlib.crc32(f"{solution.name}/{reading.reader}/{solves}".encode())
        generator = torch.Generator().manual_seed(seed)
        d = sum(tensor.numel() for tensor in inputs)
        orthogonal = self.directions == "orthogonal"
        blocks = -(-self.samples // d) if orthogonal else 1
        columns = min(self.samples, d) if orthogonal else self.samples
        drawn = []
        for _ in range(blocks):
            block = torch.randn(d, columns, generator=generator, dtype=torch.float64)
            if orthogonal:
                block = math.sqrt(d) * torch.linalg.qr(block)[0]
            drawn += list(block.T)
        return [_split(flat, inputs) for flat in drawn]


def _inner(v: Tensor, theta: Tensor) -> float:
    """⟨v, θ⟩ over all parts of a sharded parameter."""
    return float(whole(real_inner(v, theta)))


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """One tensor per tensor in `like`, from one vector of all their entries."""
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    found = []
    for part, tensor in zip(parts, like, strict=True):
        found.append(sharded_like(part.view(tensor.shape).to(tensor), tensor))
    return found


class _Estimate(torch.autograd.Function):
    """Forward: the last step's result. Backward: the estimate of the product with its Jacobian."""

    @staticmethod
    def forward(
        ctx: Any, engine: ZerothOrder, solution: Stepped, reading: Reading, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.engine, ctx.solution, ctx.reading = engine, solution, reading
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return tuple(solution.constants().values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        engine: ZerothOrder = ctx.engine
        solution: Stepped = ctx.solution
        if torch.is_grad_enabled():
            raise EngineError(
                f"The response of problem {solution.name!r} is differentiated twice, but its "
                f"engine {engine.label!r} cannot be. Give it an engine with autograd products"
                + solution.evaluation.loss.advice.phrase(", such as {}", "one_step", "direct")
                + "."
            )
        wanted = ctx.needs_input_grad[3:]  # after `engine`, `solution` and `reading`
        pairs = zip(solution.value, cotangents, strict=True)
        v = {name: cotangent for name, cotangent in pairs if cotangent is not None}
        if not v or not any(wanted):
            return (None,) * (3 + len(wanted))
        saved = zip(ctx.saved_tensors, wanted, strict=True)
        inputs = [tensor if want else None for tensor, want in saved]
        estimate, made = engine.estimate(solution, ctx.reading, inputs, v)
        found = iter(estimate)
        ctx.reading.note(engine.report(solution.name, iterations=made))
        return (None, None, None, *[next(found) if want else None for want in wanted])


def _end(solution: Stepped, reading: Reading, shifts: Sequence[Tensor | None]) -> Tensors:
    """θ_K with the reads of all steps perturbed by `shifts`, flat (None: not at all)."""
    first = solution.history[0]
    shift_of: dict[Place, list[Tensor | None]] = {}
    rest = iter(shifts)
    for item in solution.free_inputs:
        shift_of[_place(item)] = [next(rest) for _ in _values(item, first)]
    theta = {name: tensor.detach() for name, tensor in first.evaluation.parameters.items()}
    state = {key: tensor.detach() for key, tensor in first.step.differentiable_state().items()}
    for recorded in solution.history:
        displaced: list[Tensor] = []
        for item in recorded.evaluation.free_inputs:
            pairs = zip(_values(item, recorded), shift_of[_place(item)], strict=True)
            displaced += [value if by is None else value.detach() + by for value, by in pairs]
        theta, state = _step(solution.at_step(recorded), reading, theta, state, displaced)
    return theta


def _step(
    solution: Stepped,
    reading: Reading,
    parameters: Tensors,
    state: Mapping[StateKey, Tensor],
    inputs: Sequence[Tensor],
) -> tuple[Tensors, dict[StateKey, Tensor]]:
    """A recorded step, repeated from other parameters, state and inputs."""
    evaluation = solution.evaluation
    problem = evaluation.loss.problem
    theta = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    constants = [tensor.detach() for tensor in inputs]
    gradient: Tensors = {}
    with ExitStack() as stack:
        call = Pullback(
            solution=solution,
            outputs=(),
            inputs=constants,
            wanted=[False] * len(constants),
            differentiate=False,
            reading=reading,
            stack=stack,
        )
        call.check_repeats()
        stack.enter_context(without_tf32(problem.device, allowed=False))
        with torch.enable_grad():
            reads = stack.enter_context(call.reads_at(theta, constants))
            losses = stack.enter_context(evaluation.losses(theta, reads))
            for player, members in problem.player_parameters.items():
                own = [theta[name] for name in members]
                gradient |= zip(
                    members, gradients(losses[player], own, retain_graph=True), strict=True
                )
        # Learned settings, and what follows the step, are functions of the inputs too.
        step = evaluation.step_at(solution.step, reads)
        before = {name: tensor.detach() for name, tensor in theta.items()}
        moved, after_state = step.apply_with_state(before, gradient, state)
        return evaluation.after_step(moved, reads), after_state


def _place(item: Input) -> Place:
    return item.name, id(item.solution)


def _values(item: Input, recorded: RecordedStep) -> Sequence[Tensor]:
    """The tensors of an input as they were at a step."""
    if item.solution is not None:
        return list(item.solution.value.values())
    return list(recorded.evaluation.values[item.name].values())
