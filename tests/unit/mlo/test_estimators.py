"""Estimators: what they make of a batch's gradient, and when they learn from it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from small_blocks import LOWER, UPPER, Blocks

import mlo
from mlo.estimators import Estimates, EstimatorMemory, estimator_from
from mlo.testing import identical, relative_error, snapshot


def batch(number):
    return (mlo.IndexedBatch(number, ()),)


def estimate(estimator, memory, number, value, earlier=None):
    """One estimate of one quantity, kept."""
    found = {"g": torch.tensor(value, dtype=torch.float64)}
    before = None if earlier is None else (lambda: {"g": torch.tensor(earlier).double()})
    corrected = estimator.estimate(memory, "all", batch(number), found, before)
    memory.commit()
    return float(corrected["g"])


# ------------------------------ the rules


def test_saga_is_the_new_minus_the_row_plus_the_mean():
    saga, memory = mlo.Saga(), EstimatorMemory()
    assert estimate(saga, memory, 0, 2.0) == 2.0  # blocks that are met for the first time
    assert estimate(saga, memory, 1, 6.0) == 6.0
    assert estimate(saga, memory, 0, 5.0) == 5.0 - 2.0 + 4.0
    assert estimate(saga, memory, 1, 6.0) == 6.0 - 6.0 + 5.5
    assert estimate(saga, memory, 2, 7.0) == 7.0
    assert estimate(saga, memory, 1, 1.0) == pytest.approx(1.0 - 6.0 + 6.0)


@pytest.mark.parametrize("visited", [[], [0, 2], [0, 1, 2, 3]])
def test_saga_is_unbiased_from_the_first_update_on(visited):
    """The mean over all blocks that may come next is the mean of their gradients."""
    memory = EstimatorMemory()
    for number in visited:
        estimate(mlo.Saga(), memory, number, float(number**2))
    now = [3.0, -1.0, 4.0, 1.5]
    estimates = [
        estimate(mlo.Saga(), copy.deepcopy(memory), number, now[number]) for number in range(4)
    ]
    assert sum(estimates) / 4 == pytest.approx(sum(now) / 4)


def test_saga_leaves_the_whole_data_set_alone():
    memory = EstimatorMemory()
    estimate(mlo.Saga(), memory, 0, 2.0)
    before = dict(memory.tensors)
    assert estimate(mlo.Saga(), memory, None, 9.0) == 9.0
    assert memory.tensors == before


def test_saga_takes_the_number_of_a_block_from_a_function():
    saga, memory = mlo.Saga(index=lambda batch: batch["id"]), EstimatorMemory()
    for value, expected in ((1.0, 1.0), (4.0, 4.0 - 1.0 + 1.0)):
        found = {"g": torch.tensor(value)}
        corrected = saga.estimate(memory, "all", ({"id": 7},), found, None)
        memory.commit()
        assert float(corrected["g"]) == expected


def test_storm_moves_the_last_estimate_by_the_change():
    storm, memory = mlo.Storm(rate=0.25), EstimatorMemory()
    assert estimate(storm, memory, 0, 2.0) == 2.0
    assert estimate(storm, memory, 1, 5.0, earlier=4.0) == 5.0 + 0.75 * (2.0 - 4.0)
    assert estimate(storm, memory, None, 8.0, earlier=1.0) == 8.0  # the whole data set
    assert estimate(storm, memory, 1, 5.0, earlier=4.0) == 5.0 + 0.75 * (8.0 - 4.0)


def test_the_rate_of_storm_may_depend_on_the_update():
    asked = []
    storm, memory = mlo.Storm(rate=lambda made: asked.append(made) or 1.0), EstimatorMemory()
    for _ in range(3):
        assert estimate(storm, memory, 0, 3.0, earlier=100.0 if asked else None) == 3.0
        estimate(storm, memory, 0, 3.0, earlier=7.0)
    assert asked == [1, 2, 3, 4, 5]


def test_spider_is_storm_without_forgetting():
    memory = EstimatorMemory()
    assert mlo.Spider().rate == 0.0
    assert estimate(mlo.Spider(), memory, None, 2.0) == 2.0
    assert estimate(mlo.Spider(), memory, 1, 5.0, earlier=4.0) == 3.0


def test_memory_changes_with_the_update():
    memory = EstimatorMemory()
    memory.keep("a", torch.ones(2))
    assert memory.recall("a") is None
    memory.discard()
    memory.commit()
    assert memory.tensors == {}
    memory.keep("a", torch.ones(2))
    memory.commit()
    assert torch.equal(memory.recall("a"), torch.ones(2))


# ------------------------------ in a run


def run_of(lower=None, upper=None, engine=None, **options):
    blocks = Blocks()
    return blocks.optimizer(
        engine or mlo.Soba(step_size="lower"),
        blocks.drawn(LOWER, 30),
        blocks.drawn(UPPER, 31),
        **{"alpha": 0.05, "gamma": 0.03, **options},
        z={"estimator": lower},
        x={"estimator": upper},
    )


def test_a_whole_estimator_without_noise_changes_nothing():
    """Where every batch is the same one, an estimator has nothing to take off."""
    made = []
    for estimator in (None, "saga", "spider", "storm"):
        blocks = Blocks()
        optimizer = blocks.optimizer(
            mlo.Soba(step_size="lower"),
            [2],
            [3],
            alpha=0.05,
            gamma=0.03,
            z={"estimator": estimator},
            x={"estimator": estimator},
        )
        list(optimizer.run(12))
        made.append(torch.cat([p.module.v.detach() for p in optimizer.problems.values()]))
    for other in made[1:]:
        assert relative_error(other, made[0]) < 1e-12


@pytest.mark.parametrize("order", ["simultaneous", "lower_first", "outermost_first"])
@pytest.mark.parametrize("estimator", ["saga", "spider", "storm"])
def test_a_run_with_estimators_resumes_bit_for_bit(order, estimator):
    whole, part = (run_of(estimator, estimator, order=order) for _ in range(2))
    list(whole.run(12))
    list(part.run(5))
    state = copy.deepcopy(part.state_dict())
    resumed = run_of(estimator, estimator, order=order)
    resumed.load_state_dict(state)
    list(resumed.run(7))
    assert identical(snapshot(whole), snapshot(resumed))
    assert identical(whole.state_dict()["problems"], resumed.state_dict()["problems"])


@pytest.mark.parametrize("order", ["simultaneous", "lower_first"])
@pytest.mark.parametrize("estimator", ["saga", "spider", "storm"])
def test_a_question_changes_nothing(order, estimator):
    asked, left = (run_of(estimator, estimator, order=order) for _ in range(2))
    for optimizer in (asked, left):
        for _ in optimizer.run(6):
            if optimizer is asked:
                optimizer.gradient("x")
                optimizer.gradient("z")
    assert identical(asked.state_dict()["problems"], left.state_dict()["problems"])


def test_an_update_that_is_left_out_teaches_nothing():
    optimizer = run_of("saga", "saga")
    optimizer.on_nonfinite = "skip"
    list(optimizer.run(4))
    before = copy.deepcopy(optimizer.state_dict()["problems"])
    loss = optimizer.problems["x"].loss
    optimizer.problems["x"].loss = lambda module, batch, *, z: torch.inf * loss(module, batch, z=z)
    record = optimizer.step()
    assert set(record.skipped) == {"x"}
    after = optimizer.state_dict()["problems"]
    assert identical(before["x"]["estimates"], after["x"]["estimates"])
    # The lower update was made; the products that the upper one took are forgotten.
    changed = {
        key
        for key, tensor in after["z"]["estimates"].items()
        if not torch.equal(tensor, before["z"]["estimates"].get(key, torch.tensor(torch.nan)))
    }
    assert changed
    assert all(key.startswith("terms z") for key in changed)


def test_a_state_without_its_estimator_is_refused():
    plain, saga = run_of(), run_of("saga")
    for state, optimizer, said in ((plain, saga, "without"), (saga, plain, "with")):
        with pytest.raises(mlo.CheckpointError, match=f"saved {said} an estimator"):
            optimizer.load_state_dict(state.state_dict())


def test_an_estimator_corrects_the_total_of_other_engines():
    """A table of the upper problem's total gradients, where the engine is not linear in a batch."""
    optimizer = run_of(upper="saga", engine=mlo.ConjugateGradient(), order="lower_first")
    list(optimizer.run(1))
    kept = optimizer.state_dict()["problems"]["x"]["estimates"]
    rows = {key: tensor for key, tensor in kept.items() if "/row " in key}
    assert [key.split("/")[:2] for key in rows] == [["total x", "v"]]
    (row,) = rows.values()
    moved = optimizer.problems["x"].module.v.detach() - Blocks().x0
    assert relative_error(-moved / 0.03, row) < 1e-12


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")  # of single batches
def test_an_evaluation_at_an_earlier_point_leaves_engines_alone():
    """A warm start is that of the solve at the current point."""
    engine = mlo.ConjugateGradient(warm_start=True, tol=1e-14, max_steps=50)
    optimizer, blocks = run_of(upper="storm", engine=engine, order="lower_first"), Blocks()
    list(optimizer.run(3))
    point = optimizer.problems["x"].module.v.detach().clone()
    optimizer.problems["x"].optimizers["x"].param_groups[0]["lr"] = 0.0
    optimizer.step()
    z = optimizer.problems["z"].module.v.detach()
    lower, upper = (blocks.drawn(LOWER, 30), blocks.drawn(UPPER, 31))
    eye = torch.eye(4, dtype=torch.float64)
    hessian = torch.stack([blocks.products(lower[3], z, point, e)[0] for e in eye])
    expected = torch.linalg.solve(hessian, blocks.dF(upper[3], z, point)[0])
    kept = optimizer.state_dict()["problems"]["z"]["memory"]["x:q"]
    assert relative_error(kept, expected) < 1e-10


