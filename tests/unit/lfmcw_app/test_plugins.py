"""Tables that other packages can add to."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from lfmcw_app import plugins
from lfmcw_app.errors import InputError
from lfmcw_app.plugins import Table


def table(monkeypatch, *points):
    found = [EntryPoint(name=name, value=value, group="a.group") for name, value in points]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found if group == "a.group" else [])
    return Table("number", "a.group", float, {"one": 1.0})


def test_entries_of_other_packages_come_last_and_when_asked_for(monkeypatch):
    numbers = table(monkeypatch, ("pi", "math:pi"), ("lost", "no_such_module:x"))
    assert list(numbers) == ["one", "pi", "lost"]
    assert numbers["pi"] == pytest.approx(3.14159265)
    assert len(numbers) == 3
    assert "lost" in numbers
    with pytest.raises(InputError, match=r"number 'lost' \(no_such_module:x\) cannot be loaded"):
        numbers["lost"]


def test_an_entry_of_another_type_is_refused(monkeypatch):
    with pytest.raises(InputError, match="is a builtin_function_or_method; it must be a float"):
        table(monkeypatch, ("sin", "math:sin"))["sin"]


@pytest.mark.parametrize("names", [("one",), ("two", "two")])
def test_two_entries_of_one_name_are_refused(monkeypatch, names):
    numbers = table(monkeypatch, *((name, "math:pi") for name in names))
    with pytest.raises(InputError, match=f"Two packages bring a number called '{names[-1]}'"):
        list(numbers)


def test_an_entry_can_be_registered(monkeypatch):
    numbers = table(monkeypatch)
    numbers.register("two", 2.0)
    numbers.register("two", 2.0)
    assert numbers.named("two") == 2.0
    with pytest.raises(InputError, match="another number called 'two' already"):
        numbers.register("two", 3.0)


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown number 'oen'. Did you mean 'one'.*a\.group"):
        table(monkeypatch).named("oen")
