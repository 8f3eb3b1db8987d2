"""The evolution of α in a report."""

from __future__ import annotations

import json
import re

import pytest
import torch
from made_run_folders import make_folder
from one_cell_space import ONE_CELL, OPERATIONS, PLACES

from lfmcw_app.report.architecture import MOST_FRAMES, evolution, relative, rule_of
from lfmcw_app.report.curves import Rounds
from lfmcw_app.report.reading import read_run
from lfmcw_app.search_space.nasbench201 import OPERATIONS as OF_201
from lfmcw_app.spaces import SPACES


def evolved(tmp_path, stages):
    run = read_run(make_folder(tmp_path / "run", stages))
    rounds = Rounds(run)
    return evolution(run, rounds.offsets, rounds.boundaries)


def test_there_is_a_frame_per_recorded_round(tmp_path):
    found = evolved(tmp_path, {"search": (8, 5)})
    assert [frame.round for frame in found.frames] == [1, 2, 3, 4, 5]
    assert list(found.pictures) == list(found.charts) == ["normal", "reduction"]
    assert found.pictures["normal"].count("w chosen") == 4  # two edges of each of two nodes


def test_rounds_are_counted_through_the_stages(tmp_path):
    found = evolved(tmp_path, {"search-1": (8, 2), "search-2": (5, 2)})
    assert [(frame.stage, frame.round) for frame in found.frames] == [
        ("search-1", 1), ("search-1", 2), ("search-2", 3), ("search-2", 4),
    ]  # fmt: skip


def test_operations_that_were_dropped_are_gone(tmp_path):
    found = evolved(tmp_path, {"search-1": (8, 1), "search-2": (5, 1)})
    first, last = found.frames
    assert all(weight is not None for row in first.weights["normal"] for weight in row)
    assert [row.count(None) for row in last.weights["normal"]] == [3] * 5
    assert found.pictures["normal"].count("w gone") == 3 * 5


def test_many_rounds_have_few_frames_and_the_last_one(tmp_path):
    found = evolved(tmp_path, {"search": (8, 3 * MOST_FRAMES)})
    assert len(found.frames) == MOST_FRAMES
    assert (found.frames[0].round, found.frames[-1].round) == (1, 3 * MOST_FRAMES)


def test_without_a_search_there_is_nothing_to_show(tmp_path):
    assert evolved(tmp_path, {}) is None


def test_the_slider_has_weights_in_thousandths(tmp_path):
    frame = evolved(tmp_path, {"search": (8, 2)}).data()["frames"][-1]
    assert frame["round"] == 2
    for row in frame["weights"]["normal"]:
        assert sum(row) == pytest.approx(1000, abs=4)


def test_a_weight_is_relative_to_the_mean_into_its_node():
    """Node 0 has two edges, node 1 has three."""
    rows = [[1.0, 3.0], [2.0, 2.0], [1.0, None], [1.0, 1.0], [2.0, 0.0]]
    found = relative(rows, [0, 0, 1, 1, 1])
    assert found[:2] == [[0.5, 1.5], [1.0, 1.0]]
    assert found[2:] == [[1.0, None], [1.0, 1.0], [2.0, 0.0]]


def searched(folder, space, alphas, names):
    """The evolution of a search of one kind of cell, whose rounds had these weights."""
    make_folder(folder, {"search": (8, 1)})
    config = (folder / "config.yaml").read_text()
    config = re.sub(r"(?m)^(  space: )darts$", rf"\g<1>{space}", config)
    config = config.replace("  nodes: 2\n", "  nodes: 4\n").replace(
        "  layers: 2\n", "  layers: 3\n"
    )
    (folder / "config.yaml").write_text(config)
    lines = [
        {
            "phase": "search", "round": number, "losses": {}, "metrics": {},
            "alpha": {"cell": alpha}, "candidates": {"cell": [list(names)] * len(alpha)},
        }
        for number, alpha in enumerate(alphas, start=1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    rounds = Rounds(run)
    return evolution(run, rounds.offsets, rounds.boundaries)


def preferring(columns, width):
    """Weights of which each row's largest is in one of these columns."""
    rows = [[0.1 + 0.5 * (place == column) for place in range(width)] for column in columns]
    return [[weight / sum(row) for weight in row] for row in rows]


def heads(picture):
    return re.findall(r'<tr><th scope="row">(.*?)</th>', picture)


def outlined(picture):
    """The column of each row's outlined cell."""
    rows = picture.split("<tbody>")[1].split("<tr>")[1:]
    marked = [re.findall(r'<td class="w( chosen)?"', row) for row in rows]
    return [[place for place, mark in enumerate(row) if mark] for row in marked]


def test_a_cell_of_nasbench201_is_shown_edge_by_edge(tmp_path):
    columns = [3, 1, 2, 0, 4, 3]
    alphas = [preferring([2] * 6, 5), preferring(columns, 5)]
    found = searched(tmp_path / "run", "nasbench201", alphas, OF_201)
    picture = found.pictures["cell"]
    assert found.titles == {"cell": "cell"}
    assert heads(picture) == [
        "the input → node 0", "the input → node 1", "node 0 → node 1",
        "the input → output", "node 0 → output", "node 1 → output",
    ]  # fmt: skip
    order = found.frames[0].weights["cell"][0]
    assert len(order) == len(OF_201)
    assert [len(row) for row in outlined(picture)] == [1] * 6
    assert found.frames[0].chosen["cell"] != found.frames[1].chosen["cell"]
    assert "nor conv" in found.charts["cell"]


def test_a_registered_space_is_shown_by_its_own_edges(tmp_path, monkeypatch):
    """With its names of states; its architecture draws no random number of the caller's."""
    monkeypatch.setitem(SPACES._entries, "one_cell", ONE_CELL)
    state = torch.get_rng_state()
    alphas = [preferring([0, 2, 1, 2, 0, 2], len(OPERATIONS))]
    found = searched(tmp_path / "run", "one_cell", alphas, OPERATIONS)
    assert torch.equal(torch.get_rng_state(), state)
    sources = [f"node {source}" if source else "the input" for _, source in PLACES]
    expected = [f"{s} → node {node}" for s, (node, _) in zip(sources, PLACES, strict=True)]
    assert heads(found.pictures["cell"]) == expected
    (frame,) = found.frames
    assert len(frame.chosen["cell"]) == len(PLACES)
    for row, column in frame.chosen["cell"]:
        weights = frame.weights["cell"][row]
        assert weights[column] == max(weights)


def test_edges_of_an_unknown_order_have_numbers():
    assert ONE_CELL.edge_places(6) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert SPACES.named("darts").edge_places(5) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert ONE_CELL.edge_places(5) is None


def test_the_page_says_how_a_cell_is_derived(tmp_path):
    """A space of another package may do it in any way, so nothing is said."""
    found = evolved(tmp_path, {"search": (8, 2)})
    assert found.rule.startswith("A node takes two edges")
    assert found.rule.endswith("“none” cannot be chosen, even where its weight is the largest.")
    assert "“none”" not in rule_of("s1", ["sep_conv_3x3"])
    assert rule_of("nasbench201", ["none"]).endswith("which may be “none”.")
    assert rule_of("another", ["none"]) == ""


def test_weights_that_hardly_differ_are_said_to(tmp_path):
    even = [[0.2] * len(OF_201)] * 6
    found = searched(tmp_path / "even", "nasbench201", [even], OF_201)
    assert "the largest is only 0% above the mean of its node" in found.nearly_even
    found = searched(tmp_path / "clear", "nasbench201", [preferring([2] * 6, 5)], OF_201)
    assert found.nearly_even == ""
