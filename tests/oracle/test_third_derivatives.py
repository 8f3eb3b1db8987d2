"""Losses without a third derivative, or with a wrong one, below a middle problem that needs it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from mlo.hypergradient import double_backward

NORMS = {
    "BatchNorm": lambda: nn.BatchNorm1d(6),
    "InstanceNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    ),
    "LayerNorm": lambda: nn.LayerNorm(6),
}
OTHERS = {
    "GroupNorm": lambda: nn.GroupNorm(1, 6),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "BatchNorm in eval mode": lambda: nn.BatchNorm1d(6).eval(),
}
NEED_THIRD = [
    {"name": "unroll", "steps": 2},
    {"net": "one_step", "aug": "gmres"},
    {"net": "one_step", "aug": {"name": "direct", "damping": 1.0}},
    {"net": "one_step", "aug": {"name": "unroll", "steps": 2}},
]


def three_levels(norm, engines, *, penalty=False, reads_top=False):
    """A network with a norm below the shift of its inputs (or its decay), below a penalty."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 4).double(), torch.randn(30, 1).double()
    net = nn.Sequential(nn.Linear(4, 6), norm(), nn.Tanh(), nn.Linear(6, 1)).double()
    net[1].requires_grad_(False)
    aug = nn.ParameterDict({"v": torch.full((4,), -1.0).double()})
    reg = nn.ParameterDict({"v": torch.tensor(-2.0).double()})

    def mse(net, shift=0.0):
        return (net(x + shift) - y).square().mean()

    def net_loss(net, _, *, aug):
        if penalty:
            return mse(net) + (aug["v"].exp() * net[0].weight.square()).sum()
        return mse(net, aug["v"].exp())

    def net_loss_of_both(net, _, *, aug, reg):
        return mse(net, aug["v"].exp() * reg["v"].exp())

    def aug_loss(aug, _, *, net, reg):
        return mse(net) + reg["v"].exp() * aug["v"].square().sum()

    losses = {
        "net": (net, net_loss_of_both if reads_top else net_loss),
        "aug": (aug, aug_loss),
        "reg": (reg, lambda reg, _, *, net: mse(net)),
    }
    problems = [
        mlo.Problem(
            name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), loss=loss
        )
        for name, (module, loss) in losses.items()
    ]
    return mlo.MultilevelOptimizer(problems, engines)


@pytest.mark.parametrize("engines", NEED_THIRD, ids=str)
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_a_norm_without_a_third_derivative_is_refused(norm, engines):
    words = "layer_norm, whose third derivative is wrong" if norm == "LayerNorm" else "batch_norm"
    with pytest.raises(mlo.EngineError, match=rf"Problem 'net'.*{words}.*of problem 'aug'"):
        three_levels(NORMS[norm], engines).step()


@pytest.mark.parametrize("engines", NEED_THIRD, ids=str)
@pytest.mark.parametrize("norm", sorted(OTHERS))
def test_other_norms_have_one(norm, engines):
    three_levels(OTHERS[norm], engines).step()


@pytest.mark.parametrize("lowest", ["one_step", {"name": "unroll", "steps": 2}, "gmres"], ids=str)
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_one_step_in_the_middle_needs_no_third_derivative(norm, lowest):
    three_levels(NORMS[norm], {"net": lowest, "aug": "one_step"}).step()


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_one_step_needs_one_if_the_loss_reads_the_top_too(norm):
    with pytest.raises(mlo.EngineError, match=r"Problem 'net'.*of problem 'aug'") as caught:
        three_levels(NORMS[norm], "one_step", reads_top=True).step()
    assert "would not" not in str(caught.value)


def test_the_message_names_an_engine_that_needs_none():
    with pytest.raises(mlo.EngineError, match=r"'gmres' of problem 'aug' \('one_step' would not\)"):
        three_levels(NORMS["BatchNorm"], NEED_THIRD[1]).step()


@pytest.mark.parametrize("engines", NEED_THIRD[1:], ids=str)
def test_statistics_that_nothing_moves_need_none(engines):
    """The decay of weights does not pass through the norm of one step."""
    of_layer_norm, of_group_norm = (
        three_levels(norm, engines, penalty=True)
        for norm in (NORMS["LayerNorm"], OTHERS["GroupNorm"])
    )
    of_layer_norm.step(), of_group_norm.step()
    found, expected = (opt.gradient("reg")["v"] for opt in (of_layer_norm, of_group_norm))
    assert found != 0.0 and torch.allclose(found, expected, rtol=1e-9)


def test_an_error_of_an_unlisted_operation_is_explained(monkeypatch):
    """One that PyTorch refuses in the middle of its backward pass."""
    monkeypatch.setattr(double_backward, "NO_THIRD_DERIVATIVES", {})
    with pytest.raises(mlo.EngineError, match=r"Problem 'net'.*3rd\+ order.*of problem 'aug'"):
        three_levels(NORMS["BatchNorm"], NEED_THIRD[1]).step()


def test_a_wrong_third_derivative_would_be_silent(monkeypatch):
    """GroupNorm of one group is LayerNorm: what is refused differs from it."""
    monkeypatch.setattr(double_backward, "NO_THIRD_DERIVATIVES", {})
    gradients = []
    for norm in (NORMS["LayerNorm"], OTHERS["GroupNorm"]):
        optimizer = three_levels(norm, NEED_THIRD[1])
        list(optimizer.run(2))
        gradients.append(optimizer.gradient("reg")["v"])
    assert not torch.allclose(*gradients, rtol=1e-2)
