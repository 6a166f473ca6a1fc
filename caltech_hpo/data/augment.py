"""Batched augmentation with an own draw for each image.

torchvision.transforms.v2 draws once for a whole batch, so everything random is drawn here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from caltech_hpo.data.resident import to_device
from caltech_hpo.terms import AugmentationName


@dataclass(frozen=True)
class Augmentation:
    """What happens to an image on its way into a batch.

    `random_crop` draws the crop's place over the whole resized image (else the centre); `resized`
    draws its size and shape too. `flip` mirrors with that probability; `rotation` turns by up to that
    many degrees either way. `copies` makes an epoch of that many transformed copies of every image.
    """

    random_crop: bool = False
    resized: bool = False
    flip: float = 0.0
    rotation: float = 0.0
    copies: tuple[Augmentation, ...] = ()


AUGMENTATIONS: dict[AugmentationName, Augmentation] = {
    "center_crop": Augmentation(),
    "random_crop": Augmentation(random_crop=True),
    "center_crop_flip": Augmentation(flip=0.5),
    "random_crop_flip": Augmentation(random_crop=True, flip=0.5),
    "center_crop_rotation": Augmentation(rotation=180.0),
    "random_resized_crop": Augmentation(resized=True),
    "random_resized_crop_flip": Augmentation(resized=True, flip=0.5),
    # What the report proposes and does not try: the union of its four ways to transform an image.
    "concat": Augmentation(
        copies=(
            Augmentation(), Augmentation(random_crop=True), Augmentation(flip=1.0),
            Augmentation(rotation=180.0),
        )
    ),
}  # fmt: skip
# Of a random resized crop and of an erased box: width over height, as in torchvision.
CROP_RATIOS, ERASED_RATIOS = (3 / 4, 4 / 3), (0.3, 3.3)
ERASED_AREAS = (0.02, 0.33)


def crop_corners(sizes: Tensor, crop: int, *, random: bool, generator: torch.Generator) -> Tensor:
    """The (top, left) corner of each image's crop: (n, 2) int64 from sizes (n, 2) of (height, width).

    The centre is rounded as torchvision's CenterCrop rounds it (half to even).
    """
    room = (sizes - crop).to(torch.float64)
    if not random:
        return (room / 2).round().to(torch.int64)
    draws = torch.rand(room.shape, generator=generator, dtype=torch.float64)
    return (draws * (room + 1)).floor().to(torch.int64)


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(count,) float32 draws from [low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator)


def boxes(
    sizes: Tensor, areas: tuple[float, float], ratios: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """A random box in each image: (n, 4) int64 of top, left, height, width from sizes (n, 2).

    Its share of the image is uniform in `areas`, its width over height log-uniform in `ratios`; a side
    that does not fit is cut to the image's.
    """
    count = len(sizes)
    height, width = sizes.double().unbind(1)
    area = height * width * uniform(count, *areas, generator)
    ratio = uniform(count, math.log(ratios[0]), math.log(ratios[1]), generator).double().exp()
    tall = torch.minimum((area / ratio).sqrt().round().clamp(min=1), height)
    wide = torch.minimum((area * ratio).sqrt().round().clamp(min=1), width)
    top = (torch.rand(count, generator=generator) * (height - tall + 1)).floor()
    left = (torch.rand(count, generator=generator) * (width - wide + 1)).floor()
    return torch.stack([top, left, tall, wide], 1).long()


def inside(box: Tensor, height: int, width: int) -> Tensor:
    """(n, 1, height, width) bool: which pixels lie in each image's box (n, 4)."""
    top, left, tall, wide = (column[:, None] for column in box.unbind(1))
    rows = torch.arange(height, device=box.device)[None]
    columns = torch.arange(width, device=box.device)[None]
    in_rows = (rows >= top) & (rows < top + tall)
    in_columns = (columns >= left) & (columns < left + wide)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def jitter_each(batch: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of each image (n, 3, height, width), pixels 0 to 255.

    Each changes by its own factor in [1 - strength, 1 + strength], in this order.
    """
    factors = uniform(3 * len(batch), 1 - strength, 1 + strength, generator).view(3, -1, 1, 1, 1)
    brightness, contrast, saturation = to_device(factors, batch.device)
    batch = (batch * brightness).clamp_(0, 255)
    batch = torch.lerp(grey(batch).mean((2, 3), keepdim=True), batch, contrast).clamp_(0, 255)
    return torch.lerp(grey(batch).expand_as(batch), batch, saturation).clamp_(0, 255)


def grey(batch: Tensor) -> Tensor:
    """Luma (n, 1, height, width) of RGB images, ITU-R BT.601, as Pillow and torchvision weigh it."""
    red, green, blue = batch.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def erase_some(batch: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Sets a box of some normalised images to 0 (Zhong et al. 2017, https://arxiv.org/abs/1708.04896)."""
    count, _, height, width = batch.shape
    chosen = torch.rand(count, generator=generator) < probability
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    box = boxes(sizes, ERASED_AREAS, ERASED_RATIOS, generator) * chosen[:, None]
    return batch.masked_fill(inside(to_device(box, batch.device), height, width), 0.0)


def mix(
    batch: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixes each image with one drawn from the batch; labels (n,) become shares (n, classes) float32.

    Mixup (Zhang et al. 2018, https://arxiv.org/abs/1710.09412) blends, CutMix (Yun et al. 2019,
    https://arxiv.org/abs/1905.04899) pastes a box; with both, half of the images go either way.
    """
    count, _, height, width = batch.shape
    device = batch.device
    partner = torch.randperm(count, generator=generator)
    pasted = torch.rand(count, generator=generator) < (0.5 if mixup and cutmix else float(bool(cutmix)))
    kept = torch.where(pasted, beta(count, cutmix, generator), beta(count, mixup, generator))
    sides = torch.sqrt(1 - kept) * pasted
    center_y, center_x = torch.rand(2, count, generator=generator) * torch.tensor([[height], [width]])
    top, bottom = ((center_y + sign * sides * height / 2).round().clamp(0, height) for sign in (-1, 1))
    left, right = ((center_x + sign * sides * width / 2).round().clamp(0, width) for sign in (-1, 1))
    box = torch.stack([top, left, bottom - top, right - left], 1).long()
    # a box that hangs over the edge is smaller than was drawn
    kept = torch.where(pasted, 1 - (box[:, 2] * box[:, 3]) / (height * width), kept)
    blend = to_device(kept.masked_fill(pasted, 1.0)[:, None, None, None], device)
    partner, kept = to_device(partner, device), to_device(kept, device)
    other = batch[partner]
    mixed = torch.where(inside(to_device(box, device), height, width), other, torch.lerp(other, batch, blend))
    shares = functional.one_hot(labels, classes).float()
    return mixed, torch.lerp(shares[partner], shares, kept[:, None].float())


def beta(count: int, alpha: float, generator: torch.Generator) -> Tensor:
    """(count,) float32 draws from Beta(alpha, alpha); ones for alpha 0.

    In double precision: small alphas make gammas that float32 cannot tell from 0.
    """
    if not alpha:
        return torch.ones(count)
    shapes = torch.full((2, count), alpha, dtype=torch.float64)
    first, second = torch._standard_gamma(shapes, generator=generator)
    share: Tensor = first / (first + second)
    return share.float()


def rotate_each(batch: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Turns each image of (n, channels, height, width) float by its own angle in [-degrees, degrees].

    Bilinear; what lies outside the image becomes 0. Images must be square.
    """
    angles = (torch.rand(len(batch), generator=generator) * 2 - 1) * math.radians(degrees)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = functional.affine_grid(to_device(theta, batch.device), list(batch.shape), align_corners=False)
    return functional.grid_sample(batch, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
