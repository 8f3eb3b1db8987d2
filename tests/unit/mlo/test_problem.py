"""Declarations of problems: what is read from them, and what is refused."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ET
from typing import ClassVar

import pytest
import torch
from small_graphs import graph, problem
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

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


def two_optimizers(net):
    return torch.optim.SGD([net.weight], lr=0.1), torch.optim.Adam([net.bias], lr=0.1)


def test_several_optimizers_have_names():
    net = nn.Linear(2, 2)
    first, second = two_optimizers(net)
    listed = problem("w", module=net, optimizer=[first, second])
    assert listed.optimizers == {"0": first, "1": second}
    named = problem("w", module=net, optimizer={"matrix": first, "bias": second})
    assert named.optimizers == {"matrix": first, "bias": second}
    assert problem(
        "w", module=net, optimizer=torch.optim.SGD(net.parameters())
    ).optimizers.keys() == {"w"}


def test_several_optimizers_must_divide_the_parameters():
    net = nn.Linear(2, 2)
    first, second = two_optimizers(net)
    with pytest.raises(mlo.ProblemError, match="lacks 1 of 2 parameters \\('bias'\\)"):
        problem("w", module=net, optimizer=[first])
    with pytest.raises(mlo.ProblemError, match="two of its optimizers hold the same parameter"):
        problem("w", module=net, optimizer=[first, second, torch.optim.SGD([net.bias])])
    with pytest.raises(mlo.ProblemError, match="no optimizer was given"):
        problem("w", module=net, optimizer=[])
    with pytest.raises(mlo.ProblemError, match=r"must be a torch\.optim optimizer"):
        problem("w", module=net, optimizer=[first, torch.optim.Adam])


def test_schedulers_go_with_the_optimizers_of_their_names():
    net = nn.Linear(2, 2)
    first, second = two_optimizers(net)
    of_first = torch.optim.lr_scheduler.StepLR(first, 1)
    named = {"matrix": first, "bias": second}
    assert problem("w", module=net, optimizer=named, scheduler={"matrix": of_first}).schedulers
    with pytest.raises(mlo.ProblemError, match="scheduler 'bias' drives another optimizer"):
        problem("w", module=net, optimizer=named, scheduler={"bias": of_first})
    # The numbers of a list are no names.
    of_second = torch.optim.lr_scheduler.StepLR(second, 1)
    listed = problem("w", module=net, optimizer=[first, second], scheduler=[of_second, of_first])
    assert listed.schedulers == {"0": of_second, "1": of_first}
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(net.parameters(), lr=0.1), 1)
    with pytest.raises(mlo.ProblemError, match="drives another optimizer than the problem's"):
        problem("w", module=net, optimizer=[first, second], scheduler=[other])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"accumulate": 1.5}, "accumulate must be an integer"),
        ({"grad_clip": -1.0}, "grad_clip must be positive"),
        ({"precision": "fp8"}, "precision must be None or 'bf16', got 'fp8'\\.$"),
        ({"precision": "fp16"}, "got 'fp16'.*underflow unless the loss is scaled.*Use 'bf16'"),
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
        (3, "data=3 cannot be iterated. Pass an iterable of batches"),
        (TensorDataset(torch.ones(4, 2)), r"a TensorDataset, .*DataLoader\(data_set, batch_size"),
        (lambda: iter([None]), "function.* cannot be iterated.*whose __iter__ is that"),
    ],
)
def test_data_that_yield_no_batches_are_refused(data, message, setting):
    with pytest.raises(mlo.ProblemError, match=message):
        problem("w", **{setting: data})


def test_a_name_must_be_an_identifier():
    with pytest.raises(mlo.ProblemError, match="not a Python identifier"):
        problem("my weights")


def test_reads_are_found_in_any_callable():
    """Reads are found in partials, methods, callable objects and modules."""

    def loss(own, batch, *, w, scale):
        return own.v.sum() * scale

    class Callable:
        def __call__(self, own, batch, *, w):
            return own.v.sum()

        def method(self, own, batch, *, w):
            return own.v.sum()

    class Criterion(nn.Module):
        def forward(self, own, batch, *, w):
            return own.v.sum()

    partial = functools.partial(loss, scale=2.0)
    for function in (partial, Callable(), Callable().method, Criterion()):
        assert graph(problem("w"), problem("x", function)).reads_below["x"] == ("w",)


@pytest.mark.parametrize("players", [["a", "b"], {"a": nn.Linear(1, 1)}])
def test_players_declared_in_another_way_say_how(players):
    module = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    with pytest.raises(
        mlo.ProblemError, match="players must be a dict player → name of its submodule"
    ):
        mlo.Problem(
            "pair",
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            loss=print,
            players=players,
        )


def test_many_problems_are_read_by_a_list():
    names = [f"task{k}" for k in range(3)]

    def loss(own, _, *, extra=None, task2, **tasks):
        assert sorted(tasks) == ["task0", "task1"]
        return own.v.sum() + task2.v.sum() + sum(task.v.sum() for task in tasks.values())

    reader = problem("up", loss, reads=names)
    assert set(reader.reads) == set(names)
    assert reader.optional_reads == ("extra",)
    tasks = [problem(name, lambda own, _, *, up: (own.v - up.v).square().sum()) for name in names]
    optimizer = mlo.MultilevelOptimizer([*tasks, reader], "one_step")
    assert optimizer.graph.reads_below["up"] == tuple(reader.reads)
    # own and three tasks, of which each moves with 2 lr = 0.2 of the upper value
    assert torch.allclose(optimizer.gradient("up")["v"], torch.full((2,), 1.0 + 3 * 0.2))


def test_a_loss_with_a_double_star_is_asked_for_a_list():
    with pytest.raises(mlo.ProblemError, match=r"reads=\['task0', 'task1', \.\.\.\]"):
        problem("up", lambda own, _, **tasks: own.v.sum())
    problem("up", lambda own, _, **tasks: own.v.sum(), reads=[])


@pytest.mark.parametrize(
    ("reads", "message"),
    [(["task"], r"reads= names 'task'.*Add \*\*problems"), ("task", "must be a list")],
)
def test_a_list_of_reads_that_cannot_be_passed_is_refused(reads, message):
    with pytest.raises(mlo.ProblemError, match=message):
        problem("up", lambda own, _, *, other: own.v.sum(), reads=reads)


def test_a_restart_is_one_of_the_reads():
    p = problem("task", lambda own, _, *, rate: own.v.sum(), restart_from="init.head")
    assert p.reads == ("rate", "init")
    assert p.loss_reads == ("rate",)


# ------------------------------ shown in a notebook


def shown(declared):
    """What a notebook shows of a problem: name → text."""
    root = ET.fromstring(declared._repr_html_())
    return {row[0].text: row[1].text for row in root.iter("tr")}


def net_loss(net, batch, *, decay):
    return net.weight.sum() * decay.weight.sum()


def test_a_notebook_shows_what_a_problem_declares():
    net = nn.Linear(2, 2)
    first, second = two_optimizers(net)
    declared = problem("net", module=net, optimizer=[first, second], loss=net_loss, steps=5)
    assert shown(declared) == {
        "module": "Linear",
        "parameters": "6 on cpu",
        "optimizer": "SGD, Adam",
        "loss": "net_loss",
        "reads": "decay",
        "steps": "5",
    }


def test_a_notebook_shows_options_that_were_given():
    declared = problem("net", grad_clip=2.0, after_step=lambda parameters: parameters)
    options = shown(declared)
    assert options["grad_clip"] == "2.0"
    assert "<lambda>" in options["after_step"]
    assert "warmup_steps" not in options
    assert options["reads"] == "no other problem"


def test_a_solve_sees_all_of_its_data_in_whole_passes_only():
    def sees_all(**options):
        return problem("w", **options).solves_on_all_data

    two = [torch.ones(1), torch.ones(1)]
    assert sees_all() and sees_all(data=two, accumulate=2) and sees_all(data=two, accumulate=4)
    assert sees_all(data=two, solve_data=two[:1])
    assert not sees_all(data=two) and not sees_all(data=two, accumulate=3)
    assert not sees_all(data=two[:1], solve_data=two)


EXAMPLES = torch.arange(100.0)
IN_ORDER = SequentialSampler(EXAMPLES)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(EXAMPLES)


class Wrapped:
    """A loader's length where it has one, as a prefetcher around it has."""

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)


