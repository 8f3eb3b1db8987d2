"""The modules of a search's problems: supernets, generator and discriminator, architecture."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lfmcw_app.data import Dataset
from lfmcw_app.errors import InputError
from lfmcw_app.generators import GAMES, Discriminator, ImageGenerator
from lfmcw_app.ops import classwise_cross_entropy
from lfmcw_app.recipe import Generator, Search
from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.layers import Norm, OperationStyle
from lfmcw_app.search_space.stem import image_divisor
from lfmcw_app.search_space.supernet import Architecture, MixingWeights, Supernet
from lfmcw_app.spaces import space_named
from mlo.distributed import global_mean, rank_and_size
from mlo.randomness import preserved

__all__ = [
    "GAN",
    "SearchModules",
    "WeightedLearner",
    "build_modules",
    "generator_for",
    "make_generator",
]

CLASS_LOSS_MOMENTUM = 0.9


class WeightedLearner(nn.Module):
    """The second set of weights, W2, and the running class losses.

    The latter replace the losses of classes missing from a batch.

    Attributes:
        class_losses: running mean of l_c, [C]; ln C (the loss of a uniform guess) until the class
            was seen.
        seen: whether a class was seen, [C].
    """

    class_losses: Tensor
    seen: Tensor

    def __init__(self, network: Supernet, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("class_losses", torch.full((num_classes,), math.log(num_classes)))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, images: Tensor, mixing: MixingWeights) -> Tensor:
        """Returns the network's logits [B, num_classes] of `images` [B, C, H, W]."""
        logits: Tensor = self.network(images, mixing)
        return logits

    def class_weights(self, logits: Tensor, labels: Tensor, absent: str = "running_mean") -> Tensor:
        """Returns l_c, the mean loss of W1 on each class [C].

        It is differentiable for the classes in the batch.

        Args:
            logits: W1's logits on the validation batch, [B, C].
            labels: its labels, [B].
            absent: the loss of a class without examples: "running_mean" of its earlier losses
                (treated as constant), "batch_mean" of the other classes' losses (differentiable),
                or "zero".
        """
        means, counts = classwise_cross_entropy(logits, labels)
        if rank_and_size(of_loss=True)[1] > 1:
            # l_c is a mean over the whole batch, not the mean of the processes' means. So sums and
            # counts are averaged, and then divided.
            parts = torch.stack([means * counts, counts.to(means.dtype)])
            sums, counts = global_mean(parts).unbind()
            means = torch.where(counts > 0, sums / counts.clamp(min=1e-6), 0.0)
        present = counts > 0

        if absent == "running_mean":
            others = self.class_losses.to(means.dtype, copy=True)
        elif absent == "batch_mean":
            others = (torch.where(present, means, 0.0).sum() / present.sum()).expand_as(means)
        else:
            others = torch.zeros_like(means)
        weights = torch.where(present, means, others)

        # The first loss of a class is taken as it is: momentum 0.
        with torch.no_grad():
            momentum = CLASS_LOSS_MOMENTUM * self.seen.to(means.dtype)
            updated = momentum * self.class_losses + (1 - momentum) * means
            self.class_losses.copy_(torch.where(present, updated, self.class_losses))
            self.seen.logical_or_(present)
        return weights


class GAN(nn.Module):
    """The two players of the image-generation game."""

    def __init__(self, generator: ImageGenerator, discriminator: Discriminator) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator


class SearchModules(NamedTuple):
    """The modules of the problems.

    Plain DARTS has neither W1 nor the GAN. With real images there is no GAN.
    """

    w1: Supernet | None
    gan: GAN | None
    w2: WeightedLearner
    arch: Architecture


