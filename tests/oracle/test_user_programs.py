"""Reasonable user programs that could go wrong silently: each against an oracle, or refused with
advice.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import mlo
from mlo.testing import Vector, identical, relative_error, snapshot

SGD = torch.optim.SGD


def vector(*shape, seed=0, dtype=torch.float64):
    return Vector(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def pair(
    w_loss=lambda w, _, *, x: ((w.v - x.v) ** 2).sum(),
    x_loss=lambda x, _, *, w: (w.v**3).sum(),
    *,
    engine="one_step",
    w=None,
    optimizer=lambda p: SGD(p, lr=0.1),
    **options,
):
    w, x = w or vector(3), vector(3, seed=1)
    return mlo.MultilevelOptimizer(
        [
            mlo.Problem(
                "w", module=w, optimizer=optimizer(list(w.parameters())), loss=w_loss, **options
            ),
            mlo.Problem("x", module=x, optimizer=SGD(x.parameters(), lr=0.1), loss=x_loss),
        ],
        engine,
    )


# ------------------------------ gradients


@pytest.mark.parametrize("engine", ["one_step", "darts", "cg"])
@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_checkpointing_recomputes_with_the_right_parameters(engine, rounds):
    """Activation checkpointing runs again with the parameters of the first run."""

    def gradient(checkpointed):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        inputs, targets, x = torch.randn(10, 3).double(), torch.randn(10, 1).double(), vector(10)

        def run(net):
            return checkpoint(net, inputs, use_reentrant=False) if checkpointed else net(inputs)

        problems = [
            mlo.Problem(
                "net",
                module=net,
                optimizer=SGD(net.parameters(), lr=0.5),
                loss=lambda net, _, *, x: (
                    torch.sigmoid(x.v) * ((run(net) - targets) ** 2).squeeze()
                ).mean(),
            ),
            mlo.Problem(
                "x",
                module=x,
                optimizer=SGD(x.parameters(), lr=0.1),
                loss=lambda x, _, *, net: ((run(net) - 0.5) ** 2).mean(),
            ),
        ]
        optimizer = mlo.MultilevelOptimizer(problems, engine)
        list(optimizer.run(rounds))
        return optimizer.gradient("x")["v"]

    assert relative_error(gradient(True), gradient(False)) < 1e-10


def interleaved():
    """A graph in which c's gradient contains the step of b, which saw the solution of q."""
    modules = {name: vector(2, seed=index) for index, name in enumerate("pqabc")}
    losses = {
        "p": lambda s, _, *, c: ((s.v - c.v) ** 2).sum() + (s.v**4).sum(),
        "q": lambda s, _, *, p: ((s.v - p.v**2) ** 2).sum(),
        "a": lambda s, _, *, b: ((s.v - b.v**3) ** 2).sum(),
        "b": lambda s, _, *, q, c: ((s.v**2 - q.v * c.v) ** 2).sum(),
        "c": lambda s, _, *, a: ((a.v - 1) ** 2).sum() + 0.1 * (s.v**2).sum(),
    }
    return mlo.MultilevelOptimizer(
        [
            mlo.Problem(
                n,
                module=modules[n],
                optimizer=SGD(modules[n].parameters(), lr=0.05),
                loss=losses[n],
            )
            for n in "pqabc"
        ]
    )


def test_whatever_a_gradient_contains_has_moved_before_it():
    optimizer = interleaved()
    order = optimizer.graph.schedule()
    for name in optimizer.problems:
        assert all(
            order.index(lower) < order.index(name) for lower in optimizer.graph.solutions_in[name]
        )
    whole = [record.gradient_norms for record in interleaved().run(6)]
    first = interleaved()
    list(first.run(3))
    second = interleaved()
    second.load_state_dict(first.state_dict())
    assert [record.gradient_norms for record in second.run(3)] == whole[3:]


def test_finite_differences_fit_the_losss_precision():
    """Finite differences fit the precision in which the loss is computed."""

    def gradient(engine, precision):
        torch.manual_seed(0)
        net, x = (
            nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)),
            vector(32, dtype=torch.float32),
        )
        inputs, targets = torch.randn(32, 6), torch.randn(32, 1)
        problems = [
            mlo.Problem(
                "net",
                module=net,
                optimizer=SGD(net.parameters(), lr=0.1),
                loss=lambda net, _, *, x: (
                    torch.sigmoid(x.v) * ((net(inputs) - targets) ** 2).squeeze()
                ).mean(),
                precision=precision,
            ),
            mlo.Problem(
                "x",
                module=x,
                optimizer=SGD(x.parameters(), lr=0.1),
                loss=lambda x, _, *, net: ((net(inputs) - targets) ** 2).mean(),
            ),
        ]
        return mlo.MultilevelOptimizer(problems, engine).gradient("x")["v"]

    assert relative_error(gradient("darts", "bf16"), gradient("one_step", None)) < 0.15


