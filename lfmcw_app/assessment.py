"""What a trained network is worth: its errors on the test images, class by class, and in training.

Before anything is measured the running statistics of its norms are computed anew (batchnorm.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lfmcw_app.batchnorm import recompute_statistics
from lfmcw_app.data import Batches, Dataset, Images, in_order, subset
from lfmcw_app.processes import all_gathered
from lfmcw_app.proportions import interval
from lfmcw_app.recipe import Augmentation
from lfmcw_app.search_space.network import ImageNetwork
from mlo.distributed import rank_and_size

__all__ = ["MOST_CLASSES", "Answers", "answers_of", "assessed"]

BATCH = 256
STATISTICS_IMAGES = 10_000
"""Maximum number of training images for the statistics and the training error.

On ImageNet this takes seconds. A mean over 10,000 images with hundreds of positions each differs
little from that over a million, far less than the batches of a training differ from one another.
"""

MOST_CLASSES = 100
"""Maximum number of classes with a whole confusion matrix in the result; beyond, its mistakes."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A network's answers on some images.

    Attributes:
        labels: the right classes, [N].
        predictions: the likeliest classes, [N]; −1 where the logits are not numbers.
        ranks: the number of classes found likelier than the right one, [N].
    """

    labels: Tensor
    predictions: Tensor
    ranks: Tensor

    @property
    def error(self) -> float:
        """The share of wrong answers, %."""
        return 100.0 * float((self.ranks >= 1).double().mean())


def assessed(
    network: ImageNetwork,
    train: Images,
    test: Images,
    dataset: Dataset,
    device: torch.device,
    *,
    augmentation: Augmentation | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Recomputes the running statistics, measures the network, and returns entries of the result.

    Args:
        network: trained; its running statistics are replaced.
        train: what it was trained on.
        test: what it is tested on.
        dataset: gives normalisation and class names.
        device: where.
        augmentation: of the training.
        seed: decides on its random changes.
    """
    # The images are augmented, as for the running averages of a training, with which published
    # results were measured. After a whole training the two differ by less than the spread
    # (docs/results-details.md).
    some = subset(train, STATISTICS_IMAGES, 0)
    count = math.ceil(len(some) / BATCH)
    batches = Batches(
        some,
        dataset,
        batch_size=len(some) // count,  # equal batches: no small one at the end
        seed=seed,
        augmentation=augmentation,
        device=device,
    )
    recompute_statistics(network, (partial(network, batches.batch(i)[0]) for i in range(count)))

    tested = answers_of(network, test, dataset, device)
    training_error = answers_of(network, some, dataset, device).error
    wrong = int((tested.ranks >= 1).sum())
    by_class = _by_class(tested, dataset.class_names)
    known = [entry["error_percent"] for entry in by_class if entry["images"]]
    top5_error = None  # of five guesses: meaningless for fewer classes
    if dataset.num_classes > 5:
        top5_error = 100.0 * float((tested.ranks >= 5).double().mean())
    result = {
        "test_error_percent": tested.error,
        "test_error_interval_percent": [round(end, 3) for end in interval(wrong, len(test))],
        "test_top5_error_percent": top5_error,
        "test_images": len(test),
        "balanced_error_percent": sum(known) / len(known),
        "training_error_percent": training_error,
        "classes": by_class,
    }
    if dataset.num_classes <= MOST_CLASSES:
        result["confusion"] = _confusion(tested, dataset.num_classes)
    else:
        result["mistakes"] = _mistakes(tested, dataset.num_classes)
    doubt = _doubt(tested, training_error)
    return {**result, **({"doubt": doubt} if doubt else {})}


