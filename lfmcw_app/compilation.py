"""Which modules of a search run through torch.compile, and how (`search.compile`).

Compiled modules have no second derivative: the recipe refuses engines that need one.
"""

from __future__ import annotations

from typing import Any

from lfmcw_app.build_modules import SearchModules
from lfmcw_app.errors import InputError
from lfmcw_app.generators import GAMES
from lfmcw_app.recipe import Search
from lfmcw_app.stages import search_stages

__all__ = ["compile_discriminator", "compile_options"]


def compile_options(search: Search) -> dict[str, Any]:
    """Keyword arguments of `torch.compile` for the supernets; empty: they are not compiled.

    Raises:
        InputError: if supernets of a stage change with every epoch.
    """
    if search.compile is None:
        return {}
    if any(stage.skip_dropout for stage in search_stages(search)):
        raise InputError(
            f"compile {search.compile} and progressive.skip_dropout: its probability changes with "
            "every epoch, so the supernet would be compiled again each time. Set "
            "progressive.skip_dropout to zeros, or compile to null."
        )
    # Whole graphs or an error: a break in a cell would cost more launches than it saves. All shapes
    # of a search are fixed.
    return {"backend": search.compile, "fullgraph": True, "dynamic": False}


def compile_discriminator(search: Search, modules: SearchModules) -> dict[str, Any]:
    """Compiles the discriminator of a game, unless its loss differentiates it twice.

    Returns:
        the options it was compiled with; empty if it was not.
    """
    if modules.gan is None or GAMES[search.generator.name].penalizes_gradient:
        return {}
    options = compile_options(search)
    if options:
        modules.gan.discriminator.compile(**options)
    return options
