"""Regularisation: one L2 decay per feature of a logistic regression.

The decays are learned from the validation loss.

    lower level   w* = argmin_w  CE(w; training data) + 1/2 sum_j exp(d_j) w_j^2
    upper level   min_d          CE(w*(d); validation data)

The data are digits. Each of the 64 pixels has a decoy: the same numbers in another order, which say
nothing about an image. So the learned decays should be largest for the decoys. 128 hyperparameters
are too many for a grid, but implicit differentiation gives the gradient in all of them by one
linear solve with the lower level's Hessian. It holds at a solution, so the model moves alone for
`--warmup` rounds first. The test loss, beside the validation loss, shows how much of the gain is
overfitting to the validation data.

    # conjugate gradients
    python examples/hyperparameter_optimization.py
    # any name of mlo.available_engines()
    python examples/hyperparameter_optimization.py --engine direct
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo

Split = tuple[Tensor, Tensor]

SOLVER = {"max_steps": 200, "tol": 0.01}
OPTIONS = {"cg": SOLVER, "minres": SOLVER, "neumann": {"num_terms": 100, "tol": 1.0}}


class Decays(nn.Module):
    """The logarithm of each feature's decay, [features]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((features,), -7.0))


def load(seed: int) -> tuple[Split, Split, Split]:
    """Returns 200 training, 800 validation and 797 test examples: 64 pixels, then their decoys."""
    data, generator = load_digits(), torch.Generator().manual_seed(seed)
    x, y = torch.tensor(data.data / 8 - 1), torch.tensor(data.target)
    decoys = torch.stack([pixel[torch.randperm(len(y), generator=generator)] for pixel in x.T], 1)
    order = torch.randperm(len(y), generator=generator)
    x, parts = torch.cat([x, decoys], 1), (order[:200], order[200:1000], order[1000:])
    train, valid, test = ((x[part], y[part]) for part in parts)
    return train, valid, test


def train_loss(model: nn.Linear, batch: Split, *, decays: Decays) -> Tensor:
    """Lower level: `decays` is listed after `model`, so it is read at its current value."""
    penalty = 0.5 * (decays.log.exp() * model.weight**2).sum()
    return cross_entropy(model(batch[0]), batch[1]) + penalty


def valid_loss(decays: Decays, batch: Split, *, model: nn.Linear) -> Tensor:
    """Upper level: `model` is listed before `decays`, so its solution is read, differentiably."""
    return cross_entropy(model(batch[0]), batch[1])


def measure(model: nn.Linear, valid: Split, test: Split) -> tuple[float, float, float]:
    """Validation loss, test loss and test accuracy in %."""
    with torch.no_grad():
        losses = [float(cross_entropy(model(x), y)) for x, y in (valid, test)]
        accuracy = (model(test[0]).argmax(1) == test[1]).double().mean()
        return losses[0], losses[1], 100 * float(accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Learns one L2 decay per feature from the validation loss."
    )
    parser.add_argument(
        "--engine", default="cg", choices=mlo.available_engines(), help="hypergradient engine"
    )
    parser.add_argument("--steps", type=int, default=60, help="updates of the decays")
    parser.add_argument(
        "--warmup", type=int, default=50, help="rounds in which only the model moves"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the model")
    parser.add_argument(
        "--picture", default="hyperparameter_optimization.png", help="file for the learned decays"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)

    train, valid, test = load(args.seed)
    model, decays = nn.Linear(128, 10), Decays(128)
    inner = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    outer = torch.optim.Adam(decays.parameters(), lr=0.05)
    optimizer = mlo.MultilevelOptimizer(
        [
            mlo.Problem(
                "model", module=model, optimizer=inner, loss=train_loss, data=[train], steps=20
            ),
            mlo.Problem(
                "decays",
                module=decays,
                optimizer=outer,
                loss=valid_loss,
                data=[valid],
                warmup_steps=args.warmup,
            ),
        ],
        hypergradient={"name": args.engine, **OPTIONS.get(args.engine, {})},
    )
    list(optimizer.run(args.warmup))
    before = measure(model, valid, test)
    for record in optimizer.run(args.steps):
        if record.round % 20 == 0:
            solve = record.solves["model"]
            residual = "-" if solve.residual is None else f"{solve.residual:.1e}"
            loss = record.losses["decays"]
            print(
                f"round {record.round}: validation loss {loss:.4f}, {solve.iterations} products, "
                f"residual {residual}"
            )
    after = measure(model, valid, test)

    print(f"engine: {args.engine}")
    labels = ("validation loss", "test loss", "test accuracy (%)")
    for label, old, new in zip(labels, before, after, strict=True):
        print(f"{label}: {old:.4f} -> {new:.4f}")
    learned = decays.log.detach().exp()
    real, decoys = learned.chunk(2)
    print(f"median decay: pixels {float(real.median()):.5f}, decoys {float(decoys.median()):.5f}")

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    span = {"vmin": float(learned.log10().min()), "vmax": float(learned.log10().max())}
    for axis, values, title in zip(axes, (real, decoys), ("pixels", "their decoys"), strict=True):
        image = axis.imshow(values.log10().view(8, 8), **span)
        axis.set(title=f"learned decay: {title}", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="log10")
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
