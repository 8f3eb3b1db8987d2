"""Which graphs are accepted, how they are ordered, and what the messages say."""

from __future__ import annotations

import pytest
import torch
from small_graphs import graph, problem

import mlo
from mlo.testing import Vector, diamond, layered, trilevel_quadratic


def reads(*names):
    """A loss that reads the problems called `names`."""
    scope = {}
    keywords = f", *, {', '.join(names)}" if names else ""
    exec(f"def loss(own, batch{keywords}): return own.v.sum()", scope)
    return scope["loss"]


def test_lower_and_upper_reads_follow_the_listed_order():
    g = graph(problem("w", reads("x")), problem("x", reads("w")))
    assert g.reads_below["x"] == ("w",)
    assert g.reads_above["w"] == ("x",)
    assert g.reads_above["x"] == g.reads_below["w"] == ()
    assert g.level == {"w": 0, "x": 1}


def test_a_round_follows_algorithm_1_on_the_diamond():
    assert graph(*diamond().problems).schedule() == ("w1", "gan", "w2", "arch")


def test_steps_repeat_a_problem_for_each_move_of_those_above_it():
    g = graph(
        problem("w", reads("x"), steps=2),
        problem("m", reads("w"), steps=3),
        problem("x", reads("m")),
    )
    assert g.schedule() == ("w", "w", "m") * 3 + ("x",)


def test_a_less_frequent_problem_joins_in_the_last_moves():
    """A less frequent problem joins in the last moves of its level."""
    g = graph(problem("a", steps=3), problem("b"), problem("x", reads("a", "b")))
    assert g.schedule() == ("a", "a", "a", "b", "x")


def test_a_layered_graph_with_a_million_paths_is_built_at_once():
    g = graph(*layered(layers=20).problems)
    assert "p19_0" in g.solutions_depending_on["x"]
    assert len(g.schedule()) == 41


def test_solutions_include_those_others_are_conditioned_on():
    """The solutions in a gradient include lower problems that others are conditioned on."""
    g = graph(*trilevel_quadratic().problems)
    assert g.solutions_in["x"] == ("w", "m")
    assert g.solutions_in["m"] == ("w",)
    assert "w" in g.solutions_depending_on["m"]
    assert g.values_in["m"] == ("x",)


@pytest.mark.parametrize(
    ("problems", "words"),
    [
        (lambda: [problem("w"), problem("w")], ["Two problems", "'w'"]),
        (
            lambda: [problem("weights"), problem("x", reads("weigths"))],
            ["weigths", "Did you mean 'weights'"],
        ),
        (lambda: [problem("x", reads("x"))], ["cycle", "'x'"]),
        (lambda: [], ["No problem"]),
    ],
    ids=["duplicate", "unknown", "self", "none"],
)
def test_invalid_graphs_are_refused_with_advice(problems, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        mlo.MultilevelOptimizer(problems())
    assert all(word in str(caught.value) for word in words)


def test_problems_may_be_given_by_name():
    optimizer = mlo.MultilevelOptimizer(diamond().problems)
    again = mlo.MultilevelOptimizer(optimizer.problems)
    assert list(again.problems.items()) == list(optimizer.problems.items())


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        (lambda: {"v": problem("w")}, r"'w' under the key 'v'.*list\(problems.values\(\)\)"),
        (lambda: {}, "No problem was given"),
        (lambda: ["w"], "must be mlo.Problem objects.*got a str"),
        (lambda: {"w": "w"}, "must be mlo.Problem objects.*got a str"),
        (lambda: problem("w"), r"got the single Problem\('w'"),
    ],
    ids=["other name", "empty", "names", "names by name", "no list"],
)
def test_what_is_no_list_of_problems_says_what_to_pass(problems, message):
    with pytest.raises(mlo.GraphError, match=message):
        mlo.MultilevelOptimizer(problems())


def test_a_parameter_in_two_problems_is_refused():
    shared = Vector(torch.ones(2))
    with pytest.raises(mlo.GraphError, match=r"w\.v is x\.v"):
        graph(problem("w", module=shared), problem("x", module=shared))


def test_memory_shared_by_two_problems_is_refused():
    one, other = Vector(torch.zeros(2)), Vector(torch.zeros(2))
    other.v.data = one.v.data
    with pytest.raises(mlo.GraphError, match=r"a\.v and b\.v share memory"):
        graph(problem("a", module=one), problem("b", module=other))


def test_a_frozen_parameter_may_be_in_two_problems():
    frozen = Vector(torch.ones(2)).requires_grad_(False)
    heads = [torch.nn.Sequential(frozen, torch.nn.Linear(2, 1)) for _ in range(2)]
    assert list(graph(problem("w", module=heads[0]), problem("x", module=heads[1])).problems)


def test_a_parameter_frozen_for_one_of_two_problems_is_refused():
    shared = Vector(torch.ones(2)).requires_grad_(False)
    frozen = problem("w", module=torch.nn.Sequential(shared, torch.nn.Linear(2, 1)))
    shared.requires_grad_(True)
    with pytest.raises(mlo.GraphError, match=r"w\.0\.v is x\.v.*freeze what is shared"):
        graph(frozen, problem("x", module=shared))


def test_the_picture_shows_solutions_and_values():
    text = mlo.MultilevelOptimizer(diamond().problems).graph.to_mermaid()
    assert "w2 -->|solution| arch" in text
    assert "arch -.->|value| w1" in text
    printed = str(graph(*diamond().problems))
    assert "w1 → gan → w2 → arch" in printed


def chain(*steps):
    """Three problems, each of which reads the one before it."""
    names = ("pre", "fine", "top")
    losses = [reads("top"), reads("pre"), reads("fine")]
    triples = zip(names, losses, steps, strict=True)
    return graph(*[problem(name, loss, steps=count) for name, loss, count in triples])


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ((20, 20, 1), "(pre ×20 → fine) ×20 → top"),
        ((1, 20, 1), "(pre → fine) ×20 → top"),
        ((20, 1, 1), "pre ×20 → fine → top"),
        ((1, 1, 2), "(pre → fine → top) ×2"),
        ((2, 2, 2), "((pre ×2 → fine) ×2 → top) ×2"),
    ],
    ids=str,
)
def test_the_order_of_a_round_is_printed_as_nested_blocks(steps, text):
    g = chain(*steps)
    assert str(g).splitlines()[-1] == f"  order of a round: {text}"
    times = steps[2], steps[1] * steps[2], steps[0] * steps[1] * steps[2]
    assert tuple(map(g.schedule().count, ("top", "fine", "pre"))) == times
    assert len(str(g)) < 400


def test_a_problem_that_joins_later_begins_a_block():
    g = graph(problem("a", steps=3), problem("b"), problem("x", reads("a", "b"), steps=2))
    assert str(g).endswith("order of a round: (a ×2 → a → b → x) ×2")
    assert g.schedule("outermost_first") == ("x", "a", "a", "a", "b") * 2


def test_dependence_passes_through_solutions():
    """A solution depends on what the solutions that it is conditioned on depend on.

    w is conditioned on m's value, m on x's: to x, which sees m's solution in w's, w is a
    function of x.
    """
    g = graph(problem("w", reads("m")), problem("m", reads("x")), problem("x", reads("w")))
    assert g.solutions_in["x"] == ("w", "m")
    assert g.solutions_depending_on["x"] == {"w", "m"}
    assert g.solutions_depending_on["m"] == {"w"}
    assert g.solutions_depending_on["w"] == frozenset()
