"""`once`: what several evaluations of a loss share."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mlo
from mlo.testing import relative_error


class Net(nn.Module):
    """One layer with dropout, which draws random numbers after the shared part did."""

    def __init__(self, width=5):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return nn.functional.dropout(torch.tanh(self.layer(x)), 0.3)


def searched(shared, engine, *, precision=None, dtype=torch.float64, parallel=None, accumulate=1):
    """low → mid → up, where mid's loss calls `low`, noise included, by `shared`; and how often it
    called it.
    """
    torch.manual_seed(0)
    modules = {name: Net().to(dtype) for name in ("low", "mid", "up")}
    calls = [0]
    batches = [torch.randn(4, 5, dtype=dtype) for _ in range(3)]

    def low_loss(low, x, *, up):
        return (low(x) * up(x)).square().mean()

    def part(low, x):
        calls[0] += 1
        return {"noisy": low(x + torch.randn_like(x)), "steady": torch.ones(5, dtype=dtype)}

    def mid_loss(mid, x, *, low, up):
        seen = shared(up, x)
        found = shared(part, low, x + seen)
        found["steady"].mul_(2)  # what a loss got is its own
        return (mid(x + found["noisy"] * seen) * found["steady"] + up(x)).square().mean()

    def up_loss(up, x, *, mid):
        return (mid(x) - up(x)).square().mean()

    problems = [
        mlo.Problem(
            name,
            module=module,
            loss=loss,
            data=batches,
            optimizer=SGD(module.parameters(), lr=0.1, momentum=0.9),
            precision=precision,
            accumulate=accumulate,
        )
        for (name, module), loss in zip(modules.items(), (low_loss, mid_loss, up_loss), strict=True)
    ]
    optimizer = mlo.MultilevelOptimizer(problems, {"low": "one_step", "mid": engine})
    for _ in range(4):  # the pull-backs 1, 2 and 4 evaluate losses once more
        optimizer.step()
    calls[0] = 0
    return (
        optimizer.gradient("up"),
        calls[0],
        [p.detach() for module in modules.values() for p in module.parameters()],
    )


def plain(function, *args):
    return function(*args)


@pytest.mark.filterwarnings("ignore:.*solves with finite differences")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "engine",
    [
        "darts",
        {
            "name": "neumann",
            "num_terms": 2,
            "step_size": 0.1,
            "tol": 10.0,
            "products": "finite_difference",
        },
    ],
)
def test_a_part_that_is_called_once_gives_the_same_gradients(engine, accumulate):
    expected, plain_calls, expected_weights = searched(plain, engine, accumulate=accumulate)
    found, shared_calls, weights = searched(mlo.once, engine, accumulate=accumulate)
    assert relative_error(found, expected) < 1e-8
    assert relative_error(dict(enumerate(weights)), dict(enumerate(expected_weights))) < 1e-8
    assert 2 * shared_calls == plain_calls


def test_exact_products_call_it_as_often_as_they_did():
    expected, plain_calls, _ = searched(plain, "one_step")
    found, calls, _ = searched(mlo.once, "one_step")
    assert calls == plain_calls
    assert relative_error(found, expected) == 0.0


def test_parts_in_sixteen_bits_are_differentiated():
    exact, _, _ = searched(plain, "one_step", precision="bf16", dtype=torch.float32)
    found, _, _ = searched(mlo.once, "darts", precision="bf16", dtype=torch.float32)
    assert relative_error(found, exact) < 0.02  # 0.005 here, and 0.006 where nothing is shared


def test_outside_of_an_evaluation_it_is_the_call_itself():
    assert mlo.once(torch.add, torch.ones(()), 2, alpha=3) == 7.0


def test_a_part_of_the_problems_own_parameters_is_refused():
    """A part that depends on the problem's own parameters is refused."""
    net, up = Net().double(), Net().double()

    def net_loss(net, x, *, up):
        return (mlo.once(net, x) * up(x)).square().mean()

    problems = [
        mlo.Problem(
            "net",
            module=net,
            loss=net_loss,
            data=[torch.ones(2, 5).double()],
            optimizer=SGD(net.parameters(), lr=0.1),
        ),
        mlo.Problem(
            "up",
            module=up,
            loss=lambda up, x, *, net: net(x).square().mean(),
            data=[torch.ones(2, 5).double()],
            optimizer=SGD(up.parameters(), lr=0.1),
        ),
    ]
    with pytest.raises(
        mlo.ProblemError, match=r"calls mlo\.once on something that depends on the problem's own"
    ):
        mlo.MultilevelOptimizer(problems, "darts").step()


def test_a_part_of_what_was_differentiated_is_refused():
    """A part that is made of what was differentiated already says what to do."""

    def mid_loss(mid, x, *, low, up):
        seen = up(x).square()
        return (mid(x) * mlo.once(low, x * seen) * seen).square().mean()

    modules = {name: nn.Linear(3, 3).double() for name in ("low", "mid", "up")}
    losses = (
        lambda low, x: low(x).square().mean(),
        mid_loss,
        lambda up, x, *, mid: (mid(x) - up(x)).square().mean(),
    )
    problems = [
        mlo.Problem(
            n,
            module=m,
            loss=loss,
            data=[torch.ones(2, 3).double()],
            optimizer=SGD(m.parameters(), lr=0.1),
        )
        for (n, m), loss in zip(modules.items(), losses, strict=True)
    ]
    with pytest.raises(mlo.ProblemError, match=r"Compute that with mlo\.once as well"):
        mlo.MultilevelOptimizer(problems, "darts").step()
