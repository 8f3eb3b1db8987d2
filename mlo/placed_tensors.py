"""Puts other tensors in the places of the live ones in modules, while code of the user's runs.

They are responses, the values at which a step was made, displaced parameters, copies of buffers. A
tensor may have several places, in the modules of several problems, and gets the same one in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from mlo.sharding import without_fsdp_hooks

__all__ = ["TRAINING", "Placed", "Places", "PlacesByName", "placed_without_fsdp_hooks", "places_of"]

Places = list[tuple[dict[str, Any], str, bool]]
"""All places of one tensor: a module's dict, its name there, and whether it is a parameter."""

TRAINING = attrgetter("training")


class Placed:
    """A context in which the modules hold other tensors, as `LossFunction.placed` describes.

    (A class takes a third of the time of a generator with `contextmanager`.)

    Args:
        where: pairs of the places of tensors by name, and tensors to put there.
        modules: whose training flags are set.
        modes: the flags; None leaves them alone. Otherwise they are restored, also if the body
            changes them.
    """

    __slots__ = ("_before", "_flags", "_modes", "_modules", "_where")

    def __init__(
        self,
        where: Sequence[tuple[dict[str, Places], Mapping[str, Tensor]]],
        modules: Sequence[nn.Module],
        modes: Sequence[bool] | None,
    ) -> None:
        self._where, self._modules, self._modes = where, modules, modes
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        self._flags: list[bool] | None = None

    def __enter__(self) -> None:
        before = self._before
        try:
            for places, named in self._where:
                for name, tensor in named.items():
                    # One object in all places of a tied parameter.
                    registry, key, is_parameter = places[name][0]
                    if is_parameter:
                        tensor = _like(registry[key], tensor)
                    for registry, key, _ in places[name]:
                        # In the registry itself, which takes any tensor; assigning the module's
                        # attribute would demand an nn.Parameter.
                        before.append((registry, key, registry[key]))
                        registry[key] = tensor
            if self._modes is not None:
                flags = self._flags = list(map(TRAINING, self._modules))
                if flags != self._modes:
                    _set_modes(self._modules, self._modes)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        flags = self._flags
        if flags is not None and flags != list(map(TRAINING, self._modules)):
            _set_modes(self._modules, flags)
        # Backwards: a place that was replaced twice gets its first tensor back last.
        for registry, key, tensor in reversed(self._before):
            registry[key] = tensor


@contextmanager
def placed_without_fsdp_hooks(
    placed: AbstractContextManager[None], modules: Sequence[nn.Module]
) -> Iterator[None]:
    """Runs the body with tensors in their places, and without the hooks of `fully_shard`."""
    with placed, without_fsdp_hooks(modules):
        yield


class PlacesByName(dict[str, Places]):
    """Name of a parameter or buffer of a problem → all places of that tensor.

    Those of a buffer that a module makes during the run (a cached mask) are found when they are
    first needed.
    """

    def __init__(self, member: str, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._member, self._members = member, members

    def __missing__(self, name: str) -> Places:
        for key, places in places_of(self._members)[self._member].items():
            self.setdefault(key, places)
        if name not in self:
            raise KeyError(name)
        return self[name]


def places_of(members: Mapping[str, nn.Module]) -> dict[str, PlacesByName]:
    """Problem → name of a parameter or buffer → all places of that tensor in all modules."""
    # With duplicates: a submodule that has two names has its tensors under both.
    by_tensor: dict[int, Places] = {}
    found: dict[str, PlacesByName] = {}
    for member, whole in members.items():
        found[member] = PlacesByName(member, members)
        for prefix, module in whole.named_modules(remove_duplicate=False):
            for registry in (module._parameters, module._buffers):
                for key, tensor in registry.items():
                    if tensor is None:
                        continue
                    # A tied tensor (two names, one tensor) has several places, perhaps in several
                    # problems' modules.
                    places = by_tensor.setdefault(id(tensor), [])
                    if not any(known is registry and name == key for known, name, _ in places):
                        places.append((registry, key, isinstance(tensor, nn.Parameter)))
                    found[member][f"{prefix}.{key}" if prefix else key] = places
    return found


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor made to look like the parameter in whose place it is put, to the user's code."""
    if tensor is parameter:
        return tensor
    kind, given = type(parameter), type(tensor)
    if kind is not nn.Parameter and given is not kind and issubclass(kind, nn.Parameter):
        tensor = tensor.as_subclass(kind)
    if given is not nn.Parameter:
        # So that the methods of modules treat it as one (`get_parameter`).
        tensor._is_param = True
    if parameter.__dict__:
        # Attributes of the user's (`p.no_decay = True`); the compiler's are about the one tensor.
        for key, value in parameter.__dict__.items():
            if not key.startswith("_dynamo"):
                tensor.__dict__[key] = value
    return tensor


def _set_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    for module, training in zip(modules, modes, strict=True):
        module.training = training
