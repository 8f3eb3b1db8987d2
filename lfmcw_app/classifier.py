"""A run's trained network as a function of images, with the preprocessing of its training."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from lfmcw_app.decoding import Decoding
from lfmcw_app.errors import InputError
from lfmcw_app.image_forms import ImageLike, picture_of
from lfmcw_app.near_paths import near_runs
from lfmcw_app.network_file import NetworkFile
from lfmcw_app.run_files import CONFIG, EVALUATED, NETWORK, RESULT
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.network import ImageNetwork
from lfmcw_app.usual_torch import usual_torch

__all__ = ["Classifier", "Preprocess", "load_network", "network_path"]


class Classifier(nn.Module):
    """A derived network that returns its logits alone, without those of an auxiliary head."""

    def __init__(self, network: ImageNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits [B, classes] of normalised images [B, C, S, S]."""
        logits: Tensor = self.network(images)[0]
        return logits


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Turns an image into what the network was trained on.

    Attributes:
        decoding: how a file becomes pixels.
        mean: mean of each channel, for pixels in [0, 1].
        std: standard deviation of each channel.
    """

    decoding: Decoding
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: ImageLike) -> Tensor:
        """Returns an image as the network takes it, [C, S, S], float32.

        Args:
            image: a file, a Pillow image, a NumPy array ([H, W] or [H, W, C], as Pillow has it)
                or a tensor ([H, W] or [C, H, W], as torchvision has it) of uint8, grey ones also of
                uint16. OpenCV puts blue first, so pass `array[..., ::-1]`.

        Raises:
            InputError: if it cannot be read, or is none of these.
        """
        return self.normalised(self.pixels(image))

    def pixels(self, image: ImageLike) -> Tensor:
        """Returns an image's pixels at the network's size, [C, S, S], uint8."""
        if self.decoding.channels != len(self.mean):  # tensors of a data set made in Python
            raise InputError(
                f"The network takes {len(self.mean)} channels, which no image file has. Normalise "
                "their pixels [C, S, S] with preprocess.normalised."
            )
        return self.decoding.decode(picture_of(image))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Maps pixels [..., C, S, S] of 0 to 255 to zero mean and unit variance, float32."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (pixels.float() / 255.0 - mean) / std


@usual_torch()
def load_network(
    run: str | PathLike[str], *, device: torch.device | str = "cpu"
) -> tuple[Classifier, Preprocess, tuple[str, ...]]:
    """Loads the trained network of a run.

    Args:
        run: a run folder of a search or an evaluation, or its network.pt.
        device: where the network goes.

    Returns:
        network: maps normalised images [B, C, S, S] to logits [B, classes]; in evaluation mode.
        preprocess: maps one image (a path, a Pillow image, an array or a tensor of uint8) to
            [C, S, S], as for the training.
        class_names: one name per logit.

    Raises:
        InputError: if the run has no trained network yet, or the file cannot be used.
        CheckpointError: if the file is damaged.
    """
    file = NetworkFile.load(network_path(run))
    preprocess = Preprocess(decoding=file.decoding, mean=file.mean, std=file.std)
    return Classifier(file.network()).eval().to(device), preprocess, file.class_names


def network_path(run: str | PathLike[str]) -> Path:
    """The file of a run's network.

    Raises:
        InputError: if there is none, saying what to do.
    """
    path = Path(run)
    if not path.is_dir():
        if path.is_file():
            return path
        raise InputError(f"There is no run folder and no file {path}.{near_runs(path)}")
    if (path / NETWORK).exists():
        return path / NETWORK
    if not (path / CONFIG).exists():
        raise InputError(
            f"{path} is not a run folder: it has neither {NETWORK} nor config.yaml. Name the "
            f"folder of a run or an evaluation.{near_runs(path)}"
        )
    command = "evaluate" if (path / EVALUATED).exists() else "run"
    resume = f"python -m lfmcw_app.{command} --resume {shlex.quote(str(path))}"
    if not RunFolder.open(path).recipe.trains:
        raise InputError(
            f"The run in {path} has no trained network: its test error was looked up. Train what "
            f"it found with python -m lfmcw_app.evaluate {path} DATASET, and the run's --space and "
            "settings."
        )
    if (path / RESULT).exists():
        raise InputError(
            f"The run in {path} is complete but has no {NETWORK}: an earlier version did not write "
            f"one, or it was removed. Make it from the last checkpoint: {resume}"
        )
    raise InputError(
        f"The run in {path} has no trained network yet ({NETWORK}), which it writes when the "
        f"training has ended. Wait for it, or resume it: {resume}"
    )
