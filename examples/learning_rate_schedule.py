"""A learning-rate schedule, learned by the gradient through all steps of a training run.

    lower level   w_{t+1} = w_t - r_t grad CE(w_t; batch t),   t = 0 ... 19,
                  from fresh random weights in every round
    upper level   min_r     CE(w_20(r); validation data)

The rates are settings of the lower problem's optimizer, given by the upper problem's value.
`unroll` differentiates the whole run. If rates are so high that a run diverges, its gradient
explodes too, so it is clipped. The controls are the best of nine constant rates by the same
validation loss, and the learned rates in reverse order. The test trains new networks on new
batches.

    python examples/learning_rate_schedule.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo

STEPS, BATCH = 20, 50
CONSTANT = [0.1 * 1.6**k for k in range(9)]  # 0.1 ... 4.3
Split = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def train_loss(model: nn.Module, batch: Split) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def rate(made: int, *, schedule: nn.ParameterDict) -> dict[str, Tensor]:
    """The learning rate of the step after `made` steps."""
    return {"lr": schedule["log"][made % STEPS].exp()}


def valid_loss(schedule: nn.ParameterDict, batch: Split, *, model: nn.Module) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


class Run:
    """Random batches of one training run; a new iteration gives those of another run."""

    def __init__(self, train: Split) -> None:
        self.train = train

    def __iter__(self) -> Iterator[Split]:
        for _ in range(STEPS):
            chosen = torch.randint(len(self.train[0]), (BATCH,))
            yield self.train[0][chosen], self.train[1][chosen]


def trained(rates: Tensor, train: Split, test: Split, runs: int, seed: int) -> tuple[float, float]:
    """Mean loss and accuracy (%) after ordinary training with given rates.

    The mean is over new networks and batches.
    """
    torch.manual_seed(seed)
    total = torch.zeros(2)
    for _ in range(runs):
        model = network()
        descent = torch.optim.SGD(model.parameters(), lr=1.0)
        for step, (x, y) in enumerate(Run(train)):
            descent.param_groups[0]["lr"] = float(rates[step])
            descent.zero_grad()
            cross_entropy(model(x), y).backward()
            descent.step()
        logits = model(test[0]).detach()
        accuracy = 100 * (logits.argmax(1) == test[1]).float().mean()
        total += torch.stack([cross_entropy(logits, test[1]), accuracy])
    loss, accuracy = (total / runs).tolist()
    return loss, accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description="Learns the rate of each step of a training run.")
    parser.add_argument("--steps", type=int, default=60, help="updates of the schedule, a run each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="learning_rate_schedule.png", help="file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(1797)
    train, valid, test = ((x[i], y[i]) for i in (order[:900], order[900:1350], order[1350:]))

    model, schedule = network(), nn.ParameterDict({"log": torch.full((STEPS,), CONSTANT[3]).log()})
    inner = torch.optim.SGD(model.parameters(), lr=1.0)  # whose rate is learned
    outer = torch.optim.Adam(schedule.parameters(), lr=0.04)
    problems = [
        mlo.Problem(
            "model",
            module=model,
            optimizer=inner,
            settings=rate,
            loss=train_loss,
            data=Run(train),
            steps=STEPS,
        ),
        mlo.Problem(
            "schedule",
            module=schedule,
            optimizer=outer,
            loss=valid_loss,
            data=[valid],
            grad_clip=0.5,
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, hypergradient=mlo.Unroll(steps=STEPS))
    for record in optimizer.run(args.steps):
        for layer in (model[0], model[2]):  # fresh random weights
            layer.reset_parameters()
        if record.round % 20 == 0:
            loss = record.losses["schedule"]
            print(f"round {record.round}: validation loss after a run {loss:.4f}", flush=True)

    learned = schedule["log"].detach().exp()
    constant = [torch.full((STEPS,), rate) for rate in CONSTANT]
    best = min(constant, key=lambda rates: trained(rates, train, valid, 20, args.seed + 1)[0])
    print("learned rates: " + " ".join(f"{rate:.2f}" for rate in learned.tolist()))
    compared = {
        "start": constant[3],
        "best constant": best,
        "learned, reversed": learned.flip(0),
        "learned": learned,
    }
    for label, rates in compared.items():
        loss, accuracy = trained(rates, train, test, 40, args.seed + 2)
        print(f"test, {label}: loss {loss:.4f}, accuracy {accuracy:.2f} %")
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(range(1, STEPS + 1), learned, marker="o", label="learned")
    axes.axhline(float(best[0]), color="gray", linestyle="--", label="best constant")
    axes.set(
        xlabel="step of the training run",
        ylabel="learning rate",
        ylim=(0, None),
        xticks=range(2, STEPS + 1, 2),
    )
    axes.legend()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
