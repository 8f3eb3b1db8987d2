"""Declarations that are refused, and what is said of them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from small_graphs import problem
from torch import nn
from torch.utils.data import TensorDataset

import mlo


def test_a_parameter_missing_from_its_optimizer_is_refused():
    module = nn.Linear(2, 2)
    with pytest.raises(mlo.ProblemError, match="lacks 1 of 2 parameters \\('bias'\\)"):
        problem("w", module=module, optimizer=torch.optim.SGD([module.weight], lr=0.1))


def test_weights_tied_by_their_data_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight.data = net[0].weight.data
    with pytest.raises(mlo.ProblemError, match=r"'0\.weight' and '1\.weight' share memory"):
        problem("w", module=net)
    net[1].weight = net[0].weight
    assert len(problem("w", module=net).parameters) == 3


def test_a_frozen_parameter_needs_no_optimizer():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    p = problem("w", module=module, optimizer=torch.optim.SGD([module.weight], lr=0.1))
    assert list(p.parameters) == ["weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(2))]
)
def test_a_module_in_torchscript_is_refused(make):
    for module in (make(nn.Linear(2, 2)), nn.Sequential(make(nn.Linear(2, 2)), nn.ReLU())):
        part = r"a part of its module \(0\)" if isinstance(module, nn.Sequential) else "its module"
        with pytest.raises(mlo.ProblemError, match=f"'w': {part} was made.*Pass the Python module"):
            problem("w", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))


def test_a_lazy_module_is_refused_until_it_has_run():
    """Its optimizer may be made before; parameters get their shapes in place."""
    net = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(mlo.ProblemError, match=r"'0\.weight', '0\.bias'.*Call the module once"):
        problem("w", module=net, optimizer=optimizer)
    with torch.no_grad():
        net(torch.ones(4, 3))
    assert problem("w", module=net, optimizer=optimizer).size == 3 * 2 + 2 + 4
    with pytest.raises(mlo.ProblemError, match=r"'1\.running_mean'.*have no shape"):
        problem("w", module=nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)))


def test_a_module_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        net = nn.BatchNorm1d(2)
        mean = torch.ones(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    words = r"'weight', 'bias', 'running_mean', ….*inference_mode.*clones"
    with pytest.raises(mlo.ProblemError, match=words):
        problem("w", module=net, optimizer=optimizer)
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.register_buffer("mean", mean)
    with pytest.raises(mlo.ProblemError, match="'mean' of its module"):
        problem("w", module=net, optimizer=optimizer)
    net.mean = mean.clone()
    assert problem("w", module=net, optimizer=optimizer).size == 6


def test_an_optimizer_with_foreign_parameters_is_refused():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(mlo.ProblemError, match="2 parameters that are not in its module"):
        problem(
            "w",
            module=module,
            optimizer=torch.optim.SGD([*module.parameters(), *other.parameters()], lr=0.1),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"accumulate": 1.5}, "accumulate must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"grad_clip": -1.0}, "grad_clip must be positive"),
        ({"precision": "fp8"}, "precision must be None or 'bf16', got 'fp8'\\.$"),
        ({"precision": "fp16"}, "got 'fp16'.*underflow unless the loss is scaled.*Use 'bf16'"),
        ({"generators": torch.Generator()}, "must be a list of the torch.Generators"),
        ({"generators": [0]}, r"generators must be a list .* got \[0\]"),
        ({"loss": lambda own: own.v.sum()}, "two positional arguments"),
        ({"players": {"a": "nowhere"}}, "submodule 'nowhere', which does not exist"),
    ],
)
def test_a_wrong_declaration_is_refused_with_advice(options, message):
    with pytest.raises(mlo.ProblemError, match=message):
        problem("w", **options)


@pytest.mark.parametrize("setting", ["data", "solve_data"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": torch.ones(2)}, r"a dict, whose iteration yields its keys.*data=\[batch\]"),
        (3, "3 cannot be iterated. Pass an iterable of batches"),
        (TensorDataset(torch.ones(4, 2)), r"a TensorDataset, .*DataLoader\(data_set, batch_size"),
        (lambda: iter([None]), "function.* cannot be iterated.*whose __iter__ is that"),
    ],
)
def test_data_that_yield_no_batches_are_refused(data, message, setting):
    with pytest.raises(mlo.ProblemError, match=f"{setting}( is|=).*{message}"):
        problem("w", **{setting: data})


def test_an_integer_of_numpy_counts():
    declared = problem("w", steps=np.int64(3))
    assert declared.steps == 3
    assert type(declared.steps) is int


def test_a_name_must_be_an_identifier():
    with pytest.raises(mlo.ProblemError, match="not a Python identifier"):
        problem("my weights")


class ByEpoch:
    """A scheduler that is told the epoch, as timm's are."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, epoch, metric=None):
        pass


class Foreign:
    """A function whose parameters Python does not know, as those of compiled code may be."""

    __signature__ = "unknown"

    def __call__(self):
        pass


def test_a_scheduler_that_needs_an_argument_is_refused():
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(mlo.ProblemError, match=r"ByEpoch is called as step\(\).*needs 'epoch'"):
        problem("w", module=module, optimizer=optimizer, scheduler=ByEpoch(optimizer))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)  # gets the loss
    problem("w", module=module, optimizer=optimizer, scheduler=plateau)
    for step in (lambda *args, **options: None, lambda epoch=None: None, Foreign()):
        passing = ByEpoch(optimizer)
        passing.step, passing.state_dict, passing.load_state_dict = step, dict, dict
        problem("w", module=module, optimizer=optimizer, scheduler=passing)


def test_what_only_looks_like_an_optimizer_is_told_the_way():
    class Alike:
        param_groups: ClassVar[list] = []

    for given, told in ((Alike(), True), (torch.optim.SGD, False)):
        with pytest.raises(mlo.ProblemError, match="must be a torch") as caught:
            problem("w", module=nn.Linear(2, 2), optimizer=given)
        assert ("not derived from torch.optim.Optimizer" in str(caught.value)) is told
