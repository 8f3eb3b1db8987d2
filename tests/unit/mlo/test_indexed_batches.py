"""Batches that know which block they are."""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo.batches import BatchStream
from mlo.indexed_batches import IndexedBatches


def blocks(**options):
    x = torch.arange(12.0)
    generator = torch.Generator().manual_seed(0)
    return IndexedBatches(x, -x, batch_size=3, generator=generator, **options)


def test_a_block_has_the_same_rows_in_every_pass():
    data = blocks()
    assert len(data) == 4
    orders = []
    for _ in range(6):
        numbers = []
        for number, (x, y) in data:
            assert x.tolist() == [3.0 * number, 3.0 * number + 1, 3.0 * number + 2]
            assert torch.equal(y, -x)
            numbers.append(number)
        assert sorted(numbers) == [0, 1, 2, 3]
        orders.append(tuple(numbers))
    assert len(set(orders)) > 1


def test_every_q_th_batch_is_the_whole_data_set():
    stream = BatchStream(blocks(whole_every=6), "w")
    drawn = [stream.next() for _ in range(18)]
    assert [k for k, batch in enumerate(drawn) if batch.number is None] == [0, 6, 12]
    assert len(drawn[6].tensors[0]) == 12
    # Five blocks follow: a whole pass of four, then one of the next.
    assert sorted(batch.number for batch in drawn[1:5]) == [0, 1, 2, 3]


def test_batches_are_whole_with_a_probability():
    stream = BatchStream(blocks(whole_probability=0.25), "w")
    drawn = [stream.next().number for _ in range(2000)]
    assert drawn[0] is None
    assert drawn.count(None) / 2000 == pytest.approx(0.25, abs=0.04)
    always = BatchStream(blocks(whole_probability=1.0), "w")
    assert [always.next().number for _ in range(3)] == [None] * 3


@pytest.mark.parametrize("options", [{}, {"whole_every": 3}, {"whole_probability": 0.3}])
def test_a_stream_of_them_resumes_where_it_was(options):
    stream = BatchStream(blocks(**options), "w")
    for _ in range(7):
        stream.next()
    state = stream.state_dict()
    expected = [stream.next().number for _ in range(9)]
    other = BatchStream(blocks(**options), "w")
    other.load_state_dict(state)
    assert [other.next().number for _ in range(9)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5}, "does not divide 12 rows"),
        ({"batch_size": 0}, "does not divide"),
        ({"batch_size": 3, "whole_every": 0}, "must be 1 or more"),
        ({"batch_size": 3, "whole_probability": 0.0}, "above 0"),
        ({"batch_size": 3, "whole_every": 2, "whole_probability": 0.5}, "not both"),
    ],
)
def test_what_cannot_be_divided_is_refused(options, message):
    with pytest.raises(mlo.ProblemError, match=message):
        IndexedBatches(torch.zeros(12, 2), **options)
    with pytest.raises(mlo.ProblemError, match=r"lengths \[3, 4\]"):
        IndexedBatches(torch.zeros(3), torch.zeros(4), batch_size=1)
