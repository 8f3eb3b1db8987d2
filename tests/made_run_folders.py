"""Run folders made by hand, for tests of reports."""

from __future__ import annotations

import json

from PIL import Image

from lfmcw_app.recipe_loading import load_recipe, parsed_settings
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES


def alpha(nodes, width, value):
    """Mixing weights of a cell, the same on every edge; `value` says which is the largest."""
    edges = sum(2 + node for node in range(nodes))
    row = [1.0] * width
    row[value % width] += 0.1 * value
    return [[weight / sum(row) for weight in row]] * edges


def entry(phase, number, *, method="lfmcw", width=8, nodes=2):
    """A line of metrics.jsonl of a search."""
    both = {kind: alpha(nodes, width, number) for kind in ("normal", "reduction")}
    names = [list(DARTS_PRIMITIVES[-width:])] * len(both["normal"])
    solve = {"engine": "cg", "iterations": 5, "residual": 0.125, "converged": number != 2}
    result = {
        "phase": phase, "round": number, "losses": {"w2": 2.0 / number, "arch": 2.5 / number},
        "metrics": {"w2": {"accuracy": 0.5}, "arch": {"accuracy": 0.25}},
        "gradient_norms": {"w2": 1.0, "arch": 0.1},
        "solves": {"w2": solve}, "alpha": both,
    }  # fmt: skip
    if number == 1:
        result["candidates"] = {"normal": names, "reduction": names}
    if method == "lfmcw":
        result["losses"] |= {"w1": 2.2 / number, "gan": {"generator": 0.7, "discriminator": 1.3}}
        result["metrics"]["w2"]["class_weights"] = [float(number), 0.5, 2.5]
    return result


def make_folder(
    path,
    stages,
    *,
    settings=(),
    names=("cat", "dog", "cow"),
    dataset="digits",
    evaluated=False,
    finished=True,
):
    """A run folder of given stages: name → (operations per edge, rounds)."""
    path.mkdir()
    recipe = load_recipe(
        "smoke",
        space="pdarts" if len(stages) > 1 else "darts",
        overrides={"dataset": dataset, **parsed_settings((*settings, "search.nodes=2"))},
    )
    (path / "config.yaml").write_text(recipe.to_yaml())
    (path / "dataset.json").write_text(
        json.dumps({"name": dataset, "class_names": names, "image_size": 8, "channels": 1})
    )
    method = recipe.search.method
    logged = [
        entry(stage, number, method=method, width=width)
        for stage, (width, rounds) in stages.items()
        for number in range(1, rounds + 1)
    ]
    (path / "samples").mkdir()
    Image.new("L", (16, 24), 200).save(path / "samples" / "real.png")
    for one in logged if method == "lfmcw" else []:
        Image.new("L", (16, 24), 100).save(
            path / "samples" / f"{one['phase']}-{one['round']:06d}.png"
        )
    genotype = random_genotype(2, 0)
    if finished:
        logged += [
            {
                "phase": "training",
                "round": n,
                "losses": {"network": 1 / n},
                "metrics": {"network": {"accuracy": 0.5}},
            }
            for n in range(1, 4)
        ]
        found = {
            "test_error_percent": 12.5,
            "test_top5_error_percent": None,
            "parameters": 1234,
            "test_images": 8,
            "multiply_adds_millions": 1.5,
            "seed": 0,
            "genotype": genotype.to_data(),
            "dataset": dataset,
        }
        (path / "result.json").write_text(json.dumps(found))
        (path / ("evaluated.json" if evaluated else "genotype.json")).write_text(genotype.to_json())
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in logged))
    return path


def add_classes(folder, errors, **more):
    """Gives the result of a folder errors in % by class, of 10 test images each, and `more`."""
    names = json.loads((folder / "dataset.json").read_text())["class_names"]
    result = json.loads((folder / "result.json").read_text())
    result |= {
        "balanced_error_percent": sum(errors) / len(errors),
        "training_error_percent": 1.25,
        "classes": [
            {"name": name, "images": 10, "error_percent": error, "interval_percent": [0.0, 50.0]}
            for name, error in zip(names, errors, strict=True)
        ],
    }
    (folder / "result.json").write_text(json.dumps(result | more))
    return folder
