"""The supernet and complete search steps beside the original module-per-edge operations, in one process.

Three tables: a forward pass, a full gradient and α's gradient of both supernets; complete steps of every method through
`build_search` with this project's supernet, and of DARTS with the original operations; the passes of a step. Each time is the
median and range of interleaved repetitions on the same batch; ratios are to the original operations.

    python benchmarks/search_step.py                    # C=16, 8 cells, 32×32, batch 8: about 15 minutes
    python benchmarks/search_step.py --size small       # the project's small presets: C=4, 3 cells, 2 nodes, 16×16, batch 32
    python benchmarks/search_step.py --profile          # also the time of each operator in a full gradient of both
    python benchmarks/search_step.py --check            # only compares values and gradients, at the full batch size
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from reference_supernet import ReferenceSupernet, split_by_edge
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.data import Dataset, Images, search_split
from lfmcw_app.modules import SearchModules, build_modules
from lfmcw_app.problems import build_search
from lfmcw_app.recipe import Recipe, load_recipe
from lfmcw_app.search_space.candidates import as_candidates
from lfmcw_app.search_space.operations import PRIMITIVES, OperationStyle
from lfmcw_app.search_space.supernet import Architecture, Supernet
from mlo import MultilevelOptimizer
from mlo.testing import relative_error

SIZES: dict[str, dict[str, int]] = {
    "paper": {"channels": 16, "layers": 8, "nodes": 4, "image_size": 32, "image_channels": 3, "batch_size": 8},
    "small": {"channels": 4, "layers": 3, "nodes": 2, "image_size": 16, "image_channels": 1, "batch_size": 32},
    "tiny": {"channels": 4, "layers": 3, "nodes": 1, "image_size": 8, "image_channels": 1, "batch_size": 4},
}
STEPS: dict[str, dict[str, Any]] = {
    "DARTS, first order": {"method": "darts", "order": "first"},
    "DARTS, second order (one_step)": {"method": "darts"},
    "DARTS, second order (darts)": {"method": "darts", "hypergradient": "darts"},
    "LFM-CW, first order": {"order": "first"},
    "LFM-CW, second order (one_step)": {},
    "LFM-CW, second order (darts)": {"hypergradient": "darts"},
    "PC-DARTS, first order": {"method": "darts", "order": "first", "space": "pcdarts"},
    "P-DARTS, third stage": {"method": "darts", "order": "first", "space": "pdarts"},
}
ORIGINAL = "DARTS, first order, original operations"


# ------------------------------------------------------------------ what is measured


def build(size: dict[str, int], original: bool, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A supernet of a size, or the reference."""
    cls: Any = ReferenceSupernet if original else Supernet
    arguments = {key: size[key] for key in ("channels", "layers", "nodes")}
    network: nn.Module = cls(in_channels=size["image_channels"], num_classes=10, **arguments, **options).to(dtype)
    return network


def pair(
    size: dict[str, int], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Supernet, nn.Module, Architecture, tuple[Tensor, Tensor]]:
    """Both supernets with the same weights, an architecture and a batch."""
    torch.manual_seed(0)
    ours, original = build(size, False, dtype, **options), build(size, True, dtype, **options)
    assert isinstance(ours, Supernet)
    original.load_state_dict(split_by_edge(ours, {**dict(ours.named_parameters()), **dict(ours.named_buffers())}))
    images = torch.randn(size["batch_size"], size["image_channels"], size["image_size"], size["image_size"]).to(dtype)
    labels = torch.randint(10, (size["batch_size"],))
    return ours, original, Architecture(size["nodes"], scale=0.1).to(dtype), (images, labels)


