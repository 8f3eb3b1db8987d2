"""A GAN as a game of two players, regularised by a problem above it.

That problem learns through the response of both players.

    game          generator:      min_G  E softplus(-D(G(z) + s e)),   e, z: Gaussian
                  discriminator:  min_D  E softplus(-D(x + s e)) + E softplus(D(G(z) + s e))
                                         + r/2 E |D'(x + s e)|^2
    upper level   min_{s, r}      MMD^2(G(z), validation digits),
                                  a kernel distance of two samples; 0: the same law

The penalty r is only in the discriminator's loss, and only G is in the upper loss. So r acts on D,
and one step later D acts on G. One step is therefore not enough, and the last five are
differentiated (`unroll`). The control is the same game with s and r at rest.

    python examples/gan_game.py
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

import mlo

LATENT = 16
START = {"noise s": 0.02, "penalty r": 0.01}  # pixels are in [-1, 1]


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, outputs)
    )


def game_loss(
    game: nn.ModuleDict, real: Tensor, *, regulariser: nn.ParameterDict
) -> dict[str, Tensor]:
    """A loss for each player; each player descends its own."""
    noise, penalty = (logarithm.exp() for logarithm in regulariser.values())
    fake = game["generator"](torch.randn(len(real), LATENT))
    blurred = (real + noise * torch.randn_like(real)).requires_grad_()
    on_real, on_fake = map(game["discriminator"], (blurred, fake + noise * torch.randn_like(fake)))
    slope = torch.autograd.grad(on_real.sum(), blurred, create_graph=True)[0].square().sum(1).mean()
    tell_apart = softplus(-on_real).mean() + softplus(on_fake).mean()
    return {
        "generator": softplus(-on_fake).mean(),
        "discriminator": tell_apart + 0.5 * penalty * slope,
    }


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Gaussian kernels of three widths, summed, for each pair of images."""
    squared = (a[:, None] - b[None]).square().sum(2)
    return sum((-squared / (2 * width**2)).exp() for width in (2.0, 4.0, 8.0))


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012)."""
    within = sum((kernel(x, x).sum() - 3 * len(x)) / (len(x) * (len(x) - 1)) for x in (a, b))
    return within - 2 * kernel(a, b).mean()


def upper_loss(regulariser: nn.ParameterDict, valid: Tensor, *, game: nn.ModuleDict) -> Tensor:
    return mmd(game["generator"](torch.randn(200, LATENT)), valid)


def play(
    digits: Tensor, rounds: int, rest: int, seed: int
) -> tuple[nn.ModuleDict, list[list[float]], float]:
    """Returns the game, the course of s and r, and the distance to 397 unseen digits.

    At first s and r rest.
    """
    torch.manual_seed(seed)
    game = nn.ModuleDict(
        {"generator": nn.Sequential(*mlp(LATENT, 64), nn.Tanh()), "discriminator": mlp(64, 1)}
    )
    regulariser = nn.ParameterDict(
        {name: torch.tensor(value).log() for name, value in START.items()}
    )
    moves = torch.optim.Adam(game.parameters(), lr=2e-3, betas=(0.5, 0.99))
    outer = torch.optim.Adam(regulariser.parameters(), lr=0.05)
    train, valid = digits[:1000].split(50), digits[1000:1400].split(200)
    problems = [
        mlo.Problem(
            "game",
            module=game,
            optimizer=moves,
            loss=game_loss,
            data=train,
            steps=20,
            players={"generator": "generator", "discriminator": "discriminator"},
        ),
        mlo.Problem(
            "regulariser",
            module=regulariser,
            optimizer=outer,
            loss=upper_loss,
            data=valid,
            warmup_steps=rest,
        ),
    ]

    def strengths() -> list[float]:
        return [float(value.detach().exp()) for value in regulariser.values()]

    optimizer = mlo.MultilevelOptimizer(problems, hypergradient=mlo.Unroll(steps=5))
    course = [strengths() for _ in optimizer.run(rounds)]
    samples = game["generator"](torch.randn(1000, LATENT)).detach()
    return game, course, float(mmd(samples, digits[1400:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Trains a GAN on digits and learns its regularisation."
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="rounds: twenty moves of the game, one of s and r"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="gan_game.png", help="file for the samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    order = torch.randperm(1797, generator=torch.manual_seed(args.seed))
    digits = torch.tensor(load_digits().data, dtype=torch.float32)[order] / 8 - 1
    _, _, fixed = play(digits, args.steps, args.steps, args.seed)
    game, course, learned = play(digits, args.steps, 10, args.seed)
    for label, before, after in zip(START, START.values(), course[-1], strict=True):
        print(f"{label}: {before:.4f} -> {after:.4f}")
    real = float(mmd(digits[:1000], digits[1400:]))
    print(
        f"distance to test digits: fixed {fixed:.4f}, learned {learned:.4f}, real digits {real:.4f}"
    )

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    samples = game["generator"](torch.randn(48, LATENT)).detach().view(6, 8, 8, 8)
    samples = pad(samples, (1, 1, 1, 1), value=-1)
    left.imshow(samples.permute(0, 2, 1, 3).reshape(60, 80), cmap="gray_r")
    left.set(title="generated digits", xticks=[], yticks=[])
    right.semilogy(course, label=list(START))
    right.set(title="what the upper problem learned", xlabel="round")
    right.legend()
    figure.savefig(args.picture, dpi=100)
