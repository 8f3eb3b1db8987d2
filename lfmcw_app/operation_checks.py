"""Tries the operations of other packages once, on small maps, before a run begins.

What is wrong with one would otherwise end the run in its middle: at the first reduction cell, or
after the whole training, when the cost of the network is counted. Or it would end nothing and make
predictions that differ from those behind the test error.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe
from lfmcw_app.search_space.cost import network_cost
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.network import STYLE
from lfmcw_app.search_space.operations import PRIMITIVES, make_operation
from lfmcw_app.spaces import space_named
from mlo.randomness import preserved

__all__ = ["check_operations"]

IMAGES, SIZE = 2, 8

STRIDES = {"darts": (1, 2), "nasbench201": (1,)}
"""Cells, by the space that builds their networks → the strides of their edges."""


def check_operations(names: Iterable[str], recipe: Recipe, *, searches: bool) -> None:
    """Refuses operations of other packages that a run with this recipe cannot use.

    Args:
        names: of operations in the recipe's cells; the application's own are passed over.
        recipe: gives the channels of the supernet and of the derived network.
        searches: whether a supernet is built, too.

    Raises:
        InputError: saying what is wrong with an operation. What its own code raises is raised as it
            is, with a note that names the operation.
    """
    space, how = space_named(recipe.search.space), recipe.search
    of_networks = [(recipe.evaluation.channels, STYLE)]
    if searches:
        of_networks.insert(0, (how.channels // space.partial_channels(how), OperationStyle()))
    for name in sorted(names):
        if PRIMITIVES.is_built_in(name) or PRIMITIVES[name].layer is None:
            continue
        for channels, style in of_networks:
            for stride in STRIDES.get(space.network_of, ()):  # of other cells nothing is known
                where = f"The operation {name!r} (channels {channels}, stride {stride})"
                try:
                    with preserved():
                        _check(where, name, channels, stride, style)
                except InputError:
                    raise
                except Exception as error:  # of the user's code, whose traceback tells the place
                    error.add_note(
                        f"{where} raised it, when it was tried on maps "
                        f"{[IMAGES, channels, SIZE, SIZE]} before the run."
                    )
                    raise


@torch.no_grad()
def _check(where: str, name: str, channels: int, stride: int, style: OperationStyle) -> None:
    layer, other = (make_operation(name, channels, stride, style) for _ in range(2))
    if not isinstance(layer, nn.Module):
        raise InputError(f"{where} is made as {type(layer).__name__}; it must be an nn.Module.")
    if any(map(is_lazy, layer.parameters())):
        raise InputError(
            f"{where} has lazy parameters, which do not know their shapes yet. The layer is made "
            "with its number of channels, so use the usual module, such as nn.Conv2d."
        )
    if {*map(id, layer.parameters())} & {*map(id, other.parameters())}:
        raise InputError(
            f"{where} is the same module each time it is made, so all edges would share its "
            "weights. Make a new module in each call."
        )

    # What it makes of maps.
    x = torch.randn(IMAGES, channels, SIZE, SIZE)
    given = x.clone()
    try:
        out = layer(given)
    except (RuntimeError, ValueError, AssertionError):
        return  # it may need larger maps (windows), or the device of the run (kernels)
    wanted = (IMAGES, channels, SIZE // stride, SIZE // stride)
    found = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
    if not isinstance(out, Tensor) or out.shape != wanted or out.dtype != x.dtype:
        raise InputError(
            f"{where} makes {found} of maps {list(x.shape)}; it must make {x.dtype} {list(wanted)}."
        )
    if not torch.equal(given, x):
        raise InputError(
            f"{where} changes its input in place, which other edges read too. Work on a copy."
        )

    # In evaluation a prediction must not depend on the images beside it.
    layer.eval()
    if style is STYLE and not PRIMITIVES[name].draws:
        alone, beside = layer(x[:1].clone()), layer(x.clone())[:1]
        if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-4):
            raise InputError(
                f"{where} depends, in evaluation, on the other images of a batch (or draws random "
                "numbers), so predictions would differ from those behind the test error. Take "
                "norms from style.make_norm, or let them keep running statistics; an operation "
                "that draws random numbers says draws=True."
            )

    # Its cost is counted by shapes alone, when the training has ended.
    try:
        network_cost(layer, SIZE, channels)
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"{where} cannot run on the meta device, where its cost is counted "
            f"({' '.join(str(error).split())[:200]}). Register tensors that it keeps as buffers, "
            "make others with device=x.device, and read no number from a tensor (.item(), "
            "float(x))."
        ) from None
