"""One problem as mlo's: its loss, its hooks and its optimizer's own steps."""

from __future__ import annotations

import pytest
import torch
from small_betty_programs import Value, bilevel, values
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

import mlo
from mlo.compat.betty import Config, ImplicitProblem
from mlo.compat.betty.driver import Driver

MEAN = {"type": "neumann", "neumann_alpha": 0.1}


class Plain(ImplicitProblem):
    def training_step(self, batch):
        return {"loss": (self.module() ** 2).sum().view(1), "norm": self.module().norm()}

    def get_batch(self):
        return self.count


def driver(engine=None, methods=None, **config):
    module = Value(1.0, 2.0)
    problem = type("Made", (Plain,), methods or {})("own", Config(**config), module)
    problem.optimizer = Adam(module.parameters(), lr=0.1)
    problem.leaf = True
    return Driver(problem, ["up"], engine or mlo.Identity())


def test_a_declaration_has_the_problems_settings():
    declared = driver(gradient_accumulation=3, gradient_clipping=2.0, precision="bf16").declare()
    assert (declared.accumulate, declared.grad_clip, declared.precision) == (3, 2.0, "bf16")
    assert declared.reads == ("up",)
    loss, metrics = declared.loss(declared.module, 0)
    assert loss.shape == ()
    assert list(metrics) == ["norm"]
    assert not metrics["norm"].requires_grad


def test_a_gradient_callback_comes_before_the_clipping():
    def double(self):
        for parameter in self.trainable_parameters():
            parameter.grad *= 2.0

    found = bilevel(lower={"gradient_clipping": 0.3, **MEAN}, methods={"grad_callback": double})
    # An optimizer with twice the gradient, clipped as much.
    norms = []

    def note(self):
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]))

    plain = bilevel(lower={"gradient_clipping": 0.15, **MEAN}, methods={"grad_callback": note})
    assert min(map(float, norms)) > 0.15  # each one was clipped
    rates = bilevel(lower={"gradient_clipping": 0.15, **MEAN}, rate=0.4)
    torch.testing.assert_close(values(found), values(rates), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(values(found), values(plain), rtol=1e-3)


@pytest.mark.parametrize("name", ["custom_optimizer_step", "gradient_accumulation"])
def test_steps_that_are_differentiated_are_the_optimizers(name):
    """Where the step itself is differentiated, it can be no other."""
    engine = bilevel(run=False)
    problem = engine.low
    problem.leaf = False
    problem.gas = 2 if name == "gradient_accumulation" else 1
    if name == "custom_optimizer_step":
        problem.custom_optimizer_step = lambda: None
    with pytest.raises(mlo.ProblemError, match=rf"'low' has {name}.*'darts', 'neumann' or 'cg'"):
        Driver(problem, [], mlo.OneStep())


def test_a_step_of_the_users_own_is_taken():
    def custom_optimizer_step(self):
        for parameter in self.trainable_parameters():
            parameter.data.sub_(0.2 * parameter.grad)

    found = bilevel(methods={"custom_optimizer_step": custom_optimizer_step}, rate=123.0)
    torch.testing.assert_close(values(found), values(bilevel()), rtol=1e-13, atol=0.0)


def test_a_callback_that_moves_a_differentiated_step_is_refused():
    def clamp(self):
        self.module.v.data.clamp_(max=0.1)

    options = {"methods": {"param_callback": clamp}, "optimizer": Adam}
    with pytest.raises(mlo.ProblemError, match=r"param_callback of problem 'low' changed"):
        bilevel(lower={"type": "sama"}, **options)
    assert max(bilevel(lower={"type": "darts"}, **options).low.module.v.tolist()) <= 0.1
    # One that changes nothing is none of its business.
    bilevel(lower={"type": "sama"}, optimizer=Adam, methods={"param_callback": lambda self: None})


@pytest.mark.parametrize(
    ("gas", "roll_back", "moves"), [(1, False, 6), (2, False, 6), (1, True, 6)]
)
def test_a_scheduler_moves_with_every_batch(gas, roll_back, moves):
    engine = bilevel(
        lower={"gradient_accumulation": gas},
        engine={"train_iters": 6, "roll_back": roll_back},
        run=False,
    )
    engine.low.set_scheduler(ExponentialLR(engine.low.optimizer, 0.9))
    engine.run()
    assert engine.low.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.9**moves)


def test_a_scheduler_may_look_at_the_loss():
    engine = bilevel(lower={"gradient_accumulation": 2}, engine={"train_iters": 8}, run=False)
    seen = []
    scheduler = ReduceLROnPlateau(engine.low.optimizer)
    scheduler.step = seen.append
    engine.low.set_scheduler(scheduler)
    engine.run()
    assert len(seen) == 8
    assert seen[-1] == engine.last_record.losses["low"]


def test_a_log_that_falls_between_steps_comes_with_the_next():
    engine = bilevel(
        lower={"gradient_accumulation": 4, "log_step": 6}, engine={"train_iters": 24}, run=False
    )
    counts = []
    engine.low.log = lambda stats, step: counts.append(engine.low.count)
    engine.run()
    assert counts == [8, 12, 20, 24]


def test_bf16_is_autocast():
    engine = bilevel(run=False)
    seen = []
    module = torch.nn.Linear(2, 2)

    def training_step(self, batch):
        seen.append(self.module(torch.ones(2)).dtype)
        return self.module(torch.ones(2)).float().sum() ** 2

    kind = type("Half", (ImplicitProblem,), {"training_step": training_step})
    problem = kind(
        "half",
        Config(precision="bf16"),
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        train_data_loader=[(0,)],
    )
    type(engine)([problem], type(engine.config)(train_iters=1, strategy="cpu")).run()
    assert set(seen) == {torch.bfloat16}


def test_a_cycle_of_a_warm_up_begins_once():
    """As in Betty, where nobody above notices its end."""
    begun = []
    bilevel(
        lower={"unroll_steps": 2, "warmup_steps": 5},
        engine={"train_iters": 10},
        methods={"on_inner_loop_start": lambda self: begun.append(self.count)},
    )
    assert begun == [0, 6, 8]


def test_a_callback_on_parameters_follows_steps_only():
    calls = []
    bilevel(
        upper={"gradient_accumulation": 3},
        upper_methods={"param_callback": lambda self: calls.append(self.count)},
    )
    assert calls == [3, 6, 9, 12]


def test_a_solution_that_nobody_differentiates_may_be_moved():
    """Without "u2l" the upper loss reads a constant."""
    engine = bilevel(run=False)
    low, up = engine.low, engine.up
    type(low).training_step = lambda self, batch: (self.module() ** 2).sum()
    type(low).param_callback = lambda self: self.module.v.data.clamp_(max=0.1)
    type(up).training_step = lambda self, batch: ((self.module() - self.low()) ** 2).sum()
    low.config.type = {"name": "one_step"}
    engine.set_dependency({"l2u": {low: [up]}})
    engine.train_step()
    assert max(low.module.v.tolist()) <= 0.1
    assert up.count == 1
