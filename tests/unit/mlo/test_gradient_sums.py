"""Means of losses and metrics over batches and processes."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.optim import SGD

import mlo
from mlo.gradient_sums import GradientSums


def test_a_loss_that_is_a_parameter_is_reported_as_it_was():
    """The step moves the parameter in place."""
    module = torch.nn.ParameterDict({"p": torch.tensor(2.0)})
    problem = mlo.Problem(
        "p", module=module, optimizer=SGD(module.parameters(), lr=0.5), loss=lambda p, _: p["p"]
    )
    record = mlo.MultilevelOptimizer([problem]).step()
    assert record.losses == {"p": 2.0}
    assert module["p"].item() == 1.5


def test_a_metric_is_averaged_over_the_batches_that_returned_it():
    net = nn.Linear(1, 1)

    def loss(net, batch):
        metrics = {"value": batch, "name": f"batch {batch:g}"}
        if batch > 1:
            metrics["large"] = float(batch)
        return net.weight.sum(), metrics

    problem = mlo.Problem(
        "net",
        module=net,
        optimizer=SGD(net.parameters(), lr=0.1),
        loss=loss,
        data=list(torch.tensor([1.0, 2.0, 6.0])),
        accumulate=3,
    )
    found = mlo.MultilevelOptimizer([problem]).step().metrics["net"]
    assert found == {"value": 3.0, "name": "batch 6", "large": 4.0}


class Processes:
    """As many processes as threads, in place of `torch.distributed`."""

    def __init__(self, size):
        self.size, self.given = size, [None] * size
        self.barrier = threading.Barrier(size)
        self.here = threading.local()

    def exchanged(self, value):
        self.given[self.here.rank] = value
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def get_rank(self, group=None):
        return self.here.rank

    def get_world_size(self, group=None):
        return self.size

    def all_reduce(self, tensor, group=None):
        every = self.exchanged(tensor.clone())
        assert len({(part.shape, part.dtype) for part in every}) == 1  # gloo would abort
        tensor.copy_(sum(every))

    def all_gather_object(self, into, value, group=None):
        into[:] = self.exchanged(value)

    def run(self, body):
        """What each process's body returned or raised."""

        def process(rank):
            self.here.rank = rank
            try:
                return body(rank)
            except mlo.ProblemError as error:
                return str(error)
            except BaseException:
                self.barrier.abort()  # so that the others do not wait
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(process, range(self.size)))


def reduced_metrics(monkeypatch, *rounds):
    """What each process has of its metrics, after each round in which they returned these."""
    processes = Processes(len(rounds[0]))
    for name in ("get_rank", "get_world_size", "all_reduce", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, getattr(processes, name))

    def body(rank):
        net = nn.Linear(1, 1)
        problem = mlo.Problem(
            "net", module=net, optimizer=SGD(net.parameters(), lr=0.1), loss=lambda net, _: None
        )
        kinds, found = {}, []
        for metrics in rounds:
            sums = GradientSums(problem, 1, (), kinds)
            own = list(net.parameters())
            sums.add("net", net.weight.sum(), own, retain_graph=False, create_graph=False)
            sums.add_metrics(metrics[rank])
            sums.average(mlo.DataParallel(), ())
            found.append({key: sums.metrics[key] for key in sorted(sums.metrics)})
        return found

    return processes.run(body)


def test_metrics_that_only_some_processes_return(monkeypatch):
    """Each is averaged over those that returned it, whatever their order and their first round."""
    first, second, third = reduced_metrics(
        monkeypatch,
        ({"a": 1.0, "b": 8.0}, {"b": 4.0, "a": 3.0}, {"b": 0.0, "a": 5.0}),
        ({}, {"c": torch.tensor([1.0, 2.0])}, {"a": 7.0}),
        ({"c": torch.tensor([3.0, 4.0])}, {"count": 2}, {"d": 1.0}),
        ({"c": 2.0}, {"c": 4.0}, {"a": 1.0}),
    )
    expected = [
        {"a": 3.0, "b": 4.0},
        {"a": 7.0, "c": torch.tensor([1.0, 2.0])},
        {"c": torch.tensor([3.0, 4.0]), "d": 1.0},
        {"a": 1.0, "c": 3.0},
    ]
    for found in (first, second, third):
        for metrics, means in zip(found, expected, strict=True):
            for name, mean in means.items():
                assert torch.allclose(metrics[name], torch.as_tensor(mean))
    # A count is the process's own.
    assert second[2]["count"] == 2 and "count" not in first[2]


def test_metrics_of_different_shapes_are_refused_by_all(monkeypatch):
    found = reduced_metrics(
        monkeypatch, ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, {"a": torch.zeros(2)})
    )
    assert len(set(found)) == 1
    assert re.search(r"metric 'a' as torch.float32 of shape \(3,\) on process 1", found[0])
