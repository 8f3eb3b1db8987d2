"""What mlo costs: its rounds beside loops written by hand in PyTorch, in one process.

Both make the same updates.

The lower problem is a network of 1.0 M parameters under SGD with momentum. It is convolutional or,
as the hardest case, a perceptron, whose rounds take the least time. Above it, under Adam, are
either mixtures of activations, which both losses read, or weights of classes, which only the lower
loss reads. Both sides first make the same rounds in float64 and must end with equal parameters.
Then single rounds of both sides and of a second copy of the hand-written loop take turns. The
difference between the second copy and the first is the noise.

    python benchmarks/overhead.py              # on one thread of the CPU, about 5 minutes
    python benchmarks/overhead.py --network convolutional
    python benchmarks/overhead.py --network small       # 970 parameters: a round of a few ms
    python benchmarks/overhead.py --device cuda
    python benchmarks/overhead.py --profile    # also the functions in which mlo spends its own time
    python benchmarks/overhead.py --quick      # a small network: only shows that both are equal
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import itertools
import math
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Ratio, turns, write_measurements
from torch import Tensor, nn
from torch.nn import functional as F

from mlo import MultilevelOptimizer, Problem
from mlo.testing import relative_error

Batch = tuple[Tensor, Tensor]
CLASSES = 10
INPUTS = 784
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 3e-4
CHECKED_ROUNDS = 5
RECOMPUTED = "one_step, recomputed"
ENGINES: dict[str, str | dict[str, Any]] = {
    "first_order": "first_order",
    "darts": "darts",
    "one_step": "one_step",
    RECOMPUTED: {"name": "one_step", "keep_graph": False},
}
TOLERANCES = {"darts": 1e-6}
"""Largest relative difference in float64; a finite difference magnifies roundings by 1 / step."""


# ------------------------------ the two problems


class Perceptron(nn.Module):
    """Two hidden layers. With `mixing` [2, 2] each activation is a mixture of ReLU and tanh."""

    def __init__(self, hidden: int, inputs: int = INPUTS) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)])
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor, mixing: Tensor | None = None) -> Tensor:
        """Returns logits, [B, CLASSES]."""
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if mixing is None:
                x = x.relu()
            else:
                x = mixing[index, 0] * x.relu() + mixing[index, 1] * x.tanh()
        logits: Tensor = self.head(x)
        return logits


class Convolutional(nn.Module):
    """Three convolutions of 28×28 images, to 7×7, with batch norm.

    There are two mixtures of activations, as the perceptron has.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        shapes = ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        self.convolutions = nn.ModuleList()
        for inputs, outputs, stride in shapes:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.convolutions.append(nn.Sequential(convolution, nn.BatchNorm2d(outputs)))
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor, mixing: Tensor | None = None) -> Tensor:
        """Returns logits, [B, CLASSES]."""
        x = x.view(-1, 1, 28, 28)
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x)
            mixed = mixing is not None and index < len(mixing)
            x = mixing[index, 0] * x.relu() + mixing[index, 1] * x.tanh() if mixed else x.relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


FEW_INPUTS = 32

NETWORKS: dict[str, tuple[Callable[[int], nn.Module], int, int, int]] = {
    "perceptron": (Perceptron, 680, 8, INPUTS),
    "convolutional": (Convolutional, 105, 4, INPUTS),
    "small": (partial(Perceptron, inputs=FEW_INPUTS), 16, 8, FEW_INPUTS),
}
"""Name → what makes it, its width (of 1.0 M parameters; small: 970) and for `--quick`, inputs."""


class Upper(nn.Module):
    """The upper problem's parameters, in one tensor."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape))


def mixed_lower(weights: nn.Module, batch: Batch, *, upper: Upper) -> Tensor:
    """Cross entropy of the network with mixed activations."""
    return F.cross_entropy(weights(batch[0], upper.value.softmax(1)), batch[1])


def mixed_upper(upper: Upper, batch: Batch, *, weights: nn.Module) -> Tensor:
    """The same on validation data."""
    return mixed_lower(weights, batch, upper=upper)


def weighted_lower(weights: nn.Module, batch: Batch, *, upper: Upper) -> Tensor:
    """Cross entropy in which every class has a weight."""
    losses = F.cross_entropy(weights(batch[0]), batch[1], reduction="none")
    return (losses * upper.value.exp()[batch[1]]).mean()


def weighted_upper(upper: Upper, batch: Batch, *, weights: nn.Module) -> Tensor:
    """Plain cross entropy on validation data."""
    return F.cross_entropy(weights(batch[0]), batch[1])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A problem: losses, the shape of the upper parameters, and the engines that suit it."""

    lower_loss: Callable[..., Tensor]
    upper_loss: Callable[..., Tensor]
    shape: tuple[int, ...]
    engines: tuple[str, ...]


