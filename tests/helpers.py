"""What several tests need: image files made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, *, size=(48, 40), mode="RGB", hue=None) -> Path:
    """A noisy image; `hue` 0, 1 or 2 makes that channel bright, so that classes can be told apart."""
    noise = np.random.default_rng(seed).integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
    if hue is not None:
        noise[..., hue] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def write_folders(root: Path, *, classes=("ant", "Bee", "cat"), images=9, size=(48, 40)) -> Path:
    """Class folders of PNG images that are easy to tell apart."""
    for label, name in enumerate(classes):
        for number in range(images):
            write_image(
                root / name / f"image_{number:03d}.png", seed=1000 * label + number, size=size, hue=label % 3
            )
    return root
