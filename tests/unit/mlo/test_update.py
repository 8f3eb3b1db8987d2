"""One update of a problem: clipping, the hooks around the step, and the iterator over updates."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from two_levels import two_levels

import mlo
from mlo import total_gradient
from mlo.testing import Vector, diamond, identical, relative_error, trilevel_quadratic


def test_one_gradient_of_two_parameters_is_clipped_once():
    """Autograd returns one tensor for both terms of a + b, and an expanded one for a sum."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (
                torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)
            )

    ours, plain = Two(), Two()
    problem = mlo.Problem(
        "n",
        module=ours,
        optimizer=torch.optim.SGD(ours.parameters(), lr=1.0),
        grad_clip=0.1,
        loss=lambda n, _: (n.a + n.b).sum(),
    )
    mlo.MultilevelOptimizer([problem]).step()
    (plain.a + plain.b).sum().backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    assert torch.equal(ours.a, plain.a) and torch.equal(ours.b, plain.b)


@pytest.mark.parametrize("grad_clip", [None, 0.1])
def test_a_fused_step_gets_gradients_laid_out_like_parameters(grad_clip):
    """A fused step is the plain one where a convolution's gradient has its channels last."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)

    def moved(**options):
        torch.manual_seed(1)
        module = torch.nn.Conv2d(3, 8, 3)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, **options)
        problem = mlo.Problem(
            "n",
            module=module,
            optimizer=optimizer,
            grad_clip=grad_clip,
            loss=lambda n, _: n(images).square().mean(),
        )
        list(mlo.MultilevelOptimizer([problem]).run(3))
        return dict(module.named_parameters())

    module = torch.nn.Conv2d(3, 8, 3)
    (gradient,) = torch.autograd.grad(module(images).sum(), [module.weight])
    assert gradient.stride() != module.weight.stride()
    assert relative_error(moved(fused=True), moved()) < 1e-6


# ------------------------------ how solves are recorded


class Tally:
    """Counts."""

    def __init__(self):
        self.count = 0


@dataclass(frozen=True, kw_only=True)
class Flaky(mlo.Engine):
    """The identity's answer, of which some solves are said to have failed."""

    name: ClassVar[str] = "flaky"
    fails: tuple[int, ...]  # which solves, from 1
    solved: Tally
    value: float = 1.0

    def solve(self, system, cotangent):
        self.solved.count += 1
        fails = self.solved.count in self.fails
        q = [torch.full_like(t, self.value) for t in system.parameters]
        report = self.report(
            system.problem, residual=0.9 if fails else 0.0, advice="Do more." if fails else ""
        )
        return mlo.hypergradient.Solve(q=q, report=report)


def read_by(optimized, *, loss=None, **options):
    """A lower problem "w", and an upper one "x" of several parameters that reads its solution."""
    w = Vector(torch.zeros(2).double())
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=0.1),
        loss=lambda w, _, *, x: ((w.v - sum(x.parameters())) ** 2).sum(),
    )
    upper = mlo.Problem(
        "x",
        module=optimized,
        loss=loss or (lambda x, _, *, w: (w.v**2).sum() + w.v.sum()),
        **options,
    )
    return [lower, upper]


def two_players(**options):
    players = torch.nn.ModuleDict({name: Vector(torch.ones(2).double()) for name in "ab"})
    return read_by(
        players,
        loss=lambda x, _, *, w: dict.fromkeys(x, (w.v**2).sum() + w.v.sum()),
        players={"a": "a", "b": "b"},
        optimizer={
            name: torch.optim.SGD(player.parameters(), lr=0.1) for name, player in players.items()
        },
        **options,
    )


