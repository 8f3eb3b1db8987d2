"""The evolution of α in a report."""

from __future__ import annotations

import pytest
from made_run_folders import make_folder

from lfmcw_app.report.architecture import KINDS, MOST_FRAMES, evolution, relative
from lfmcw_app.report.curves import Rounds
from lfmcw_app.report.reading import read_run


def evolved(tmp_path, stages):
    run = read_run(make_folder(tmp_path / "run", stages))
    rounds = Rounds(run)
    return evolution(run, rounds.offsets, rounds.boundaries)


def test_there_is_a_frame_per_recorded_round(tmp_path):
    found = evolved(tmp_path, {"search": (8, 5)})
    assert [frame.round for frame in found.frames] == [1, 2, 3, 4, 5]
    assert set(found.pictures) == set(found.charts) == set(KINDS)
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
    found = relative(rows)
    assert found[:2] == [[0.5, 1.5], [1.0, 1.0]]
    assert found[2:] == [[1.0, None], [1.0, 1.0], [2.0, 0.0]]
