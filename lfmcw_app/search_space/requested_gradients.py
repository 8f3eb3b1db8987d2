"""Whether a graph is wanted, and which gradients: `torch.autograd.grad(loss, some_inputs)` leaves
those of others out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["differentiated", "wanted"]


def differentiated(*inputs: Tensor) -> bool:
    """Whether autograd records what is made of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def wanted(ctx: Any, index: int) -> bool:
    """Whether the backward pass that runs needs the gradient in an input of a
    `torch.autograd.Function`.

    PyTorch's own operators ask this; `ctx.needs_input_grad` says only whether the input requires
    gradients. Of a leaf PyTorch
    does not tell, and the answer is yes: pass `leaf.view_as(leaf)` to the function.

    Args:
        ctx: the function's context, in its `backward`.
        index: of the input, among those that are tensors.
    """
    node = ctx.next_functions[index][0]
    if node is None:
        return False
    is_leaf = hasattr(node, "variable")
    return is_leaf or bool(torch._C._will_engine_execute_node(node))
