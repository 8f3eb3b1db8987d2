"""Losses and gradients that are not finite: the step is not made, the term is named, the policy is
followed.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import mlo
from mlo.nonfinite import ROLLBACKS, SKIPS_IN_A_ROW, SNAPSHOT_EVERY


class Net(nn.Module):
    """A weight, and a BatchNorm whose buffers move in the forward pass."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.norm = nn.BatchNorm1d(2, affine=False, dtype=torch.float64)

    def forward(self, x):
        return self.norm(x) @ self.w


def batches(bad=(), size=40):
    """Batches of which those with these indices hold a NaN."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(4, 2, generator=generator, dtype=torch.float64) for _ in range(size)]
    for index in bad:
        made[index][0, 0] = float("nan")
    return made


class Stream:
    """Data that keep their own position."""

    def __init__(self, made):
        self.made, self.position = made, 0

    def __iter__(self):
        while True:
            self.position += 1
            yield self.made[(self.position - 1) % len(self.made)]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def single(data, *, policy="stop", engine="one_step", lr=0.1):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    problem = mlo.Problem(
        "net",
        module=net,
        optimizer=optimizer,
        loss=lambda net, x: (net(x) - 1.0).square().mean(),
        data=data,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.99),
    )
    return mlo.MultilevelOptimizer([problem], engine, on_nonfinite=policy)


def without_position(state):
    """What a refused update must leave as it was: everything but the position in the data and the
    random state.
    """
    state = copy.deepcopy(state)
    del state["random"]
    for problem in state["problems"].values():
        del problem["data"], problem["skips_in_a_row"]
    return state


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_stop_names_problem_round_and_term():
    """Stop names problem, round and term, and has touched nothing."""
    optimizer = single(batches(bad=[3]))
    list(optimizer.run(3))
    before = without_position(optimizer.state_dict())
    with pytest.raises(
        mlo.NonFiniteError, match=r"Round 4, problem 'net': its loss is not finite.*batch holds"
    ) as caught:
        optimizer.step()
    # Buffers too, which the forward pass had moved.
    assert same(without_position(optimizer.state_dict()), before)
    assert (caught.value.problem, caught.value.round, caught.value.term) == ("net", 4, "loss")
    data = caught.value.data
    assert data["nonfinite_batch"] is True
    assert data["nonfinite_tensors"] == []
    assert torch.equal(data["batches"][0].nan_to_num(7.0), batches(bad=[3])[3].nan_to_num(7.0))


def test_the_data_of_the_error_can_be_saved_and_read(tmp_path):
    optimizer = single(batches(bad=[0]))
    with pytest.raises(mlo.NonFiniteError) as caught:
        optimizer.step()
    mlo.save_checkpoint(caught.value.data, tmp_path / "x.pt")
    assert mlo.load_checkpoint(tmp_path / "x.pt")["term"] == "loss"


def test_skip_leaves_the_update_out():
    """The run continues as if the batch had not been there."""
    with_bad, without = (
        single(batches(bad=[3]), policy="skip"),
        single([b for i, b in enumerate(batches()) if i != 3]),
    )
    records = list(with_bad.run(8))
    list(without.run(7))
    assert [sorted(record.skipped) for record in records] == [[], [], [], ["net"], [], [], [], []]
    assert records[3].skipped["net"].term == "loss"
    assert "net" not in records[3].losses
    theirs, ours = (without_position(optimizer.state_dict()) for optimizer in (without, with_bad))
    assert (ours.pop("round"), theirs.pop("round")) == (8, 7)
    assert same(ours, theirs)


def test_skip_stops_after_so_many_in_a_row():
    """Skip stops after so many in a row, but not after as many apart."""
    apart = range(1, 4 * SKIPS_IN_A_ROW, 2)
    list(single(batches(bad=apart), policy="skip").run(4 * SKIPS_IN_A_ROW))
    optimizer = single(batches(bad=range(5, 40)), policy="skip")
    list(optimizer.run(5 + SKIPS_IN_A_ROW))
    with pytest.raises(mlo.NonFiniteError):
        optimizer.step()


def test_the_count_of_skips_survives_a_checkpoint():
    optimizer = single(batches(bad=range(40)), policy="skip")
    list(optimizer.run(SKIPS_IN_A_ROW - 1))
    resumed = single(batches(bad=range(40)), policy="skip")
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step()
    with pytest.raises(mlo.NonFiniteError):
        resumed.step()


def test_rollback_goes_back_to_the_snapshot_with_later_batches():
    optimizer = single(Stream(batches(bad=[3])), policy="rollback")
    records = list(optimizer.run(6))
    # Rounds 1 to 3, the failure, and from the beginning again with batches 4, 5, ...
    assert [record.round for record in records] == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert [record.rolled_back is not None for record in records] == [False] * 3 + [True] + [
        False
    ] * 5
    direct = single(Stream(batches()[4:]))
    list(direct.run(6))
    assert same(without_position(optimizer.state_dict()), without_position(direct.state_dict()))


def test_rollback_is_bounded_from_one_state():
    """Rollback is bounded from one state, and begins to count again at the next."""
    bad = [0, 2, 4]
    list(single(Stream(batches(bad=bad, size=1000)), policy="rollback").run(SNAPSHOT_EVERY))
    with pytest.raises(mlo.NonFiniteError):
        list(
            single(Stream(batches(bad=[*bad, 6], size=1000)), policy="rollback").run(SNAPSHOT_EVERY)
        )
    assert len(bad) == ROLLBACKS
    later = [7 + SNAPSHOT_EVERY, 9 + SNAPSHOT_EVERY]
    records = list(
        single(Stream(batches(bad=[*bad, *later], size=1000)), policy="rollback").run(
            SNAPSHOT_EVERY + 10
        )
    )
    again = [record.round for record in records if record.rolled_back is not None]
    assert again[-1] == SNAPSHOT_EVERY + 1  # from the second snapshot, not from the beginning


def loads_inside(optimizer, state):
    optimizer.load_state_dict(state)


def rolls_back_inside(optimizer, state):
    optimizer.step()
    optimizer.roll_back(state)


def sets_inside(optimizer, _):
    optimizer.on_nonfinite = "skip"
    list(optimizer.run(2))
    next(optimizer.updates(1))
    optimizer.on_nonfinite = "rollback"


@pytest.mark.parametrize("enter", [loads_inside, rolls_back_inside, sets_inside])
def test_rollback_says_that_a_begun_round_has_no_state(enter):
    healthy = [True]

    def pair():
        return mlo.MultilevelOptimizer(
            [
                problem("a", lambda a, _: a.v.square().sum()),
                problem("b", lambda b, _: b.v.square().sum() * (1.0 if healthy[0] else math.nan)),
            ],
            on_nonfinite="rollback",
        )

    first = pair()
    next(first.updates(1))
    optimizer = pair()
    enter(optimizer, first.state_dict())
    healthy[0] = False
    with pytest.raises(mlo.NonFiniteError, match="problem 'b'") as caught:
        optimizer.step()
    assert "no state to return to" in caught.value.__notes__[0]
    # The round is over; the next one begins with a state to which it returns.
    healthy[0] = True
    number = optimizer.step().round
    assert number == optimizer.round
    healthy[0] = False
    with pytest.raises(mlo.NonFiniteError) as caught:
        optimizer.step()
    assert not hasattr(caught.value, "__notes__")
    assert optimizer.round <= number


def test_streams_stay_together_after_a_round_given_up():
    """Streams that go together still do after a round that was given up."""
    seen = {"first": [], "second": []}

    def loss_of(name):
        def loss(net, batch):
            seen[name].append(int(batch))
            return (net.v * (float("nan") if name == "first" and batch == 2 else 1.0)).sum()

        return loss

    def streamed(name):
        module = Vector(1.0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return mlo.Problem(
            name,
            module=module,
            optimizer=optimizer,
            loss=loss_of(name),
            data=Stream(list(range(20))),
        )

    optimizer = mlo.MultilevelOptimizer(
        [streamed("first"), streamed("second")], on_nonfinite="rollback"
    )
    list(optimizer.run(4))
    assert seen["second"] == [0, 1, 3, 4, 5, 6]
    assert seen["first"] == [0, 1, 2, 3, 4, 5, 6]


def test_none_looks_at_nothing():
    optimizer = single(batches(bad=[0]), policy=None)
    optimizer.step()
    assert bool(torch.isnan(optimizer.problems["net"].module.w).all())


def test_an_unknown_policy_gets_advice():
    with pytest.raises(mlo.ConfigurationError, match=r"'rolback'.*Did you mean 'rollback'"):
        single(batches(), policy="rolback")


def test_parameters_that_are_lost_already_are_named():
    optimizer = single(batches())
    with torch.no_grad():
        optimizer.problems["net"].module.w[0] = float("inf")
    with pytest.raises(
        mlo.NonFiniteError, match=r"1 parameters or buffers are not finite already \(net\.w\)"
    ):
        optimizer.step()


class Vector(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.v = nn.Parameter(torch.tensor(values, dtype=torch.float64))


class Poison(torch.autograd.Function):
    """The identity, whose derivative is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def problem(name, loss, *, lr=0.1, players=None, module=None):
    module = module or Vector(1.0, 2.0)
    return mlo.Problem(
        name,
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=lr),
        loss=loss,
        players=players,
    )