def test_a_tensor_learning_rate_is_that_of_the_step():
    def gradient(lr):
        w = vector(3)
        own = SGD(w.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.StepLR(own, 1, gamma=0.1)
        optimizer = pair(w=w, optimizer=lambda _: own, scheduler=schedule)
        optimizer.step()
        return optimizer.gradient("x")["v"]

    assert relative_error(gradient(torch.tensor(0.1, dtype=torch.float64)), gradient(0.1)) < 1e-12


def test_a_problem_that_warms_up_is_a_constant():
    optimizer = pair(warmup_steps=2, x_loss=lambda x, _, *, w: (w.v * x.v).sum())
    w = optimizer.problems["w"].module.v.detach().clone()
    assert torch.equal(optimizer.gradient("x")["v"], w)
    list(optimizer.run(2))
    assert torch.equal(optimizer.problems["w"].module.v, w)
    optimizer.step()
    assert not torch.equal(optimizer.gradient("x")["v"], optimizer.problems["w"].module.v)


def test_training_flags_belong_to_the_evaluation():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double(), vector(4)
    inputs = torch.randn(4, 3, dtype=torch.float64)
    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=SGD(net.parameters(), lr=0.5),
            loss=lambda net, _, *, x: (torch.exp(x.v) * net(inputs).squeeze() ** 2).mean(),
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=SGD(x.parameters(), lr=0.0),
            loss=lambda x, _, *, net: sum((p**2).sum() for p in net.parameters()),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems)
    optimizer.step()
    expected = optimizer.gradient("x")["v"]
    net.eval()  # a validation pass between two rounds
    assert torch.equal(optimizer.gradient("x")["v"], expected)
    assert not net[1].training


def test_a_parameter_that_no_loss_uses_is_left_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.unused = (
                nn.Parameter(torch.ones(3).double()),
                nn.Parameter(torch.ones(1).double()),
            )

    optimizer = pair(w=Two(), optimizer=lambda p: SGD(p, lr=0.1, weight_decay=0.5))
    optimizer.step()
    # Weight decay moves it as little as in plain PyTorch.
    assert float(optimizer.problems["w"].module.unused.detach()) == 1.0
    assert torch.equal(optimizer.gradient("w")["unused"], torch.zeros(1).double())


def test_problems_may_share_a_buffer():
    shared = torch.ones(3, dtype=torch.float64)
    w, x = vector(3), vector(3, seed=1)
    w.register_buffer("scale", shared)
    x.register_buffer("scale", shared)

    def loss(w, _, *, x):
        return ((w.v * w.scale - x.v * x.scale) ** 2).sum()

    problems = [
        mlo.Problem("w", module=w, optimizer=SGD(w.parameters(), lr=0.1), loss=loss),
        mlo.Problem(
            "x",
            module=x,
            optimizer=SGD(x.parameters(), lr=0.1),
            loss=lambda x, _, *, w: (w.v**3).sum(),
        ),
    ]
    plain = pair()
    assert (
        relative_error(mlo.MultilevelOptimizer(problems).gradient("x"), plain.gradient("x")) < 1e-12
    )


# ------------------------------ batches


def test_a_loss_may_take_its_batch_apart():
    def loss(w, batch, *, x):
        label = batch.pop("label")
        return ((batch["a"] @ w.v - label) ** 2).mean() + (w.v * x.v).sum()

    data = [{"a": torch.ones(4, 3).double(), "label": torch.zeros(4).double()}]
    optimizer = pair(loss, data=data)
    optimizer.step()
    assert optimizer.gradient("x")["v"].abs().sum() > 0
    assert set(data[0]) == {"a", "label"}


def test_a_loss_that_edits_its_batch_in_place_is_refused():
    def loss(w, batch, *, x):
        return ((batch.sub_(5.0) @ w.v) ** 2 * torch.sigmoid(x.v.sum())).mean()

    with pytest.raises(mlo.ProblemError, match="'w' changes its batch in place"):
        pair(loss, data=[torch.ones(4, 3).double()]).step()


def test_data_that_fill_one_buffer_again_and_again_are_refused():
    class Reused:
        def __iter__(self):
            buffer = torch.zeros(3).double()
            for k in range(100):
                yield buffer.fill_(k)

    optimizer = pair(
        lambda w, batch, *, x: ((w.v - batch * x.v) ** 2).sum(), data=Reused(), accumulate=2
    )
    with pytest.raises(mlo.ProblemError, match="changed in place after it was drawn"):
        optimizer.step()


