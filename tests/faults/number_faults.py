"""Faults of numbers: parts that lose them or diverge, batches without variance, and growth."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked_runs import Runs
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from trials import REFUSED, Kind, Trial, resumed, said

import mlo
from lfmcw_app.run_folder import RunFolder
from mlo.testing import Vector

ROUNDS = 7
"""Of both recipes there are at least as many, in all phases together."""

LOST = "lost numbers in "
"""Is printed with the problem and its parameter."""


def parts_without_numbers(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """A parameter of one problem becomes NaN or infinite before some round: of the generator alone,
    for one. The run stops and names it, or goes back; a run that stopped is resumed.
    """
    for number in range(min(most, 20)):
        path, seed = runs.folder / f"lost-{number}", rng.random()
        back = rng.random() < 0.3

        def body(path: Path = path, seed: float = seed, back: bool = back) -> None:
            _lose_numbers(random.Random(seed))
            runs.begin(path, on_nonfinite="rollback" if back else "stop")

        code, told = runs.told(body)
        what = told.partition(LOST)[2].partition(";")[0]
        if back and code == 0:  # with other batches and noise, so other numbers
            yield Trial(what=f"{what}, rollback", path=path, lost=_not_finite(path))
            continue
        unclear = said(code, REFUSED)
        if not unclear and what.partition(" ")[0] not in told.partition("Error:")[2]:
            unclear = f"{what} is not named: {told[-300:]}"
        if back:
            yield Trial(what=f"{what}, rollback", path=path, unclear=unclear)
        else:
            yield resumed(runs, path, what, unclear)


def _lose_numbers(rng: random.Random) -> None:
    """Has this process lose the numbers of a parameter before one of its rounds."""
    begin, left = mlo.MultilevelOptimizer._begin_round, [rng.randrange(ROUNDS)]

    def begin_round(self: mlo.MultilevelOptimizer) -> None:
        if left[0] == 0:
            name = rng.choice(sorted(self.problems))
            parameters = self.problems[name].parameters
            key = rng.choice(sorted(parameters))
            with torch.no_grad():
                parameters[key].fill_(rng.choice([math.nan, math.inf]))
            print(f"{LOST}{name} {key};")
        left[0] -= 1
        begin(self)

    mlo.MultilevelOptimizer._begin_round = begin_round  # type: ignore[method-assign]


def _not_finite(path: Path) -> str:
    """Which file of a complete run has numbers that are not finite; empty if none has."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    for name in ("metrics.jsonl", "result.json"):
        for line in (
            (path / name).read_text().splitlines()
            if name[0] == "m"
            else [(path / name).read_text()]
        ):
            try:
                json.loads(line, parse_constant=refuse)
            except ValueError as error:
                return f"{name} has {error}"
    return ""


RATES = (
    "search.weights.lr", "search.architecture.lr", "search.generator.lr",
    "search.generator.discriminator_lr", "evaluation.weights.lr",
)  # fmt: skip


