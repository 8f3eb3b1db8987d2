"""Finds operations without a second derivative in a loss, before an engine depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlo.advice import EngineAdvice
from mlo.errors import EngineError, ProblemError

__all__ = [
    "EVERYWHERE",
    "SecondDerivative",
    "check_checkpointing",
    "check_compiled",
    "check_double_backward",
    "check_silent_operations",
    "explains_double_backward",
    "functions_in",
    "inputs_of_second",
    "is_about_double_backward",
    "is_users",
    "leaves_of",
    "no_double_backward",
]


ANY_ENGINE = EngineAdvice()
"""Advice on a problem of which nothing is known."""


@dataclass(frozen=True, kw_only=True)
class WrongSecondDerivative:
    """An operation of PyTorch whose second derivative is not the derivative of its first.

    Attributes:
        operation: what users call it.
        instead: what to use.
        applies: whether a node of the graph, which has the operation's name, is affected.
        is_slope: whether its first derivative is that of its value, so that finite differences
            serve.
    """

    operation: str
    instead: str
    applies: Callable[[Any], bool] = lambda node: True
    is_slope: bool = True


# Found by gradgradcheck over the common operations (tests/oracle/test_second_derivatives.py, which
# fails when a version of PyTorch has another list).
WRONG_SECOND_DERIVATIVES = {
    "WeightNormInterfaceBackward0": WrongSecondDerivative(
        operation="torch._weight_norm (of torch.nn.utils' weight_norm)",
        instead=(
            "Replace it by a parametrization of your own (torch.nn.utils.parametrize) whose "
            "forward computes g * v / ‖v‖ with plain operations; docs/troubleshooting.md has it."
        ),
    ),
    "NativeLayerNormBackward0": WrongSecondDerivative(
        operation="layer_norm with a bias and without a weight",
        instead="Give it a weight of ones, or add the bias after it.",
        applies=lambda node: node._saved_weight is None and node._saved_bias is not None,
    ),
    "EmbeddingBackward0": WrongSecondDerivative(
        operation="an embedding with scale_grad_by_freq=True",
        instead="Leave the option out and weight the loss instead.",
        applies=lambda node: bool(node._saved_scale_grad_by_freq),
        is_slope=False,
    ),
}
"""Name of a node of the autograd graph → what is wrong with it."""

WITHOUT_SECOND = ("darts", "penalty")
"""Engines to advise that take no second derivatives."""

MISSING = "of which PyTorch has no third derivative"
WRONG = "whose third derivative is wrong in PyTorch"
_BATCH_NORM = WrongSecondDerivative(
    operation="batch_norm in training mode (of BatchNorm or InstanceNorm)",
    instead=MISSING,
    applies=lambda node: getattr(node, "_saved_training", True),
)

# Found by third derivatives of the common operations in the same test.
NO_THIRD_DERIVATIVES = {
    "NativeBatchNormBackward0": _BATCH_NORM,
    "CudnnBatchNormBackward0": _BATCH_NORM,
    "MiopenBatchNormBackward0": _BATCH_NORM,
    "BatchNormWithUpdateBackward0": _BATCH_NORM,
    "NativeLayerNormBackward0": WrongSecondDerivative(operation="layer_norm", instead=WRONG),
}
"""The same of third derivatives: missing, or wrong (as if the statistics were constants)."""


def check_double_backward(
    problem: str,
    loss: Tensor,
    parameters: Sequence[Tensor],
    advice: EngineAdvice = ANY_ENGINE,
    *,
    mixed: bool = False,
    once: bool = False,
) -> None:
    """Refuses a loss whose gradient cannot be differentiated, by differentiating it.

    Activation checkpoints in the graph run their modules again.

    Args:
        problem: its name.
        loss: scalar, with its graph, which is retained.
        parameters: leaves whose gradient it is. It is differentiated in these, and in all others
            that it depends on.
        advice: names other engines.
        mixed: whether it is differentiated in the others only. (A loss may have that derivative
            alone, as if an embedding bag is fitted with a learned weight decay.)
        once: whether the gradient is differentiated once (see `check_silent_operations`).

    Raises:
        EngineError: naming the operation and what to do.
    """
    if not loss.requires_grad:
        return
    # (Compiled code first: other checks run its backward, which may end in PyTorch's own error.)
    inputs = inputs_of_second(loss, parameters, mixed=mixed)
    check_compiled(problem, loss, SecondDerivative(parameters, inputs), advice)
    check_silent_operations(problem, loss, parameters if once else None, advice)

    # Then operations that fail, tried before the first step rather than in the middle of a solve.
    # Names of nodes do not tell them: some fail only when they are run (`embedding_bag`), and some
    # are off the path of the second derivative.
    found = torch.autograd.grad(loss, list(parameters), create_graph=True, allow_unused=True)
    # (Sparse gradients are refused where they are added.)
    gradient = [g for g in found if g is not None and g.requires_grad and not g.is_sparse]
    if not gradient or not inputs:
        return
    along = list(map(torch.ones_like, gradient))
    try:
        with explains_double_backward(problem, advice):
            # (The gradient's graph contains the loss's, which the caller still needs.)
            torch.autograd.grad(gradient, inputs, along, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        # A loss that takes a gradient itself may lack a third derivative that no engine needs.
        if not is_about_third_derivative(error):
            raise


def check_silent_operations(
    problem: str,
    loss: Tensor,
    parameters: Sequence[Tensor] | None = None,
    advice: EngineAdvice = ANY_ENGINE,
) -> None:
    """Refuses operations whose second derivative exists and is wrong.

    Args:
        problem: its name.
        loss: scalar, with its graph.
        parameters: in which it is differentiated first, if its gradient is differentiated once.
            An operation from which none of them is reached (a network above that makes the data)
            then takes no part in the gradient, and gives its first derivative to the second. None:
            all operations are differentiated twice.
        advice: names other engines.

    Raises:
        EngineError: naming the operation and what to do.
    """
    functions = []  # nodes of classes that are not PyTorch's own
    suspects = [node for node in _graph([loss]) if _is_suspect(node)]
    if suspects and parameters is not None:
        twice = _leading_to(parameters, loss)
        suspects = [node for node in suspects if node in twice]
    for node in suspects:
        wrong = WRONG_SECOND_DERIVATIVES.get(node.name())
        if wrong is not None:
            raise EngineError(
                f"Problem {problem!r}: its loss uses {wrong.operation}, whose second derivative is "
                f"wrong in PyTorch (found with {torch.__version__} or before). {wrong.instead}"
                + (advice.phrase(" Or use {}.", *WITHOUT_SECOND) if wrong.is_slope else "")
            )
        cls = getattr(node, "_forward_cls", None)  # of a torch.autograd.Function
        backward = getattr(cls, "backward", None)
        if cls is not None and _is_once_differentiable(backward):
            # PyTorch would not fail, but treat its second derivative as zero.
            raise no_double_backward(
                problem, f"{cls.__name__}.backward is once_differentiable", advice
            )
        if cls is not None:
            functions.append(node)
    hidden = _hidden_backward(loss, functions)
    if hidden is not None:
        raise EngineError(
            f"Problem {problem!r}: its loss uses the torch.autograd.Function {hidden!r}, whose "
            "backward computes where autograd does not see it (under torch.no_grad(), in a kernel "
            "of its own, in NumPy). PyTorch would treat that as constant, so a second derivative "
            "would silently lack what flows through it. Use an implementation in plain operations "
            "(for torchdiffeq: odeint instead of odeint_adjoint)"
            f"{advice.phrase(', or {}', *WITHOUT_SECOND)}."
        )


@dataclass(frozen=True)
class SecondDerivative:
    """In which tensors the first and the second derivative of a loss are taken; None: in all."""

    first: Sequence[Tensor] | None = None
    second: Sequence[Tensor] | None = None


EVERYWHERE = SecondDerivative()
"""In all tensors."""


def functions_in(loss: Tensor, taken: SecondDerivative) -> dict[Any, tuple[tuple[bool, bool], ...]]:
    """The calls of users' `torch.autograd.Function`s of which a second derivative is taken.

    Args:
        loss: scalar, with its graph.
        taken: which one.

    Returns:
        Node of the graph → for each tensor among its arguments, whether the first derivative is
        taken in it, and the second.
    """
    return _calls_of(is_users, loss, taken)


def _calls_of(
    wanted: Callable[[type | None], bool], loss: Tensor, taken: SecondDerivative
) -> dict[Any, tuple[tuple[bool, bool], ...]]:
    """As `functions_in`, of the Functions that are wanted."""
    graph = _graph([loss])
    nodes = [node for node in graph if wanted(getattr(node, "_forward_cls", None))]
    if not nodes:
        return {}
    first, second = [
        set(graph) if tensors is None else _leading_to(tensors, loss)
        for tensors in (taken.first, taken.second)
    ]
    return {
        node: tuple([(earlier in first, earlier in second) for earlier, _ in node.next_functions])
        for node in nodes
        if node in first
    }


def is_users(function: type | None) -> bool:
    """Whether a `torch.autograd.Function` is neither PyTorch's nor ours."""
    if function is None:
        return False
    # (Of an operation made by torch.library.custom_op, PyTorch makes the class.)
    made = function.__module__ == "torch._library.autograd"
    return made or function.__module__.split(".")[0] not in ("torch", "mlo")


