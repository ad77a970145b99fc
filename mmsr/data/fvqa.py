"""FactualVQA from the Hugging Face hub: its questions, and the image-search results published with them."""

from __future__ import annotations

import re
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from mmsr.data.pickles import Inert, read_plain
from mmsr.episode import Hit, Observation
from mmsr.pretrained.hub import Wanted, fetched
from mmsr.system.errors import UserError
from mmsr.system.images import to_rgb

FVQA, QUESTIONS, RESULTS = "lmms-lab/FVQA", "fvqa_train.parquet", "fvqa_train_image_search_results_cache.pkl"
TITLES, THUMBNAILS = "tool_returned_web_title_list", "tool_returned_images_urls"
DATA_ENDINGS = (".parquet", ".pq", ".jsonl", ".jsonlines", ".ndjson", ".json", ".csv", ".tsv")  # of paths, always
MOST_PIXELS = 4096 * 4096  # of a thumbnail
MOST_HITS = 1_000_000  # of all searches together; the published file has 25,000


def hub_file(name: str) -> tuple[str, str] | None:
    """(data set, file) of a hub name, `owner/name` or `owner/name:FILE`; None for a path."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+))?", name)
    if not match or Path(name).exists() or (not match[2] and Path(name).suffix.lower() in DATA_ENDINGS):
        return None
    return match[1], match[2] or QUESTIONS


def wanted(repository: str, *files: str) -> Wanted:
    """Files of a data set of the hub, and what may be given in their place."""
    instead = dict.fromkeys(
        "--search none or replay:FILE" if file.endswith(".pkl") else "--data FILE" for file in files
    )
    return Wanted(repository, files, "dataset", ", ".join(instead))


def fetched_file(repository: str, file: str) -> Path:
    """The path of a data set's file in the hub's cache, downloaded if needed. UserError where that fails."""
    advice = f"check the name (no such path is here), or give {wanted(repository, file).instead}"
    where = dict(repo_id=repository, filename=file, repo_type="dataset")
    return fetched("hf_hub_download", f"{file} of the data set {repository}", advice, **where)


def search_results(path: Path | str) -> dict[str, Observation]:
    """The results of FactualVQA's image searches, by example id, from the published pickle. A thumbnail is an address,
    which is not followed, or a pickled picture, which becomes a JPEG file. Raises UserError for a file that is missing,
    damaged or of another form, or that needs more than plain values and pictures."""
    found = read_plain(path)  # alive to the end of this function, because `pictures` is keyed by ids of its objects
    pictures: dict[int, bytes | None] = {}
    try:
        hits = sum(max(len(entry[TITLES] or ()), len(entry[THUMBNAILS] or ())) for entry in found.values())
        if hits > MOST_HITS:
            raise ValueError(f"over {MOST_HITS:,} results")
        return {str(key): _observation(entry, pictures) for key, entry in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"[:100]
        raise UserError(f"{path}: not FVQA's image-search results ({what}); give another --search") from None


def _observation(entry: dict[str, Any], pictures: dict[int, bytes | None]) -> Observation:
    """An entry's results. `pictures`: the JPEG files made so far, by the id() of their pixels, which hits may share."""
    hits = []
    for title, thumbnail in zip_longest(entry[TITLES] or (), entry[THUMBNAILS] or ()):
        if not isinstance(title, str | None):
            raise TypeError(f"a title is a {type(title).__name__}")
        hits.append(Hit(title or "", image=_picture(thumbnail.state, pictures) if type(thumbnail) is Inert else None))
    return Observation(tuple(hits), source="fvqa", cached=True)


def _picture(state: Any, pictures: dict[int, bytes | None]) -> bytes | None:
    """A JPEG file of the picture whose state Pillow pickled; None where the state is not that of a picture."""
    try:
        _, mode, (width, height), palette, pixels = state[:5]  # the rest differs between Pillow's versions
    except (TypeError, ValueError, IndexError):
        return None
    kinds = tuple(map(type, (mode, width, height, pixels)))
    if kinds != (str, int, int, bytes):
        return None
    if id(pixels) not in pictures:
        pictures[id(pixels)] = _jpeg(mode, (width, height), palette, pixels)
    return pictures[id(pixels)]


def _jpeg(mode: str, size: tuple[int, int], palette: Any, pixels: bytes) -> bytes | None:
    try:
        # Pillow allocates the picture before it compares its size with the number of bytes.
        if not 0 < size[0] * size[1] <= min(MOST_PIXELS, 8 * len(pixels)):
            return None
        picture = Image.frombytes(mode, size, pixels)
        if type(palette) is list and 0 < len(palette) <= 4 * 256 and mode in ("L", "LA", "P", "PA"):
            picture.putpalette(palette)
        file = BytesIO()
        to_rgb(picture).save(file, "JPEG", quality=90)
        return file.getvalue()
    except Exception:  # an untrusted file can make Pillow raise anything
        return None
