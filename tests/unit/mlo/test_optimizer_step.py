"""The differentiable step: the same numbers as the optimizer's own step, and its exact
derivative.
"""

from __future__ import annotations

import threading

import pytest
import torch
from keeping_optimizers import DrawingNoise, Keeping

import mlo
from mlo.optimizer_step import OptimizerStep
from mlo.optimizer_traits import decays_outside_gradient
from mlo.testing import Vector, identical, relative_error

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2),
    "sgd_dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.4),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd_maximize": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
}


def make(optimizer, dtype=torch.float64, size=4, **options):
    generator = torch.Generator().manual_seed(1)
    module = Vector(torch.randn(size, generator=generator, dtype=dtype))
    problem = mlo.Problem(
        "w",
        module=module,
        optimizer=OPTIMIZERS[optimizer](module.parameters()),
        loss=loss,
        **options,
    )
    return problem, module.v, torch.randn(size, generator=generator, dtype=dtype)


def loss(own, batch):
    return own.v.sum()


def real_step(problem, parameter, gradient):
    parameter.grad = gradient.clone()
    if problem.grad_clip:
        torch.nn.utils.clip_grad_norm_([parameter], problem.grad_clip)
    problem.optimizers["w"].step()


def captured(name, steps_before):
    """What `make` makes, after so many steps, and the next one as it was captured."""
    problem, parameter, gradient = make(name)
    for k in range(steps_before):
        real_step(problem, parameter, gradient + k)
    return problem, parameter, gradient, OptimizerStep.capture(problem)


