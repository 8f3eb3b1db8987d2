"""Says whose loss raised an error, and what PyTorch's message means there."""

from __future__ import annotations

from collections.abc import Sequence

from mlo.errors import ProblemError

__all__ = [
    "NO_DERIVATIVE",
    "RAISED_IN",
    "WANTS_GRADIENT",
    "explain_frozen",
    "explain_inference",
    "explain_undifferentiated",
    "say_whose",
]

WANTS_GRADIENT = (
    "does not require grad",  # torch.autograd.grad, of or in such a tensor
    "has requires_grad=False",  # Tensor.retain_grad
    "doesn't require gradient",  # Tensor.register_hook
)
"""What PyTorch says where a tensor must require a gradient and does not."""

NO_DERIVATIVE = (
    "is not differentiable with respect to argument",  # cross_entropy(weight=)
    "must be float, not Tensor",  # cross_entropy(label_smoothing=), dropout(p=)
)
"""What PyTorch says where a tensor that requires a gradient is in the place of a constant."""

RAISED_IN = "It was raised in the loss of problem"


def say_whose(error: Exception, problem: str) -> None:
    """Adds to an error whose loss it came from: all losses may share one function."""
    note = f"{RAISED_IN} {problem!r}."
    if note not in getattr(error, "__notes__", ()) and repr(problem) not in str(error):
        error.add_note(note)


def explain_frozen(error: BaseException, problems: Sequence[str]) -> None:
    """Says that a loss has frozen what it is differentiated in, if that is the error.

    Args:
        error: as PyTorch raised it.
        problems: those whose losses it may be.

    Raises:
        ProblemError: naming them.
    """
    notes = getattr(error, "__notes__", ())
    if any(note.startswith(RAISED_IN) for note in notes):
        return  # where the loss itself takes a gradient
    if "differentiated Tensors does not require grad" not in str(error):
        return
    whose = " or ".join(map(repr, problems))
    raise ProblemError(
        f"The loss of problem {whose} freezes parameters (requires_grad_(False)) of a module that "
        "it reads, in which it must be differentiated. Leave them as they are: a loss moves no "
        "parameters but its own. To hold a value constant, detach() what is computed from it."
    ) from error


def explain_inference(error: Exception, problem: str) -> None:
    """Says whose loss uses a tensor of inference mode, if that is the error.

    Raises:
        ProblemError: naming the problem.
    """
    if isinstance(error, RuntimeError) and "nference tensor" in str(error):
        raise ProblemError(
            f"Problem {problem!r}: its loss uses a tensor that was made under "
            "torch.inference_mode(): of its batch, or a constant. PyTorch cannot differentiate "
            "what is computed from it. Make it outside, or under torch.no_grad() instead, or "
            "clone() it outside."
        ) from error


def explain_undifferentiated(error: RuntimeError, problem: str) -> None:
    """Says whose loss PyTorch could not differentiate.

    Raises:
        ProblemError: if a part of the loss's graph is gone, or what it depends on was frozen.
    """
    explain_frozen(error, [problem])
    explain_inference(error, problem)
    if "backward through the graph a second time" in str(error):
        raise ProblemError(
            f"Problem {problem!r}: a part of the graph of its loss was used up before the loss "
            "could be differentiated. Either the loss calls backward() itself, or it contains a "
            "tensor with the graph of an earlier call (a running mean, say). Return the loss, and "
            "let mlo differentiate it. Inside it use torch.autograd.grad(..., create_graph=True); "
            "detach() what is kept between calls."
        ) from error
    say_whose(error, problem)