def _is_compiled(function: type | None) -> bool:
    """Whether a `torch.autograd.Function` is a part of a program that torch.compile has made."""
    module = "" if function is None else function.__module__
    return module.startswith("torch._functorch._aot_autograd")


def check_compiled(
    problem: str, loss: Tensor, taken: SecondDerivative, advice: EngineAdvice
) -> None:
    """Refuses code compiled by `torch.compile` of which a second derivative is taken.

    It has none. PyTorch says so only if that derivative passes an input that the code has saved. If
    the code has saved what it computed itself (an `exp`), PyTorch treats that as constant.

    Raises:
        EngineError: with what to do.
    """
    calls = _calls_of(_is_compiled, loss, taken)
    if any(second for derivatives in calls.values() for _, second in derivatives):
        raise EngineError(
            f"Problem {problem!r}: its loss runs code that torch.compile has compiled, of which "
            "PyTorch has no second derivative. Leave it uncompiled"
            f"{advice.phrase(', or use {}', *WITHOUT_SECOND)}."
        )


def _is_suspect(node: Any) -> bool:
    """Whether a second derivative of a node may be silently wrong."""
    wrong = WRONG_SECOND_DERIVATIVES.get(node.name())
    return hasattr(node, "_forward_cls") if wrong is None else wrong.applies(node)


