"""Published cells of earlier searches, to compare with those of LFM-CW."""

from __future__ import annotations

from collections.abc import Sequence

from lfmcw_app.search_space.genotype import Edge, Genotype

__all__ = ["NAMED_GENOTYPES"]


def _cell(*nodes: Sequence[tuple[str, int]]) -> tuple[Edge, ...]:
    """A cell from, for each node, its two edges (primitive, source)."""
    return tuple(Edge(primitive, source) for node in nodes for primitive, source in node)


NAMED_GENOTYPES: dict[str, Genotype] = {
    # Liu et al., DARTS (2019), first order, CIFAR-10.
    "DARTS_V1": Genotype(
        normal=_cell(
            [("sep_conv_3x3", 1), ("sep_conv_3x3", 0)],
            [("skip_connect", 0), ("sep_conv_3x3", 1)],
            [("skip_connect", 0), ("sep_conv_3x3", 1)],
            [("sep_conv_3x3", 0), ("skip_connect", 2)],
        ),
        reduction=_cell(
            [("max_pool_3x3", 0), ("max_pool_3x3", 1)],
            [("skip_connect", 2), ("max_pool_3x3", 0)],
            [("max_pool_3x3", 0), ("skip_connect", 2)],
            [("skip_connect", 2), ("avg_pool_3x3", 0)],
        ),
    ),
    # Liu et al., DARTS (2019), second order, CIFAR-10: figures 4 and 5.
    "DARTS_V2": Genotype(
        normal=_cell(
            [("sep_conv_3x3", 0), ("sep_conv_3x3", 1)],
            [("sep_conv_3x3", 0), ("sep_conv_3x3", 1)],
            [("sep_conv_3x3", 1), ("skip_connect", 0)],
            [("skip_connect", 0), ("dil_conv_3x3", 2)],
        ),
        reduction=_cell(
            [("max_pool_3x3", 0), ("max_pool_3x3", 1)],
            [("skip_connect", 2), ("max_pool_3x3", 1)],
            [("max_pool_3x3", 0), ("skip_connect", 2)],
            [("skip_connect", 2), ("max_pool_3x3", 1)],
        ),
    ),
    # Xu et al., PC-DARTS (2020), CIFAR-10.
    "PC_DARTS_cifar": Genotype(
        normal=_cell(
            [("sep_conv_3x3", 1), ("skip_connect", 0)],
            [("sep_conv_3x3", 0), ("dil_conv_3x3", 1)],
            [("sep_conv_5x5", 0), ("sep_conv_3x3", 1)],
            [("avg_pool_3x3", 0), ("dil_conv_3x3", 1)],
        ),
        reduction=_cell(
            [("sep_conv_5x5", 1), ("max_pool_3x3", 0)],
            [("sep_conv_5x5", 1), ("sep_conv_5x5", 2)],
            [("sep_conv_3x3", 0), ("sep_conv_3x3", 3)],
            [("sep_conv_3x3", 1), ("sep_conv_3x3", 2)],
        ),
    ),
    # Xu et al., PC-DARTS (2020), ImageNet.
    "PC_DARTS_imagenet": Genotype(
        normal=_cell(
            [("skip_connect", 1), ("sep_conv_3x3", 0)],
            [("sep_conv_3x3", 0), ("skip_connect", 1)],
            [("sep_conv_3x3", 1), ("sep_conv_3x3", 3)],
            [("sep_conv_3x3", 1), ("dil_conv_5x5", 4)],
        ),
        reduction=_cell(
            [("sep_conv_3x3", 0), ("skip_connect", 1)],
            [("dil_conv_5x5", 2), ("max_pool_3x3", 1)],
            [("sep_conv_3x3", 2), ("sep_conv_3x3", 1)],
            [("sep_conv_5x5", 0), ("sep_conv_3x3", 3)],
        ),
    ),
    # Chen et al., P-DARTS (2019), CIFAR-10.
    "PDARTS": Genotype(
        normal=_cell(
            [("skip_connect", 0), ("dil_conv_3x3", 1)],
            [("skip_connect", 0), ("sep_conv_3x3", 1)],
            [("sep_conv_3x3", 1), ("sep_conv_3x3", 3)],
            [("sep_conv_3x3", 0), ("dil_conv_5x5", 4)],
        ),
        reduction=_cell(
            [("avg_pool_3x3", 0), ("sep_conv_5x5", 1)],
            [("sep_conv_3x3", 0), ("dil_conv_5x5", 2)],
            [("max_pool_3x3", 0), ("dil_conv_3x3", 1)],
            [("dil_conv_3x3", 1), ("dil_conv_5x5", 3)],
        ),
    ),
}
"""Name → genotype, as in the authors' programs; the order of a node's two edges means nothing."""
