"""Reweighting of data sources: a small transformer learns which of its texts is corrupted.

A mix of four sources of text trains a transformer that predicts the next character. The sources are
the documentation of parts of Python's standard library. In one of them half of the characters are
replaced.

    lower level   w* = argmin_w  sum_k p_k L_k(w),  p = softmax(scores), L_k the loss on source k
    upper level   min_scores     L_valid(w*(scores)), on clean text of other modules

Nothing says which source is corrupted. The engine is `penalty` (F2SA; ScaleBiO for language
models). It takes first gradients only, so attention runs in fused kernels, which have no second
derivative. The script prints the learned weights. It also prints the test loss of networks trained
from the same start: with the learned weights and, as controls, with equal weights and without the
corrupted source.

    python examples/transformer_reweighting.py
    python examples/transformer_reweighting.py --share 0    # no corruption: a control
"""

import argparse
import importlib
import inspect
from collections.abc import Iterator

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo

SOURCES = {
    "files": ("shutil", "tempfile", "zipfile", "tarfile", "pathlib", "glob", "os", "io"),
    "processes": ("subprocess", "threading", "multiprocessing", "queue", "signal", "selectors"),
    "mail": ("email.message", "smtplib", "imaplib", "mailbox", "mimetypes", "http.client"),
    "numbers": ("decimal", "fractions", "statistics", "random", "datetime", "calendar"),
}
VALID = ("argparse", "logging", "unittest", "csv", "configparser", "collections", "itertools")
TEST = ("inspect", "pdb", "doctest", "typing", "functools", "textwrap", "difflib", "string")
CORRUPTED = "mail"
CONTEXT, WIDTH, ROWS = 32, 48, 6
CHARACTERS = 96  # printable ASCII, and one for all others


def text_of(modules: tuple[str, ...]) -> Tensor:
    """The docstrings of modules and of what they define, as one row of characters."""
    found: dict[str, None] = {}
    for module in map(importlib.import_module, modules):
        classes = [item for item in vars(module).values() if inspect.isclass(item)]
        for holder in (module, *classes):
            if getattr(holder, "__module__", module.__name__) == module.__name__:
                routines = [item for item in vars(holder).values() if inspect.isroutine(item)]
                found |= dict.fromkeys(inspect.getdoc(item) or "" for item in (holder, *routines))
    text = " ".join(" ".join(found).split())
    return torch.tensor([min(max(ord(c) - 32, 0), CHARACTERS - 1) for c in text])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), False)
        self.head = nn.Linear(WIDTH, CHARACTERS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, texts: Tensor) -> Tensor:
        """The loss of predicting each next character: [texts, rows, CONTEXT + 1] → [texts]."""
        rows = texts.flatten(0, 1)
        x = 0.1 * (self.tokens(rows[:, :-1]) + self.places.weight)
        scores = self.head(self.layers(x, mask=self.mask, is_causal=True))
        losses = cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        return losses.view(len(texts), -1).mean(1)


class Sources(nn.Module):
    """Returns the weights of the sources, which sum to 1; equal at first."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(count))

    def forward(self) -> Tensor:
        return self.scores.softmax(0)


def train_loss(net: Transformer, batch: Tensor, *, sources: Sources) -> Tensor:
    """Lower level: reads the current weights."""
    return sources() @ net(batch)


def valid_loss(sources: Sources, batch: Tensor, *, net: Transformer) -> Tensor:
    """Upper level: reads the trained network."""
    return net(batch).mean()


class Batches:
    """Endless random rows of each text, [texts, rows, CONTEXT + 1]."""

    def __init__(self, *texts: Tensor, rows: int, seed: int) -> None:
        self.texts, self.rows, self.seed = texts, rows, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            rows = []
            for text in self.texts:
                start = torch.randint(len(text) - CONTEXT, (self.rows, 1), generator=generator)
                rows.append(text[start + torch.arange(CONTEXT + 1)])
            yield torch.stack(rows)


def corrupted(text: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replaces a share of the characters by other ones."""
    others = torch.randint(CHARACTERS, text.shape, generator=generator)
    return torch.where(torch.rand(text.shape, generator=generator) < share, others, text)


def new_net(seed: int) -> tuple[Transformer, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Transformer()
    return net, torch.optim.Adam(net.parameters(), lr=3e-3)


def trained(weights: Tensor, texts: list[Tensor], steps: int, seed: int) -> float:
    """The test loss after training with fixed weights."""
    (net, adam), batches = new_net(seed), iter(Batches(*texts, rows=ROWS, seed=seed))
    for _ in range(steps):
        adam.zero_grad()
        (weights @ net(next(batches))).backward()
        adam.step()
    with torch.no_grad():
        return float(net(next(iter(Batches(text_of(TEST), rows=500, seed=0)))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Learns the weights of four sources of text.")
    parser.add_argument("--steps", type=int, default=120, help="updates of the weights")
    parser.add_argument("--train-steps", type=int, default=300, help="of the networks compared")
    parser.add_argument("--share", type=float, default=0.5, help="of characters replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="sources.png", help="file for the learned weights")
    args = parser.parse_args()
    torch.set_num_threads(1)

    names, generator = list(SOURCES), torch.Generator().manual_seed(args.seed)
    texts, bad = [text_of(SOURCES[name]) for name in names], names.index(CORRUPTED)
    texts[bad] = corrupted(texts[bad], args.share, generator)
    (net, inner), sources = new_net(args.seed), Sources(len(names))
    outer = torch.optim.Adam(sources.parameters(), lr=0.05)
    train, valid = (Batches(*t, rows=r, seed=1) for t, r in ((texts, ROWS), ([text_of(VALID)], 24)))
    problems = [
        mlo.Problem("net", module=net, optimizer=inner, loss=train_loss, data=train, steps=2),
        mlo.Problem("sources", module=sources, optimizer=outer, loss=valid_loss, data=valid),
    ]
    # Two steps of the tilted copies, from rest each time: the solve is truncated on purpose.
    engine = {"name": "penalty", "steps": 2, "warm_start": False, "tol": 1.0}
    history = []
    for record in mlo.MultilevelOptimizer(problems, engine).run(args.steps):
        history.append(sources().detach())
        if record.round % 20 == 0:
            print(f"round {record.round}: weight of {CORRUPTED} {history[-1][bad]:.3f}", flush=True)
    for name, weight in zip(names, history[-1], strict=True):
        print(f"learned weight of {name} {weight:.3f}")

    equal = torch.full((len(names),), 1 / len(names))
    without = torch.tensor([float(name != CORRUPTED) for name in names]) / (len(names) - 1)
    for label, weights in (
        ("equal weights", equal),
        ("learned weights", history[-1]),
        ("without the corrupted source", without),
    ):
        loss = trained(weights, texts, args.train_steps, args.seed)
        print(f"test, {label}: loss {loss:.4f}", flush=True)

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(torch.stack(history), label=names)
    axes.set(xlabel="round", ylabel="weight of a source", ylim=(0, None))
    axes.legend()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
