"""When to make a costly check."""

from __future__ import annotations

from mlo.check_schedule import CheckSchedule, NoChecks, is_power_of_two


def made(schedule, occasions, **options):
    return [n for n in range(1, occasions + 1) if schedule.is_due("check", **options)]


def test_a_check_is_made_at_powers_of_two():
    assert made(CheckSchedule(), 40) == [1, 2, 4, 8, 16, 32]


def test_powers_of_two_are_counted_from_one():
    assert [n for n in range(1, 20) if is_power_of_two(n)] == [1, 2, 4, 8, 16]


def test_a_check_that_costs_is_made_once():
    assert made(CheckSchedule(), 40, once=True) == [1]


def test_checks_are_counted_apart():
    schedule = CheckSchedule()
    assert schedule.is_due("one", once=True) and schedule.is_due("other", once=True)
    assert schedule.was_noted("one") and not schedule.was_noted("third")


def test_a_check_that_has_said_its_word_is_made_no_more():
    schedule = CheckSchedule()
    assert made(schedule, 3) == [1, 2]
    assert not schedule.was_dismissed("check")
    schedule.dismiss("check", "other")
    assert schedule.was_dismissed("check") and schedule.was_noted("other")
    assert made(schedule, 30) == []


def test_where_there_are_no_numbers_nothing_is_checked():
    schedule = NoChecks()
    assert made(schedule, 10) == made(schedule, 10, once=True) == []
    assert schedule.was_noted("check")