def loader(kind):
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.arange(8.0).double()[:, None])
    if kind == "generator":
        return DataLoader(dataset, batch_size=2, shuffle=True, generator=generator)
    if kind == "sampler":
        return DataLoader(
            dataset, batch_size=2, sampler=RandomSampler(dataset, generator=generator)
        )
    return DataLoader(dataset, batch_size=2, shuffle=True)


@pytest.mark.parametrize("kind", ["global", "generator", "sampler"])
@pytest.mark.parametrize("rounds", [0, 3, 4, 6])
def test_shuffled_data_resume_and_look_ahead(kind, rounds):
    """Shuffled data resume and look ahead, whatever they draw from."""

    def make():
        torch.manual_seed(3)
        seen = []

        def loss(w, batch, *, x):
            seen.append(batch[0].flatten().tolist())
            return ((w.v - batch[0]) ** 2).mean()

        return pair(
            loss, engine="first_order", x_loss=lambda x, _, *, w: (x.v**2).sum(), data=loader(kind)
        ), seen

    def batches(optimizer, seen, rounds):
        found = []
        for _ in range(rounds):
            optimizer.step()
            found.append(seen[-1])  # (a check evaluates a loss again, on the same batch)
        return found

    expected = batches(*make(), rounds + 8)
    first, _ = make()
    list(first.run(rounds))
    state = first.state_dict()
    second, seen = make()
    second.load_state_dict(state)
    second.gradient("w")
    assert batches(second, seen, 8) == expected[rounds:]


def test_looking_ahead_does_not_move_a_one_shot_generator():
    def make():
        seen = []

        def loss(w, batch):
            seen.append(float(batch))
            return ((w.v - batch) ** 2).sum()

        w = vector(1)
        data = (torch.tensor(float(k)).double() for k in range(100))
        problem = mlo.Problem(
            "w", module=w, optimizer=SGD(w.parameters(), lr=0.1), loss=loss, data=data
        )
        return mlo.MultilevelOptimizer([problem]), seen

    first, _ = make()
    first.gradient("w")
    second, seen = make()
    second.load_state_dict(first.state_dict())
    second.step()
    assert seen == [0.0]


# ------------------------------ states and records


def test_numpy_numbers_in_a_state_can_be_read_back(tmp_path):
    w = vector(3)
    own = SGD(w.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda step: np.cos(step / 10))
    optimizer = pair(w=w, optimizer=lambda _: own, scheduler=schedule)
    optimizer.step()
    mlo.save_checkpoint(optimizer.state_dict(), tmp_path / "c.pt")
    optimizer.load_state_dict(mlo.load_checkpoint(tmp_path / "c.pt"))


