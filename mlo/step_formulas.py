"""The steps of SGD, Adam and AdamW as functions of their settings, for settings that are learned.

`torch.optim` takes settings as numbers, so a derivative with respect to them needs the formulas.
Each formula is that of `torch.optim`, term by term and in its order; a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlo.errors import ProblemError, nearest

__all__ = [
    "check_learned_settings",
    "check_values",
    "common_numbers",
    "formula_step",
    "resolve_settings",
]

State = dict[str, Any]


def formula_step(
    kind: type[Optimizer], theta: Tensor, g: Tensor, options: Mapping[str, Any], state: State
) -> tuple[Tensor, State]:
    """One step of one parameter, differentiable in everything.

    Args:
        kind: the optimizer's class, one of `LEARNED`.
        theta: the parameter before the step.
        g: its gradient, of the same shape.
        options: the settings; the learned ones as tensors, scalars or of the parameter's shape.
        state: the optimizer's state of this parameter; empty before its first step.

    Returns:
        The parameter and the state after the step.
    """
    g = -g if options["maximize"] else g
    step = LEARNED[kind].step
    if not theta.is_complex():
        return step(theta, g, options, state)
    # As torch.optim does it: a real and an imaginary number, each with its own square.
    moved, after = step(
        _as_real(theta),
        _as_real(g),
        {key: _for_both_parts(value) for key, value in options.items()},
        {key: _as_real(value) for key, value in state.items()},
    )
    return torch.view_as_complex(moved), {
        key: torch.view_as_complex(value) if isinstance(value, Tensor) and value.dim() else value
        for key, value in after.items()
    }


def _as_real(value: Any) -> Any:
    """A complex tensor as a real one with another dimension; anything else as it is."""
    complex_ = isinstance(value, Tensor) and value.is_complex()
    return torch.view_as_real(value.resolve_conj()) if complex_ else value


def _for_both_parts(setting: Any) -> Any:
    """A setting of a complex parameter, for its real view: each part of an entry has the same."""
    if isinstance(setting, tuple):
        return tuple(map(_for_both_parts, setting))
    return setting.unsqueeze(-1) if isinstance(setting, Tensor) and setting.dim() else setting


def _sgd(
    theta: Tensor, g: Tensor, options: Mapping[str, Any], state: State
) -> tuple[Tensor, State]:
    # b' = μ b + (1 − τ) g, where the first buffer is the bare gradient; θ' = θ − η b', with
    # nesterov θ' = θ − η (g + μ b').
    momentum, decay = options["momentum"], options["weight_decay"]
    if _acts(decay):
        g = g + decay * theta
    if not _acts(momentum):
        return theta - options["lr"] * g, dict(state)
    buffer = state.get("momentum_buffer")
    buffer = g * 1.0 if buffer is None else momentum * buffer + (1.0 - options["dampening"]) * g
    direction = g + momentum * buffer if options["nesterov"] else buffer
    return theta - options["lr"] * direction, {**state, "momentum_buffer": buffer}


def _adam(
    theta: Tensor, g: Tensor, options: Mapping[str, Any], state: State
) -> tuple[Tensor, State]:
    # m' = β₁ m + (1 − β₁) g,  v' = β₂ v + (1 − β₂) g²,
    # θ' = θ − η m' / (1 − β₁ᵗ) / (√(v' / (1 − β₂ᵗ)) + ε), with the largest v so far for amsgrad.
    # The decay c is decoupled (AdamW), θ ← (1 − η c) θ, or a term c θ of g.
    (first, second), lr, decay = options["betas"], options["lr"], options["weight_decay"]
    if _acts(decay):
        if options.get("decoupled_weight_decay"):
            theta = theta * (1.0 - lr * decay)
        else:
            g = g + decay * theta
    t = float(state.get("step", 0.0)) + 1.0
    zero = torch.zeros_like(theta)
    m = first * state.get("exp_avg", zero) + (1.0 - first) * g
    v = second * state.get("exp_avg_sq", zero) + (1.0 - second) * g * g
    after = {**state, "step": t, "exp_avg": m, "exp_avg_sq": v}
    if options["amsgrad"]:
        v = torch.maximum(state.get("max_exp_avg_sq", zero), v)
        after["max_exp_avg_sq"] = v
    root = v.sqrt() / (1.0 - second**t) ** 0.5 + options["eps"]
    return theta - lr / (1.0 - first**t) * m / root, after


def _adamw(
    theta: Tensor, g: Tensor, options: Mapping[str, Any], state: State
) -> tuple[Tensor, State]:
    return _adam(theta, g, {**options, "decoupled_weight_decay": True}, state)


def _acts(setting: Any) -> bool:
    """Whether a setting has an effect; a learned one has a derivative even at zero."""
    return isinstance(setting, Tensor) or setting != 0


class _Learned:
    """An optimizer whose settings can be learned: its formula, and their names."""

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, Mapping[str, Any], State], tuple[Tensor, State]],
        settings: tuple[str, ...],
    ) -> None:
        self.step, self.settings = step, settings


LEARNED: dict[type[Optimizer], _Learned] = {
    torch.optim.SGD: _Learned(_sgd, ("lr", "weight_decay", "momentum", "dampening")),
    torch.optim.Adam: _Learned(_adam, ("lr", "weight_decay", "betas", "eps")),
    torch.optim.AdamW: _Learned(_adamw, ("lr", "weight_decay", "betas", "eps")),
}
"""Class of an optimizer → how a step of it is made from settings."""


def check_learned_settings(problem: str, optimizers: Iterable[Optimizer]) -> None:
    """Refuses optimizers whose formula is not known here.

    Raises:
        ProblemError: naming the optimizer.
    """
    for optimizer in optimizers:
        if type(optimizer) not in LEARNED:
            raise ProblemError(
                f"Problem {problem!r}: settings= supports torch.optim's SGD, Adam and AdamW, "
                f"whose steps are known as formulas; got {type(optimizer).__name__}. Use one of "
                "these, or let the loss read the learned value."
            )


def resolve_settings(
    problem: str, returned: Any, optimizer_of: Mapping[str, Optimizer], like: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """What `settings` returned, by parameter.

    Args:
        problem: its name, for messages.
        returned: the dict that the problem's `settings` returned.
        optimizer_of: parameter → its optimizer.
        like: parameter → a tensor of its shape.

    Returns:
        Parameter → setting → number or tensor ("betas": a pair), for what was returned.

    Raises:
        ProblemError: for a setting or parameter that does not exist, or a value of another shape.
    """
    if not isinstance(returned, Mapping):
        raise ProblemError(
            f"Problem {problem!r}: settings must return a dict setting → value, such as "
            f'{{"lr": ...}}, got a {type(returned).__name__}.'
        )
    found: dict[str, dict[str, Any]] = {name: {} for name in like}
    for key, value in returned.items():
        takers = [n for n in like if key in LEARNED[type(optimizer_of[n])].settings]
        if not takers:
            known = dict.fromkeys(
                s for o in optimizer_of.values() for s in LEARNED[type(o)].settings
            )
            raise ProblemError(
                f"Problem {problem!r}: settings returned {key!r}, which its optimizer does not "
                f"learn. {nearest(str(key), known)}"
            )
        of_parameter = value if isinstance(value, Mapping) else dict.fromkeys(takers, value)
        for name, entry in of_parameter.items():
            if name not in takers:
                raise ProblemError(
                    f"Problem {problem!r}: settings returned {key!r} for the parameter {name!r}, "
                    f"which has none. {nearest(str(name), takers)}"
                )
            found[name][key] = _checked(problem, key, name, entry, like[name].shape)
    return found


def _checked(problem: str, key: str, name: str, value: Any, shape: torch.Size) -> Any:
    """A value of a setting, of a shape that its formula can take."""
    if key == "betas":
        pair = value.unbind() if isinstance(value, Tensor) and value.dim() else value
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ProblemError(
                f"Problem {problem!r}: the setting 'betas' of {name!r} must be a pair, got "
                f"{value!r}."
            )
        return tuple(_checked(problem, "beta", name, entry, shape) for entry in pair)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.numel() == 1:
            # Where it can be the object itself, by which it is known that parameters share it.
            return value if value.dim() == 0 else value.reshape(())
        if value.shape == shape:
            return value
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ProblemError(
        f"Problem {problem!r}: the setting {key!r} of {name!r} must be a number, a scalar tensor, "
        f"or a tensor of its shape {tuple(shape)}, got {got}."
    )


def check_values(problem: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses values with which no step can be made.

    Args:
        problem: its name, for messages.
        settings: parameter → setting → value.

    Raises:
        ProblemError: for a negative value or one that is not finite; for a beta of 1 or more.
    """
    seen: set[tuple[str, int]] = set()
    for name, of_parameter in settings.items():
        for key, value in of_parameter.items():
            for entry in value if key == "betas" else (value,):
                if (key, id(entry)) in seen:
                    continue
                seen.add((key, id(entry)))
                number = torch.as_tensor(entry)
                low, high = float(number.min()), float(number.max())
                limit = 1.0 if key == "betas" else math.inf
                if not (low >= 0.0 and high < limit):
                    raise ProblemError(
                        f"Problem {problem!r}: the setting {key!r} of {name!r} is "
                        f"{high if low >= 0.0 else low:.6g}; it must be finite, not negative"
                        f"{', and below 1' if key == 'betas' else ''}. Map the learned value to "
                        "its range, for example by exp or sigmoid."
                    )


def common_numbers(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all parameters of a group share, as numbers.

    Args:
        settings: one mapping per parameter, setting → value.
    """
    found: dict[str, Any] = {}
    for key in settings[0] if settings else {}:
        shared = {_numbers(key, of_parameter.get(key)) for of_parameter in settings}
        (numbers,) = shared if len(shared) == 1 else (None,)
        if numbers is not None:
            found[key] = numbers if key == "betas" else numbers[0]
    return found


def _numbers(key: str, value: Any) -> tuple[float, ...] | None:
    """A setting as numbers; None if it is not given, or differs between entries."""
    if value is None:
        return None
    entries = value if key == "betas" else (value,)
    if any(torch.as_tensor(entry).numel() != 1 for entry in entries):
        return None
    return tuple(float(entry) for entry in entries)
