"""Differentiable architecture search (DARTS, Liu et al. 2019), on digits.

The search chooses the operation of each of four layers.

A layer is sum_o softmax(a)_o o(x). The weights w of the network fit half of the training images,
and a fits the other half through w. Then each layer keeps its heaviest operation. This choice and
eight random ones are trained from scratch, in the same way, on all training images.

    python examples/architecture_search.py
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import mlo

OPERATIONS = {
    "identity": nn.Identity,
    "average": lambda: nn.AvgPool2d(3, 1, 1),
    "maximum": lambda: nn.MaxPool2d(3, 1, 1),
    "conv 1x1": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
    "conv 3x3": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()),
}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 1)
        self.head = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 10))
        self.layers = nn.ModuleList()
        for _ in range(4):
            self.layers.append(nn.ModuleList(make() for make in OPERATIONS.values()))

    def forward(self, x, weights):
        x = self.stem(x)
        for operations, row in zip(self.layers, weights, strict=True):
            pairs = zip(row, operations, strict=True)
            x = sum(weight * operation(x) for weight, operation in pairs if weight > 0)
        return self.head(x)


def loss(w, batch, *, a):
    return nn.functional.cross_entropy(w(batch[0], a["a"].softmax(1)), batch[1])


def trained(a, train, valid, rounds, rest):
    """A network after so many rounds, and its operations' weights; a rests at first."""
    w, a = Network(), nn.ParameterDict({"a": a})
    lower = mlo.Problem(
        "w", module=w, optimizer=torch.optim.Adam(w.parameters(), lr=5e-3), data=train, loss=loss
    )
    upper = mlo.Problem(
        "a",
        module=a,
        optimizer=torch.optim.Adam(a.parameters(), lr=0.05),
        data=valid,
        warmup_steps=rest,
        loss=lambda a, batch, *, w: loss(w, batch, a=a),
    )
    list(mlo.MultilevelOptimizer([lower, upper], hypergradient="one_step").run(rounds))
    return w.eval(), a["a"].detach().softmax(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Searches the operations of a small network.")
    parser.add_argument(
        "--steps", type=int, default=80, help="rounds of the search; a training has twice as many"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--picture", default="architecture_search.png", help="file for the weights and accuracies"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data, order, names = load_digits(), torch.randperm(1797), list(OPERATIONS)
    x = torch.tensor(data.images[order] / 8 - 1, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)[order]
    batches = list(zip(x[:1000].split(50), y[:1000].split(50), strict=True))

    start = torch.zeros(4, len(names))
    _, weights = trained(start, batches[:10], batches[10:], args.steps, rest=args.steps // 5)

    # The heaviest operation of each layer, and eight random choices, trained from scratch.
    choices = torch.stack([weights.argmax(1), *torch.randint(len(names), (8, 4))])
    accuracies = []
    for one in nn.functional.one_hot(choices, len(names)):
        w, only = trained(one.log(), batches, batches, 2 * args.steps, rest=2 * args.steps)
        correct = w(x[1000:], only).argmax(1) == y[1000:]
        accuracies.append(100 * float(correct.float().mean()))
    found, *others = accuracies

    chosen = ", ".join(names[k] for k in weights.argmax(1))
    print(
        f"chosen: {chosen} (mean weight {weights.max(1).values.mean():.2f}; uniform: "
        f"{1 / len(names):.2f})"
    )
    print(
        f"test accuracy (%): chosen {found:.2f}, random mean {sum(others) / len(others):.2f}, best "
        f"{max(others):.2f}"
    )
    better = sum(other > found for other in others)
    print(f"random architectures that are better: {better} of {len(others)}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    figure.colorbar(left.imshow(weights, vmin=0, aspect="auto"), ax=left)
    left.set(
        title="learned weights",
        xticks=range(len(names)),
        yticks=range(4),
        ylabel="layer",
        xticklabels=names,
    )
    right.hist([others, [found]], bins=20)
    right.set(title="architectures: random (blue), chosen (orange)", xlabel="test accuracy (%)")
    figure.savefig(args.picture, dpi=100)
