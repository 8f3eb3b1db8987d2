"""What is prepared ahead: the same values, as many as the depth, and no thread left behind."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from small_pictures import IMAGENET, write_classes
from started_processes import PATIENCE, finished, wait_for

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import Batches, PairedBatches, in_order, load_dataset, search_split
from lfmcw_app.errors import InputError
from lfmcw_app.prefetch import Prefetcher
from lfmcw_app.problems import build_search
from lfmcw_app.recipe_loading import load_recipe


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def ended():
    """Waits until all threads that prepare something have ended by themselves."""
    wait_for(lambda: not workers())


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    ended()


class Recorder:
    """A square that knows of what it was called; it fails for one index, and waits for others."""

    def __init__(self, *, fails=None, waits=()):
        self.calls, self.fails, self.waits = [], fails, waits
        self.go = threading.Event()

    def __call__(self, index):
        self.calls.append(index)
        assert index not in self.waits or self.go.wait(PATIENCE)
        if index == self.fails:
            raise InputError(f"The image {index} cannot be read.")
        return index**2


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_any_order_of_indices_gives_their_values(depth):
    ahead = Prefetcher(Recorder(), depth=depth)
    for index in (0, 1, 2, 2, 3, 9, 4, 3, 4, 0, 100, 5):
        assert ahead.get(index) == index**2


def test_the_next_values_are_prepared_without_being_asked_for():
    make = Recorder()
    ahead = Prefetcher(make, depth=3)
    assert ahead.get(5) == 25
    ended()
    assert sorted(make.calls) == [5, 6, 7, 8]
    ahead.get(6)
    ahead.get(7)
    ended()
    assert sorted(make.calls) == [5, 6, 7, 8, 9, 10]  # each once


def test_what_is_held_is_bounded_by_the_depth():
    ahead = Prefetcher(Recorder(), depth=2)
    for index in (*range(50), *range(1000, 1050)):
        ahead.get(index)
        assert len(ahead._prepared) <= 4
    assert sorted(ahead._prepared) == [1048, 1049, 1050, 1051]


def test_nothing_is_prepared_beyond_the_end():
    make = Recorder()
    ahead = Prefetcher(make, depth=4, end=3)
    assert [ahead.get(index) for index in range(3)] == [0, 1, 4]
    ended()
    assert sorted(make.calls) == [0, 1, 2]


def test_readers_share_what_they_all_come_to():
    """Readers at one place cost one value each; those elsewhere do not drive it out."""
    make = Recorder()
    ahead = Prefetcher(make, depth=2)
    for index in range(10):
        for reader in ("w1", "gan", "w2"):
            assert ahead.get(index, reader) == index**2
        assert ahead.get(4 * index + 50, "elsewhere") == (4 * index + 50) ** 2
    ended()
    assert sorted(call for call in make.calls if call < 13) == list(range(12))


def test_an_error_is_raised_to_who_asks_for_its_index():
    make = Recorder(fails=13)
    ahead = Prefetcher(make, depth=2)
    for index in (10, 11, 12):  # 13 has failed by now, or will
        assert ahead.get(index) == index**2
    ended()
    for _ in range(2):
        with pytest.raises(InputError, match="The image 13 cannot be read"):
            ahead.get(13)
    assert ahead.get(14) == 196
    ended()
    assert make.calls.count(13) == 2  # the second time it was tried again


def test_a_jump_abandons_what_has_not_begun():
    make = Recorder(waits=range(21, 100))
    ahead = Prefetcher(make, depth=20)
    assert ahead.get(20) == 400
    assert ahead.get(500) == 250_000
    make.go.set()
    ended()
    assert {call for call in make.calls if call < 100} <= {20, 21}  # 21 may have begun


def test_an_interrupted_reader_leaves_no_thread():
    class Interrupted(Recorder):
        def __call__(self, index):
            if index == 2:
                raise KeyboardInterrupt
            return super().__call__(index)

    ahead = Prefetcher(Interrupted(), depth=2)
    assert ahead.get(1) == 1
    with pytest.raises(KeyboardInterrupt):
        ahead.get(2)
    ended()


@pytest.mark.parametrize("ending", ["", "raise KeyboardInterrupt", "sys.exit(3)"])
def test_a_program_ends_while_values_are_prepared(ending):
    """The interpreter ends by itself, with its own exit code and no word of the threads."""
    program = f"""