SETTINGS = {
    "mixed activations": Setting(
        lower_loss=mixed_lower, upper_loss=mixed_upper, shape=(2, 2), engines=tuple(ENGINES)
    ),
    "class weights": Setting(
        lower_loss=weighted_lower,
        upper_loss=weighted_upper,
        shape=(CLASSES,),
        engines=("darts", "one_step", RECOMPUTED),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """The common start of both sides: modules, which they copy, and batches."""

    network: nn.Module
    upper: Upper
    training: list[Batch]
    validation: list[Batch]


def start(
    setting: Setting,
    make: Callable[[], nn.Module],
    batch: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Start:
    """Makes modules and eight batches of noise, [size, inputs], for each loss."""
    torch.manual_seed(0)
    network, upper = make(), Upper(*setting.shape)
    batches = []
    for _ in range(16):
        x, y = torch.randn(batch), torch.randint(CLASSES, batch[:1])
        batches.append((x.to(device, dtype), y.to(device)))
    return Start(
        network=network.to(device, dtype),
        upper=upper.to(device, dtype),
        training=batches[:8],
        validation=batches[8:],
    )


def optimizers(network: nn.Module, upper: nn.Module) -> tuple[torch.optim.SGD, torch.optim.Adam]:
    """SGD with momentum for the network, Adam for what is above it."""
    return (
        torch.optim.SGD(
            network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        ),
        torch.optim.Adam(upper.parameters(), lr=1e-3, betas=(0.5, 0.999)),
    )


# ------------------------------ the two sides


class WithMlo:
    """The rounds of a `MultilevelOptimizer`."""

    def __init__(
        self, setting: Setting, engine: str, begin: Start, on_nonfinite: str | None
    ) -> None:
        self.network, self.upper = copy.deepcopy(begin.network), copy.deepcopy(begin.upper)
        sgd, adam = optimizers(self.network, self.upper)
        problems = [
            Problem(
                "weights",
                module=self.network,
                optimizer=sgd,
                loss=setting.lower_loss,
                data=begin.training,
            ),
            Problem(
                "upper",
                module=self.upper,
                optimizer=adam,
                loss=setting.upper_loss,
                data=begin.validation,
            ),
        ]
        optimizer = MultilevelOptimizer(
            problems,
            ENGINES[engine],
            on_nonfinite=on_nonfinite,  # type: ignore[arg-type]
        )
        self.step = optimizer.step


class ByHand:
    """The same updates, with PyTorch alone.

    An update of the network W' = W - lr (momentum · buffer + ∇_W L(W, a) + decay · W), then of what
    is above it, a, along ∇_a L_val(W', a) - lr ∇_a ⟨∇_W L(W, a), ∇_W' L_val⟩. The second term is
    left out by `first_order` and taken by central differences by `darts`. `one_step` takes it
    exactly from the first gradient, whose graph it keeps, as mlo does where the graph fits into
    memory; or, as `recomputed`, from a gradient that is computed again, which takes less memory.
    """

    def __init__(self, setting: Setting, engine: str, begin: Start) -> None:
        self._setting, self._engine = setting, engine
        self.network, self.upper = copy.deepcopy(begin.network), copy.deepcopy(begin.upper)
        self._before = copy.deepcopy(self.network)  # holds W while `network` moves on to W'
        self._sgd, self._adam = optimizers(self.network, self.upper)
        self._training = itertools.cycle(begin.training)
        self._validation = itertools.cycle(begin.validation)
        self._w, self._w_before = list(self.network.parameters()), list(self._before.parameters())
        self._a = list(self.upper.parameters())

    def step(self) -> None:
        """Makes one round."""
        batch = next(self._training)
        if self._engine != "first_order":
            with torch.no_grad():
                torch._foreach_copy_(self._w_before, self._w)
        graph: Sequence[Tensor] | None = None
        if self._engine == "one_step":
            graph = self._gradient_before(batch)
            gradient = [g.detach() for g in graph]
        else:
            gradient = list(torch.autograd.grad(self._lower(self.network, batch), self._w))
        _move(self._sgd, self._w, gradient)

        # What is above the network: the direct gradient, minus the implicit part.
        loss = self._setting.upper_loss(self.upper, next(self._validation), weights=self.network)
        if self._engine == "first_order":
            _move(self._adam, self._a, torch.autograd.grad(loss, self._a))
            return
        direct, *v = torch.autograd.grad(loss, [*self._a, *self._w], allow_unused=True)
        q = torch._foreach_mul(v, LEARNING_RATE)
        if self._engine == "darts":
            implicit = self._difference(batch, q)
        else:
            implicit = self._exact(batch, q, graph)
        _move(self._adam, self._a, [-implicit if direct is None else direct - implicit])

    def _lower(self, network: nn.Module, batch: Batch) -> Tensor:
        return self._setting.lower_loss(network, batch, upper=self.upper)

    def _gradient_before(self, batch: Batch) -> Sequence[Tensor]:
        return torch.autograd.grad(
            self._lower(self._before, batch), self._w_before, create_graph=True
        )

    def _exact(self, batch: Batch, q: Sequence[Tensor], graph: Sequence[Tensor] | None) -> Tensor:
        """∇_a ⟨∇_W L(W, a), q⟩."""
        gradient = graph or self._gradient_before(batch)
        (found,) = torch.autograd.grad(gradient, self._a, grad_outputs=q)
        return found

    def _difference(self, batch: Batch, q: Sequence[Tensor]) -> Tensor:
        """The same by (∇_a L(W + e q, a) - ∇_a L(W - e q, a)) / 2e.

        The step e is as mlo chooses it (`mlo.FiniteDifference`).
        """
        moved, norms = (
            torch.stack(torch._foreach_norm(tensors)).tolist() for tensors in (q, self._w_before)
        )
        counts = [w.numel() for w in self._w_before]
        sizes = [max(n, 0.01 * math.sqrt(c)) for n, c in zip(norms, counts, strict=True)]
        largest = min(s / u for s, u in zip(sizes, moved, strict=True) if u > 0.0)
        e = math.cbrt(torch.finfo(q[0].dtype).eps) * largest

        found = []
        for shift in (e, -2.0 * e):
            with torch.no_grad():
                torch._foreach_add_(self._w_before, q, alpha=shift)
            found += torch.autograd.grad(self._lower(self._before, batch), self._a)
        return (found[0] - found[1]) / (2.0 * e)


def _move(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradient: Sequence[Tensor]
) -> None:
    for parameter, g in zip(parameters, gradient, strict=True):
        parameter.grad = g
    optimizer.step()


# ------------------------------ equality and time


def check(setting: Setting, engine: str, begin: Start, on_nonfinite: str | None) -> float:
    """Makes rounds on both sides in float64; returns the largest relative difference.

    Raises:
        SystemExit: if it is above the engine's tolerance.
    """
    origin = {**dict(begin.network.named_parameters()), **dict(begin.upper.named_parameters())}
    moved: list[dict[str, Tensor]] = []
    for side in (WithMlo(setting, engine, begin, on_nonfinite), ByHand(setting, engine, begin)):
        for _ in range(CHECKED_ROUNDS):
            side.step()
        parameters = [*side.network.named_parameters(), *side.upper.named_parameters()]
        moved.append({key: p.detach() - origin[key].detach() for key, p in parameters})
    worst = max(relative_error(moved[0][key], moved[1][key]) for key in origin)
    if worst > TOLERANCES.get(engine, 1e-10):
        raise SystemExit(
            f"{engine}: after {CHECKED_ROUNDS} rounds the two sides differ by {worst:.1e}."
        )
    return worst


def clock(device: torch.device) -> float:
    """Seconds of this process's processor time on a CPU; on a GPU, of the wall when it is idle.

    Other jobs may run on the CPU too.
    """
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def rows(name: str, engine: str, times: dict[str, list[float]]) -> Iterator[str]:
    """The rows of a table: medians, and the ratio to the hand-written loop with quartiles."""
    for side, found in times.items():
        milliseconds = (f"{1e3 * statistics.median(found):.2f}", f"{1e3 * min(found):.2f}")
        cells = (name, engine, side, *milliseconds, str(Ratio.of(found, times["by hand"])))
        yield f"| {' | '.join(cells)} |"


def measurement(times: dict[str, list[float]]) -> dict[str, str]:
    """The columns of the file of measurements."""
    hand = times["by hand"]
    noise = Ratio.of(times["by hand, again"], hand)
    return {
        "by_hand_ms": f"{1e3 * statistics.median(hand):.4g}",
        "mlo_ms": f"{1e3 * statistics.median(times['mlo']):.4g}",
        **Ratio.of(times["mlo"], hand).cells(),
        "noise": f"{noise.median:.4g}",
    }


def profile(work: Callable[[], object], rounds: int) -> Iterator[str]:
    """The functions with the most own time in rounds, as the rows of a table."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(rounds):
        work()
    profiler.disable()
    yield "| function | ms a round, own | ms a round, all | calls a round |\n|---|---|---|---|"
    entries = pstats.Stats(profiler).get_stats_profile().func_profiles
    for key, entry in sorted(entries.items(), key=lambda item: -item[1].tottime)[:25]:
        where = ""
        if entry.line_number:
            where = f"{entry.file_name.rpartition('/')[2]}:{entry.line_number} "
        per_round = [1e3 * seconds / rounds for seconds in (entry.tottime, entry.cumtime)]
        calls = int(str(entry.ncalls).partition("/")[0]) / rounds
        yield f"| {where}{key} | {per_round[0]:.3f} | {per_round[1]:.3f} | {calls:.0f} |"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--network", default="perceptron", choices=tuple(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--repeats",
        type=int,
        default=300,
        help="rounds of each side, in turns, after three that are not counted",
    )
    parser.add_argument(
        "--only", default="", help="only problems or engines whose name contains this"
    )
    parser.add_argument(
        "--on-nonfinite",
        default="stop",
        choices=("stop", "none"),
        help="mlo's option of the same name",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also the functions in which mlo's rounds spend their time",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small network, few rounds: only shows that all are equal",
    )
    parser.add_argument("--csv", type=Path, help="also writes the measurements into this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    on_nonfinite = None if args.on_nonfinite == "none" else args.on_nonfinite
    network, width, small, inputs = NETWORKS[args.network]
    make = partial(network, small if args.quick else width)
    repeats = 3 if args.quick else args.repeats
    batch = (args.batch_size, inputs)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one thread of the CPU"
    size = sum(parameter.numel() for parameter in make().parameters())
    print(
        f"torch {torch.__version__}, {where}, {args.network}, {size:,} parameters, batch "
        f"{args.batch_size}, float32\n"
    )
    chosen = [
        (name, setting, engine)
        for name, setting in SETTINGS.items()
        for engine in setting.engines
        if args.only in f"{name}, {engine}"
    ]

    print(f"| problem | engine | largest difference after {CHECKED_ROUNDS} rounds in float64 |")
    print("|---|---|---|")
    differences = []
    for name, setting, engine in chosen:
        begin = start(setting, make, batch, device, torch.float64)
        differences.append(check(setting, engine, begin, on_nonfinite))
        print(f"| {name} | {engine} | {differences[-1]:.1e} |", flush=True)

    head = ("problem", "engine", "side", "ms", "least", "÷ by hand (quartiles)")
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    profiles: list[str] = []
    measured: list[dict[str, object]] = []
    for (name, setting, engine), difference in zip(chosen, differences, strict=True):
        begin = start(setting, make, batch, device, torch.float32)
        sides: dict[str, Callable[[], object]] = {
            "by hand": ByHand(setting, engine, begin).step,
            "by hand, again": ByHand(setting, engine, begin).step,
            "mlo": WithMlo(setting, engine, begin, on_nonfinite).step,
        }
        times = turns(sides, repeats, partial(clock, device))
        for line in rows(name, engine, times):
            print(line, flush=True)
        place = {"network": args.network, "parameters": size, "batch": args.batch_size}
        found = {"difference": f"{difference:.1e}", **measurement(times)}
        measured.append({**place, "problem": name, "engine": engine, **found})
        if args.profile:
            profiles += [f"\n{name}, {engine}:\n", *profile(sides["mlo"], repeats)]
    print("\n".join(profiles))
    if args.csv:
        part = ("network", "batch", "problem", "engine")
        write_measurements(args.csv, measured, part=part)


if __name__ == "__main__":
    main()
