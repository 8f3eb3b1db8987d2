"""Few-shot learning by five methods: MAML, first-order MAML, implicit MAML, ANIL and Meta-SGD.

    lower level   phi_t = a few steps of descent on CE(phi; support images of task t), from theta
    upper level   min_theta  mean over t of CE(phi_t(theta); query images of task t)

A task is to tell five handwritten digits apart from one image of each; their numbering is random.
All tasks of a round are one `mlo` problem, whose parameters have a leading dimension for the tasks.
It starts each round at theta (`restart_from`). The methods differ in what starts there, and in how
the solution is differentiated. New tasks have new images. The control is a random theta, which
adapts with the best of several rates.

    python examples/few_shot.py
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo

WAYS, SHOTS, QUERIES, TASKS, HIDDEN, PULL = 5, 1, 10, 16, 64, 0.3
Batch = tuple[Tensor, Tensor]  # images [tasks, images, 64] and labels [tasks, images]
Batches = list[Batch]


class Layer(nn.Module):
    """A linear layer, or one for each of several tasks."""

    def __init__(self, inputs: int, outputs: int, *tasks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*tasks, inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(*tasks, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias.unsqueeze(-2)


class Network(nn.Module):
    def __init__(self, *tasks: int) -> None:
        super().__init__()
        self.body, self.head = Layer(64, HIDDEN, *tasks), Layer(HIDDEN, WAYS, *tasks)

    def forward(self, x: Tensor) -> Tensor:
        """Images [tasks, images, 64] to logits [tasks, images, ways]."""
        return self.head(torch.tanh(self.body(x)))


def errors(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy of each task."""
    return cross_entropy(logits.transpose(1, 2), batch[1], reduction="none").mean(1)


def judged(logits: Tensor, batch: Batch) -> tuple[Tensor, dict]:
    right = (logits.argmax(2) == batch[1]).to(logits.dtype)
    return errors(logits, batch).mean(), {"accuracy": 100 * right.mean()}


def fit(phi: nn.Module, batch: Batch) -> Tensor:
    return errors(phi(batch[0]), batch).sum()


def query_loss(theta: nn.Module, batch: Batch, *, phi: nn.Module) -> tuple[Tensor, dict]:
    return judged(phi(batch[0]), batch)


def lower(phi: nn.Module, loss, support: Batches, steps=5, rate=1.0, **options) -> mlo.Problem:
    descent = torch.optim.SGD(phi.parameters(), lr=rate)
    data = [batch for batch in support for _ in range(steps)]
    return mlo.Problem("phi", module=phi, optimizer=descent, loss=loss, data=data, steps=steps,
                       **options)  # fmt: skip


def upper(theta: nn.Module, loss, query: Batches) -> mlo.Problem:
    adam = torch.optim.Adam(theta.parameters(), lr=0.005)
    return mlo.Problem("theta", module=theta, optimizer=adam, loss=loss, data=query)


# ------------------------------ the five methods: problems, and an engine


def maml(support: Batches, query: Batches) -> tuple:
    """Finn et al. (2017): through all steps."""
    phi = lower(Network(TASKS), fit, support, restart_from="theta")
    return [phi, upper(Network(), query_loss, query)], mlo.Unroll(steps=phi.steps)


def fomaml(support: Batches, query: Batches) -> tuple:
    """Finn et al. (2017), first order: phi - theta is treated as constant."""
    phi = lower(Network(TASKS), fit, support, restart_from="theta")
    return [phi, upper(Network(), query_loss, query)], "first_order"


def imaml(support: Batches, query: Batches) -> tuple:
    """Rajeswaran et al. (2019): phi is the minimum of a loss that pulls it towards theta."""

    def pulled(phi: nn.Module, batch: Batch, *, theta: nn.Module) -> Tensor:
        pairs = zip(phi.parameters(), theta.parameters(), strict=True)
        return fit(phi, batch) + 0.5 * PULL * sum(((a - b) ** 2).sum() for a, b in pairs)

    phi = lower(Network(TASKS), pulled, support, steps=20, rate=0.3, restart_from="theta")
    engine = mlo.ConjugateGradient(max_steps=100, tol=1e-2)
    return [phi, upper(Network(), query_loss, query)], engine