def _leading_to(tensors: Sequence[Tensor], loss: Tensor) -> set[torch.autograd.graph.Node]:
    """The nodes of a loss's graph from which some of the tensors are reached."""
    leaves = set(map(id, tensors))
    found = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    users: dict[torch.autograd.graph.Node, list[torch.autograd.graph.Node]] = {}
    for node in _graph([loss]):
        if id(getattr(node, "variable", None)) in leaves:
            found.add(node)
        for earlier, _ in node.next_functions:
            if earlier is not None:
                users.setdefault(earlier, []).append(node)
    waiting = list(found)
    while waiting:
        for user in users.get(waiting.pop(), ()):
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def _hidden_backward(loss: Tensor, functions: Sequence[Any]) -> str | None:
    """The name of a `torch.autograd.Function` whose backward leaves no graph, or None.

    A backward is linear in what it receives. So if that requires a gradient, whatever the backward
    returns does too, unless it is zero. What does not was computed out of autograd's sight.

    Args:
        loss: scalar, with its graph, which is retained.
        functions: nodes of the graph that may have such a backward.
    """
    if not functions:
        return None
    found: list[str] = []

    def look(node: Any) -> Callable[..., None]:
        def hook(returned: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
            cut = [entry for entry in returned if entry is not None and not entry.requires_grad]
            if any(bool((entry != 0).any()) for entry in cut):
                found.append(node._forward_cls.__name__)

        return hook

    handles = [node.register_hook(look(node)) for node in functions]
    try:
        # The weight of the loss requires a gradient, so that all cotangents do.
        weight = torch.ones_like(loss).requires_grad_()
        torch.autograd.grad(loss, leaves_of(loss), weight, create_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None  # others may only have passed on what it returned


def is_about_double_backward(error: RuntimeError) -> bool:
    """Whether an error of PyTorch says that a derivative is missing, and nothing else."""
    words = (
        "is not implemented",
        "does not currently support double backward",
        "once_differentiable",
        "differentiate twice",
    )
    return any(part in str(error) for part in words)


@contextmanager
def explains_double_backward(problem: str, advice: EngineAdvice) -> Iterator[None]:
    """Runs a derivative of a loss's gradient in the body, and says what it means if it is missing.

    Args:
        problem: whose loss.
        advice: names other engines.

    Raises:
        EngineError: naming the operation and what to do.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_about_double_backward(error):
            raise
        raise no_double_backward(problem, str(error), advice) from error


def no_double_backward(problem: str, reason: str, advice: EngineAdvice) -> EngineError:
    """Returns the error for a loss whose second derivative was requested and does not exist."""
    return EngineError(
        f"Problem {problem!r}: an operation in its loss has no double backward ({reason}). Use an "
        "implementation that has one (for attention: "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
        f"{advice.phrase(', or {}', *WITHOUT_SECOND)}."
    )


def check_third_derivative(
    problem: str, losses: Iterable[Tensor], variables: Sequence[Tensor], advice: EngineAdvice
) -> None:
    """Refuses a loss whose second derivative is differentiated again, and cannot be.

    Args:
        problem: its name.
        losses: scalars with their graphs, one per player.
        variables: what the third derivative is taken in.
        advice: says which engine takes it.

    Raises:
        EngineError: naming the operation, that engine and what to do.
    """
    starts = {tensor.grad_fn for tensor in variables if tensor.grad_fn is not None}
    for node in _graph(losses):
        lacking = NO_THIRD_DERIVATIVES.get(node.name())
        if lacking is None or not lacking.applies(node):
            continue
        # Statistics that no variable moves are constants, whose missing derivative is not used.
        inputs = _behind([earlier for earlier, _ in node.next_functions[:1]])
        if starts.isdisjoint(inputs):
            continue
        raise no_third_derivative(problem, f"{lacking.operation}, {lacking.instead}", advice)


def is_about_third_derivative(error: RuntimeError) -> bool:
    """Whether an error of PyTorch says that a third derivative is missing."""
    return "3rd+ order" in str(error)


def no_third_derivative(problem: str, operation: str, advice: EngineAdvice) -> EngineError:
    """Returns the error for a loss whose third derivative was requested and does not exist.

    Args:
        problem: its name.
        operation: what lacks it, and how.
        advice: says which engine takes it.
    """
    by = advice.third or "an engine of a problem above it"
    return EngineError(
        f"Problem {problem!r}: its loss uses {operation}. It is needed, because {by} "
        f"differentiates a gradient that contains the response of {problem!r}. Use another "
        "normalization (GroupNorm, RMSNorm; GroupNorm(1, n) is LayerNorm(n) for inputs [batch, n]) "
        "or BatchNorm in eval mode, or another engine there."
    )


def check_checkpointing(problem: str, loss: Tensor) -> None:
    """Refuses reentrant activation checkpointing.

    It silently disconnects parameters from `torch.autograd.grad`.

    Raises:
        ProblemError: with what to do.
    """
    if "CheckpointFunctionBackward" in {node.name() for node in _graph([loss])}:
        raise ProblemError(
            f"Problem {problem!r}: its loss uses torch.utils.checkpoint with use_reentrant=True, "
            "through which no gradient can be taken with respect to given tensors. Pass "
            "use_reentrant=False."
        )


def _is_once_differentiable(backward: object) -> bool:
    """Whether the decorator is among those of a `backward`."""
    # It leaves no mark but its wrapper, whose code is in torch.autograd.function.
    while backward is not None:
        code, inner = getattr(backward, "__code__", None), getattr(backward, "__wrapped__", None)
        if (
            inner is not None
            and getattr(code, "co_filename", "") == torch.autograd.function.__file__
        ):
            return True
        backward = inner
    return False


def inputs_of_second(loss: Tensor, parameters: Sequence[Tensor], *, mixed: bool) -> list[Tensor]:
    """The leaves in which a loss's gradient in its parameters is differentiated.

    Args:
        loss: with its graph.
        parameters: those leaves in which the gradient is taken.
        mixed: whether it is differentiated in the others only.
    """
    own = set(map(id, parameters)) if mixed else set()
    return [leaf for leaf in leaves_of(loss) if id(leaf) not in own]


def leaves_of(*outputs: Tensor) -> list[Tensor]:
    """The leaf tensors that some tensors depend on: parameters, and their stand-ins."""
    leaves = [output for output in outputs if output.grad_fn is None and output.requires_grad]
    variables = [getattr(node, "variable", None) for node in _graph(outputs)]
    return [*leaves, *[leaf for leaf in variables if leaf is not None]]


def _graph(outputs: Iterable[Tensor]) -> list[torch.autograd.graph.Node]:
    """Every node of the graph behind some tensors, once."""
    return _behind([output.grad_fn for output in outputs])


def _behind(
    nodes: Iterable[torch.autograd.graph.Node | None],
) -> list[torch.autograd.graph.Node]:
    """Some nodes and every node behind them, once."""
    found: dict[torch.autograd.graph.Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found[node] = None
        for earlier, _ in node.next_functions:
            waiting.append(earlier)
    return list(found)
