"""`after_step` and `settings` against plain autograd through the algorithm written out."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import mlo
from mlo import constraints
from mlo.testing import Vector

GENERATOR = torch.Generator().manual_seed(0)
X, Y, XV, YV = (
    torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)
    for shape in ((20, 4), (20,), (15, 4), (15,))
)
START = torch.tensor([0.5, -0.2, 0.3, 0.05], dtype=torch.float64)
VALUES = {"lam": -4.0, "lr": -2.5, "decay": -3.0, "momentum": 0.3, "first": 1.0, "second": 2.0}


def train(w, hyper):
    return (X @ w - Y).square().mean() * hyper["decay"].cos()


def validate(w):
    return (XV @ w - YV).square().mean()


def hyper_module():
    return nn.ParameterDict({k: torch.tensor(v, dtype=torch.float64) for k, v in VALUES.items()})


def settings_of(kind):
    def settings(*, hyper):
        found = {"lr": hyper["lr"].exp(), "weight_decay": hyper["decay"].exp()}
        if kind == "SGD":
            return found | {"momentum": hyper["momentum"].sigmoid()}
        return found | {"betas": (hyper["first"].sigmoid(), hyper["second"].sigmoid())}

    return settings


def shrink(parameters, *, hyper):
    return {"v": constraints.soft_threshold(parameters["v"], hyper["lam"].exp())}


OPTIONS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.1, "weight_decay": 0.1},
    "AdamW": {"lr": 0.1, "weight_decay": 0.1},
}
AROUND = {"both": (True, True), "after_step": (True, False), "settings": (False, True)}


def make(kind, engine, around, *, steps=1, clip=None, **options):
    has_after, has_settings = AROUND[around]
    w, hyper = Vector(START.clone()), hyper_module()
    more = {}
    if has_after:
        more["after_step"] = shrink
    if has_settings:
        more["settings"] = settings_of(kind)
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=getattr(torch.optim, kind)(w.parameters(), **OPTIONS[kind]),
        loss=lambda w, _, *, hyper: train(w.v, hyper),
        steps=steps,
        grad_clip=clip,
        **more,
    )
    upper = mlo.Problem(
        "hyper",
        module=hyper,
        optimizer=torch.optim.SGD(hyper.parameters(), lr=0.0),
        loss=lambda hyper, _, *, w: validate(w.v),
    )
    return w, hyper, mlo.MultilevelOptimizer([lower, upper], engine, **options)


def naive_step(kind, w, g, state, t, hyper, around, clip=None):
    """One step written out; returns w and the state after it."""
    has_after, has_settings = AROUND[around]
    lr, decay, momentum, first, second = 0.1, 0.1, 0.9, 0.9, 0.999
    if has_settings:
        lr, decay = hyper["lr"].exp(), hyper["decay"].exp()
        momentum = hyper["momentum"].sigmoid()
        first, second = hyper["first"].sigmoid(), hyper["second"].sigmoid()
    if clip is not None:
        g = g * torch.clamp(clip / (g.norm() + 1e-6), max=1.0)
    if kind == "SGD":
        g = g + decay * w
        buffer = g if t == 1 else momentum * state[0] + g
        w, state = w - lr * buffer, (buffer,)
    else:
        if kind == "AdamW":
            w = w * (1 - lr * decay)
        else:
            g = g + decay * w
        m, v = state if t > 1 else (torch.zeros_like(w),) * 2
        m, v = first * m + (1 - first) * g, second * v + (1 - second) * g * g
        root = (v / (1 - second**t)).sqrt() + 1e-8
        w, state = w - lr * m / (1 - first**t) / root, (m, v)
    if has_after:
        threshold = hyper["lam"].exp()
        w = w.sign() * (w.abs() - threshold).clamp(min=0.0)
    return w, state


def naive(kind, around, steps, kept, clip=None):
    """The gradient through the last `kept` of `steps` steps; those before are constants."""
    hyper = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in VALUES.items()}
    fixed = {k: t.detach() for k, t in hyper.items()}
    w, state = START.clone(), ()
    for t in range(1, steps + 1):
        exact = t > steps - kept
        at = hyper if exact else fixed
        w = w if w.requires_grad else w.detach().requires_grad_()
        (g,) = torch.autograd.grad(train(w, at), w, create_graph=exact)
        w, state = naive_step(kind, w if exact else w.detach(), g, state, t, at, around, clip)
        if not exact or t == steps - kept:
            w, state = w.detach(), tuple(entry.detach() for entry in state)
    found = torch.autograd.grad(validate(w), list(hyper.values()), allow_unused=True)
    zero = torch.zeros((), dtype=torch.float64)
    return w, {k: zero if g is None else g for k, g in zip(hyper, found, strict=True)}


def assert_equal(found, expected, tolerance=1e-12):
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", OPTIONS)
def test_unroll_differentiates_whole_steps(kind, around):
    w, _, optimizer = make(kind, mlo.Unroll(steps=5), around, steps=5)
    optimizer.step()
    expected_w, expected = naive(kind, around, 5, 5)
    torch.testing.assert_close(w.v.detach(), expected_w.detach(), atol=1e-14, rtol=0)
    assert_equal(optimizer.gradient("hyper"), expected)


ENGINES = {
    "one_step": ({"name": "one_step", "keep_graph": False}, 1e-12),
    "kept graph": ({"name": "one_step", "keep_graph": True}, 1e-12),
    "darts": ("darts", 1e-9),
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("order", ["lower_first", "outermost_first"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", OPTIONS)
def test_one_step_differentiates_the_whole_step(kind, around, engine, order, clip):
    choice, tolerance = ENGINES[engine]
    _, _, optimizer = make(kind, choice, around, clip=clip, order=order)
    for _ in range(2 if order == "outermost_first" else 3):
        optimizer.step()
    # The third step: made, or one step ahead.
    _, expected = naive(kind, around, 3, 1, clip)
    found = optimizer.gradient("hyper")
    scale = max(float(value.abs()) for value in expected.values())
    assert_equal(found, expected, tolerance * max(1.0, scale))


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_zeroth_order_repeats_whole_steps(kind, around):
    """In all directions of what is read it is a central difference, of the same steps."""
    zeroth = mlo.ZerothOrder(steps=2, samples=len(VALUES))
    (_, exact, optimizer), (_, _, estimated) = (
        make(kind, engine, around, steps=2) for engine in (mlo.Unroll(steps=2), zeroth)
    )
    optimizer.step()
    estimated.step()
    expected, found = (o.gradient("hyper") for o in (optimizer, estimated))
    for name in exact:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_the_update_itself_is_made_with_this_gradient():
    _, hyper, optimizer = make("Adam", "one_step", "both")
    optimizer.problems["hyper"].optimizers["hyper"].param_groups[0]["lr"] = 0.5
    optimizer.step()
    _, expected = naive("Adam", "both", 1, 1)
    for name, value in VALUES.items():
        torch.testing.assert_close(hyper[name].detach(), value - 0.5 * expected[name])


# ------------------------------ deeper graphs and games


def three_levels(engine):
    """x above m above w: w's rate comes from m, its threshold from x; m stays in a box of x."""
    w, m, x = (Vector(torch.tensor(t, dtype=torch.float64)) for t in ([0.8, -0.6], [0.3], [0.7]))
    lowest = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=1.0, momentum=0.5),
        loss=lambda w, _, *, m: (w.v**4).sum() / 4 + (w.v * m.v.sin()).sum(),
        settings=lambda *, m: {"lr": 0.1 * m.v.exp()},
        after_step=lambda p, *, x: {"v": constraints.soft_threshold(p["v"], 0.05 * x.v)},
    )
    middle = mlo.Problem(
        "m",
        module=m,
        optimizer=torch.optim.Adam(m.parameters(), lr=0.2),
        loss=lambda m, _, *, w, x: (w.v**3).sum() + (m.v * x.v).cosh().sum(),
        after_step=lambda p, *, x: {"v": constraints.l2_ball(p["v"], 0.3 * x.v)},
        settings=lambda *, x: {"lr": 0.2 * x.v.exp()},
    )
    top = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, m, w: (m.v.sin() * w.v.exp()).sum() + 0.1 * (x.v**2).sum(),
    )
    return mlo.MultilevelOptimizer([lowest, middle, top], engine)


