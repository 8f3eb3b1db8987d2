"""The supernet and complete search steps, beside the original operations, in one process.

The original operations are one module per operation of an edge. There are three tables: a forward
pass, a full gradient and α's gradient of both supernets; complete steps of every method through
`build_search` with this project's supernet, and of DARTS with the original operations; the passes
of a step. Rows are printed as they are measured. Each time is the median processor time of turns on
the same batch; ratios are to the original operations, with quartiles over the turns. Memory is the
most that one pass or step takes beyond what was held before it: by a GPU's allocator, or by a
process in which nothing else runs.

    # C=16, 8 cells, 32×32, batch 8: about 15 minutes
    python benchmarks/search_step.py
    # the project's small presets: C=4, 3 cells, 2 nodes, 16×16, batch 32
    python benchmarks/search_step.py --size small
    # also the time of each operator in a full gradient of both
    python benchmarks/search_step.py --profile
    # only compares values and gradients, at the full batch size
    python benchmarks/search_step.py --check
    # only counts what the parts of each step launch (launches.py), on images of 8×8: a minute
    python benchmarks/search_step.py --count
    # on a GPU, in float32 without TF32 unless --tf32 is given
    python benchmarks/search_step.py --device cuda
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from launches import launches_of_step, print_launches
from measuring import SETTLED, Ratio, turns, write_measurements
from reference_supernet import ReferenceSupernet, split_by_edge
from resident_memory import peak, reset_peak, return_free_memory
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.build_modules import SearchModules, build_modules
from lfmcw_app.data import Dataset, Images, search_split
from lfmcw_app.problems import build_search
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.candidates import as_candidates
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import Architecture, Supernet
from mlo import MultilevelOptimizer
from mlo.testing import relative_error

NUMBERS = ("channels", "layers", "nodes", "image_size", "image_channels", "batch_size")
SIZES: dict[str, dict[str, int]] = {
    "paper": dict(zip(NUMBERS, (16, 8, 4, 32, 3, 8), strict=True)),
    "small": dict(zip(NUMBERS, (4, 3, 2, 16, 1, 32), strict=True)),
    "tiny": dict(zip(NUMBERS, (4, 3, 1, 8, 1, 4), strict=True)),
}
RECOMPUTED = {"name": "one_step", "keep_graph": False}
STEPS: dict[str, dict[str, Any]] = {
    "DARTS, first order": {"method": "darts", "order": "first"},
    "LFM-CW, first order": {"order": "first"},
    "PC-DARTS, first order": {"method": "darts", "order": "first", "space": "pcdarts"},
    "P-DARTS, third stage": {"method": "darts", "order": "first", "space": "pdarts"},
    "DARTS, second order (one_step)": {"method": "darts"},
    "DARTS, second order (one_step, recomputed)": {"method": "darts", "hypergradient": RECOMPUTED},
    "DARTS, second order (darts)": {"method": "darts", "hypergradient": "darts"},
    "LFM-CW, second order (one_step)": {},
    "LFM-CW, second order (one_step, recomputed)": {"hypergradient": RECOMPUTED},
    "LFM-CW, second order (darts)": {"hypergradient": "darts"},
}
"""First order first: what takes longest may not be measured where time is short."""
ORIGINAL = "DARTS, first order, original operations"
CPU = torch.device("cpu")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest relative difference of the two supernets on a CPU."""


# ------------------------------ what is measured


