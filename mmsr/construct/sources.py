"""Where the pictures of a new data set come from: photographs of one's own, or the live web.

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
    """A picture that is said to show a concept. What is not known is empty."""

    title: str = ""
    url: str = ""  # of the page it stands on
    text: str = ""  # of that page
    address: str = ""  # its own
    licence: str = ""
    image: bytes | None = None  # the encoded file; None: it is to be fetched from its address


def open_finder(spec: str, spend: Callable[[str], None], client: Client) -> Backend:
    """`corpus:FILE.jsonl` or `live`: the search engines that find pictures by words. Raises UserError."""
    kind, _, where = spec.partition(":")
    if kind == "corpus":
        return Corpus(Path(where))
    if spec == "live":
        return Web.from_environment(spend=spend, images=False, client=client)
    raise UserError(f"--search {spec}: finds no pictures by words; give corpus:FILE.jsonl or live")


class Corpus:
    """Pictures of one's own: lines {"file", "title"} and, where known, "url", "text", "licence"; files stand beside.

    Its image search knows the very files, its text search the titles and texts.
    """

    def __init__(self, path: Path):
        self.folder, self.lines, self.version = path.parent, [], ""
        self.by_title: dict[str, list[dict]] = defaultdict(list)
        for row, (_, text) in enumerate(lines(path)):
            line = json_object(path, row, text)
            if not all(isinstance(line.get(key), str) for key in ("file", "title")):
                raise UserError(f'{path}: row {row}: give {{"file", "title"}}, both texts')
            self.by_title[normal(line["title"])].append(line)
            self.lines.append(line)
            self.version = key_of(self.version, line)  # what was found in another corpus is not taken for this

    @property
    def titles(self) -> list[str]:
        return [line["title"] for line in self.lines]

    def pictures(self, concept: str) -> list[Picture]:
        return [self._picture(line) for line in self.by_title.get(normal(concept), ())]

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        found = self.by_content.get(_content(image), ())
        return Observation(tuple(Hit(line["title"], str(line.get("url") or "")) for line in found), source="corpus")

    @cached_property
    def by_content(self) -> dict[str, list[dict]]:
        found = defaultdict(list)
        for line in self.lines:
            found[_content(self._picture(line).image)].append(line)
        return found

    def text_search(self, query: str) -> Observation:
        ranked = bm25.rank(query, [f"{line['title']} {line.get('text') or ''}" for line in self.lines])[:5]
        hits = (self._picture(self.lines[place]) for place, _ in ranked)
        return Observation(tuple(Hit(hit.title, hit.url, hit.text) for hit in hits), source="corpus")

    def _picture(self, line: dict[str, Any]) -> Picture:
        try:
            image = (self.folder / line["file"]).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.folder / line['file']}: cannot be read ({error.strerror}); correct the line"
            ) from None
        url, text, licence = (str(line.get(key) or "") for key in ("url", "text", "licence"))
        return Picture(line["title"], url, text or line["title"], line["file"], licence, image)


def _content(image: bytes) -> str:
    """What a picture is known by: it is searched for as it is kept, without metadata."""
    try:
        return digest(without_metadata(image))
    except ValueError:
        return digest(image)


class Web(Live):
    """The live web: pages as `web.Live` reads them, pictures through SerpApi's or Serper's search for images."""

    def pictures(self, concept: str) -> list[Picture]:
        if self.engine.name == "serpapi":
            listed = self.serpapi("images_results", {"engine": "google_images", "q": concept, "gl": "us"})
        else:
            listed = self.serper("/images", {"q": concept, "gl": "us"}, "images")
        found = map(_web_picture, listed)
        return [picture for picture in found if picture.address]


def _web_picture(entry: dict[str, Any]) -> Picture:
    title = entry.get("title") if isinstance(entry.get("title"), str) else ""
    address = web_address(entry.get("original")) or web_address(entry.get("imageUrl"))
    return Picture(title, web_address(entry.get("link")), "", address, web_address(entry.get("license_details_url")))
