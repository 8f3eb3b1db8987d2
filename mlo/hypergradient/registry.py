"""Engines by name: the library's, those of other packages, and how a configuration is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, signature
from typing import Any

from mlo.errors import EngineError, nearest
from mlo.hypergradient.cg import ConjugateGradient
from mlo.hypergradient.direct import Direct
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.gmres import Gmres
from mlo.hypergradient.identity import Identity
from mlo.hypergradient.minres import Minres
from mlo.hypergradient.neumann import Neumann
from mlo.hypergradient.normal_cg import NormalConjugateGradient
from mlo.hypergradient.nystrom import Nystrom
from mlo.hypergradient.one_step import OneStep, darts
from mlo.hypergradient.outer_product import OuterProduct
from mlo.hypergradient.penalty import Penalty
from mlo.hypergradient.sid import Sid
from mlo.hypergradient.soba import Soba
from mlo.hypergradient.unroll import Unroll
from mlo.hypergradient.zeroth_order import ZerothOrder
from mlo.solution import AbstractEngine

__all__ = ["EngineChoice", "available_engines", "engine_from", "engines_for", "register_engine"]

EngineChoice = AbstractEngine | str | Mapping[str, Any]
"""An engine, the name of one, or a mapping `{"name": ..., option: value}`."""

_FACTORIES: dict[str, Callable[..., AbstractEngine]] = {
    "cg": ConjugateGradient,
    "darts": darts,
    "direct": Direct,
    "first_order": FirstOrder,
    "gmres": Gmres,
    "identity": Identity,
    "minres": Minres,
    "neumann": Neumann,
    "normal_cg": NormalConjugateGradient,
    "nystrom": Nystrom,
    "one_step": OneStep,
    "outer_product": OuterProduct,
    "penalty": Penalty,
    "sid": Sid,
    "soba": Soba,
    "unroll": Unroll,
    "zeroth_order": ZerothOrder,
}


OTHER_NAMES = {
    "adjoint": "gmres", "aid": "cg", "aidcg": "cg", "aidfp": "neumann", "amigo": "soba",
    "bptt": "unroll", "cgls": "normal_cg", "cgne": "normal_cg", "cgnr": "normal_cg",
    "conjugategradient": "cg", "conjugategradients": "cg", "dense": "direct", "es": "zeroth_order",
    "evolutionstrategies": "zeroth_order", "exact": "direct", "fd": "darts",
    "finitedifference": "darts", "finitedifferences": "darts", "firstorder": "first_order",
    "fixedpoint": "neumann", "fomaml": "first_order", "ift": "cg", "imaml": "cg",
    "implicit": "cg", "implicitdifferentiation": "cg", "implicitfunction": "cg",
    "implicitfunctiontheorem": "cg", "inverse": "direct", "itd": "unroll",
    "iterativedifferentiation": "unroll", "jacobianfree": "identity", "jfb": "identity",
    "lfmcw": "one_step", "lu": "direct", "maml": "unroll", "neumannseries": "neumann",
    "normalequations": "normal_cg", "reversemode": "unroll", "rhg": "unroll", "rmd": "unroll",
    "stocbio": "sid", "t1t2": "identity", "truncated": "unroll",
    "truncatedbackpropagation": "unroll", "unrolled": "unroll", "unrolleddifferentiation": "unroll",
    "unrolling": "unroll", "valuefunction": "penalty", "woodbury": "nystrom",
}  # fmt: skip
"""What papers and other libraries call a method → its engine: a suggestion, no name.