def test_projected_responses_are_differentiated_twice():
    """Looking one step ahead from a fresh state: the nested program in plain autograd."""
    x = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    m = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def step_w(m):
        w = torch.tensor([0.8, -0.6], dtype=torch.float64, requires_grad=True)
        loss = (w**4).sum() / 4 + (w * m.sin()).sum()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        w = w - 0.1 * m.exp() * g
        return w.sign() * (w.abs() - 0.05 * x).clamp(min=0.0)

    (g,) = torch.autograd.grad((step_w(m) ** 3).sum() + (m * x).cosh().sum(), m, create_graph=True)
    moved = m.detach() - 0.2 * x.exp() * g / (g.abs() + 1e-8)
    moved = torch.where(moved.abs() > 0.3 * x, 0.3 * x * moved.sign(), moved)
    # The top sees w's response at the value that m has now, with the derivative of m's response.
    now = m.detach() + moved - moved.detach()
    loss = (moved.sin() * step_w(now).exp()).sum() + 0.1 * (x**2).sum()
    (expected,) = torch.autograd.grad(loss, x)

    found = three_levels("one_step").gradient("x")["v"]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Vector(torch.tensor([0.5, -1.0], dtype=torch.float64))
        self.b = Vector(torch.tensor([1.5, 0.4], dtype=torch.float64))


