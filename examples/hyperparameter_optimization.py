"""Regularisation: a strength of L2 decay for each feature of a logistic regression, learned from the validation loss.

    lower level   w* = argmin_w  CE(w; training data) + 1/2 sum_j exp(d_j) w_j^2
    upper level   min_d          CE(w*(d); validation data)

30 hyperparameters are too many for a grid; implicit differentiation gives the gradient in all by one linear solve with the
lower level's Hessian. It holds at a solution, so the model moves alone for `--warmup` rounds first. The test loss, printed
beside the validation loss, shows how much of the gain is overfitting to 300 validation examples.

    python examples/hyperparameter_optimization.py                   # conjugate gradients
    python examples/hyperparameter_optimization.py --engine direct   # any name of mlo.available_engines()
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import mlo

Split = tuple[Tensor, Tensor]

# The Hessian is 31 x 31 and ill-conditioned: conjugate gradients need about as many products as it has rows, or more.
OPTIONS = {"cg": {"max_steps": 100}, "minres": {"max_steps": 100}, "neumann": {"num_terms": 100, "tol": 1.0}}


class Decays(nn.Module):
    """The logarithm of each feature's decay, [features]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((features,), -7.0))


def load(seed: int) -> tuple[Split, Split, Split, list[str]]:
    """Returns 100 training, 300 validation and 169 test examples, standardised by the training part; feature names."""
    data = load_breast_cancer()
    x, y = torch.tensor(data.data), torch.tensor(data.target, dtype=torch.float64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, valid, test = order[:100], order[100:400], order[400:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    return (x[train], y[train]), (x[valid], y[valid]), (x[test], y[test]), list(data.feature_names)


def cross_entropy(model: nn.Module, split: Split) -> Tensor:
    return binary_cross_entropy_with_logits(model(split[0]).squeeze(1), split[1])


def train_loss(model: nn.Linear, batch: Split, *, decays: Decays) -> Tensor:
    """Lower level: `decays` is listed after `model`, so it is read at its current value."""
    return cross_entropy(model, batch) + 0.5 * (decays.log.exp() * model.weight**2).sum()


def valid_loss(decays: Decays, batch: Split, *, model: nn.Linear) -> Tensor:
    """Upper level: `model` is listed before `decays`, so its solution is read, differentiably."""
    return cross_entropy(model, batch)


def measure(model: nn.Linear, valid: Split, test: Split) -> tuple[float, float, float]:
    """Validation loss, test loss and test accuracy in %."""
    with torch.no_grad():
        accuracy = ((model(test[0]).squeeze(1) > 0) == (test[1] > 0.5)).double().mean()
        return float(cross_entropy(model, valid)), float(cross_entropy(model, test)), 100 * float(accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learns one L2 decay per feature from the validation loss.")
    parser.add_argument("--engine", default="cg", choices=mlo.available_engines(), help="hypergradient engine")
    parser.add_argument("--steps", type=int, default=100, help="updates of the decays")
    parser.add_argument("--warmup", type=int, default=50, help="rounds in which only the model moves")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)

    train, valid, test, names = load(args.seed)
    model, decays = nn.Linear(len(names), 1), Decays(len(names))
    inner = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    outer = torch.optim.Adam(decays.parameters(), lr=0.05)
    optimizer = mlo.MultilevelOptimizer(
        [
            mlo.Problem("model", module=model, optimizer=inner, loss=train_loss, data=[train], steps=20),
            mlo.Problem(
                "decays", module=decays, optimizer=outer, loss=valid_loss, data=[valid], warmup_steps=args.warmup
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
            print(f"round {record.round}: validation loss {loss:.4f}, {solve.iterations} products, residual {residual}")
    after = measure(model, valid, test)

    print(f"engine: {args.engine}")
    for label, old, new in zip(("validation loss", "test loss", "test accuracy (%)"), before, after, strict=True):
        print(f"{label}: {old:.4f} -> {new:.4f}")
    learned = decays.log.detach().exp()
    order = learned.argsort().tolist()
    for label, chosen in (("least", order[:4]), ("most", order[-4:])):
        print(f"{label} regularised: " + ", ".join(f"{names[i]} ({float(learned[i]):.1e})" for i in chosen))


if __name__ == "__main__":
    main()
