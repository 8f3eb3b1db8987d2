"""`implicit_solution`: the response without the framework, for a solution found by any solver.

A loop, scikit-learn or a formula has found θ* with F(θ*, x) = 0. Then dθ*/dx = −A⁻¹ B with A =
∂F/∂θ and B = ∂F/∂x, however θ* was found. So this module declares θ* as the stationary solution of
a problem that reads x. The rest is shared with `MultilevelOptimizer`: the node of the autograd
graph (`response.py`), and the engines behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mlo.backward import gradients
from mlo.errors import EngineError, ProblemError, warn_user
from mlo.gradient_norm import total_norm
from mlo.hypergradient.double_backward import ANY_ENGINE, check_double_backward, leaves_of
from mlo.hypergradient.finite_difference import FiniteDifference
from mlo.hypergradient.hidden_parts import find_hidden_part, functions_of, hidden_part_message
from mlo.hypergradient.products import present
from mlo.hypergradient.registry import EngineChoice, engine_from
from mlo.loss import LossFunction
from mlo.once import SharedResults
from mlo.problem import Problem, Tensors
from mlo.randomness import RandomState, replayed
from mlo.records import SolveReport
from mlo.response import Pullback
from mlo.solution import AbstractEngine, Evaluation, Reading, Residual, Stationary, StepEngine
from mlo.stationarity import backward_error, signs_like, size_of_terms
from mlo.tensors import map_tensors

__all__ = ["implicit_solution"]

S = TypeVar("S")

NAME = "implicit_solution"
"""The problem's name in messages and reports."""

READS = "reads"

SOLVED = 1e-3
"""Relative residual of F that still counts as solved."""


def implicit_solution(
    params: S,
    reads: Any,
    *,
    loss: Callable[[S, Any], Tensor] | None = None,
    stationarity: Callable[[S, Any], S] | None = None,
    fixed_point: Callable[[S, Any], S] | None = None,
    engine: EngineChoice = "cg",
    memory: dict[str, Tensor] | None = None,
    reports: list[SolveReport] | None = None,
) -> S:
    """Makes a solution, found by any solver, a differentiable function of what it depends on.

    The condition F(θ*, x) = 0 defines the derivative, where θ is `params` and x is `reads`. How θ*
    was found does not matter. If F is not small, a warning says so.

    Pass one tensor, a (nested) dict, list or tuple of tensors, a `ParameterDict` or a
    `ParameterList`. Exactly one of `loss`, `stationarity` and `fixed_point` defines F. It is
    evaluated on copies, here and again in the backward pass, with the same random numbers.

    Args:
        params: θ*. Frozen `nn.Parameter`s and tensors of integers in it are constants.
        reads: x. The result is differentiable in those tensors of x that require a gradient; they
            may come from another network.
        loss: `loss(params, reads)` → scalar; F is its gradient in `params`. A penalty such as
            weight decay belongs in it.
        stationarity: `stationarity(params, reads)` → F, in the structure of `params`.
        fixed_point: `fixed_point(params, reads)` → T, in the structure of `params`; F = θ − T.
        engine: how A⁻ᵀ v is found. "cg" and other engines for symmetric Jacobians suit a loss;
            "gmres", "neumann" or "direct" suit other conditions.
        memory: a dict for what the engine keeps from one call to the next (`warm_start=True`, which
            is the default of "penalty", or "soba"): pass the same one each time.
        reports: a list. It receives a report on the solution (`engine="stationarity"`) at once, and
            one on each solve in the backward pass.

    Returns:
        Copies of `params` in the same structure (subclasses of dict, list and tuple are kept),
        whose backward pass is the engine's. They can be differentiated twice where
        `engine.differentiable`. Under `torch.no_grad()` copies alone.

    Raises:
        ProblemError: for tensors or functions that do not fit; also where a function depends on a
            tensor that requires a gradient and is not in `reads`, whose derivative would be
            missing.
        EngineError: for an engine that does not support the condition.
    """
    kind, function = _chosen(loss=loss, stationarity=stationarity, fixed_point=fixed_point)
    unknowns, inputs = _Tensors(params, "params"), _Tensors(reads, READS)
    theta = _unknowns_of(unknowns)
    if not torch.is_grad_enabled():
        copies = {name: tensor.clone() for name, tensor in theta.items()}
        return cast(S, unknowns.rebuilt(copies))
    chosen = engine_from(engine)
    _check_engine(chosen, has_loss=kind == "loss", has_memory=memory is not None)

    def of_structures(parameters: Tensors, read: Tensors) -> Any:
        return function(unknowns.rebuilt(parameters), inputs.rebuilt(read))

    solution = _solution(
        _Condition(kind=kind, function=of_structures),
        {name: tensor.clone() for name, tensor in theta.items()},
        inputs.named,
        chosen,
        memory,
    )
    reading = _Reading(
        values={READS: inputs.named},
        solutions={},
        reader=NAME,
        reports=[] if reports is None else reports,
    )
    _check_solution(kind, solution, reading, unknowns, inputs)
    return cast(S, unknowns.rebuilt(chosen.respond(solution, reading)))


