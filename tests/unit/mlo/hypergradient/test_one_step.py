"""`one_step`: the derivative of the step that was made.

With `keep_graph` the runs are the same from fewer evaluations, and nothing is kept for longer than
a round.
"""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mlo
from mlo.testing import Vector, bilevel_quadratic, relative_error, trilevel_quadratic


@pytest.mark.parametrize("engine", ["one_step", "darts"])
def test_one_step_is_the_derivative_of_the_step_that_was_made(engine):
    problem = bilevel_quadratic(weight_decay=0.3)
    optimizer = problem.optimizer(engine)
    x = problem.value("x").clone().requires_grad_()
    w = problem.value("w").clone().requires_grad_()
    gradient = torch.autograd.grad(problem.losses["w"](w, x), w, create_graph=True)[0] + 0.3 * w
    moved = w - 0.1 * gradient
    (expected,) = torch.autograd.grad(problem.losses["x"](x, moved), x)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-8
    before = problem.value("x").clone()
    optimizer.step()  # SGD with lr 0.1 on x
    assert relative_error((before - problem.value("x")) / 0.1, expected) < 1e-8


def test_one_step_through_three_levels_equals_plain_autograd():
    """One step through a true trilevel problem equals plain autograd.

    w' is a step from w at (m, x); m' is a step down the total gradient of m's loss, which
    contains dw'/dm.
    """
    problem = trilevel_quadratic()
    optimizer = problem.optimizer("one_step")
    m, w, x = (problem.value(name).clone().requires_grad_() for name in ("m", "w", "x"))
    by_name = {p.name: p.loss for p in problem.problems}

    class Held:
        def __init__(self, v):
            self.v = v

    def step(value, loss):
        return value - 0.1 * torch.autograd.grad(loss, value, create_graph=True)[0]

    # The middle problem reads w's response, so its own total gradient goes through w's step.
    w_new = step(w, by_name["w"](Held(w), None, m=Held(m), x=Held(x)))
    m_new = step(m, by_name["m"](Held(m), None, w=Held(w_new), x=Held(x)))
    # The upper problem sees w as a function of the *response* of m.
    w_at = step(
        w, by_name["w"](Held(w), None, m=Held(m_at := m.detach().requires_grad_()), x=Held(x))
    )
    value = by_name["x"](Held(x), None, m=Held(m_new), w=Held(w_at))
    direct_x, v_m = torch.autograd.grad(value, [x, m_at], retain_graph=True)
    (through_m,) = torch.autograd.grad(m_new, x, v_m)
    assert relative_error(optimizer.gradient("x")["v"], direct_x + through_m) < 1e-10


OPTIMIZERS = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2),
    "sgd_maximize": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_step_is_gradient_descent_whatever_the_optimizer(name):
    """`plain`: the derivative of θ' = θ - ξ g, the papers' equations, at the θ' that the optimizer
    made.
    """

    def inner(own, batch, *, x):
        return (own.v.sin() * x.v).sum() + 0.5 * (own.v**2).sum()

    def outer(x, batch, *, w):
        return (w.v**3).sum() + (x.v * w.v).sum()

    w, x = (
        Vector(torch.tensor(values, dtype=torch.float64)) for values in ([0.3, -0.7], [1.1, 0.4])
    )
    optimizer = mlo.MultilevelOptimizer(
        [
            mlo.Problem("w", module=w, optimizer=OPTIMIZERS[name](w.parameters()), loss=inner),
            mlo.Problem(
                "x", module=x, optimizer=torch.optim.SGD(x.parameters(), lr=0.0), loss=outer
            ),
        ],
        mlo.OneStep(plain=True),
    )
    optimizer.step()  # the optimizer has momentum now
    before = w.v.detach().clone().requires_grad_()
    values = x.v.detach().clone().requires_grad_()
    optimizer.step()
    after = w.v.detach().clone().requires_grad_()
    (direct, v) = torch.autograd.grad((after**3).sum() + (values * after).sum(), [values, after])
    (g,) = torch.autograd.grad(
        (before.sin() * values).sum() + 0.5 * (before**2).sum(), before, create_graph=True
    )
    (mixed,) = torch.autograd.grad(g, values, v)
    rate = -0.1 if name == "sgd_maximize" else 0.1
    assert relative_error(optimizer.gradient("x")["v"], direct - rate * mixed) < 1e-13


