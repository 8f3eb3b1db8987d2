"""Steps by formula against `torch.optim`, and what cannot be learned."""

from __future__ import annotations

import copy

import pytest
import torch

import mlo
from mlo.step_formulas import common_numbers
from mlo.testing import Vector

OPTIONS = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"weight_decay": 0.1, "maximize": True}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True, "betas": (0.5, 0.9), "eps": 1e-3}),
    (torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.SGD, {"momentum": 0.5, "foreach": True}),
]


def problem(kind, options, settings, dtype=torch.float64):
    w = Vector(torch.linspace(-1, 1, 4, dtype=dtype))
    x = torch.linspace(0.5, 2, 4, dtype=dtype)
    declared = mlo.Problem(
        "w",
        module=w,
        optimizer=kind(w.parameters(), lr=0.05, **options),
        loss=lambda w, _: (x * w.v.sin()).sum(),
        **({"settings": settings} if settings else {}),
    )
    return w, declared


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_a_step_by_formula_is_the_optimizers_own(kind, options, dtype):
    plain, one = problem(kind, options, None, dtype)
    learned, other = problem(kind, options, lambda: {"lr": 0.05}, dtype)
    first, second = mlo.MultilevelOptimizer([one]), mlo.MultilevelOptimizer([other])
    for _ in range(7):
        first.step()
        second.step()
    digits = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(learned.v, plain.v, atol=digits, rtol=digits)

    # The state is the optimizer's own: it has the same entries, of the same kinds.
    mine, theirs = (p.optimizers["w"].state_dict() for p in (other, one))
    for index, entries in theirs["state"].items():
        kept = {key: value for key, value in entries.items() if value is not None}
        assert mine["state"][index].keys() == kept.keys()
        for key, value in kept.items():
            torch.testing.assert_close(mine["state"][index][key], value, atol=1e-6, rtol=1e-6)


# (torch.optim has no fused step of a complex parameter.)
@pytest.mark.parametrize(("kind", "options"), [row for row in OPTIONS if "fused" not in row[1]])
def test_a_complex_parameter_moves_as_by_the_optimizer(kind, options):
    def run(settings):
        w = Vector(torch.tensor([1.0 + 0.3j, 0.5 - 1.0j, -2.0 + 0.1j]).to(torch.complex128))
        declared = mlo.Problem(
            "w",
            module=w,
            optimizer=kind(w.parameters(), lr=0.05, **options),
            loss=lambda w, _: (w.v - 1.0j).abs().pow(4).sum() + w.v.real.sum(),
            **settings,
        )
        optimizer = mlo.MultilevelOptimizer([declared])
        for _ in range(5):
            optimizer.step()
        return w.v.detach(), declared.optimizers["w"].state_dict()["state"]

    plain, entries = run({})
    for rate in (0.05, torch.full((3,), 0.05, dtype=torch.float64)):
        learned, mine = run({"settings": lambda rate=rate: {"lr": rate}})
        torch.testing.assert_close(learned, plain, atol=1e-14, rtol=1e-14)
        for index, state in entries.items():
            for key, value in state.items():
                if value is not None:
                    torch.testing.assert_close(mine[index][key], value, atol=1e-6, rtol=1e-6)


def test_plain_torch_loads_the_state():
    learned, declared = problem(torch.optim.AdamW, {}, lambda: {"lr": 0.02, "betas": (0.8, 0.99)})
    optimizer = mlo.MultilevelOptimizer([declared])
    for _ in range(3):
        optimizer.step()
    w = Vector(learned.v.detach().clone())
    plain = torch.optim.AdamW(w.parameters())
    plain.load_state_dict(copy.deepcopy(declared.optimizers["w"].state_dict()))
    assert plain.param_groups[0]["lr"] == 0.02
    assert plain.param_groups[0]["betas"] == (0.8, 0.99)
    x = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    for _ in range(3):
        plain.zero_grad()
        (x * w.v.sin()).sum().backward()
        plain.step()
        optimizer.step()
    torch.testing.assert_close(learned.v, w.v, atol=1e-14, rtol=0)


def test_each_parameter_may_have_a_tensor_of_its_shape():
    rates = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    w, declared = problem(torch.optim.SGD, {}, lambda: {"lr": {"v": rates}})
    before = w.v.detach().clone()
    gradient = torch.linspace(0.5, 2, 4, dtype=torch.float64) * before.cos()
    mlo.MultilevelOptimizer([declared]).step()
    torch.testing.assert_close(w.v.detach(), before - rates * gradient)
    assert declared.optimizers["w"].param_groups[0]["lr"] == 0.05  # no number says it


@pytest.mark.parametrize("shapes", [((3, 4), (3,)), ((4,), (4,))])
def test_several_parameters_may_have_tensors_of_their_shapes(shapes):
    module = torch.nn.ParameterList([torch.ones(shape) for shape in shapes])
    rates = {str(k): torch.full(shape, 0.5 + k) for k, shape in enumerate(shapes)}
    declared = mlo.Problem(
        "w",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        loss=lambda w, _: w[0].sum() + w[1].sum(),
        settings=lambda: {"lr": rates},
    )
    mlo.MultilevelOptimizer([declared]).step()
    for k, parameter in enumerate(module):
        assert torch.equal(parameter, 0.5 - k * torch.ones(shapes[k]))


def test_a_group_shows_the_numbers_that_its_parameters_share():
    half = torch.tensor(0.5)
    one = {"lr": half, "betas": (half, 0.9), "eps": 1.0, "weight_decay": torch.ones(2)}
    other = {"lr": 0.5, "betas": (0.5, 0.9), "eps": 2.0, "weight_decay": torch.ones(3)}
    assert common_numbers([one, other]) == {"lr": 0.5, "betas": (0.5, 0.9)}
    assert common_numbers([one, {}]) == {}
    assert common_numbers([]) == {}