def answers_of(
    network: ImageNetwork, images: Images, dataset: Dataset, device: torch.device
) -> Answers:
    """The network's answers on images; the processes take the batches in turns."""
    part = rank_and_size()
    own = [_answered(network, batch) for batch in in_order(images, dataset, BATCH, device, part)]

    # Each image counts once, so their order, which depends on the number of processes, does not
    # matter.
    found = [batch for batches in all_gathered(own) for batch in batches]
    labels, predictions, ranks = (torch.cat(column) for column in zip(*found, strict=True))
    return Answers(labels=labels, predictions=predictions, ranks=ranks)


@torch.no_grad()
def _answered(network: ImageNetwork, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, predictions and ranks of a batch, each [B], on the CPU."""
    images, labels = batch
    trained = network.training
    network.eval()
    logits, _ = network(images)
    network.train(trained)
    right = logits.gather(1, labels.unsqueeze(1))

    # Of equal logits the class listed first counts as likelier, as argmax has it.
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    ranks = ((logits > right) | ((logits == right) & earlier)).sum(1)

    # Comparisons with NaN are all false, which would give rank 0: the right answer.
    lost = logits.isnan().any(1)
    ranks = torch.where(lost, logits.shape[1], ranks)
    predictions = torch.where(lost, -1, logits.argmax(1))
    return labels.cpu(), predictions.cpu(), ranks.cpu()


# ------------------------------ by class


def _by_class(answers: Answers, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class its name, its number of test images, its error and the error's interval, %."""
    counts = torch.bincount(answers.labels, minlength=len(class_names)).tolist()
    wrong = torch.bincount(answers.labels[answers.ranks >= 1], minlength=len(class_names)).tolist()
    found = []
    for name, count, errors in zip(class_names, counts, wrong, strict=True):
        low, high = interval(errors, count)
        found.append(
            {
                "name": name,
                "images": count,
                "error_percent": 100.0 * errors / count if count else None,
                "interval_percent": [round(low, 3), round(high, 3)],
            }
        )
    return found


def _confusion(answers: Answers, classes: int) -> list[list[int]]:
    """Rows: the right class; columns: the predicted one. Answers that are no numbers are in none.

    [classes][classes], counts.
    """
    pairs = _pairs(answers, classes)
    counts: list[list[int]] = torch.bincount(pairs, minlength=classes**2).view(classes, -1).tolist()
    return counts


def _mistakes(answers: Answers, classes: int) -> list[list[int]]:
    """The confusion matrix off its diagonal: [class, answer, images], the most common first.

    There are at most as many entries as test images; ImageNet's matrix has a million numbers.
    """
    pairs, counts = torch.unique(_pairs(answers, classes), return_counts=True)
    wrong = pairs // classes != pairs % classes
    pairs, counts = pairs[wrong], counts[wrong]
    order = counts.argsort(descending=True, stable=True)
    columns = (pairs // classes, pairs % classes, counts)
    found: list[list[int]] = torch.stack([column[order] for column in columns], dim=1).tolist()
    return found


def _pairs(answers: Answers, classes: int) -> Tensor:
    """Right class and predicted class as one number, [N]; answers that are no numbers left out."""
    given = answers.predictions >= 0
    return answers.labels[given] * classes + answers.predictions[given]


# ------------------------------ doubt

NEAR_CHANCE, LEARNED = 0.8, 0.25
"""Shares of the error at chance. In doubt are a test error above the first and a training error
below the second.
"""


def _doubt(tested: Answers, training_error: float) -> str | None:
    """A warning if the training images are known but the test images are guessed."""
    shares = torch.bincount(tested.labels).double() / len(tested.labels)
    chance = 100.0 * (1.0 - float(shares.max()))
    if not (training_error < LEARNED * chance and tested.error > NEAR_CHANCE * chance):
        return None
    return (
        f"The network is wrong on {training_error:.1f}% of its training images and on "
        f"{tested.error:.1f}% of the {len(tested.labels):,} test images, where always naming the "
        f"largest class would give {chance:.1f}%. Either it has learned its images by heart, or "
        "the test images are of another kind. Look for mixed-up labels, for test images that "
        "were made or prepared differently, and for too few training images."
    )
