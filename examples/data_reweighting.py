"""Data reweighting: learns one weight per training example, which reveals wrong labels.

The weights are learned from a small clean validation set.

    lower level   w* = argmin_w  1/N sum_i sigmoid(s_i) CE(w; x_i, y_i) + decay |w|^2 / 2,
                  half of the y_i are wrong
    upper level   min_s          CE(w*(s); clean validation data)

No label is marked as right or wrong: the scores s learn it through the solution of the lower
problem. The script prints the validation loss and the test accuracy before and after. It also
prints how well the learned weights separate wrong labels from right ones (AUC: 0.5 is chance, 1 is
perfect). The default engine, `neumann`, cuts its series after ten terms.

    # Fashion-MNIST: 2,000 training and 500 validation images
    python examples/data_reweighting.py
    # 900 and 300 images of scikit-learn's digits
    python examples/data_reweighting.py --dataset digits
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo
from lfmcw_app.readers import DATASETS, Images

Batch = tuple[Tensor, Tensor]

SIZES = {"fashion-mnist": (2000, 500), "digits": (900, 300)}
DECAY = 1e-2


class ExampleWeights(nn.Module):
    """Returns a weight in (0, 1) for each training example, [examples]; 1/2 at first."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(examples))

    def forward(self) -> Tensor:
        return self.scores.sigmoid()


def train_loss(model: nn.Linear, batch: Batch, *, weights: ExampleWeights) -> Tensor:
    """Lower level: reads the current weights."""
    x, y = batch
    penalty = sum((p**2).sum() for p in model.parameters())
    return (weights() * cross_entropy(model(x), y, reduction="none")).mean() + 0.5 * DECAY * penalty


def valid_loss(weights: ExampleWeights, batch: Batch, *, model: nn.Linear) -> Tensor:
    """Upper level: reads the solution of the lower level."""
    return cross_entropy(model(batch[0]), batch[1])


def as_batch(images: Images) -> Batch:
    """Pixels in [0, 1], flat, and labels."""
    return images.pixels.flatten(1) / 255.0, images.labels


def corrupted(labels: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gives half of the examples a wrong class; returns the labels and which are wrong."""
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=generator)[: len(labels) // 2]] = True
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    return torch.where(wrong, (labels + shift) % classes, labels), wrong


def measure(model: nn.Linear, valid: Batch, test: Batch) -> tuple[float, float]:
    """Validation loss and test accuracy in %."""
    with torch.no_grad():
        accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
        return float(cross_entropy(model(valid[0]), valid[1])), 100 * float(accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Learns a weight per training example; finds wrong labels."
    )
    parser.add_argument("--dataset", default="fashion-mnist", choices=tuple(SIZES))
    parser.add_argument(
        "--engine", default="neumann", choices=mlo.available_engines(), help="hypergradient engine"
    )
    parser.add_argument("--steps", type=int, default=60, help="updates of the weights")
    parser.add_argument(
        "--warmup", type=int, default=20, help="rounds in which only the model moves"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--picture", default="data_reweighting.png", help="file for the learned weights"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    images, test_images, classes, *_ = DATASETS[args.dataset](Path("data"))
    generator = torch.Generator().manual_seed(args.seed)
    order, (n, m) = torch.randperm(len(images), generator=generator), SIZES[args.dataset]
    x, y = as_batch(images[order[:n]])
    noisy, wrong = corrupted(y, len(classes), generator)
    valid, test = as_batch(images[order[n : n + m]]), as_batch(test_images)

    model, weights = nn.Linear(x.shape[1], len(classes)), ExampleWeights(n)
    inner = torch.optim.SGD(model.parameters(), lr=0.1 if n == 2000 else 0.3, momentum=0.9)
    outer = torch.optim.Adam(weights.parameters(), lr=0.1)
    problems = [
        mlo.Problem(
            "model", module=model, optimizer=inner, loss=train_loss, data=[(x, noisy)], steps=5
        ),
        mlo.Problem(
            "weights",
            module=weights,
            optimizer=outer,
            loss=valid_loss,
            data=[valid],
            warmup_steps=args.warmup,
        ),
    ]
    accept = {"tol": 1.0} if args.engine == "neumann" else {}  # the series is truncated on purpose
    optimizer = mlo.MultilevelOptimizer(problems, hypergradient={"name": args.engine, **accept})
    list(optimizer.run(args.warmup))
    before = measure(model, valid, test)
    for record in optimizer.run(args.steps):
        if record.round % 10 == 0:
            auc = roc_auc_score(~wrong, weights.scores.detach())
            loss = record.losses["weights"]
            print(f"round {record.round}: validation loss {loss:.4f}, AUC {auc:.3f}", flush=True)
    after, learned = measure(model, valid, test), weights().detach()

    print(f"validation loss: {before[0]:.4f} -> {after[0]:.4f}")
    print(f"test accuracy (%): {before[1]:.2f} -> {after[1]:.2f}")
    right, of_wrong = learned[~wrong].mean(), learned[wrong].mean()
    print(f"mean weight: right labels {right:.3f}, wrong labels {of_wrong:.3f}")
    print(f"AUC: {roc_auc_score(~wrong, learned):.4f}")

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.hist([learned[~wrong], learned[wrong]], bins=20, label=("right labels", "wrong labels"))
    axes.set(title="training examples", xlabel="learned weight", ylabel="count")
    axes.legend()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
