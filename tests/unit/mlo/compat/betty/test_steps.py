"""Steps that are Betty's own, against torch.optim on the mean gradient."""

from __future__ import annotations

import pytest
import torch
from small_betty_programs import Value
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from mlo.compat.betty import Config, ImplicitProblem
from mlo.compat.betty.steps import OwnStep, call, give_groups

GRADIENTS = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)


def problem(kind=Adam, methods=None, **options):
    module = Value(1.0, 2.0)
    made = type("Own", (ImplicitProblem,), methods or {})("own", Config(**options), module)
    made.optimizer = kind(module.parameters(), lr=0.1)
    return made


def stepped(own, made):
    for gradient in GRADIENTS:
        made.module.v.grad = gradient.clone()
        made._count += 1
        own.step()
    return made.module.v.detach()


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_mean_of_several_gradients_makes_one_step(clip):
    made = problem(gradient_accumulation=2, gradient_clipping=clip)
    found = stepped(OwnStep(made, 2), made)
    expected = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = Adam([expected], lr=0.1)
    for mean in GRADIENTS.view(2, 2, 2).mean(1):
        expected.grad = mean.clone()
        if clip:
            nn.utils.clip_grad_norm_([expected], clip)
        optimizer.step()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-14, atol=0.0)


def test_a_gradient_callback_sees_the_sums():
    seen = []
    methods = {"grad_callback": lambda self: seen.append(self.module.v.grad.clone())}
    made = problem(methods=methods, gradient_accumulation=2)
    stepped(OwnStep(made, 2), made)
    assert torch.equal(seen[0], GRADIENTS[0] / 2)
    assert torch.equal(seen[1], GRADIENTS[:2].mean(0))


def test_a_step_of_the_users_own():
    def custom_optimizer_step(self):
        self.module.v.data.sub_(self.module.v.grad)

    made = problem(methods={"custom_optimizer_step": custom_optimizer_step})
    found = stepped(OwnStep(made, 1), made)
    assert torch.equal(found, torch.tensor([1.0, 2.0]).double() - GRADIENTS.sum(0))


def test_a_copy_does_not_move_the_original():
    """The core tries steps on copies of optimizers, to find out what their weight decay is."""
    made = problem(gradient_accumulation=2)
    own = OwnStep(made, 2)
    own.param_groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1}]
    with pytest.raises(RuntimeError, match="cannot be tried on a copy"):
        own.step()


def test_its_groups_and_state_are_the_optimizers():
    made = problem(gradient_accumulation=2)
    own = OwnStep(made, 2)
    made.optimizer.param_groups[0]["lr"] = 0.7
    assert own.param_groups[0]["lr"] == 0.7
    stepped(own, made)
    state = own.state_dict()
    assert state["state"][0]["exp_avg"].abs().sum() > 0
    other = problem(gradient_accumulation=2)
    OwnStep(other, 2).load_state_dict(state)
    assert other.optimizer.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 4),
        lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step),
    ],
    ids=["closed form", "a function"],
)
def test_groups_are_exchanged_together_with_the_schedulers(schedule):
    net = nn.Linear(2, 1)
    groups = [{"params": [net.weight], "lr": 0.4}, {"params": [net.bias]}]
    optimizer = AdamW(net.parameters(), lr=0.1)
    scheduler = schedule(optimizer)
    give_groups(optimizer, scheduler, groups)
    expected = AdamW([dict(group) for group in groups], lr=0.1)
    other = schedule(expected)
    for _ in range(3):
        for each in (optimizer, expected, scheduler, other):
            each.step()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in expected.param_groups]
    assert optimizer.param_groups[0]["lr"] != optimizer.param_groups[1]["lr"]


def test_groups_may_be_bare_parameters():
    net = nn.Linear(2, 1)
    optimizer = SGD(net.parameters(), lr=0.1)
    give_groups(optimizer, None, [[net.weight]])
    assert [group["params"] for group in optimizer.param_groups] == [[net.weight]]


def test_calling_says_whether_there_was_a_method():
    made = problem(methods={"grad_callback": lambda self: None})
    assert call(made, "grad_callback")
    assert not call(made, "param_callback")
