"""FactualVQA from the Hugging Face hub: its questions, and the image-search results published with them."""

from __future__ import annotations

import re
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from .episode import Hit, Observation, UserError
from .model import fetched
from .pickles import Inert, read_plain

FVQA, QUESTIONS, RESULTS = "lmms-lab/FVQA", "fvqa_train.parquet", "fvqa_train_image_search_results_cache.pkl"
TITLES, THUMBNAILS = "tool_returned_web_title_list", "tool_returned_images_urls"
MOST_PIXELS = 4096 * 4096  # of a thumbnail


def hub_file(name: str) -> tuple[str, str] | None:
    """(data set, file) that `owner/name` or `owner/name:FILE` means; None for what is a path."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+))?", name)
    if not match or Path(name).exists() or (not match[2] and Path(name).suffix in (".parquet", ".jsonl")):
        return None
    return match[1], match[2] or QUESTIONS


def fetched_file(repository: str, file: str) -> Path:
    """`file` of a data set of the hub, fetched unless it lies in the hub's cache. UserError where it cannot be."""
    instead = "--search none or replay:FILE" if file.endswith(".pkl") else "--data FILE.parquet"
    advice = f"check the name (no such path is here) and the network, or give {instead}"
    where = dict(repo_id=repository, filename=file, repo_type="dataset")
    return fetched("hf_hub_download", f"{file} of the data set {repository}", advice, **where)


def search_results(path: Path | str) -> dict[str, Observation]:
    """What FactualVQA's image searches gave, by example id, from the published pickle.

    A thumbnail is an address, which is not followed, or a pickled picture, which becomes a JPEG file. Raises UserError
    for a file that is missing, damaged or of another form, or that wants more than plain values and pictures.
    """
    try:
        return {str(key): _observation(entry) for key, entry in read_plain(path).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"[:100]
        raise UserError(f"{path}: not FVQA's image-search results ({what}); give another --search") from None


def _observation(entry: dict[str, Any]) -> Observation:
    hits = []
    for title, thumbnail in zip_longest(entry[TITLES] or (), entry[THUMBNAILS] or ()):
        if not isinstance(title, str | None):
            raise TypeError(f"a title is a {type(title).__name__}")
        hits.append(Hit(title or "", image=_jpeg(thumbnail.state) if isinstance(thumbnail, Inert) else None))
    return Observation(tuple(hits), source="fvqa", cached=True)


def _jpeg(state: Any) -> bytes | None:
    """A JPEG file of the picture whose state Pillow pickled; None where it is not one's: the title stays."""
    try:
        _, mode, (width, height), palette, pixels = state[:5]  # what follows differs between Pillow's versions
        if not 0 < width * height <= min(MOST_PIXELS, 8 * len(pixels)):  # Pillow allocates before it compares
            return None
        picture = Image.frombytes(mode, (width, height), pixels)
        if palette and mode in ("L", "LA", "P", "PA"):
            picture.putpalette(palette)
        file = BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=90)
        return file.getvalue()
    except Exception:  # Pillow's, about anything at all that a stranger wrote there
        return None
