"""Writes, reads and checks network.pt: a trained network with all that is needed to use it.

It is a checkpoint of mlo: plain data and tensors, with a checksum, read without unpickling code.
The auxiliary head is left out: it helps the training, and no test or prediction uses it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

import mlo
from lfmcw_app.data import Dataset
from lfmcw_app.decoding import Decoding
from lfmcw_app.errors import InputError, shown
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_files import NETWORK
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.network import ImageNetwork
from lfmcw_app.search_space.operations import PRIMITIVES
from lfmcw_app.spaces import SPACES, space_named
from mlo.randomness import preserved

__all__ = ["NetworkFile", "NetworkPlan", "write_network"]

FORMAT, VERSION = "lfmcw network", 1
"""The file's kind and version; files of a later version are refused."""


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """What builds a derived network.

    Attributes:
        genotype: its cells.
        space: the search space that builds networks of such cells.
        in_channels: channels of an image.
        num_classes: size of the logits.
        channels: channels of a node in the first cell.
        layers: number of cells.
        stem: see `DerivedNetwork`.
    """

    genotype: Cells
    space: str = "darts"
    in_channels: int
    num_classes: int
    channels: int
    layers: int
    stem: Literal["cifar", "imagenet"]

    @classmethod
    def of(cls, recipe: Recipe, genotype: Cells, dataset: Dataset) -> NetworkPlan:
        """The network that a recipe trains on a data set."""
        how = recipe.evaluation
        return cls(
            genotype=genotype,
            space=space_named(recipe.search.space).network_of,
            in_channels=dataset.channels,
            num_classes=dataset.num_classes,
            channels=how.channels,
            layers=how.layers,
            stem=how.stem,
        )

    def build(self, *, auxiliary: bool = False) -> ImageNetwork:
        """Builds the network, with weights drawn from the global random state."""
        return space_named(self.space).network(
            self.genotype,
            in_channels=self.in_channels,
            num_classes=self.num_classes,
            channels=self.channels,
            layers=self.layers,
            auxiliary=auxiliary,
            stem=self.stem,
        )


# ------------------------------ what is in the file

Positive = Annotated[int, Field(ge=1, lt=2**16)]


class _About(BaseModel):
    """Where the network comes from; nothing is computed with it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    dataset: str
    test_error_percent: float
    test_images: int
    seed: int
    recipe_sha256: str
    versions: dict[str, str]


class _Content(BaseModel):
    """The file's entries; `genotype` and `decoding` are checked where they are read."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )

    genotype: dict[str, list[list[list[str | int]]]]
    space: str = "darts"  # older files lack it, from before there were spaces with other cells
    primitives: list[str]
    channels: Positive
    layers: Positive
    stem: Literal["cifar", "imagenet"]
    in_channels: Positive
    class_names: list[str] = Field(min_length=1)
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    decoding: dict[str, Any]
    about: _About
    weights: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkFile:
    """A trained network, with what was known when it was tested.

    Attributes:
        plan: builds it.
        weights: name → tensor, float32 on the CPU, of all but the auxiliary head; with the running
            statistics of the norms that the test used.
        class_names: one name per logit.
        mean: mean of each channel that images are normalised with, for pixels in [0, 1].
        std: standard deviation of each channel.
        decoding: how a file becomes pixels.
        about: data set, test error, seed, digest of the recipe, versions.
    """

    plan: NetworkPlan
    weights: Mapping[str, Tensor]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decoding: Decoding
    about: Mapping[str, Any]

    def network(self) -> ImageNetwork:
        """The network with its weights, in evaluation mode, on the CPU."""
        # Without memory first: this draws no weights. To draw them and put the random states back
        # would disturb a run in another thread, which would draw some numbers twice.
        with torch.device("meta"):
            network = self.plan.build()
        network.load_state_dict({name: t.clone() for name, t in self.weights.items()}, assign=True)
        if any(tensor.is_meta for tensor in _held(network)):
            # An operation of a plugin has tensors that are in no file.
            with preserved():
                network = self.plan.build()
            network.load_state_dict(self.weights)
        return network.eval()

    def save(self, path: Path) -> None:
        """Writes the file, completely or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        content = {
            "genotype": self.plan.genotype.to_data(),
            "space": self.plan.space,
            "primitives": sorted(self.plan.genotype.primitives),
            "channels": self.plan.channels,
            "layers": self.plan.layers,
            "stem": self.plan.stem,
            "in_channels": self.plan.in_channels,
            "class_names": list(self.class_names),
            "mean": list(self.mean),
            "std": list(self.std),
            "decoding": self.decoding.to_data(),
            "about": dict(self.about),
            "weights": dict(self.weights),
        }
        mlo.CheckpointStore(path.parent, path.stem).remove_leftovers()
        mlo.save_checkpoint({"format": FORMAT, "version": VERSION, **content}, path)

    @classmethod
    def load(cls, path: Path) -> NetworkFile:
        """Reads a file, and checks all of it before anything is built from it.

        Raises:
            CheckpointError: if it is missing, damaged, or not in the form of a checkpoint.
            InputError: if it holds something else, is of a later version, needs an unknown
                operation, or its weights do not fit its own description.
        """
        state = mlo.load_checkpoint(path)
        found = state.pop("format", None), state.pop("version", None)
        if found[0] != FORMAT:
            raise InputError(
                f"{path} is a checkpoint, but does not hold a trained network. Name a run folder, "
                f"or the {NETWORK} in it."
            )
        if found[1] != VERSION:
            raise InputError(
                f"{path} has version {shown(found[1])} of its format; this version of lfmcw_app "
                f"reads version {VERSION}. Install the one that wrote it, or a later one."
            )
        try:
            content = _Content.model_validate(state)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise _damaged(path, f"{where or 'it'}: {first['msg']}") from None
        return cls._of(path, content)

    @classmethod
    def _of(cls, path: Path, content: _Content) -> NetworkFile:
        if content.space not in SPACES:
            raise InputError(
                f"{path} is a network of the search space {shown(content.space)}, which is not "
                "known here. Install the package that adds it, as where the network was trained."
            )
        unknown = [name for name in content.primitives if name not in PRIMITIVES]
        if unknown:
            raise InputError(
                f"{path} is a network with the operation {shown(unknown[0])}, which is not known "
                "here. Install the package that adds it, as where the network was trained."
            )
        try:
            genotype = space_named(content.space).genotype.from_text(json.dumps(content.genotype))
            decoding = Decoding.from_data(content.decoding)
        except InputError as error:
            raise _damaged(path, str(error)) from None
        plan = NetworkPlan(
            genotype=genotype,
            space=content.space,
            in_channels=content.in_channels,
            num_classes=len(content.class_names),
            channels=content.channels,
            layers=content.layers,
            stem=content.stem,
        )
        if {len(content.mean), len(content.std)} != {plan.in_channels}:
            raise _damaged(path, "mean and std must have one entry per channel")
        _check_weights(path, plan, content.weights)
        return cls(
            plan=plan,
            weights=content.weights,
            class_names=tuple(content.class_names),
            mean=tuple(content.mean),
            std=tuple(content.std),
            decoding=decoding,
            about=content.about.model_dump(),
        )


def _held(network: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes of modules."""
    yield from network.parameters()
    yield from network.buffers()
    for module in network.modules():
        yield from [value for value in vars(module).values() if isinstance(value, Tensor)]


