"""Tables that other packages can extend: primitives, spaces, generators.

An entry comes from a table's own file, from `register`, or from a package that names it under the
table's group of entry points:

    [project.entry-points."lfmcw_app.primitives"]
    conv_7x7 = "my_package.operations:conv_7x7"
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from lfmcw_app.errors import InputError
from mlo.errors import nearest

__all__ = ["Table"]

Entry = TypeVar("Entry")


class Table(Mapping[str, Entry]):
    """Name → entry, in the order of adding; those of other packages come last.

    An entry of another package is loaded when it is requested. So a broken entry, or one whose name
    is taken, does not affect anything else.

    Args:
        kind: what an entry is, for messages.
        group: of the entry points.
        of: the type of entries.
        entries: the table's own ones.
        reserved: names that no entry can have.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        of: type[Entry],
        entries: Mapping[str, Entry],
        *,
        reserved: Iterable[str] = (),
    ) -> None:
        self._kind, self._group, self._type = kind, group, of
        self._entries = dict(entries)
        self._own = dict(entries)
        self._reserved = frozenset(reserved)
        self._found: dict[str, list[EntryPoint]] | None = None

    def register(self, name: str, entry: Entry, *, replace: bool = False) -> None:
        """Adds an entry.

        Args:
            name: of letters, digits and underscores.
            entry: of the table's type.
            replace: whether it may replace another entry.

        Raises:
            InputError: if the name is taken or invalid, or the entry is of another type.
        """
        if not replace and name in self and (name not in self._entries or self[name] != entry):
            raise InputError(
                f"There is already a {self._kind} called {name!r}. Choose another name, or pass "
                "replace=True."
            )
        self._entries[name] = self._checked(name, entry, "the one that is registered")

    def named(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            ValueError: for an unknown name, with the nearest one.
        """
        if name not in self:
            raise ValueError(
                f"Unknown {self._kind} {name!r}. {nearest(str(name), list(self))} If it is your "
                "own, register it, or install the package that has it (entry points "
                f"{self._group})."
            )
        return self[name]

    def is_built_in(self, name: str) -> bool:
        """Whether an entry is the application's own, and no other one has replaced it."""
        return name in self._own and self[name] is self._own[name]

    def __getitem__(self, name: str) -> Entry:
        places = [point.value for point in self._others().get(name, [])]
        if len(places) + (name in self._own) > 1:
            ours = ["lfmcw_app itself"] if name in self._own else []
            raise InputError(
                f"Several packages have a {self._kind} called {name!r}: "
                f"{', '.join([*ours, *places])}. Rename it in one, or remove one."
            )
        if name not in self._entries:
            self._entries[name] = self._loaded(self._others()[name][0])
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from [name for name in self._others() if name not in self._entries]

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._others()

    def _others(self) -> dict[str, list[EntryPoint]]:
        """Name → entry points of other packages, found once."""
        if self._found is None:
            self._found = {}
            for point in entry_points(group=self._group):
                same_name = self._found.setdefault(point.name, [])
                if point not in same_name:  # a package may be on the path twice
                    same_name.append(point)
        return self._found

    def _loaded(self, point: EntryPoint) -> Entry:
        try:
            entry = point.load()
        except Exception as error:  # whatever the other package's import raises
            raise InputError(
                f"The {self._kind} {point.name!r} ({point.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Fix or remove the package that has it."
            ) from error
        return self._checked(point.name, entry, point.value)

    def _checked(self, name: str, entry: Any, where: str) -> Entry:
        """The entry, if it can be one: names are keys of checkpoints, files and colours."""
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise InputError(
                f"A {self._kind} cannot be called {name!r} ({where}): its name must have only "
                "letters, digits and underscores, and start with a letter."
            )
        if name in self._reserved:
            raise InputError(
                f"A {self._kind} cannot be called {name!r} ({where}): modules of PyTorch have an "
                f"attribute of that name. Choose another one, such as {name}_op."
            )
        if not isinstance(entry, self._type):
            raise InputError(
                f"The {self._kind} {name!r} ({where}) is a {type(entry).__name__}; it must be a "
                f"{self._type.__name__}."
            )
        return entry