# ------------------------------ keep_graph

KEEPING = {"name": "one_step", "keep_graph": True}
RECOMPUTING = {"name": "one_step", "keep_graph": False}


class Net(nn.Module):
    """A network with running statistics and dropout masks, which an evaluation must restore.

    A part of it may be checkpointed.
    """

    def __init__(self, checkpointed=False):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh())
        self.out = nn.Linear(6, 3)
        self.checkpointed = checkpointed
        self.outputs = []

    def forward(self, x):
        hidden = (
            checkpoint(self.hidden, x, use_reentrant=False) if self.checkpointed else self.hidden(x)
        )
        self.outputs.append(weakref.ref(hidden))
        return self.out(hidden)


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(5)
    ]


def make(
    engine,
    *,
    optimizer=torch.optim.SGD,
    grad_clip=None,
    order="lower_first",
    steps=1,
    warmup=0,
    checkpointed=False,
):
    """teacher → student → x: the student learns from the teacher, both with class weights x.

    Returns the optimizer, and how often each loss was called.
    """
    torch.manual_seed(0)
    teacher, student = Net(checkpointed).double(), Net().double()
    x = Vector(torch.linspace(-0.5, 0.5, 3).double())
    calls = dict.fromkeys(("teacher", "student", "x"), 0)

    def weighted(network, batch, x):
        return (
            nn.functional.cross_entropy(network(batch[0]), batch[1], reduction="none")
            * x.v.exp()[batch[1]]
        ).mean()

    def teacher_loss(teacher, batch, *, x):
        calls["teacher"] += 1
        return weighted(teacher, batch, x)

    def student_loss(student, batch, *, teacher, x):
        calls["student"] += 1
        return weighted(student, batch, x) + (student(batch[0]) - teacher(batch[0])).pow(2).mean()

    def x_loss(x, batch, *, student):
        calls["x"] += 1
        return nn.functional.cross_entropy(student(batch[0]), batch[1]) + 0.1 * x.v.pow(2).sum()

    options = {"lr": 0.1, "weight_decay": 0.01}
    if optimizer is torch.optim.SGD:
        options["momentum"] = 0.9
    problems = [
        mlo.Problem(
            "teacher",
            module=teacher,
            optimizer=optimizer(teacher.parameters(), **options),
            loss=teacher_loss,
            data=batches(1),
            grad_clip=grad_clip,
            steps=steps,
        ),
        mlo.Problem(
            "student",
            module=student,
            optimizer=optimizer(student.parameters(), **options),
            loss=student_loss,
            data=batches(2),
            grad_clip=grad_clip,
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.5),
            loss=x_loss,
            data=batches(3),
            warmup_steps=warmup,
        ),
    ]
    optimizer_of_all = mlo.MultilevelOptimizer(problems, engine, order=order)
    torch.manual_seed(1)
    return optimizer_of_all, calls


def state(optimizer):
    return {
        f"{name}.{key}": tensor
        for name, problem in optimizer.problems.items()
        for key, tensor in problem.module.state_dict().items()
        if tensor.is_floating_point()
    }


def gradients_of(optimizer):
    """A list that every gradient from now on is added to.

    An entry is (problem, whether in its own update, whether the graph is kept).
    """
    made = []
    for levels in (optimizer._now, optimizer._ahead):
        levels.differentiate = noting(made, levels.differentiate)
    return made


def noting(made, total_gradient):
    def noted(name, *args, is_update=False, keep_graph=False, **options):
        made.append((name, is_update, keep_graph))
        return total_gradient(name, *args, is_update=is_update, keep_graph=keep_graph, **options)

    return noted


