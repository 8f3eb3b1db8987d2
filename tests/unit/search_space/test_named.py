"""The published genotypes."""

from __future__ import annotations

import pytest
from small_networks import cifar_and_imagenet

from lfmcw_app.search_space.genotype import Genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES

# (CIFAR-10: 36 channels, 20 cells; ImageNet: 48 channels, 14 cells), millions of parameters in the
# papers' tables.
PUBLISHED_PARAMETERS = {"DARTS_V2": (3.3, 4.7), "PC_DARTS_cifar": (3.6, 5.3), "PDARTS": (3.4, 4.9)}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_published_cells_have_the_published_number_of_parameters(name):
    counts = tuple(round(net.parameter_count() / 1e6, 1) for net in cifar_and_imagenet(name))
    assert counts == PUBLISHED_PARAMETERS[name]


def test_published_genotypes_are_valid_and_survive_json():
    assert set(NAMED_GENOTYPES) == {
        "DARTS_V1",
        "DARTS_V2",
        "PC_DARTS_cifar",
        "PC_DARTS_imagenet",
        "PDARTS",
    }
    for genotype in NAMED_GENOTYPES.values():
        assert Genotype.from_json(genotype.to_json()) == genotype
        assert genotype.nodes == 4