def test_a_state_that_cannot_be_read_back_is_not_written(tmp_path):
    """A state that could not be read back is refused when it is written."""
    with pytest.raises(mlo.CheckpointError, match=r"state\.data\[1\] is a object"):
        mlo.save_checkpoint({"data": [1, object()]}, tmp_path / "c.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_a_copy():
    optimizer = pair()
    state = optimizer.state_dict()
    before = snapshot(optimizer)
    list(optimizer.run(3))
    optimizer.load_state_dict(state)
    assert identical(snapshot(optimizer), before)


def test_a_state_that_does_not_fit_changes_nothing():
    optimizer = pair()
    state = optimizer.state_dict()
    list(optimizer.run(2))
    before = snapshot(optimizer)
    del state["problems"]["x"]["optimizers"]["x"]
    with pytest.raises(mlo.CheckpointError, match="'x' does not fit"):
        optimizer.load_state_dict(state)
    assert identical(snapshot(optimizer), before)


def test_metrics_are_copies_averaged_over_the_batches():
    optimizer = pair(
        lambda w, batch, *, x: (
            ((w.v - batch) ** 2).sum() + (w.v * x.v).sum(),
            {"mean": batch, "first": w.v[0]},
        ),
        accumulate=2,
        data=[torch.tensor(1.0).double(), torch.tensor(3.0).double()],
    )
    records = list(optimizer.run(3))
    assert [record.metrics["w"]["mean"] for record in records] == [2.0] * 3
    assert len({record.metrics["w"]["first"] for record in records}) == 3


def test_a_round_runs_under_no_grad_but_not_in_inference_mode():
    """A round has gradients under no_grad, and is refused in inference mode."""
    expected = pair()
    expected.step()
    optimizer = pair()
    with torch.no_grad():
        optimizer.step()
    assert identical(snapshot(optimizer), snapshot(expected))
    with torch.inference_mode(), pytest.raises(mlo.ProblemError, match="inference_mode"):
        optimizer.step()
    with pytest.raises(mlo.ProblemError, match="does not depend on any parameter"):
        pair(lambda w, _, *, x: (w.v.detach() ** 2).sum()).step()


def test_problems_listed_from_the_outermost_are_refused():
    """A loss that only reads a problem listed after it has no derivative; the message says why."""
    with pytest.raises(mlo.ProblemError, match=r"reads x, listed after it.*list x before 'w'"):
        pair(lambda w, _, *, x: (x.v**2).sum(), lambda x, _, *, w: ((x.v - w.v) ** 2).sum()).step()


def test_a_loss_that_misses_its_batch_is_told_of_data():
    with pytest.raises(TypeError) as caught:
        pair(lambda w, batch, *, x: (w.v * batch[0]).sum()).step()
    assert caught.value.__notes__ == ["Problem 'w' has no data=, so its batch is None."]


# ------------------------------ declarations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": lambda p: {"a": SGD(p, lr=0.1), "b": SGD(p, lr=0.1)}},
            "hold the same parameter",
        ),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, "LBFGS"),
        ({"optimizer": lambda p: SGD}, "an object, not its class"),
        ({"w_loss": lambda w, _, **others: w.v.sum()}, r"takes \*\*others"),
        ({"w_loss": lambda w, _, x=None: w.v.sum()}, "positional argument x="),
        ({"w_loss": lambda w, _: (w.v.sum(), 3.0)}, "second part is a float"),
    ],
)
def test_misdeclarations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pair(**options).step()


@pytest.mark.parametrize("name", ["class", "name", "default", "a b", 3])
def test_names_that_no_loss_could_read_are_refused(name):
    with pytest.raises(mlo.ProblemError, match="Problem name"):
        mlo.Problem(
            name,
            module=vector(1),
            optimizer=SGD(vector(1).parameters(), lr=0.1),
            loss=lambda w, _: w.v.sum(),
        )


def test_a_scheduler_of_another_optimizer_is_refused():
    other = SGD(vector(3).parameters(), lr=0.1)
    with pytest.raises(mlo.ProblemError, match="drives another optimizer"):
        pair(scheduler=torch.optim.lr_scheduler.StepLR(other, 1))


