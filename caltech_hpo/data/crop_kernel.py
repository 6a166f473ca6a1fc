"""A Triton kernel that makes batches of images in a GPU's memory: cut, mirrored and normalised at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLORS = 3
ELEMENTS = 2048  # that a program makes: a few rows of a crop


@triton.jit(do_not_specialize=["images"])
def _normalized_crops(
    pixels, drawn, mean, std, output, images, crop, COLORS: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    image = tl.program_id(0)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    there = element < crop * crop * COLORS
    color, pixel = element % COLORS, element // COLORS
    x = pixel % crop
    first, width = tl.load(drawn + image), tl.load(drawn + images + image)
    x = tl.where(tl.load(drawn + 2 * images + image) != 0, crop - 1 - x, x)
    place = (first + pixel // crop * width + x) * COLORS + color
    level = tl.load(pixels + place, there, 0).to(tl.float32)
    level = tl.div_rn(level - tl.load(mean + color), tl.load(std + color))
    place = image.to(tl.int64) * crop * crop * COLORS + element
    tl.store(output + place, level.to(output.dtype.element_ty), there)


def normalized_crops(
    pixels: Tensor, drawn: Tensor, crop: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Square crops (n, 3, crop, crop) of `dtype`, channels_last, of `pixels` (all pixels, 3) uint8.

    `drawn` (3, n) int64, on the device as all else: each crop's first row of `pixels`, its image's width, and
    whether it is mirrored. `mean` and `std` (3,) float32 are in pixel levels, 0 to 255.
    """
    images = drawn.shape[1]
    output = torch.empty((images, crop, crop, COLORS), dtype=dtype, device=pixels.device)
    with torch.cuda.device_of(pixels):
        _normalized_crops[images, triton.cdiv(crop * crop * COLORS, ELEMENTS)](
            pixels, drawn, mean, std, output, images, crop, COLORS=COLORS, ELEMENTS=ELEMENTS
        )
    return output.permute(0, 3, 1, 2)


def try_kernel(device: torch.device) -> None:
    """Makes a crop of one pixel. Raises whatever prevents it."""
    pixels = torch.zeros((1, COLORS), dtype=torch.uint8, device=device)
    drawn = torch.zeros((3, 1), dtype=torch.int64, device=device)
    levels = torch.ones(COLORS, device=device)
    normalized_crops(pixels, drawn, 1, levels, levels, torch.bfloat16)
    torch.cuda.synchronize(device)
