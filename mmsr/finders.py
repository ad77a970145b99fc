"""Where the pictures of a new data set come from: photographs of one's own, the live web, or another search engine.

A finder is a `tools.Backend` that also has `pictures(concept)`. One without it may be handed to `construct.build` too:
then the pictures are taken that its text search shows.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, NamedTuple

from . import bm25
from .client import Client, web_address
from .episode import Hit, Observation, UserError, digest
from .files import json_object, lines
from .kept import key_of
from .likeness import normal
from .tools import Backend
from .web import Live
from .wire import failure

FOUND = 20  # pictures of a search that are looked at, at most


class Picture(NamedTuple):
    """A picture that is said to show a concept. What is not known is empty."""

    title: str = ""
    url: str = ""  # of the page it stands on
    text: str = ""  # of that page
    address: str = ""  # its own
    licence: str = ""
    image: bytes | None = None  # the encoded file; None: it is to be fetched from its address


def find_pictures(finder: Backend, concept: str) -> list[Picture]:
    """Candidates, the best first. Raises as a backend does."""
    if hasattr(finder, "pictures"):
        return finder.pictures(concept)[:FOUND]
    hits = finder.text_search(concept).hits
    return [Picture(hit.title, hit.url, hit.text, image=hit.image) for hit in hits if hit.image]


def open_finder(spec: str, spend: Callable[[str], None], client: Client) -> Backend:
    """`corpus:FILE.jsonl` or `live`: the search engines that find pictures by words. Raises UserError."""
    kind, _, where = spec.partition(":")
    if kind == "corpus":
        return Corpus(Path(where))
    if spec == "live":
        return Web(Live.from_environment(spend=spend, images=False, client=client))
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

    def image_search(self, image: bytes, question: str = "", address: str = "") -> Observation:
        found = self.by_content.get(digest(image), ())
        return Observation(tuple(Hit(line["title"], str(line.get("url", ""))) for line in found), source="corpus")

    @cached_property
    def by_content(self) -> dict[str, list[dict]]:
        found = defaultdict(list)
        for line in self.lines:
            found[digest(self._picture(line).image)].append(line)
        return found

    def text_search(self, query: str) -> Observation:
        ranked = bm25.rank(query, [f"{line['title']} {line.get('text', '')}" for line in self.lines])[:5]
        hits = (self._picture(self.lines[place]) for place, _ in ranked)
        return Observation(tuple(Hit(hit.title, hit.url, hit.text) for hit in hits), source="corpus")

    def _picture(self, line: dict[str, Any]) -> Picture:
        try:
            image = (self.folder / line["file"]).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.folder / line['file']}: cannot be read ({error.strerror}); correct the line"
            ) from None
        url, text, licence = (str(line.get(key, "")) for key in ("url", "text", "licence"))
        return Picture(line["title"], url, text or line["title"], line["file"], licence, image)


class Web:
    """The live web: pages as `web.Live` reads them, pictures through SerpApi's or Serper's search for images."""

    def __init__(self, live: Live):
        self.live = live
        self.image_search, self.text_search = live.image_search, live.text_search

    def pictures(self, concept: str) -> list[Picture]:
        service = self.live.engine
        request: tuple[str, str, dict[str, Any]]
        if service.name == "serpapi":
            params = {"engine": "google_images", "q": concept, "hl": "en", "gl": "us", "api_key": service.key}
            name, request = "images_results", ("GET", f"{service.url}/search", {"params": params})
        else:
            headers, body = {"X-API-KEY": service.key}, {"q": concept, "hl": "en", "gl": "us"}
            name, request = "images", ("POST", f"{service.url}/images", {"headers": headers, "json": body})
        method, url, content = request
        reply = self.live.client.request(service.name, method, url, tries=3, spend=self.live.spend, **content).json()
        listed = reply.get(name, [] if isinstance(reply.get("error"), str) else None)
        if not isinstance(listed, list):
            raise failure("format", f"{service.name}: no list {name} in the reply")
        found = [_web_picture(entry) for entry in listed if isinstance(entry, dict)]
        return [picture for picture in found if picture.address]


def _web_picture(entry: dict[str, Any]) -> Picture:
    title = entry.get("title") if isinstance(entry.get("title"), str) else ""
    address = web_address(entry.get("original")) or web_address(entry.get("imageUrl"))
    return Picture(title, web_address(entry.get("link")), "", address, web_address(entry.get("license_details_url")))