def test_a_games_joint_step_is_projected():
    """Both players move simultaneously, then `after_step` couples them."""
    pair, x = Pair(), Vector(torch.tensor([0.3, 0.9], dtype=torch.float64))

    def losses(a, b, x):
        return {"a": (a * b * x).sum() + (a**4).sum(), "b": -(a * b).sum() + (b * x).cosh().sum()}

    def couple(p, *, x):
        radius = x.v.norm() / 4 + p["b.v"].square().sum() / 10
        return {"a.v": constraints.l2_ball(p["a.v"], radius)}

    game = mlo.Problem(
        "game",
        module=pair,
        optimizer=torch.optim.SGD(pair.parameters(), lr=0.1),
        players={"a": "a", "b": "b"},
        loss=lambda pair, _, *, x: losses(pair.a.v, pair.b.v, x.v),
        after_step=couple,
    )
    top = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, game: (game.a.v.exp() * x.v).sum() + 0 * game.b.v.sum(),
    )
    optimizer = mlo.MultilevelOptimizer([game, top], "one_step")
    point = x.v.detach().clone().requires_grad_()
    a, b = (t.v.detach().clone().requires_grad_() for t in (pair.a, pair.b))
    found = losses(a, b, point)
    (ga,) = torch.autograd.grad(found["a"], a, create_graph=True)
    (gb,) = torch.autograd.grad(found["b"], b, create_graph=True)
    new_a, new_b = a.detach() - 0.1 * ga, b.detach() - 0.1 * gb
    radius = point.norm() / 4 + new_b.square().sum() / 10
    new_a = new_a * torch.clamp(radius / new_a.norm(), max=1.0)
    assert float(new_a.norm().detach()) == pytest.approx(float(radius.detach()))
    (expected,) = torch.autograd.grad((new_a.exp() * point).sum(), point)

    torch.testing.assert_close(optimizer.gradient("x")["v"], expected, atol=1e-12, rtol=0)
    optimizer.step()
    torch.testing.assert_close(pair.a.v.detach(), new_a.detach(), atol=1e-14, rtol=0)
    torch.testing.assert_close(optimizer.gradient("x")["v"], expected, atol=1e-12, rtol=0)