@pytest.mark.parametrize("steps_before", [0, 3], ids=["fresh", "with_state"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_value_and_derivative_are_those_of_the_real_step(name, steps_before):
    problem, parameter, gradient, step = captured(name, steps_before)
    before = {"v": parameter.detach().clone()}
    g = gradient.clone().requires_grad_()
    after = step.apply(before, {"v": g})["v"]
    v = torch.linspace(-1, 1, len(g), dtype=g.dtype)
    (found,) = torch.autograd.grad(after, g, v)
    e = 1e-6
    expected = [
        (
            step.apply(before, {"v": gradient + e * d})["v"]
            - step.apply(before, {"v": gradient - e * d})["v"]
        )
        @ v
        / (2 * e)
        for d in torch.eye(len(g), dtype=g.dtype)
    ]
    # Adam's first step is nearly a sign: its derivative is tiny, and the difference then carries
    # rounding of 1e-10.
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-6, atol=1e-9)
    real_step(problem, parameter, gradient)
    # NAdam itself keeps the product of its momenta in float32.
    assert relative_error(after.detach(), parameter.detach()) < (1e-8 if name == "nadam" else 1e-14)


@pytest.mark.parametrize("steps_before", [0, 3], ids=["fresh", "with_state"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_coefficient_of_a_linear_step_is_its_derivative(name, steps_before):
    """The coefficient of a linear step is its derivative, and other steps have none."""
    _, parameter, gradient, step = captured(name, steps_before)
    if not name.startswith("sgd"):
        assert step.gradient_coefficient("v") is None
        return
    g = gradient.clone().requires_grad_()
    v = torch.linspace(-1, 1, len(g), dtype=g.dtype)
    (expected,) = torch.autograd.grad(step.apply({"v": parameter.detach()}, {"v": g})["v"], g, v)
    torch.testing.assert_close(step.gradient_coefficient("v") * v, expected, rtol=1e-14, atol=0)


def test_a_subclass_of_sgd_may_make_another_step():
    class Signs(torch.optim.SGD):
        pass

    module = Vector(torch.ones(2))
    problem = mlo.Problem(
        "w", module=module, optimizer=Signs(module.parameters(), lr=0.1), loss=loss
    )
    assert OptimizerStep.capture(problem).gradient_coefficient("v") is None


def test_a_linear_step_can_be_captured_without_its_state():
    """A linear step can be captured without its state, and is not applied then."""
    problem, parameter, gradient = make("sgd_momentum")
    real_step(problem, parameter, gradient)
    step = OptimizerStep.capture(problem, linear_state=False)
    assert step.gradient_coefficient("v") == OptimizerStep.capture(problem).gradient_coefficient(
        "v"
    )
    assert step.differentiable_state() == {}
    with pytest.raises(mlo.EngineError, match="was not kept"):
        step.apply({"v": parameter.detach()}, {"v": gradient})
    problem, parameter, gradient = make("adam")
    real_step(problem, parameter, gradient)
    assert set(OptimizerStep.capture(problem, linear_state=False).differentiable_state()) == {
        ("v", ("exp_avg",)),
        ("v", ("exp_avg_sq",)),
    }


@pytest.mark.parametrize("name", ["adam", "sgd_momentum"])
def test_clipping_is_part_of_the_step(name):
    problem, parameter, gradient = make(name, grad_clip=0.5)
    assert gradient.norm() > 0.5
    step = OptimizerStep.capture(problem)
    after = step.apply({"v": parameter.detach().clone()}, {"v": gradient})["v"]
    real_step(problem, parameter, gradient)
    assert relative_error(after.detach(), parameter.detach()) < 1e-14


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "rmsprop", "adagrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_exactly_zero_has_a_finite_derivative(name, dtype):
    """A class that is absent from a batch leaves its embedding's gradient at exactly zero."""
    problem, parameter, gradient = make(name, dtype)
    gradient[1] = 0.0
    g = gradient.clone().requires_grad_()
    after = OptimizerStep.capture(problem).apply({"v": parameter.detach().clone()}, {"v": g})["v"]
    (found,) = torch.autograd.grad(after, g, torch.ones_like(g))
    assert torch.isfinite(found).all()
    if name == "adam":  # the step is -lr g / (|g| + eps) at the first step: slope -lr / eps at zero
        assert found[1] == pytest.approx(-0.1 / 1e-8, rel=1e-5)


def test_capturing_and_applying_leave_the_optimizer_alone():
    problem, parameter, gradient = make("adam")
    real_step(problem, parameter, gradient)
    state = {k: v.clone() for k, v in problem.optimizers["w"].state[parameter].items()}
    value = parameter.detach().clone()
    OptimizerStep.capture(problem).apply({"v": parameter.detach()}, {"v": gradient})
    assert torch.equal(parameter, value)
    assert identical(state, dict(problem.optimizers["w"].state[parameter]))
    assert torch.get_default_dtype() == torch.float32


def test_the_learning_rate_is_that_of_the_step():
    problem, parameter, gradient = make("sgd")
    step = OptimizerStep.capture(problem)
    problem.optimizers["w"].param_groups[0]["lr"] = 99.0
    after = step.apply({"v": parameter.detach()}, {"v": gradient})["v"]
    assert relative_error(after, parameter.detach() - 0.1 * gradient) < 1e-15


def test_an_optimizer_without_a_differentiable_step():
    """An optimizer without a differentiable step is refused by name."""

    class Plain(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-0.1)

    module = Vector(torch.ones(2))
    problem = mlo.Problem("w", module=module, optimizer=Plain(module.parameters()), loss=loss)
    with pytest.raises(mlo.EngineError, match="Plain has no differentiable step"):
        OptimizerStep.capture(problem).apply({"v": module.v.detach()}, {"v": torch.ones(2)})


# ------------------------------ complex parameters


class OwnSgd(torch.optim.SGD):
    """Not of torch.optim, so its derivative is compared with a difference."""


class OwnAdam(torch.optim.Adam):
    """The same of Adam."""


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("own", [OwnSgd, OwnAdam])
def test_the_derivative_of_a_complex_step_is_compared_right(own, dtype):
    """A difference of real parts alone would be off, and refuse the optimizer."""
    options = {"lr": 0.1, "momentum": 0.9} if own is OwnSgd else {"lr": 0.1}

    def trained(optimizer):
        w = Vector(torch.tensor([1.0 + 1.0j, 2.0 - 1.0j], dtype=dtype))
        x = Vector(torch.ones(2, dtype=dtype.to_real()))
        lower = mlo.Problem(
            "w",
            module=w,
            optimizer=optimizer(w.parameters(), **options),
            loss=lambda w, _, *, x: (w.v - x.v * (1.5 + 2.0j)).abs().square().sum(),
        )
        upper = mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
            loss=lambda x, _, *, w: w.v.abs().square().sum(),
        )
        list(mlo.MultilevelOptimizer([lower, upper], "one_step").run(3))
        return x.v.detach()

    assert relative_error(trained(own), trained(own.__bases__[0])) < 1e-6


def test_zero_parts_of_a_complex_gradient_are_moved_off_zero():
    """Adam treats them as two entries, and autograd has no derivative of its root at zero."""
    module = Vector(torch.zeros(3, dtype=torch.complex128))
    problem = mlo.Problem(
        "w",
        module=module,
        optimizer=torch.optim.Adam(module.parameters(), lr=0.1),
        loss=lambda w, _: w.v.abs().square().sum(),
    )
    step = OptimizerStep.capture(problem)
    g = torch.tensor([1.0j, 2.0, 0.0], dtype=torch.complex128, requires_grad=True)
    moved = step.apply({"v": module.v.detach()}, {"v": g})["v"]
    (slope,) = torch.autograd.grad(torch.view_as_real(moved).sum(), g)
    # The first step −lr g / (|g| + eps) has the slope −lr / eps at zero, and elsewhere nearly none.
    expected = torch.tensor([[-1e7, 0.0], [0.0, -1e7], [-1e7, -1e7]], dtype=torch.float64)
    assert relative_error(torch.view_as_real(slope), expected) < 1e-6


@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_parameters_of_several_dtypes_keep_them(grad_clip):
    kinds = (torch.float64, torch.float32, torch.bfloat16)
    parameters = torch.nn.ParameterList([torch.ones(2, dtype=kind) for kind in kinds])
    problem = mlo.Problem(
        "w",
        module=parameters,
        optimizer=torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        loss=lambda w, _: sum(p.double().sum() for p in w),
        grad_clip=grad_clip,
    )
    theta = {name: p.detach() for name, p in problem.parameters.items()}
    moved = OptimizerStep.capture(problem).apply(theta, theta)
    assert [tensor.dtype for tensor in moved.values()] == list(kinds)


def test_a_repeated_step_draws_nothing():
    module = Vector(torch.ones(2))
    optimizer = DrawingNoise(module.parameters(), dict)
    step = OptimizerStep.capture(mlo.Problem("w", module=module, optimizer=optimizer, loss=loss))
    state = torch.get_rng_state()
    step.apply({"v": torch.ones(2)}, {"v": torch.ones(2)})
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_twin_of_a_step_cannot_have_is_refused():
    module = Vector(torch.ones(2))
    optimizer = Keeping(module.parameters(), threading.Lock)
    problem = mlo.Problem("w", module=module, optimizer=optimizer, loss=loss)
    step = OptimizerStep.capture(problem)
    with pytest.raises(mlo.EngineError, match="Keeping has attributes that cannot be copied"):
        step.apply({"v": torch.ones(2)}, {"v": torch.ones(2)})
    assert decays_outside_gradient(optimizer, optimizer.param_groups[0]) is None
