"""Optimizers that hold another one: those of Accelerate and Lightning Fabric, Lookahead, and so on.

Such an optimizer shares the groups of parameters of the one inside and calls its step. The state is
usually inside too. So what concerns the state, or the formula of a step, is asked of the optimizer
inside; only the step itself is made by the one outside.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.optim import Optimizer

__all__ = ["innermost", "is_foreign", "layers_of"]


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer at the bottom: the same one, if it holds no other."""
    for layer in layers_of(optimizer):
        found = layer
    return found


def layers_of(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer, the one that it holds, the one that this one holds, and so on."""
    layer: Optimizer | None = optimizer
    while layer is not None:
        yield layer
        layer = _held_by(layer)


def is_foreign(optimizer: Optimizer) -> bool:
    """Whether an optimizer is of another class than torch.optim's, a subclass of one included."""
    return not type(optimizer).__module__.startswith("torch.optim")


def _held_by(optimizer: Optimizer) -> Optimizer | None:
    """An optimizer among the attributes of another that has the same groups of parameters."""
    if not is_foreign(optimizer):
        return None
    groups = optimizer.param_groups
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer) and value is not optimizer:
            theirs = value.param_groups
            same = [one is other for one, other in zip(groups, theirs, strict=False)]
            if len(groups) == len(theirs) and all(same):
                return value
    return None