def test_after_step_may_read_a_lower_solution():
    """The gradient then goes through that solution too."""
    low, w, x = (
        Vector(torch.tensor(t, dtype=torch.float64)) for t in ([0.4, 0.2], [1.0, -2.0], [0.5, 0.6])
    )
    problems = [
        mlo.Problem(
            "low",
            module=low,
            optimizer=torch.optim.SGD(low.parameters(), lr=0.1),
            loss=lambda low, _, *, x: (low.v - x.v.exp()).square().sum(),
        ),
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=0.1),
            loss=lambda w, _: (w.v**2).sum(),
            after_step=lambda p, *, low: {"v": constraints.box(p["v"], -low.v, low.v)},
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
            loss=lambda x, _, *, w: (w.v**2).sum(),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, "one_step")
    assert optimizer.graph.reads_below["w"] == ("low",)
    point = x.v.detach().clone().requires_grad_()
    start = torch.tensor([0.4, 0.2], dtype=torch.float64)
    solution = start - 0.2 * (start - point.exp())
    moved = torch.tensor([0.8, -1.6], dtype=torch.float64)
    (expected,) = torch.autograd.grad(
        torch.minimum(torch.maximum(moved, -solution), solution).square().sum(), point
    )
    torch.testing.assert_close(optimizer.gradient("x")["v"], expected, atol=1e-12, rtol=0)


def test_weights_of_examples_stay_on_the_simplex():
    """An upper variable: projected gradient descent on the closed form, over 15 rounds."""
    x, y, xv, yv = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        for k, shape in enumerate(((40, 3), (40,), (30, 3), (30,)))
    )
    w, a = Vector(torch.zeros(3).double()), Vector(torch.full((40,), 1 / 40).double())
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=0.3),
        loss=lambda w, _, *, a: (a.v * (x @ w.v - y) ** 2).sum() + 0.1 * (w.v**2).sum(),
        steps=300,
    )
    upper = mlo.Problem(
        "a",
        module=a,
        optimizer=torch.optim.SGD(a.parameters(), lr=0.05),
        loss=lambda a, _, *, w: ((xv @ w.v - yv) ** 2).mean(),
        after_step=constraints.simplex,
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], {"name": "cg", "tol": 1e-12})
    expected = torch.full((40,), 1 / 40).double()
    for _ in range(5):
        optimizer.step()
        at = expected.requires_grad_()
        best = torch.linalg.solve((x.T * at) @ x + 0.1 * torch.eye(3), (x.T * at) @ y)
        (g,) = torch.autograd.grad(((xv @ best - yv) ** 2).mean(), at)
        expected = constraints.simplex((at - 0.05 * g).detach())
    torch.testing.assert_close(a.v.detach(), expected, atol=1e-8, rtol=0)
    assert int((expected == 0).sum()) > 0


# ------------------------------ state, and what is refused


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_run_resumes_bit_for_bit(kind):
    def run():
        w, hyper, optimizer = make(kind, mlo.Unroll(steps=2), "both", steps=2)
        optimizer.problems["hyper"].optimizers["hyper"].param_groups[0]["lr"] = 0.1
        return w, hyper, optimizer

    w, hyper, optimizer = run()
    for _ in range(3):
        optimizer.step()
    state = optimizer.state_dict()
    for _ in range(3):
        optimizer.step()
    other_w, other_hyper, resumed = run()
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.step()
    assert torch.equal(w.v, other_w.v)
    assert all(torch.equal(hyper[name], other_hyper[name]) for name in VALUES)


def refused(after_step, message, *, engine="one_step"):
    w, x = Vector(torch.tensor([0.5, -0.5])), Vector(torch.tensor([0.1]))
    with pytest.raises((mlo.ProblemError, mlo.GraphError, mlo.EngineError), match=message):
        projected(w, x, after_step, engine).step()


def projected(w, x, after_step, engine="one_step", **more):
    """w projected, below x."""
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=0.1),
        loss=lambda w, _, *, x: (w.v * x.v).sum() + (w.v**2).sum(),
        after_step=after_step,
        **more,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, w: (w.v**2).sum(),
    )
    return mlo.MultilevelOptimizer([lower, upper], engine)


def clamp_without_gradient(p):
    with torch.no_grad():
        return {"v": p["v"].clamp(min=0.0)}


def clamp_in_place_without_gradient(p):
    with torch.no_grad():
        p["v"].clamp_(min=0.0)
    return p


def test_a_detached_projection_is_refused():
    refused(clamp_without_gradient, "derivative of its after_step is off")
    refused(clamp_in_place_without_gradient, "derivative of its after_step is off")
    refused(lambda p: {"v": p["v"].data.clamp(min=0.0)}, "derivative of its after_step is off")