def test_an_operation_without_double_backward_is_named():
    """An operation without double backward is named before PyTorch's own words."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, inputs = vector(1, dtype=torch.float32), torch.randn(2, 5, 8)
    problems = [
        mlo.Problem(
            "layer",
            module=layer,
            optimizer=SGD(layer.parameters(), lr=0.1),
            loss=lambda layer, _, *, x: (layer(inputs) * torch.exp(x.v)).pow(2).mean(),
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=SGD(x.parameters(), lr=0.1),
            loss=lambda x, _, *, layer: layer(inputs)[..., 0].mean(),
        ),
    ]
    with pytest.raises(mlo.EngineError, match=r"no double backward.*'darts'"):
        mlo.MultilevelOptimizer(copy.deepcopy(problems), "one_step").gradient("x")
    assert mlo.MultilevelOptimizer(problems, "darts").gradient("x")["v"].isfinite().all()


def test_reentrant_checkpointing_is_refused():
    """Reentrant checkpointing would leave parameters alone, and is refused."""

    def loss(w, _, *, x):
        inputs = torch.ones(3, dtype=torch.float64, requires_grad=True)
        return checkpoint(lambda t: (w.v * t) ** 2, inputs, use_reentrant=True).mean() * (
            1 + x.v.sum()
        )

    for engine in ("one_step", "darts", "first_order"):
        with pytest.raises(mlo.ProblemError, match="use_reentrant=False"):
            pair(loss, engine=engine).step()


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 3, sparse=True).double()
    optimizer = pair(
        lambda w, _, *, x: (w(torch.tensor([0, 2])) * x.v).sum() ** 2,
        lambda x, _, *, w: w(torch.tensor([1])).sum() + (x.v**2).sum(),
        w=table,
    )
    with pytest.raises(mlo.ProblemError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("engine", ["one_step", "darts", "cg"])
def test_sparse_gradients_in_what_is_read_are_refused(engine):
    """Only the response of `w` has one: the loss of `x` does not use the table."""
    w, table = vector(3), nn.Embedding(4, 3, sparse=True).double()
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=SGD(w.parameters(), lr=0.1),
            loss=lambda w, _, *, x: (w.v - x(torch.tensor([0, 2]))).square().sum(),
        ),
        mlo.Problem(
            "x",
            module=table,
            optimizer=SGD(table.parameters(), lr=0.1),
            loss=lambda x, _, *, w: (w.v**3).sum(),
        ),
    ]
    with pytest.raises(mlo.ProblemError, match=r"'w': .*sparse=False"):
        mlo.MultilevelOptimizer(problems, engine).step()


@pytest.mark.parametrize("engine", ["penalty", "darts", "cg", "soba"])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_game_with_one_player_is_a_minimisation(engine):
    alone = pair(
        lambda w, _, *, x: {"only": ((w.v - x.v) ** 2).sum()}, engine=engine, players={"only": ""}
    )
    plain = pair(engine=engine)
    assert relative_error(alone.gradient("x")["v"], plain.gradient("x")["v"]) < 1e-9


def test_another_error_in_a_product_keeps_its_name():
    """An error in a product that is not about derivatives keeps its name."""

    class OutOfMemory(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            if torch.is_grad_enabled():
                return Second.apply(g)
            return g

    class Second(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g):
            return g.clone()

        @staticmethod
        def backward(ctx, g):
            raise torch.OutOfMemoryError("no memory left")

    optimizer = pair(lambda w, _, *, x: ((OutOfMemory.apply(w.v) ** 2) * x.v).sum())
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.gradient("x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "cg", "tol": "1e-3"},
            r"tol must be a number, got '1e-3'. YAML reads 1e-3 as text",
        ),
        ({"name": "direct", "damping": "1e-2"}, "damping must be a number"),
        ({"name": "direct", "max_parameters": "1e4"}, "max_parameters must be an integer"),
        ({"name": "penalty", "multiplier": None}, "multiplier must be 'auto' or a positive number"),
        ({"name": "neumann", "tol": None}, "tol must be a number"),
        ({"name": "gmres", "tol": -1.0}, "tol must not be negative"),
        ({"name": "soba", "step_size": "1e-2"}, "must be 'auto', 'lower', a positive number"),
    ],
)
def test_numbers_that_yaml_reads_as_text_are_refused(options, message):
    """Numbers that YAML reads as text are refused before a run."""
    with pytest.raises(mlo.EngineError, match=message):
        mlo.engine_from(options)


def test_a_solve_of_the_wrong_shape_is_the_engines_fault():
    class Short(mlo.Identity):
        def solve(self, system, cotangent):
            return mlo.hypergradient.Solve(
                q=[torch.zeros(2).double()], report=self.report(system.problem)
            )

    with pytest.raises(mlo.EngineError, match="does not have one entry, of its shape"):
        pair(engine=Short()).gradient("x")


def test_one_name_may_be_fixed_without_a_list():
    optimizer = pair()
    assert torch.equal(
        optimizer.gradient("x", held_constant="w")["v"],
        optimizer.gradient("x", held_constant=["w"])["v"],
    )


# ------------------------------ a solver in the place of an optimizer


class Solver(torch.optim.Optimizer):
    """Puts the solution in place, whatever the gradient is; it has no learning rate."""

    def __init__(self, parameters, solve):
        super().__init__(parameters, {})
        self.solve = solve

    @torch.no_grad()
    def step(self, closure=None):
        self.param_groups[0]["params"][0].copy_(self.solve())


def solved(engine, **options):
    """w solves M w = x by a solver of one's own; the upper loss is the sum of w."""
    w, x = Vector(torch.zeros(2).double()), Vector(torch.tensor([1.0, 2.0]).double())
    m = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=Solver(w.parameters(), lambda: torch.linalg.solve(m, x.v.detach())),
        loss=lambda w, _, *, x: 0.5 * w.v @ m @ w.v - w.v @ x.v,
        **options,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: w.v.sum(),
    )
    return mlo.MultilevelOptimizer([lower, upper], engine), torch.linalg.inv(m).sum(0)


@pytest.mark.parametrize("engine", ["cg", "direct", "gmres"])
def test_an_optimizer_may_have_no_learning_rate(engine):
    optimizer, expected = solved(engine)
    optimizer.step()
    torch.testing.assert_close(optimizer.gradient("x")["v"], expected, atol=1e-8, rtol=0)


@pytest.mark.filterwarnings("ignore:.*fixed point:mlo.SolveWarning")
def test_a_fixed_point_of_steps_needs_their_length():
    optimizer, _ = solved("gmres", after_step=mlo.constraints.nonnegative)
    with pytest.raises(mlo.EngineError, match="Solver has no learning rate"):
        optimizer.step()
