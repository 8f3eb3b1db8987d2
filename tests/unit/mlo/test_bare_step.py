"""The step of an optimizer without its wrappers: the same numbers, and when it is not made."""

from __future__ import annotations

import warnings
from types import MethodType

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from mlo import bare_step
from mlo.bare_step import leaves_gradients, make_step, needs_whole_step

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "SGD with Nesterov's": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "SGD, upwards": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "SGD, rate a tensor": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "Adam, upwards": lambda p: torch.optim.Adam(p, lr=0.01, maximize=True),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
HALVES = {
    "SGD in groups": lambda p: torch.optim.SGD(
        [{"params": p[:1]}, {"params": p[1:], "momentum": 0.9, "lr": 0.3}], lr=0.1
    ),
    "Adam in groups": lambda p: torch.optim.Adam(
        [{"params": p[:1]}, {"params": p[1:], "betas": (0.5, 0.9)}], lr=0.1
    ),
}


def parameters(count: int = 3) -> list[nn.Parameter]:
    noise = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(2, 3, generator=noise)) for _ in range(count)]


def give_gradients(own: list[nn.Parameter], step: int, *, late: bool = True) -> None:
    noise = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(own):
        gradient = torch.randn(2, 3, generator=noise)
        # The last one has none at first: its state begins later than that of the others.
        parameter.grad = None if late and index == len(own) - 1 and step < 2 else gradient


def whole(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def after(make, move) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    own = parameters()
    optimizer = make(own)
    for step in range(5):
        # (PyTorch's fused SGD fails where a buffer begins later than others, torch 2.14.1.)
        give_gradients(own, step, late=not optimizer.defaults.get("fused"))
        move(optimizer)
    state = [
        value
        for entries in optimizer.state_dict()["state"].values()
        for value in entries.values()
        if isinstance(value, torch.Tensor)
    ]
    return [parameter.detach() for parameter in own], state


@pytest.mark.parametrize("name", [*OPTIMIZERS, *HALVES])
def test_it_is_the_whole_step_bit_for_bit(name):
    make = {**OPTIMIZERS, **HALVES}[name]
    for found, expected in zip(after(make, make_step), after(make, whole), strict=True):
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["SGD with momentum", "Adam", "AdamW"])
def test_the_function_inside_makes_later_steps(name, monkeypatch):
    """From the second step on neither `step` nor its bare code is called."""
    own = parameters(2)
    optimizer = OPTIMIZERS[name](own)
    for step in (2, 3):
        give_gradients(own, step)
        make_step(optimizer)
        monkeypatch.setattr(bare_step, "_BARE", {type(optimizer): (type(optimizer).step, fails)})
    assert not any(torch.equal(one, other) for one, other in zip(own, parameters(2), strict=True))


def fails(*_: object) -> None:
    raise AssertionError("this is not to be called")


class Own(torch.optim.SGD):
    """A class of the user's own."""


def changed(optimizer, monkeypatch):
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args, **kwargs: step(*args, **kwargs))


def replaced(optimizer, monkeypatch):
    step = optimizer.step
    optimizer.step = MethodType(lambda _: step(), optimizer)


def scheduled_over_own(optimizer, monkeypatch):
    replaced(optimizer, monkeypatch)
    torch.optim.lr_scheduler.ConstantLR(optimizer)


def hooked_before(optimizer, monkeypatch):
    optimizer.register_step_pre_hook(lambda *_: None)


def hooked_after(optimizer, monkeypatch):
    optimizer.register_step_post_hook(lambda *_: None)


def hooked_everywhere(optimizer, monkeypatch):
    hooks = {0: lambda *_: None}
    monkeypatch.setattr(torch_optimizer, "_global_optimizer_post_hooks", hooks)


def untold(optimizer, monkeypatch):
    missing = (torch_optimizer, "_a_name_that_a_later_version_lacks")
    monkeypatch.setattr(bare_step, "ASKED", (*bare_step.ASKED, missing))


def differentiable(optimizer, monkeypatch):
    optimizer.defaults["differentiable"] = True


REASONS = {
    changed: "was changed",
    replaced: "a step of its own",
    scheduled_over_own: "a step of its own",
    hooked_before: "registered on it",
    hooked_after: "registered on it",
    hooked_everywhere: "on all optimizers",
    untold: "does not tell",
    differentiable: "differentiable=True",
}


@pytest.mark.parametrize("act", REASONS, ids=lambda act: act.__name__)
def test_each_reason_takes_the_whole_step(act, monkeypatch):
    own = parameters(1)
    optimizer = torch.optim.SGD(own, lr=0.1)
    assert needs_whole_step(optimizer) == ""
    assert leaves_gradients(optimizer)
    act(optimizer, monkeypatch)
    assert REASONS[act] in needs_whole_step(optimizer)
    assert not leaves_gradients(optimizer)

    called = []
    monkeypatch.setattr(optimizer, "step", lambda: called.append(True), raising=False)
    make_step(optimizer)
    assert called == [True]


def test_a_class_of_the_users_own_takes_the_whole_step():
    optimizer = Own(parameters(1), lr=0.1)
    assert not leaves_gradients(optimizer)
    own = type("Other", (torch.optim.SGD,), {"step": lambda self: None})(parameters(1), lr=0.1)
    assert "not torch.optim's" in needs_whole_step(own)


def test_a_profiler_sees_the_step_by_its_name():
    own = parameters(1)
    optimizer = torch.optim.SGD(own, lr=0.1)
    give_gradients(own, 2)
    with torch.profiler.profile() as profile:
        assert "profiler" in needs_whole_step(optimizer)
        make_step(optimizer)
    assert any("Optimizer.step#SGD" in event.name for event in profile.events())


def test_a_schedulers_count_of_steps_goes_up():
    """A scheduler wraps `step` to see calls, and warns if there was none."""
    own = parameters(1)
    optimizer = torch.optim.SGD(own, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert needs_whole_step(optimizer) == ""
    give_gradients(own, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_step(optimizer)
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "leaves"),
    [("SGD", True), ("Adam", True), ("SGD, foreach", False), ("SGD, fused", False),
     ("SGD, upwards", False), ("RMSprop", False)],
)  # fmt: skip
def test_which_steps_leave_gradients_alone(name, leaves):
    own = parameters()
    optimizer = OPTIMIZERS[name](own)
    assert leaves_gradients(optimizer) is leaves
    give_gradients(own, 2)
    before = [(parameter.grad, parameter.grad.clone()) for parameter in own]
    make_step(optimizer)
    if leaves:
        assert all(torch.equal(gradient, copied) for gradient, copied in before)


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_enabled_afterwards_as_before(enabled, monkeypatch):
    optimizer = torch.optim.SGD(parameters(1), lr=0.1)
    with torch.set_grad_enabled(enabled):
        make_step(optimizer)
        assert torch.is_grad_enabled() is enabled
        monkeypatch.setitem(bare_step._QUICK, torch.optim.SGD, fails)
        with pytest.raises(AssertionError):
            make_step(optimizer)
        assert torch.is_grad_enabled() is enabled
