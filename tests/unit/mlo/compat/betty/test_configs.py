"""What configurations refuse, and that they say what to do."""

from __future__ import annotations

from dataclasses import fields

import pytest

import mlo
from mlo.compat.betty.configs import Config, EngineConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, r"'low': precision is 'fp16', which is not supported.*'bf16'"),
        ({"precision": "fp8"}, r"precision is 'fp8'.*bf16, fp32"),
        ({"darts_multitask": True}, r"darts_multitask=True leaves the lower parameters.*sum the"),
        ({"sama_multitask": True}, "sama_multitask=True"),
        ({"unroll_steps": 0}, "unroll_steps must be an integer of at least 1, got 0"),
        ({"gradient_accumulation": 1.5}, "gradient_accumulation must be an integer"),
        ({"formulas": "mine"}, r"formulas is 'mine'.*betty"),
    ],
)
def test_a_problem_refuses_what_is_not_served(options, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        Config(**options).check("low")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "zero"}, r"'zero', which is not supported.*strategy='distributed'"),
        ({"strategy": "fsdp"}, r"'fsdp', which is not supported.*docs/distributed\.md"),
        ({"strategy": "accelerate"}, r"not supported.*torchrun"),
        ({"strategy": "tpu"}, r"strategy is 'tpu'.*cpu, default, distributed, gpu"),
        ({"logger_type": "csv"}, r"logger_type is 'csv'.*tensorboard"),
        ({"formulas": None}, r"formulas is None.*exact"),
        ({"on_nonfinite": "rollback"}, r"on_nonfinite is 'rollback'.*skip, stop"),
    ],
)
def test_an_engine_refuses_what_is_not_served(options, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        EngineConfig(**options).check()


def test_what_is_served_passes():
    Config(precision="bf16", formulas="betty", type={"name": "nystrom"}).check("low")
    EngineConfig(strategy="distributed", logger_type="wandb", formulas="betty").check()


@pytest.mark.parametrize("name", ["Config", "EngineConfig"])
def test_fields_and_defaults_are_bettys(name):
    betty = pytest.importorskip("betty.configs", reason="betty-ml is not installed (make betty)")
    own = {"Config": Config, "EngineConfig": EngineConfig}[name]
    theirs = {field.name: field.default for field in fields(getattr(betty, name))}
    ours = {field.name: field.default for field in fields(own)}
    assert set(ours) - set(theirs) <= {"formulas", "on_nonfinite"}
    assert {key: ours[key] for key in theirs} == theirs
