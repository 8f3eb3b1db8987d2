"""Finds operations without a second derivative in a loss, before an engine with autograd products
depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlo.errors import EngineError, ProblemError

__all__ = [
    "check_checkpointing",
    "check_double_backward",
    "is_about_double_backward",
    "no_double_backward",
]


def check_double_backward(problem: str, loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Refuses a loss whose gradient cannot be differentiated, from its graph alone.

    Args:
        problem: its name.
        loss: scalar, with its graph, which is kept.
        parameters: leaves that it depends on.

    Raises:
        EngineError: naming the operation and what to do.
    """
    if not loss.requires_grad:
        return
    for node in _graph([loss]):
        cls = getattr(node, "_forward_cls", None)  # of a torch.autograd.Function
        backward = getattr(cls, "backward", None)
        if cls is not None and _is_once_differentiable(backward):
            # PyTorch would not fail but take its second derivative for zero.
            raise no_double_backward(problem, f"{cls.__name__}.backward is once_differentiable")
    found = torch.autograd.grad(loss, list(parameters), create_graph=True, allow_unused=True)
    gradient = [g for g in found if g is not None and g.requires_grad]
    names = {node.name() for node in _graph(gradient)}
    missing = [n for n in names if "NotImplemented" in n or "CompiledFunctionBackward" in n]
    if missing:
        try:
            torch.autograd.grad([g.sum() for g in gradient], list(parameters), allow_unused=True)
        except RuntimeError as error:
            raise no_double_backward(problem, str(error)) from error


def is_about_double_backward(error: RuntimeError) -> bool:
    """Whether PyTorch says that a derivative is missing, and not that memory is, or that shapes
    differ.
    """
    words = (
        "is not implemented",
        "does not currently support double backward",
        "once_differentiable",
        "differentiate twice",
    )
    return any(part in str(error) for part in words)


def no_double_backward(problem: str, reason: str) -> EngineError:
    """The error for a loss of which a second derivative was asked in vain."""
    return EngineError(
        f"Problem {problem!r}: an operation in its loss has no double backward ({reason}). Use "
        "'darts', 'penalty' or another engine with finite_difference products, or an "
        "implementation that has one (for attention: "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH))."
    )


def check_checkpointing(problem: str, loss: Tensor) -> None:
    """Refuses reentrant activation checkpointing, which cuts parameters off from
    `torch.autograd.grad` without a word.

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
    """Whether the decorator is anywhere among those of a `backward`."""
    while backward is not None:
        code, inner = getattr(backward, "__code__", None), getattr(backward, "__wrapped__", None)
        if (
            inner is not None
            and getattr(code, "co_filename", "") == torch.autograd.function.__file__
        ):
            return True
        backward = inner
    return False


def _graph(outputs: Sequence[Tensor]) -> list[torch.autograd.graph.Node]:
    """Every node of the graph behind some tensors, once."""
    found: dict[torch.autograd.graph.Node, None] = {}
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found[node] = None
        for earlier, _ in node.next_functions:
            waiting.append(earlier)
    return list(found)
