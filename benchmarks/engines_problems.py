"""The problems of `engines.py`, written once for all libraries, as plain functions of tensors.

A task is a list of levels from the innermost to the outermost. Each library builds its own modules
and optimizers from it, and evaluates the same functions, so that differences in the tables are
those of the libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PROBLEMS", "Level", "Task", "Tensors", "Values", "build"]

Tensors = dict[str, Tensor]
Loss = Callable[[Mapping[str, Tensors], Any], Tensor]
CLASSES = 10


class Values(nn.Module):
    """A module that holds tensors by name and computes nothing."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone()))

    def tensors(self) -> Tensors:
        """Name → what currently replaces that parameter."""
        return dict(self.named_parameters())


@dataclass(frozen=True, kw_only=True)
class Level:
    """One problem.

    Attributes:
        values: its parameters, by name.
        reads: the other problems that its loss reads.
        loss: (problem → its tensors, batch) → scalar.
        batch: the one batch on which it is always evaluated. It holds every constant of the loss
            that has a dtype.
        lr: learning rate of its SGD.
    """

    name: str
    values: Tensors
    reads: tuple[str, ...]
    loss: Loss
    batch: tuple[Tensor, ...]
    lr: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Task:
    """A multi-level problem: levels from the innermost one to the outermost one."""

    levels: tuple[Level, ...]

    @property
    def upper(self) -> Level:
        """The outermost level."""
        return self.levels[-1]

    @property
    def lower(self) -> tuple[Level, ...]:
        """All other levels."""
        return self.levels[:-1]

    def at(self, values: Mapping[str, Tensors], *, dtype: torch.dtype, upper_lr: float) -> Task:
        """The same task at other values, in another precision, with an outermost learning rate."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        def moved(level: Level) -> Level:
            return replace(
                level,
                values={name: cast(tensor) for name, tensor in values[level.name].items()},
                batch=tuple(map(cast, level.batch)),
                lr=upper_lr if level is self.upper else level.lr,
            )

        return Task(levels=tuple(map(moved, self.levels)))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _cross_entropy_of_linear(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, y, reduction="none")


# ------------------------------ one regularisation strength per feature


def _digits() -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] in [0, 1] and labels of scikit-learn's digits, in a seeded order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).double()[order, None] / 16.0
    return images, torch.from_numpy(data.target).long()[order]


def _regularised_loss(tensors: Mapping[str, Tensors], batch: tuple[Tensor, ...]) -> Tensor:
    weight, decays = tensors["w"]["weight"], tensors["x"]["decays"]
    return _cross_entropy_of_linear(weight, *batch).mean() + 0.5 * (weight**2 @ decays.exp()).sum()


def _validation_loss(tensors: Mapping[str, Tensors], batch: tuple[Tensor, ...]) -> Tensor:
    return _cross_entropy_of_linear(tensors["w"]["weight"], *batch).mean()


def logistic(*, quick: bool) -> Task:
    """Softmax regression on digits with one L2 strength per feature, exp(decays).

    The validation loss is above.
    """
    images, labels = _digits()
    x = images.flatten(1)
    x = x[:, x.std(0) > 0.03]
    x = (x - x.mean(0)) / x.std(0)
    x, labels = (x[:300], labels[:300]) if quick else (x, labels)
    half, features = len(x) // 2, x.shape[1]
    weight = torch.zeros(CLASSES, features, dtype=torch.float64)
    decays = torch.linspace(-5.0, -1.0, features, dtype=torch.float64)
    return Task(
        levels=(
            Level(
                name="w",
                values={"weight": weight},
                reads=("x",),
                loss=_regularised_loss,
                batch=(x[:half], labels[:half]),
            ),
            Level(
                name="x",
                values={"decays": decays},
                reads=("w",),
                loss=_validation_loss,
                batch=(x[half:], labels[half:]),
            ),
        )
    )


# ------------------------------ reweighting of mislabelled examples


def _reweighted_loss(tensors: Mapping[str, Tensors], batch: tuple[Tensor, ...]) -> Tensor:
    weight, scores = tensors["w"]["weight"], tensors["x"]["scores"]
    each = _cross_entropy_of_linear(weight, *batch)
    return (torch.sigmoid(scores) * each).mean() + 0.01 * weight.square().sum()


def reweighting(*, quick: bool) -> Task:
    """Softmax regression on Fashion-MNIST with half of the labels wrong, one weight per example.

    Clean images are above.

    Raises:
        InputError: if the data set is neither on disk nor can be downloaded.
    """
    from lfmcw_app.data import load_dataset

    images = load_dataset("fashion-mnist").train
    count, valid = (200, 100) if quick else (3000, 1000)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)[: count + valid]
    small = F.avg_pool2d(images.pixels[order].double() / 255.0, 4 if quick else 2).flatten(1)
    x = torch.cat([(small - 0.3) * 3.0, torch.ones(len(small), 1, dtype=torch.float64)], 1)
    labels = images.labels[order].clone()
    wrong = torch.randperm(count, generator=generator)[: count // 2]
    shift = torch.randint(1, CLASSES, wrong.shape, generator=generator)
    labels[wrong] = (labels[wrong] + shift) % CLASSES
    weight = torch.zeros(CLASSES, x.shape[1], dtype=torch.float64)
    scores = torch.zeros(count, dtype=torch.float64)
    return Task(
        levels=(
            Level(
                name="w",
                values={"weight": weight},
                reads=("x",),
                loss=_reweighted_loss,
                batch=(x[:count], labels[:count]),
                lr=0.01,
            ),
            Level(
                name="x",
                values={"scores": scores},
                reads=("w",),
                loss=_validation_loss,
                batch=(x[count:], labels[count:]),
            ),
        )
    )


# ------------------------------ the diamond of LFM-CW
#
# SiLU and average pooling throughout: across kinks a finite difference measures something else than
# autograd. Each lower loss pulls its parameters towards their initial values, so strongly that its
# solution is isolated and well-conditioned enough (a few hundred) to be computed to rounding;
# without that there is no exact hypergradient to compare with.

PULL = 0.15
NODES = 2


def _mixed(own: Tensors, alpha: Tensor, node: int, x: Tensor) -> Tensor:
    """The softmax-weighted sum of two convolutions, an average pooling and a skip connection.

    The convolutions are 3×3 and 1×1.
    """
    weights = alpha[node].softmax(0)
    wide = F.silu(F.conv2d(x, own[f"wide{node}"], padding=1))
    narrow = F.silu(F.conv2d(x, own[f"narrow{node}"]))
    return (
        weights[0] * wide
        + weights[1] * narrow
        + weights[2] * F.avg_pool2d(x, 3, 1, 1)
        + weights[3] * x
    )


def _classify(own: Tensors, alpha: Tensor, images: Tensor) -> Tensor:
    x = F.silu(F.conv2d(images, own["stem"], own["stem_bias"], padding=1))
    for node in range(NODES):
        x = _mixed(own, alpha, node, x)
        x = F.avg_pool2d(x, 2)
    return x.flatten(1) @ own["head"].T + own["head_bias"]


def _generate(own: Tensors, alpha: Tensor, codes: Tensor) -> Tensor:
    x = F.silu(codes @ own["stem"].T + own["stem_bias"]).view(len(codes), -1, 4, 4)
    x = F.interpolate(_mixed(own, alpha, 0, x), scale_factor=2)
    return F.conv2d(_mixed(own, alpha, 1, x), own["head"], own["head_bias"], padding=1)


def _pull(own: Tensors, anchors: tuple[Tensor, ...]) -> Tensor:
    pairs = zip(own.values(), anchors, strict=True)
    terms = [(tensor - anchor).square().sum() for tensor, anchor in pairs]
    return 0.5 * PULL * torch.stack(terms).sum()


def _w1_loss(tensors: Mapping[str, Tensors], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels, *anchors = batch
    logits = _classify(tensors["w1"], tensors["arch"]["alpha"], images)
    return F.cross_entropy(logits, labels) + _pull(tensors["w1"], tuple(anchors))


def _gan_loss(tensors: Mapping[str, Tensors], batch: tuple[Tensor, ...]) -> Tensor:
    codes, images, *anchors = batch
    made = _generate(tensors["gan"], tensors["arch"]["alpha"], codes)
    return 4.0 * F.mse_loss(made, images) + _pull(tensors["gan"], tuple(anchors))


def _w2_loss(tensors: Mapping[str, Tensors], batch: tuple[Tensor, ...]) -> Tensor:
    """Each example weighs what w1's loss on it says, and the generator's images count half."""
    images, labels, codes, *anchors = batch
    alpha = tensors["arch"]["alpha"]
    mistakes = F.cross_entropy(_classify(tensors["w1"], alpha, images), labels, reduction="none")
    made = _generate(tensors["gan"], alpha, codes)
    real = F.cross_entropy(_classify(tensors["w2"], alpha, images), labels, reduction="none")
    synthetic = F.cross_entropy(_classify(tensors["w2"], alpha, made), labels)
    return (
        (2.0 * torch.sigmoid(mistakes) * real).mean()
        + 0.5 * synthetic
        + _pull(tensors["w2"], tuple(anchors))
    )


def _arch_loss(tensors: Mapping[str, Tensors], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(_classify(tensors["w2"], tensors["arch"]["alpha"], images), labels)


def diamond(*, quick: bool) -> Task:
    """The graph of LFM-CW on digits: arch → w2, arch → w1 → w2, arch → gan → w2.

    With it goes arch's direct gradient.
    """
    channels, examples, noise = (2, 16, 1) if quick else (8, 128, 6)
    images, labels = _digits()
    generator = torch.Generator().manual_seed(0)
    normal = partial(_normal, generator)
    x, y = images[:examples], labels[:examples]
    codes = torch.cat([F.one_hot(y, CLASSES).double(), normal(examples, noise)], 1)

    def convolution(to: int, of: int, size: int) -> Tensor:
        return normal(to, of, size, size) / (of * size * size) ** 0.5

    def mixed() -> Tensors:
        wide = {f"wide{n}": convolution(channels, channels, 3) for n in range(NODES)}
        narrow = {f"narrow{n}": convolution(channels, channels, 1) for n in range(NODES)}
        return wide | narrow

    def zeros(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    def classifier() -> Tensors:
        features = channels * 4
        stem = {"stem": convolution(channels, 1, 3), "stem_bias": zeros(channels)}
        cells = mixed()
        head = {"head": normal(CLASSES, features) / features**0.5, "head_bias": zeros(CLASSES)}
        return stem | cells | head

    def generating() -> Tensors:
        width = codes.shape[1]
        stem = {
            "stem": normal(channels * 16, width) / width**0.5,
            "stem_bias": zeros(channels * 16),
        }
        cells = mixed()
        head = {"head": convolution(1, channels, 3), "head_bias": zeros(1)}
        return stem | cells | head

    valid = (images[examples : 2 * examples], labels[examples : 2 * examples])
    alpha = 0.5 * normal(NODES, 4)

    def lower(
        name: str, values: Tensors, reads: tuple[str, ...], loss: Loss, *data: Tensor
    ) -> Level:
        return Level(
            name=name,
            values=values,
            reads=reads,
            loss=loss,
            batch=(*data, *values.values()),
            lr=0.05,
        )

    return Task(
        levels=(
            lower("w1", classifier(), ("arch",), _w1_loss, x, y),
            lower("gan", generating(), ("arch",), _gan_loss, codes, x),
            lower("w2", classifier(), ("arch", "w1", "gan"), _w2_loss, x, y, codes),
            Level(
                name="arch", values={"alpha": alpha}, reads=("w2",), loss=_arch_loss, batch=valid
            ),
        )
    )


# ------------------------------ layers of width two

DIM = 16


def _layer_loss(
    tensors: Mapping[str, Tensors], batch: tuple[Tensor, ...], *, own: str, reads: tuple[str, ...]
) -> Tensor:
    """½ (w − r)ᵀ A (w − r) with r the sum of linear maps of what it reads: w* = r."""
    matrix, *maps = batch
    mapped = [m @ tensors[read]["v"] for m, read in zip(maps, reads, strict=True)]
    made = torch.stack(mapped).sum(0)
    residual = tensors[own]["v"] - made
    return 0.5 * residual @ matrix @ residual


def _target_loss(
    tensors: Mapping[str, Tensors], batch: tuple[Tensor, ...], *, reads: tuple[str, ...]
) -> Tensor:
    (target,) = batch
    total = torch.stack([tensors[read]["v"] for read in reads]).sum(0)
    return 0.5 * (total - target).square().sum()


def layered(*, layers: int) -> Task:
    """A DAG of layers of width 2, each problem reading both of the layer below: 2^layers paths."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(_normal, generator)
    levels: list[Level] = []
    below: tuple[str, ...] = ("x",)
    for layer in range(layers):
        names = tuple(f"p{layer}_{index}" for index in range(2))
        for name in names:
            basis, _ = torch.linalg.qr(normal(DIM, DIM))
            matrix = (basis * torch.logspace(0, -1, DIM, dtype=torch.float64)) @ basis.T
            maps = tuple(normal(DIM, DIM) / (DIM * len(below)) ** 0.5 for _ in below)
            loss = partial(_layer_loss, own=name, reads=below)
            values, batch = {"v": torch.zeros(DIM, dtype=torch.float64)}, (matrix, *maps)
            levels.append(
                Level(name=name, values=values, reads=below, loss=loss, batch=batch, lr=0.5)
            )
        below = names
    x = Level(
        name="x",
        values={"v": normal(DIM)},
        reads=below,
        loss=partial(_target_loss, reads=below),
        batch=(normal(DIM),),
    )
    return Task(levels=(*levels, x))


PROBLEMS = ("logistic", "reweighting", "diamond", "layered")


def build(name: str, *, quick: bool) -> Task:
    """Builds a task by name; `layered` is followed by its number of layers: `layered-8`."""
    if name.startswith("layered-"):
        return layered(layers=int(name.removeprefix("layered-")))
    makers: dict[str, Callable[..., Task]] = {
        "logistic": logistic,
        "reweighting": reweighting,
        "diamond": diamond,
    }
    return makers[name](quick=quick)