# ------------------------------ the tensors


class _Tensors:
    """The tensors of a user's containers, by name.

    Args:
        value: a tensor, or containers of them.
        what: the argument, for messages.

    Attributes:
        named: name → tensor; "layer.weight" or "0", by its place in the containers.
    """

    def __init__(self, value: Any, what: str) -> None:
        self.what = what
        if isinstance(value, nn.ParameterList):
            value = list(value)
        elif isinstance(value, (Mapping, nn.ParameterDict)) and not isinstance(value, dict):
            value = dict(value.items())
        self._value = value
        self.named: Tensors = {}
        for name, leaf in _leaves(value, ""):
            name = name or what
            if isinstance(leaf, Tensor):
                # Two tensors of one name ({"a": {"b": …}, "a.b": …}) stay two.
                self.named[f"{name}'" if name in self.named else name] = leaf
            elif what == "params" or not isinstance(leaf, (int, float, str, bool, type(None))):
                raise ProblemError(
                    f"implicit_solution: {what} takes a tensor, or a dict, list or tuple of "
                    f"tensors; {name!r} is a {type(leaf).__name__}. Pass torch.as_tensor(array), "
                    "dict(module.named_parameters()) or list(parameters)."
                )

    def rebuilt(self, tensors: Mapping[str, Tensor]) -> Any:
        """The containers with other tensors; tensors without a replacement stay, as constants."""
        names = iter(self.named)

        def other(tensor: Tensor) -> Tensor:
            found = tensors.get(next(names))
            return tensor.detach() if found is None else found

        return map_tensors(self._value, other)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, lists and tuples, in the order of `map_tensors`."""
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, (list, tuple)):
        entries = list(enumerate(value))
    else:
        yield name, value
        return
    for key, entry in entries:
        yield from _leaves(entry, f"{name}.{key}" if name else str(key))


def _described(value: Any) -> str:
    """What a function returned, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _unknowns_of(params: _Tensors) -> Tensors:
    """Those of `params` that the solver was free to choose, detached."""
    found: Tensors = {}
    for name, tensor in params.named.items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if tensor.is_complex():
            raise ProblemError(
                f"implicit_solution: params[{name!r}] is complex. Keep it as a real tensor "
                "(torch.view_as_real) and use torch.view_as_complex in the function."
            )
        if tensor.is_floating_point() and not frozen:
            found[name] = tensor.detach()
    if not found:
        raise ProblemError(
            "implicit_solution: params has no tensor to solve for, because frozen parameters and "
            "integers are constants. Pass the tensors that the solver has found, or unfreeze them."
        )
    if len({(tensor.dtype, tensor.device) for tensor in found.values()}) > 1:
        kinds = sorted({f"{tensor.dtype} on {tensor.device}" for tensor in found.values()})
        raise ProblemError(
            f"implicit_solution: params are {' and '.join(kinds)}. A solve needs one dtype and one "
            "device: convert them, and the function's arguments back in it."
        )
    return found


# ------------------------------ the condition


