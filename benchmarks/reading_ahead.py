"""Measures images per second of a stream of JPEG files, with and without reading ahead of the step.

The files are synthetic. Random windows of 224×224 are cut out of them, 64 per batch. The step is
work of torch on one thread of this CPU, or a wait for a device. The device's work on the pixels is
left out: batches go to PyTorch's meta device, which computes nothing. With --device cpu this CPU
normalises and mirrors them when the batch is requested.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import write_measurements
from PIL import Image
from torch.nn import functional as F

from lfmcw_app import data
from lfmcw_app.recipe import Augmentation

HOW = Augmentation(flip=True, resized_crop=True)

COUNT = 640
SIZES = ((256, 256), (500, 375))
"""Width and height; of ImageNet's originals the second one is usual."""

COLUMNS = ("images", "step", "ahead", "ms per batch", "of these waiting", "images/s")
"""Of the table and of the file; the range of the repetitions is in brackets."""


def write_images(folder: Path, width: int, height: int) -> float:
    """Writes `COUNT` pictures of smooth colours with some noise; returns their mean size in kB."""
    generator = torch.Generator().manual_seed(0)
    for index in range(COUNT):
        coarse = torch.rand(1, 3, 32, 32, generator=generator)
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")[0]
        noisy = smooth + 0.04 * torch.randn(3, height, width, generator=generator)
        pixels = (255 * noisy.clamp(0, 1)).byte().movedim(0, -1).contiguous().numpy()
        path = folder / f"class{index % 2}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=85)
    return statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg")) / 1000


def work(milliseconds: float) -> Callable[[], None]:
    """A step of about this many milliseconds on one thread of torch."""
    matrix = torch.randn(512, 512)

    def multiply(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            matrix @ matrix
        return 1000 * (time.perf_counter() - began)

    multiply(20)
    times = round(milliseconds * 100 / min(multiply(100) for _ in range(5)))
    return lambda: multiply(times) and None


def measured(
    dataset: data.Dataset, step: Callable[[], None], depth: int, batches: int, device: str
) -> tuple[float, float]:
    """Milliseconds of a batch with its step, and those of them spent waiting for the batch."""
    data.DEPTH = depth
    stream = data.Batches(
        dataset.train, dataset, batch_size=64, seed=0, augmentation=HOW, device=device
    )
    stream.batch(0)
    step()  # and reading ahead meanwhile is that of a run that continues
    waited, began = 0.0, time.perf_counter()
    for index in range(1, batches + 1):
        asked = time.perf_counter()
        stream.batch(index)
        waited += time.perf_counter() - asked
        step()
    return (1000 * (time.perf_counter() - began) / batches, 1000 * waited / batches)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="meta")
    parser.add_argument("--csv", type=Path, help="also writes the table into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps: dict[str, Callable[[], None]] = {
        "none": lambda: None,
        "100 ms of torch": work(100),
        "100 ms of waiting": lambda: time.sleep(0.1),
        "200 ms of waiting": lambda: time.sleep(0.2),
    }
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    rows: list[dict[str, str]] = []
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as made:
            kilobytes = write_images(Path(made), width, height)
            dataset = data.load_dataset(f"folder:{made}", image_size=224, in_memory=False)
            for name, step in steps.items():
                found: dict[int, list[tuple[float, float]]] = {0: [], 1: [], 2: [], 4: []}
                for _ in range(options.repeats):  # in turns, so that other work meets all alike
                    for depth, times in found.items():
                        times.append(
                            measured(dataset, step, depth, options.batches, options.device)
                        )
                for depth, times in found.items():
                    images = f"{width}×{height}, {kilobytes:.0f} kB"
                    cells = (images, name, str(depth), *_cells(times))
                    print(f"| {' | '.join(cells)} |", flush=True)
                    rows.append(dict(zip(COLUMNS, cells, strict=True)))
    if options.csv:
        write_measurements(options.csv, rows, part=("images", "step", "ahead"))


def _cells(times: list[tuple[float, float]]) -> tuple[str, str, str]:
    """Time of a batch with its range, the part of it spent waiting, and images per second."""
    totals = [total for total, _ in times]
    middle, waited = statistics.median(totals), statistics.median(wait for _, wait in times)
    span = f"{min(totals):.0f}–{max(totals):.0f}"
    return f"{middle:.0f} ({span})", f"{waited:.0f}", f"{64000 / middle:.0f}"


if __name__ == "__main__":
    main()
