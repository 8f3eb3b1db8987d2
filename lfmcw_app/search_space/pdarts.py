"""P-DARTS: a search in stages, deeper and with fewer operations, with limited skip connections.

A search goes through `pdarts_stages()`. Each begins with a new supernet, architecture and
optimizers, for the candidates that the last one kept. Each epoch sets the dropout on identities
(`skip_drop_probability`, `set_skip_drop_probability`). Each stage ends with `surviving`, except the
last, which ends with `derive_restricted_genotype`.

Reference: Chen et al., Progressive Differentiable Architecture Search (2019), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.cell import edge_index
from lfmcw_app.search_space.genotype import EDGES_PER_NODE, Genotype, derive_genotype
from lfmcw_app.search_space.supernet import MixingWeights, Supernet

__all__ = [
    "PDartsStage",
    "derive_restricted_genotype",
    "pdarts_stages",
    "set_skip_drop_probability",
    "skip_drop_probability",
    "surviving",
]


@dataclass(frozen=True, kw_only=True)
class PDartsStage:
    """A stage of P-DARTS's search.

    Attributes:
        layers: cells of its supernet.
        drops: operations that each edge loses after it.
        drops_none: whether `none` goes first, however strong: after the last stage.
    """

    layers: int
    drops: int
    drops_none: bool


def pdarts_stages(
    layers: int = 5, added: Sequence[int] = (0, 6, 12), drops: Sequence[int] = (3, 2, 2)
) -> tuple[PDartsStage, ...]:
    """Returns the stages.

    The paper's have 5, 11 and 17 cells with 8, 5 and 3 operations per edge, of which one is left.

    Args:
        layers: cells of the first supernet.
        added: cells that each stage has in addition.
        drops: operations that each edge loses after each stage.
    """
    last = len(drops) - 1
    return tuple(
        PDartsStage(layers=layers + more, drops=fewer, drops_none=index == last)
        for index, (more, fewer) in enumerate(zip(added, drops, strict=True))
    )


def surviving(mixing: MixingWeights, candidates: Candidates, stage: PDartsStage) -> Candidates:
    """Returns the candidates without the weakest `stage.drops` of each edge.

    Of equally weak ones the first goes.

    Args:
        mixing: the mixing weights at the stage's end, [edges, primitives] of each kind of cell.
        candidates: names of the columns.
        stage: the stage that ends.

    Raises:
        ValueError: if weights are not finite, or an edge would be left without a primitive other
            than `none`.
    """
    return Candidates(
        normal=_strongest(mixing.normal, candidates.normal, stage),
        reduction=_strongest(mixing.reduction, candidates.reduction, stage),
    )


def _strongest(
    weights: Tensor, candidates: tuple[tuple[str, ...], ...], stage: PDartsStage
) -> tuple[tuple[str, ...], ...]:
    if not bool(weights.isfinite().all()):
        raise ValueError("No operations can be dropped: the mixing weights are not finite.")
    # After the last stage `none` must go first, because a derived cell cannot have it.
    result = []
    for row, names in zip(weights.tolist(), candidates, strict=True):
        strengths = [
            -math.inf if stage.drops_none and name == "none" else strength
            for name, strength in zip(names, row, strict=True)
        ]
        weakest = sorted(range(len(names)), key=strengths.__getitem__)[: stage.drops]
        result.append(tuple(name for column, name in enumerate(names) if column not in weakest))
    return tuple(result)


def skip_drop_probability(rate: float, epoch: int, *, epochs: int = 25, frozen: int = 10) -> float:
    """Returns the dropout probability on identities in an epoch of a stage.

    While α is frozen it falls linearly, rate · (epochs − epoch − 1) / epochs; then it starts again
    from `rate` and decays as exp(−0.2 t), so that in the end α is learned with identities on equal
    terms.

    Args:
        rate: the stage's initial probability.
        epoch: from 0.
        epochs: epochs of a stage.
        frozen: epochs at its beginning in which α is not updated.
    """
    if epoch < frozen:
        return rate * (epochs - epoch - 1) / epochs
    return rate * math.exp(-0.2 * (epoch - frozen))


def set_skip_drop_probability(module: nn.Module, probability: float) -> None:
    """Sets the dropout on identities of every supernet in `module`.

    A discriminator's trunk is a supernet as well.
    """
    for part in module.modules():
        if isinstance(part, Supernet):
            part.skip_drop_probability = probability


def derive_restricted_genotype(
    mixing: MixingWeights, candidates: Candidates, max_skips: int = 2
) -> Genotype:
    """Derives the discrete cells with at most `max_skips` skip connections in the normal cell.

    While there are more, the weakest skip connection in the cell is given the weight 0 and the cell
    derived again. Its edge may then have another operation, or give way to another edge, whose
    operation may be a skip connection too.

    Args:
        mixing: the mixing weights of the last stage, [edges, primitives] of each kind of cell.
        candidates: names of the columns: the last stage's, before its drop.
        max_skips: P-DARTS: 2.

    Raises:
        ValueError: if weights are not finite.
        InputError: if there are skip connections that nothing can replace.

    Reference: Chen et al., P-DARTS (2019), section 3.3.2.
    """
    normal = mixing.normal.detach().clone()
    while True:
        genotype = derive_genotype(
            MixingWeights(normal=normal, reduction=mixing.reduction), candidates
        )

        # The skip connections in the cell, as places in the mixing weights.
        places = []
        for index, edge in enumerate(genotype.normal):
            if edge.primitive == "skip_connect":
                row = edge_index(index // EDGES_PER_NODE, edge.source)
                places.append((row, candidates.normal[row].index("skip_connect")))
        if len(places) <= max_skips:
            return genotype

        # One at a time, since the edges that replace them may be skip connections too.
        replaceable = [place for place in places if float(normal[place]) > 0.0]
        if not replaceable:
            raise InputError(
                f"The normal cell cannot have {max_skips} skip connections or fewer: {len(places)} "
                "of its edges have no other operation. Give those edges more candidates, or allow "
                "more skip connections."
            )
        normal[min(replaceable, key=lambda place: float(normal[place]))] = 0.0
