"""Find each photograph again by a cropped, turned, shrunk and re-compressed copy of it.

    python bench/image_index.py --images DIR                        # the built-in encoder, beside two simple ones
    python bench/image_index.py --images DIR --encoder hf:NAME

A copy keeps 60 to 95 % of the area at another aspect, is turned by up to 5 degrees (corners black), shrunk to 40 to
80 % and saved as JPEG of quality 30 to 75.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmsr.search.encoders import open_encoder


def photographs(folder: Path) -> list[PIL.Image.Image]:
    return [PIL.Image.open(file).convert("RGB") for file in sorted(folder.iterdir()) if file.suffix == ".jpg"]


def distort(picture: PIL.Image.Image, draw: random.Random) -> PIL.Image.Image:
    picture = picture.rotate(draw.uniform(-5, 5), PIL.Image.Resampling.BICUBIC)
    side, stretch, shrink = draw.uniform(0.6, 0.95) ** 0.5, draw.uniform(0.85, 1.18), draw.uniform(0.4, 0.8)
    width, height = picture.width * min(1, side * stretch), picture.height * min(1, side / stretch)
    left, top = draw.uniform(0, picture.width - width), draw.uniform(0, picture.height - height)
    box = (left, top, left + width, top + height)
    small = picture.resize((int(width * shrink), int(height * shrink)), PIL.Image.Resampling.BICUBIC, box)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=draw.randint(30, 75))
    return PIL.Image.open(file).convert("RGB")


def perceptual_hash(picture: PIL.Image.Image) -> np.ndarray:
    pixels = np.asarray(picture.convert("L").resize((32, 32), PIL.Image.Resampling.LANCZOS), dtype=np.float32)
    cosines = np.cos(np.pi * (2 * np.arange(32) + 1) * np.arange(8)[:, None] / 64)
    low = (cosines @ pixels @ cosines.T).ravel()
    return np.where(low > np.median(low[1:]), 1.0, -1.0)


def thumbnail(picture: PIL.Image.Image) -> np.ndarray:
    pixels = np.asarray(picture.resize((16, 16), PIL.Image.Resampling.BILINEAR), dtype=np.float32)
    return (pixels - pixels.mean((0, 1))).ravel()


def trial(encoder: str, pictures: list[PIL.Image.Image], seed: int = 0) -> dict:
    """Shares of pictures whose copy finds them first, and among the first five; milliseconds to encode and compare."""
    simple = {"perceptual hash": perceptual_hash, "16 x 16 thumbnail": thumbnail}.get(encoder)
    encode = open_encoder(encoder).encode if simple is None else lambda some: np.stack([simple(one) for one in some])
    index = np.concatenate([encode([picture]) for picture in pictures])
    index /= np.linalg.norm(index, axis=1, keepdims=True)
    copies = [distort(picture, random.Random(f"{seed}/{i}")) for i, picture in enumerate(pictures)]
    start = time.perf_counter()
    scores = np.stack([index @ encode([copy])[0] for copy in copies])  # (copies, pictures)
    milliseconds = (time.perf_counter() - start) / len(copies) * 1000
    rank = (scores > np.diag(scores)[:, None]).sum(1)
    return {"recall@1": (rank < 1).mean(), "recall@5": (rank < 5).mean(), "ms": milliseconds, "d": index.shape[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--encoder", action="append", default=None)
    args = parser.parse_args()
    pictures = photographs(args.images)
    print(f"{len(pictures)} photographs\n\n| encoder | d | recall@1 | recall@5 | ms a query |\n|---|---|---|---|---|")
    for encoder in args.encoder or ("perceptual hash", "16 x 16 thumbnail", "builtin"):
        row = trial(encoder, pictures)
        print(f"| {encoder} | {row['d']} | {row['recall@1']:.3f} | {row['recall@5']:.3f} | {row['ms']:.1f} |")


if __name__ == "__main__":
    main()
