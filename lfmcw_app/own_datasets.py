"""Your own data sets by name: registered in a script, or offered by an installed package.

Images are given as one tensor, or as pictures one after another (`own_pictures`).
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, KeysView, Mapping, Set
from importlib.metadata import EntryPoint, entry_points
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lfmcw_app.copies import copies_in_memory, tell_copies
from lfmcw_app.errors import DataWarning, InputError, listed, shown
from lfmcw_app.image_survey import DecodingOptions
from lfmcw_app.names import FOLDER, RANDOM
from lfmcw_app.own_pictures import decoded_parts
from lfmcw_app.readers import DATASETS, Images, Parts
from lfmcw_app.splits import stratified

__all__ = ["ENTRY_POINTS", "dataset_names", "read_own", "register_dataset"]

ENTRY_POINTS = "lfmcw_app.datasets"
"""The entry-point group of data sets in installed packages: name → function."""

TAKEN = (*DATASETS, FOLDER.rstrip(":"), RANDOM.rstrip(":"))
LONGEST_NAME = 100

_REGISTERED: dict[str, Callable[[Path], Any]] = {}

FORM = (
    "(training, test, class_names), with None in place of test to hold out a fifth, or (training, "
    "test, class_names, validation)"
)
PART_FORM = (
    "a pair of images and labels, or a data set of such pairs; images are uint8 [N, C, H, W], or N "
    "paths, Pillow images or arrays"
)


def register_dataset(name: str, function: Callable[[Path], Any]) -> None:
    """Makes your own images available under a name, as a data set in this process.

    Args:
        name: what commands and recipes call it; up to 100 letters, digits, "-", "_" and ".", of
            which the first is a letter or a digit.
        function: called with the folder of data files (`--data`). It returns `(training, test,
            class_names)` or `(training, test, class_names, validation)`; validation images are
            D_val. In place of the test images it may return None; then a stratified fifth of the
            training images is held out. Each part is a pair `(images, labels)`, or a data set of
            pairs of an image and its label, such as torchvision's and PyTorch's. Images are a uint8
            tensor or array [N, C, H, W] with C = 1 or 3, or [N, H, W] or [N, H, W, C]; or N
            pictures of any size, each a path, a Pillow image, an array or a tensor, as
            `load_network`'s `preprocess` takes them. Labels are N integers from 0, or class names.
            Class names are texts or integers in the order of the labels, or a mapping between each
            name and its label, such as torchvision's class_to_idx.

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


def read_own(
    name: str, root: Path, image_size: int | None = None, options: DecodingOptions | None = None
) -> Parts:
    """Reads a data set of a user.

    Args:
        name: of one that is registered or installed.
        root: folder of data files.
        image_size: height and width that pictures of any size are brought to.
        options: how these become pixels; None for the defaults.

    Raises:
        InputError: if what it returns cannot be used.
    """
    return _parts(name, _function(name)(root), image_size, options)


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