def run(engine, **options):
    """The states after each of four rounds, and a gradient after the graphs were let go of."""
    optimizer, _ = make(engine, **options)
    states = []
    for _ in range(4):
        optimizer.step()
        states.append({key: tensor.clone() for key, tensor in state(optimizer).items()})
    return states, optimizer.gradient("x")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": torch.optim.Adam},
        {"grad_clip": 0.05},
        {"grad_clip": 0.05, "optimizer": torch.optim.Adam},
        {"order": "outermost_first"},
        {"order": "outermost_first", "optimizer": torch.optim.Adam},
        {"steps": 3},
        {"warmup": 2},
        {"checkpointed": True},
        {"checkpointed": True, "order": "outermost_first"},
    ],
    ids=str,
)
def test_the_run_is_that_of_one_step(options):
    (kept, kept_gradient), (again, again_gradient) = (
        run(engine, **options) for engine in (KEEPING, RECOMPUTING)
    )
    for one, other in zip(kept, again, strict=True):
        assert relative_error(one, other) < 1e-12
    assert relative_error(again[-1]["x.v"], again[0]["x.v"]) > 1e-2
    assert relative_error(kept_gradient, again_gradient) < 1e-12


def test_a_round_evaluates_each_loss_once():
    for engine, expected in ((KEEPING, 1), (RECOMPUTING, 2)):
        optimizer, calls = make(engine)
        list(optimizer.run(2))  # in these rounds losses are looked at, too
        calls.update(dict.fromkeys(calls, 0))
        optimizer.step()
        assert calls == {"teacher": expected, "student": expected, "x": 1}


@pytest.mark.parametrize(("memory", "expected"), [(2**40, 1), (2**10, 2)], ids=["much", "little"])
def test_by_default_a_graph_is_kept_where_it_fits(monkeypatch, memory, expected):
    """It is decided in the first update, which differentiates a graph that it makes again."""
    monkeypatch.setattr("mlo.graph_memory.memory_of", lambda device: memory)
    optimizer, calls = make("one_step")
    other, _ = make(RECOMPUTING)
    for _ in range(3):
        calls.update(dict.fromkeys(calls, 0))
        torch.manual_seed(2)
        optimizer.step()
        torch.manual_seed(2)
        other.step()
    assert calls == {"teacher": expected, "student": expected, "x": 1}
    for key, tensor in state(optimizer).items():
        assert torch.equal(tensor, state(other)[key])


@pytest.mark.parametrize("more", [{"accumulate": 2}, {"restart_from": "x"}])
def test_by_default_a_sum_of_graphs_is_made_again(more):
    w, x = Vector(torch.ones(2)), Vector(torch.ones(2))
    made = []

    def loss(w, batch, *, x):
        made.append(batch)
        return (w.v * x.v).sum() ** 2

    lower = mlo.Problem(
        "w", module=w, optimizer=torch.optim.SGD(w.parameters(), lr=0.1), loss=loss, **more
    )
    upper = mlo.Problem(
        "x", module=x, optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, w: (w.v - x.v).square().sum(),
    )  # fmt: skip
    optimizer = mlo.MultilevelOptimizer([lower, upper], "one_step")
    list(optimizer.run(2))  # in these rounds losses are looked at, too
    made.clear()
    optimizer.step()
    assert len(made) == 2 * more.get("accumulate", 1)


def test_a_graph_is_kept_always_never_or_where_it_fits():
    with pytest.raises(mlo.EngineError, match="keep_graph must be true, false or 'auto'"):
        mlo.OneStep(keep_graph="always")
    assert mlo.OneStep(products="finite_difference").keeps_graph is False


def test_only_the_graph_of_the_last_move_is_kept():
    """A lower problem that moves several times keeps the graph of its last move only."""
    optimizer, calls = make(KEEPING, steps=3)
    made = gradients_of(optimizer)
    optimizer.step()
    assert calls["teacher"] == 3 + 2  # the updates 1 and 2 are looked at
    assert [(name, keeps) for name, _, keeps in made] == [
        ("teacher", False), ("teacher", False), ("teacher", True), ("student", True), ("x", False),
    ]  # fmt: skip