def _chosen(**functions: Callable[..., Any] | None) -> tuple[str, Callable[..., Any]]:
    given = {kind: function for kind, function in functions.items() if function is not None}
    if len(given) != 1:
        raise ProblemError(
            "implicit_solution takes exactly one of loss=, stationarity= and fixed_point=, got "
            f"{' and '.join(given) or 'none'}."
        )
    ((kind, function),) = given.items()
    return kind, function


@dataclass(frozen=True, kw_only=True)
class _Condition:
    """The user's function, and how it gives F.

    Attributes:
        kind: loss, stationarity or fixed_point.
        function: (parameters, reads), by name → what the user's function returns.
    """

    kind: str
    function: Callable[[Tensors, Tensors], Any]

    def loss(self, parameters: Tensors, reads: Tensors) -> Tensor:
        """The value of the loss."""
        value = self.function(parameters, reads)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            got = value
            if isinstance(value, Tensor):
                got = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
            raise ProblemError(
                "implicit_solution: loss(params, reads) must return a floating-point scalar "
                f"tensor, got {got!r}. Reduce it, for example by .mean()."
            )
        return value.reshape(())

    def residual(self, parameters: Tensors, reads: Tensors) -> Tensors:
        """F, by parameter."""
        result = self.function(parameters, reads)
        if isinstance(result, (Mapping, nn.ParameterDict)):
            result = dict(result.items())
        found = {name or "params": leaf for name, leaf in _leaves(result, "")}
        for name, theta in parameters.items():
            entry = found.get(name)
            if not isinstance(entry, Tensor) or entry.shape != theta.shape:
                got = "nothing" if name not in found else type(entry).__name__
                if isinstance(entry, Tensor):
                    got = f"a tensor of shape {tuple(entry.shape)}"
                raise ProblemError(
                    f"implicit_solution: {self.kind}(params, reads) must return the structure of "
                    f"params; for {name!r}, of shape {tuple(theta.shape)}, it has {got}. "
                    f"It returned {_described(result)}."
                )
            entry = entry.to(theta.dtype)
            found[name] = theta - entry if self.kind == "fixed_point" else entry
        return {name: found[name] for name in parameters}