def build(
    size: dict[str, int], original: bool, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """A supernet of a size, or the reference."""
    cls: Any = ReferenceSupernet if original else Supernet
    arguments = {key: size[key] for key in ("channels", "layers", "nodes")}
    network: nn.Module = cls(
        in_channels=size["image_channels"], num_classes=10, **arguments, **options
    ).to(dtype)
    return network


def batch_of(
    size: dict[str, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Images of noise and labels, the same on every device."""
    batch, pixels = size["batch_size"], size["image_size"]
    images = torch.randn(batch, size["image_channels"], pixels, pixels)
    return images.to(device, dtype), torch.randint(10, (batch,)).to(device)


def pair(
    size: dict[str, int],
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Supernet, nn.Module, Architecture, tuple[Tensor, Tensor]]:
    """Both supernets with the same weights, an architecture and a batch."""
    torch.manual_seed(0)
    ours, original = build(size, False, dtype, **options), build(size, True, dtype, **options)
    assert isinstance(ours, Supernet)
    # The original keeps running statistics; this project's supernet does not.
    split = split_by_edge(ours, dict(ours.named_parameters()))
    original.load_state_dict({**original.state_dict(), **split})
    batch = batch_of(size, device, dtype)
    arch = Architecture(size["nodes"], scale=0.1).to(device, dtype)
    return ours.to(device), original.to(device), arch, batch


def search(
    size: dict[str, int],
    options: dict[str, Any],
    device: torch.device = CPU,
    *,
    original: bool = False,
) -> MultilevelOptimizer:
    """The search of a recipe on random images, as `lfmcw_app.run` builds it."""
    recipe, dataset = _recipe(size, options), _random_images(size)
    candidates, layers = as_candidates(DARTS_PRIMITIVES, size["nodes"]), size["layers"]
    if recipe.search.space == "pdarts":
        # Its third stage has three operations per edge; the convolutions cost most.
        candidates = as_candidates(DARTS_PRIMITIVES[3:6], size["nodes"])
        layers += 9 if layers == 8 else 2

    torch.manual_seed(0)
    train, validation = search_split(dataset, None, 0, (0.5, 0.5))
    modules = build_modules(
        recipe.search, dataset, candidates=candidates, layers=layers, device=device
    )
    if original:
        modules = SearchModules(w1=None, gan=None, w2=modules.w2, arch=modules.arch)
        modules.w2.network = build(size, True).to(device)  # type: ignore[assignment]
    return build_search(recipe, dataset, train, validation, modules, device=device)


def _recipe(size: dict[str, int], options: dict[str, Any]) -> Recipe:
    """The recipe of a search in which the architecture moves from the first round on."""
    options = {
        **{key: size[key] for key in ("channels", "layers", "nodes", "batch_size")},
        "steps": 100,
        "partial_channels": 4,
        "generator.channels": 16,
        "architecture.warmup_epochs": 0,
        **options,
    }
    space = options.pop("space", "darts")
    overrides = {f"search.{key}": value for key, value in options.items()}
    return load_recipe("smoke", space=space, overrides=overrides | {"search.space": space})


def _random_images(size: dict[str, int]) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    channels, pixels, count = size["image_channels"], size["image_size"], 4 * size["batch_size"]
    images = torch.randint(
        256, (count, channels, pixels, pixels), generator=generator, dtype=torch.uint8
    )
    labelled = Images(pixels=images, labels=torch.arange(count) % 10)
    return Dataset(
        name="random",
        train=labelled,
        test=labelled,
        class_names=tuple(map(str, range(10))),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def passes(optimizer: MultilevelOptimizer) -> tuple[int, int]:
    """Forward and backward passes through supernets in one step, counted by hooks.

    Discriminators have a supernet too.
    """
    counts = [0, 0]

    def count_backward(*_: object) -> None:
        counts[1] += 1

    def count_forward(module: nn.Module, args: object, output: Tensor) -> None:
        counts[0] += 1
        if output.requires_grad:
            output.register_hook(count_backward)

    modules = (
        module for problem in optimizer.problems.values() for module in problem.module.modules()
    )
    supernets = [module for module in modules if isinstance(module, (Supernet, ReferenceSupernet))]
    # A discriminator calls its trunk's features only: every pass goes through the last cell.
    handles = [supernet.cells[-1].register_forward_hook(count_forward) for supernet in supernets]
    optimizer.step()
    for handle in handles:
        handle.remove()
    return counts[0], counts[1]


# ------------------------------ passes and their memory

Work = Callable[[nn.Module, Architecture, tuple[Tensor, Tensor]], object]


def _loss(network: nn.Module, arch: Architecture, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0], arch()), batch[1])


def _forward(network: nn.Module, arch: Architecture, batch: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        _loss(network, arch, batch)


def _full(network: nn.Module, arch: Architecture, batch: tuple[Tensor, Tensor]) -> None:
    torch.autograd.grad(_loss(network, arch, batch), [*network.parameters(), *arch.parameters()])


def _architecture(network: nn.Module, arch: Architecture, batch: tuple[Tensor, Tensor]) -> None:
    network.requires_grad_(False)
    torch.autograd.grad(_loss(network, arch, batch), list(arch.parameters()))
    network.requires_grad_(True)


PASSES: dict[str, Work] = {
    "forward": _forward,
    "full gradient": _full,
    "α's gradient": _architecture,
}


def pass_memory(size: dict[str, int], name: str, original: bool, device: torch.device) -> float:
    """The memory of a pass through one supernet, in MB."""

    def ready(of: dict[str, int]) -> Callable[[], object]:
        network = build(of, original).to(device)
        arch = Architecture(of["nodes"], scale=0.1).to(device)
        return partial(PASSES[name], network, arch, batch_of(of, device))

    ready(SIZES["tiny"])()  # loads what PyTorch loads at first use
    return _memory(ready(size), device)


def step_memory(size: dict[str, int], name: str, device: torch.device) -> float:
    """The memory of a search's first step in MB, with what optimizers and engines keep."""
    original = name == ORIGINAL
    options = STEPS["DARTS, first order" if original else name]

    # A small search first: it loads what PyTorch loads at first use.
    search(SIZES["tiny"], options, device, original=original).step()
    return _memory(search(size, options, device, original=original).step, device)


def _memory(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    torch.set_num_threads(1)
    return_free_memory()
    before = reset_peak()
    work()
    return (peak() - before) / 1e6


def measured_apart(function: Callable[..., float], *arguments: Any, device: torch.device) -> float:
    """What a function of `arguments` and the device returns; on a CPU, in a new process.

    There nothing else takes memory.
    """
    if device.type == "cuda":
        return function(*arguments, device)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, device).result()


# ------------------------------ tables


def clock(device: torch.device) -> float:
    """Seconds of processor time, or of a GPU on the wall when it has done what it was given."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    work: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every repetition, in turns, after one turn that is not counted."""
    return turns(work, repeats, partial(clock, device), uncounted=1)


def row(name: str, times: list[float], base: list[float], *more: object) -> str:
    """A row of a table: name, median, ratio to `base` with quartiles."""
    cells = [name, f"{1e3 * statistics.median(times):.1f}", str(Ratio.of(times, base)), *more]
    return f"| {' | '.join(map(str, cells))} |"


def measurement(times: list[float], base: list[float]) -> dict[str, str]:
    """The columns of times in the file of measurements."""
    return {
        "ms": f"{1e3 * statistics.median(times):.4g}",
        "original_ms": f"{1e3 * statistics.median(base):.4g}",
        **Ratio.of(times, base).cells(),
    }


def supernet_table(
    size: dict[str, int], repeats: int, device: torch.device
) -> Iterator[dict[str, str]]:
    """Prints passes through both supernets, and yields what the file keeps of them."""
    ours, original, arch, batch = pair(size, device)
    networks = {"original": original, "this one": ours}
    print("| pass | supernet | ms | ÷ original (quartiles) | MB |")
    print("|---|---|---|---|---|")
    for name, work in PASSES.items():
        sides: dict[str, Callable[[], object]] = {
            which: partial(work, network, arch, batch) for which, network in networks.items()
        }
        found = interleaved(sides, repeats, device)
        memory = {}
        for which, times in found.items():
            memory[which] = measured_apart(
                pass_memory, size, name, which == "original", device=device
            )
            line = row(f"{name} | {which}", times, found["original"], f"{memory[which]:.0f}")
            print(line, flush=True)
        yield {
            "what": name,
            **measurement(found["this one"], found["original"]),
            "forward": "",
            "backward": "",
            "memory_mb": f"{memory['this one']:.0f}",
            "original_memory_mb": f"{memory['original']:.0f}",
        }
    print()


def step_table(
    size: dict[str, int], repeats: int, only: str, device: torch.device
) -> Iterator[dict[str, str]]:
    """Prints complete steps, and yields what the file keeps of them.

    Each is measured by itself, in turns with the original operations, and printed at once.
    """
    head = ("step", "ms", "÷ original (quartiles)", "forward", "backward", "MB")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    original = search(size, STEPS["DARTS, first order"], device, original=True)
    memory: dict[str, float] = {}
    for name in [ORIGINAL, *(name for name in STEPS if only in name)]:
        memory[name] = measured_apart(step_memory, size, name, device=device)
        optimizer = original if name == ORIGINAL else search(size, STEPS[name], device)
        for _ in range(SETTLED):
            optimizer.step()
        counted = passes(optimizer)
        times = interleaved({ORIGINAL: original.step, name: optimizer.step}, repeats, device)
        found, base = times[name], times[ORIGINAL]
        print(row(name, found, base, *counted, f"{memory[name]:.0f}"), flush=True)
        if name != ORIGINAL:
            yield {
                "what": name,
                **measurement(found, base),
                "forward": str(counted[0]),
                "backward": str(counted[1]),
                "memory_mb": f"{memory[name]:.0f}",
                "original_memory_mb": f"{memory[ORIGINAL]:.0f}",
            }
    print()


def check(size: dict[str, int], device: torch.device) -> None:
    """Prints the largest relative differences of values and gradients.

    Raises:
        SystemExit: if one is above `TOLERANCES`, on a GPU ten times as large, whose convolutions
            round by the algorithm that cuDNN picks. (In float32 of smooth supernets: at a kink of
            ReLU or a tie of max pooling a rounding chooses another branch in either formulation.)
    """
    smooth = {
        "style": OperationStyle(activation="silu"),
        "primitives": tuple(p for p in DARTS_PRIMITIVES if p != "max_pool_3x3"),
    }
    print("| type | values | gradient in W | gradient in α |\n|---|---|---|---|")
    worst = False
    for dtype, options in ((torch.float64, {}), (torch.float32, smooth)):
        ours, original, arch, (images, labels) = pair(size, device, dtype, **options)
        if options:
            arch = Architecture(size["nodes"], options["primitives"], scale=0.1).to(device, dtype)
        found = []
        for network in (ours, original):
            logits = network(images, arch())
            variables = [*network.parameters(), *arch.parameters()]
            gradient = torch.autograd.grad(F.cross_entropy(logits, labels), variables)
            names = [name for name, _ in network.named_parameters()]
            of_weights = dict(zip(names, gradient, strict=False))
            found.append((logits.detach(), of_weights, gradient[len(names) :]))
        (a, wa, ga), (b, wb, gb) = found
        errors = [
            relative_error({"": a}, {"": b}),
            relative_error(split_by_edge(ours, wa), wb),
            relative_error(dict(enumerate(ga)), dict(enumerate(gb))),
        ]
        print(f"| {dtype} | {' | '.join(f'{error:.1e}' for error in errors)} |")
        worst = worst or max(errors) > TOLERANCES[dtype] * (10 if device.type == "cuda" else 1)
    if worst:
        raise SystemExit("The supernets differ.")
    print()


def profile(size: dict[str, int], device: torch.device) -> None:
    """Prints the time of each operator in a full gradient of both supernets.

    One full gradient before it is not counted.
    """
    ours, original, arch, batch = pair(size, device)
    for name, network in (("original", original), ("this one", ours)):
        _full(network, arch, batch)
        with torch.profiler.profile() as found:
            _full(network, arch, batch)
            clock(device)
        of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = sorted(found.key_averages(), key=lambda event: -getattr(event, of))[:15]
        print(f"| {name}: operator | ms | calls |\n|---|---|---|")
        for event in table:
            print(f"| {event.key} | {getattr(event, of) / 1e3:.1f} | {event.count} |")
        print()


def count(size: dict[str, int], only: str, device: torch.device) -> None:
    """Prints what each step launches. The counts do not depend on the images."""
    size = size | {"batch_size": 2, "image_size": 8}
    for name, options in STEPS.items():
        if only in name:
            optimizer = search(size, options, device)
            for _ in range(SETTLED):
                optimizer.step()
            print_launches(name, launches_of_step(optimizer))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="paper")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="on a GPU, TF32 in the convolutions and products of the timings",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="repetitions, interleaved, after one that is not counted",
    )
    parser.add_argument("--only", default="", help="only steps whose name holds this")
    parser.add_argument("--no-steps", action="store_true", help="only the supernets")
    parser.add_argument("--profile", action="store_true", help="also the time of each operator")
    parser.add_argument("--csv", type=Path, help="also writes the measurements into this file")
    parser.add_argument("--check", action="store_true", help="only compare values and gradients")
    parser.add_argument("--count", action="store_true", help="only count launches, by part")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine (or this build of PyTorch) has no CUDA")
    if args.tf32 and args.device == "cpu":
        parser.error("--tf32 needs --device cuda")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    size = dict(SIZES[args.size])
    if args.batch_size:
        size["batch_size"] = args.batch_size
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one thread of the CPU"
    numbers = "float32 with TF32" if args.tf32 else "float32"
    print(f"torch {torch.__version__}, {where}, {numbers}, {args.size}: {size}\n")

    if args.count:
        count(size, args.only, device)
        return

    # By default PyTorch's convolutions take TF32 and its matrix products do not. One side's 1×1
    # convolutions are products, so both are set alike.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    check(size if args.check else size | {"batch_size": 2}, device)
    if args.check:
        return
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    found = list(supernet_table(size, args.repeats, device))
    if args.profile:
        profile(size, device)
    if not args.no_steps:
        found += step_table(size, args.repeats, args.only, device)
    if args.csv:
        size_said = {"size": args.size, "batch": size["batch_size"]}
        measured = [{**size_said, **entry} for entry in found]
        write_measurements(args.csv, measured, part=("size", "batch", "what"))


if __name__ == "__main__":
    main()
