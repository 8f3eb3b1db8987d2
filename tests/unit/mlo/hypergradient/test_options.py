"""Options of engines that are out of range."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

import mlo
from mlo.hypergradient import count, number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "neumann", "num_terms": 0}, "num_terms must be an integer of at least 1"),
        ({"name": "neumann", "step_size": "big"}, "step_size must be 'auto'"),
        ({"name": "cg", "max_steps": 2.5}, "max_steps must be an integer"),
        ({"name": "gmres", "restart": 0}, "restart must be"),
        ({"name": "cg", "damping": -1.0}, "damping must not be negative"),
        ({"name": "nystrom", "ridge": 0.0}, "ridge must be positive"),
        ({"name": "nystrom", "rank": 0}, "rank must be"),
        ({"name": "soba", "step_size": "upper"}, "step_size must be 'auto', 'lower', a positive"),
        ({"name": "soba", "steps": 0}, "steps must be an integer of at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(mlo.EngineError, match=message):
        mlo.engine_from(options)


def engines_of_mlo():
    names = [name for name in mlo.available_engines() if not name.startswith("betty-")]
    return [mlo.engine_from(name) for name in names if name != "darts"]


@pytest.mark.parametrize("engine", engines_of_mlo(), ids=lambda engine: engine.name)
def test_every_number_declares_its_range(engine):
    """An option without a range would fail in the middle of a run, if at all."""
    for option in fields(engine):
        value = getattr(engine, option.name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number and (value != "auto" or "bool" in str(option.type)):
            continue
        for wrong in ("1e-3", None, True, -1, float("nan")):
            if wrong is True and option.name == "keep_graph":  # no number
                continue
            with pytest.raises(mlo.EngineError, match=f"'{engine.name}': {option.name} must"):
                mlo.engine_from({"name": engine.name, option.name: wrong})


def test_numbers_that_yaml_reads_as_text_say_so():
    for name, option in (("cg", "tol"), ("neumann", "step_size")):
        with pytest.raises(mlo.EngineError, match=r"write 1\.0e-3"):
            mlo.engine_from({"name": name, option: "1e-3"})


def test_an_engine_of_ones_own_declares_ranges_by_the_same_words():
    @dataclass(frozen=True, kw_only=True)
    class Mine(mlo.hypergradient.IterativeEngine):
        steps: int = count(3, at_least=2)
        rate: float = number(0.1, positive=True)
        name = "mine"

        def iterate(self, operator, b, scale, system):
            raise NotImplementedError

    assert (Mine().steps, Mine().rate, Mine(steps=2).steps) == (3, 0.1, 2)
    with pytest.raises(mlo.EngineError, match="'mine': steps must be an integer of at least 2"):
        Mine(steps=1)
    with pytest.raises(mlo.EngineError, match="'mine': rate must be positive"):
        Mine(rate=0.0)
    with pytest.raises(mlo.EngineError, match="'mine': damping must not be negative"):
        Mine(damping=-0.5)
