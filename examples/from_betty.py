"""A Betty program moved over: Meta-Weight-Net (Shu et al. 2019), on digits.

Four in ten of them have wrong labels.

    lower level, on a training batch   min_w      sum_i v_i loss_i(w) / sum_i v_i,
                                                  v_i = V(loss_i; theta) in (0, 1)
    upper level, on a clean batch      min_theta  mean_i loss_i(w*(theta))

V is a small network, so what it learns applies to every example with that loss. Each part of
Betty's program, and what replaces it:

    class Inner(ImplicitProblem): training_step   inner_loss(inner, batch, *, outer)
    self.outer(loss), in it                       outer(loss)
    class Outer(ImplicitProblem): training_step   outer_loss(outer, batch, *, inner)
    train_data_loader=, optimizer=, module=       data=, optimizer=, module= of mlo.Problem
    Config(type="darts", unroll_steps=1)          hypergradient="darts", steps=1
    Config(retain_graph=True)                     not needed
    dependencies={"u2l": ..., "l2u": ...}         not needed: the losses say what they read
    Engine(...).run(), EngineConfig(train_iters)  MultilevelOptimizer(...).run(steps)

`--on-betty` runs the same declaration on Betty's engine instead (needs betty-ml). Betty's darts
leaves out the learning rate of the inner problem, which hardly matters to an outer Adam. Its
differences see through `found.detach()`; here `mlo.once` prevents this. The control is the same
network with equal weights.

    python examples/from_betty.py
"""

import argparse
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mlo
import mlo.betty

Batch = tuple[Tensor, Tensor]


def losses(inner: nn.Module, batch: Batch) -> Tensor:
    """The loss of each example, [examples, 1]."""
    return cross_entropy(inner(batch[0]), batch[1], reduction="none")[:, None]


def inner_loss(inner: nn.Module, batch: Batch, *, outer: nn.Module) -> Tensor:
    found = losses(inner, batch)
    # The weights do not depend on the inner parameters, so a difference must not move them along.
    weights = mlo.once(lambda: outer(found.detach()))
    return (weights * found).sum() / weights.sum()


def alike_loss(inner: nn.Module, batch: Batch) -> Tensor:
    return losses(inner, batch).mean()


def outer_loss(outer: nn.Module, batch: Batch, *, inner: nn.Module) -> Tensor:
    return losses(inner, batch).mean()


def accuracy(inner: nn.Module, test: Batch) -> float:
    return 100 * float((inner(test[0]).argmax(1) == test[1]).float().mean())


def inner_problem(loss: Callable[..., Tensor], train: DataLoader) -> mlo.Problem:
    inner = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 10))
    descent = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    return mlo.Problem("inner", module=inner, optimizer=descent, loss=loss, data=train)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Learns from an example's loss how much the example counts."
    )
    parser.add_argument("--steps", type=int, default=300, help="updates of each problem")
    parser.add_argument(
        "--on-betty", action="store_true", help="run the declaration on Betty's engine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="from_betty.png", help="file for the learned weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data, order = load_digits(), torch.randperm(1797)
    x = torch.tensor(data.data / 8 - 1, dtype=torch.float32)[order]
    clean = torch.tensor(data.target)[order]
    wrong = torch.rand(1000) < 0.4
    noisy = torch.where(wrong, (clean[:1000] + torch.randint(1, 10, (1000,))) % 10, clean[:1000])
    train = DataLoader(TensorDataset(x[:1000], noisy), batch_size=100, shuffle=True)
    valid = DataLoader(TensorDataset(x[1000:1200], clean[1000:1200]), batch_size=100, shuffle=True)
    test = x[1200:], clean[1200:]

    outer = nn.Sequential(nn.Linear(1, 100), nn.Tanh(), nn.Linear(100, 1), nn.Sigmoid())
    adam = torch.optim.Adam(outer.parameters(), lr=1e-3)
    problems = [
        inner_problem(inner_loss, train),
        mlo.Problem("outer", module=outer, optimizer=adam, loss=outer_loss, data=valid),
    ]
    if args.on_betty:
        mlo.betty.run(problems, steps=args.steps, hypergradient="betty-darts")
    else:
        list(mlo.MultilevelOptimizer(problems, hypergradient="darts").run(args.steps))
    control = inner_problem(alike_loss, train)
    list(mlo.MultilevelOptimizer([control]).run(args.steps))

    inner = problems[0].module
    with torch.no_grad():
        found = losses(inner, (x[:1000], noisy))
        weights = outer(found)[:, 0]
    of_right, of_wrong = weights[~wrong].mean(), weights[wrong].mean()
    print(f"mean weight: right labels {of_right:.3f}, wrong labels {of_wrong:.3f}")
    print(f"AUC: {roc_auc_score(~wrong, weights):.4f}")
    alike, weighted = accuracy(control.module, test), accuracy(inner, test)
    print(f"test accuracy (%): all alike {alike:.2f}, weighted {weighted:.2f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    loss = torch.linspace(0, float(found.max()), 200)[:, None]
    left.plot(loss, outer(loss).detach())
    left.set(title="learned weight of an example", xlabel="its loss", ylim=(0, 1))
    right.hist([weights[~wrong], weights[wrong]], bins=20, label=("right labels", "wrong labels"))
    right.set(title="training examples", xlabel="weight")
    right.legend()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
