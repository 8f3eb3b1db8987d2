"""Meta-learning by implicit MAML (Rajeswaran et al. 2019).

Learned is an initialisation from which a few steps adapt to a new task.

    lower level   phi_t* = argmin_phi  CE(phi; support images of task t) + lambda/2 |phi - theta|^2
                  for every task t
    upper level   min_theta            mean over t of CE(phi_t*(theta); query images of task t)

A task is to read the ten digits in images rotated by the task's own angle, from three support
images of each digit. The lower problems are independent, so they are one `mlo` problem that holds
the parameters of all tasks, stacked. The pull makes its solution a function of theta, and its
Hessian positive definite near a solution: theta rests for ten rounds until the tasks are there. The
test adapts to new angles and images by plain gradient descent, from theta before and after.

    python examples/maml.py
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

import mlo
from lfmcw_app.readers import DATASETS, Images

SHOTS, QUERIES = 3, 10  # support and query images of each digit
WARMUP = 10  # first rounds, in which theta rests
Tasks = tuple[Tensor, Tensor]  # images [tasks, images, 64] and labels [tasks, images]


class Networks(nn.Module):
    """`count` two-layer networks, stacked; a single one is an initialisation for all tasks."""

    def __init__(self, count: int, hidden: int = 48) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(count, 64, hidden) / 8.0)
        self.bias = nn.Parameter(torch.zeros(count, 1, hidden))
        self.second = nn.Parameter(torch.randn(count, hidden, 10) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[tasks, images, 64] to logits [tasks, images, 10]."""
        return torch.tanh(x @ self.first + self.bias) @ self.second


def stacked(theta: Networks, count: int) -> Networks:
    """`count` copies of theta."""
    networks = Networks(count)
    copies = {name: value.expand(count, -1, -1) for name, value in theta.state_dict().items()}
    networks.load_state_dict(copies)
    return networks


def losses(networks: Networks, tasks: Tasks) -> Tensor:
    """Mean cross-entropy of each task, [tasks]."""
    return cross_entropy(networks(tasks[0]).transpose(1, 2), tasks[1], reduction="none").mean(1)


def make_tasks(images: Images, count: int, generator: torch.Generator) -> tuple[Tasks, Tasks]:
    """Support and query images of `count` tasks with random angles."""
    each = SHOTS + QUERIES
    pixels, digits = images.pixels.float() / 255.0 - 0.3, torch.arange(10).repeat_interleave(each)
    members = [(images.labels == digit).nonzero().squeeze(1) for digit in range(10)]
    x = []
    for angle in (2 * math.pi * torch.rand(count, generator=generator)).tolist():
        chosen = [m[torch.randperm(len(m), generator=generator)[:each]] for m in members]
        c, s = math.cos(angle), math.sin(angle)
        rotation = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(digits), -1, -1)
        grid = affine_grid(rotation, [len(digits), 1, 8, 8], align_corners=False)
        upright = pixels[torch.cat(chosen)]
        rotated = grid_sample(upright, grid, padding_mode="border", align_corners=False)
        x.append(rotated.flatten(1))

    # Of each digit the first SHOTS images are for support, the others for queries.
    stack, labels = torch.stack(x), digits.expand(count, -1)
    first = (torch.arange(each) < SHOTS).repeat(10)
    return (stack[:, first], labels[:, first]), (stack[:, ~first], labels[:, ~first])


def adapted_accuracy(theta: Networks, steps: int, support: Tasks, query: Tasks) -> float:
    """Query accuracy in % after `steps` steps of descent on each task's support images."""
    networks = stacked(theta, len(support[0]))
    descent = torch.optim.SGD(networks.parameters(), lr=0.5)
    for _ in range(steps):
        descent.zero_grad()
        losses(networks, support).sum().backward()
        descent.step()
    return 100 * float((networks(query[0]).argmax(2) == query[1]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Learns an initialisation by implicit MAML.")
    parser.add_argument("--steps", type=int, default=80, help="updates of the initialisation")
    parser.add_argument("--pull", type=float, default=0.2, help="lambda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="maml.png", help="file for the accuracies")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.manual_seed(args.seed)
    train_images, test_images, _ = DATASETS["digits"](Path("data"))
    support, query = make_tasks(train_images, 32, generator)
    new_tasks = make_tasks(test_images, 32, generator)

    def task_loss(tasks: Networks, batch: None, *, theta: Networks) -> Tensor:
        pairs = zip(tasks.parameters(), theta.parameters(), strict=True)
        squared = sum(((a - b) ** 2).sum() for a, b in pairs)
        return losses(tasks, support).sum() + 0.5 * args.pull * squared

    def meta_loss(theta: Networks, batch: None, *, tasks: Networks) -> Tensor:
        return losses(tasks, query).mean()

    theta = Networks(1)
    tasks = stacked(theta, 32)
    lower = torch.optim.SGD(tasks.parameters(), lr=0.5)
    upper = torch.optim.Adam(theta.parameters(), lr=0.01)
    problems = [
        mlo.Problem("tasks", module=tasks, optimizer=lower, loss=task_loss, steps=5),
        mlo.Problem("theta", module=theta, optimizer=upper, loss=meta_loss, warmup_steps=WARMUP),
    ]
    optimizer = mlo.MultilevelOptimizer(
        problems, hypergradient=mlo.ConjugateGradient(max_steps=60, tol=1e-2)
    )
    before = {k: adapted_accuracy(theta, k, *new_tasks) for k in (0, 1, 5, 20)}
    after = {}
    for record in optimizer.run(WARMUP + args.steps):
        if record.round % 20 == 0:
            print(f"round {record.round}: meta-loss {record.losses['theta']:.4f}")
    for k, accuracy in before.items():
        after[k] = adapted_accuracy(theta, k, *new_tasks)
        print(f"new tasks, accuracy (%) after {k} steps: {accuracy:.1f} -> {after[k]:.1f}")

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for label, course in (("random initialisation", before), ("learned initialisation", after)):
        axes.plot(course.keys(), course.values(), "o-", label=label)
    axes.set(
        title="new tasks", xlabel="steps of gradient descent on 30 images", ylabel="accuracy (%)"
    )
    axes.legend()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
