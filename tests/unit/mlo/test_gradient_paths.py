"""Which solutions gradients flow through, under one choice of engines and another."""

from __future__ import annotations

import pytest
import small_graphs
import torch
from small_graphs import problem

from mlo.distributed import DataParallel
from mlo.gradient_paths import (
    differentiated_problems,
    differentiated_starts,
    estimates_total,
    inner_responses,
    readers_of_response,
    why_graph_cannot_be_kept,
)
from mlo.hypergradient.registry import engines_for
from mlo.restart import starts_of
from mlo.testing import Vector

WITHOUT_W = {"default": "one_step", "w": "first_order"}


def three_levels(choice, *, w=None, m=None, x=None):
    """w below m below x, each of which reads the problem below it, with options of each.

    Returns:
        The graph, and the engines of a choice.
    """
    graph = small_graphs.graph(
        problem("w", lambda w, _, *, m, x: (w.v * m.v * x.v).sum(), **(w or {})),
        problem("m", lambda m, _, *, w, x: (m.v * w.v * x.v).sum(), **(m or {})),
        problem("x", lambda x, _, *, m: (x.v * m.v).sum(), **(x or {})),
    )
    return graph, engines_for(graph.problems, choice)


def test_solutions_that_a_loss_reads_are_differentiated():
    assert differentiated_problems(*three_levels("one_step")) == {"w", "m"}
    assert differentiated_problems(*three_levels(WITHOUT_W)) == {"m"}


def test_a_middle_gradient_contains_the_response_below_it():
    graph, engines = three_levels("one_step")
    assert list(inner_responses(graph, engines, "m")) == ["w"]
    assert readers_of_response(graph, engines, "w") == ["m"]
    assert readers_of_response(graph, engines, "m") == []  # nothing differentiates x


def test_a_dropped_response_is_in_no_gradient():
    assert list(inner_responses(*three_levels(WITHOUT_W), "m")) == []


def test_a_dropped_response_passes_gradients_on_to_its_start():
    assert list(inner_responses(*three_levels(WITHOUT_W, w={"restart_from": "m"}), "m")) == ["w"]


def test_gradients_flow_into_starts_that_a_problem_optimizes():
    def starts(source, **options):
        graph, engines = three_levels("one_step", w={"restart_from": source}, **options)
        return differentiated_starts(graph, engines, starts_of(graph.problems))

    assert starts("m") == {"w"}
    assert starts("x") == set()  # x sees no w
    frozen = Vector(torch.ones(2))
    frozen.v.requires_grad_(False)
    frozen.register_parameter("other", torch.nn.Parameter(torch.ones(2)))
    assert starts("m", m={"module": frozen}) == set()


@pytest.mark.parametrize(
    ("choice", "options", "why"),
    [
        (WITHOUT_W, {}, ""),
        ("one_step", {}, "contains the response of another problem"),
        (WITHOUT_W, {"accumulate": 2}, "is averaged over several batches"),
        (WITHOUT_W, {"restart_from": "x"}, "depends on the value that it restarts from"),
    ],
)
def test_a_gradient_that_is_a_sum_has_no_graph_to_keep(choice, options, why):
    graph, engines = three_levels(choice, m=options)
    assert why_graph_cannot_be_kept(graph, engines, "m", None) == why


def test_a_mean_over_processes_has_no_graph_to_keep():
    why = why_graph_cannot_be_kept(*three_levels(WITHOUT_W), "m", DataParallel())
    assert why == "is averaged over processes"


def test_estimators_correct_terms_of_soba_and_wholes_of_others():
    assert estimates_total(*three_levels("cg"), "m")
    assert not estimates_total(*three_levels("soba"), "m")
    assert not estimates_total(*three_levels(WITHOUT_W), "m")  # no response is in it
