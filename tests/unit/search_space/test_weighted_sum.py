"""Weighted sums of maps."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from nested_gradients import nested

from lfmcw_app.search_space.weighted_sum import weighted_sum
from mlo.testing import relative_error


@pytest.mark.parametrize(("plain", "weighted"), [(0, 1), (0, 3), (1, 0), (1, 2), (2, 1), (3, 0)])
def test_a_weighted_sum_is_the_sum(plain, weighted):
    torch.manual_seed(0)
    weights = torch.randn(weighted, dtype=torch.float64, requires_grad=True)
    maps = tuple(
        torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(plain + weighted)
    )
    inputs = (weights, *maps) if weighted else maps

    def ours(*_):
        return weighted_sum(maps[:plain], weights, maps[plain:])

    def theirs(*_):
        terms = zip(weights.unbind(), maps[plain:], strict=True)
        return sum(maps[:plain]) + sum(w * m for w, m in terms)

    def second_derivatives(function, some):
        gradients = torch.autograd.grad(function().sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g**3).sum() for g in gradients), some)

    assert relative_error(nested(ours, inputs), nested(theirs, inputs)) < 1e-12
    for count in range(1, len(inputs)):
        for some in itertools.combinations(inputs, count):
            found, exact = (
                torch.autograd.grad(function().sin().sum(), some) for function in (ours, theirs)
            )
            assert relative_error(dict(enumerate(found)), dict(enumerate(exact))) < 1e-12
            # The gradient in all inputs, differentiated in some of them.
            found, exact = (second_derivatives(function, some) for function in (ours, theirs))
            assert relative_error(dict(enumerate(found)), dict(enumerate(exact))) < 1e-12


def test_an_empty_sum_is_refused():
    with pytest.raises(ValueError, match="needs a term"):
        weighted_sum([])


def test_the_sum_leaves_its_terms_alone():
    terms = [torch.ones(1, 1, 2, 2) for _ in range(3)]
    before = copy.deepcopy(terms)
    weighted_sum(terms[:1], torch.tensor([2.0, 3.0]), terms[1:])
    weighted_sum(terms)
    assert all(torch.equal(a, b) for a, b in zip(terms, before, strict=True))
