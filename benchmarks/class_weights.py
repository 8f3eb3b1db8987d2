"""Do the class weights find the mistakes? A search in which one class is made hard.

Half of the training and validation images of one class are labelled as one of its look-alikes, so
that W1 cannot learn the class. Prints the mean class weight of every class over the last quarter of
the rounds, largest first, and draws them over time.

    # Fashion-MNIST: trousers as dresses, 5 minutes
    python benchmarks/class_weights.py
    # under a minute
    python benchmarks/class_weights.py --dataset digits --rounds 40
    # a class with real look-alikes
    python benchmarks/class_weights.py --hard pullover --look-alikes coat shirt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset
from lfmcw_app.parts import search_parts
from lfmcw_app.problems import build_search
from lfmcw_app.recipe import load_recipe

HARD = {"fashion-mnist": ("trouser", ("dress",)), "digits": ("0", ("6", "8"))}
"""Data set → (an easy class, its look-alikes), so that a weight rises by mislabelling alone."""


def class_weights(
    dataset_name: str, rounds: int, seed: int, hard: str, look_alikes: tuple[str, ...]
) -> tuple[Tensor, tuple[str, ...]]:
    """Runs a first-order search; returns the class weights [rounds, C] and the class names."""
    preset = "small" if dataset_name == "fashion-mnist" else "smoke"
    wrong = {"of": hard, "as": look_alikes, "share": 0.5, "in": "both"}
    recipe = load_recipe(
        preset,
        overrides={
            "data.wrong_labels": [wrong],
            "dataset": dataset_name,
            "search.order": "first",
            "search.steps": rounds,
            "seed": seed,
        },
    )
    dataset = load_dataset(dataset_name, image_size=recipe.data.image_size)
    parts = search_parts(recipe, dataset)
    torch.manual_seed(seed)
    modules = build_modules(recipe.search, dataset)
    optimizer = build_search(recipe, dataset, parts.train, parts.validation, modules)
    weights = [
        torch.tensor(record.metrics["w2"]["class_weights"]) for record in optimizer.run(rounds)
    ]
    return torch.stack(weights), dataset.class_names


def draw(weights: Tensor, names: tuple[str, ...], hard: int, path: Path) -> None:
    """Draws running means over 20 rounds, the hard class in colour."""
    window = min(20, len(weights))
    smooth = weights.T.unsqueeze(1).unfold(2, window, 1).mean(-1).squeeze(1)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    rounds = torch.arange(window, len(weights) + 1)
    last = smooth[:, -1]
    shown = []
    others = [label for label in last.argsort(descending=True).tolist() if label != hard]
    for label in (hard, *others):
        if label == hard:
            axes.plot(rounds, smooth[label], color="#d62728", lw=2.2, zorder=3)
        else:
            axes.plot(rounds, smooth[label], color="#9aa5b1", lw=1.0, zorder=2)

        # Names that would cover one another are left out.
        height = float(last[label])
        if all(abs(height - other) > 0.06 * float(last.max()) for other in shown):
            axes.annotate(
                names[label],
                (int(rounds[-1]), height),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
            shown.append(height)
    axes.set_xlim(int(rounds[0]), int(rounds[-1]) * 1.13)
    axes.set_xlabel("round")
    axes.set_ylabel("class weight (mean of 20 rounds)")
    axes.set_title(
        f"half of the images of '{names[hard]}' have a wrong label", fontsize=11, loc="left"
    )
    figure.savefig(path, dpi=100)


def main() -> None:
    """Prints the ranking and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="fashion-mnist", choices=tuple(HARD))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hard", help="name of the class that is made hard")
    parser.add_argument(
        "--look-alikes",
        nargs="+",
        help="names of the classes that half of its images are labelled as",
    )
    parser.add_argument("--picture", type=Path, help="PNG file to draw into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if (args.hard is None) != (args.look_alikes is None):
        parser.error("--hard and --look-alikes belong together")
    named, look_alikes = (args.hard, tuple(args.look_alikes)) if args.hard else HARD[args.dataset]
    names = load_dataset(args.dataset).class_names
    for name in (named, *look_alikes):
        if name not in names:
            parser.error(f"no class {name!r} in {args.dataset}; it has {', '.join(names)}")
    weights, _ = class_weights(args.dataset, args.rounds, args.seed, named, look_alikes)
    hard = names.index(named)
    mean = weights[-max(1, args.rounds // 4) :].mean(0)
    print("| class | mean class weight |")
    print("|---|---|")
    for label in mean.argsort(descending=True).tolist():
        note = " (half mislabelled)" if label == hard else ""
        print(f"| {names[label]}{note} | {float(mean[label]):.3f} |")
    if args.picture is not None:
        draw(weights, names, hard, args.picture)


if __name__ == "__main__":
    main()