def test_a_random_projection_is_refused():
    refused(
        lambda p: {"v": p["v"] + torch.rand(2)}, "(different value|derivative of its after_step)"
    )


@pytest.mark.parametrize("engine", ["one_step", mlo.Unroll(steps=2)])
def test_settings_that_count_their_calls_are_refused(engine):
    calls = []

    def settings(*, x):
        calls.append(0)
        return {"lr": x.v.exp() * 0.5 ** len(calls)}

    w, x = Vector(torch.tensor([0.5, -0.5])), Vector(torch.tensor([0.1]))
    with pytest.raises(mlo.ProblemError, match="settings gives 'v' a different value"):
        projected(w, x, None, engine, settings=settings).step()


def test_symmetric_engines_refuse_a_read_of_own_responses():
    """Of a bound that follows w, cg's solve on the free variables would be another one."""
    z, w, x = (Vector(torch.tensor([value])) for value in (0.1, 0.2, 0.3))
    problems = []
    for name, module, loss, more in (
        ("z", z, lambda z, _, *, w: ((z.v - w.v) ** 2).sum(), {}),
        (
            "w",
            w,
            lambda w, _, *, z, x: ((w.v - x.v * z.v) ** 2).sum(),
            {"after_step": lambda p, *, z: constraints.box(p, -1.0, z.v.sum())},
        ),
        ("x", x, lambda x, _, *, w: (w.v**2).sum(), {}),
    ):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        problems.append(mlo.Problem(name, module=module, optimizer=optimizer, loss=loss, **more))
    with pytest.raises(mlo.EngineError, match="So the system that 'cg' solves is not symmetric"):
        mlo.MultilevelOptimizer(problems, {"z": "direct", "w": "cg"})
    mlo.MultilevelOptimizer(problems, {"z": "direct", "w": "gmres"})


def test_players_that_rest_are_given_and_stay():
    class Game(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Vector(torch.tensor([0.8, 0.8])), Vector(torch.tensor([0.5, 0.5]))

    game, given = Game(), []

    def simplexes(p):
        given.append({key: round(float(t.sum()), 6) for key, t in p.items()})
        return constraints.simplex(p)

    declared = mlo.Problem(
        "game",
        module=game,
        optimizer=torch.optim.SGD(game.parameters(), lr=0.0),
        loss=lambda m, _: {"one": m.a.v @ m.b.v, "two": -(m.a.v @ m.b.v)},
        players={"one": "a", "two": "b"},
        player_steps={"two": 2},
        after_step=simplexes,
    )
    mlo.MultilevelOptimizer([declared]).step()
    # One rests in the first move, so it is projected after the second.
    assert given == [{"a.v": 1.6, "b.v": 1.0}] * 2
    assert game.a.v.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("engine", ["one_step", "unroll"])
def test_a_threshold_may_follow_a_schedule(engine):
    """By the number of steps made before; a default of the second argument is left alone."""
    seen = []

    def shrink(parameters, made, *, x):
        seen.append(made)
        return {"v": constraints.soft_threshold(parameters["v"], 0.1 * x.v.exp() / (1 + made))}

    w, x = Vector(torch.tensor([0.9, -0.8]).double()), Vector(torch.tensor([0.1]).double())
    optimizer = projected(w, x, shrink, mlo.Unroll(steps=2) if engine == "unroll" else engine)
    optimizer.problems["x"].optimizers["x"].param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.step()
    point = x.v.detach().clone().requires_grad_()
    at = torch.tensor([0.9, -0.8]).double()
    for made in range(2):
        at = at if engine == "unroll" else at.detach()
        at = at - 0.1 * (point + 2 * at)
        at = constraints.soft_threshold(at, 0.1 * point.exp() / (1 + made))
    (expected,) = torch.autograd.grad(at.square().sum(), point)
    torch.testing.assert_close(w.v.detach(), at.detach(), atol=1e-14, rtol=0)
    torch.testing.assert_close(optimizer.gradient("x")["v"], expected, atol=1e-12, rtol=0)
    assert set(seen) == {0, 1}
    simplex = projected(Vector(torch.ones(2)), Vector(torch.ones(1)), constraints.simplex)
    assert not simplex.problems["w"].after_step_takes_count


def test_returned_tensors_must_fit():
    refused(lambda p: p["v"], "must return a dict")
    refused(lambda p: {"u": p["v"]}, "returned 'u', which is not one of the parameters")
    refused(lambda p: {"v": p["v"][:1]}, r"of its shape \(2,\), got \(1,\)")


def test_what_it_reads_must_be_named():
    refused(lambda p, *, y: p, "reads 'y', which is not a problem")
    refused(lambda p, **others: p, r"its after_step takes \*\*others")
    refused(lambda: {}, "1 or 2 positional arguments")
    refused(lambda p, made, batch: p, "1 or 2 positional arguments")


def test_a_plain_step_refuses_both():
    refused(constraints.nonnegative, "plain=True", engine={"name": "one_step", "plain": True})


def test_implicit_engines_refuse_settings():
    with pytest.raises(mlo.EngineError, match="settings="):
        make("SGD", "cg", "settings")


def test_entries_on_a_bound_pass_the_check():
    """Where the derivative jumps, no difference agrees with it."""
    w, x = Vector(torch.tensor([0.0, 0.5])), Vector(torch.tensor([0.0]))
    optimizer = projected(w, x, constraints.nonnegative)
    optimizer.step()
    assert w.v.tolist() == [0.0, pytest.approx(0.4)]


def test_learned_decay_leaves_parameters_without_a_gradient():
    w = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)})
    x = Vector(torch.tensor([-1.0]))
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.AdamW(w.parameters(), lr=0.1),
        loss=lambda w, _: w["a"].sum(),
        settings=lambda *, x: {"weight_decay": x.v.exp()},
        steps=2,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, w: w["b"].sum(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], mlo.Unroll(steps=2))
    optimizer.step()
    assert optimizer.gradient("x")["v"].tolist() == [0.0]