def test_no_graph_is_kept_for_a_problem_that_rests():
    optimizer, _ = make(KEEPING, warmup=1)
    made = gradients_of(optimizer)
    optimizer.step()
    assert [(name, keeps) for name, _, keeps in made] == [("teacher", False), ("student", False)]


@pytest.mark.parametrize("order", ["lower_first", "outermost_first"])
def test_what_a_graph_holds_is_freed_when_it_was_differentiated(order):
    optimizer, _ = make(KEEPING, order=order)
    optimizer.step()
    gc.disable()
    try:
        optimizer.step()
        optimizer.gradient("x")
        outputs = [
            ref
            for name in ("teacher", "student")
            for ref in optimizer.problems[name].module.outputs
        ]
        assert len(outputs) >= 6 and not any(ref() is not None for ref in outputs)
    finally:
        gc.enable()


@pytest.mark.parametrize("bad", ["student", "x"])
def test_a_round_that_ends_early_lets_go_of_its_graphs(bad):
    optimizer, _ = make(KEEPING)
    optimizer.step()
    with torch.no_grad():
        next(iter(optimizer.problems[bad].module.parameters())).fill_(float("nan"))
    failed = False
    gc.disable()
    try:
        try:
            optimizer.step()
        except mlo.NonFiniteError:
            failed = True  # pytest.raises would hold the frames that the error came through
        assert failed
        assert not any(ref() is not None for ref in optimizer.problems["teacher"].module.outputs)
    finally:
        gc.enable()


def test_a_response_differentiated_twice_is_evaluated_again():
    """A kept graph cannot serve a response that is differentiated twice."""
    chosen = {"w": KEEPING, "default": RECOMPUTING}
    for order in ("lower_first", "outermost_first"):
        optimizers = [three_levels(engine, order) for engine in (chosen, RECOMPUTING)]
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.step()
        assert relative_error(*map(state, optimizers)) < 1e-12


def three_levels(engine, order):
    """The middle problem's own gradient contains the innermost one's response."""
    modules = {
        name: Vector(torch.linspace(-1, 1, 3).double() + k)
        for k, name in enumerate(("w", "m", "x"))
    }
    losses = {
        "w": lambda w, _, *, m, x: (
            (torch.tanh(w.v * m.v) - x.v).pow(2).sum() + (w.v - m.v).pow(4).sum()
        ),
        "m": lambda m, _, *, w, x: (m.v.sin() * w.v).sum() + (m.v - x.v).pow(2).sum(),
        "x": lambda x, _, *, w, m: (w.v - 1).pow(2).sum() + (m.v * x.v).sum() + x.v.pow(2).sum(),
    }
    problems = [
        mlo.Problem(
            name,
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
            loss=losses[name],
        )
        for name, module in modules.items()
    ]
    return mlo.MultilevelOptimizer(problems, engine, order=order)


def test_a_game_keeps_the_gradients_of_its_players():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v = (
                Vector(torch.linspace(-1, 1, 3).double()),
                Vector(torch.linspace(1, 2, 3).double()),
            )

    def run(engine):
        pair, x = Pair(), Vector(torch.linspace(0.1, 0.4, 3).double())
        calls = []

        def loss(pair, _, *, x):
            calls.append("pair")
            product = (torch.tanh(pair.u.v * x.v) * pair.v.v).sum()
            return {"u": product + pair.u.v.pow(2).sum(), "v": -product.sin()}

        game = mlo.Problem(
            "pair",
            module=pair,
            players={"u": "u", "v": "v"},
            player_steps={"v": 2},
            loss=loss,
            optimizer={
                name: torch.optim.SGD(getattr(pair, name).parameters(), lr=0.1, momentum=0.5)
                for name in "uv"
            },
        )
        upper = mlo.Problem(
            "x", module=x, optimizer=torch.optim.SGD(x.parameters(), lr=0.3),
            loss=lambda x, _, *, pair: (pair.u.v * x.v).sum() + pair.v.v.cos().sum(),
        )  # fmt: skip
        optimizer = mlo.MultilevelOptimizer([game, upper], engine)
        list(optimizer.run(3))
        return state(optimizer), len(calls)

    (kept, fewer), (again, more) = run(KEEPING), run(RECOMPUTING)
    assert relative_error(kept, again) < 1e-12
    # Checks beside them: of both moves of the rounds 1 and 2, and of the pull-backs 1 and 2.
    assert (fewer, more) == (6 + 4, 9 + 4 + 2)


