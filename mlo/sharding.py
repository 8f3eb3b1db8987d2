"""Sharded parameters (`fully_shard`, DTensor): gathered for a loss, their gradients scattered.

A sharded parameter is one tensor of which every process stores a part. For a loss it is replicated
like any other (see `mlo.distributed`): gathering it is `enter`. The backward pass of the gathering,
a reduce-scatter, is the mean of the local gradients. So derivatives with respect to sharded
parameters are sharded too, and are those of the mean loss.

`fully_shard` has hooks of its own that put its parameters into the modules when these are called.
That would undo a substitution, and they give gradients to `backward()` only. So they are switched
off while a loss is evaluated here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["gathered", "is_sharded", "sharded_like", "whole", "without_fsdp_hooks"]


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    # Importing DTensor takes a third of the time of importing torch. Where nobody has imported it,
    # no tensor is one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors, with sharded ones whole; their gradient is averaged and scattered."""
    return {
        name: _gathered(tensor) if is_sharded(tensor) else tensor
        for name, tensor in tensors.items()
    }


def _gathered(tensor: DTensor) -> Tensor:
    found: Tensor = _Gather.apply(tensor)
    return found


class _Gather(torch.autograd.Function):
    """Forward: a sharded tensor, whole. Backward: the mean of the processes' gradients, sharded.

    This and `_Scatter` are each other's backward pass, so derivatives of every order are right.
    (DTensor's own are, up to the second: products with A itself take three.)
    """

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = tensor.device_mesh, tensor.placements
        return tensor.full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found: Tensor = _Scatter.apply(gradient, ctx.mesh, ctx.placements)
        return found


class _Scatter(torch.autograd.Function):
    """Forward: the mean over the processes, sharded. Backward: a sharded gradient, whole."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Any, placements: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        parts = [Partial("avg")] * mesh.ndim
        local = DTensor.from_local(tensor, mesh, parts, run_check=False)
        return local.redistribute(placements=placements)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(gradient), None, None


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its entries on this process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all processes have whole, sharded like `parameter` if that is sharded."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    same = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(placements=parameter.placements)


@contextmanager
def without_fsdp_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Runs the body without the hooks that `fully_shard` has put on the modules."""
    from torch.distributed.fsdp import FSDPModule

    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in modules:
        if isinstance(module, FSDPModule):
            # Only FSDP's own two; hooks of the user stay.
            state = module._get_fsdp_state()
            own = (state._pre_forward, state._post_forward)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                taken.append((hooks, dict(hooks)))
                for key in [key for key, hook in hooks.items() if hook in own]:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)