def build_modules(
    search: Search,
    dataset: Dataset,
    *,
    candidates: Candidates | None = None,
    layers: int | None = None,
    activation: Literal["relu", "silu"] = "relu",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SearchModules:
    """Builds the modules of a search, initialised from the global random state.

    Args:
        search: the recipe of the search.
        dataset: gives classes, channels and image size.
        candidates: the candidate operations of each edge; by default all of the space.
        layers: cells of the supernets; by default the recipe's.
        activation: "relu", or "silu" for smooth networks in tests.
        device: where they go.
        dtype: of their parameters.

    Raises:
        InputError: for images whose size does not fit the stem or the generator, or a
            discriminator's norm that does not fit its game.
    """
    divisor = image_divisor(search.stem)
    if dataset.image_size % divisor:
        raise InputError(
            f"The {search.stem} stem and two reductions need images of a multiple of {divisor} "
            f"pixels, got {dataset.image_size}. Set data.image_size."
        )

    space = space_named(search.space)
    operations = candidates or space.candidates(search)

    def supernet(norm: Norm) -> Supernet:
        return space.supernet(
            search,
            operations,
            layers=search.layers if layers is None else layers,
            in_channels=dataset.channels,
            num_classes=dataset.num_classes,
            style=OperationStyle(norm=norm, activation=activation),
        )

    # The order decides which numbers each module draws from the random state.
    w1, gan = None, None
    if search.method == "lfmcw":
        w1 = supernet("batch")
    if search.method == "lfmcw" and not search.draws_real:
        feature_size = dataset.image_size // divisor
        gan = GAN(*_players(search.generator, dataset, supernet, feature_size))
    modules = SearchModules(
        w1=w1,
        gan=gan,
        w2=WeightedLearner(supernet("batch"), dataset.num_classes),
        arch=space.architecture(search, operations),
    )
    for module in modules:
        if module is not None:
            module.to(device=device, dtype=dtype)
    return modules


def make_generator(
    how: Generator,
    *,
    num_classes: int,
    image_size: int,
    image_channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ImageGenerator:
    """Builds the generator of a recipe for images as they are described; see `ImageGenerator`."""
    generator = GAMES[how.name].generator(
        num_classes=num_classes,
        image_size=image_size,
        image_channels=image_channels,
        mean=mean,
        std=std,
        noise_dim=how.noise_dim,
        channels=how.channels,
    )
    generator.evaluations_per_update = how.discriminator_steps
    return generator


def generator_for(how: Generator, dataset: Dataset) -> ImageGenerator:
    """Builds the generator of a recipe for the images of a data set.

    Raises:
        InputError: if it is another package's, and its images are no images of the data set.
    """
    generator = make_generator(
        how,
        num_classes=dataset.num_classes,
        image_size=dataset.image_size,
        image_channels=dataset.channels,
        mean=dataset.mean,
        std=dataset.std,
    )
    if not GAMES.is_built_in(how.name):
        _check_images(generator, how.name, dataset)
    return generator


@torch.no_grad()
def _check_images(generator: ImageGenerator, name: str, dataset: Dataset) -> None:
    """Refuses images that a search would take without a word, as a network takes every size.

    Raises:
        InputError: if they have another shape than those of the data set, or other values.
    """
    labels = torch.arange(2, device=generator.mean.device) % dataset.num_classes
    with preserved():
        tried = copy.deepcopy(generator)  # a norm of it may keep statistics
        noise = torch.randn(2, tried.noise_dim, device=labels.device)
        try:
            pixels = tried.pixels(noise, labels)
        except NotImplementedError:
            return  # kernels of another device, which it has not been moved to yet
    wanted = (2, dataset.channels, dataset.image_size, dataset.image_size)
    if pixels.shape != wanted:
        raise InputError(
            f"The generator {name!r} draws {list(pixels.shape)} for 2 labels. Its `pixels` must "
            f"return {list(wanted)}: [B, image_channels, image_size, image_size]."
        )
    largest = 0.0 if pixels.is_meta else float(pixels.abs().max())
    if not largest <= 1.0 + 1e-3:  # False for NaN too
        raise InputError(
            f"The generator {name!r} draws values of up to {largest:.3g}. Its `pixels` must be in "
            "[-1, 1], where -1 is black and 1 is white: end it with torch.tanh."
        )


def _players(
    how: Generator, dataset: Dataset, supernet: Callable[[Norm], Supernet], feature_size: int
) -> tuple[ImageGenerator, Discriminator]:
    """The generator, and the discriminator with the searched architecture."""
    game = GAMES[how.name]
    norm = how.discriminator_norm or game.trunk_norms[0]
    if norm not in game.trunk_norms:
        raise InputError(
            f"search.generator.discriminator_norm is {norm!r}; the game of {how.name} takes "
            f"{', '.join(game.trunk_norms)}."
        )
    generator = generator_for(how, dataset)

    # A norm behind a convolution would undo spectral norm in the trunk, so that is refused.
    undone = game.spectral_norm == "all" and norm != "none"
    discriminator = Discriminator(
        supernet(norm),
        num_classes=dataset.num_classes,
        feature_size=feature_size,
        head=how.discriminator_head or game.head,
        spectral_norm="head" if undone else game.spectral_norm,
    )
    return generator, discriminator
