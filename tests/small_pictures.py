"""Small files of pictures, and data sets made of them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lfmcw_app.data import load_dataset
from lfmcw_app.image_survey import DecodingOptions
from lfmcw_app.recipe import Augmentation

IMAGENET = Augmentation(flip=True, resized_crop=True, color_jitter=(0.4, 0.4, 0.4, 0.2))


def write(path, size=(8, 8), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(
        0, 256, size[0] * size[1] * len(mode), dtype=np.uint8
    )
    image = Image.frombytes(mode, size, values.tobytes())
    image.save(path)
    return image


def write_classes(folder, counts, suffix="png", size=(8, 8)):
    for name, count in counts.items():
        for index in range(count):
            write(folder / name / f"{index:03d}.{suffix}", size, seed=len(name) * 1000 + index)


def load(folder, size=None, **options):
    how = DecodingOptions(**options)
    return load_dataset(f"folder:{folder}", image_size=size, options=how)