import sys, time
from concurrent.futures import ThreadPoolExecutor
from lfmcw_app.prefetch import Prefetcher
def make(index):
    time.sleep(0.2 * (index > 0))
    with ThreadPoolExecutor(2) as pool:  # as image files are read
        return list(pool.map(str, range(3)))
Prefetcher(make, depth=3).get(0)
try:
    {ending or "pass"}
except KeyboardInterrupt:
    sys.exit(130)
"""
    result = finished([sys.executable, "-c", program])
    assert result.stderr == ""
    assert result.returncode == {"": 0, "sys.exit(3)": 3}.get(ending, 130)


# ------------------------------ streams of images


@pytest.fixture
def pictures(tmp_path):
    write_classes(tmp_path / "pictures", {"a": 24, "bb": 24}, size=(10, 12))
    return load_dataset(f"folder:{tmp_path / 'pictures'}", image_size=8, in_memory=False)


def with_depth(monkeypatch, depth, make):
    monkeypatch.setattr("lfmcw_app.data.DEPTH", depth)
    return make()


@pytest.mark.parametrize("kind", ["plain", "part", "matched", "alike"])
def test_streams_do_not_depend_on_the_depth(kind, pictures, monkeypatch):
    """Batches agree bit for bit at depths 0, 1 and 5, also after moves to other positions."""
    train, validation = search_split(pictures, None, seed=0)

    def stream():
        def batches(images, seed, matched_to=None):
            return Batches(
                images,
                pictures,
                batch_size=6,
                seed=seed,
                augmentation=IMAGENET,
                part=(1, 2) if kind == "part" else (0, 1),
                matched_to=matched_to,
            )

        one = batches(train, 0)
        if kind == "matched":
            return PairedBatches(one, batches(validation, 1, matched_to=one))
        if kind == "alike":
            return PairedBatches(one.alike(), one.alike())
        return one

    def drawn(stream):
        iterator, found = iter(stream), []
        for position in (0, None, None, 5, None, 1, None, 0):
            if position is not None:
                stream.load_state_dict({"position": position})
            found += list(next(iterator))
        return found

    expected = with_depth(monkeypatch, 0, lambda: drawn(stream()))
    state = torch.get_rng_state()
    for depth in (1, 5):
        found = with_depth(monkeypatch, depth, lambda: drawn(stream()))
        assert len(found) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    ended()
    assert torch.equal(state, torch.get_rng_state())


def test_parts_are_the_rows_of_the_whole_batch(pictures):
    def batch(part):
        stream = Batches(
            pictures.train, pictures, batch_size=6, seed=0, augmentation=IMAGENET, part=part
        )
        return stream.batch(1)

    images, labels = zip(*(batch((k, 2)) for k in (0, 1)), strict=True)
    whole = batch((0, 1))
    assert torch.equal(torch.cat(images), whole[0])
    assert torch.equal(torch.cat(labels), whole[1])


class Overtaken(Batches):
    """A stream whose order of a pass is replaced by another thread as soon as it is kept."""

    @property
    def _order(self):
        return (10**6, torch.zeros(len(self._images), dtype=torch.int64))

    @_order.setter
    def _order(self, order):
        pass


def test_threads_in_different_passes_do_not_mix_orders(pictures):
    streams = [
        kind(pictures.train, pictures, batch_size=6, seed=0) for kind in (Batches, Overtaken)
    ]
    for index in range(3 * streams[0].per_epoch):
        one, other = (stream._chosen(index) for stream in streams)
        assert torch.equal(one, other)


def test_images_in_memory_have_no_threads(monkeypatch):
    digits = load_dataset("digits")
    monkeypatch.setattr(
        "lfmcw_app.prefetch.ThreadPoolExecutor", lambda *arguments: pytest.fail("a thread")
    )
    Batches(digits.train, digits, batch_size=8, seed=0).batch(0)
    next(in_order(digits.test, digits, 64))


def test_a_damaged_file_ends_a_stream_with_its_name(pictures):
    """The error comes with the batch that has the file, in the thread that asks for it."""
    stream = Batches(pictures.train, pictures, batch_size=4, seed=0)
    position = 3
    row = pictures.train.pixels.rows[stream._chosen(position)[0]]
    path = pictures.train.pixels.paths[row]
    with open(path, "wb") as file:
        file.write(b"no picture")
    for index in range(position):
        stream.batch(index)
    with pytest.raises(InputError, match=rf"{path} cannot be read"):
        stream.batch(position)


def test_the_test_pass_reads_ahead_and_shares_the_batches(pictures, monkeypatch):
    """Two processes take turns; one that stops early leaves no thread."""
    whole = with_depth(monkeypatch, 0, lambda: list(in_order(pictures.test, pictures, 2)))
    for depth in (0, 3):
        parts = with_depth(
            monkeypatch,
            depth,
            lambda: [list(in_order(pictures.test, pictures, 2, part=(k, 2))) for k in (0, 1)],
        )
        for k, part in enumerate(parts):
            assert len(part) == len(whole[k::2])
            for one, other in zip(part, whole[k::2], strict=True):
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])
    early = in_order(pictures.test, pictures, 2)
    next(early)
    early.close()
    ended()


# ------------------------------ searches


def search_of(pictures, method, moves_first):
    recipe = load_recipe(
        "smoke",
        overrides={
            "search.method": method,
            "search.nodes": 1,
            "search.primitives": ["none", "skip_connect", "sep_conv_3x3"],
            "search.channels": 4,
            "search.batch_size": 4,
            "search.validation_batch": "matched",
            "search.generator.channels": 2,
            "search.generator.noise_dim": 4,
            "search.generator.discriminator_steps": 2,
            "search.architecture.moves_first": moves_first,
        },
    )
    torch.manual_seed(0)
    train, validation = search_split(pictures, None, 0)
    modules = build_modules(recipe.search, pictures)
    return build_search(recipe, pictures, train, validation, modules)


def losses_of(optimizer, rounds):
    return [optimizer.step().losses for _ in range(rounds)]


@pytest.mark.parametrize(
    ("method", "moves_first"),
    [pytest.param("lfmcw", False, marks=pytest.mark.slow), ("darts", True)],
)
def test_a_search_does_not_depend_on_the_depth(method, moves_first, pictures, monkeypatch):
    """Rounds, a resumed run and a return to an earlier state with other batches."""

    def outcome():
        optimizer = search_of(pictures, method, moves_first)
        losses = losses_of(optimizer, 1)
        state = optimizer.state_dict()
        losses += losses_of(optimizer, 1)
        resumed = search_of(pictures, method, moves_first)
        resumed.load_state_dict(state)
        assert losses_of(resumed, 1) == losses[1:]
        resumed.roll_back(state)
        return losses + losses_of(resumed, 1)

    assert with_depth(monkeypatch, 0, outcome) == with_depth(monkeypatch, 2, outcome)


def test_problems_read_a_file_of_a_common_batch_once(tmp_path, monkeypatch):
    """w1, gan and w2 come to one training batch, w2 and arch to one of validation images."""
    write_classes(tmp_path, {"a": 24, "bb": 24})
    data = load_dataset(f"folder:{tmp_path}", in_memory=False)
    read = []
    original = Batches._photographs

    def counted(self, index):
        read.append((len(read), index))
        return original(self, index)

    monkeypatch.setattr(Batches, "_photographs", counted)
    recipe = load_recipe("smoke", overrides={"search.nodes": 1, "search.batch_size": 6})
    train, validation = search_split(data, None, 0)
    torch.manual_seed(0)
    optimizer = build_search(recipe, data, train, validation, build_modules(recipe.search, data))
    losses_of(optimizer, 1)
    ended()
    assert sorted(index for _, index in read) == [0, 0, 1, 1, 2, 2]  # of two streams
