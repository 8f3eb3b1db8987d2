"""States that were edited, or are of another version, are refused whole, or work."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import mlo
from mlo.testing import Vector, identical

REPLACEMENTS = (None, -1, 10**9, "x", torch.zeros(7), [], {}, True)
DELETED = object()


def training(w, batch, *, x):
    return ((w.v - x.v) ** 2).sum() + (w.v * batch).sum()


def validation(x, batch, *, w):
    return ((w.v + batch) ** 2).sum() + (x.v**2).sum()


def optimizer():
    """Momentum, a schedule, an average, a warm-started solve, a generator: a state with all."""
    torch.manual_seed(0)
    w, x = Vector(torch.ones(3)), Vector(torch.ones(3))
    w.register_buffer("mean", torch.ones(2), persistent=False)
    sgd = torch.optim.SGD(w.parameters(), lr=0.1, momentum=0.9)
    adam = torch.optim.Adam(x.parameters(), lr=0.1)
    warm = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10)
    data = [torch.full((3,), 0.1 * k) for k in range(4)]
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=sgd,
        scheduler=torch.optim.lr_scheduler.SequentialLR(sgd, [warm, cosine], milestones=[2]),
        loss=training,
        data=data,
        average="ema",
        generators=[torch.Generator()],
    )
    upper = mlo.Problem("x", module=x, optimizer=adam, loss=validation, data=data[1:])
    engine = {"name": "cg", "warm_start": True}
    return mlo.MultilevelOptimizer([lower, upper], hypergradient=engine, on_nonfinite=None)


def places(tree, above=()):
    """The path of every entry of a nested state."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree[:2])
    for key, value in entries:
        yield (*above, key)
        if isinstance(value, (dict, list)) and len(value) < 100:
            yield from places(value, (*above, key))


def changed(state, path, value):
    """A copy of a state with another value at a path, or none."""
    other = copy.deepcopy(state)
    within = other
    for key in path[:-1]:
        within = within[key]
    if value is DELETED:
        del within[path[-1]]
    else:
        within[path[-1]] = value
    return other


@pytest.fixture(scope="module")
def state():
    made = optimizer()
    list(made.run(2))
    return made.state_dict()


@pytest.mark.slow
def test_every_edit_of_a_state_is_refused_whole_or_works(state):
    """Nothing but a CheckpointError, and then nothing has changed; or the run continues."""
    run, refused, taken = optimizer(), 0, 0
    list(run.run(1))
    before = run.state_dict()
    for path in places(state):
        for value in (DELETED, *REPLACEMENTS):
            edited = changed(state, path, value)
            try:
                with warnings.catch_warnings():
                    # Any other warning tells of an entry that is used before it is checked.
                    warnings.simplefilter("error")
                    warnings.simplefilter("ignore", mlo.CheckpointWarning)
                    run.load_state_dict(edited)
            except mlo.CheckpointError:
                refused += 1
                assert identical(before, run.state_dict()), (path, value)
                continue
            taken += 1
            run.step()
            run = optimizer()
            list(run.run(1))
            before = run.state_dict()
    assert refused > 5 * taken > 0


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 3, "saved by a newer mlo"),
        (("version",), None, "has version None"),
        (("round",), -3, "round of the state must be a count, got -3"),
        (("round",), True, "must be a count, got True"),
        (("round",), DELETED, "lacks round"),
        (("extra",), 1, "an entry extra, which this version of mlo does not know"),
        (("problems", "w", "updates"), -1, r"problems\.w\.updates of the state must be a count"),
        (("problems", "w", "module"), 3, r"problems\.w\.module of the state must be a mapping"),
        (("problems", "w", "more"), 3, r"an entry problems\.w\.more"),
        (("problems", "w", "memory", "q"), 3, r"problems\.w\.memory\.q of the state must be a t"),
        (("problems", "w", "schedulers", "w", "last_epoch"), "x", r"w\.last_epoch of the state"),
        (("random", "numpy", "pos"), 10**9, "numpy's position"),
        (("random", "cpu"), torch.zeros(7), "random state does not fit"),
        (("random", "cpu"), [], r"is damaged \(its cpu is a list\)"),
        (("random", "cuda"), [1], r"\(its cuda are no list of tensors\)"),
        (("random", "python"), torch.zeros(7), r"\(its python is a Tensor\)"),
        (("random", "numpy"), torch.zeros(7), r"\(its numpy is a Tensor\)"),
        (("random", "numpy", "pos"), torch.zeros(()), r"\(its numpy\.pos is a Tensor\)"),
        (("random", "numpy", "key"), torch.zeros(7), r"\(its numpy\.key is no tensor of 624"),
        (("random", "python", "words"), torch.zeros(625), r"\(its python\.words is a Tensor\)"),
        (("random", "python", "words"), [0.5] * 625, r"\(its python\.words are not 625 whole"),
        (("random", "python", "gauss"), DELETED, r"\(it lacks python\.gauss\)"),
        (("problems", "w", "data", "pass_start"), torch.zeros(7), "data: it is a Tensor"),
    ],
)
def test_the_message_names_the_entry(state, path, value, words):
    with pytest.raises(mlo.CheckpointError, match=words):
        optimizer().load_state_dict(changed(state, path, value))


def test_a_state_that_was_not_edited_is_taken(state):
    run, other = optimizer(), optimizer()
    run.load_state_dict(state)
    list(other.run(2))
    run.step(), other.step()
    assert identical(run.state_dict(), other.state_dict())


@pytest.mark.parametrize("kernels", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_kernels_of_a_step_are_those_of_this_run(kernels):
    """A state of another device, or of an earlier version, chose others for the same steps."""

    def run(**options):
        module = Vector(torch.ones(3))
        adam = torch.optim.Adam(module.parameters(), lr=0.1, **options)
        problem = mlo.Problem("x", module=module, optimizer=adam, loss=lambda x, _: x.v.sin().sum())
        return mlo.MultilevelOptimizer([problem]), module, adam

    old, before, _ = run(foreach=None)
    old.step()
    new, after, adam = run(**kernels)
    own = [dict(group) for group in adam.param_groups]
    new.load_state_dict(old.state_dict())
    for group, mine in zip(adam.param_groups, own, strict=True):
        assert (group["foreach"], group["fused"]) == (mine["foreach"], mine["fused"])
    old.step(), new.step()
    torch.testing.assert_close(after.v, before.v)
