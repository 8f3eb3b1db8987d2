"""Betty's `Env`: what all problems of a program share, such as a simulator or a batch of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["Env"]


class Env:
    """Base of a user's environment, which problems find as `self.env`.

    Attributes:
        env: whatever the user puts there.
        train_data_loader: likewise.
        device: where the problems' modules are.
    """

    env: Any = None
    train_data_loader: Any = None
    device: Any = None

    _strategy: str | None = None
    _world_size: int | None = None
    _rank: int | None = None
    _local_rank: int | None = None

    def initialize(self) -> None:
        """Is called once, before the problems are initialized."""

    def patch_module(self, module: nn.Module) -> nn.Module:
        """Puts a module on the device. (It is not wrapped: no problem trains it.)"""
        return module.to(self.device)

    def patch_data_loader(self, loader: Any) -> Any:
        """Returns the loader as it is."""
        return loader

    def configure_device(self, device: Any) -> None:
        """Takes the device."""
        self.device = device

    def configure_distributed_training(self, dictionary: Mapping[str, Any]) -> None:
        """Takes strategy, number of processes and rank."""
        self._strategy = dictionary["strategy"]
        self._world_size = dictionary["world_size"]
        self._rank = dictionary["rank"]
        self._local_rank = dictionary["local_rank"]
