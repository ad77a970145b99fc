"""What two names, and what two pictures, have in common."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Iterable, Iterator

import numpy as np
import PIL.Image

from mmsr.search import bm25

NEAR = 8  # of 128 bits: near-duplicates differ in so many at most
BAND = 128 // (NEAR + 1)  # bits that are looked up together


def normal(text: str) -> str:
    """What two ways to write a name have in common: words without case, accents and punctuation."""
    return " ".join(bm25.words(text))


def says(text: str, phrase: str) -> bool:
    return bool(normal(phrase)) and f" {normal(phrase)} " in f" {normal(text)} "


def short_id(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:12]


def difference_hash(picture: PIL.Image.Image) -> str:
    """32 hex digits: where a 9 x 9 thumbnail gets brighter to the right, and where downwards."""
    grey = np.asarray(picture.convert("L").resize((9, 9), PIL.Image.Resampling.LANCZOS)).astype(int)
    right, down = grey[:-1, 1:] > grey[:-1, :-1], grey[1:, :-1] > grey[:-1, :-1]
    return np.packbits([right, down]).tobytes().hex()


def near_duplicates(hashes: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of pictures that differ in at most `NEAR` bits.

    Of NEAR + 1 stretches of bits at least one is then the same in both, so only those that share one are compared.
    """
    codes: list[int] = []
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for later, code in enumerate(int(text, 16) for text in hashes):
        stretches = [alike[n, code >> n * BAND & (1 << BAND) - 1] for n in range(NEAR + 1)]
        for earlier in sorted({place for stretch in stretches for place in stretch}):
            if (codes[earlier] ^ code).bit_count() <= NEAR:
                yield earlier, later
        codes.append(code)
        for stretch in stretches:
            stretch.append(later)


def distinct(pictures: Iterable[dict]) -> Iterator[dict]:
    """Without the later ones of near-duplicates. Goes through `pictures` twice."""
    gone: set[int] = set()
    for earlier, later in near_duplicates([one["hash"] for one in pictures]):
        if earlier not in gone:
            gone.add(later)
    return (one for place, one in enumerate(pictures) if place not in gone)