def anil(support: Batches, query: Batches) -> tuple:
    """Raghu et al. (2020): only the head adapts."""

    def logits(phi: nn.Module, theta: nn.Module, batch: Batch) -> Tensor:
        return phi(torch.tanh(theta.body(batch[0])))

    def fit_head(phi: nn.Module, batch: Batch, *, theta: nn.Module) -> Tensor:
        return errors(logits(phi, theta, batch), batch).sum()

    def head_loss(theta: nn.Module, batch: Batch, *, phi: nn.Module) -> tuple[Tensor, dict]:
        return judged(logits(phi, theta, batch), batch)

    phi = lower(Layer(HIDDEN, WAYS, TASKS), fit_head, support, restart_from="theta.head")
    return [phi, upper(Network(), head_loss, query)], mlo.Unroll(steps=phi.steps)


def meta_sgd(support: Batches, query: Batches) -> tuple:
    """Li et al. (2017): every parameter has a learned rate, 1 at first."""
    theta = nn.ModuleDict({"start": Network(), "log_rate": Network()})
    for log in theta["log_rate"].parameters():
        nn.init.zeros_(log)

    def rates(*, theta: nn.Module) -> dict[str, dict[str, Tensor]]:
        logs = theta["log_rate"].named_parameters()
        return {"lr": {name: log.exp().expand(TASKS, *log.shape) for name, log in logs}}

    phi = lower(Network(TASKS), fit, support, restart_from="theta.start", settings=rates)
    return [phi, upper(theta, query_loss, query)], mlo.Unroll(steps=phi.steps)


METHODS = {"MAML": maml, "FOMAML": fomaml, "iMAML": imaml, "ANIL": anil, "Meta-SGD": meta_sgd}


# ------------------------------ tasks, the control and the comparison


def draw_tasks(images: Tensor, digits: Tensor, rounds: int, seed: int) -> tuple[Batches, Batches]:
    """Support and query images of the tasks of several rounds."""
    noise, each = torch.Generator().manual_seed(seed), SHOTS + QUERIES
    members = [images[digits == digit] for digit in range(10)]
    support, query = [], []
    for _ in range(rounds):
        chosen = []  # [images of a class, 64], class by class and task by task
        for _ in range(TASKS):
            for digit in torch.randperm(10, generator=noise)[:WAYS].tolist():
                order = torch.randperm(len(members[digit]), generator=noise)[:each]
                chosen.append(members[digit][order])
        x = torch.stack(chosen).view(TASKS, WAYS, each, 64)
        y = torch.arange(WAYS).view(1, WAYS, 1).expand(TASKS, WAYS, each)
        for batches, part in ((support, slice(0, SHOTS)), (query, slice(SHOTS, each))):
            batches.append((x[:, :, part].flatten(1, 2), y[:, :, part].flatten(1, 2)))
    return support, query


def adapted_accuracy(method, theta: dict, tasks: tuple, rate: float | None = None) -> float:
    """Mean accuracy in % on the query images of tasks, after theta adapts to each."""
    problems, engine = method(*tasks)
    phi, outer = problems
    outer.module.load_state_dict(theta)
    outer.optimizers["theta"].param_groups[0]["lr"] = 0.0  # theta stays, phi adapts
    if rate is not None:
        phi.optimizers["phi"].param_groups[0]["lr"] = rate
    records = mlo.MultilevelOptimizer(problems, engine).run(len(tasks[0]))
    found = [record.metrics["theta"]["accuracy"] for record in records]
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learns to learn from one image of each class.")
    parser.add_argument("--steps", type=int, default=300, help="updates of theta")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="few_shot.png", help="file for the accuracies")
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16.0 - 0.3
    labels, half = torch.tensor(digits.target), torch.arange(len(images)) % 2 == 0
    tasks = draw_tasks(images[half], labels[half], args.steps, args.seed)
    new = draw_tasks(images[~half], labels[~half], 10, args.seed + 1)

    accuracies = {}
    for name in args.methods:
        torch.manual_seed(args.seed)
        problems, engine = METHODS[name](*tasks)
        theta = problems[1].module
        before = adapted_accuracy(METHODS[name], theta.state_dict(), new)
        if not accuracies:
            rates = [0.03, 0.1, 0.3, 1.0, 3.0]
            found = [adapted_accuracy(maml, Network().state_dict(), new, rate) for rate in rates]
            accuracies["control"] = max(found)
            print(f"control, accuracy (%) on new tasks: {max(found):.1f}")
        for _ in mlo.MultilevelOptimizer(problems, engine).run(args.steps):
            pass
        accuracies[name] = adapted_accuracy(METHODS[name], theta.state_dict(), new)
        print(f"{name}, accuracy (%) on new tasks: {before:.1f} -> {accuracies[name]:.1f}")

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.bar(list(accuracies), list(accuracies.values()))
    axes.axhline(100 / WAYS, color="grey", linestyle=":", label="chance")
    axes.set(title="new tasks, one image of each class", ylabel="accuracy (%)")
    axes.legend()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
