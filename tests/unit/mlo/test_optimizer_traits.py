"""What is known of an optimizer without its step: whether its decay is a penalty."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from keeping_optimizers import CountingInGroups, DrawingNoise, Keeping, ReferringToItself

import mlo
from mlo.optimizer_traits import decays_outside_gradient, l2_penalty, moves_on_surface
from mlo.testing import Vector


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (torch.optim.SGD, {"weight_decay": 0.2}, 0.2),
        (torch.optim.SGD, {"weight_decay": 0.1, "maximize": True}, -0.1),
        (torch.optim.AdamW, {"weight_decay": 0.1}, 0.0),
    ],
)
def test_weight_decay_counts_as_a_penalty_unless_decoupled(kind, options, expected):
    module = Vector(torch.ones(2))
    optimizer = kind(module.parameters(), lr=0.1, **options)
    problem = mlo.Problem("w", module=module, optimizer=optimizer, loss=lambda w, _: w.v.sum())
    assert l2_penalty(problem) == {"v": expected}


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (Keeping, dict),
        (Keeping, lambda: torch.zeros(())),
        (Keeping, lambda: torch.Generator().manual_seed(3)),
        (DrawingNoise, dict),
        (CountingInGroups, dict),
    ],
    ids=["dict", "tensor", "generator", "noise", "group"],
)
def test_a_trial_step_changes_nothing_of_the_run(kind, kept):
    """An engine tries whether weight decay is a penalty; the training is as without it."""
    w, x = Vector(torch.arange(3.0)), Vector(torch.ones(3))
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=kind(w.parameters(), kept),
        loss=lambda w, batch, *, x: ((w.v - x.v) ** 2).sum(),
        steps=3,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, batch, *, w: (w.v**2).sum(),
    )
    torch.manual_seed(0)
    called = []
    lower.optimizers["w"].register_step_post_hook(lambda *_: called.append(1))
    mlo.MultilevelOptimizer([lower, upper], "identity").step()
    assert len(called) == 3

    plain = Vector(torch.arange(3.0))
    optimizer = kind(plain.parameters(), kept)
    torch.manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        ((plain.v - 1) ** 2).sum().backward()
        optimizer.step()
    assert torch.equal(w.v, plain.v)


def test_a_twin_of_an_optimizer_refers_to_itself():
    module = Vector(torch.ones(2))
    optimizer = ReferringToItself(module.parameters(), dict)
    assert decays_outside_gradient(optimizer, optimizer.param_groups[0]) is False


def test_what_has_been_put_around_a_step_need_not_be_copied():
    """Schedulers and other libraries replace the `step` of the object; a twin has the class's."""
    module = Vector(torch.ones(2))
    optimizer = Keeping(module.parameters(), dict)
    optimizer.step = functools.partial(Keeping.step, optimizer, threading.Lock())
    assert decays_outside_gradient(optimizer, optimizer.param_groups[0]) is False


@pytest.mark.parametrize(
    ("dtype", "lr"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4), (torch.float32, 1e-8)]
)
def test_a_step_lost_by_rounding_shows_no_surface(dtype, lr):
    """θ - lr θ rounds to θ, while a gradient of another direction moves the small entries."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1e-6]).to(dtype))
    optimizer = Keeping([parameter], dict)
    optimizer.param_groups[0]["lr"] = lr
    assert not moves_on_surface(optimizer)