def _parts(
    name: str, returned: Any, image_size: int | None = None, options: DecodingOptions | None = None
) -> Parts:
    """Checks what a user's function returned.

    Raises:
        InputError: saying what it should be.
    """
    options = options or DecodingOptions()
    if not isinstance(returned, tuple | list) or len(returned) not in (3, 4):
        raise InputError(f"The data set {name} must return {FORM}; got {shown(returned)}.")
    train, test, names, *rest = returned
    class_names = _class_names(name, names)
    if len(set(class_names)) != len(class_names) or len(class_names) < 2:
        raise InputError(
            f"The data set {name} needs at least two class names, all different, got "
            f"{shown(class_names)}."
        )
    given = {"training": train, "validation": rest[0] if rest else None, "test": test}
    parts = {part: of_part for part, of_part in given.items() if of_part is not None}
    where = {part: f"The {part} images of the data set {name}" for part in parts}
    reading, left_out = None, ""
    if any(map(_is_pictures, parts.values())):
        of_place = {where[part]: _one_by_one(of_part) for part, of_part in parts.items()}
        made, reading, left_out = decoded_parts(of_place, image_size, options)
        parts = {part: made[where[part]] for part in parts}
    elif options != DecodingOptions():
        raise InputError(
            "data.fit, data.channels, data.bits, data.background and data.on_damaged are for "
            f"pictures given one by one, and the images of {name} are tensors. Drop them."
        )
    read = {part: _images(where[part], parts[part], class_names) for part in parts}
    shape = read["training"].pixels.shape[1:]
    for part, images in read.items():
        if images.pixels.shape[1:] != shape:
            raise InputError(
                f"The data set {name} has training images of shape {tuple(shape)} and {part} "
                f"images of shape {tuple(images.pixels.shape[1:])}. Make them equal."
            )
    train, tested = read["training"], read.get("test")
    if tested is None:
        held_out, kept = stratified(train.labels, max(1, len(train) // 5), seed=0)
        train, tested = train[kept], train[held_out]
    else:
        assert isinstance(train.pixels, Tensor)
        assert isinstance(tested.pixels, Tensor)
        copies = copies_in_memory(train.pixels, tested.pixels)
        tell_copies(f"the data set {name}", copies, len(tested))
    return Parts(
        train,
        tested,
        class_names,
        validation=read.get("validation"),
        left_out=left_out,
        reading=reading,
    )


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
            "the labels (sort 0, 1, …, C - 1); or a mapping between texts and the labels 0, 1, …, "
            f"C - 1; got {shown(given)}."
        ) from None


def _in_order(names: Any) -> list[Any]:
    """Class names in the order of the labels.

    Raises:
        TypeError: if they have no order.
    """
    if isinstance(names, Mapping):
        by_label = dict(names)
        if all(isinstance(each, str) for each in names.values()):
            by_label = {_number(label): each for label, each in names.items()}
        elif all(isinstance(each, str) for each in names):
            by_label = {label: each for each, label in names.items()}
        whole = by_label.keys() == set(range(len(names)))
        if not whole or not all(isinstance(each, str) for each in by_label.values()):
            raise TypeError("the labels must be 0, 1, ...")
        return [by_label[label] for label in range(len(names))]
    if isinstance(names, str | bytes | bytearray | Set) and not isinstance(names, KeysView):
        raise TypeError("a text is one name, and a set has no order")
    listed_names = list(names)
    # What `unique` of a table returns, in the order of first appearance: label 0 would be called 2.
    if all(hasattr(each, "__index__") for each in listed_names):
        numbers = list(map(operator.index, listed_names))
        if numbers != sorted(numbers) == list(range(len(numbers))):
            raise TypeError("integers are the labels themselves, in another order")
    return listed_names


def _number(label: Any) -> Any:
    """A label, also where JSON has made a text of it, as in medmnist's INFO."""
    return int(label) if isinstance(label, str) and label.isdecimal() else label


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


def _is_pictures(given: Any) -> bool:
    """Whether a part is pictures one by one, instead of a tensor or what makes one."""
    if isinstance(given, Images | str | bytes | Mapping):
        return False
    if not isinstance(given, tuple | list) or len(given) != 2:
        return True
    images = given[0]
    if isinstance(images, str | bytes | Mapping) or len(getattr(images, "shape", ())) > 1:
        return False
    if not isinstance(images, list | tuple | np.ndarray):
        return hasattr(images, "__iter__") or hasattr(images, "__getitem__")
    shapes = {tuple(image.shape) for image in images if hasattr(image, "shape")}
    one_by_one = (str, PathLike, Image.Image)
    return len(shapes) > 1 or any(isinstance(image, one_by_one) for image in images)


def _one_by_one(given: Any) -> Any:
    """The images of a tensor as pictures, for a part beside one of pictures."""
    if _is_pictures(given):
        return given
    if isinstance(given, Images):
        return given.pixels, given.labels
    try:
        images, labels = given
        return _channels_second(_tensor(images)), labels
    except (TypeError, ValueError, RuntimeError):
        return given  # what is wrong is said where it is read


def _channels_second(images: Tensor) -> Tensor:
    """Images [N, H, W] or [N, H, W, C] as [N, C, H, W], if there is no doubt."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        return images.movedim(3, 1)
    return images


def _images(where: str, given: Any, class_names: tuple[str, ...]) -> Images:
    if isinstance(given, Images):
        given = (given.pixels, given.labels)
    try:
        pixels, labels = given
        pixels = _channels_second(_tensor(pixels))
        labels = _tensor(_numbers(where, labels, class_names))
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"{where} must be {PART_FORM}; got {shown(given)} ({why}).") from None
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise InputError(
            f"{where} must be uint8 [N, C, H, W] with C = 1 or 3, values 0 to 255; got "
            f"{_described(pixels)}."
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integer or labels.shape != pixels.shape[:1]:
        raise InputError(
            f"{where}: labels must be integers [N], one for each of the {len(pixels):,} images; "
            f"got {_described(labels)}.{_several(labels)}"
        )
    labels = labels.long()
    classes = len(class_names)
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


def _numbers(where: str, labels: Any, class_names: tuple[str, ...]) -> Any:
    """Labels, with the number of each class that is given by its name.

    Raises:
        InputError: for a text that is no class name.
    """
    if isinstance(labels, Tensor) or (isinstance(labels, np.ndarray) and labels.dtype.kind in "iu"):
        return labels
    labels = list(labels)
    if not any(isinstance(label, str) for label in labels):
        return labels
    known = {name: number for number, name in enumerate(class_names)}
    unknown = next((label for label in labels if label not in known), None)
    if unknown is not None:
        raise InputError(
            f"{where}: the label {shown(unknown)} is no class name; these are "
            f"{listed(list(map(repr, class_names)))}."
        )
    return [known[label] for label in labels]


def _several(labels: Tensor) -> str:
    """Advice on labels [N, C]; "" for others."""
    if labels.ndim != 2:
        return ""
    if bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(1) == 1).all()):
        return " They are one-hot: give labels.argmax(1)."
    return " An image has one class: data whose images have several cannot be searched on."


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