In lower case, without hyphens and underscores.
"""


ENTRY_POINTS = "mlo.engines"
"""The entry-point group of engines in installed packages: name → `Engine` subclass or factory."""


def _factories() -> dict[str, Callable[..., AbstractEngine]]:
    """The factories of installed packages and the registered ones, which take precedence."""
    installed = {point.name: _Loaded(point) for point in entry_points(group=ENTRY_POINTS)}
    return {**installed, **_FACTORIES}


@dataclass(frozen=True)
class _Loaded:
    """An engine of an installed package, imported when it is first made."""

    point: EntryPoint

    def __call__(self, **options: Any) -> AbstractEngine:
        try:
            factory = self.point.load()
        except Exception as error:
            raise EngineError(
                f"The engine {self.point.name!r} of {self.point.value} could not be imported "
                f"({error!r}). Repair or remove the package that offers it."
            ) from error
        engine: AbstractEngine = factory(**options)
        return engine


def available_engines() -> tuple[str, ...]:
    """Returns the names that `hypergradient=` accepts, sorted.

    They are the library's, registered ones, and those of installed packages.
    """
    return tuple(sorted(_factories()))


def register_engine(
    name: str, factory: Callable[..., AbstractEngine], *, replace: bool = False
) -> None:
    """Makes an engine available by name.

    Args:
        name: the name that configurations use.
        factory: called with the options of the configuration as keywords; an `Engine` subclass will
            do.
        replace: whether an existing name may be replaced.

    Raises:
        EngineError: if the name is taken and `replace` is false.
    """
    if name in _FACTORIES and not replace:
        raise EngineError(
            f"An engine called {name!r} is registered already. Choose another name, or pass "
            "replace=True."
        )
    _FACTORIES[name] = factory


def engine_from(choice: EngineChoice) -> AbstractEngine:
    """Makes an engine from its name, or a mapping with its name and options; an engine stays.

    Raises:
        EngineError: for an unknown name or option.
    """
    if isinstance(choice, AbstractEngine):
        return choice
    if isinstance(choice, str):
        choice = {"name": choice}
    if not isinstance(choice, Mapping):
        raise EngineError(
            f"A hypergradient engine is an Engine, a name or a mapping with a name, got {choice!r}."
        )
    # {"name": ..., option: value, ...}, as it comes from a configuration file.
    options = dict(choice)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise EngineError(f"The name of a hypergradient engine is a string, got {name!r}.")
    # Looking for installed packages takes milliseconds; a registered name needs none of them.
    factories = {} if name in _FACTORIES else _factories()
    factory = _FACTORIES.get(name) or factories.get(name)
    if factory is None:
        raise EngineError(f"Unknown hypergradient engine {name!r}. {_meant(name, factories)}")
    try:
        return factory(**options)
    except TypeError as error:
        raise EngineError(
            f"Hypergradient engine {name!r} does not take these options ({error}). "
            f"{_advice(factory, options)}"
        ) from None


def _meant(name: str, factories: Mapping[str, Callable[..., AbstractEngine]]) -> str:
    """The valid names, and the one that an unknown name may stand for."""
    others = dict(OTHER_NAMES)
    for known, factory in _FACTORIES.items():
        others.setdefault(getattr(factory, "__name__", known).lower(), known)  # its class's name
    return nearest(name, factories, others)


def _advice(factory: Callable[..., AbstractEngine], options: Mapping[str, Any]) -> str:
    """The options that an engine takes, for a user who passed a different one."""
    unlisted = "Its documentation lists them."
    try:
        known = signature(factory).parameters
    except (TypeError, ValueError):  # of a factory that is not written in Python
        return unlisted
    if any(each.kind is Parameter.VAR_KEYWORD for each in known.values()):
        return unlisted
    unknown = [option for option in options if option not in known]
    close = get_close_matches(unknown[0], list(known), n=1) if unknown else []
    meant = f"Did you mean {close[0]!r}? " if close else ""
    return f"{meant}Its options: {', '.join(known) or 'none'}."


def engines_for(
    problems: Iterable[str], choice: EngineChoice | Mapping[str, EngineChoice]
) -> dict[str, AbstractEngine]:
    """Gives every problem the engine that differentiates its response.

    Args:
        problems: names of the problems.
        choice: one choice for all, or a mapping problem → choice, with "default" (otherwise
            one_step) for the rest. A mapping with the key "name" is one choice.

    Raises:
        EngineError: for a problem that does not exist, or an unusable choice.
    """
    # A mapping is one choice if it has the key "name", and otherwise one choice per problem. (So
    # "name" cannot be the name of a problem.)
    names = tuple(problems)
    if isinstance(choice, (AbstractEngine, str)) or (
        isinstance(choice, Mapping) and "name" in choice
    ):
        engine = engine_from(choice)
        return dict.fromkeys(names, engine)
    if not isinstance(choice, Mapping):
        raise EngineError(
            "hypergradient= takes an engine, a name, or a dict problem → engine, got "
            f"{type(choice).__name__}."
        )
    for name in choice:
        if name != "default" and name not in names:
            raise EngineError(
                f"hypergradient= names the problem {name!r}. {nearest(name, [*names, 'default'])}"
            )
    chosen = {name: engine_from(option) for name, option in choice.items()}
    default = chosen.get("default", OneStep())
    return {name: chosen.get(name, default) for name in names}