def _check_weights(path: Path, plan: NetworkPlan, weights: Mapping[str, Tensor]) -> None:
    """Compares weights with their network, which is built without memory."""
    # Each cell has its own weights, so a large number of layers without them would only take time.
    if plan.layers > len(weights):
        raise _damaged(path, f"{plan.layers} layers have only {len(weights)} weights")
    with torch.device("meta"):
        expected = plan.build().state_dict()
    for name in sorted(set(expected) ^ set(weights)):
        raise _damaged(path, f"the weight {shown(name)} is {_lacking(name in expected)}")
    for name, tensor in weights.items():
        there, wanted = _described(tensor), _described(expected[name])
        if there != wanted:
            raise _damaged(path, f"the weight {name} is {there} instead of {wanted}")
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise _damaged(path, f"the weight {name} is {tensor.layout} on {tensor.device}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"The network in {path} cannot be used: its weight {name} is not finite. The "
                "training lost its numbers; see the run's report, and train it again."
            )


def _lacking(expected: bool) -> str:
    return "missing" if expected else "none of its network"


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} does not describe a trained network ({why.rstrip('.')}). It was changed, or "
        "written by another program. Copy the file of the run again, or delete it and resume the "
        "run, which writes it again."
    )


# ------------------------------ writing it at the end of a training


def write_network(
    folder: RunFolder,
    network: ImageNetwork,
    plan: NetworkPlan,
    dataset: Dataset,
    result: Mapping[str, Any],
) -> None:
    """Writes a run's network.pt.

    Args:
        folder: of the run.
        network: as it was tested.
        plan: what builds it.
        dataset: gives class names, normalisation and decoding.
        result: of the run.

    Raises:
        InputError: if it cannot be written.
    """
    if not folder.writes:
        return
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if not name.startswith("auxiliary.")
    }
    about = {
        "dataset": dataset.name,
        "test_error_percent": float(result["test_error_percent"]),
        "test_images": result["test_images"],
        "seed": result["seed"],
        "recipe_sha256": hashlib.sha256(folder.recipe.to_yaml().encode()).hexdigest(),
        "versions": {
            "python": sys.version.split()[0],
            "mlo": mlo.__version__,
            "torch": str(torch.__version__),
            "torchvision": version("torchvision"),
        },
    }
    file = NetworkFile(
        plan=plan,
        weights=weights,
        class_names=dataset.class_names,
        mean=dataset.mean,
        std=dataset.std,
        decoding=dataset.decoding,
        about=about,
    )
    with folder.writing(NETWORK):
        file.save(folder.path / NETWORK)