def test_what_cannot_keep_a_graph_is_refused():
    with pytest.raises(mlo.EngineError, match="products='autograd'"):
        mlo.OneStep(keep_graph=True, products="finite_difference")
    with pytest.raises(
        mlo.EngineError, match=r"'m' has a gradient that contains the response.* without keep_graph"
    ):
        three_levels(KEEPING, "lower_first")
    network, x = Vector(torch.ones(2)), Vector(torch.ones(2))
    lower = mlo.Problem(
        "w",
        module=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        accumulate=2,
        data=[1, 2],
        loss=lambda w, batch, *, x: (w.v * x.v).pow(2).sum(),
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, w: w.v.sum(),
    )
    with pytest.raises(mlo.EngineError, match="averaged over several batches"):
        mlo.MultilevelOptimizer([lower, upper], KEEPING)


def pair(
    engine, module, loss, *, optimizer=None, data=None, upper_data=None, upper_loss=None, **options
):
    """A lower problem of any module, and one vector above it."""
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    x = Vector(torch.linspace(0.1, 0.4, 4).double())
    lower = mlo.Problem("w", module=module, optimizer=optimizer, loss=loss, data=data)
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.5),
        data=upper_data,
        **options,
        loss=upper_loss
        or (lambda x, batch, *, w: sum(p.sin().sum() for p in w.parameters()) + x.v.pow(2).sum()),
    )
    return mlo.MultilevelOptimizer([lower, upper], engine)


def test_a_hook_on_a_parameter_is_refused():
    w = Vector(torch.ones(4).double())
    optimizer = pair(KEEPING, w, lambda w, batch, *, x: (w.v * x.v).cos().sum())
    optimizer.step()
    w.v.register_hook(lambda g: g * 0.5)
    with pytest.raises(mlo.ProblemError, match=r"hook on parameter 'v' of problem 'w'.*changes"):
        optimizer.step()


def test_what_a_loss_does_to_its_parameters_in_place_lasts():
    def rounds(engine):
        torch.manual_seed(0)
        embedding = nn.Embedding(5, 4, max_norm=1.0).double()
        optimizer = pair(
            engine, embedding, lambda w, _, *, x: (w(torch.tensor([0, 2])) * x.v).cos().sum()
        )
        list(optimizer.run(3))
        return state(optimizer)

    kept = rounds(KEEPING)
    assert relative_error(kept, rounds(RECOMPUTING)) < 1e-12
    assert float(kept["w.weight"][0].norm()) < 1.5


@pytest.mark.parametrize("engine", [KEEPING, RECOMPUTING], ids=str)
def test_a_batch_that_changes_before_a_second_run_is_refused(engine):
    """A checkpoint would run again on a batch that has changed."""
    buffer = torch.linspace(0, 1, 4).double()

    def refilled():
        while True:
            buffer.add_(0.1)
            yield torch.zeros(1)

    def loss(w, batch, *, x):
        return checkpoint(lambda v: (v * batch.sin() * x.v).cos().sum(), w.v, use_reentrant=False)

    optimizer = pair(
        engine, Vector(torch.ones(4).double()), loss, data=[buffer], upper_data=refilled()
    )
    with pytest.raises(mlo.ProblemError, match="a batch was changed in place"):
        optimizer.step()


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_may_change_gradients_in_place(foreach):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.linspace(0, k, 4).double()) for k in (1, 2))

    def rounds(engine):
        module = Two()
        sgd = torch.optim.SGD(
            module.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=foreach
        )
        optimizer = pair(
            engine, module, lambda w, _, *, x: ((w.a.tanh() + w.b) * x.v).cos().sum(), optimizer=sgd
        )
        list(optimizer.run(3))
        return state(optimizer)

    assert relative_error(rounds(KEEPING), rounds(RECOMPUTING)) < 1e-12


