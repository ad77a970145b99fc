"""Where the pictures of a new data set come from: a folder of photographs, or the live web.

A finder is a `tools.Backend` that also has `pictures(concept)`, the best first.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, NamedTuple

from mmsr.construct.dedup import normal
from mmsr.episode import Hit, Observation, digest
from mmsr.net.client import Client, web_address
from mmsr.search import bm25
from mmsr.search.web import Live
from mmsr.system.errors import UserError
from mmsr.system.files import json_object, lines
from mmsr.system.images import without_metadata
from mmsr.system.journal import key_of
from mmsr.tools import Backend


class Picture(NamedTuple):
    """A picture that, by its title, shows a concept. Unknown fields are empty."""

    title: str = ""
    url: str = ""  # of its page
    text: str = ""  # of its page
    address: str = ""  # of the picture
    licence: str = ""
    image: bytes | None = None  # the encoded file; None: fetch it from its address


def open_finder(spec: str, spend: Callable[[str], None], client: Client) -> Backend:
    """The finder `corpus:FILE.jsonl` or `live`. Raises UserError for others, which cannot find pictures by words."""
    kind, _, where = spec.partition(":")
    if kind == "corpus":
        return Corpus(Path(where))
    if spec == "live":
        return Web.from_environment(spend=spend, images=False, client=client)
    raise UserError(f"--search {spec}: finds no pictures by words; give corpus:FILE.jsonl or live")


class Corpus:
    """Your own pictures: lines {"file", "title"} and, where known, "url", "text", "licence"; paths are relative to it.

    Its image search finds only the same files, its text search reads the titles and texts.
    """

    def __init__(self, path: Path):
        self.folder = path.parent
        self.lines: list[dict] = []
        self.version = ""  # changes with every line, so that what was found in another corpus is not reused for this
        self.by_title: dict[str, list[dict]] = defaultdict(list)
        for row, (_, text) in enumerate(lines(path)):
            line = json_object(path, row, text)
            if not all(isinstance(line.get(key), str) for key in ("file", "title")):
                raise UserError(f'{path}: row {row}: give {{"file", "title"}}, both texts')
            self.by_title[normal(line["title"])].append(line)
            self.lines.append(line)
            self.version = key_of(self.version, line)

    @property
    def titles(self) -> list[str]:
        return [line["title"] for line in self.lines]

    def pictures(self, concept: str) -> list[Picture]:
        return [self._picture(line) for line in self.by_title.get(normal(concept), ())]

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        same = self.by_content.get(_content(image), ())
        hits = tuple(Hit(line["title"], str(line.get("url") or "")) for line in same)
        return Observation(hits, source="corpus")

    @cached_property
    def by_content(self) -> dict[str, list[dict]]:
        found = defaultdict(list)
        for line in self.lines:
            found[_content(self._picture(line).image)].append(line)
        return found

    def text_search(self, query: str) -> Observation:
        texts = [f"{line['title']} {line.get('text') or ''}" for line in self.lines]
        hits = []
        for place, _ in bm25.rank(query, texts)[:5]:
            picture = self._picture(self.lines[place])
            hits.append(Hit(picture.title, picture.url, picture.text))
        return Observation(tuple(hits), source="corpus")

    def _picture(self, line: dict[str, Any]) -> Picture:
        file = self.folder / line["file"]
        try:
            image = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); correct the line") from None
        return Picture(
            title=line["title"],
            url=str(line.get("url") or ""),
            text=str(line.get("text") or line["title"]),
            address=line["file"],
            licence=str(line.get("licence") or ""),
            image=image,
        )


def _content(image: bytes) -> str:
    """The digest of a picture without its metadata, because searches send the kept file, which has none."""
    try:
        return digest(without_metadata(image))
    except ValueError:
        return digest(image)


class Web(Live):
    """The live web: pages as `web.Live` reads them, pictures from SerpApi's or Serper's image search."""

    def pictures(self, concept: str) -> list[Picture]:
        if self.engine.name == "serpapi":
            listed = self.serpapi("images_results", {"engine": "google_images", "q": concept, "gl": "us"})
        else:
            listed = self.serper("/images", {"q": concept, "gl": "us"}, "images")
        found = map(_web_picture, listed)
        return [picture for picture in found if picture.address]


def _web_picture(entry: dict[str, Any]) -> Picture:
    title = entry.get("title") if isinstance(entry.get("title"), str) else ""
    return Picture(
        title=title,
        url=web_address(entry.get("link")),
        address=web_address(entry.get("original")) or web_address(entry.get("imageUrl")),
        licence=web_address(entry.get("license_details_url")),
    )
