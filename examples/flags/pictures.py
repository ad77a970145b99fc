"""Flags as pictures: of countries and made up, as a camera might see them.

S shots of H x W pixels, fp32 colours from 0 to 1. A shot is the flag shifted, turned, scaled and seen from the side,
before a background of one colour, in other light, with noise. No flag is mirrored: Ireland's is the Ivory Coast's.
"""

from __future__ import annotations

import io
import random
from typing import Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.flags.countries import Country

UNLIKE = 0.1  # mean difference of colours from which two flags are different ones
HEIGHT, WIDTH = 56, 112  # pixels of a shot: 2 x 4 image tokens
COLOURS = (
    (206, 17, 38),
    (0, 122, 61),
    (0, 56, 168),
    (252, 209, 22),
    (255, 255, 255),
    (0, 0, 0),
    (255, 130, 0),
    (117, 170, 219),
)


def flag(country: Country) -> np.ndarray:
    """A country's flag, (90, 180, 3) bytes."""
    return np.asarray(PIL.Image.open(country.picture).convert("RGB"))


def made_up(rng: random.Random) -> np.ndarray:
    """A flag of chance, (90, 180, 3) bytes: stripes, and perhaps a triangle, a disc, a cross or a corner."""
    height, width = 90, 180
    y, x = np.mgrid[0:height, 0:width]
    count = rng.choice((1, 2, 3, 3, 3, 4, 5))
    stripes = (y * count // height) if rng.random() < 0.6 else (x * count // width)
    colours = np.array([rng.choice(COLOURS) for _ in range(count)])
    picture = colours[stripes]  # (90, 180, 3)
    shapes = {
        "triangle": x < rng.uniform(50, 90) * (1 - abs(2 * y / height - 1)),
        "disc": np.hypot(x - rng.choice((50, 90, 130)), y - 45) < rng.uniform(12, 30),
        "cross": (abs(x - rng.choice((60, 90))) < 9) | (abs(y - 45) < 9),
        "corner": (x < width // 2.2) & (y < height // 2),
        "diagonal": abs(x / 2 - y) < rng.uniform(6, 16),
    }
    for name in rng.sample(sorted(shapes), rng.choice((0, 1, 1, 2))):
        picture = np.where(shapes[name][..., None], rng.choice(COLOURS), picture)
    return picture.astype(np.uint8)


def thumbnails(flags: Sequence[np.ndarray]) -> np.ndarray:
    """(flags, 9, 18, 3) colours from 0 to 1: means of squares of 10 pixels."""
    squares = np.stack(flags).reshape(-1, 9, 10, 18, 10, 3)
    return squares.mean((2, 4)) / 255


def of_no_country(rng: random.Random, real: np.ndarray) -> np.ndarray:
    """A made-up flag that is unlike each of the `real` ones, given as `thumbnails`."""
    while True:
        picture = made_up(rng)
        differences = abs(thumbnails([picture]) - real).mean((1, 2, 3))  # (flags,)
        if differences.min() > UNLIKE:
            return picture


def shots(flags: Sequence[np.ndarray], seed: int) -> Tensor:
    """A fresh shot of each of some flags: (S, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(flags), *shape, generator=generator)

    pixels = torch.from_numpy(np.stack(flags)).permute(0, 3, 1, 2) / 255  # (S, 3, 90, 180)
    # Where in the flag each pixel of the shot comes from. Coordinates go from -1 to 1; y is half as long as x.
    turn = between(-0.12, 0.12)
    grow = between(0.95, 1.25)
    cos, sin = grow * turn.cos(), grow * turn.sin()
    rows = [
        torch.stack([cos, -sin / 2 + between(-0.1, 0.1), between(-0.08, 0.08)], 1),
        torch.stack([2 * sin + between(-0.1, 0.1), cos, between(-0.12, 0.12)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [len(flags), 3, HEIGHT, WIDTH], align_corners=False)  # (S, H, W, 2)
    seen = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = (grid.abs().amax(-1) <= 1).float()[:, None]  # (S, 1, H, W)
    background = between(0, 1, 3, 1, 1)
    seen = seen * inside + background * (1 - inside)
    light = between(0.75, 1.1, 1, 1, 1) + between(-0.06, 0.06, 3, 1, 1)
    noise = 0.03 * torch.randn(seen.shape, generator=generator)
    return (seen * light + between(-0.05, 0.1, 1, 1, 1) + noise).clamp(0, 1)


def png(shot: Tensor) -> bytes:
    """A shot (3, H, W) as a picture file."""
    file = io.BytesIO()
    PIL.Image.fromarray(to_bytes(shot)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def to_bytes(shot: Tensor) -> np.ndarray:
    """(3, H, W) colours to (H, W, 3) bytes."""
    return (shot * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