@pytest.mark.parametrize("fails", [ValueError, KeyboardInterrupt])
def test_whatever_ends_a_round_lets_go_of_its_graphs(fails):
    optimizer, _ = make(KEEPING)
    optimizer.step()
    around, failed = [], False

    def body(name):
        around.append(name)
        if name == "x":
            raise fails
        return contextlib.nullcontext()

    optimizer.around_update = body
    gc.disable()
    try:
        try:
            optimizer.step()
        except fails:
            failed = True
        assert failed and around == ["teacher", "student", "x"]
        assert not any(ref() is not None for ref in optimizer.problems["teacher"].module.outputs)
    finally:
        gc.enable()


def test_a_live_step_whose_readers_look_ahead_keeps_no_graph():
    optimizer = pair(
        KEEPING,
        Vector(torch.ones(4).double()),
        lambda w, batch, *, x: (w.v * x.v).cos().sum(),
        steps=2,
    )
    lower, upper = optimizer.problems.values()
    optimizer = mlo.MultilevelOptimizer([lower, upper], KEEPING, order="outermost_first")
    made = gradients_of(optimizer)
    optimizer.step()
    assert made == [("x", True, False), ("w", False, True), ("w", True, False)] * 2


@pytest.mark.parametrize("engine", ["one_step", "darts"])
def test_a_player_that_nothing_above_reads_takes_no_part(engine, monkeypatch):
    """As a GAN's discriminator: what trains on images reads the generator alone."""
    numbers = {name: torch.tensor([0.3, -0.7], dtype=torch.float64) for name in "xw"}
    x, w = Vector(numbers["x"].clone()), Vector(numbers["w"].clone())
    game = torch.nn.ModuleDict({name: Vector(numbers["w"] + 1.0) for name in ("g", "d")})

    def played(gan, batch, *, x):
        real = ((gan["d"].v - x.v) ** 2).sum()
        return {"g": (gan["g"].v * gan["d"].v * x.v).sin().sum(), "d": real}

    problems = [
        mlo.Problem(
            "gan",
            module=game,
            players={"g": "g", "d": "d"},
            optimizer={
                name: torch.optim.Adam(game[name].parameters(), lr=0.1) for name in ("g", "d")
            },
            loss=played,
        ),
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=0.1),
            loss=lambda w, batch, *, gan: ((w.v - gan["g"].v) ** 2).sum(),
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
            loss=lambda x, batch, *, w: (w.v**2).sum(),
        ),
    ]
    solve, given = mlo.OneStep.solve, {}

    def noted(self, system, cotangent):
        given[system.problem] = dict(zip(system.names, cotangent, strict=True))
        return solve(self, system, cotangent)

    monkeypatch.setattr(mlo.OneStep, "solve", noted)
    mlo.MultilevelOptimizer(problems, engine).step()
    assert given["gan"]["g.v"] is not None and bool(given["gan"]["g.v"].any())
    assert given["gan"]["d.v"] is None


class Signs(torch.optim.SGD):
    """A step by the sign of the gradient alone, which has no derivative."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad.sign())


def test_a_step_that_has_no_derivative_passes_on_zero():
    w, x = Vector(torch.ones(2).double()), Vector(torch.ones(2).double())
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=Signs(w.parameters(), lr=0.1),
        loss=lambda w, _, *, x: ((w.v - 2.0 * x.v) ** 2).sum(),
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, w: (w.v**2).sum() + (x.v**2).sum(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], "one_step")
    assert torch.equal(optimizer.gradient("x")["v"], 2.0 * x.v.detach())
    optimizer.step()
