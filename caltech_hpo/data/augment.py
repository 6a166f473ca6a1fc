"""Batched augmentation with an own draw for each image.

torchvision.transforms.v2 draws once for a whole batch, so crop, flip and rotation are drawn here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from caltech_hpo.spec import AugmentationName


@dataclass(frozen=True)
class Augmentation:
    """What happens to an image on its way into a batch.

    `random_crop` draws the crop's place over the whole resized image (else the centre);
    `flip` mirrors with probability 1/2; `rotation` turns by up to that many degrees either way.
    """

    random_crop: bool = False
    flip: bool = False
    rotation: float = 0.0


AUGMENTATIONS: dict[AugmentationName, Augmentation] = {
    "center_crop": Augmentation(),
    "random_crop": Augmentation(random_crop=True),
    "center_crop_flip": Augmentation(flip=True),
    "random_crop_flip": Augmentation(random_crop=True, flip=True),
    "center_crop_rotation": Augmentation(rotation=180.0),
}


def crop_corners(sizes: Tensor, crop: int, *, random: bool, generator: torch.Generator) -> Tensor:
    """The (top, left) corner of each image's crop: (n, 2) int64 from sizes (n, 2) of (height, width).

    The centre is rounded as torchvision's CenterCrop rounds it (half to even).
    """
    room = (sizes - crop).to(torch.float64)
    if not random:
        return (room / 2).round().to(torch.int64)
    draws = torch.rand(room.shape, generator=generator, dtype=torch.float64)
    return (draws * (room + 1)).floor().to(torch.int64)


def flip_some(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image of (n, channels, height, width) left to right with probability 1/2."""
    chosen = torch.rand(len(batch), generator=generator) < 0.5
    return torch.where(chosen.to(batch.device)[:, None, None, None], batch.flip(3), batch)


def rotate_each(batch: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Turns each image of (n, channels, height, width) float by its own angle in [-degrees, degrees].

    Bilinear; what lies outside the image becomes 0. Images must be square.
    """
    angles = (torch.rand(len(batch), generator=generator) * 2 - 1) * math.radians(degrees)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = functional.affine_grid(theta.to(batch.device), list(batch.shape), align_corners=False)
    return functional.grid_sample(batch, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
