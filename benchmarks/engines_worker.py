"""One measuring process of `engines.py`: requests on stdin, JSON lines on stdout.

It measures one task in one library by one method.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engines_libraries import LIBRARIES, Method, Program, Refused
from engines_oracle import Reference, flat
from engines_problems import Task, build
from measuring import SETTLED, answers
from resident_memory import peak, reset_peak, return_free_memory
from torch import Tensor

__all__ = ["serve"]

BLOCK = 0.25
"""Seconds of steps in one repetition."""

UPPER_LR = 1e-6
"""So small that all timed steps are taken at the same point."""


def serve(library: str, method: str, steps: int, rounds: int, path: Path) -> None:
    """Answers `ready`, `start`, `time` and `finish`, one JSON object per line.

    A failure is an answer too.

    Args:
        library: key of `LIBRARIES`.
        method: the method's name.
        steps: its number of products.
        rounds: steps made before the gradient is compared, for methods that keep a state.
        path: file of the task's name and its `Reference`.
    """
    state = torch.load(path, weights_only=True)
    task, reference = build(state["problem"], quick=state["quick"]), Reference(**state["reference"])
    asked = Method(name=method, steps=steps, step_size=reference.step_size)
    measuring = _Measuring(task, reference, library, asked, rounds)
    requests = {
        "ready": dict,
        "start": measuring.start,
        "time": measuring.time,
        "finish": measuring.finish,
    }
    answers(requests, (Refused,))


class _Measuring:
    def __init__(
        self, task: Task, reference: Reference, library: str, method: Method, rounds: int
    ) -> None:
        self._task = task
        self._reference = reference
        self._library = library
        self._method = method
        self._rounds = rounds
        self._program: Program | None = None
        self._block = 1

    def _make(
        self, dtype: torch.dtype, *, upper_lr: float, counted: Counter[str] | None = None
    ) -> Program:
        _, maker = LIBRARIES[self._library]
        task = self._task.at(self._reference.values, dtype=dtype, upper_lr=upper_lr)
        return maker(task if counted is None else _counting(task, counted), self._method)

    def start(self) -> dict[str, Any]:
        """Makes the program in float32, and measures the memory of its first steps."""
        self._program = self._make(torch.float32, upper_lr=UPPER_LR)
        self._warm_up_torch()
        return_free_memory()
        before = reset_peak()
        began = time.process_time()
        for _ in range(2):
            self._program.step()
        seconds = (time.process_time() - began) / 2
        memory = peak() - before
        self._block = max(1, min(200, round(BLOCK / seconds)))
        return {"memory": memory / 2**20}

    def time(self) -> dict[str, Any]:
        """Seconds of processor time per step, over one block of steps."""
        assert self._program is not None
        gc.collect()
        began = time.process_time()
        for _ in range(self._block):
            self._program.step()
        return {"seconds": (time.process_time() - began) / self._block}

    def finish(self) -> dict[str, Any]:
        """Compares the gradient in float64, and counts the evaluations of one step."""
        self._program = None
        counted: Counter[str] = Counter()
        program = self._make(torch.float64, upper_lr=0.0, counted=counted)
        found: list[Tensor] = []

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            (group,) = optimizer.param_groups
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group["params"]]
            found.append(flat(grads).detach().clone())

        program.upper.register_step_pre_hook(note)
        for _ in range(self._rounds):
            program.step()
        gradient = found[-1]

        for _ in range(self._rounds, SETTLED):
            program.step()
        counted.clear()
        with _counted_passes(counted):
            program.step()
        return {
            "evaluations": sum(count for name, count in counted.items() if name != "passes"),
            "passes": counted["passes"],
            "implicit": _compare(gradient, self._reference.implicit),
            "one_step": _compare(gradient, self._reference.one_step),
        }

    def _warm_up_torch(self) -> None:
        """Second derivatives of every loss once: what torch loads at first use counts as set-up."""
        task = self._task.at(self._reference.values, dtype=torch.float32, upper_lr=0.0)
        leaves = {}
        for level in task.levels:
            copies = {key: tensor.clone() for key, tensor in level.values.items()}
            leaves[level.name] = {key: copy.requires_grad_() for key, copy in copies.items()}
        for level in task.lower:
            own = list(leaves[level.name].values())
            gradient = torch.autograd.grad(level.loss(leaves, level.batch), own, create_graph=True)
            torch.autograd.grad(gradient, own, [torch.ones_like(g) for g in gradient])


def _counting(task: Task, counted: Counter[str]) -> Task:
    """The task with losses that count their evaluations."""

    def wrapped(level: Any) -> Callable[..., Tensor]:
        def loss(*args: Any) -> Tensor:
            counted[level.name] += 1
            value: Tensor = level.loss(*args)
            return value

        return loss

    return Task(levels=tuple(replace(level, loss=wrapped(level)) for level in task.levels))


class _CountingEngine:
    """Autograd's engine, which counts the passes that it is asked for."""

    def __init__(self, engine: Any, counted: Counter[str]) -> None:
        self._engine, self._counted = engine, counted

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """One pass; `torch.autograd.grad`, `backward` and `mlo.backward` all come here."""
        self._counted["passes"] += 1
        return self._engine.run_backward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@contextmanager
def _counted_passes(counted: Counter[str]) -> Iterator[None]:
    """Counts the passes of autograd while the body runs."""
    variable: Any = torch.autograd.Variable
    engine = variable._execution_engine
    variable._execution_engine = _CountingEngine(engine, counted)
    try:
        yield
    finally:
        variable._execution_engine = engine


def _compare(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative error, cosine, and ratio of norms."""
    return {
        "error": float((found - exact).norm() / exact.norm()),
        "cosine": float(torch.cosine_similarity(found, exact, dim=0)),
        "scale": float(found.norm() / exact.norm()),
    }