@pytest.mark.parametrize("engine", ["soba", "direct"])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")  # of single batches
def test_a_part_of_a_gradient_is_not_estimated(engine):
    """What flows through a solution that is held constant is not in the tables."""
    optimizer, blocks = run_of("saga", "saga", engine=engine, order="lower_first"), Blocks()
    list(optimizer.run(8))
    blocks.drawn(LOWER, 30)
    last = blocks.drawn(UPPER, 31)[7]
    z, x = (p.module.v.detach() for p in optimizer.problems.values())
    held = optimizer.gradient("x", held_constant=["z"])["v"]
    assert relative_error(held, blocks.dF(last, z, x)[1]) < 1e-12


@dataclass(frozen=True, kw_only=True)
class Doubled(mlo.Estimator):
    """Twice the gradient, or something else than what was asked for."""

    name: ClassVar[str] = "doubled"
    wrong: bool = False

    def estimate(self, memory, group, batches, found, earlier):
        if self.wrong:
            return {}
        return {name: 2.0 * value for name, value in found.items()}


def test_an_estimator_of_ones_own():
    optimizer, plain = run_of(lower=Doubled()), run_of()
    optimizer.step()
    plain.step()
    moved, usual = (o.problems["z"].module.v.detach() - Blocks().z0 for o in (optimizer, plain))
    assert relative_error(moved, 2.0 * usual) < 1e-12
    with pytest.raises(mlo.ConfigurationError, match=r"returned the quantities \[\] for"):
        run_of(lower=Doubled(wrong=True)).step()


# ------------------------------ refusals


def test_an_unknown_estimator_is_refused():
    with pytest.raises(mlo.ProblemError, match="Did you mean 'saga'"):
        estimator_from("w", "sagas")
    with pytest.raises(mlo.ProblemError, match=r"must be an mlo\.Estimator"):
        estimator_from("w", 3)


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_of_storm_outside_its_range_is_refused(rate):
    with pytest.raises(mlo.ConfigurationError, match="rate from 0 to 1"):
        mlo.Storm(rate=rate)


def test_saga_refuses_batches_without_a_number():
    estimates = Estimates("w", mlo.Saga(), of_total=False)
    with pytest.raises(mlo.ProblemError, match=r"data=mlo\.IndexedBatches"):
        estimates.estimate(
            "all", (torch.ones(2),), {"g": torch.ones(1)}, point=dict, again=lambda point: {}
        )
