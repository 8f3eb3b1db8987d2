"""Your own data sets by name: registered in a script, or offered by an installed package."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, KeysView, Mapping, Set
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfmcw_app.copies import copies_in_memory, tell_copies
from lfmcw_app.errors import DataWarning, InputError, shown
from lfmcw_app.names import FOLDER, RANDOM
from lfmcw_app.readers import DATASETS, Images, Parts
from lfmcw_app.splits import stratified

__all__ = ["ENTRY_POINTS", "dataset_names", "reader_of", "register_dataset"]

ENTRY_POINTS = "lfmcw_app.datasets"
"""The entry-point group of data sets in installed packages: name → function."""

TAKEN = (*DATASETS, FOLDER.rstrip(":"), RANDOM.rstrip(":"))
LONGEST_NAME = 100

_REGISTERED: dict[str, Callable[[Path], Any]] = {}

FORM = (
    "((train_images, train_labels), (test_images, test_labels), class_names), with images uint8 "
    "[N, C, H, W] and labels integers [N]; or None in place of the test images, to hold out a "
    "fifth"
)


def register_dataset(name: str, function: Callable[[Path], Any]) -> None:
    """Makes your own images available under a name, as a data set in this process.

    Args:
        name: what commands and recipes call it; up to 100 letters, digits, "-", "_" and ".", of
            which the first is a letter or a digit.
        function: called with the folder of data files (`--data`). It returns `((images, labels),
            (test_images, test_labels), class_names)`: images are uint8 tensors or arrays
            [N, C, H, W] with C = 1 or 3, or lists of N of them; labels are integers [N]. In place
            of the test images it may return None; then a stratified fifth is held out. Class names
            are texts or integers in the order of the labels, or a mapping between each name and its
            label, such as torchvision's class_to_idx.

    Raises:
        InputError: if the name is taken by a data set of the application, or cannot be used.
    """
    allowed = name[:1].isalnum() and all(letter.isalnum() or letter in "-_." for letter in name)
    if not allowed or len(name) > LONGEST_NAME:
        raise InputError(
            "The name of a data set begins with a letter or a digit and has only letters, digits, "
            f"-, _ and ., at most {LONGEST_NAME}, got {shown(name)}."
        )
    # Names of folders and files are made of it; some systems do not tell capitals from others.
    if name.lower() in TAKEN:
        raise InputError(f"{name.lower()} is a data set of the application. Choose another name.")
    _REGISTERED[name] = function


def dataset_names() -> tuple[str, ...]:
    """The names of the application's data sets, registered ones, and those of packages."""
    return (*DATASETS, *dict.fromkeys([*_REGISTERED, *_installed()]))


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def reader_of(name: str) -> Callable[[Path], Parts]:
    """The reader of a data set, one of `dataset_names`."""
    if name in DATASETS:
        return DATASETS[name]
    return lambda root: _parts(name, _function(name)(root))


def _function(name: str) -> Callable[[Path], Any]:
    if name in _REGISTERED:
        return _REGISTERED[name]
    point = _installed()[name]
    try:
        function: Callable[[Path], Any] = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"The data set {name} of {point.value} cannot be imported ({error!r}). Fix or remove "
            "the package that offers it."
        ) from None
    return function


