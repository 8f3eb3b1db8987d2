"""What a user's problem offers, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from small_betty_programs import Value, batches, bilevel, library
from torch import nn
from torch.optim import SGD, Adam

import mlo
from mlo.compat.betty import (
    Config,
    Engine,
    EngineConfig,
    HigherIterativeProblem,
    ImplicitProblem,
    IterativeProblem,
    MetaIterativeProblem,
    Problem,
)


class Single(ImplicitProblem):
    """One problem by itself, which makes everything that it needs."""

    def training_step(self, batch):
        return (self.forward(batch[0]) ** 2).mean()

    def configure_train_data_loader(self):
        return [(torch.ones(4, 2),), (torch.zeros(4, 2),)]

    def configure_module(self):
        return nn.Linear(2, 1)

    def configure_optimizer(self):
        return SGD(self.module.parameters(), lr=0.1)

    def configure_scheduler(self):
        return torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.1)


def engine_of(problem, **options):
    library()  # silences the log
    return Engine([problem], EngineConfig(strategy="cpu", **options), {"u2l": {}, "l2u": {}})


def test_parts_that_are_not_given_are_made():
    problem = Single("net")
    engine_of(problem, train_iters=3).run()
    assert isinstance(problem.module, nn.Linear)
    assert problem.count == 3
    assert problem.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_parts_that_are_given_are_kept():
    module = nn.Linear(2, 1)
    problem = Single("net", module=module, device="cuda:3", extra_config={"a": 1})
    engine_of(problem)
    assert problem.module is module
    assert problem.device == "cpu"
    assert problem.cfg == {"a": 1}


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("module", r"has no module\. Pass module= or define configure_module"),
        ("optimizer", "has no optimizer"),
        ("train_data_loader", r"has no batches.*get_batch\(self\)"),
    ],
)
def test_a_part_that_is_missing_is_named(without, message):
    kind = type("Lacking", (Single,), {f"configure_{without}": None})
    with pytest.raises(mlo.ProblemError, match=message):
        engine_of(kind("net"))


def test_several_loaders_are_drawn_side_by_side():
    ends = []
    kind = type("Two", (Single,), {"epoch_callback": lambda self: ends.append(self.count)})
    problem = kind("net", train_data_loader=([(1,), (2,)], [{"k": 3}]))
    engine_of(problem)
    assert [problem.get_batch() for _ in range(3)] == [
        ((1,), {"k": 3}),
        ((2,), {"k": 3}),
        ((1,), {"k": 3}),
    ]
    assert problem.epoch_counter == [1, 2]
    assert ends == [0]
    problem.set_train_data_loader([(7,)])
    assert problem.get_batch()[0] == (7,)


def test_groups_of_parameters_are_taken_from_the_problem():
    def param_groups(self):
        return [{"params": [self.module.weight], "lr": 0.5}, {"params": [self.module.bias]}]

    problem = type("Grouped", (Single,), {"param_groups": param_groups})("net")
    engine_of(problem, train_iters=1)
    assert [group["lr"] for group in problem.optimizer.param_groups] == [0.5, 0.1]
    assert problem.get_opt_param_group_for_param(problem.module.bias)["lr"] == 0.1
    assert problem.get_opt_param_group_for_param(torch.ones(1)) is None


def test_an_optimizer_that_groups_keeps_its_groups():
    """Betty makes it anew with one group, from the defaults."""
    module = nn.Linear(2, 1)
    groups = [{"params": [module.weight], "lr": 0.5}, {"params": [module.bias]}]
    problem = Single("net", module=module, optimizer=SGD(groups, lr=0.1))
    engine_of(problem, train_iters=1).run()
    assert [group["lr"] for group in problem.optimizer.param_groups] == [0.5, 0.1]


def test_parameters_that_are_left_out_are_frozen():
    kind = type(
        "Head",
        (Single,),
        {
            "trainable_parameters": lambda self: [self.module.bias],
            "configure_optimizer": lambda self: SGD(self.trainable_parameters(), lr=0.1),
            "configure_scheduler": None,
        },
    )
    problem = kind("net")
    engine = engine_of(problem, train_iters=2)
    before = problem.module.weight.detach().clone()
    engine.run()
    assert torch.equal(problem.module.weight, before)
    assert not problem.module.weight.requires_grad


def test_upper_gradients_through_some_parameters_are_refused():
    kind = type("Meta", (Single,), {"meta_trainable_parameters": lambda self: []})
    with pytest.raises(mlo.ProblemError, match=r"overrides meta_trainable_parameters.*detach"):
        engine_of(kind("net"))


@pytest.mark.parametrize("name", ["backward", "optimizer_step", "one_step_descent"])
def test_a_part_of_bettys_step_is_neither_overridden_nor_called(name):
    kind = type("Own", (Single,), {name: lambda self: None})
    with pytest.raises(mlo.ProblemError, match=rf"defines {name}, which would never be called"):
        kind("net")
    with pytest.raises(AttributeError, match=rf"{name!r}.*mlo makes the step"):
        getattr(Single("net"), name)
    assert not Single("net").is_implemented(name)


def test_the_state_of_a_problem_is_loaded():
    problem, other = Single("net"), Single("net")
    engine_of(problem, train_iters=3).run()
    engine_of(other)
    assert sorted(problem.state_dict()) == ["module", "optimizer", "scheduler"]
    other.load_state_dict(problem.state_dict())
    assert torch.equal(other.module.weight, problem.module.weight)
    assert other.scheduler.last_epoch == 3


def test_callbacks_are_called_when_betty_calls_them():
    """Around one cycle of two steps, and the upper problem's step."""
    calls = []

    def noting(name):
        return lambda self: calls.append(f"{self.name} {name}")

    names = ("on_inner_loop_start", "grad_callback", "param_callback")
    methods = {name: noting(name) for name in names}
    bilevel(
        lower={"unroll_steps": 2},
        engine={"train_iters": 2},
        methods=methods,
        upper_methods=methods,
    )
    step = ["grad_callback", "param_callback"]
    assert calls == [
        "low on_inner_loop_start",
        *[f"low {name}" for name in step * 2],
        "up on_inner_loop_start",
        *[f"up {name}" for name in step],
    ]


