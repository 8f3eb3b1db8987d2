"""Data distillation (Wang et al. 2018): a few synthetic digits that train a new network.

From them it learns as much as from 1,000 real ones.

    lower level   w_{t+1} = w_t - rate grad CE(w_t; synthetic images s),
                  20 steps from fresh random weights
    upper level   min_s     CE(w_20(s); real training images)

The pixels of the synthetic images are the upper problem's parameters; `unroll` differentiates the
whole training run, and fresh weights in every round keep the images from fitting a single network.
The test trains new networks, in as many steps, on the synthetic images, on as few real ones, on the
mean image of each digit, and on all real ones at once.

    python examples/data_distillation.py                 # one image of each digit
    python examples/data_distillation.py --per-class 3
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo

STEPS, RATE = 20, 0.5
Split = tuple[Tensor, Tensor]


class Images(nn.Module):
    """Synthetic images with their fixed labels."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.pixels = nn.Parameter(pixels.clone())
        self.register_buffer("labels", labels)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def restart(model: nn.Sequential) -> None:
    """Fresh random weights."""
    for layer in (model[0], model[2]):
        layer.reset_parameters()


def train_loss(model: nn.Module, batch: None, *, images: Images) -> Tensor:
    return cross_entropy(model(images.pixels), images.labels)


def real_loss(images: Images, batch: Split, *, model: nn.Module) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def accuracy(images: Split, test: Split, seed: int, runs: int = 20) -> float:
    """Mean test accuracy (%) of `runs` new networks after STEPS steps of descent on the images."""
    torch.manual_seed(seed)
    found = []
    for _ in range(runs):
        model = network()
        descent = torch.optim.SGD(model.parameters(), lr=RATE)
        for _ in range(STEPS):
            descent.zero_grad()
            cross_entropy(model(images[0]), images[1]).backward()
            descent.step()
        found.append(100 * float((model(test[0]).argmax(1) == test[1]).float().mean()))
    return sum(found) / runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Learns a few synthetic digits that train a network."
    )
    parser.add_argument("--per-class", type=int, default=1, help="synthetic images of each digit")
    parser.add_argument(
        "--steps", type=int, default=100, help="updates of the images, one training run each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="data_distillation.png", help="file for the images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data = load_digits()
    x, y = torch.tensor(data.data / 8 - 1, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(1797)
    train, test = ((x[i], y[i]) for i in (order[:1000], order[1000:]))

    # Ten random choices of real images; the first one is where the synthetic images start.
    of_digit = [train[0][train[1] == digit] for digit in range(10)]
    choices = []
    for _ in range(10):
        chosen = [i[torch.randperm(len(i))[: args.per_class]] for i in of_digit]
        choices.append(torch.cat(chosen))
    start, labels = choices[0], torch.arange(10).repeat_interleave(args.per_class)

    model, images = network(), Images(start, labels)
    inner = torch.optim.SGD(model.parameters(), lr=RATE)
    outer = torch.optim.Adam(images.parameters(), lr=0.05)
    problems = [
        mlo.Problem("model", module=model, optimizer=inner, loss=train_loss, steps=STEPS),
        mlo.Problem("images", module=images, optimizer=outer, loss=real_loss, data=[train]),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, hypergradient=mlo.Unroll(steps=STEPS))
    for record in optimizer.run(args.steps):
        restart(model)
        if record.round % 25 == 0:
            loss = record.losses["images"]
            print(f"round {record.round}: loss on real images after a run {loss:.4f}", flush=True)

    learned = images.pixels.detach()
    means = torch.stack([i.mean(0) for i in of_digit]), torch.arange(10)
    real = [accuracy((choice, labels), test, args.seed + 1) for choice in choices]
    print(f"test accuracy (%) of new networks, {len(labels)} images and {STEPS} steps:")
    synthetic = accuracy((learned, labels), test, args.seed + 1)
    print(f"synthetic images: {real[0]:.1f} -> {synthetic:.1f}")
    print(f"real images, ten random choices: mean {sum(real) / 10:.1f}, best {max(real):.1f}")
    print(f"mean image of each digit: {accuracy(means, test, args.seed + 1):.1f}")
    print(f"all {len(train[0])} real images: {accuracy(train, test, args.seed + 1):.1f}")

    figure, axes = plt.subplots(2 * args.per_class, 10, figsize=(10, 2.2 * args.per_class))
    rows = [
        part.view(10, args.per_class, 8, 8).transpose(0, 1).flatten(0, 1)
        for part in (start, learned)
    ]
    for axis, image in zip(axes.flat, torch.cat(rows), strict=True):
        axis.imshow(image, cmap="gray_r")
        axis.set(xticks=[], yticks=[])
    figure.suptitle("top: real images at the start; bottom: learned from them")
    figure.savefig(args.picture, dpi=80)


if __name__ == "__main__":
    main()
