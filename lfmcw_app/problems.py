"""The four problems of LFM-CW (Gala and Xie, Eqs. 1-5) as an `mlo` graph: w1, gan, w2, arch.

    w1    W1 minimises the cross entropy (CE) on D_tr                                    (Eq. 1)
    gan   G and H play a conditional GAN's game on D_tr; H's trunk has the architecture  (Eq. 2)
    w2    W2 minimises CE on D_tr + λ Σ_c l_c(A, W1, D_val) Σ_m CE(generated x̂_{c,m}, c)  (Eq. 3)
    arch  A minimises W2's cross entropy on D_val                                        (Eq. 4)

The gradient of Eq. 4 in A runs A → W2, A → W1 → W2 and A → G → W2 (Eqs. 12-18); `mlo` derives these
routes from what the losses below read. Plain DARTS, the baseline, is the same graph with fewer
problems: w2 on D_tr alone, and arch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import mlo
from lfmcw_app.budget import BudgetPenalty, make_penalty
from lfmcw_app.build_modules import GAN, SearchModules, WeightedLearner
from lfmcw_app.compilation import compile_discriminator, compile_options
from lfmcw_app.data import Batches, Dataset, Images, PairedBatches, resident
from lfmcw_app.generators import GAMES, PlayerLosses
from lfmcw_app.ops import class_weighted_cross_entropy
from lfmcw_app.optimizers import step_options
from lfmcw_app.processes import parallelism
from lfmcw_app.recipe import Recipe, Search, WeightOptimizer
from lfmcw_app.search_space.supernet import Architecture, Supernet
from lfmcw_app.spaces import space_named
from mlo import MultilevelOptimizer, Problem
from mlo.distributed import SyncBatchNorm, rank_and_size

__all__ = ["build_search", "learning_rate_schedule", "search_rounds"]


INDEPENDENT_STREAM, REAL_STREAM = 2**64, 2**65
"""A stream has the seed 2 · seed + stream. These numbers are beyond the streams 0 and 1 of all
seeds.
"""

# ------------------------------ losses


def w1_loss(
    w1: Supernet, batch: tuple[Tensor, Tensor], *, arch: Architecture
) -> tuple[Tensor, dict[str, Any]]:
    """Cross entropy of W1 on a training batch (Eq. 1)."""
    images, labels = batch
    logits = w1(images, arch())
    return F.cross_entropy(logits, labels), {"accuracy": _accuracy(logits, labels)}


def make_gan_loss(name: str) -> Callable[..., PlayerLosses]:
    """Makes the loss of a generator's conditional GAN on a training batch (Eq. 2)."""
    loss = GAMES[name].loss

    def gan_loss(gan: GAN, batch: tuple[Tensor, Tensor], *, arch: Architecture) -> PlayerLosses:
        images, labels = batch
        return loss(gan.discriminator, gan.generator, images, labels, arch())

    return gan_loss


def make_w2_loss(how: Search) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Makes the loss of W2 (Eq. 3); with `synthetic_only` without the images of D_tr (Eq. 19).

    With `generator.name: real` the batch contains the images to use in place of generated ones, and
    no GAN is read.
    """

    def weighted(
        w2: WeightedLearner,
        batch: tuple[Tensor, ...],
        generate: Callable[[Tensor], Tensor],
        arch: Architecture,
        w1: Supernet,
    ) -> tuple[Tensor, dict[str, Any]]:
        images, labels, validation_images, validation_labels = batch

        # `mlo.once`: finite differences of this loss in W2 share the parts that do not depend on
        # W2.
        mixing = mlo.once(arch)
        logits = w2(images, mixing)
        real = F.cross_entropy(logits, labels)

        # Σ_c l_c(A, W1', D_val) Σ_m CE(x̂_{c,m}, c): the generated images have the labels of the
        # training batch.
        validation_logits = mlo.once(w1, validation_images, mixing)
        class_weights = w2.class_weights(validation_logits, validation_labels, how.absent_class)
        if how.class_weighting == "uniform":
            # The sum stays the same, and so does what it is differentiable in.
            class_weights = class_weights.mean().expand_as(class_weights)
        generated = generate(labels)
        generated_logits = w2(generated, mixing)
        synthetic = class_weighted_cross_entropy(generated_logits, labels, class_weights)

        metrics = {
            "accuracy": _accuracy(logits, labels),
            "real": real,
            "synthetic": synthetic,
            "generated_accuracy": _accuracy(generated_logits, labels),
            "class_weights": class_weights,
        }
        total = how.lam * synthetic if how.synthetic_only else real + how.lam * synthetic
        return total, metrics

    # mlo reads the graph from the names of the arguments: A → G → W2 here, and no G there.
    def w2_loss(
        w2: WeightedLearner,
        batch: tuple[Tensor, Tensor, Tensor, Tensor],
        *,
        arch: Architecture,
        w1: Supernet,
        gan: GAN,
    ) -> tuple[Tensor, dict[str, Any]]:
        return weighted(w2, batch, lambda y: mlo.once(gan.generator.sample, y), arch, w1)

    def real_w2_loss(
        w2: WeightedLearner,
        batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        *,
        arch: Architecture,
        w1: Supernet,
    ) -> tuple[Tensor, dict[str, Any]]:
        *others, drawn, _ = batch  # the labels are those of the training batch
        return weighted(w2, tuple(others), lambda _: drawn, arch, w1)

    return real_w2_loss if how.draws_real else w2_loss


def plain_w2_loss(
    w2: WeightedLearner, batch: tuple[Tensor, Tensor], *, arch: Architecture
) -> tuple[Tensor, dict[str, Any]]:
    """Cross entropy on a training batch: the lower problem of DARTS."""
    images, labels = batch
    logits = w2(images, arch())
    return F.cross_entropy(logits, labels), {"accuracy": _accuracy(logits, labels)}


def make_arch_loss(
    penalty: BudgetPenalty | None = None,
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Makes the loss of A: W2's cross entropy on a validation batch (Eq. 4), plus any penalty."""

    def arch_loss(
        arch: Architecture, batch: tuple[Tensor, Tensor], *, w2: WeightedLearner
    ) -> tuple[Tensor, dict[str, Any]]:
        images, labels = batch
        mixing = arch()
        logits = w2(images, mixing)
        loss = F.cross_entropy(logits, labels)
        metrics: dict[str, Any] = {"accuracy": _accuracy(logits, labels)}
        if penalty is None:
            return loss, metrics
        excess, costs = penalty(mixing)
        return loss + excess, metrics | costs

    return arch_loss


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()