def search(size: dict[str, int], options: dict[str, Any], *, original: bool = False) -> MultilevelOptimizer:
    """The search of a recipe on random images, as `lfmcw_app.run` builds it."""
    recipe, dataset = _recipe(size, options), _random_images(size)
    primitives, layers = as_candidates(PRIMITIVES, size["nodes"]), size["layers"]
    if recipe.search.space == "pdarts":  # three operations an edge, and the convolutions cost most
        primitives, layers = as_candidates(PRIMITIVES[3:6], size["nodes"]), layers + 9 if layers == 8 else layers + 2
    torch.manual_seed(0)
    train, validation = search_split(dataset, None, 0, (0.5, 0.5))
    modules = build_modules(recipe.search, dataset, primitives=primitives, layers=layers)
    if original:
        modules = SearchModules(w1=None, gan=None, w2=modules.w2, arch=modules.arch)
        modules.w2.network = build(size, True)  # type: ignore[assignment]
    optimizer = build_search(recipe, dataset, train, validation, modules)
    optimizer.round = recipe.search.architecture.warmup_epochs * (len(train) // recipe.search.batch_size)
    return optimizer


def _recipe(size: dict[str, int], options: dict[str, Any]) -> Recipe:
    options = {
        "channels": size["channels"], "layers": size["layers"], "nodes": size["nodes"],
        "batch_size": size["batch_size"], "steps": 100, "partial_channels": 4, "generator.channels": 16, **options,
    }  # fmt: skip
    space = options.pop("space", "darts")
    overrides = {f"search.{key}": value for key, value in options.items()}
    return load_recipe("smoke", space=space, overrides=overrides | {"search.space": space})


def _random_images(size: dict[str, int]) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    channels, pixels, count = size["image_channels"], size["image_size"], 4 * size["batch_size"]
    images = torch.randint(256, (count, channels, pixels, pixels), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    return Dataset(
        name="random", train=Images(pixels=images, labels=labels), test=Images(pixels=images, labels=labels),
        class_names=tuple(map(str, range(10))), mean=(0.5,) * channels, std=(0.25,) * channels,
    )  # fmt: skip


def passes(optimizer: MultilevelOptimizer) -> tuple[int, int]:
    """Forward and backward passes through supernets (and discriminators) in one step, counted by hooks."""
    counts = [0, 0]

    def count_backward(*_: object) -> None:
        counts[1] += 1

    def count_forward(module: nn.Module, args: object, output: Tensor) -> None:
        counts[0] += 1
        if output.requires_grad:
            output.register_hook(count_backward)

    modules = (module for problem in optimizer.problems.values() for module in problem.module.modules())
    supernets = [module for module in modules if isinstance(module, (Supernet, ReferenceSupernet))]
    # A discriminator calls its trunk's features only: what every pass goes through is the last cell.
    handles = [supernet.cells[-1].register_forward_hook(count_forward) for supernet in supernets]
    optimizer.step()
    for handle in handles:
        handle.remove()
    return counts[0], counts[1]


# ------------------------------------------------------------------ tables


def interleaved(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, function in work.items():
            began = time.perf_counter()
            function()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return times


def row(name: str, times: list[float], base: list[float], *more: object) -> str:
    """A row of a table: name, median, range, how many times faster than `base` and how many times its time."""
    mid, of_base = statistics.median(times), statistics.median(base)
    cells = [name, f"{mid * 1e3:.0f}", f"{min(times) * 1e3:.0f}–{max(times) * 1e3:.0f}", f"{of_base / mid:.2f}",
             f"{mid / of_base:.2f}", *more]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def supernet_table(size: dict[str, int], repeats: int) -> None:
    """Prints passes through both supernets."""
    ours, original, arch, (images, labels) = pair(size)

    def loss(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(images, arch()), labels)

    def forward(network: nn.Module) -> None:
        with torch.no_grad():
            loss(network)

    def full(network: nn.Module) -> None:
        torch.autograd.grad(loss(network), [*network.parameters(), *arch.parameters()])

    def architecture(network: nn.Module) -> None:
        network.requires_grad_(False)
        torch.autograd.grad(loss(network), list(arch.parameters()))
        network.requires_grad_(True)

    print("| pass | supernet | ms | range | times faster | ÷ original |\n|---|---|---|---|---|---|")
    for name, what in (("forward", forward), ("full gradient", full), ("α's gradient", architecture)):
        found = interleaved({"original": lambda: what(original), "this one": lambda: what(ours)}, repeats)  # noqa: B023
        for which, times in found.items():
            print(row(f"{name} | {which}", times, found["original"]), flush=True)
    print()


def step_table(size: dict[str, int], repeats: int, only: str) -> None:
    """Prints complete steps."""
    searches = {ORIGINAL: search(size, STEPS["DARTS, first order"], original=True)}
    searches |= {name: search(size, options) for name, options in STEPS.items() if only in name}
    counted = {name: passes(optimizer) for name, optimizer in searches.items()}  # also warms up
    times = interleaved({name: optimizer.step for name, optimizer in searches.items()}, repeats)
    head = ("step", "ms", "range", "times faster", "÷ original", "forward", "backward")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, found in times.items():
        print(row(name, found, times[ORIGINAL], *counted[name]))
    print(f"\npeak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB\n")


def check(size: dict[str, int]) -> None:
    """Prints the largest relative differences of values and gradients.

    Raises:
        SystemExit: if one is above 1e-12 (float64) or 1e-5 (float32; in a smooth supernet: at a kink of ReLU or a tie of max
            pooling a rounding chooses another branch in either formulation).
    """
    smooth = {
        "style": OperationStyle(activation="silu"),
        "primitives": tuple(p for p in PRIMITIVES if p != "max_pool_3x3"),
    }
    print("| type | values | gradient in W | gradient in α |\n|---|---|---|---|")
    worst = False
    for dtype, tolerance, options in ((torch.float64, 1e-12, {}), (torch.float32, 1e-5, smooth)):
        ours, original, arch, (images, labels) = pair(size, dtype, **options)
        if options:
            arch = Architecture(size["nodes"], options["primitives"], scale=0.1).to(dtype)
        found = []
        for network in (ours, original):
            logits = network(images, arch())
            variables = [*network.parameters(), *arch.parameters()]
            gradient = torch.autograd.grad(F.cross_entropy(logits, labels), variables)
            names = [name for name, _ in network.named_parameters()]
            found.append((logits.detach(), dict(zip(names, gradient, strict=False)), gradient[len(names) :]))
        (a, wa, ga), (b, wb, gb) = found
        errors = [
            relative_error({"": a}, {"": b}),
            relative_error(split_by_edge(ours, wa), wb),
            relative_error(dict(enumerate(ga)), dict(enumerate(gb))),
        ]
        print(f"| {dtype} | {' | '.join(f'{error:.1e}' for error in errors)} |")
        worst = worst or max(errors) > tolerance
    if worst:
        raise SystemExit("The supernets differ.")
    print()


def profile(size: dict[str, int]) -> None:
    """Prints the time of each operator in a full gradient of both supernets."""
    ours, original, arch, (images, labels) = pair(size)
    for name, network in (("original", original), ("this one", ours)):
        with torch.profiler.profile() as found:
            loss = F.cross_entropy(network(images, arch()), labels)
            torch.autograd.grad(loss, [*network.parameters(), *arch.parameters()])
        table = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)[:15]
        print(f"| {name}: operator | ms | calls |\n|---|---|---|")
        for event in table:
            print(f"| {event.key} | {event.self_cpu_time_total / 1e3:.1f} | {event.count} |")
        print()


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="paper")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--repeats", type=int, default=5, help="repetitions, interleaved, after one that is not counted"
    )
    parser.add_argument("--only", default="", help="only steps whose name holds this")
    parser.add_argument("--no-steps", action="store_true", help="only the supernets")
    parser.add_argument("--profile", action="store_true", help="also the time of each operator")
    parser.add_argument("--check", action="store_true", help="only compare values and gradients")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = dict(SIZES[args.size])
    if args.batch_size:
        size["batch_size"] = args.batch_size
    print(f"torch {torch.__version__}, one thread of the CPU, {args.size}: {size}\n")
    check(size if args.check else size | {"batch_size": 2})
    if args.check:
        return
    supernet_table(size, args.repeats)
    if args.profile:
        profile(size)
    if not args.no_steps:
        step_table(size, args.repeats, args.only)


if __name__ == "__main__":
    main()
