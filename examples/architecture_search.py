"""Differentiable architecture search (DARTS, Liu et al. 2019): which operation each of four layers applies, on digits.

A layer is sum_o softmax(a)_o o(x). The weights w of the network fit half of the training images, a the other half through w.
Then each layer keeps its heaviest operation; this and random choices are trained anew, alike, on all training images.

    python examples/architecture_search.py
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import mlo

LAYERS, WIDTH = 4, 8
OPERATIONS = {
    "identity": nn.Identity,
    "average": lambda: nn.AvgPool2d(3, 1, 1),
    "maximum": lambda: nn.MaxPool2d(3, 1, 1),
    "conv 1x1": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU()),
    "conv 3x3": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH), nn.ReLU()),
}


class Network(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, WIDTH, 1), nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 10))
        self.layers = nn.ModuleList(nn.ModuleList(OPERATIONS[name]() for name in names) for names in layers)

    def forward(self, x, weights):
        x = self.stem(x)
        for operations, row in zip(self.layers, weights, strict=True):
            x = sum(w * operation(x) for w, operation in zip(row, operations, strict=True))
        return self.head(x)


def search(train, valid, rounds):
    """The weight of each operation in each layer, [layers, operations]."""
    w, a = Network([OPERATIONS] * LAYERS), nn.ParameterDict({"a": torch.zeros(LAYERS, len(OPERATIONS))})

    def train_loss(w, batch, *, a):
        return cross_entropy(w(batch[0], a["a"].softmax(1)), batch[1])

    def valid_loss(a, batch, *, w):
        return train_loss(w, batch, a=a)

    lower, upper = torch.optim.Adam(w.parameters(), lr=5e-3), torch.optim.Adam(a.parameters(), lr=0.05)
    problems = [
        mlo.Problem("w", module=w, optimizer=lower, loss=train_loss, data=train),
        mlo.Problem("a", module=a, optimizer=upper, loss=valid_loss, data=valid, warmup_steps=rounds // 5),
    ]
    list(mlo.MultilevelOptimizer(problems, hypergradient="darts").run(rounds))
    return a["a"].detach().softmax(1)


def accuracy(layers, train, test, rounds):
    """Test accuracy (%) of one architecture, trained from new weights."""
    w, ones = Network([[name] for name in layers]), torch.ones(LAYERS, 1)
    optimizer = torch.optim.Adam(w.parameters(), lr=5e-3)
    problem = mlo.Problem(
        "w", module=w, optimizer=optimizer, data=train, loss=lambda w, b: cross_entropy(w(b[0], ones), b[1])
    )
    list(mlo.MultilevelOptimizer([problem]).run(rounds))
    return 100 * float((w.eval()(test[0], ones).argmax(1) == test[1]).float().mean())


def main():
    parser = argparse.ArgumentParser(description="Searches the operations of a small network.")
    parser.add_argument(
        "--steps", type=int, default=80, help="rounds of the search; twice as many train an architecture"
    )
    parser.add_argument("--random", type=int, default=8, help="random architectures to compare with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="architecture_search.png", help="file for the weights and accuracies")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data, order = load_digits(), torch.randperm(1797)
    x, y = torch.tensor(data.images[order] / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(data.target)[order]
    batches = list(zip(x[:1000].split(50), y[:1000].split(50), strict=True))
    weights, names = search(batches[:10], batches[10:], args.steps), list(OPERATIONS)
    drawn = torch.cat([weights.argmax(1)[None], torch.randint(len(names), (args.random, LAYERS))])
    layers = [[names[k] for k in row] for row in drawn.tolist()]
    found, *others = (accuracy(choice, batches, (x[1000:], y[1000:]), 2 * args.steps) for choice in layers)
    print(
        f"chosen: {', '.join(layers[0])} (mean weight {weights.max(1).values.mean():.2f}; uniform: {1 / len(names):.2f})"
    )
    print(f"test accuracy (%): chosen {found:.2f}, random mean {sum(others) / len(others):.2f}, best {max(others):.2f}")
    print(f"random architectures that are better: {sum(other > found for other in others)} of {len(others)}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    figure.colorbar(left.imshow(weights, vmin=0), ax=left)
    left.set(title="learned weights", xticks=range(len(names)), yticks=range(LAYERS), ylabel="layer", xticklabels=names)
    right.plot(sorted(others), "o", color="gray", label="random")
    right.axhline(found, label="chosen")
    right.set(title="test accuracy (%)", xticks=[])
    right.legend()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
