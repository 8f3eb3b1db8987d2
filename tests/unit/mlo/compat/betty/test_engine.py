"""The engine: runs, validates, stops, resumes, and refuses what is no program."""

from __future__ import annotations

import logging

import pytest
import torch
from small_betty_programs import Value, bilevel, library, problems, values
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

import mlo
from mlo.compat.betty import Config, Engine, EngineConfig, ImplicitProblem

QUIET = {"strategy": "cpu"}


def with_validation(answers, **more):
    """Engine → a subclass whose validations return these."""

    def make(base):
        seen = []

        def validation(self):
            seen.append((self.global_step, self.low.module.training))
            return answers[len(seen) - 1]

        return type("Validating", (base,), {"validation": validation, "seen": seen, **more})

    return make


# ------------------------------ runs


def test_a_step_of_the_leaf_makes_those_that_are_due():
    engine = bilevel(lower={"unroll_steps": 3}, run=False)
    assert engine.low.leaf
    assert not engine.up.leaf
    assert engine.leaves == [engine.low]
    for step in range(1, 7):
        engine.train_step()
        assert (engine.low.count, engine.up.count) == (step, step // 3)
    assert engine.last_record.round == 2
    assert set(engine.last_record.losses) == {"low", "up"}


def test_a_program_without_edges_steps_all_of_its_problems():
    actor, critic = problems("actor", "critic")
    Engine([actor, critic], EngineConfig(train_iters=3, **QUIET)).run()
    assert (actor.count, critic.count) == (3, 3)
    assert actor.module.v.item() == pytest.approx(0.8**3)


def test_validation_runs_in_evaluation_mode_every_so_often():
    engine = bilevel(
        engine={"train_iters": 7, "valid_step": 3},
        engine_class=with_validation([{"acc": 1.0}, None]),
    )
    assert engine.seen == [(3, False), (6, False)]
    assert engine.low.module.training


def test_early_stopping_ends_the_run():
    engine = bilevel(
        engine={
            "valid_step": 2,
            "early_stopping": True,
            "early_stopping_metric": "acc",
            "early_stopping_mode": "max",
            "early_stopping_tolerance": 2,
        },
        engine_class=with_validation([{"acc": a} for a in (0.5, 0.7, 0.6, 0.7, 0.9, 0.9)]),
    )
    assert engine.global_step == 8
    assert engine.early_stopping.best_score == 0.7


def test_lines_of_a_run_are_bettys(capsys):
    logger = logging.getLogger("mlo.compat.betty")
    options = {"engine": {"train_iters": 2, "valid_step": 2, "logger_type": "none"}}
    engine = bilevel(
        upper={"log_step": 1}, engine_class=with_validation([{"acc": 1.0}]), run=False, **options
    )
    logger.setLevel(logging.INFO)
    engine.run()
    logger.setLevel(logging.ERROR)
    lines = [line.split("[INFO] ")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith('[Problem "up"] [Global Step 1] [Local Step 1] loss: ')
    assert lines[2:] == [
        "[Validation] [Global Step 2] acc: 1.0",
        "Multilevel optimization finished!",
    ]


def test_a_run_may_be_made_again():
    engine = bilevel(engine={"train_iters": 5})
    engine.run()
    assert (engine.global_step, engine.low.count) == (10, 10)


def test_the_optimizer_behind_it_answers_questions():
    engine = bilevel(engine={"train_iters": 2})
    gradient = engine.mlo_optimizer.gradient("up")
    assert gradient["v"].shape == (2,)
    before = values(engine)
    engine.mlo_optimizer.gradient("low")
    assert torch.equal(values(engine), before)


@pytest.mark.parametrize("back", [False, True])
def test_batch_statistics_are_those_of_the_steps_that_stay(back):
    """BatchNorm's: of every step, or with roll_back of the step that is made again."""
    library()
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    scale = Value(0.1)

    class Low(ImplicitProblem):
        def training_step(self, batch):
            return ((self.module(batch[0]) - self.up()) ** 2).mean()

    class Up(ImplicitProblem):
        def training_step(self, batch):
            return (self.low(batch[0]) ** 2).mean()

    low = Low(
        "low",
        Config(unroll_steps=2),
        net,
        SGD(net.parameters(), lr=0.0),
        train_data_loader=[(x,), (2 * x,)],
    )
    up = Up("up", Config(), scale, SGD(scale.parameters(), lr=0.1), train_data_loader=[(7 * x,)])
    Engine(
        [up, low],
        EngineConfig(train_iters=2, roll_back=back, **QUIET),
        {"l2u": {low: [up]}, "u2l": {up: [low]}},
    ).run()
    expected = torch.zeros(2).double()
    for factor in (2.0,) if back else (1.0, 2.0):
        expected = 0.9 * expected + 0.1 * net[0](factor * x).mean(0).detach()
    torch.testing.assert_close(net[1].running_mean, expected)


def infinite_at(count):
    def training_step(self, batch):
        value = (self.module() ** 2).sum()
        return value / 0.0 if self.count == count else value

    return training_step


def test_a_loss_that_is_not_finite_stops_the_run():
    for choice, expected in ((None, float("nan")), ("skip", 0.8**3)):
        (problem,) = problems("one", one={"log_step": 1})
        type(problem).training_step = infinite_at(2)
        Engine([problem], EngineConfig(train_iters=4, on_nonfinite=choice, **QUIET)).run()
        assert problem.module.v.item() == pytest.approx(expected, nan_ok=True)
    (problem,) = problems("one")
    type(problem).training_step = infinite_at(2)
    with pytest.raises(mlo.NonFiniteError, match="problem 'one': its loss is not finite"):
        Engine([problem], EngineConfig(train_iters=4, **QUIET)).run()
    assert problem.module.v.item() == pytest.approx(0.8)


# ------------------------------ states


RUNS = [
    {"lower": {"unroll_steps": 3}},
    {"lower": {"unroll_steps": 3}, "engine": {"roll_back": True}},
    {"lower": {"gradient_accumulation": 3}, "upper": {"gradient_accumulation": 2}},
    {"lower": {"warmup_steps": 5}},
    {"lower": {"type": "sama"}, "optimizer": Adam},
]


@pytest.mark.parametrize("options", RUNS, ids=str)
@pytest.mark.parametrize("at", [5, 6])
def test_an_interrupted_run_ends_where_the_whole_one_does(options, at, tmp_path):
    """At 5 within a cycle, an accumulation, or a warm-up."""

    def prepared(base, save):
        def validation(self):
            if save and self.global_step == at:
                mlo.save_checkpoint(self.state_dict(), tmp_path / "run.pt")
            return {"loss": 1.0 / self.global_step}

        return type("Saving", (base,), {"validation": validation})

    options = {**options, "engine": {**options.get("engine", {}), "valid_step": 1}}
    options["engine"]["early_stopping"] = True
    whole = bilevel(engine_class=lambda base: prepared(base, save=True), **options)
    resumed = bilevel(engine_class=lambda base: prepared(base, save=False), run=False, **options)
    resumed.load_state_dict(mlo.load_checkpoint(tmp_path / "run.pt"))
    assert resumed.global_step == resumed.low.count == at
    resumed.run()
    assert resumed.global_step == whole.global_step == 12
    assert torch.equal(values(resumed), values(whole))
    assert resumed.early_stopping.best_score == whole.early_stopping.best_score


class Noisy(ImplicitProblem):
    """With shuffled batches, dropout and a schedule."""

    def training_step(self, batch):
        return (nn.functional.dropout(self.module(batch[0]), 0.5) ** 2).mean()

    def configure_module(self):
        return nn.Linear(2, 1)

    def configure_optimizer(self):
        return Adam(self.module.parameters(), lr=0.1)

    def configure_scheduler(self):
        return torch.optim.lr_scheduler.StepLR(self.optimizer, 2)

    def configure_train_data_loader(self):
        return DataLoader(TensorDataset(torch.randn(10, 2)), batch_size=3, shuffle=True)


def test_shuffled_batches_and_noise_resume_too():
    library()

    def program(steps):
        torch.manual_seed(0)
        engine = Engine([Noisy("net")], EngineConfig(**QUIET))
        for _ in range(steps):
            engine.train_step()
        return engine

    whole, state = program(9), program(5).state_dict()
    rest = program(0)
    torch.randn(100)
    rest.load_state_dict(state)
    for _ in range(4):
        rest.train_step()
    assert torch.equal(rest.net.module.weight, whole.net.module.weight)
    assert rest.net.scheduler.last_epoch == 9


def test_the_state_of_another_program_is_refused():
    engine = bilevel(run=False)
    with pytest.raises(mlo.CheckpointError, match=r"\['low', 'up'\].*problem\.load_state_dict"):
        engine.load_state_dict(engine.low.state_dict())


# ------------------------------ exchanges


def test_parts_are_exchanged_between_rounds():
    engine = bilevel(engine={"train_iters": 4})
    new = Value(0.9, 0.9)
    engine.low.set_module(new)
    engine.low.set_optimizer(SGD(new.parameters(), lr=0.0))
    engine.train_step()
    assert engine.low.module.v.tolist() == [0.9, 0.9]
    assert engine.up.count == 5


def test_dependencies_are_exchanged():
    one, other = problems("one", "other")
    engine = Engine([one, other], EngineConfig(**QUIET))
    engine.train_step()
    engine.set_dependency({"l2u": {one: [other]}, "u2l": {}})
    assert engine.leaves == [one]
    assert other.children == [one]
    engine.train_step()
    assert (one.count, other.count) == (2, 2)


# ------------------------------ what is no program


def test_paths_go_down_and_come_back():
    a, b, c = problems("a", "b", "c")
    dependencies = {"l2u": {a: [b, c], b: [c]}, "u2l": {c: [a]}}
    Engine([c, b, a], EngineConfig(**QUIET), dependencies)
    assert [[p.name for p in path] for path in c.paths] == [
        ["c", "b", "a", "c"],
        ["c", "a", "c"],
    ]


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (lambda a, b: {"u2l": {b: [a]}}, r"no path in 'l2u' leads from 'a' up to 'b'"),
        (lambda a, b: {"l2u": {a: [b], b: [a]}}, r"has a circle among \['a', 'b'\]"),
        (lambda a, b: {"l2u": {a: problems("x")}}, "names the problem 'x', which is not in"),
    ],
    ids=["no way", "a circle", "a stranger"],
)
def test_dependencies_that_are_no_graph_are_refused(edges, message):
    a, b = problems("a", "b")
    with pytest.raises(mlo.GraphError, match=message):
        Engine([a, b], EngineConfig(**QUIET), edges(a, b))


def test_a_missing_attribute_names_the_other_problems():
    one, other = problems("one", "other")
    Engine([one, other], EngineConfig(**QUIET))
    with pytest.raises(AttributeError, match=r"no attribute 'inner'\. .* by their names: other\."):
        one.inner  # noqa: B018


def test_a_name_that_is_taken_is_refused():
    (problem,) = problems("config")
    with pytest.raises(mlo.GraphError, match="Engine already has an attribute 'config'"):
        Engine([problem], EngineConfig(**QUIET))


def test_only_leaves_that_train_step():
    engine = bilevel(run=False)
    with pytest.raises(mlo.ProblemError, match="'up' is not a leaf"):
        engine.up.step()
    engine.eval()
    with pytest.raises(mlo.ProblemError, match=r"evaluation mode: call engine\.train\(\) first"):
        engine.train_step()


def test_nccl_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (problem,) = problems("one")
    with pytest.raises(mlo.ConfigurationError, match="Use backend='gloo'"):
        Engine([problem], EngineConfig(strategy="distributed"))
