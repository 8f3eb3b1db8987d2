"""Programs for Betty, run on `mlo.compat.betty`: against naive autograd, and against Betty itself.

The kinds of Betty's own programs, restated small, smooth and in float64: hyperparameters with a
restarted lower problem, data reweighting, implicit MAML over tasks, architecture search with
`roll_back`, and problems on three and four levels.
"""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_betty_programs import (
    THEIRS,
    Value,
    batches,
    bilevel,
    library,
    lower_loss,
    upper_loss,
    values,
)
from torch.autograd import grad
from torch.autograd.functional import hessian, jacobian
from torch.optim import SGD, Adam

import mlo
from mlo.testing import relative_error

EXACT = 1e-12


def vector(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def need_betty():
    return pytest.importorskip("betty", reason="betty-ml is not installed (make betty)")


# ------------------------------ two levels, by hand


def neumann(h, v, *, alpha, iterations):
    """α Σ_{k ≤ K} (I − αA)ᵏ v."""
    term = total = v
    for _ in range(iterations):
        term = term - alpha * h @ term
        total = total + term
    return alpha * total


def same(h, v):
    return v


def solved(h, v):
    return torch.linalg.solve(h, v)


def hypergradient(w, x, low, up, inverse):
    """The direct gradient minus Bᵀ q, on batches `low` and `up` of numbers."""
    leaves = w.clone().requires_grad_(), x.clone().requires_grad_()
    v, direct = grad(upper_loss(*leaves, up), leaves)

    def mean(w, x):
        return sum(lower_loss(w, x, b) for b in low) / len(low)

    def gradient(x):
        leaf = w.clone().requires_grad_()
        return grad(mean(leaf, x), leaf, create_graph=True)[0]

    mixed = jacobian(gradient, x)
    return direct - mixed.T @ inverse(hessian(lambda w: mean(w, x), w), v)


def naive(
    inverse, *, cycles, unroll=1, gas=1, upper_gas=1, warmup=0, roll_back=False, momentum=0.0
):
    """Betty's loop on the program of `bilevel`, with exact products."""
    w, x = vector(0.3, -0.2), vector(0.4, 0.1)
    buffer, summed, solves, count = torch.zeros_like(w), torch.zeros_like(x), 0, 0
    lows = itertools.cycle(b for (b,) in batches())
    ups = itertools.cycle(b for (b,) in batches(3))

    def step(w, buffer, x, low):
        leaf = w.clone().requires_grad_()
        g = grad(sum(lower_loss(leaf, x, b) for b in low) / len(low), leaf)[0]
        buffer = momentum * buffer + g
        return w - 0.2 * buffer, buffer

    for _ in range(cycles):
        start = w, buffer
        for _ in range(unroll):
            low = [next(lows) for _ in range(gas)]
            w, buffer = step(w, buffer, x, low)
            count += gas
        if count <= warmup:
            continue
        summed = summed + hypergradient(w, x, low, next(ups), inverse) / upper_gas
        solves += 1
        if solves % upper_gas == 0:
            x, summed = x - 0.3 * summed, torch.zeros_like(x)
        if roll_back:
            w, buffer = step(*start, x, low)
    return torch.cat([x, w])


METHODS = {
    "darts": ({"type": "darts"}, same),
    "sama with SGD": ({"type": "sama"}, same),
    "neumann": (
        {"type": "neumann", "neumann_iterations": 3, "neumann_alpha": 0.2},
        partial(neumann, alpha=0.2, iterations=3),
    ),
    "cg": ({"type": "cg", "cg_iterations": 2, "cg_alpha": 0.1}, solved),  # two unknowns
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unroll", [1, 3])
def test_every_method_has_exact_products(method, unroll):
    config, inverse = METHODS[method]
    engine = bilevel(lower={**config, "unroll_steps": unroll}, engine={"train_iters": 4 * unroll})
    expected = naive(inverse, cycles=4, unroll=unroll)
    assert relative_error(values(engine), expected) < EXACT


SETTINGS = [
    {"roll_back": True},
    {"roll_back": True, "unroll": 3},
    {"roll_back": True, "unroll": 3, "momentum": 0.5},
    {"roll_back": True, "unroll": 2, "warmup": 5},
    {"roll_back": True, "unroll": 2, "gas": 2},
    {"roll_back": True, "unroll": 2, "upper_gas": 2},
    {"warmup": 3},
    {"unroll": 2, "warmup": 3},
    {"unroll": 2, "gas": 2, "warmup": 5},
    {"gas": 3, "upper_gas": 2, "unroll": 2},
    {"upper_gas": 3, "momentum": 0.9},
]

WRONG_IN_BETTY = ("warmup", "gas")
"""With roll_back: it goes back to before the warm-up, and steps again on one of the batches."""


def run(found, setting, *, cycles=5, **configs):
    unroll, gas = setting.get("unroll", 1), setting.get("gas", 1)
    lower = {
        "unroll_steps": unroll,
        "gradient_accumulation": gas,
        "warmup_steps": setting.get("warmup", 0),
    }
    return bilevel(
        found,
        lower={**lower, **configs.pop("lower", {})},
        upper={"gradient_accumulation": setting.get("upper_gas", 1)},
        engine={
            "train_iters": cycles * unroll * gas,
            "roll_back": setting.get("roll_back", False),
            **configs.pop("engine", {}),
        },
        momentum=setting.get("momentum", 0.0),
        **configs,
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_roll_back_accumulation_and_warm_up(setting):
    engine = run(library(), setting)
    assert relative_error(values(engine), naive(same, cycles=5, **setting)) < EXACT
    # The upper problem has moved, so that this compares something.
    assert relative_error(values(engine)[:2], vector(0.4, 0.1)) > 0.02


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_betty_itself_agrees_where_it_is_right(setting):
    """With its own formulas, to the last bits."""
    need_betty()
    if "gas" in setting and "upper_gas" not in setting and "roll_back" not in setting:
        pytest.skip("Betty differentiates the last batch of those that are accumulated")
    theirs = values(run(library(THEIRS), setting))
    ours = values(run(library(), setting, engine={"formulas": "betty"}))
    if "roll_back" in setting and any(key in setting for key in WRONG_IN_BETTY):
        assert relative_error(theirs, ours) > 1e-3
        return
    assert relative_error(ours, theirs) < EXACT


BETTYS = [
    {"type": "darts"},
    {"type": "darts", "darts_alpha": 0.3},
    {"type": "neumann", "neumann_iterations": 4, "neumann_alpha": 0.1},
    {"type": "cg", "cg_iterations": 3, "cg_alpha": 0.5},
    {"type": "sama"},
]


@pytest.mark.parametrize("config", BETTYS, ids=str)
@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_bettys_formulas_give_its_own_numbers(config, optimizer):
    need_betty()
    options = {"lower": {**config, "unroll_steps": 2}, "optimizer": optimizer}
    theirs = values(bilevel(library(THEIRS), **options))
    options["lower"] = {**config, "unroll_steps": 2, "formulas": "betty"}
    assert relative_error(values(bilevel(**options)), theirs) < EXACT
    # Its series has exact products; its differences and its cg do not.
    options["lower"] = {**config, "unroll_steps": 2}
    off = relative_error(values(bilevel(**options)), theirs)
    assert off < EXACT if config["type"] == "neumann" else off > 1e-9


# ------------------------------ hyperparameters: a restarted lower problem, unrolled


def restart(self):
    self.module.v.data.zero_()


def clamp(self):
    for parameter in self.trainable_parameters():
        parameter.data.clamp_(min=0.05)


@pytest.mark.parametrize("kind", ["IterativeProblem", "HigherIterativeProblem"])
def test_an_iterative_problem_is_unrolled(kind):
    engine = bilevel(
        kind=kind,
        lower={"unroll_steps": 4},
        upper={"first_order": False},
        methods={"on_inner_loop_start": restart},
        upper_methods={"param_callback": clamp},
        momentum=0.8,
    )
    x = vector(0.4, 0.1)
    lows = itertools.cycle(b for (b,) in batches())
    ups = itertools.cycle(b for (b,) in batches(3))
    buffer = torch.zeros(2).double()  # the optimizer's state outlives a restart
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        w = torch.zeros(2).double().requires_grad_()
        for _ in range(4):
            g = grad(lower_loss(w, leaf, next(lows)), w, create_graph=True)[0]
            buffer = 0.8 * buffer + g
            w = w - 0.2 * buffer
        x = x - 0.3 * grad(upper_loss(w, leaf, next(ups)), leaf)[0]
        x, buffer = x.clamp(min=0.05), buffer.detach()
    assert relative_error(values(engine), torch.cat([x, w.detach()])) < EXACT


# ------------------------------ reweighting: sama with Adam


def test_sama_differentiates_the_step_of_adam():
    """With the bias correction that Betty's preconditioner lacks."""
    engine = bilevel(
        lower={"type": "sama", "unroll_steps": 3}, engine={"train_iters": 6}, optimizer=Adam
    )
    w, x = vector(0.3, -0.2), vector(0.4, 0.1)
    m, v = torch.zeros(2).double(), torch.zeros(2).double()
    lows = itertools.cycle(b for (b,) in batches())
    ups = itertools.cycle(b for (b,) in batches(3))
    t = 0
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        for _ in range(3):
            t += 1
            point = w.detach().requires_grad_()
            g = grad(lower_loss(point, leaf, next(lows)), point, create_graph=True)[0]
            m, v = 0.9 * m.detach() + 0.1 * g, 0.999 * v.detach() + 0.001 * g**2
            step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            w = point.detach() - 0.2 * step
        x = x - 0.3 * grad(upper_loss(w, leaf, next(ups)), leaf)[0]
    assert relative_error(values(engine), torch.cat([x, w.detach()])) < 1e-9


# ------------------------------ implicit MAML: tasks in an environment


TASKS = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).view(6, 1)


def adapted(w, start, task):
    """A task's loss, with a pull to the start."""
    return (
        ((w - task) ** 2 * vector(1.0, 2.0)).sum()
        + 0.3 * (w**4).sum()
        + (0.5 * ((w - start) ** 2).sum())
    )


def test_implicit_maml_over_tasks_of_an_environment():
    found = library()

    class Tasks(found.Env):
        def draw(self, number):
            self.batch = TASKS[number % 6]

    class Outer(found.ImplicitProblem):
        def training_step(self, batch):
            return ((self.inner() - batch - 0.2) ** 2).sum()

        def get_batch(self):
            return self.env.batch

    class Inner(found.ImplicitProblem):
        def training_step(self, batch):
            return adapted(self.module(), self.outer.module.v, batch)

        def get_batch(self):
            return self.env.batch

        def on_inner_loop_start(self):
            self.module.load_state_dict(self.outer.module.state_dict())

    class Maml(found.Engine):
        def train_step(self):
            if self.global_step % 4 == 1:
                self.env.draw(self.global_step // 4)
            super().train_step()

    start, own = Value(0.1, -0.3), Value(0.0, 0.0)
    outer = Outer(
        name="outer",
        module=start,
        optimizer=Adam(start.parameters(), lr=0.1),
        config=found.Config(gradient_accumulation=2, retain_graph=True),
    )
    inner = Inner(
        name="inner",
        module=own,
        optimizer=SGD(own.parameters(), lr=0.05),
        config=found.Config(type="cg", cg_iterations=2, unroll_steps=4),
    )
    Maml(
        problems=[outer, inner],
        config=found.EngineConfig(train_iters=4 * 2 * 3, strategy="cpu"),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        env=Tasks(),
    ).run()

    x = torch.nn.Parameter(vector(0.1, -0.3))
    optimizer = Adam([x], lr=0.1)
    for first in range(0, 6, 2):
        total = torch.zeros(2).double()
        for task in TASKS[first : first + 2]:
            w = x.detach().clone()
            for _ in range(4):
                leaf = w.clone().requires_grad_()
                w = w - 0.05 * grad(adapted(leaf, x.detach(), task), leaf)[0]
            h = hessian(lambda w, task=task: adapted(w, x.detach(), task), w)
            # The mixed derivative is −I: of ½ ‖w − x‖².
            total += torch.linalg.solve(h, 2 * (w - task - 0.2)) / 2
        x.grad = total
        optimizer.step()
    assert relative_error(start.v.detach(), x.detach()) < EXACT


# ------------------------------ three and four levels


def levels(found, edges, *, back, count, types=None, **options):
    """Problems p0 (a leaf) to p_count−1, each reading its children squared and its uppers.

    Args:
        edges: lower → uppers.
        back: upper → lowers whose losses read it.
    """

    def training_step(self, batch):
        own = self.module()
        terms = [(0.5 + 0.1 * batch[0]) * own**2 + 0.05 * own**4 - 0.3 * own]
        terms += [0.4 * own * child().sin() + 0.3 * child() ** 2 for child in self.children]
        readers = [upper for upper in back if self.index in back[upper]]
        terms += [-0.6 * own * getattr(self, f"p{upper}")() for upper in readers]
        return sum(term.sum() for term in terms)

    problems = []
    kind = type("Level", (found.ImplicitProblem,), {"training_step": training_step})
    for k in range(count):
        module = Value(0.2 + 0.1 * k, -0.1 * k)
        problems.append(
            kind(
                name=f"p{k}",
                module=module,
                optimizer=SGD(module.parameters(), lr=0.1),
                train_data_loader=batches(2 + k),
                config=found.Config(retain_graph=True, **(types or {}).get(k, {})),
            )
        )
        problems[-1].index = k
    engine = found.Engine(
        problems=problems[::-1],
        config=found.EngineConfig(**{"train_iters": 6, "strategy": "cpu", **options}),
        dependencies={
            "l2u": {problems[k]: [problems[up] for up in ups] for k, ups in edges.items()},
            "u2l": {problems[k]: [problems[low] for low in lows] for k, lows in back.items()},
        },
    )
    engine.run()
    return engine


GRAPHS = {
    "chain": ({0: [1], 1: [2]}, {2: [0]}, 3),
    "triangle": ({0: [1, 2], 1: [2]}, {2: [1, 0]}, 3),
    "two leaves": ({0: [2], 1: [2], 2: [3]}, {3: [0, 1, 2]}, 4),
    "four levels": ({0: [1, 3], 1: [2], 2: [3]}, {3: [2, 1, 0]}, 4),
}


def ways(edges, lower, upper):
    """The ways from a problem up to another, each as a list that begins with `lower`."""
    if lower == upper:
        return [[lower]]
    found = []
    for above in edges.get(lower, ()):
        found += [[lower, *way] for way in ways(edges, above, upper)]
    return found


def naive_levels(edges, back, count, *, roll_back, iterations=6, rate=0.1):
    """The program of `levels` with q = v on every way, by plain autograd."""
    p = [vector(0.2 + 0.1 * k, -0.1 * k) for k in range(count)]
    data = [itertools.cycle(b for (b,) in batches(2 + k)) for k in range(count)]
    batch = [torch.zeros(1).double()] * count

    def loss(k, at):
        own = at[k]
        total = (0.5 + 0.1 * batch[k]) * own**2 + 0.05 * own**4 - 0.3 * own
        for child in [low for low in edges if k in edges[low]]:
            total = total + 0.4 * own * at[child].sin() + 0.3 * at[child] ** 2
        for reader in [up for up in back if k in back[up]]:
            total = total - 0.6 * own * at[reader]
        return total.sum()

    def step(k):
        at = [t.clone().requires_grad_() for t in p]
        total = grad(loss(k, at), at[k])[0]
        for lower in back.get(k, ()):
            for way in ways(edges, lower, k):
                # Down from k: through the problem below it, and so on, back to k itself.
                v = grad(loss(k, at), at[way[-2]])[0]
                for here, onto in zip(way[-2::-1], [*way[-3::-1], k], strict=False):
                    g = grad(loss(here, at), at[here], create_graph=True)[0]
                    v = -grad(g, at[onto], grad_outputs=v)[0]
                total = total + v
        return p[k] - rate * total

    for _ in range(iterations):
        start = list(p)
        for k in range(count):
            batch[k] = next(data[k])
            p[k] = step(k)
        for k in edges if roll_back else ():
            p[k] = start[k]
            p[k] = step(k)
    return torch.cat(p[::-1])


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("roll_back", [False, True], ids=["on", "back"])
def test_graphs_of_several_levels(graph, roll_back):
    """One solve per problem adds up to one per path."""
    edges, back, count = GRAPHS[graph]
    engine = levels(library(), edges, back=back, count=count, roll_back=roll_back)
    expected = naive_levels(edges, back, count, roll_back=roll_back)
    assert relative_error(values(engine), expected) < EXACT


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("roll_back", [False, True], ids=["on", "back"])
def test_betty_agrees_on_graphs_of_several_levels(graph, roll_back):
    need_betty()
    edges, back, count = GRAPHS[graph]
    run_on = partial(levels, edges=edges, back=back, count=count, roll_back=roll_back)
    types = {k: {"type": "neumann", "neumann_alpha": 0.3} for k in range(count)}
    theirs = values(run_on(library(THEIRS), types=types))
    error = relative_error(values(run_on(library(), types=types)), theirs)
    if graph == "two leaves" and roll_back:
        # Betty steps the first leaf again before the problems above have moved.
        assert error > 0.01
    else:
        assert error < EXACT


def test_a_middle_problem_differentiates_those_below_exactly():
    """Nested: p1's own gradient contains p0's response, where Betty's neumann and cg refuse."""
    edges, back = {0: [1], 1: [2]}, {1: [0], 2: [1]}
    solve = {"type": "cg", "cg_iterations": 4}
    engine = levels(library(), edges, back=back, count=3, types={0: solve, 1: solve})
    # mlo itself, declared by hand, with a dense solve.
    modules = [Value(0.2 + 0.1 * k, -0.1 * k) for k in range(3)]

    def own(b, v):
        return (0.5 + 0.1 * b) * v**2 + 0.05 * v**4 - 0.3 * v

    losses = [
        lambda p0, b, *, p1: (own(b[0], p0.v) - 0.6 * p0.v * p1.v).sum(),
        lambda p1, b, *, p0, p2: (
            own(b[0], p1.v) + 0.4 * p1.v * p0.v.sin() + 0.3 * p0.v**2 - 0.6 * p1.v * p2.v
        ).sum(),
        lambda p2, b, *, p1: (own(b[0], p2.v) + 0.4 * p2.v * p1.v.sin() + 0.3 * p1.v**2).sum(),
    ]
    problems = [
        mlo.Problem(
            f"p{k}",
            module=module,
            optimizer=SGD(module.parameters(), lr=0.1),
            loss=losses[k],
            data=batches(2 + k),
        )
        for k, module in enumerate(modules)
    ]
    list(mlo.MultilevelOptimizer(problems, "direct").run(6))
    expected = torch.cat([module.v.detach() for module in modules[::-1]])
    assert relative_error(values(engine), expected) < 1e-9


# ------------------------------ what makes a difference


def test_how_far_bettys_darts_is_from_the_one_step_unroll():
    """It has no learning rate: the implicit term is 1/lr times that of the optimizer's step."""
    rate = 0.05
    ends = [
        values(bilevel(lower={"type": kind}, rate=rate, engine={"train_iters": 1}))[:2]
        for kind in ("darts", {"name": "one_step"}, {"name": "first_order"})
    ]
    implicit = SimpleNamespace(betty=ends[0] - ends[2], step=ends[1] - ends[2])
    # (They are taken at the ends of one step that is short, so nearly at one place.)
    assert relative_error(implicit.betty * rate, implicit.step) < 0.05


def test_weight_decay_is_part_of_the_hessian():
    engine = bilevel(
        lower={"type": "cg", "cg_iterations": 2}, engine={"train_iters": 1}, weight_decay=0.5
    )
    w, x = vector(0.3, -0.2), vector(0.4, 0.1)
    leaf = w.clone().requires_grad_()
    w = w - 0.2 * (grad(lower_loss(leaf, x, torch.zeros(1)), leaf)[0] + 0.5 * w)
    found = hypergradient(
        w, x, [torch.zeros(1)], torch.zeros(1), lambda h, v: solved(h + 0.5 * torch.eye(2), v)
    )
    assert relative_error(values(engine)[:2], x - 0.3 * found) < EXACT


@pytest.mark.parametrize("place", ["outermost", "below first_order"])
@pytest.mark.parametrize("kind", ["counter", "iterator", "noise", "buffer"])
def test_state_that_a_training_step_keeps(kind, place):
    """Only the check of the first update calls it once more; a buffer does not see that."""

    class Keeper(Value):
        def __init__(self, *entries):
            super().__init__(*entries)
            self.calls, self.numbers = 0, itertools.cycle([0.5, 1.5, 1.0, 2.0, 0.7])
            self.noise = np.random.default_rng(0)
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))

        def factor(self):
            self.calls += 1
            self.count += 1.0
            kinds = {
                "counter": lambda: 0.9**self.calls,
                "iterator": lambda: next(self.numbers),
                "noise": self.noise.random,
                "buffer": lambda: 0.9 ** float(self.count),
            }
            return kinds[kind]()

    found, outermost = library(), place == "outermost"
    keeper_of = "x" if outermost else "w"

    class Low(found.ImplicitProblem):
        def training_step(self, _):
            loss = lower_loss(self.module(), self.up(), 0.0)
            return loss if outermost else self.module.factor() * loss

    class Up(found.ImplicitProblem):
        def training_step(self, _):
            loss = upper_loss(self.low(), self.module(), 0.0)
            return self.module.factor() * loss if outermost else loss

    def made():
        return Keeper(0.3, -0.2), Keeper(0.4, 0.1)

    w, x = made()
    config = found.Config(type={"name": "one_step" if outermost else "first_order"})
    low = Low("low", config, w, SGD(w.parameters(), lr=0.2), train_data_loader=batches(1))
    up = Up("up", found.Config(), x, SGD(x.parameters(), lr=0.3), train_data_loader=batches(1))
    engine = found.Engine(
        problems=[up, low],
        config=found.EngineConfig(train_iters=9, strategy="cpu"),
        dependencies={"l2u": {low: [up]}, "u2l": {up: [low]}},
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine.run()
    keepers = dict(zip("wx", made(), strict=True))
    expected = by_loop_with_state(*keepers.values(), keepers[keeper_of], kind, outermost)
    assert relative_error(torch.cat([w.v, x.v]).detach(), expected) < EXACT
    messages = [text for m in seen if "evaluated again" in (text := str(m.message))]
    assert len(messages) == (kind != "buffer")


def by_loop_with_state(w, x, keeper, kind, outermost):
    """Nine turns, through the last step if the outermost problem keeps the state."""
    at_w, at_x = w.v.detach(), x.v.detach()
    for turn in range(9):
        factor = keeper.factor()
        if turn == 0 and kind != "buffer":
            keeper.factor()
        theta, leaf = at_w.requires_grad_(), at_x.requires_grad_()
        loss = lower_loss(theta, leaf, 0.0) * (1.0 if outermost else factor)
        (g,) = grad(loss, theta, create_graph=outermost)
        after = theta - 0.2 * g if outermost else (theta - 0.2 * g).detach()
        loss = upper_loss(after, leaf, 0.0) * (factor if outermost else 1.0)
        at_w, at_x = after.detach(), leaf.detach() - 0.3 * grad(loss, leaf)[0]
    return torch.cat([at_w, at_x])
