"""Declarations of problems: what is read from them, and what is refused."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import torch
from small_graphs import problem
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import mlo
from mlo.testing import bilevel_quadratic


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


def test_a_new_loss_reads_the_same_problems():
    """A loss may be replaced between rounds, but the graph keeps its reads."""
    w, v = bilevel_quadratic().problems
    mlo.MultilevelOptimizer([w, v], "one_step")
    old = v.loss
    v.loss = lambda module, batch, *, w: 2.0 * old(module, batch, w=w)
    v.loss = lambda *arguments, **problems: 2.0 * old(*arguments, **problems)
    with pytest.raises(mlo.ProblemError, match=r"reads the same problems: w\."):
        v.loss = lambda module, batch: (module.v**2).sum()
    with pytest.raises(mlo.ProblemError, match=r"missing a required argument: 'other'"):
        v.loss = lambda module, batch, *, w, other: 0.0
    # What the declared loss reads if it exists, another one may need or leave out.
    optional = problem("task", lambda own, _, *, rate, other=None: own.v.sum())
    optional.seal()
    optional.loss = lambda own, _, *, rate: own.v.sum()
    optional.loss = lambda own, _, *, rate, other: own.v.sum()
    with pytest.raises(mlo.ProblemError, match=r"reads the same problems: rate, other\."):
        optional.loss = lambda own, _, *, other: own.v.sum()


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
