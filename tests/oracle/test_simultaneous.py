"""`order="simultaneous"`: all problems see each other as they were when the round began."""

from __future__ import annotations

import pytest
import torch
from small_blocks import LOWER, UPPER, Blocks
from torch import nn
from torch.optim import SGD

import mlo
from mlo.testing import relative_error

ENGINES = {
    "cg": mlo.ConjugateGradient(tol=1e-14, max_steps=50),
    "direct": mlo.Direct(),
    "cg with differences": mlo.ConjugateGradient(
        tol=1e-9, max_steps=50, products="finite_difference"
    ),
    "first_order": mlo.FirstOrder(),
}


@pytest.mark.parametrize("label", ENGINES)
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")  # of single batches, and differences
def test_all_gradients_are_taken_where_the_round_began(label):
    blocks, rounds = Blocks(), 20
    lower, upper = blocks.drawn(LOWER, rounds), blocks.drawn(UPPER, rounds)
    optimizer = blocks.optimizer(ENGINES[label], lower, upper, alpha=0.05, gamma=0.03)
    z, x = blocks.z0, blocks.x0
    for i, j in zip(lower, upper, strict=True):
        down, direct = blocks.dF(j, z, x)
        if label != "first_order":
            eye = torch.eye(4, dtype=torch.float64)
            hessian = torch.stack([blocks.products(i, z, x, e)[0] for e in eye])
            direct = direct - blocks.products(i, z, x, torch.linalg.solve(hessian, down))[1]
        z, x = z - 0.05 * blocks.dG(i, z, x), x - 0.03 * direct
        optimizer.step()
        tolerance = 1e-5 if "differences" in label else 1e-10
        assert relative_error(optimizer.problems["z"].module.v.detach(), z) < tolerance
        assert relative_error(optimizer.problems["x"].module.v.detach(), x) < tolerance


def test_three_levels_are_seen_as_they_were():
    """Each moves down its partial gradient at the values of the round before."""

    def problem(name, loss, start):
        module = nn.ParameterDict({"p": torch.tensor([start], dtype=torch.float64)})
        return mlo.Problem(
            name, module=module, optimizer=SGD(module.parameters(), lr=0.1), loss=loss
        )

    optimizer = mlo.MultilevelOptimizer(
        [
            problem("a", lambda m, _, *, b, c: (m["p"] * b["p"] * c["p"]).sum(), 1.0),
            problem("b", lambda m, _, *, a, c: (m["p"] ** 2 * a["p"] * c["p"]).sum(), 2.0),
            problem("c", lambda m, _, *, a, b: (m["p"] ** 3 * a["p"] * b["p"]).sum(), 3.0),
        ],
        "first_order",
        order="simultaneous",
    )
    optimizer.step()
    moved = [float(p.module["p"].detach()) for p in optimizer.problems.values()]
    assert moved == pytest.approx([1 - 0.1 * 6, 2 - 0.1 * 4 * 3, 3 - 0.1 * 27 * 2])


def test_the_bias_of_a_batch_is_estimated_on_its_halves():
    """And not on the graph of the whole batch, which is kept."""
    for order in ("lower_first", "simultaneous"):
        blocks = Blocks()
        # From here the halves of block 1 have much smaller curvature than one another.
        blocks.a[4:6] *= 8.0
        with pytest.warns(mlo.SolveWarning, match="a solve on one batch is biased"):
            blocks.optimizer("direct", [1, 0], [0, 1], alpha=0.0, gamma=0.0, order=order).step()


def test_a_lower_update_that_is_left_out_is_seen_where_it_stands():
    """Not where the update before it was made."""
    blocks = Blocks()
    optimizer = blocks.optimizer("first_order", [0, 1, 2], [0, 1, 2], alpha=0.05, gamma=0.03)
    optimizer.on_nonfinite = "skip"
    optimizer.step()
    loss = optimizer.problems["z"].loss
    optimizer.problems["z"].loss = lambda m, batch, *, x: torch.nan * loss(m, batch, x=x)
    z, x = (p.module.v.detach().clone() for p in optimizer.problems.values())
    assert set(optimizer.step().skipped) == {"z"}
    expected = x - 0.03 * blocks.dF(1, z, x)[1]
    assert relative_error(optimizer.problems["x"].module.v.detach(), expected) < 1e-12


def test_a_question_is_about_where_the_problems_stand():
    blocks = Blocks()
    optimizer = blocks.optimizer("first_order", [0, 1], [0, 1], alpha=0.05, gamma=0.03)
    optimizer.step()
    z, x = (p.module.v.detach().clone() for p in optimizer.problems.values())
    assert relative_error(optimizer.gradient("x")["v"], blocks.dF(0, z, x)[1]) < 1e-12


def test_a_question_within_a_round_is_about_now():
    blocks = Blocks()
    optimizer = blocks.optimizer("first_order", [0, 1], [0, 1], alpha=0.05, gamma=0.03)
    next(optimizer.updates(1))  # z has moved, x has not
    z = optimizer.problems["z"].module.v.detach().clone()
    assert relative_error(optimizer.gradient("x")["v"], blocks.dF(0, z, blocks.x0)[1]) < 1e-12


def test_a_question_after_an_update_that_was_left_out():
    """The upper update was left out, with the lower solution as it was when that round began."""
    blocks = Blocks()
    optimizer = blocks.optimizer("direct", [0, 1], [0, 1], alpha=0.05, gamma=0.03)
    optimizer.on_nonfinite = "skip"
    optimizer.step()
    loss = optimizer.problems["x"].loss
    optimizer.problems["x"].loss = lambda m, batch, *, z: torch.inf * loss(m, batch, z=z)
    with pytest.warns(mlo.SolveWarning, match="A product with the Jacobian is not finite"):
        assert set(optimizer.step().skipped) == {"x"}
    optimizer.problems["x"].loss = loss
    z, x = (p.module.v.detach().clone() for p in optimizer.problems.values())
    down, direct = blocks.dF(0, z, x)
    eye = torch.eye(4, dtype=torch.float64)
    hessian = torch.stack([blocks.products(1, z, x, e)[0] for e in eye])
    direct = direct - blocks.products(1, z, x, torch.linalg.solve(hessian, down))[1]
    assert relative_error(optimizer.gradient("x")["v"], direct) < 1e-10


def test_soba_by_differences_meets_its_assumptions():
    """What is checked is Bᵀ of the same q; a warning would be an error."""
    runs = []
    for products in ("autograd", "finite_difference"):
        blocks = Blocks()
        optimizer = blocks.optimizer(
            mlo.Soba(step_size="lower", products=products), [0, 1, 2], [0, 1], alpha=0.1, gamma=0.05
        )
        list(optimizer.run(20))
        runs.append(torch.cat([p.module.v.detach() for p in optimizer.problems.values()]))
    assert relative_error(runs[1], runs[0]) < 1e-6


def test_a_simultaneous_round_is_not_saved_halfway():
    optimizer = Blocks().optimizer("soba", [0, 1], [0, 1], alpha=0.05, gamma=0.03)
    for update in optimizer.updates(2):
        if update.ends_round:
            optimizer.state_dict()
        else:
            with pytest.raises(mlo.CheckpointError, match="cannot be saved halfway"):
                optimizer.state_dict()


def test_the_graph_of_the_lower_gradient_is_released():
    optimizer = Blocks().optimizer("soba", [0, 1], [0, 1], alpha=0.05, gamma=0.03)
    history = optimizer._history
    held = [(update.problem, len(history.graphs)) for update in optimizer.updates(2)]
    assert held == [("z", 1), ("x", 0)] * 2
    assert history.kept_graphs == {}