def chain(poisoned, engine="one_step"):
    """outer reads middle and inner, middle reads inner: where the poison is decides which term is
    lost.
    """

    def poison(where, x):
        return Poison.apply(x) if where == poisoned else x

    def inner_loss(inner, batch, *, outer):
        return (inner.v - poison("inner", outer.v)).square().sum()

    def middle_loss(middle, batch, *, outer):
        return (middle.v - 2.0 * poison("middle", outer.v)).square().sum()

    def outer_loss(outer, batch, *, inner, middle):
        return (inner.v + middle.v).square().sum() + poison("outer", outer.v).square().sum()

    problems = [
        problem("inner", inner_loss),
        problem("middle", middle_loss),
        problem("outer", outer_loss),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


@pytest.mark.parametrize(
    ("poisoned", "term"),
    [
        ("outer", "direct gradient"),
        ("middle", "implicit term through 'middle'"),
        ("inner", "implicit term through 'inner'"),
    ],
)
@pytest.mark.parametrize("engine", ["one_step", "neumann", "soba"])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_the_term_that_is_lost_is_named(poisoned, term, engine):
    optimizer = chain(poisoned, engine)
    with pytest.raises(mlo.NonFiniteError) as caught:
        optimizer.step()
    assert caught.value.problem == "outer"
    assert caught.value.term == term
    memories = [saved["memory"] for saved in optimizer.state_dict()["problems"].values()]
    assert all(bool(torch.isfinite(kept).all()) for memory in memories for kept in memory.values())


def test_a_players_loss_is_named():
    module = nn.ModuleDict({"a": Vector(1.0), "b": Vector(1.0)})

    def loss(game, batch):
        return {"a": game["a"].v.sum(), "b": game["b"].v.sum() * float("inf")}

    game = problem("game", loss, players={"a": "a", "b": "b"}, module=module)
    with pytest.raises(mlo.NonFiniteError, match="loss of player 'b'"):
        mlo.MultilevelOptimizer([game]).step()


def test_a_norm_that_overflows_is_told_apart():
    """A norm that overflows while the gradient is finite is told apart."""
    big = problem("big", lambda big, batch: (1e200 * big.v).sum())
    with pytest.raises(mlo.NonFiniteError, match="gradient's norm, which overflows, is not finite"):
        mlo.MultilevelOptimizer([big]).step()


def test_diagnosing_draws_no_random_numbers():
    def loss(net, batch):
        return (Poison.apply(net.v) * torch.randn(2, dtype=torch.float64)).sum()

    torch.manual_seed(3)
    torch.randn(2, dtype=torch.float64)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with pytest.raises(mlo.NonFiniteError):
        mlo.MultilevelOptimizer([problem("net", loss)]).step()
    assert torch.equal(torch.rand(1), expected)