class WrappedPass(Wrapped):
    def __next__(self):
        raise StopIteration


class Lengthless(Sampler):
    def __iter__(self):
        return iter(range(100))


def loader(batch_size=64, **options):
    return DataLoader(EXAMPLES, batch_size=batch_size, **options)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ([EXAMPLES], 1),
        ([EXAMPLES[:50], EXAMPLES[50:]], 2),
        (loader(), 2),
        (loader(shuffle=True), 2),
        (loader(50, shuffle=True, drop_last=True), 2),
        (loader(None), 100),
        (loader(10, sampler=SubsetRandomSampler(range(20))), 2),
        (
            DataLoader(EXAMPLES, batch_sampler=BatchSampler(SequentialSampler(EXAMPLES), 50, True)),
            2,
        ),
        (loader(shuffle=True, drop_last=True), None),
        (loader(64, sampler=SubsetRandomSampler(range(100)), drop_last=True), None),
        (loader(sampler=RandomSampler(EXAMPLES, num_samples=64)), None),
        (loader(sampler=RandomSampler(EXAMPLES, replacement=True)), None),
        (loader(100, sampler=WeightedRandomSampler([1.0] * 100, 100)), None),
        (DataLoader(EXAMPLES, batch_sampler=[[0, 1], [2, 3]]), None),
        (DataLoader(Endless(), batch_size=100), None),
        (iter([EXAMPLES]), None),
        (loader(64, sampler=Lengthless(), drop_last=True), None),
        (Wrapped(loader()), 2),
        (Wrapped(DataLoader(Endless(), batch_size=100)), None),
        (WrappedPass([EXAMPLES]), None),  # what is left of an iterator's only pass
    ],
)
def test_a_solve_sees_all_where_a_pass_has_the_same_examples(data, count):
    sees_all = problem("w", data=data, accumulate=count or 2).solves_on_all_data
    assert sees_all == (count is not None)


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
