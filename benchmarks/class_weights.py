"""Do class weights find mistakes? Shows those of a run, or of a search with a class made hard.

Half of the training and validation images of one class are labelled as one of its look-alikes, so
that W1 cannot learn the class. Prints the mean class weight of every class over the last quarter of
the rounds, largest first, beside the share of its images in D_val that W1 gets wrong in the end;
draws the weights over time beside W1's confusion matrix.

    # Fashion-MNIST: trousers as dresses, 5 minutes
    python benchmarks/class_weights.py
    # under a minute
    python benchmarks/class_weights.py --dataset digits --rounds 40
    # a class with real look-alikes
    python benchmarks/class_weights.py --hard pullover --look-alikes coat shirt
    # the classes of a run as they are
    python -m lfmcw_app.run folder:cifar10 --preset small --seed 0 --out runs/cifar10
    python benchmarks/class_weights.py --run runs/cifar10 --picture class_weights.png
    # for docs/results.md: rows of one seed, appended
    python benchmarks/class_weights.py --run runs/cifar10 --csv docs/data/class_weights_seeds.csv
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.parts import search_parts
from lfmcw_app.problems import build_search
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.report.class_figure import draw_class_weights
from lfmcw_app.report.images import class_names, weights_of_rounds
from lfmcw_app.report.reading import read_run
from lfmcw_app.search_end import confusion_of_w1

HARD = {"fashion-mnist": ("trouser", ("dress",)), "digits": ("0", ("6", "8"))}
"""Data set → (an easy class, its look-alikes), so that a weight rises by mislabelling alone."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found of its classes.

    Attributes:
        weights: class weights, [classes, rounds].
        confusion: of W1 on D_val, counts; rows: the right class.
        names: of the classes.
        seed: of the search.
    """

    weights: np.ndarray
    confusion: list[list[int]]
    names: tuple[str, ...]
    seed: int

    @property
    def lasting(self) -> np.ndarray:
        """The weights' means over the last quarter of the rounds, [classes]."""
        return self.weights[:, -max(1, self.weights.shape[1] // 4) :].mean(axis=1)

    def wrong_percent(self, label: int) -> float:
        """The share of a class's images in D_val that W1 gets wrong in the end, %."""
        row = self.confusion[label]
        return 100.0 * (1.0 - row[label] / max(1, sum(row)))


def searched(
    dataset_name: str, rounds: int, seed: int, hard: str, look_alikes: tuple[str, ...]
) -> Found:
    """Runs a first-order search with a class made hard."""
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
    weights = [record.metrics["w2"]["class_weights"] for record in optimizer.run(rounds)]
    return Found(
        weights=np.array(weights).T,
        confusion=confusion_of_w1(modules, parts.train, parts.validation, dataset),
        names=dataset.class_names,
        seed=seed,
    )


def found_in(path: Path) -> Found:
    """Reads a run folder."""
    run = read_run(path)
    weights, confusion = weights_of_rounds(run), run.search_end.get("w1_confusion")
    if weights is None or confusion is None:
        raise InputError(
            f"{path} has no class weights, or no confusion matrix of W1 in search.json. Name the "
            "folder of a complete search with the method lfmcw."
        )
    names = tuple(class_names(run, len(weights)))
    return Found(weights=weights, confusion=confusion, names=names, seed=run.recipe.seed)


def print_table(found: Found, hard: str | None) -> None:
    """Prints the classes, the heaviest first."""
    weights = found.lasting
    print("| class | mean class weight | W1 wrong on D_val, % |")
    print("|---|---|---|")
    for label in np.argsort(-weights, kind="stable"):
        note = " (half mislabelled)" if found.names[label] == hard else ""
        wrong = found.wrong_percent(label)
        print(f"| {found.names[label]}{note} | {weights[label]:.3f} | {wrong:.1f} |")


def append_rows(found: Found, data: str, labels: str, path: Path) -> None:
    """Appends a row for each class to a CSV file, which begins with a head."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        if new:
            rows.writerow(["data", "labels", "rounds", "seed", "class", "weight", "wrong_percent"])
        for label, name in enumerate(found.names):
            weight, wrong = f"{found.lasting[label]:.3f}", f"{found.wrong_percent(label):.1f}"
            rounds = found.weights.shape[1]
            rows.writerow([data, labels, rounds, found.seed, name, weight, wrong])


def main() -> None:
    """Prints the ranking and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run, instead of a search here")
    parser.add_argument("--dataset", default="fashion-mnist", choices=tuple(HARD))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hard", help="name of the class to make hard")
    parser.add_argument(
        "--look-alikes",
        nargs="+",
        help="names of the classes that half of its images are labelled as",
    )
    parser.add_argument("--picture", type=Path, help="PNG file to draw into")
    parser.add_argument("--emphasise", nargs="+", default=[], help="classes drawn in colour")
    parser.add_argument("--csv", type=Path, help="file to append a row for each class to")
    parser.add_argument("--data", default="", help="name of the data in that file")
    parser.add_argument("--labels", help="what is said of the labels there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if (args.hard is None) != (args.look_alikes is None):
        parser.error("--hard and --look-alikes belong together")
    if args.run is not None and args.hard is not None:
        parser.error("--hard is for a new search; drop it, or --run")
    title, hard = "", None
    if args.run is not None:
        found = found_in(args.run)
    else:
        hard, look_alikes = (args.hard, args.look_alikes) if args.hard else HARD[args.dataset]
        names = load_dataset(args.dataset).class_names
        for name in (hard, *look_alikes):
            if name not in names:
                parser.error(
                    f"there is no class {name!r} in {args.dataset}; it has {', '.join(names)}"
                )
        found = searched(args.dataset, args.rounds, args.seed, hard, tuple(look_alikes))
        title = f"half of the images of '{hard}' have a wrong label"
    print_table(found, hard)
    if args.csv is not None:
        labels = args.labels or (f"half of {hard} are wrong" if hard else "right")
        append_rows(found, args.data or args.dataset, labels, args.csv)
    if args.picture is not None:
        draw_class_weights(
            found.weights,
            found.confusion,
            found.names,
            args.picture,
            emphasised=args.emphasise or ([hard] if hard else []),
            title=title,
        )


if __name__ == "__main__":
    main()