def test_unnamed_parameters_keep_their_setting():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    module = torch.nn.ParameterDict({"a": a, "b": b})
    declared = mlo.Problem(
        "w",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
        loss=lambda w, _: w["a"].sum() + w["b"].sum(),
        settings=lambda: {"lr": {"a": 0.25}},
    )
    mlo.MultilevelOptimizer([declared]).step()
    assert a.tolist() == [0.75] * 2
    assert b.tolist() == [0.5] * 2


def test_a_parameter_without_a_gradient_stays():
    """As in torch.optim, decay and momentum included."""
    module = torch.nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)})
    declared = mlo.Problem(
        "w",
        module=module,
        optimizer=torch.optim.Adam(module.parameters(), weight_decay=1.0),
        loss=lambda w, _: w["a"].sum(),
        settings=lambda: {"lr": 0.1},
    )
    mlo.MultilevelOptimizer([declared]).step()
    assert module["b"].tolist() == [1.0, 1.0]
    assert module["b"] not in declared.optimizers["w"].state


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.1, "must return a dict"),
        ({"lrr": 0.1}, "'lrr', which its optimizer does not learn. .*'lr'"),
        ({"betas": (0.9, 0.99)}, "'betas', which its optimizer does not learn"),
        ({"lr": {"u": 0.1}}, "for the parameter 'u'"),
        ({"lr": torch.ones(3)}, r"a tensor of its shape \(4,\), got a tensor of shape \(3,\)"),
        ({"lr": "fast"}, "must be a number"),
        ({"lr": True}, "must be a number"),
        ({"lr": -0.1}, "is -0.1; it must be finite, not negative"),
        ({"lr": float("nan")}, "is nan; it must be finite"),
        ({"lr": torch.tensor([0.1, 0.1, -0.2, 0.1])}, "is -0.2"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(returned, message):
    w, declared = problem(torch.optim.SGD, {}, lambda: returned)
    with pytest.raises(mlo.ProblemError, match=message):
        mlo.MultilevelOptimizer([declared]).step()
    assert torch.equal(w.v, torch.linspace(-1, 1, 4, dtype=torch.float64))


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 1.0), torch.tensor([0.9, 0.9, 0.9])])
def test_betas_are_a_pair_below_one(betas):
    _, declared = problem(torch.optim.Adam, {}, lambda: {"betas": betas})
    with pytest.raises(mlo.ProblemError, match="betas"):
        mlo.MultilevelOptimizer([declared]).step()


def test_an_optimizer_without_a_formula_is_refused():
    w = Vector(torch.zeros(2))
    with pytest.raises(mlo.ProblemError, match="got RMSprop"):
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.RMSprop(w.parameters()),
            loss=lambda w, _: w.v.sum(),
            settings=lambda: {"lr": 0.1},
        )


def test_settings_that_fail_leave_the_buffers():
    module = torch.nn.BatchNorm1d(3)
    declared = mlo.Problem(
        "w",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        loss=lambda w, x: w(x).square().mean(),
        data=[torch.randn(5, 3, generator=torch.Generator().manual_seed(0))],
        settings=lambda: {"lr": -1.0},
    )
    with pytest.raises(mlo.ProblemError, match="not negative"):
        mlo.MultilevelOptimizer([declared]).step()
    assert module.running_mean.tolist() == [0.0] * 3
    assert int(module.num_batches_tracked) == 0


def test_a_scheduler_may_set_something_else():
    w = Vector(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD(w.parameters(), lr=0.5)
    declared = mlo.Problem(
        "w",
        module=w,
        optimizer=optimizer,
        loss=lambda w, _: w.v.sum(),
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1),
        settings=lambda: {"weight_decay": 1.0},
    )
    steps = mlo.MultilevelOptimizer([declared])
    steps.step()
    steps.step()
    # 1 − 0.5 (1 + 1) = 0, then 0 − 0.05 (1 + 0)
    torch.testing.assert_close(w.v.detach(), torch.tensor([-0.05], dtype=torch.float64))


def test_settings_may_depend_on_the_number_of_steps_made():
    seen = []

    def settings(made):
        seen.append(made)
        return {"lr": [0.5, 0.25][made % 2]}

    w = Vector(torch.zeros(1))
    declared = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=1.0),
        loss=lambda w, _: w.v.sum(),
        settings=settings,
    )
    optimizer = mlo.MultilevelOptimizer([declared])
    for _ in range(3):
        optimizer.step()
    assert w.v.item() == -1.25
    assert seen == [0, 1, 2]
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.step()
    assert seen[-1] == 3


def test_settings_with_two_positional_arguments_are_refused():
    with pytest.raises(mlo.ProblemError, match=r"called as settings\(made, \*, other"):
        problem(torch.optim.SGD, {}, lambda made, batch: {"lr": 0.1})


def test_settings_that_parameters_share_are_numbers_of_the_group():
    matrix, row = torch.ones(2, 3), torch.ones(3)
    pair = (0.9, torch.tensor(0.5))
    shared = {"lr": torch.tensor(0.25), "betas": pair, "eps": 1e-8}
    settings = [{**shared, "weight_decay": matrix}, {**shared, "weight_decay": row, "eps": 1e-7}]
    assert common_numbers(settings) == {"lr": 0.25, "betas": (0.9, 0.5)}
    assert common_numbers([{"lr": 0.25}, {}]) == {}
    assert common_numbers([]) == {}
