"""The class-weighted loss: composition, `torch.compile`, and fused function, against a copy.

Prints Markdown tables with the time (median and range of interleaved repetitions), the ratio to the
composition, the fraction of a device copy's bandwidth, the peak memory and the kernel launches, of
the forward pass, the backward pass, the double backward and all three.

    python benchmarks/fused_loss.py # on the GPU if there is one, otherwise on one CPU thread python
    benchmarks/fused_loss.py --quick # small shapes, under a minute
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measuring import Ratio, write_measurements
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.ops import class_weighted_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = ((64, 10), (64, 100), (1024, 100), (1024, 1000), (8192, 1000), (65536, 1000))
PHASES = ("forward", "backward", "double backward", "end to end")
TRAFFIC = {"forward": 1, "backward": 2, "double backward": 3, "end to end": 6}
"""What a perfect kernel moves, in units of [B, C] (docs/benchmarks.md).

Forward it reads x; backward it reads x and writes dx; then it reads x and v, and writes dx.
"""


def composition(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The loss as one writes it in PyTorch."""
    return (F.cross_entropy(x, y, reduction="none") * w[y]).mean()


def fused(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The library's."""
    return class_weighted_cross_entropy(x, y, w)


class Case:
    """One shape, dtype and device, with a function to time for each phase."""

    def __init__(
        self, loss: Loss, rows: int, columns: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(rows, columns, device=device, generator=generator)
        self.x = x.to(dtype).requires_grad_()
        self.w = torch.rand(columns, device=device, generator=generator).requires_grad_()
        self.y = torch.randint(columns, (rows,), device=device, generator=generator)
        self.v = torch.randn(rows, columns, device=device, generator=generator).to(dtype)
        self.u = torch.rand(columns, device=device, generator=generator)
        self.loss = loss

    def forward(self) -> Tensor:
        """The loss."""
        return self.loss(self.x, self.y, self.w)

    def gradients(self) -> tuple[Tensor, ...]:
        """Its gradients, differentiable."""
        return torch.autograd.grad(self.forward(), (self.x, self.w), create_graph=True)

    def phase(self, name: str) -> Callable[[], object]:
        """What to time."""
        if name == "forward":
            return self.forward
        if name == "backward":
            value = self.forward()
            return lambda: torch.autograd.grad(value, (self.x, self.w), retain_graph=True)
        if name == "double backward":
            found = self.gradients()
            return lambda: torch.autograd.grad(
                found, (self.x, self.w), (self.v, self.u), retain_graph=True
            )
        return lambda: torch.autograd.grad(self.gradients(), (self.x, self.w), (self.v, self.u))


class Compiled(Case):
    """The product with the Hessian as one compiled function.

    A compiled loss has no double backward of its own.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(composition, rows, columns, dtype, device)

        def product(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            gradient = torch.func.grad(lambda x, w: composition(x, self.y, w), argnums=(0, 1))
            return torch.func.vjp(gradient, x, w)[1]((self.v, self.u))

        self._product = torch.compile(product)

    def phase(self, name: str) -> Callable[[], object]:
        """Only end to end."""
        if name != "end to end":
            raise NotImplementedError
        return lambda: self._product(self.x.detach(), self.w.detach())


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one call, the mean of `repeats`: of a GPU, or of processor time."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - began) / repeats


def peak(work: Callable[[], object], device: torch.device) -> str:
    """Peak memory of one call beyond what was there, in MB; CUDA only."""
    if device.type != "cuda":
        return "–"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f}"


def launches(work: Callable[[], object], device: torch.device) -> str:
    """Kernel launches of one call; CUDA only."""
    if device.type != "cuda":
        return "–"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return str(sum(event.device_type == on_device for event in profile.events()))


def measure(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    repeats: int,
    compiled: bool,
) -> Iterator[dict[str, str]]:
    """Prints the rows of one shape, and yields what the file keeps of them."""
    cases: dict[str, Case] = {
        "composition": Case(composition, rows, columns, dtype, device),
        "fused": Case(fused, rows, columns, dtype, device),
    }
    if compiled:
        cases["torch.compile"] = Compiled(rows, columns, dtype, device)
    source, target = cases["fused"].x.detach(), torch.empty_like(cases["fused"].x)
    for phase in PHASES:
        work = {
            name: case.phase(phase)
            for name, case in cases.items()
            if phase == "end to end" or name != "torch.compile"
        }

        for function in work.values():  # compiles, and fills caches
            for _ in range(3):
                function()
        once = max(seconds(work["composition"], 1, device), 1e-6)
        inner = max(1, min(200, int(0.05 / once)))
        times: dict[str, list[float]] = {name: [] for name in (*work, "copy")}
        for _ in range(repeats):
            for name, function in work.items():
                times[name].append(seconds(function, inner, device))
            times["copy"].append(seconds(lambda: target.copy_(source), inner, device))
        # A copy reads and writes the array once; the phase must move TRAFFIC arrays.
        ideal = statistics.median(times["copy"]) / 2 * TRAFFIC[phase]
        base = statistics.median(times["composition"])
        for name, function in work.items():
            mid = statistics.median(times[name])
            print(
                f"| {rows} × {columns} | {phase} | {name} | {mid * 1e6:.0f} | "
                f"{min(times[name]) * 1e6:.0f}–{max(times[name]) * 1e6:.0f} | {base / mid:.2f} | "
                f"{ideal / mid:.2f} | {peak(function, device)} | {launches(function, device)} |",
                flush=True,
            )
        yield {
            "size": f"{rows} × {columns}",
            "phase": phase,
            "composition_us": f"{1e6 * base:.4g}",
            "fused_us": f"{1e6 * statistics.median(times['fused']):.4g}",
            **Ratio.of(times["fused"], times["composition"]).cells(),
        }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64")
    )
    parser.add_argument("--repeats", type=int, default=9, help="repetitions, interleaved")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also torch.compile the whole product (needs a C++ compiler)",
    )
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--csv", type=Path, help="also writes the measurements into this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "one thread of the CPU"
    print(f"torch {torch.__version__}, {name}, {args.dtype}\n")
    print("| B × C | phase | formulation | µs | range | speed-up | of copy | MB | launches |")
    print("|---|---|---|---|---|---|---|---|---|")
    shapes = SHAPES if device.type == "cuda" else SHAPES[:5]
    found: list[dict[str, str]] = []
    for rows, columns in SHAPES[:3] if args.quick else shapes:
        found += measure(
            rows,
            columns,
            getattr(torch, args.dtype),
            device,
            repeats=args.repeats,
            compiled=args.compile or device.type == "cuda",
        )
    if args.csv:
        write_measurements(args.csv, found, part=("size", "phase"))


if __name__ == "__main__":
    main()
