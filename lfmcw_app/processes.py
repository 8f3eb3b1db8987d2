"""The processes of `torchrun`: how a run joins them, and what each one does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from lfmcw_app.errors import InputError, shown
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.stages import WARMUP, phases_of
from mlo import DataParallel, NonFiniteError
from mlo.distributed import rank_and_size

__all__ = [
    "BACKENDS",
    "FollowerFolder",
    "all_gathered",
    "check_batches",
    "check_launch",
    "from_main",
    "is_main",
    "joined",
    "main_first",
    "parallelism",
    "quiet_unless_main",
    "shared_folder",
    "wait_for_all",
]  # fmt: skip

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others before it counts them as lost."""

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Kind of device → the backends of its processes. NCCL does not carry CPU tensors, such as the
numbers of a solver or what `all_gathered` sends. Gloo does, and no GPU waits for them.
"""

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says when another process is gone."""

WAITED = ("Timed out waiting", "collective operation timeout")
"""What gloo and NCCL say when another process does not arrive."""


def check_launch() -> None:
    """Checks the variables that `torchrun` sets, which others may have set too.

    Raises:
        InputError: naming one that is no number, or is missing.
    """
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not value.isdecimal() or len(value) > 6:
            raise InputError(
                f"The environment has {name}={shown(value)}, which is no number of processes. "
                "Start several processes by torchrun, or unset it."
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise InputError(
                    f"The environment has WORLD_SIZE={os.environ['WORLD_SIZE']}, but no {name}. "
                    "Start several processes by torchrun, or unset it."
                )


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes of `torchrun`, if it started any; yields this process's device.

    At the end of the body this process leaves them.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield device
        return

    if device.type == "cuda":  # one GPU per process of a machine
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"torchrun starts process {local + 1} of this machine, which has "
                f"{torch.cuda.device_count()} GPUs. Lower --nproc-per-node, or pass --device cpu."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)

    dist.init_process_group(BACKENDS[device.type], timeout=PATIENCE)
    try:
        yield device
    except RuntimeError as error:
        told = _what_happened(str(error), dist.get_rank())
        if told is None:
            raise
        raise InputError(f"{told} Resume from the last checkpoint with --resume.") from error
    finally:
        dist.destroy_process_group()


def _what_happened(error: str, rank: int) -> str | None:
    """What a connection error between processes means; None for another error."""
    # The process that failed first says why. The others only lose the connection to it.
    if any(text in error for text in LOST):
        return (
            f"Process {rank} lost the connection to another process, which has ended. The message "
            "of that process says why."
        )
    if any(text in error for text in WAITED):
        minutes = PATIENCE.total_seconds() / 60
        return (
            f"Process {rank} has waited {minutes:.0f} minutes for another process, which hangs or "
            "was stopped. End all processes, and look at its machine."
        )
    return None


def is_main() -> bool:
    """Whether this process writes and prints: it is the first one, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def quiet_unless_main(console: Console) -> Console:
    """The console, or one that shows nothing."""
    return console if is_main() else Console(quiet=True)


@contextmanager
def main_first() -> Iterator[None]:
    """Runs the body in the first process before the others, for files only one may download."""
    if dist.is_initialized() and not is_main():
        dist.barrier()
    yield
    if dist.is_initialized() and is_main():
        dist.barrier()


def from_main(value: Any) -> Any:
    """The first process's value, in all of them."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def wait_for_all() -> None:
    """Waits until all processes are here, so that all have read a file before it is written."""
    if dist.is_initialized():
        dist.barrier()


def all_gathered(value: Any) -> list[Any]:
    """The values of all processes."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def parallelism(recipe: Recipe, *, own_noise: bool) -> DataParallel | None:
    """How the processes share a phase; None for a single process.

    Args:
        recipe: says what is averaged and when.
        own_noise: whether the phase has dropout, whose masks must differ between the processes.
            Without it all processes draw the noise of the whole batch and take their rows, so that
            it does not depend on their number.
    """
    if rank_and_size()[1] == 1:
        return None
    return DataParallel(sync=recipe.distributed.sync, noise="own" if own_noise else "shared")


def check_batches(recipe: Recipe, *, searches: bool = True) -> None:
    """Checks that batches can be divided equally among the processes.

    Raises:
        InputError: naming the key.
    """
    # Before the processes join, so the number comes from torchrun.
    size = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = {
        "search.batch_size": (recipe.search.batch_size, searches),
        "evaluation.batch_size": (recipe.evaluation.batch_size, recipe.trains),
    }
    of_warmup = recipe.search.generator.warmup_batch_size
    if of_warmup is not None:
        warms_up = searches and WARMUP in phases_of(recipe)
        sizes["search.generator.warmup_batch_size"] = (of_warmup, warms_up)
    for key, (batch, used) in sizes.items():
        if used and batch % size:
            raise InputError(
                f"{key} is {batch}, the size of the whole batch. {size} processes cannot share it "
                f"equally. Set it to a multiple of {size}."
            )


def shared_folder(opened: RunFolder | None, place: Callable[[], Path], recipe: Recipe) -> RunFolder:
    """The run folder of all processes: the first one makes it, unless it is `opened` already.

    The others only read it.

    Args:
        opened: the folder of a run that is resumed.
        place: where a new one is made. By default the path contains the time, so only the first
            process decides on it.
        recipe: of the run.
    """
    if not dist.is_initialized():
        return opened or RunFolder.create(place(), recipe)
    folder = opened or RunFolder.create(place(), recipe) if is_main() else None
    known = None if folder is None else (folder.path, folder.written_recipe, folder.changes)
    path, written, changes = from_main(known)
    if folder is None:
        folder = FollowerFolder(path, recipe)
        folder.written_recipe, folder.changes = written, changes
    return folder


class FollowerFolder(RunFolder):
    """The run folder for processes that do not write: checkpoints are read, nothing is written."""

    writes = False

    def write(self, name: str, text: str) -> None:
        """Writes nothing."""

    def record_changes(self, phase: str, round_number: int) -> None:
        """Writes nothing."""
        self.changes = ()

    def log(self, entry: dict[str, Any]) -> None:
        """Writes nothing."""

    def save(self, *args: Any, **options: Any) -> bool:
        """Writes nothing: the first process's state is that of all."""
        return True

    def save_diagnosis(self, error: NonFiniteError) -> str:
        """Writes nothing; says where to look."""
        return "The first process's message says more."

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds nothing: the first process does."""
        yield