def rates_too_high(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """One part alone diverges, by its learning rate: the run says so, or has finite numbers."""
    for number in range(min(most, 15)):
        path = runs.folder / f"rate-{number}"
        key, rate = RATES[number % len(RATES)], 10 ** rng.uniform(2.0, 30.0)
        code, told = runs.told(partial(runs.begin, path, **{key.replace(".", "__"): rate}))
        unclear = said(code, 0, REFUSED)
        if code == REFUSED and "not finite" not in told:
            unclear = f"another reason is given: {told[-300:]}"
        lost = _not_finite(path) if code == 0 else ""
        yield Trial(what=f"{key}={rate:.0e}", path=path, lost=lost, unclear=unclear)


def batches_without_variance(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """Images that are alike within their classes, in batches of one, two and three."""
    data = runs.folder / "alike"
    for label in range(2):
        (data / str(label)).mkdir(parents=True, exist_ok=True)
        for index in range(12):
            Image.new("L", (8, 8), 40 + 100 * label).save(data / str(label) / f"{index}.png")
    for number in range(min(most, 6)):
        path, batch = runs.folder / f"alike-{number}", 1 + number % 3
        sizes = {
            "search__batch_size": batch,
            "evaluation__batch_size": max(2, batch),
            "data__image_size": rng.choice([8, 12, 16]),
        }
        nothing = {f"data__{name}_images": None for name in ("search", "train", "test")}
        body = partial(runs.begin, path, f"folder:{data}", **sizes, **nothing)
        code, told = runs.told(body)
        unclear = said(code, REFUSED if batch == 1 else 0)
        if batch == 1 and "batch_size" not in told:
            unclear = f"no word of the batch: {told[-300:]}"
        lost = _not_finite(path) if code == 0 else ""
        yield Trial(what=f"{sizes}", path=path, lost=lost, unclear=unclear)


# ------------------------------ growth

SETTLED, LAST = 300, 1000
"""Rounds after which memory is looked at."""

MOST_BYTES = 4 << 20
"""Growth between the two looks that is noise of the allocator."""


def held() -> dict[str, int]:
    """Objects, descriptors, threads and resident bytes of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "objects": len(gc.get_objects()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


def grown(before: dict[str, int], after: dict[str, int]) -> str:
    """What has grown between two looks by more than noise; empty if nothing has."""
    bounds = {"objects": 100, "descriptors": 0, "threads": 0, "bytes": MOST_BYTES}
    rises = {name: after[name] - before[name] for name in bounds}
    return ", ".join(f"{rise:,} {name}" for name, rise in rises.items() if rise > bounds[name])


def _ridge(engine: str) -> mlo.MultilevelOptimizer:
    """A linear regression whose decay is learned: convex, so that every engine serves it."""
    torch.manual_seed(0)
    inputs = torch.randn(40, 5)
    targets = inputs.sum(1, keepdim=True) + 0.1 * torch.randn(40, 1)
    net, decay = torch.nn.Linear(5, 1), Vector(torch.tensor([-2.0]))

    def fit(net: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.mse_loss(net(batch[0]), batch[1])

    def lower(net: Any, batch: list[torch.Tensor], *, decay: Any) -> torch.Tensor:
        return fit(net, batch) + decay.v.exp().sum() * sum((p**2).sum() for p in net.parameters())

    def upper(decay: Any, batch: list[torch.Tensor], *, net: Any) -> torch.Tensor:
        return fit(net, batch)

    def problem(name: str, module: torch.nn.Module, loss: Any, size: int) -> mlo.Problem:
        data = DataLoader(TensorDataset(inputs, targets), batch_size=size, shuffle=True)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        return mlo.Problem(name, module=module, optimizer=optimizer, loss=loss, data=data)

    problems = [problem("net", net, lower, 8), problem("decay", decay, upper, 20)]
    return mlo.MultilevelOptimizer(problems, engine)


def _rounds_of(engine: str) -> None:
    optimizer = _ridge(engine)
    for _ in optimizer.run(SETTLED):
        pass
    before = held()
    for _ in optimizer.run(LAST - SETTLED):
        pass
    print(f"grown: {grown(before, held())};")


def engines_for_long(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """1,000 rounds of each engine: what the process holds does not grow."""
    engines = [name for name in mlo.available_engines() if not name.startswith("betty")]
    for engine in sorted(rng.sample(engines, min(most, len(engines)))):
        code, told = runs.told(partial(_rounds_of, engine))
        lost = told.partition("grown: ")[2].partition(";")[0]
        yield Trial(what=engine, path=None, lost=lost, unclear=said(code, 0))


def searches_for_long(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """A search of 1,000 rounds, with checkpoints and pictures: what the process holds does not
    grow.
    """
    path = runs.folder / "long"

    def body() -> None:
        seen: list[dict[str, int]] = []
        log: Callable[..., None] = RunFolder.log

        def look(self: RunFolder, entry: dict[str, object]) -> None:
            log(self, entry)
            if entry["phase"] == "search" and entry["round"] in (SETTLED, LAST):
                seen.append(held())

        RunFolder.log = look  # type: ignore[method-assign]
        runs.begin(path, search__steps=LAST, checkpoint_every=100)
        print(f"grown: {grown(*seen)};")

    code, told = runs.told(body)
    lost = told.partition("grown: ")[2].partition(";")[0]
    yield Trial(what=f"{LAST} rounds", path=path, lost=lost, unclear=said(code, 0))


NUMBER_KINDS: dict[str, Kind] = {
    "one part without numbers": parts_without_numbers,
    "one part diverges": rates_too_high,
    "batches of one, or without variance": batches_without_variance,
    "1,000 rounds of each engine": engines_for_long,
    "1,000 rounds of a search": searches_for_long,
}
