"""Counts how often the host launches and waits in rounds of a search, and whether rounds repeat.

Two tables. The first has for each method the launches and the waits of a round, by PyTorch's
profiler: of a GPU kernels, copies and fills, and calls that block the host until the device is
done; of a CPU operators without operators in them, and numbers that are read. The second compares
two searches that are equal in all settings, bit for bit: with `search.deterministic` they must be,
without it they may differ. Rows are printed as they are measured, first order first.

    python benchmarks/gpu_rounds.py --device cuda
    python benchmarks/gpu_rounds.py --size tiny --only "first order"    # on a CPU, in a minute
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measuring import SETTLED
from search_step import SIZES, STEPS, clock, search
from torch import Tensor

from lfmcw_app.errors import InputError
from lfmcw_app.numerics import numerics_of
from lfmcw_app.recipe_loading import load_recipe
from mlo import MultilevelOptimizer

ROUNDS = 2
"""Rounds of each of two searches that are compared; the second round starts with the optimizers'
states.
"""

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Beginnings of the names of CUDA's calls that launch; names of those that wait. The profiler
itself ends with a cudaDeviceSynchronize, which is not counted."""

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
"""Operators of a CPU whose result the host would wait for on a GPU."""


def launches_and_waits(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """The launches and the waits of some work that has been done once before."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    clock(device)
    with torch.profiler.profile(activities=kinds) as profile:
        work()
    names = [(event.name, bool(event.cpu_children)) for event in profile.events()]
    if device.type != "cuda":
        launches = sum(name.startswith("aten::") and not inner for name, inner in names)
        return launches, sum(name in READS for name, _ in names)
    launches = sum(name.startswith(LAUNCHES) for name, _ in names)
    return launches, sum(name in WAITS for name, _ in names)


def launch_table(size: dict[str, int], only: str, device: torch.device) -> None:
    """Prints the launches and the waits of a round of each method."""
    per = ("kernels, copies, fills", "waits") if device.type == "cuda" else ("operators", "reads")
    print(f"| round | {per[0]} | {per[1]} |\n|---|---|---|", flush=True)
    for name, options in STEPS.items():
        if only in name:
            optimizer = search(size, options, device)
            for _ in range(SETTLED):
                optimizer.step()
            found = launches_and_waits(optimizer.step, device)
            print(f"| {name} | {found[0]:,} | {found[1]:,} |", flush=True)
    print(flush=True)


def repeat_table(size: dict[str, int], only: str, device: torch.device) -> bool:
    """Prints whether two equal searches give equal results; returns whether all that must do so."""
    print("| round | deterministic | tensors | that differ | first |\n|---|---|---|---|---|")
    as_asked = True
    for deterministic in (True, False):
        recipe = load_recipe("smoke", overrides={"search.deterministic": deterministic})
        for name, options in STEPS.items():
            if only not in name:
                continue
            try:
                with numerics_of(recipe, "search"):
                    one, other = (after_rounds(search(size, options, device)) for _ in range(2))
            except InputError as error:
                print(f"| {name} | {deterministic} | – | refused | {error} |", flush=True)
                as_asked = False
                continue
            differ = [key for key, value in one.items() if not torch.equal(value, other[key])]
            first = differ[0] if differ else "–"
            print(
                f"| {name} | {deterministic} | {len(one)} | {len(differ)} | {first} |", flush=True
            )
            as_asked = as_asked and not (deterministic and differ)
    print(flush=True)
    return as_asked


def after_rounds(optimizer: MultilevelOptimizer) -> dict[str, Tensor]:
    """Parameters and buffers of all problems after a few rounds, and the losses, on the CPU."""
    found: dict[str, Tensor] = {}
    for _ in range(ROUNDS):
        record = optimizer.step()
        for name, loss in record.losses.items():
            values = loss.values() if isinstance(loss, dict) else [loss]
            found[f"round {record.round}, loss of {name}"] = torch.tensor(list(values))
    for name, problem in optimizer.problems.items():
        for key, tensor in problem.module.state_dict().items():
            found[f"{name}.{key}"] = tensor.detach().cpu()
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="paper")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="only methods whose name contains this")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine (or this build of PyTorch) has no CUDA")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    size = dict(SIZES[args.size])
    if args.batch_size:
        size["batch_size"] = args.batch_size
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one thread of the CPU"
    print(f"torch {torch.__version__}, {where}, {args.size}: {size}\n", flush=True)
    launch_table(size, args.only, device)
    if not repeat_table(size, args.only, device):
        raise SystemExit("Rounds that should repeat bit for bit did not.")


if __name__ == "__main__":
    main()
