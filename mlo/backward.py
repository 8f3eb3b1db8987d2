"""`torch.autograd.grad` without argument checks, which take longer than small passes.

For a pass through a few small operators, half of the time of `torch.autograd.grad` is Python code.
It compares shapes of outputs and cotangents through symbolic ones, which takes 8 µs per output. The
engine behind it compares them again. So plain tensors go directly to the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from mlo.tensors import zeros_for_none

__all__ = ["grad", "gradients"]

_HOLDER: Any = torch.autograd.Variable
"""What has the engine.

That is private to PyTorch: a version without it takes `torch.autograd.grad`, with the same numbers.
The engine is looked up at each call, so who wraps it to count passes sees these too.
"""


def grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """The gradients of outputs with respect to inputs; None if no output depends on an input.

    Args:
        outputs: tensors with a graph.
        inputs: at least one tensor that requires a gradient.
        cotangents: one for each output, of its shape; None: ones, for scalars.
        retain_graph: whether the graph is kept; None: if `create_graph`.
        create_graph: whether the gradients can be differentiated.
    """
    outputs, inputs = tuple(outputs), tuple(inputs)
    cotangents = tuple(map(torch.ones_like, outputs) if cotangents is None else cotangents)
    kept = create_graph if retain_graph is None else retain_graph
    engine = getattr(_HOLDER, "_execution_engine", None)
    if engine is None or has_torch_function((*outputs, *inputs, *cotangents)):
        return torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            retain_graph=kept,
            create_graph=create_graph,
            allow_unused=True,
        )
    found: Sequence[Tensor | None] = engine.run_backward(
        outputs,
        cotangents,
        kept,
        create_graph,
        inputs,
        True,  # inputs that no output depends on are allowed
        accumulate_grad=False,
    )
    return found


def gradients(
    loss: Tensor,
    inputs: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """`torch.autograd.grad`, with zeros for inputs that the loss does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = grad([loss], inputs, retain_graph=retain_graph, create_graph=create_graph)
    return zeros_for_none(found, inputs)
