"""Whether the pixels of image files are held in memory, or read where they are used."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from lfmcw_app.image_files import ImageFiles

__all__ = ["SHARE", "pixels_of", "total_memory"]

SHARE = 0.25
"""Of the memory that this process may use: as much as the pixels of a data set may take."""


def pixels_of(parts: Sequence[ImageFiles], in_memory: bool | None) -> list[Tensor | ImageFiles]:
    """Returns the pixels of a data set's parts: all of them decoded, or all of them still in files.

    Both give the same batches, except that random windows (`resized_crop`) are cut out of the
    original image where it is in a file, and out of the one brought to its size where it is not.

    Args:
        parts: the image files.
        in_memory: what is wanted; None decodes them if that takes no more than `SHARE` of the
            memory that there is. The answer is the same on each run on a machine: it depends on
            the memory that is there, not on what is free.

    Raises:
        InputError: naming a file that cannot be read.
    """
    if in_memory is None:
        in_memory = sum(math.prod(part.shape) for part in parts) <= SHARE * total_memory()
    if not in_memory:
        return list(parts)
    return [part[part.rows] for part in parts]


def total_memory() -> float:
    """Bytes of memory that this process may use: a share of the machine's, or what limits it.

    Limits are those of `ulimit -v` and of control groups, as containers and job schedulers set
    them. Processes that `torchrun` starts on one machine have equal shares.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [machine, *_group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    shared = min(limits) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return shared if own == resource.RLIM_INFINITY else min(shared, own)


def _group_limits(groups: Path, root: Path) -> Iterator[int]:
    """The limits of this process's control groups, and of those that they are part of.

    A line of `groups` is "0::/path" (version 2) or "4:memory:/path" (version 1).
    """
    if not groups.is_file():  # not Linux
        return
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = folder / path.lstrip("/")
        for parent in (group, *group.parents):
            file = parent / name
            if file.is_file() and (limit := file.read_text().strip()) != "max":
                yield int(limit)
            if parent == folder:
                break