def test_numbers_of_a_step_are_logged(capsys):
    engine = bilevel(upper={"log_step": 2}, engine={"train_iters": 4}, run=False)
    written = []
    engine.up.logger = type("Noting", (), {"info": written.append, "log": lambda *a, **k: None})()
    engine.run()
    assert [line.split("] loss")[0] for line in written] == [
        '[Problem "up"] [Global Step 2] [Local Step 2',
        '[Problem "up"] [Global Step 4] [Local Step 4',
    ]
    assert " || size: " in written[0]


@pytest.mark.parametrize(("local", "steps"), [(False, [2, 4]), (True, [1, 2])])
def test_numbers_of_a_step_are_drawn_over_its_count(local, steps):
    engine = bilevel(
        lower={"unroll_steps": 2},
        upper={"log_step": 1, "log_local_step": local},
        engine={"train_iters": 4},
        run=False,
    )
    drawn = []

    class Noting:
        def info(self, message):
            pass

        def log(self, stats, tag, step):
            drawn.append((sorted(stats), tag, step))

    engine.up.logger = Noting()
    engine.run()
    assert drawn == [(["loss", "size"], "up", step) for step in steps]


def test_other_names_of_the_classes():
    assert MetaIterativeProblem is HigherIterativeProblem
    assert issubclass(HigherIterativeProblem, IterativeProblem)
    assert IterativeProblem.unrolls
    assert not ImplicitProblem.unrolls


def test_an_iterative_problem_has_a_functional_module():
    problem = IterativeProblem("net", Config(), nn.BatchNorm1d(2))
    params = tuple(2.0 * p for p in problem.params)
    buffers = tuple(b.clone() for b in problem.buffers)
    x = torch.randn(4, 2)
    found = problem.fmodule(params, buffers, x)
    torch.testing.assert_close(found, 2.0 * problem(x))


def test_edges_are_named_once():
    one, other = Problem("a", Config()), Problem("b", Config())
    one.add_child(other)
    other.add_parent(one)
    with pytest.raises(mlo.ProblemError, match="'b' is already a child of 'a'"):
        one.add_child(other)
    one.clear_dependencies()
    assert (one.children, one.parents, one.paths) == ([], [], [])


def test_a_problem_without_a_loss_says_so():
    with pytest.raises(NotImplementedError, match="'a': define training_step"):
        Problem("a").training_step(None)


def test_modes_are_set():
    problem = Single("net", module=nn.Linear(2, 1))
    problem.eval()
    assert not problem.module.training
    problem.train()
    assert problem.module.training


def test_a_processs_module_is_reached_as_through_a_wrapper():
    """Programs write `self.module.module` where Betty has wrapped it."""
    problem = Problem("a", module=nn.Linear(2, 1))
    problem.configure_distributed_training(
        {"strategy": "distributed", "backend": "gloo", "world_size": 2, "rank": 1, "local_rank": 0}
    )
    problem.configure_device("cpu")
    problem.patch_module()
    assert problem.module.module is problem.module
    assert list(problem.module.state_dict()) == ["weight", "bias"]
    loader = problem.patch_data_loader([1, 2, 3, 4])
    assert [loader.next(), loader.next()] == [2, 4]


def test_the_optimizers_state_is_found():
    module = Value(1.0)
    optimizer = Adam(module.parameters(), lr=0.1)
    problem = ImplicitProblem("a", module=module, optimizer=optimizer)
    module.v.grad = torch.ones_like(module.v)
    optimizer.step()
    assert float(problem.get_opt_state_for_param(module.v)["step"]) == 1.0


def test_a_batch_is_on_the_device_and_remembered():
    engine = bilevel(engine={"train_iters": 2})
    assert torch.equal(engine.low.cur_batch[0], batches()[1][0])
