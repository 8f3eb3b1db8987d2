"""Learning from mistakes by class weights (Gala and Xie), in miniature: three levels and a game.

Half of the threes in the training images are labelled eight. A network w1 makes mistakes on them,
so a second network w2 learns most from generated threes, and an architecture a learns from w2.

    w1        min_w1  CE(w1, training images)                                            (Eq. 1)
    game      generator G and discriminator D of a conditional GAN on the training images (Eq. 2)
    w2        min_w2  CE(w2, training images) + sum_c l_c(w1) CE(w2, images of c from G) (Eq. 3)
              with l_c(w1): the loss of w1 on the validation images of class c
    a         min_a   CE(w2, validation images)                                          (Eq. 4)

All three networks have the architecture a: a softmax over operations, in each of two layers. So
its gradient runs a -> w2, a -> w1 -> w2 and a -> game -> w2. In the control all l_c are equal.

    python examples/learning_from_mistakes.py
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, softplus

import mlo

HARD, TAKEN_FOR, LATENT = 3, 8, 16


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, 1, 1), nn.Linear(128, 10)
        self.layers = nn.ModuleList(
            nn.ModuleList((nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.AvgPool2d(3, 1, 1)))
            for _ in range(2)
        )

    def forward(self, x: Tensor, a: nn.ParameterDict) -> Tensor:
        x = self.stem(x)
        for operations, mixing in zip(self.layers, a["a"].softmax(1), strict=True):
            x = x + nn.functional.silu(
                sum(m * op(x) for m, op in zip(mixing, operations, strict=True))
            )
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


def drawn(game: nn.ModuleDict, labels: Tensor) -> Tensor:
    """Images of these classes."""
    noise = torch.randn(len(labels), LATENT)
    return game["generator"](torch.cat((noise, one_hot(labels, 10)), 1)).view(-1, 1, 8, 8)


def w1_loss(w1, batch, *, a):
    return cross_entropy(w1(batch[0], a), batch[1])


def game_loss(game, batch, *, a):
    """A loss for each player; the score of an image is the discriminator's logit of its class."""
    images, labels = batch
    both, classes = torch.cat((images, drawn(game, labels))), labels.repeat(2)[:, None]
    on_real, on_drawn = game["discriminator"](both, a).gather(1, classes).chunk(2)
    tell_apart = softplus(-on_real).mean() + softplus(on_drawn).mean()
    return {"generator": softplus(-on_drawn).mean(), "discriminator": tell_apart}


def w2_loss(w2, batch, *, a, w1, game):
    images, labels, valid_images, valid_labels = batch
    mistakes = cross_entropy(w1(valid_images, a), valid_labels, reduction="none")
    members = one_hot(valid_labels, 10).float()
    weights = (mistakes @ members) / members.sum(0).clamp(min=1)
    used = weights if w2.weighted else weights.mean().expand(10)
    on_drawn = cross_entropy(w2(drawn(game, labels), a), labels, reduction="none")
    loss = cross_entropy(w2(images, a), labels) + (used[labels] * on_drawn).mean()
    return loss, {"weights": weights}


def a_loss(a, batch, *, w2):
    return cross_entropy(w2(batch[0], a), batch[1])


def searched(train, valid, rounds: int, *, weighted: bool):
    """The optimizer after so many rounds, and the weights of the classes in each round."""
    w1, w2, a = Network(), Network(), nn.ParameterDict({"a": torch.zeros(2, 3)})
    w2.weighted = weighted
    generator = nn.Sequential(nn.Linear(LATENT + 10, 128), nn.SiLU(), nn.Linear(128, 64), nn.Tanh())
    game = nn.ModuleDict({"generator": generator, "discriminator": Network()})

    def problem(name, module, loss, data, *, lr=5e-3, betas=(0.9, 0.99), **options):
        adam = torch.optim.Adam(module.parameters(), lr=lr, betas=betas)
        return mlo.Problem(name, module=module, optimizer=adam, loss=loss, data=data, **options)

    both = [(*one, *other) for one, other in zip(train, valid, strict=True)]
    players = {"generator": "generator", "discriminator": "discriminator"}
    problems = [
        problem("w1", w1, w1_loss, train),
        problem("game", game, game_loss, train, betas=(0.5, 0.99), players=players),
        problem("w2", w2, w2_loss, both),
        problem("a", a, a_loss, valid, lr=0.05, warmup_steps=rounds // 5),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, hypergradient="one_step")
    return optimizer, [record.metrics["w2"]["weights"] for record in optimizer.run(rounds)]


def paths(optimizer) -> dict[str, Tensor]:
    """The parts of the architecture's gradient: what is lost if a solution is held constant."""
    held = [(), ("game",), ("game", "w1"), ("game", "w1", "w2")]
    sums = [optimizer.gradient("a", held_constant=names)["a"] for names in held]
    names = ["a -> game -> w2", "a -> w1 -> w2", "a -> w2"]
    return {n: more - less for n, more, less in zip(names, sums[:-1], sums[1:], strict=True)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learns from mistakes by class weights.")
    parser.add_argument("--steps", type=int, default=120, help="rounds of the search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--picture", default="learning_from_mistakes.png", help="file for weights and images"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, order = load_digits(), torch.randperm(1797, generator=torch.manual_seed(args.seed))
    x = torch.tensor(data.images[order] / 8 - 1, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)[order]
    labels = y[:600].clone()
    labels[(labels == HARD).nonzero()[::2]] = TAKEN_FOR
    train = list(zip(x[:600].split(50), labels.split(50), strict=True))
    valid = list(zip(x[600:1200].split(50), y[600:1200].split(50), strict=True))
    hard = y[1200:] == HARD

    def accuracies(optimizer) -> str:
        found = []
        for name in ("w1", "w2"):
            network, a = (optimizer.problems[key].module for key in (name, "a"))
            right = (network(x[1200:], a).argmax(1) == y[1200:]).float()
            found.append(f"{name} {100 * right[hard].mean():.1f} of all {100 * right.mean():.1f}")
        return ", ".join(found)

    for weighted in (False, True):
        torch.manual_seed(args.seed)
        optimizer, course = searched(train, valid, args.steps, weighted=weighted)
        print(
            f"{'class' if weighted else 'equal'} weights, accuracy on threes (%):",
            accuracies(optimizer),
        )
    last = torch.tensor(course[-12:]).mean(0)
    others = (last.sum() - last[HARD]) / 9
    print(f"weights of the last rounds: threes {last[HARD]:.2f}, mean of the others {others:.2f}")
    for path, part in paths(optimizer).items():
        print(f"gradient along {path}: {part.norm():.2e}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for c, line in enumerate(torch.tensor(course).unfold(0, 12, 1).mean(2).T):
        left.plot(line, color="C3" if c == HARD else "0.75", label="threes" if c == HARD else None)
    left.set(title="class weights (mean of 12 rounds)", xlabel="round", ylim=(0, None))
    left.legend()
    images = drawn(optimizer.problems["game"].module, torch.arange(10).repeat(6)).detach()
    images = nn.functional.pad(images.view(6, 10, 8, 8), (1, 1, 1, 1), value=-1)
    right.imshow(images.permute(0, 2, 1, 3).reshape(60, 100), cmap="gray_r")
    right.set(title="generated images, a class per column", xticks=range(5, 100, 10), yticks=[])
    right.set_xticklabels(range(10))
    figure.savefig(args.picture, dpi=100)
