"""How exactly the numbers of a phase are computed: TF32, and algorithms that repeat bit for bit.

PyTorch has both as settings of the whole process. They are set only here, while a phase runs, and
restored after it. The third choice, `precision`, belongs to single losses: mlo evaluates them under
autocast.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from lfmcw_app.errors import InputError, shown
from lfmcw_app.recipe import Recipe

__all__ = ["described_numerics", "numerics_of"]

Section = Literal["search", "evaluation"]
SECTIONS: tuple[Section, ...] = ("search", "evaluation")

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Values with which cuBLAS repeats its results (NVIDIA's cuBLAS documentation, section 2.1.4). The
first takes 24 MB of a GPU. The second takes less, and may be slower.
"""

NO_ALGORITHM = "does not have a deterministic implementation"
NO_WORKSPACE = "Deterministic behavior was enabled"
"""What PyTorch says about an operation and about cuBLAS, under
`torch.use_deterministic_algorithms`.
"""


@contextmanager
def numerics_of(recipe: Recipe, section: Section) -> Iterator[None]:
    """Sets, for the whole process, the numerics of a section of a recipe while a body runs.

    Args:
        recipe: the recipe of the run.
        section: "search", or "evaluation" for the training of the derived network.

    Raises:
        InputError: for an operation of the body that has no deterministic algorithm, or if cuBLAS
            cannot be made to repeat itself.
    """
    how = getattr(recipe, section)
    wanted = _switches(tf32=how.tf32, deterministic=how.deterministic)
    before = {name: _get(name) for name in wanted}
    with _workspace(recipe):
        try:
            for name, value in wanted.items():
                _set(name, value)
            yield
        except RuntimeError as error:
            refusal = _refused(error, section)
            if refusal is None:
                raise
            raise refusal from error
        finally:
            for name, value in before.items():
                _set(name, value)


def described_numerics(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Section → its numerics under PyTorch's names, as plain data."""
    found: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        how = getattr(recipe, section)
        found[section] = {
            "autocast": "bfloat16" if how.precision == "bf16" else None,
            **_switches(tf32=how.tf32, deterministic=how.deterministic),
        }
    return found


# ------------------------------ PyTorch's switches


def _switches(*, tf32: bool, deterministic: bool) -> dict[str, bool]:
    """PyTorch's name of a setting → its value."""
    found = {"backends.cudnn.allow_tf32": tf32, "backends.cuda.matmul.allow_tf32": tf32}
    found["use_deterministic_algorithms"] = deterministic
    if deterministic:
        # cuDNN's benchmark picks algorithms by time, so two runs may pick different ones.
        found |= {"backends.cudnn.deterministic": True, "backends.cudnn.benchmark": False}
    return found


def _get(name: str) -> bool:
    if name == "use_deterministic_algorithms":
        return torch.are_deterministic_algorithms_enabled()
    backend, last = _place(name)
    return bool(getattr(backend, last))


def _set(name: str, value: bool) -> None:
    if name == "use_deterministic_algorithms":
        torch.use_deterministic_algorithms(value)
        return
    backend, last = _place(name)
    setattr(backend, last, value)


def _place(name: str) -> tuple[Any, str]:
    *above, last = name.split(".")
    found: Any = torch
    for part in above:
        found = getattr(found, part)
    return found, last


# ------------------------------ cuBLAS and refusals


@contextmanager
def _workspace(recipe: Recipe) -> Iterator[None]:
    """Gives cuBLAS a workspace with which it repeats itself, if any phase of the run asks for it.

    cuBLAS reads the environment where it is first used. So a run whose second phase alone asks for
    it needs it in the first one.

    Raises:
        InputError: if the environment names another workspace.
    """
    asking = [section for section in SECTIONS if getattr(recipe, section).deterministic]
    there = os.environ.get(WORKSPACE)
    if not asking or there in WORKSPACES:
        yield
        return
    if there is not None:
        raise InputError(
            f"{asking[0]}.deterministic needs {WORKSPACE} to be one of {', '.join(WORKSPACES)}, "
            f"but the environment has {shown(there)}. Unset it, or set "
            f"{asking[0]}.deterministic=false."
        )
    os.environ[WORKSPACE] = WORKSPACES[0]
    try:
        yield
    finally:
        os.environ.pop(WORKSPACE, None)


def _refused(error: RuntimeError, section: Section) -> InputError | None:
    """What to do if PyTorch refuses an operation; None for another error."""
    said = " ".join(str(error).split())
    key = f"{section}.deterministic"
    if NO_ALGORITHM in said:
        operation = said.partition(NO_ALGORITHM)[0].split()[-1]
        return InputError(
            f"{key} is true, but PyTorch has no deterministic algorithm for {operation} on this "
            f"device. Set {key}=false (a run can be resumed with it), or choose settings without "
            "this operation."
        )
    if NO_WORKSPACE in said:
        return InputError(
            f"{key} is true, but this process has already used cuBLAS with another workspace. Set "
            f"{WORKSPACE}={WORKSPACES[0]} in the environment before you start it."
        )
    return None
