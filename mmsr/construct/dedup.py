"""When two names are the same, and when two pictures are nearly the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Iterable, Iterator

import numpy as np
import PIL.Image

from mmsr.search import bm25

NEAR = 8  # near-duplicates differ in at most 8 of 128 bits
BAND = 128 // (NEAR + 1)  # bits of a band


def normal(text: str) -> str:
    """The normal form of a name: its words without case, accents and punctuation."""
    return " ".join(bm25.words(text))


def says(text: str, phrase: str) -> bool:
    """Whether a text contains the words of a phrase, one after another."""
    return bool(normal(phrase)) and f" {normal(phrase)} " in f" {normal(text)} "


def short_id(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:12]


def difference_hash(picture: PIL.Image.Image) -> str:
    """32 hex digits, 128 bits: where a 9 x 9 thumbnail becomes brighter to the right, and where downwards."""
    thumbnail = picture.convert("L").resize((9, 9), PIL.Image.Resampling.LANCZOS)
    grey = np.asarray(thumbnail).astype(int)  # (9, 9)
    right = grey[:-1, 1:] > grey[:-1, :-1]  # (8, 8)
    down = grey[1:, :-1] > grey[:-1, :-1]  # (8, 8)
    return np.packbits([right, down]).tobytes().hex()


def near_duplicates(hashes: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of pictures that differ in at most `NEAR` bits.

    Of their NEAR + 1 bands of bits at least one is the same in both, so only pictures that share a band are compared.
    """
    codes: list[int] = []
    same_band: dict[tuple[int, int], list[int]] = defaultdict(list)  # pictures by number and bits of a band
    for later, text in enumerate(hashes):
        code = int(text, 16)
        neighbours: set[int] = set()
        bands = [(n, code >> n * BAND & (1 << BAND) - 1) for n in range(NEAR + 1)]
        for band in bands:
            neighbours.update(same_band[band])
            same_band[band].append(later)
        for earlier in sorted(neighbours):
            if (codes[earlier] ^ code).bit_count() <= NEAR:
                yield earlier, later
        codes.append(code)


def distinct(pictures: Iterable[dict]) -> Iterator[dict]:
    """The pictures without the later ones of near-duplicates. Reads `pictures` twice."""
    left_out: set[int] = set()
    for earlier, later in near_duplicates([picture["hash"] for picture in pictures]):
        if earlier not in left_out:
            left_out.add(later)
    return (picture for place, picture in enumerate(pictures) if place not in left_out)
