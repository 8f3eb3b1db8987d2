"""Gradients of gradients of a function."""

from __future__ import annotations

import torch


def nested(function, inputs):
    """Values, and three gradients of one another."""
    out = function(*inputs)
    found = [out]
    scalar = out.sin().sum()
    for _ in range(3):
        gradients = torch.autograd.grad(scalar, inputs, create_graph=True)
        found += gradients
        scalar = sum((g**3).sum() for g in gradients)
    return {str(k): tensor.detach() for k, tensor in enumerate(found)}