def one_player(**options):
    x = Vector(torch.ones(2).double())
    return read_by(x, optimizer=torch.optim.SGD(x.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    ("make", "solves"),
    [
        (two_players, 2),
        (lambda: two_players(player_steps={"a": 2}), 3),
        (lambda: one_player(steps=3), 3),
        (lambda: one_player(accumulate_solves=2), 2),
    ],
    ids=["players", "player_steps", "steps", "accumulate_solves"],
)
def test_whichever_solve_of_a_round_fails_is_in_its_record(make, solves):
    for fails in range(1, solves + 1):
        solved = Tally()
        optimizer = mlo.MultilevelOptimizer(make(), Flaky(fails=(fails,), solved=solved))
        with pytest.warns(mlo.SolveWarning, match="did not converge on problem 'w'"):
            record = optimizer.step()
        assert solved.count == solves
        assert record.solves["w"].outcome == "failed"
        assert optimizer.step().solves["w"].outcome == "converged"


def test_the_solve_of_an_update_that_is_left_out_is_recorded():
    engine = Flaky(fails=(1,), solved=Tally(), value=float("nan"))
    optimizer = mlo.MultilevelOptimizer(one_player(), engine, on_nonfinite="skip")
    with pytest.warns(mlo.SolveWarning, match="did not converge"):
        record = optimizer.step()
    assert list(record.skipped) == ["x"]
    assert record.solves["w"].outcome == "failed"
    # A round that stops has no record, so the error says it.
    stopped = mlo.MultilevelOptimizer(one_player(), Flaky(fails=(1,), solved=Tally(), value=1e400))
    with (
        pytest.warns(mlo.SolveWarning, match="did not converge"),
        pytest.raises(mlo.NonFiniteError, match="'flaky' did not converge on problem 'w': Do more"),
    ):
        stopped.step()


def test_solves_at_an_estimators_last_point_are_recorded():
    solved = Tally()
    engine = Flaky(fails=(3,), solved=solved)  # of the second round, at the point of the first
    x = Vector(torch.ones(2).double())
    problems = read_by(
        x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        estimator="storm",
    )
    optimizer = mlo.MultilevelOptimizer(problems, engine)
    assert optimizer.step().solves["w"].outcome == "converged"
    with pytest.warns(mlo.SolveWarning, match="did not converge"):
        assert optimizer.step().solves["w"].outcome == "failed"
    assert solved.count == 3


# ------------------------------ the iterator over updates


def state_after(drive):
    """The state of the same run, driven in a given way."""
    optimizer = two_levels()
    drive(optimizer)
    return optimizer.state_dict()


def test_updates_are_yielded_in_the_order_of_the_round():
    optimizer = two_levels(steps=3)
    seen = [(u.problem, u.round, u.ends_round) for u in optimizer.updates(rounds=2)]
    first = [("w", 1, False)] * 3 + [("x", 1, True)]
    assert seen == first + [(name, 2, last) for name, _, last in first]
    assert optimizer.round == 2


def test_rounds_steps_and_updates_make_the_same_run():
    by_rounds = state_after(lambda opt: list(opt.run(3)))
    assert identical(by_rounds, state_after(lambda opt: [opt.step() for _ in range(3)]))
    assert identical(by_rounds, state_after(lambda opt: list(opt.updates(rounds=3))))


def test_an_updates_record_is_that_of_the_round_so_far():
    optimizer = two_levels(steps=1)
    lower, upper = optimizer.updates(rounds=1)
    assert lower.record is upper.record
    assert set(upper.record.losses) == {"w", "x"} and upper.record.round == 1
    for update in two_levels(steps=1).updates(rounds=1):
        assert ("x" in update.record.losses) == update.ends_round


def test_a_round_that_was_left_is_finished_first():
    """Leaving the loop inside a round loses nothing: the rest comes with the next call."""

    def interrupted(optimizer):
        for update in optimizer.updates(rounds=3):
            if update.problem == "w" and update.round == 2:
                break
        assert optimizer.round == 1
        record = optimizer.step()
        assert record.round == 2 and set(record.losses) == {"w", "x"}
        list(optimizer.updates(rounds=1))

    assert identical(state_after(lambda opt: list(opt.run(3))), state_after(interrupted))


def test_a_state_saved_inside_a_round_resumes_there():
    optimizer = two_levels(steps=3)
    updates = optimizer.updates(rounds=2)
    for _ in range(6):
        next(updates)
    saved = optimizer.state_dict()
    assert saved["within_round"] == 2 and saved["round"] == 1
    expected = [update.problem for update in updates]
    end = optimizer.state_dict()

    other = two_levels(steps=3)
    other.load_state_dict(saved)
    assert [update.problem for update in other.updates(rounds=1)] == expected == ["w", "x"]
    assert identical(end, other.state_dict())
    assert other.round == 2


def test_a_state_without_the_step_that_is_needed_is_told():
    optimizer = two_levels(steps=3)
    updates = optimizer.updates(rounds=2)
    for _ in range(7):  # only x is left, which differentiates the last step of w
        next(updates)
    with pytest.warns(mlo.CheckpointWarning, match="inside round 2, and it does not hold .* w "):
        saved = optimizer.state_dict()
    list(updates)
    other = two_levels(steps=3)
    other.load_state_dict(saved)
    list(other.updates(rounds=1))
    # x looked one step ahead.
    end, found = optimizer.state_dict()["problems"], other.state_dict()["problems"]
    assert identical(end["w"], found["w"]) and not identical(end["x"], found["x"])


def test_an_update_that_fails_is_the_next_to_be_made():
    optimizer = two_levels(steps=1)
    whole = optimizer.problems["x"].loss

    def failing(x, batch, *, w):
        raise KeyError("the user's own error")

    optimizer.problems["x"].loss = failing
    with pytest.raises(KeyError):
        optimizer.step()
    moved = optimizer.problems["w"].parameters["v"].detach().clone()
    optimizer.problems["x"].loss = whole
    assert [update.problem for update in optimizer.updates(rounds=1)] == ["x"]
    assert torch.equal(optimizer.problems["w"].parameters["v"], moved)


@pytest.mark.filterwarnings("ignore:Problem 'w'. a solve on one batch is biased")
@pytest.mark.parametrize("order", ["lower_first", "outermost_first"])
@pytest.mark.parametrize("engine", ["one_step", "cg"])
def test_a_failed_update_is_made_again_with_the_same_noise(order, engine):
    """Also the noise of a step of "w" that was only looked ahead to."""

    def run(fails):
        optimizer = two_levels(engine, order=order, lower={"accumulate": 2})
        for problem in optimizer.problems.values():
            whole = problem.loss

            def noisy(own, batch, whole=whole, **reads):
                if next(calls) == fails:
                    raise KeyError("the user's own error")
                return whole(own, batch, **reads) * (1.0 + torch.rand(()))

            problem.loss = noisy
        calls = itertools.count()
        torch.manual_seed(1)
        while optimizer.round < 2:
            with contextlib.suppress(KeyError):
                optimizer.step()
        return optimizer.state_dict()

    whole = run(fails=-1)
    assert all(identical(run(fails=k), whole) for k in range(0, 12, 2))


def test_a_round_in_which_nobody_moves_yields_no_update():
    optimizer = two_levels(lower={"warmup_steps": 1}, upper={"warmup_steps": 1}, steps=1)
    assert [update.round for update in optimizer.updates(rounds=2)] == [2, 2]
    waiting = two_levels(lower={"warmup_steps": 1}, upper={"warmup_steps": 1})
    assert waiting.step().losses == {} and waiting.round == 1


def test_updates_go_on_after_a_rollback():
    optimizer = two_levels(steps=1, on_nonfinite="rollback")
    whole, calls = optimizer.problems["x"].loss, []

    def lost_once(x, batch, *, w):
        calls.append(None)
        return whole(x, batch, w=w) * (float("nan") if len(calls) == 5 else 1.0)

    # (The first update evaluates it twice, see `Evaluation.check_stand_ins`.)
    optimizer.problems["x"].loss = lost_once
    seen = list(optimizer.updates(rounds=4))
    assert optimizer.round == 4
    assert [u.round for u in seen if u.ends_round] == [1, 2, 3, 1, 2, 3, 4]
    causes = [u.record.rolled_back for u in seen if u.ends_round]
    assert [cause is not None for cause in causes] == [False] * 3 + [True] + [False] * 3


# ------------------------------ hooks


@pytest.mark.parametrize("who", ["lower", "upper"])
def test_an_update_whose_last_hook_fails_is_made(who):
    """The round goes on behind an update that Ctrl-C ends in `after_update`."""
    calls = [0]

    def interrupt(problem):
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    interrupted = two_levels(**{who: {"after_update": interrupt}})
    # The lower problem makes two steps in a round; the upper one's second step ends round 2.
    if who == "upper":
        interrupted.step()
    with pytest.raises(KeyboardInterrupt):
        interrupted.step()
    assert interrupted.round == (0 if who == "lower" else 2)
    interrupted.step()
    whole = two_levels()
    list(whole.run(interrupted.round))
    assert identical(interrupted.state_dict(), whole.state_dict())


@pytest.mark.parametrize("engine", ["one_step", "cg"])
@pytest.mark.parametrize("who", ["w", "x"])
@pytest.mark.parametrize("place", ["after", "scheduler", "before"])
def test_an_update_that_fails_after_its_step_is_made_once(who, place, engine):
    """Ctrl-C in a hook after the optimizer's step, or in the schedule behind it."""
    calls = [0]

    def interrupt(*_):
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    def made(hook):
        optimizer = two_levels(engine, steps=1)
        problem = optimizer.problems[who]
        own = problem.optimizers[who]
        if place == "scheduler":
            rest = types.SimpleNamespace(step=hook, state_dict=dict, load_state_dict=dict)
            problem.__dict__["schedulers"] = {who: rest}
        elif place == "after":
            own.register_step_post_hook(hook)
        else:
            own.register_step_pre_hook(hook)
        return optimizer

    interrupted = made(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(interrupted.run(2))
    while interrupted.round < 3:
        interrupted.step()
    assert interrupted._history.updates == {"w": 3, "x": 3}
    if place != "before":  # which has taken a batch for nothing
        state = interrupted.state_dict()
        whole = made(lambda *_: None)
        list(whole.run(3))
        assert identical(state, whole.state_dict())


@pytest.mark.parametrize("steps", [1, 3])
def test_a_rate_set_before_a_step_is_in_its_derivative(steps):
    """As a warm-up of the learning rate is often written."""

    def solution(x):
        def rate(problem):
            made[0] += 1
            problem.optimizers["w"].param_groups[0]["lr"] = 0.1 * made[0]

        made = [0]
        engine = {"name": "unroll", "steps": steps}
        optimizer = two_levels(engine, lower={"before_update": rate}, steps=steps)
        with torch.no_grad():
            optimizer.problems["x"].module.v.copy_(x)
        for update in optimizer.updates(1):
            if update.problem == "w" and made[0] == steps:
                break
        return optimizer, optimizer.problems["w"].module.v.detach().clone()

    x, step = torch.tensor([0.5, -0.25]).double(), 1e-6
    optimizer, _ = solution(x)
    found = optimizer.gradient("x")["v"]
    loss = optimizer.problems["x"].loss

    def value(x):
        optimizer, _ = solution(x)
        modules = {name: problem.module for name, problem in optimizer.problems.items()}
        return float(loss(modules["x"], None, w=modules["w"]).detach())

    slopes = [(value(x + step * e) - value(x - step * e)) / (2.0 * step) for e in torch.eye(2)]
    assert torch.allclose(found, torch.tensor(slopes).double(), rtol=1e-6)


# ------------------------------ every graph


@pytest.mark.parametrize("make", [diamond, trilevel_quadratic])
def test_the_iterator_equals_rounds_on_every_graph(make):
    states = []
    for drive in (lambda opt: list(opt.run(2)), lambda opt: list(opt.updates(2))):
        optimizer = make().optimizer("one_step")
        drive(optimizer)
        states.append(optimizer.state_dict())
    assert identical(*states)


def test_modules_may_be_changed_between_updates_of_others():
    """A caller may set weights back between updates; the next gradient is of where they are."""
    optimizer = two_levels("cg", steps=1)
    for update in optimizer.updates(rounds=1):
        if update.problem == "w":
            with torch.no_grad():
                optimizer.problems["w"].parameters["v"].zero_()
    assert not optimizer.problems["w"].parameters["v"].any()


# ------------------------------ operators beside the loss and its gradient


class Operators(TorchDispatchMode):
    """Counts the operators that are called from Python: not those of backward passes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        # (The norms of single tensors are read one by one, on the CPU alone.)
        launches = name not in ("detach", "promote_types", "_local_scalar_dense")
        if torch._C._current_graph_task_id() == -1 and launches:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operators_of_a_round(parameters, *, engine, **options):
    """Operators of a round of two problems, of which the lower one has so many parameters."""
    torch.manual_seed(0)
    w = torch.nn.ParameterList(torch.randn(3) for _ in range(parameters))
    x = Vector(torch.ones(3))

    def loss(w, batch, *, x):
        # One operator, however many parameters there are.
        return torch.stack(list(w)).sub(x.v).square().mean() * batch

    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=0.1, momentum=0.9, foreach=True),
        loss=loss,
        data=[torch.tensor(1.0), torch.tensor(2.0)],
        grad_clip=0.1,
        **options,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, w: torch.stack(list(w)).sub(x.v).square().mean(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], engine)
    optimizer.step()  # makes the optimizers' states
    optimizer.step()  # makes what averages keep
    optimizer.step()
    with Operators() as found:
        optimizer.step()
    return found.counts


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("first_order", {"accumulate": 3}),
        ("first_order", {"average": mlo.Ema(decay=0.9)}),
        ("first_order", {"average": "tail"}),
        ({"name": "one_step", "products": "finite_difference"}, {}),
    ],
    ids=["plain", "ema", "tail", "one_step"],
)
def test_many_parameters_take_no_more_operators(engine, options, monkeypatch):
    """Copies, sums, clipping, norm, step and average take as many operators for 40 as for 20."""
    # The response goes through its node here, so that its operators are those of a backward pass.
    monkeypatch.setattr(total_gradient, "_lone_response", lambda *_: None)
    few, many = (operators_of_a_round(n, engine=engine, **options) for n in (20, 40))
    assert many == few


def test_a_kept_gradient_is_not_changed_by_the_step():
    """Nesterov's foreach step adds its momentum to the gradients that it is given."""
    w, x = Vector(torch.ones(3)), Vector(torch.ones(3))
    sgd = torch.optim.SGD(w.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    adam = torch.optim.Adam(x.parameters())
    loss, upper = (lambda w, _, *, x: (w.v * x.v).square().sum()), lambda x, _, *, w: w.v.sum()
    problems = [
        mlo.Problem("w", module=w, optimizer=sgd, loss=loss),
        mlo.Problem("x", module=x, optimizer=adam, loss=upper),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, {"name": "one_step", "keep_graph": True})
    optimizer.step()  # whose step is checked, so that its gradients are copies
    norm = optimizer.step().gradient_norms["w"]
    (kept,) = optimizer._history.stepped["w"].gradient.values()
    assert kept.norm().item() == pytest.approx(norm)


class Closed(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "a closure is needed"


class Failing(torch.optim.lr_scheduler.ExponentialLR):
    def step(self, epoch=None):
        if self.optimizer.state:
            raise KeyError("no such epoch")
        super().step()


@pytest.mark.parametrize("kind", ["optimizer", "scheduler"])
def test_an_error_of_a_step_says_where_it_was_raised(kind):
    module = Vector(torch.ones(2))
    made = (Closed if kind == "optimizer" else torch.optim.Adam)(module.parameters(), lr=0.1)
    problem = mlo.Problem(
        "w",
        module=module,
        optimizer=made,
        scheduler=Failing(made, 0.5) if kind == "scheduler" else None,
        loss=lambda w, batch: (w.v**2).sum(),
    )
    with pytest.raises((AssertionError, KeyError)) as caught:
        mlo.MultilevelOptimizer([problem]).step()
    name = "Closed" if kind == "optimizer" else "Failing"
    (note,) = caught.value.__notes__
    assert note.startswith(f"It was raised in the step of {name} for problem 'w'.")
    assert "`step()`, without arguments" in note