@dataclass(kw_only=True, eq=False)
class _Evaluation(Evaluation):
    """One value of a loss that is a function of tensors, and reads no modules."""

    condition: _Condition

    @contextmanager
    def losses(
        self,
        parameters: Mapping[str, Tensor],
        reads: Mapping[str, Tensors],
        *,
        players: Collection[str] | None = None,
        shared: SharedResults | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """As of any evaluation; nothing is shared."""
        with replayed(self.random_states[0]):
            value = self.condition.loss(dict(parameters), reads[READS])
        yield {NAME: value}


def _solution(
    condition: _Condition,
    theta: Tensors,
    reads: Tensors,
    engine: AbstractEngine,
    memory: dict[str, Tensor] | None,
) -> Stationary:
    """Declares the given tensors to be the solution of a problem that reads `reads`."""
    # The problem says which parameters there are. Its optimizer makes no step, and adds no decay.
    module = nn.Module()
    for name, tensor in theta.items():
        module._parameters[name] = nn.Parameter(tensor)  # whose name may contain dots
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    declared = LossFunction(Problem(NAME, module=module, optimizer=optimizer, loss=_no_loss), {})
    declared.reads = (READS,)
    declared.checks.dismiss("repeats")  # as `_check_solution` looks whether it does
    evaluation = _Evaluation(
        condition=condition,
        loss=declared,
        parameters=theta,
        batches=(None,),
        random_states=(RandomState.capture(),),
        versions=(None,),
        modes=(),
        buffers={},
        values={READS: {name: tensor.detach() for name, tensor in reads.items()}},
        solutions={},
        dependent=frozenset(),
    )
    return Stationary(
        name=NAME,
        engine=engine,
        value=theta,
        evaluation=evaluation,
        memory={} if memory is None else memory,
        residual=None if condition.kind == "loss" else _residual_of(condition),
    )


def _residual_of(condition: _Condition) -> Residual:
    @contextmanager
    def residual(
        evaluation: Evaluation, parameters: Tensors, reads: dict[str, Tensors]
    ) -> Iterator[Tensors]:
        with replayed(evaluation.random_states[0]):
            found = condition.residual(parameters, reads[READS])
        yield found

    return residual


def _no_loss(module: nn.Module, batch: Any) -> Tensor:
    raise EngineError("implicit_solution: its loss is a function of tensors, not of a module.")


def _about(value: float) -> str:
    """Its order of magnitude: Python shows a warning of the same text once per training loop."""
    return f"about 1e{round(math.log10(value))}" if 0.0 < value < math.inf else f"{value}"


@dataclass(kw_only=True, eq=False)
class _Reading(Reading):
    """Warns of solves that did not converge."""

    def note(self, report: SolveReport) -> None:
        super().note(report)
        if report.failed:
            residual = "" if report.residual is None else f" (residual {_about(report.residual)})"
            warn_user(
                f"implicit_solution: the solve of the engine {report.engine!r} did not "
                f"converge{residual}. {report.advice}"
            )


# ------------------------------ checks


def _check_engine(engine: AbstractEngine, *, has_loss: bool, has_memory: bool) -> None:
    """Refuses engines that need to know more of a solution than F."""
    if isinstance(engine, StepEngine):
        raise EngineError(
            f"implicit_solution: {engine.label!r} differentiates an optimizer's steps, but the "
            "solver's steps are unknown here. Use 'cg' (loss=), 'gmres', 'neumann' or 'direct'; "
            "or declare a Problem."
        )
    if not has_loss and not engine.takes_residuals:
        raise EngineError(
            f"implicit_solution: {engine.label!r} evaluates a loss, but none was given. Pass "
            "loss=, or an engine with autograd products, such as 'gmres', 'neumann' or 'direct'."
        )
    if engine.keeps_memory and not has_memory:
        cold = ", or give the engine warm_start=False" if hasattr(engine, "warm_start") else ""
        raise EngineError(
            f"implicit_solution: {engine.label!r} resumes from its last solve, but nothing stores "
            f"that here. Pass the same dict as memory= in all calls{cold}."
        )


def _check_solution(
    kind: str, solution: Stationary, reading: Reading, params: _Tensors, reads: _Tensors
) -> None:
    """Evaluates F once: refuses what would be silently wrong, and warns if F is not small."""
    given = list(reads.named.values())
    with ExitStack() as stack, torch.enable_grad():
        call = Pullback(
            solution=solution,
            outputs=tuple(solution.value.values()),
            inputs=given,
            wanted=[tensor.requires_grad for tensor in given],
            differentiate=False,
            reading=reading,
            stack=stack,
        )
        theta, inputs = call.parameter_aliases(), call.input_aliases()
        own = list(theta.values())

        def outputs() -> list[Tensor]:
            evaluate = call.losses if call.residual is None else call.residuals
            return list(stack.enter_context(evaluate(theta, inputs)).values())

        first = outputs()
        _check_leaves(kind, leaves_of(*first), own, inputs, params, reads)
        again = [entry.detach() for entry in outputs()]
        if call.residual is not None:
            f, products = first, _vjp(first, [*own, *call.select(inputs)])
        else:
            f, products = _of_loss(call, first[0], own, inputs)
    # (A read may be a number of another dtype, or on another device.)
    at = [tensor.detach() for tensor in [*own, *call.select(inputs)]]
    terms = math.hypot(*[size_of_terms(*pair) for pair in zip(products, at, strict=True)])
    difference = [one.detach() - other for one, other in zip(first, again, strict=True)]
    _warn_of_noise(kind, difference, terms if call.residual is not None else float(again[0].abs()))
    _warn_of_residual(reading, f, terms)


def _warn_of_noise(kind: str, difference: Sequence[Tensor], scale: float) -> None:
    """Warns of a function whose value changes when it is evaluated again, as engines do."""
    rounding = torch.finfo(difference[0].dtype).eps ** 0.5
    if float(total_norm(difference)) > rounding * scale:
        warn_user(
            f"implicit_solution: {kind}, evaluated again with the same arguments, has a different "
            "value. It keeps state between calls, or draws random numbers that are not replayed "
            "(numpy.random.default_rng(), a torch.Generator). Its derivative would be that of a "
            "different function. Draw from global random states, or put the numbers into reads."
        )


def _of_loss(
    call: Pullback, loss: Tensor, own: list[Tensor], inputs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """F and its products, by second derivatives where the engine uses them too."""
    if call.solution.engine.uses_second_derivatives:
        check_double_backward(NAME, loss, own)
        if functions := functions_of([loss]):
            again = call.displaced_losses(call.parameter_aliases(), call.input_aliases())
            hidden = find_hidden_part(again, functions)
            if hidden is not None:
                warn_user(hidden_part_message(NAME, hidden, ANY_ENGINE))
        f = gradients(loss, own, create_graph=True)
        return f, _vjp(f, [*own, *call.select(inputs)])
    system = FiniteDifference().linearize(call)
    signs = signs_like(own)
    products = [*system.transpose_product(signs), *present(system.mixed_vjp(signs))]
    return gradients(loss, own), products


def _vjp(f: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Aᵀ w and Bᵀ w with signs w drawn at random, always the same."""
    outputs, along = [], []
    for entry, signs in zip(f, signs_like(f), strict=True):
        if entry.requires_grad:
            outputs.append(entry)
            along.append(signs)
    if not outputs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(outputs, inputs, grad_outputs=along, materialize_grads=True)
    return list(found)


def _check_leaves(
    kind: str,
    found: Sequence[Tensor],
    own: Sequence[Tensor],
    inputs: Sequence[Tensor],
    params: _Tensors,
    reads: _Tensors,
) -> None:
    """Refuses a function of tensors that are not its arguments: their derivative would be lost.

    Args:
        kind: of the function.
        found: the leaves of the graph of what it returned.
        own: those that stood for the unknowns.
        inputs: those that stood for what is read.
        params: as they were given.
        reads: likewise.
    """
    arguments = {id(tensor) for tensor in [*own, *inputs]}
    for leaf in found:
        if id(leaf) in arguments:
            continue
        for given in (params, reads):
            for name, tensor in given.named.items():
                if tensor is leaf:
                    raise ProblemError(
                        f"implicit_solution: {kind} uses the tensor that was passed as "
                        f"{given.what}[{name!r}] itself. Use its argument instead."
                    )
        raise ProblemError(
            f"implicit_solution: {kind} depends on a tensor of shape {tuple(leaf.shape)} that "
            "requires a gradient and is neither in params nor in reads. Its derivative would be "
            "missing. Pass it (or what is computed from it) in reads and use that argument; or "
            "detach it, if it is a constant."
        )
    if not {id(tensor) for tensor in found} & {id(tensor) for tensor in own}:
        raise ProblemError(
            f"implicit_solution: {kind} does not depend on params. It must compute with its first "
            "argument, without .detach(), .item() or torch.no_grad()."
        )


def _warn_of_residual(reading: Reading, f: Sequence[Tensor], terms: float) -> None:
    """Reports how far the given tensors are from a solution, and warns if they are far."""
    # The error of θ is this backward error times the conditioning of A. So the tolerance is
    # stricter than gradients need.
    relative = backward_error(f, terms)
    tolerance = max(SOLVED, 10.0 * torch.finfo(f[0].dtype).eps)
    solved = relative <= tolerance
    advice = ""
    if not solved:
        advice = (
            f"The tensors are not a solution: F(params, reads) is {_about(relative)} of the terms "
            "that should cancel in it. The derivative assumes that F is zero, so its error is of "
            "that order, and larger if the Jacobian is ill-conditioned. Solve further, or "
            "correct the function: everything that the solver minimises, such as weight decay, "
            "belongs in it."
        )
        warn_user(f"implicit_solution: {advice}")
    reading.reports.append(
        SolveReport(
            problem=NAME, engine="stationarity", residual=relative, converged=solved, advice=advice
        )
    )
