"""Saved states of problems."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from noisy_regression import regression
from torch import nn

import mlo
from mlo.testing import Vector, bilevel_quadratic, diamond, identical


def test_a_state_of_another_graph_is_refused():
    with pytest.raises(mlo.CheckpointError, match="of the problems"):
        regression().load_state_dict(diamond().optimizer("direct").state_dict())
    state = regression().state_dict()
    with pytest.raises(mlo.CheckpointError, match="version 99"):
        regression().load_state_dict({**state, "version": 99})
    state["problems"]["decay"]["module"] = {}
    with pytest.raises(mlo.CheckpointError, match="'decay' does not fit"):
        regression().load_state_dict(state)


def test_a_state_of_the_first_version_is_read():
    """It kept the one optimizer of a problem under no name, and no position in the round."""
    optimizer, other = regression(), regression()
    list(optimizer.run(2))
    state = optimizer.state_dict()
    list(optimizer.run(2))
    state["version"] = 1
    del state["within_round"]
    for name, saved in state["problems"].items():
        for part in ("optimizers", "schedulers"):
            saved[part] = {"" if key == name else key: v for key, v in saved[part].items()}
        assert "" in saved["optimizers"]
    other.load_state_dict(state)
    list(other.run(2))
    assert identical(optimizer.state_dict(), other.state_dict())


def test_later_steps_do_not_change_a_state_that_was_loaded():
    """Optimizers take over the tensors that they are given, and change them in place."""
    problem = bilevel_quadratic()
    optimizer = problem.optimizer("one_step")
    lower = problem.problems[0]
    lower.optimizers[lower.name] = torch.optim.Adam(lower.module.parameters(), lr=0.1)
    optimizer = problem.optimizer("one_step")
    list(optimizer.run(2))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    for _ in range(2):
        optimizer.load_state_dict(state)
        list(optimizer.run(2))
        assert identical(state, kept)


# ------------------------------ all of a state or nothing


def adam_pair(*, adam=torch.optim.Adam, size=3, dtype=torch.float64):
    """w follows x, both under Adam; the second problem is loaded last."""
    problems = []
    modules = {name: Vector(torch.ones(size, dtype=dtype)) for name in ("w", "x")}
    losses = {
        "w": lambda w, _, *, x: ((w.v - x.v) ** 2).sum(),
        "x": lambda x, _, *, w: (w.v**2).sum(),
    }
    for name, module in modules.items():
        kind = adam if name == "x" else torch.optim.Adam
        problems.append(
            mlo.Problem(
                name, module=module, optimizer=kind(module.parameters(), lr=0.1), loss=losses[name]
            )
        )
    return mlo.MultilevelOptimizer(problems)


def refused(optimizer, state, match):
    before = optimizer.state_dict()
    with pytest.raises(mlo.CheckpointError, match=match):
        optimizer.load_state_dict(state)
    assert identical(before, optimizer.state_dict())
    optimizer.step()  # and the run continues


class Averaging(nn.Module):
    """Its loss reads an average of its weight in a buffer, which may not be in its state_dict."""

    def __init__(self, kind, persistent):
        super().__init__()
        self.weight, self.kind, self.persistent = nn.Parameter(torch.ones(2)), kind, persistent
        if kind != "registered when it runs":
            value = None if kind == "filled when it runs" else torch.zeros(2)
            self.register_buffer("average", value, persistent=persistent)

    def loss(self):
        if getattr(self, "average", None) is None:
            self.register_buffer("average", torch.zeros(2), persistent=self.persistent)
        average = self.average
        if self.kind == "grows":
            average = self.average = torch.cat([average, torch.ones(1)])
        else:
            average.mul_(0.5).add_(self.weight.detach(), alpha=0.5)
        return (self.weight - average.mean()).square().sum()


def averaging(kind, *, persistent=False):
    net = Averaging(kind, persistent)
    problem = mlo.Problem(
        "net",
        module=net,
        loss=lambda net, batch: net.loss(),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
    )
    return mlo.MultilevelOptimizer([problem])


@pytest.mark.parametrize(
    "kind", ["changes", "grows", "filled when it runs", "registered when it runs"]
)
def test_a_state_holds_buffers_that_are_not_persistent(kind):
    """A run resumes with all its buffers; an older state without them can be loaded."""
    optimizer, other, third = averaging(kind), averaging(kind), averaging(kind)
    list(optimizer.run(3))
    state = optimizer.state_dict()
    list(optimizer.run(3))
    other.load_state_dict(state)
    list(other.run(3))
    assert identical(optimizer.state_dict(), other.state_dict())
    del state["problems"]["net"]["buffers"]
    third.load_state_dict(state)
    list(third.run(3))
    assert not identical(optimizer.state_dict(), third.state_dict())


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["filled when it runs", "registered when it runs"])
def test_a_state_holds_buffers_made_in_the_run(kind, persistent):
    """A run resumes, and returns to states of before and after its module made a buffer."""
    optimizer, other = averaging(kind, persistent=persistent), averaging(kind)
    before = optimizer.state_dict()
    list(optimizer.run(3))
    state = optimizer.state_dict()
    assert "average" not in state["problems"]["net"]["module"]
    list(optimizer.run(3))
    for run in (other, optimizer):
        after = optimizer.state_dict()
        run.load_state_dict(state)
        list(run.run(3))
        assert identical(after, run.state_dict())
    optimizer.load_state_dict(before)
    assert torch.equal(optimizer.problems["net"].module.weight, torch.ones(2))


def test_a_buffer_without_a_place_is_refused():
    optimizer = averaging("changes")
    for key in ("inner.average", "weight", "inner."):
        state = optimizer.state_dict()
        state["problems"]["net"]["buffers"][key] = torch.ones(2)
        refused(optimizer, state, f"buffers.{key} of the state has no place")


def test_a_state_of_another_optimizer_is_refused():
    """It is refused before anything changes."""
    optimizer, other = adam_pair(), adam_pair(adam=torch.optim.SGD)
    list(optimizer.run(2)), list(other.run(3))
    refused(optimizer, other.state_dict(), "'x' is of another optimizer: it was saved of SGD")


def test_states_without_a_kind_are_compared_by_their_settings():
    """As version 1 saved them."""
    optimizer, other = adam_pair(), adam_pair(adam=torch.optim.SGD)
    list(other.run(1))
    state = other.state_dict()
    del state["problems"]["x"]["optimizer_types"]
    refused(optimizer, state, r"it lacks .*betas")


def test_moments_of_another_shape_are_refused():
    optimizer = adam_pair()
    list(optimizer.run(1))
    state = optimizer.state_dict()
    state["problems"]["x"]["optimizers"]["x"]["state"][0]["exp_avg"] = torch.zeros(7)
    refused(optimizer, state, "exp_avg has the shape")


class Unusual(torch.optim.Optimizer):
    """Keeps what optimizers of other libraries keep: see the comments."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        self.state["k"] = self.state.get("k", torch.zeros(1)) + 1  # of no parameter (MADGRAD)
        self.state["ema"] = {"loss": float(self.state["k"])}  # (EmoNavi)
        for p in self.param_groups[0]["params"]:
            own = self.state[p]
            if not own:
                own["momentum_buffer"] = {0.5: torch.zeros_like(p)}  # several (AggMo)
                own["exp_avg_sq"] = torch.zeros(())  # one per tensor or row (Amos, Nero)
                own["weight"] = torch.zeros((), dtype=torch.float32)  # (QHAdam)
            own["momentum_buffer"][0.5].mul_(0.5).add_(p.grad)
            own["exp_avg_sq"].mul_(0.9).add_(p.grad.square().mean())
            own["weight"].mul_(0.9).add_(1.0)
            rate = self.param_groups[0]["lr"] / own["weight"] / self.state["k"].sqrt()
            p -= rate * own["momentum_buffer"][0.5] / own["exp_avg_sq"].sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_entries_of_other_libraries_optimizers_resume(dtype, tmp_path):
    whole, resumed = (adam_pair(adam=Unusual, dtype=dtype) for _ in range(2))
    list(whole.run(3))
    mlo.save_checkpoint(whole.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(mlo.load_checkpoint(tmp_path / "state.pt"))
    list(whole.run(3)), list(resumed.run(3))
    assert identical(whole.state_dict(), resumed.state_dict())


def test_a_module_that_was_converted_converts_its_moments():
    saved, other = (adam_pair(dtype=dtype) for dtype in (torch.float32, torch.float64))
    list(saved.run(2))
    other.load_state_dict(saved.state_dict())
    (entries,) = other.problems["x"].optimizers["x"].state.values()
    assert entries["exp_avg"].dtype == torch.float64
    other.step()


def test_a_load_that_fails_half_way_is_undone(monkeypatch):
    optimizer, other = adam_pair(), adam_pair()
    list(optimizer.run(1)), list(other.run(3))
    state = other.state_dict()
    whole = torch.optim.Adam.load_state_dict
    calls = []

    def failing(self, saved):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("in the middle")
        whole(self, saved)

    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", failing)
    refused(optimizer, state, "in the middle")


def test_rounding_of_a_state_is_said():
    single, double = adam_pair(dtype=torch.bfloat16), adam_pair(dtype=torch.float32)
    with pytest.warns(mlo.CheckpointWarning, match=r"torch\.float32 there and torch\.bfloat16"):
        single.load_state_dict(double.state_dict())
    double.load_state_dict(single.state_dict())  # nothing is lost this way


# ------------------------------ all of an update or nothing


def test_an_update_that_fails_leaves_everything_as_it_was():
    """BatchNorm's statistics, the batch and the noise: the next attempt is the first again."""

    def build():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
        batches = [torch.randn(5, 3).double() for _ in range(4)]

        def loss(net, batch):
            value = (net(batch) * torch.rand(5, 4).double()).square().mean()
            if failing:
                raise KeyError("the user's own")
            return value

        problem = mlo.Problem(
            "net",
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            loss=loss,
            data=batches,
        )
        return mlo.MultilevelOptimizer([problem])

    failing = False
    plain = build()
    list(plain.run(3))
    expected = plain.state_dict()

    optimizer = build()
    list(optimizer.run(2))
    before = optimizer.state_dict()
    failing = True
    for _ in range(2):
        with pytest.raises(KeyError):
            optimizer.step()
        after = optimizer.state_dict()
        for key in ("module", "optimizers", "data", "updates"):
            assert identical(before["problems"]["net"][key], after["problems"]["net"][key])
        assert identical(before["random"], after["random"])
    failing = False
    optimizer.step()
    assert identical(expected, optimizer.state_dict())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_optimizer_is_copied_by_its_state_only(copied):
    optimizer = regression()
    optimizer.step()
    with pytest.raises(mlo.ProblemError, match=r"other.load_state_dict\(optimizer.state_dict"):
        copied(optimizer)


@pytest.mark.filterwarnings("ignore:The gradient of problem")
@pytest.mark.parametrize("engine", ["first_order", "one_step"])
def test_a_state_inside_a_round_warns_where_numbers_differ(engine):
    """The rest of the round is the same only where no step of it is differentiated."""
    optimizer = regression(hypergradient=engine)
    optimizer.step()
    next(optimizer.updates(1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        saved = optimizer.state_dict()
    optimizer.step()
    other = regression(hypergradient=engine)
    other.load_state_dict(saved)
    other.step()
    decays = [o.problems["decay"].module.v for o in (optimizer, other)]
    assert torch.equal(*decays) == (not told) == (engine == "first_order")


def loaded(state, **options):
    """The warnings of loading a state into a declaration, as texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regression(**options).load_state_dict(state)
    return [str(w.message) for w in caught if w.category is mlo.CheckpointWarning]


def test_a_changed_declaration_is_told_in_one_warning():
    state = regression().state_dict()
    assert loaded(state) == []
    (message,) = loaded(state, hypergradient="identity", steps=3, grad_clip=1.0)
    assert "net had engine=OneStep(" in message
    assert "here Identity(" in message
    assert "net had steps=1, here 3" in message
    assert "net had grad_clip=None, here 1.0" in message
    # The engine of the outermost problem differentiates nothing.
    assert loaded(state, hypergradient={"net": "one_step", "decay": "direct"}) == []


def test_a_changed_setting_of_an_optimizer_is_told():
    def slower(parameters, lr):
        return torch.optim.Adam(parameters, lr=lr / 2)

    state = regression().state_dict()
    (message,) = loaded(state, optimizer=slower)
    assert "net had lr=0.01, here 0.005" in message
    # A schedule moves it in any run.
    schedule = {"scheduler": lambda own: torch.optim.lr_scheduler.StepLR(own, 1)}
    moved = regression(**schedule)
    list(moved.run(2))
    state = moved.state_dict()
    assert loaded(state, **schedule) == []
    (message,) = loaded(state, optimizer=slower, **schedule)
    assert "net had lr=0.01, here 0.005" in message
    # A state of an earlier version has no settings but those of its last step.
    old = regression().state_dict()
    del old["problems"]["net"]["options"]
    assert "net had lr=0.01, here 0.005" in loaded(old, optimizer=slower)[0]
    del state["problems"]["net"]["options"]
    assert loaded(state, optimizer=slower, **schedule) == []


class Counting(torch.optim.Optimizer):
    """Keeps what it counts, and a mode, in its groups, as schedule-free optimizers and Prodigy."""

    def __init__(self, parameters, lr):
        kept = {"k": 0, "d": 1e-6, "train_mode": False, "largest": None}
        super().__init__(parameters, {"lr": lr, **kept})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["d"] *= 2.0
            group["train_mode"], group["largest"] = True, group["lr"]
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad


def test_what_an_optimizer_counts_in_its_groups_is_no_change():
    counting = {"optimizer": Counting, "hypergradient": "identity"}
    run = regression(**counting)
    list(run.run(2))
    state = run.state_dict()
    assert loaded(state, **counting) == []
    resumed = regression(**counting)
    resumed.load_state_dict(state)
    (group,) = resumed.problems["net"].optimizers["net"].param_groups
    assert (group["k"], group["train_mode"]) == (2, True)
    (message,) = loaded(state, **{**counting, "optimizer": lambda own, lr: Counting(own, lr / 2)})
    assert "net had lr=0.01, here 0.005. The run" in message
    # A state of an earlier version does not say what was declared.
    del state["problems"]["net"]["options"]
    assert loaded(state, **counting) == []


def test_a_rate_that_the_user_moves_is_no_change():
    def slower(problem):
        problem.optimizers["net"].param_groups[0]["lr"] *= 0.5

    run = regression(before_update=slower)
    list(run.run(2))
    assert loaded(run.state_dict(), before_update=slower) == []


@pytest.mark.parametrize("engine", ["one_step", "identity"])
def test_a_question_after_a_load_tells_that_it_differs(engine):
    saved = regression(hypergradient=engine)
    saved.step()
    before = saved.gradient("decay")
    resumed = regression(hypergradient=engine)
    resumed.load_state_dict(saved.state_dict())
    with pytest.warns(mlo.CheckpointWarning, match="No step of decay, net was made since"):
        after = resumed.gradient("decay")
    assert not torch.equal(after["v"], before["v"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.gradient("decay")  # said once
        resumed.step()
        resumed.gradient("decay")


def test_only_a_step_that_is_still_needed_is_missed():
    def told(engine, updates):
        optimizer = regression(hypergradient=engine, steps=3)
        made = optimizer.updates(1)
        for _ in range(updates):
            next(made)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = optimizer.state_dict()
        other = regression(seed=1, hypergradient=engine, steps=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.load_state_dict(state)
            same = other.step().losses == optimizer.step().losses
        return any(w.category is mlo.CheckpointWarning for w in caught), same

    # (Of a shuffled pass the same data are drawn, so only what the state lacks can differ.)
    for engine in ("one_step", "identity"):
        assert told(engine, 1)[0] is False  # two more steps follow, of which the last is read
        assert told(engine, 2)[0] is False
        assert told(engine, 3)[0] is True
    assert told({"name": "unroll", "steps": 2}, 1)[0] is False
    assert told({"name": "unroll", "steps": 2}, 2)[0] is True
    assert told("first_order", 3)[0] is False


def test_a_scheduler_without_a_state_is_named():
    class Halving:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.param_groups[0]["lr"] *= 0.5

    module = Vector(torch.ones(2))
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    problem = mlo.Problem(
        "w",
        module=module,
        optimizer=sgd,
        scheduler=Halving(sgd),
        loss=lambda w, batch: (w.v**2).sum(),
    )
    optimizer = mlo.MultilevelOptimizer([problem])
    optimizer.step()
    assert sgd.param_groups[0]["lr"] == 0.05
    with pytest.raises(mlo.CheckpointError, match=r"scheduler Halving has no state_dict\(\)"):
        optimizer.state_dict()
