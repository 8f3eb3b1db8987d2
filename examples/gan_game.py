"""A GAN as a game of two players, regularised by a problem above it that learns through the response of both.

    game          generator:      min_G  E softplus(-D(G(z) + s e))                                    e, z: Gaussian
                  discriminator:  min_D  E softplus(-D(x + s e)) + E softplus(D(G(z) + s e)) + r/2 E |D'(x + s e)|^2
    upper level   min_{s, r}      MMD^2(G(z), validation digits)      a kernel distance of two samples; 0: the same law

The penalty r stands in the discriminator's loss alone and G alone in the upper one: r acts on D, and one step later D on G.
So one step is not enough and the last five are differentiated (`unroll`). The control is the same game, same seed, in which s
and r stay as they were; the last column is what two samples of real digits give.

    python examples/gan_game.py
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

import mlo

LATENT = 16


class Players(nn.Module):
    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(LATENT, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 64), nn.Tanh()
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )


def game_loss(game: Players, real: Tensor, *, regulariser: nn.ParameterDict) -> dict[str, Tensor]:
    """A loss for each player; each moves down its own."""
    noise, penalty = regulariser["log_noise"].exp(), regulariser["log_penalty"].exp()
    fake = game.generator(torch.randn(len(real), LATENT))
    blurred = (real + noise * torch.randn_like(real)).requires_grad_()
    on_real, on_fake = game.discriminator(blurred), game.discriminator(fake + noise * torch.randn_like(fake))
    slope = torch.autograd.grad(on_real.sum(), blurred, create_graph=True)[0].square().sum(1).mean()
    tell_apart = softplus(-on_real).mean() + softplus(on_fake).mean()
    return {"generator": softplus(-on_fake).mean(), "discriminator": tell_apart + 0.5 * penalty * slope}


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy with Gaussian kernels of three widths (Gretton et al. 2012)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = (x[:, None] - y[None]).square().sum(2)
        return sum((-squared / (2 * width**2)).exp() for width in (2.0, 4.0, 8.0))

    n, m = len(a), len(b)
    within = (kernel(a, a).sum() - 3 * n) / (n * (n - 1)) + (kernel(b, b).sum() - 3 * m) / (m * (m - 1))
    return within - 2 * kernel(a, b).mean()


def upper_loss(regulariser: nn.ParameterDict, valid: Tensor, *, game: Players) -> Tensor:
    return mmd(game.generator(torch.randn(200, LATENT)), valid)


def play(digits: Tensor, args: argparse.Namespace, learn: bool) -> tuple[Players, list[list[float]], float]:
    """Plays the game; returns it, the course of s and r, and the distance to 400 digits that nobody saw."""
    torch.manual_seed(args.seed)
    game, start = Players(), {"log_noise": args.noise, "log_penalty": args.penalty}
    regulariser = nn.ParameterDict({name: nn.Parameter(torch.tensor(value).log()) for name, value in start.items()})
    moves = torch.optim.Adam(game.parameters(), lr=2e-3, betas=(0.5, 0.99))
    outer, rest = torch.optim.Adam(regulariser.parameters(), lr=0.05), 10 if learn else args.steps
    train, valid = digits[:1000].split(50), digits[1000:1400].split(200)
    problems = [
        mlo.Problem("game", module=game, optimizer=moves, loss=game_loss, data=train, steps=20,
                    players={"generator": "generator", "discriminator": "discriminator"}),
        mlo.Problem("regulariser", module=regulariser, optimizer=outer, loss=upper_loss, data=valid, warmup_steps=rest),
    ]  # fmt: skip
    rounds = mlo.MultilevelOptimizer(problems, hypergradient=mlo.Unroll(steps=5)).run(args.steps)
    course = [[float(regulariser[name].detach().exp()) for name in start] for _ in rounds]
    with torch.no_grad():
        return game, course, float(mmd(game.generator(torch.randn(1000, LATENT)), digits[1400:]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Plays a GAN on digits and learns what regularises it.")
    parser.add_argument(
        "--steps", type=int, default=60, help="rounds: twenty moves of the game, one of the regulariser"
    )
    parser.add_argument("--noise", type=float, default=0.02, help="s at the start; pixels are in [-1, 1]")
    parser.add_argument("--penalty", type=float, default=0.01, help="r at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="gan_game.png", help="file for the samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(args.seed))]
    _, _, fixed = play(digits, args, learn=False)
    game, course, learned = play(digits, args, learn=True)
    for k, label in enumerate(("noise s", "penalty r")):
        print(f"{label}: {(args.noise, args.penalty)[k]:.4f} -> {course[-1][k]:.4f}")
    real = float(mmd(digits[:1000], digits[1400:]))
    print(f"distance to test digits: fixed {fixed:.4f}, learned {learned:.4f}, real digits {real:.4f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    samples = pad(game.generator(torch.randn(48, LATENT)).detach().view(6, 8, 8, 8), (1, 1, 1, 1), value=-1)
    left.imshow(samples.permute(0, 2, 1, 3).reshape(60, 80), cmap="gray_r")
    left.set(title="generated digits", xticks=[], yticks=[])
    right.semilogy(course, label=("noise s", "penalty r"))
    right.set(title="what the upper problem learned", xlabel="round")
    right.legend()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
