"""What a Function asks PyTorch: whether to record a graph, which gradients, and in which type.

`torch.autograd.grad(loss, some_inputs)` does not ask for those of other inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["autocasted", "gradient_requested", "recorded_by_autograd"]


def recorded_by_autograd(*inputs: Tensor) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def autocasted(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs as an operator of lower precision has them under autocast; otherwise unchanged.

    Autocast does not look into a Function, whose gradients need one type for all that it saves.
    """
    kind = inputs[0].device.type
    # The meta device has no autocast.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return inputs
    narrow = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(narrow) for x in inputs)


def gradient_requested(ctx: Any, index: int) -> bool:
    """Whether the running backward pass needs the gradient in an input of a Function.

    PyTorch's own operators ask this; `ctx.needs_input_grad` says only whether the input requires
    gradients. The answer is yes where PyTorch does not tell: of a leaf (pass `leaf.view_as(leaf)`
    to the function instead), and of any input in a version without the private name that is asked.
    A compiler traces the backward pass without any engine. It gets the answer yes too, and drops
    what nobody uses.

    Args:
        ctx: the function's context, in its `backward`.
        index: of the input, among those that are tensors.
    """
    if torch.compiler.is_compiling():
        return True
    node = ctx.next_functions[index][0]
    if node is None:
        return False
    is_leaf = hasattr(node, "variable")
    will_run = getattr(torch._C, "_will_engine_execute_node", None)
    return is_leaf or will_run is None or bool(will_run(node))