def test_a_projection_may_round_inside():
    """A difference across 1e-7 of a parameter would see the rounding alone."""
    w, x = Vector(torch.tensor([0.5, 0.7])), Vector(torch.tensor([0.1]))
    optimizer = projected(w.double(), x.double(), lambda p: {"v": p["v"].float().sin().double()})
    optimizer.step()


def test_a_projection_of_complex_numbers():
    """Onto phases, through three steps of descent."""
    start = torch.tensor([0.6 + 0.8j, 1.0j], dtype=torch.complex128)
    w, x = Vector(start.clone()), Vector(torch.tensor([0.4], dtype=torch.float64))
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=0.1),
        loss=lambda w, _, *, x: (w.v - x.v * (1 + 2j)).abs().square().sum(),
        after_step=lambda p: {"v": p["v"] / p["v"].abs()},
        steps=3,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: w.v.real.sum(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], mlo.Unroll(steps=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no imaginary part is discarded
        optimizer.step()
    y, v = x.v.detach().clone().requires_grad_(), start.requires_grad_()
    for _ in range(3):
        loss = (v - y * (1 + 2j)).abs().square().sum()
        (g,) = torch.autograd.grad(loss, v, create_graph=True)
        v = (v - 0.1 * g) / (v - 0.1 * g).abs()
    (expected,) = torch.autograd.grad(v.real.sum(), y)
    torch.testing.assert_close(optimizer.gradient("x")["v"], expected, atol=1e-12, rtol=0)


def test_a_projection_may_insist_on_its_dtype():
    """The check of the derivative falls back to the dtype that the function insists on."""
    mask = torch.eye(2)
    w, x = Vector(torch.tensor([0.5, -0.5])), Vector(torch.tensor([0.1]))
    optimizer = projected(w, x, lambda p: {"v": mask @ constraints.nonnegative(p["v"])})
    next(optimizer.updates(1))
    # w' = max(w − 0.1 (x + 2 w), 0) = (0.39, 0), so dL/dx = 2 · 0.39 · −0.1
    torch.testing.assert_close(w.v.detach(), torch.tensor([0.39, 0.0]))
    assert float(optimizer.gradient("x")["v"]) == pytest.approx(-0.078, rel=1e-5)