def search_rounds(search: Search, images: int) -> int:
    """Number of rounds of a search whose training half holds `images` images."""
    if search.steps is not None:
        return search.steps
    assert search.epochs is not None
    return max(1, round(search.epochs * (images // search.batch_size)))


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, how: WeightOptimizer, rounds: int, per_epoch: int
) -> LambdaLR:
    """A cosine or linear schedule from `lr` to `min_lr` in steps of epochs, as in DARTS's programs.

    An epoch has `per_epoch` rounds. The schedule is one function of the epoch, warm-up included.
    With a separate warm-up the scheduler would multiply a wrong last rate.
    """
    epochs = max(1, math.ceil(rounds / per_epoch))

    def factor(step: int) -> float:
        # The rate relative to `lr`; a LambdaLR multiplies it by `lr`.
        epoch = min(step // per_epoch, epochs)
        done = epoch / epochs
        share = (1 + math.cos(math.pi * done)) / 2 if how.schedule == "cosine" else 1 - done
        grown = min(1.0, (epoch + 1) / how.warmup_epochs) if how.warmup_epochs else 1.0
        return grown * (how.min_lr + (how.lr - how.min_lr) * share) / how.lr

    return LambdaLR(optimizer, factor)


def build_search(
    recipe: Recipe,
    dataset: Dataset,
    train: Images,
    validation: Images,
    modules: SearchModules,
    *,
    unused: Images | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MultilevelOptimizer:
    """Declares the problems of a search (two for plain DARTS, otherwise four) and their engines.

    With `generator.name: real` there is no game: the generated images are drawn from `unused`, one
    per label of the training batch, uniformly among its class and with replacement.

    All streams of training batches have one seed, so w1, gan and w2 see the same batch in a round,
    unless the discriminator makes several moves, each on its own batch. The two streams of
    validation batches, which w2 (for the class weights) and arch read, have one seed too, unless
    `validation_batch` says otherwise.
    """
    search = recipe.search
    parallel = parallelism(recipe, own_noise=space_named(search.space).draws(search))
    if recipe.distributed.sync_batchnorm:
        for module in modules:
            if module is not None:
                SyncBatchNorm.convert(module)

    train = resident(train, search.augmentation, device)
    validation = resident(validation, search.augmentation, device)

    def batches(images: Images, stream: int, matched_to: Batches | None = None) -> Batches:
        return Batches(
            images,
            dataset,
            batch_size=search.batch_size,
            seed=2 * recipe.seed + stream,
            augmentation=search.augmentation,
            device=device,
            dtype=dtype,
            part=rank_and_size(),
            matched_to=matched_to,
        )

    # Each problem has its own stream; streams of one kind read each file once (`alike`).
    training, validating = batches(train, 0), batches(validation, 1)

    # Learning rates and warm-ups are counted in epochs of the training half.
    per_epoch = training.per_epoch
    rounds = search_rounds(search, len(train))

    def weights_problem(
        name: str, module: nn.Module, loss: Callable[..., Any], data: Any
    ) -> Problem:
        # w1 and w2 are trained alike: with the same SGD, schedule and batches.
        how = search.weights
        optimizer = torch.optim.SGD(
            module.parameters(),
            lr=how.lr,
            momentum=how.momentum,
            weight_decay=how.weight_decay,
            **step_options(device),
        )
        schedule = learning_rate_schedule(optimizer, how, rounds, per_epoch)
        return Problem(
            name,
            module=module,
            optimizer=optimizer,
            scheduler=schedule,
            grad_clip=how.grad_clip,
            precision=search.precision,
            compile=compile_options(search),
            loss=loss,
            data=data,
        )

    # α moves on the validation half. During the warm-up it rests and draws no batches. Its stream
    # begins where that of the class weights will be afterwards, so that both see the same batch.
    rests = search.architecture.warmup_epochs * per_epoch
    of_arch = validating.alike()
    of_arch.position = rests
    arch = _architecture_problem(recipe, dataset, modules.arch, of_arch, rests, device)
    engines = _engines(search, modules)
    order: Literal["outermost_first", "lower_first"] = (
        "outermost_first" if search.architecture.moves_first else "lower_first"
    )
    if modules.w1 is None:  # plain DARTS
        problems = [weights_problem("w2", modules.w2, plain_w2_loss, training.alike()), arch]
        return MultilevelOptimizer(problems, engines, order=order, distributed=parallel)

    # w2 reads the validation batch on which arch moves, or one that is independent of it, or one
    # with the classes of the training batch. Images are drawn in the place of generated ones, if
    # they are real.
    streams = [training.alike(), validating.alike()]
    if search.validation_batch == "independent":
        streams[1] = batches(validation, INDEPENDENT_STREAM)
    elif search.validation_batch == "matched":
        streams[1] = batches(validation, 1, matched_to=training)
    if search.draws_real:
        if unused is None:
            raise ValueError("generator.name real needs `unused`, the images that are drawn from")
        drawn = resident(unused, search.augmentation, device)
        streams.append(batches(drawn, REAL_STREAM, matched_to=training))
    problems = [
        weights_problem("w1", modules.w1, w1_loss, training.alike()),
        weights_problem("w2", modules.w2, make_w2_loss(search), PairedBatches(*streams)),
        arch,
    ]
    if modules.gan is not None:
        # The game's module is never called itself, so mlo must be told that a part of it is
        # compiled.
        compiled = compile_discriminator(search, modules)
        problems.insert(1, _game(search, modules.gan, training.alike(), device, compiled))
    return MultilevelOptimizer(problems, engines, order=order, distributed=parallel)


def _engines(search: Search, modules: SearchModules) -> Any:
    """The engines of a search, without those of problems that it does not have."""
    engines = "first_order" if search.order == "first" else search.hypergradient
    if not isinstance(engines, Mapping) or "name" in engines:
        return engines
    there = {"default", "w2"}
    there |= {name for name in ("w1", "gan") if getattr(modules, name) is not None}
    return {name: engine for name, engine in engines.items() if name in there}


def _architecture_problem(
    recipe: Recipe,
    dataset: Dataset,
    module: nn.Module,
    batches: Batches,
    rests: int,
    device: torch.device | str,
) -> Problem:
    """Declares the problem of α, which rests and draws nothing in the first `rests` rounds."""
    search, how = recipe.search, recipe.search.architecture
    penalty = None
    if isinstance(module, Architecture):  # only DARTS's cells have a budget
        penalty = make_penalty(recipe, dataset, module.primitives, device)
    return Problem(
        "arch",
        module=module,
        optimizer=torch.optim.Adam(
            module.parameters(),
            lr=how.lr,
            betas=how.betas,
            weight_decay=how.weight_decay,
            **step_options(device),
        ),
        grad_clip=how.grad_clip,
        precision=search.precision,
        loss=make_arch_loss(penalty),
        data=batches,
        warmup_steps=rests,
    )


def _game(
    search: Search,
    gan: GAN,
    batches: Batches,
    device: torch.device | str,
    compiled: Mapping[str, Any],
) -> Problem:
    """Declares the problem of the two players."""
    how = search.generator

    def adam(module: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(module.parameters(), lr=lr, betas=how.betas, **step_options(device))

    # Each player has its own Adam; the discriminator may move several times per round.
    return Problem(
        "gan",
        module=gan,
        players={"generator": "generator", "discriminator": "discriminator"},
        player_steps={"discriminator": how.discriminator_steps},
        optimizer={
            "generator": adam(gan.generator, how.warmed_lr if how.begins_warm else how.lr),
            "discriminator": adam(gan.discriminator, how.discriminator_lr),
        },
        precision=search.precision,
        compile=compiled,
        loss=make_gan_loss(how.name),
        data=batches,
    )