def _parts(name: str, returned: Any) -> Parts:
    """Checks what a user's function returned.

    Raises:
        InputError: saying what it should be.
    """
    try:
        train, test, names = returned
    except (TypeError, ValueError):
        raise InputError(
            f"The data set {name} must return {FORM}; got {shown(returned)}."
        ) from None
    class_names = _class_names(name, names)
    if len(set(class_names)) != len(class_names) or len(class_names) < 2:
        raise InputError(
            f"The data set {name} needs at least two class names, all different, got "
            f"{shown(class_names)}."
        )
    images = _images(name, "training", train, len(class_names))
    if test is not None:
        tested = _images(name, "test", test, len(class_names))
        if images.pixels.shape[1:] != tested.pixels.shape[1:]:
            raise InputError(
                f"The data set {name} has training images of shape "
                f"{tuple(images.pixels.shape[1:])} and test images of shape "
                f"{tuple(tested.pixels.shape[1:])}. Make them equal."
            )
        assert isinstance(images.pixels, Tensor)
        assert isinstance(tested.pixels, Tensor)
        copies = copies_in_memory(images.pixels, tested.pixels)
        tell_copies(f"the data set {name}", copies, len(tested))
        return Parts(images, tested, class_names)
    held_out, rest = stratified(images.labels, max(1, len(images) // 5), seed=0)
    return Parts(images[rest], images[held_out], class_names)


def _class_names(name: str, given: Any) -> tuple[str, ...]:
    """The names of the classes in the order of the labels.

    Raises:
        InputError: if they have no order, or are no names.
    """
    try:
        return tuple(map(_text, _in_order(given)))
    except TypeError:
        raise InputError(
            f"The data set {name} needs a list of class names, texts or integers in the order of "
            "the labels; or a mapping between texts and the labels 0, 1, …, C - 1; got "
            f"{shown(given)}."
        ) from None


def _in_order(names: Any) -> list[Any]:
    """Class names in the order of the labels.

    Raises:
        TypeError: if they have no order.
    """
    if isinstance(names, Mapping):
        by_label = dict(names)
        if all(isinstance(each, str) for each in names):
            by_label = {label: each for each, label in names.items()}
        whole = by_label.keys() == set(range(len(names)))
        if not whole or not all(isinstance(each, str) for each in by_label.values()):
            raise TypeError("the labels must be 0, 1, ...")
        return [by_label[label] for label in range(len(names))]
    if isinstance(names, str | bytes | bytearray | Set) and not isinstance(names, KeysView):
        raise TypeError("a text is one name, and a set has no order")
    return list(names)


def _text(name: Any) -> str:
    if isinstance(name, bool):
        raise TypeError("truth values are no names")
    return name if isinstance(name, str) else str(operator.index(name))


def _tensor(given: Any) -> Tensor:
    """An array, a tensor, or a list of either, as a dense tensor on the CPU.

    Raises:
        TypeError, ValueError or RuntimeError: if it is none.
    """
    if isinstance(given, list | tuple) and any(isinstance(each, Tensor) for each in given):
        given = torch.stack([torch.as_tensor(each).cpu() for each in given])
    if isinstance(given, Tensor):
        return given.detach().cpu().to_dense()
    array = np.asarray(given)
    if array.dtype == object:  # numbers of Python, or arrays
        array = np.asarray(array.tolist())
    # PyTorch takes neither the other order of bytes nor negative strides.
    return torch.as_tensor(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


def _images(name: str, part: str, given: Any, classes: int) -> Images:
    where = f"The {part} images of the data set {name}"
    if isinstance(given, Images):
        given = (given.pixels, given.labels)
    try:
        pixels, labels = map(_tensor, given)
    except (TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"{where}: expected {FORM}; got {shown(given)} ({why}).") from None
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise InputError(
            f"{where} must be uint8 [N, C, H, W] with C = 1 or 3, values 0 to 255; got "
            f"{_described(pixels)}."
        )
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integer or labels.shape != pixels.shape[:1]:
        raise InputError(
            f"{where}: labels must be integers [N], one for each of the {len(pixels):,} images; "
            f"got {_described(labels)}."
        )
    labels = labels.long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"{where}: labels must be 0 to {classes - 1}, since there are {classes} class names; "
            f"got {int(labels.min())} to {int(labels.max())}."
        )
    if len(pixels) and int(pixels.max()) <= 1:
        warnings.warn(
            f"{where} have no value above 1. They are taken as 0 to 255, so 1 is nearly black. If "
            "1 is white, multiply them by 255.",
            DataWarning,
            stacklevel=2,
        )
    return Images(pixels=pixels.contiguous(), labels=labels)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
