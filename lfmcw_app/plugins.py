"""Tables that packages of others can add to: primitives, spaces, generators, data sets.

An entry comes from a table's own file, from `register`, or from a package that names it under the
table's group of entry points:

    [project.entry-points."lfmcw_app.primitives"]
    conv_7x7 = "my_package.operations:conv_7x7"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from lfmcw_app.errors import InputError
from mlo.errors import nearest

__all__ = ["Table"]

Entry = TypeVar("Entry")


class Table(Mapping[str, Entry]):
    """Name → entry, in the order in which they were added; those of other packages come last.

    An entry of another package is loaded when it is asked for.

    Args:
        kind: what an entry is, for messages.
        group: of the entry points.
        of: the type of entries.
        entries: the table's own ones.
    """

    def __init__(
        self, kind: str, group: str, of: type[Entry], entries: Mapping[str, Entry]
    ) -> None:
        self._kind, self._group, self._type = kind, group, of
        self._entries = dict(entries)
        self._named: dict[str, EntryPoint] | None = None

    def register(self, name: str, entry: Entry) -> None:
        """Adds an entry.

        Raises:
            InputError: if the name is taken, by an entry that is not equal to this one.
        """
        if name in self and self[name] != entry:
            raise InputError(
                f"There is another {self._kind} called {name!r} already. Choose another name."
            )
        self._entries[name] = entry

    def named(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            ValueError: for an unknown name, with the nearest one.
        """
        if name not in self:
            raise ValueError(
                f"Unknown {self._kind} {name!r}. {nearest(str(name), list(self))} If it is one of "
                f"your own, register it, or install the package that has it (entry points "
                f"{self._group})."
            )
        return self[name]

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            self._entries[name] = self._loaded(self._others()[name])
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from [name for name in self._others() if name not in self._entries]

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._others()

    def _others(self) -> dict[str, EntryPoint]:
        """The entry points of other packages, found once."""
        if self._named is None:
            self._named = {}
            for point in entry_points(group=self._group):
                if point.name in self._entries or point.name in self._named:
                    raise InputError(
                        f"Two packages bring a {self._kind} called {point.name!r}; one is "
                        f"{point.value}. Rename it there, or remove one package."
                    )
                self._named[point.name] = point
        return self._named

    def _loaded(self, point: EntryPoint) -> Entry:
        try:
            entry = point.load()
        except Exception as error:  # whatever the other package's import raises
            raise InputError(
                f"The {self._kind} {point.name!r} ({point.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Mend or remove the package that brings it."
            ) from error
        if not isinstance(entry, self._type):
            raise InputError(
                f"The {self._kind} {point.name!r} ({point.value}) is a {type(entry).__name__}; it "
                f"must be a {self._type.__name__}."
            )
        return entry
