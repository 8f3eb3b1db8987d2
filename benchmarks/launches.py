"""Counts the kernels that one step of a search launches and its waits for the device, by part.

An operator that computes counts as one launch, a view or an allocation as none. A foreach or fused
operator counts once for each group of tensors that one of its kernels takes. Counts do not depend
on the size of images or batches. On a CPU its own branches are counted; operators that would make
the host wait for a GPU are then counted as waits.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlo import MultilevelOptimizer

__all__ = ["Launches", "launches_of_step", "print_launches"]

NO_KERNEL = frozenset(
    [
        "_record_function_enter_new",
        "_record_function_exit",
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "lift_fresh",
        "narrow",
        "new_empty",
        "new_empty_strided",
        "permute",
        "promote_types",
        "record_stream",
        "reshape",
        "resize_",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
        "view_as_complex",
        "view_as_real",
    ]
)
"""Operators that launch nothing: views, and memory that is not filled."""

WAITING = frozenset(
    [
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    ]
)
"""Operators whose result, or its size, the host needs."""

TENSORS_PER_KERNEL = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Lists of a foreach or fused operator → tensors that one kernel takes (`MultiTensorApply.cuh`)."""

PARTS = (
    ("torch/optim/", "optimizers"),
    ("mlo/optimizer_step.py", "optimizers"),
    ("mlo/optimizer_traits.py", "optimizers"),
    ("mlo/averages.py", "averages"),
    ("mlo/sharding.py", "norms, finiteness"),
    ("mlo/nonfinite.py", "norms, finiteness"),
    ("mlo/gradient_norm.py", "norms, finiteness"),
    ("mlo/history.py", "copies"),
    ("mlo/levels.py", "copies"),
    ("mlo/response.py", "copies"),
    ("mlo/solution.py", "copies"),
    ("mlo/hypergradient/", "engines"),
    ("mlo/loss.py", "sums of gradients"),
    ("mlo/loss_results.py", "sums of gradients"),
    ("mlo/gradient_sums.py", "sums of gradients"),
    ("mlo/once.py", "sums of gradients"),
    ("mlo/tensors.py", "sums of gradients"),
    ("mlo/backward.py", "sums of gradients"),
    ("mlo/total_gradient.py", "sums of gradients"),
    ("lfmcw_app/search_space/", "supernets"),
    ("lfmcw_app/generators/discriminator.py", "discriminator"),
    ("lfmcw_app/generators/", "generator, game"),
    ("lfmcw_app/ops/", "class weights"),
    ("lfmcw_app/build_modules.py", "class weights"),
    ("lfmcw_app/problems.py", "losses, metrics"),
    ("lfmcw_app/budget.py", "losses, metrics"),
    ("lfmcw_app/augmentation.py", "batches"),
    ("lfmcw_app/data.py", "batches"),
)
"""Part of a file's path → the purpose of its launches; the innermost such file decides."""

BACKWARD, OTHER, BETWEEN = "backward passes", "other", "between"

OWN = import_module("mlo.backward").grad if find_spec("mlo.backward") else _engine_run_backward
"""mlo's way into autograd; older revisions, which `before_after.py` runs, take PyTorch's."""

AUTOGRAD = (_engine_run_backward.__code__, BackwardCFunction.apply.__code__, OWN.__code__)
"""These frames call autograd, or are called by it for backward passes in Python."""


class Launches(TorchDispatchMode):
    """Counts operators while it is active.

    Args:
        device: whose operators; those on other devices, such as optimizers' counters on the CPU of
            a run on a GPU, are left out.

    Attributes:
        problem: the problem that is moving, which the caller sets.
        kernels: (problem, part) → operator → launches.
        waits: the same, of waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self.problem = BETWEEN
        self.kernels: dict[tuple[str, str], Counter[str]] = {}
        self.waits: dict[tuple[str, str], Counter[str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in NO_KERNEL:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if not tensors or any(tensor.device.type == self._device for tensor in tensors):
                where = (self.problem, _part())
                if name in WAITING:
                    self.waits.setdefault(where, Counter())[name] += 1
                self.kernels.setdefault(where, Counter())[name] += _kernels(name, args)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def of(self, problem: str) -> Iterator[None]:
        """Counts for a problem in the body: an optimizer's `around_update`."""
        before, self.problem = self.problem, problem
        try:
            yield
        finally:
            self.problem = before

    def total(self, problem: str | None = None, part: str | None = None) -> int:
        """The launches of a problem, of a part, or of both; None: of all."""
        return _total(self.kernels, problem, part)


def _total(
    found: dict[tuple[str, str], Counter[str]], problem: str | None, part: str | None
) -> int:
    return sum(
        counts.total()
        for (of, where), counts in found.items()
        if problem in (None, of) and part in (None, where)
    )


def _kernels(name: str, args: tuple[Any, ...]) -> int:
    """The kernels of an operator on a GPU."""
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = [entry for entry in args if isinstance(entry, (list, tuple)) and entry]
    lists = [entry for entry in lists if isinstance(entry[0], Tensor)]
    # An operator that is not in place has a list of results too.
    depth = len(lists) + (0 if name.endswith("_") else 1)
    return -(-len(lists[0]) // TENSORS_PER_KERNEL[min(depth, 5)])


def _part() -> str:
    """The purpose of the operator that is being dispatched, by the frames that called it."""
    # A model's operators are of a backward pass where autograd called them. An engine's own are
    # not, though it works in the backward pass of a response.
    part = None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code in AUTOGRAD:
            return BACKWARD
        if part is None:
            part = next((told for within, told in PARTS if within in code.co_filename), None)
        if part is not None and "/lfmcw_app/" not in code.co_filename:
            return part
        frame = frame.f_back
    # On a GPU backward passes run in separate threads, without the frames of their caller.
    return BACKWARD if torch._C._current_graph_task_id() != -1 else part or OTHER


def launches_of_step(optimizer: MultilevelOptimizer) -> Launches:
    """Counts the launches of an optimizer's next step."""
    device = next(iter(optimizer.problems.values())).device
    found = Launches(device)
    around, optimizer.around_update = optimizer.around_update, found.of
    try:
        with found:
            optimizer.step()
    finally:
        optimizer.around_update = around
    return found


def print_launches(
    name: str, found: Launches, show: Callable[[str], None] = print, operators: int = 6
) -> None:
    """Prints a table: a row for each part, a column for each problem, and the commonest operators.

    Args:
        name: of what was counted.
        found: the counts.
        show: takes each line.
        operators: so many of the commonest operators of each part.
    """
    problems = list(dict.fromkeys(problem for problem, _ in found.kernels))
    parts = sorted({part for _, part in found.kernels}, key=lambda part: -found.total(part=part))
    show(f"| {name} | {' | '.join(problems)} | launches | waits | commonest operators |")
    show(f"|{'---|' * (len(problems) + 4)}")
    for part in [*parts, None]:
        of_problems = [found.total(problem, part) for problem in problems]
        commonest: Counter[str] = Counter()
        for (_, where), counts in found.kernels.items():
            if part in (None, where):
                commonest.update(counts)
        told = ", ".join(f"{key} {count}" for key, count in commonest.most_common(operators))
        waits = _total(found.waits, None, part)
        cells = [part or "all", *of_problems, found.total(part=part), waits, told]
        show(f"| {' | '.join(map(str, cells))} |")
    show("")
