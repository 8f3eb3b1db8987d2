"""Refuses declarations that cannot be right, before anything is computed.

All raise a `ProblemError` that says what to change.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

from mlo.errors import ProblemError
from mlo.inner_optimizer import innermost
from mlo.tensors import sharing_memory

RESERVED = ("default", "name")
"""Names that a problem cannot have, because they are keys of the mappings in `hypergradient=`."""

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_name(name: Any) -> None:
    """Refuses a name that no loss can read the problem under."""
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or keyword.iskeyword(name)
        or name in RESERVED
    ):
        raise ProblemError(
            f"Problem name {name!r} is not a Python identifier, or is a keyword or one of "
            f"{', '.join(RESERVED)}. A loss reads a problem through a keyword argument of its "
            "name: use letters, digits and underscores."
        )


def check_module(problem: str, module: Any) -> None:
    """Refuses what is no module, and modules whose parameters mlo cannot replace or change."""
    if not isinstance(module, nn.Module):
        raise ProblemError(
            f"Problem {problem!r}: module is a {type(module).__name__}, not a torch.nn.Module. "
            "Put a bare parameter into a module, for example torch.nn.ParameterDict({'x': "
            "parameter})."
        )
    scripted = [k for k, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        which = f"a part of its module ({scripted[0]})" if scripted[0] else "its module"
        raise ProblemError(
            f"Problem {problem!r}: {which} was made by torch.jit.script or torch.jit.trace, "
            "and TorchScript does not let mlo put other tensors in the place of its "
            "parameters. Pass the Python module that it was made from; compile=True compiles "
            "that. A part that is not trained may stay outside of the module, as a constant "
            "that the loss calls."
        )
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = [key for key, tensor in tensors if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ProblemError(
            f"Problem {problem!r}: {some(lazy)} of its module have no shape yet (lazy modules). "
            "Call the module once on a batch, under torch.no_grad(), before the problem is "
            "declared."
        )
    frozen = [key for key, tensor in tensors if tensor.is_inference()]
    if frozen:
        raise ProblemError(
            f"Problem {problem!r}: {some(frozen)} of its module were made under "
            "torch.inference_mode(), so PyTorch can neither differentiate nor change them. "
            "Make the module outside of it (torch.no_grad() does no harm), or give the module "
            "clones of them: nn.Parameter(tensor.clone())."
        )


def check_data(problem: str, data: Any, option: str = "data") -> None:
    """Refuses what cannot be iterated, and what would yield other things than batches."""
    if isinstance(data, Mapping):
        raise ProblemError(
            f"Problem {problem!r}: {option} is a {type(data).__name__}, whose iteration yields its "
            f"keys. For a single batch pass a list of it: {option}=[batch]."
        )
    kind = type(data)
    if isinstance(data, Dataset) and not hasattr(kind, "__iter__"):
        raise ProblemError(
            f"Problem {problem!r}: {option} is a {type(data).__name__}, a data set whose items "
            "would each be a batch. Pass DataLoader(data_set, batch_size=...); if its items are "
            "batches, batch_size=None."
        )
    # (Python iterates whatever can be indexed, too.)
    if data is not None and not hasattr(kind, "__iter__") and not hasattr(kind, "__getitem__"):
        call = " Of a generator function make a class whose __iter__ is that function."
        raise ProblemError(
            f"Problem {problem!r}: {option}={data!r:.60} cannot be iterated. Pass an "
            "iterable of batches, such as a DataLoader or a list."
            f"{call if callable(data) else ''}"
        )
    if not isinstance(data, (list, tuple)):
        return
    if any(isinstance(entry, (DataLoader, Dataset, Iterator)) for entry in data):
        raise ProblemError(
            f"Problem {problem!r}: {option} is a {type(data).__name__} of loaders or data sets, "
            "whose entries would each be taken for one batch. Pass one iterable of batches: for "
            "several loaders together, an iterable that yields a batch of each as a tuple (a "
            "class whose __iter__ returns zip(first, second)), or give each problem its own."
        )


def check_optimizers(
    problem: str,
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizers: Mapping[str, Any],
) -> None:
    """Refuses optimizers that do not divide the module's trainable parameters among themselves.

    Args:
        problem: the problem, for messages.
        module: its module.
        parameters: the trainable ones, by name.
        optimizers: by name.
    """
    if not optimizers:
        raise ProblemError(
            f"Problem {problem!r}: no optimizer was given. Pass a torch.optim optimizer of "
            "its module's parameters, or a list or dict of several."
        )
    optimized: set[int] = set()
    for optimizer in optimizers.values():
        if not isinstance(optimizer, Optimizer):
            resembles = hasattr(optimizer, "param_groups") and not isinstance(optimizer, type)
            raise ProblemError(
                f"Problem {problem!r}: optimizer must be a torch.optim optimizer (an object, "
                f"not its class), got {optimizer!r}."
                + " Its class is not derived from torch.optim.Optimizer: write one that is, "
                "with its param_groups, whose step() and state_dict() call this one's." * resembles
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ProblemError(
                f"Problem {problem!r}: LBFGS evaluates its loss several times per step "
                "through a closure, which MultilevelOptimizer does not offer. Use a "
                "first-order optimizer."
            )
        members = {
            id(parameter) for group in optimizer.param_groups for parameter in group["params"]
        }
        if optimized & members:
            raise ProblemError(
                f"Problem {problem!r}: two of its optimizers hold the same parameter, which "
                "would move twice. Give each parameter to one optimizer."
            )
        optimized |= members

    # Both ways: a parameter without an optimizer would never move, and an optimizer's own extra
    # parameter would move without belonging to any problem.
    missing = [key for key, parameter in parameters.items() if id(parameter) not in optimized]
    if missing:
        raise ProblemError(
            f"Problem {problem!r}: its optimizer lacks {len(missing)} of "
            f"{len(parameters)} parameters ({some(missing)}). Pass all of "
            "module.parameters() to the optimizer, or freeze the others with "
            "requires_grad_(False)."
        )
    foreign = optimized - {id(parameter) for parameter in module.parameters()}
    if foreign:
        raise ProblemError(
            f"Problem {problem!r}: its optimizer also holds {len(foreign)} parameters that "
            "are not in its module. Each problem optimizes its own module only."
        )
    alike = sharing_memory(parameters)
    if alike is not None:
        one, other = alike
        raise ProblemError(
            f"Problem {problem!r}: its parameters {one!r} and {other!r} share memory (one's "
            ".data is the other's), so that a step of one moves both. Tie the parameter itself "
            "(decoder.weight = encoder.weight), or give each its own memory (.data.clone())."
        )


def check_schedulers(
    problem: str,
    schedulers: Mapping[str, Any],
    optimizers: Mapping[str, Optimizer],
    *,
    named: bool,
) -> None:
    """Refuses schedulers that cannot be stepped, or that drive no optimizer of the problem.

    Args:
        problem: the problem, for messages.
        schedulers: by name.
        optimizers: by name.
        named: whether the schedulers were declared with names, which must then be those of the
            optimizers that they drive.
    """
    held = {key: innermost(optimizer) for key, optimizer in optimizers.items()}
    for name, scheduler in schedulers.items():
        if not hasattr(scheduler, "step"):
            raise ProblemError(
                f"Problem {problem!r}: scheduler must be a learning-rate scheduler, got "
                f"{scheduler!r}."
            )
        if why := _needs_arguments(scheduler):
            raise ProblemError(
                f"Problem {problem!r}: its scheduler {type(scheduler).__name__} is called "
                f"as step() after each update, but {why}. Pass an object whose step() "
                "counts the updates and calls it, with state_dict() and load_state_dict()."
            )
        # A scheduler of another optimizer would run silently and change nothing here. It may be
        # made from the optimizer that the problem's holds inside, or the other way round.
        driven = getattr(scheduler, "optimizer", None)
        if isinstance(driven, Optimizer):
            driven = innermost(driven)
        if driven is not None and not any(driven is other for other in held.values()):
            raise ProblemError(
                f"Problem {problem!r}: its scheduler drives another optimizer than the "
                "problem's. Make the scheduler from the optimizer that you pass with it."
            )
        # Equal names show which scheduler and optimizer belong together.
        namesake = held.get(name)
        if named and None not in (driven, namesake) and driven is not namesake:
            raise ProblemError(
                f"Problem {problem!r}: its scheduler {name!r} drives another optimizer than "
                f"its optimizer {name!r}. Give a scheduler the name of the optimizer that it "
                "drives."
            )


def _needs_arguments(scheduler: Any) -> str:
    """What a scheduler's step() cannot be called without, in words; empty if nothing."""
    if isinstance(scheduler, ReduceLROnPlateau):  # gets the loss
        return ""
    try:
        parameters = inspect.signature(scheduler.step).parameters.values()
    except (TypeError, ValueError):  # of code that is not Python's
        return ""
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in VARIADIC]
    return f"its step() needs {' and '.join(map(repr, needed))}" if needed else ""


