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


@pytest.mark.parametrize(
    ("name", "places"),
    [("one", "lfmcw_app itself, math:pi, math:e"), ("two", "math:pi, math:e")],
)
def test_a_name_that_several_packages_bring_is_refused(monkeypatch, name, places):
    """When it is asked for: other names can be used."""
    numbers = table(monkeypatch, (name, "math:pi"), (name, "math:e"), ("tau", "math:tau"))
    assert set(numbers) == {"one", name, "tau"}
    assert numbers["tau"] > 6.0
    with pytest.raises(
        InputError, match=f"Several packages have a number called {name!r}: {places}."
    ):
        numbers[name]


def test_a_package_that_is_on_the_path_twice_is_one(monkeypatch):
    assert table(monkeypatch, ("pi", "math:pi"), ("pi", "math:pi"))["pi"] > 3.0


def test_an_entry_can_be_registered(monkeypatch):
    numbers = table(monkeypatch, ("pi", "math:pi"))
    numbers.register("two", 2.0)
    numbers.register("two", 2.0)
    assert numbers.named("two") == 2.0
    for taken in ("two", "pi"):
        with pytest.raises(InputError, match=f"already a number called {taken!r}"):
            numbers.register(taken, 3.0)
        numbers.register(taken, 3.0, replace=True)
        assert numbers[taken] == 3.0


def test_a_registered_entry_has_the_type_of_the_table(monkeypatch):
    with pytest.raises(InputError, match=r"'two' \(the one that is registered\) is a str"):
        table(monkeypatch).register("two", "2")


@pytest.mark.parametrize("name", ["a.b", "", "2d", "a b", "größe", "--x"])
def test_names_can_stand_in_files_keys_and_pages(monkeypatch, name):
    with pytest.raises(InputError, match="letters, digits and underscores"):
        table(monkeypatch).register(name, 2.0)
    with pytest.raises(InputError, match="letters, digits and underscores"):
        table(monkeypatch, (name, "math:pi"))[name]


def test_a_reserved_name_is_refused(monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    numbers = Table("number", "a.group", float, {"one": 1.0}, reserved=("half",))
    with pytest.raises(InputError, match=r"cannot be called 'half'.* such as half_op"):
        numbers.register("half", 0.5)


def test_a_replaced_entry_is_not_built_in(monkeypatch):
    numbers = table(monkeypatch, ("pi", "math:pi"))
    assert [numbers.is_built_in(name) for name in ("one", "pi")] == [True, False]
    numbers.register("one", 1.5, replace=True)
    assert not numbers.is_built_in("one")


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown number 'oen'. Did you mean 'one'.*a\.group"):
        table(monkeypatch).named("oen")
