"""An environment, and what its engine gives it."""

from __future__ import annotations

import torch
from small_betty_programs import bilevel, library

from mlo.compat.betty import Env


class Shared(Env):
    def __init__(self):
        self.calls = []

    def initialize(self):
        self.calls.append(("initialize", self.device, self._strategy, self._world_size))


def test_an_environment_is_set_up_and_found_by_all_problems():
    env = Shared()

    def with_env(base):
        return lambda **options: base(env=env, **options)

    engine = bilevel(library(), engine_class=with_env, run=False)
    assert env.calls == [("initialize", "cpu", "cpu", 1)]
    assert env.low is engine.low
    assert env.up is engine.up
    assert engine.low.env is engine.up.env is engine.env is env


def test_modules_and_loaders_of_its_own():
    env = Env()
    env.configure_device("cpu")
    module = torch.nn.Linear(1, 1)
    assert env.patch_module(module) is module
    loader = [1, 2]
    assert env.patch_data_loader(loader) is loader