def at_least(problem: str, option: str, value: Any, smallest: int) -> int:
    """The value of an option that counts something, if it is an integer that is large enough.

    NumPy's integers are integers, too.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ProblemError(
            f"Problem {problem!r}: {option} must be an integer of at least {smallest}, got "
            f"{value!r}."
        )
    return int(value)


def checked_norm(problem: str, value: Any) -> float | None:
    """The value of `grad_clip`, if it is a norm or None."""
    if value is not None and (isinstance(value, str) or not value > 0):
        raise ProblemError(
            f"Problem {problem!r}: grad_clip must be positive or None, got {value!r}."
        )
    return value


def checked_precision(problem: str, value: str | None) -> str | None:
    """The value of `precision`, if it is one that losses can be evaluated in."""
    if value in (None, "bf16"):
        return value
    advice = ""
    if value in ("fp16", "float16", torch.float16):
        advice = (
            " Gradients in float16 underflow unless the loss is scaled, and no engine knows the "
            "scale. Use 'bf16', or autocast inside the loss."
        )
    raise ProblemError(
        f"Problem {problem!r}: precision must be None or 'bf16', got {value!r}.{advice}"
    )


def checked_generators(problem: str, value: Any) -> tuple[torch.Generator, ...]:
    """The value of `generators` as a tuple, if it holds nothing else."""
    if isinstance(value, Iterable):
        generators = tuple(value)
        if all(isinstance(generator, torch.Generator) for generator in generators):
            return generators
    raise ProblemError(
        f"Problem {problem!r}: generators must be a list of the torch.Generators that its loss "
        f"draws from, got {value!r:.60}."
    )


def some(names: list[str]) -> str:
    """The first of many names, quoted."""
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
