"""Search on the live web, and on search servers of others.

`Live` finds pictures with Google Lens (of SerpApi, or of Serper for pictures with an address) and pages with SerpApi or
Serper. It reads the pages with Jina Reader, and has them summarised by an OpenAI-compatible server or, where there is
none, takes their best passages by BM25. `Remote` asks a server that speaks Search-R1's protocol, such as `serve.py`.

Traps. SerpApi answers 200 with an `error` where it found nothing. Lens takes no `data:` address, so a picture is
uploaded, as a JPEG of at most 500 KB. Jina Reader sends JSON only where Accept is exactly that, and sends an error page
like any page, but with a warning. Any field of any reply may be missing or of another type. Only a clear statement of
the server counts as "nothing found"; a reply that is not understood is a failure, because results are recorded.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import textwrap
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Mapping
from urllib.parse import urlsplit

from mmsr.episode import Hit, Observation
from mmsr.net.client import FATAL, Client, host_of, join_url, web_address
from mmsr.net.completions import ChatServer
from mmsr.net.http import environment_key, failure, proxy_for
from mmsr.net.server_errors import error_text, json_or_none, status_in_body
from mmsr.search import bm25
from mmsr.system.credentials import server_address
from mmsr.system.errors import UserError
from mmsr.system.images import decode, jpeg, thumbnail, without_metadata
from mmsr.system.progress import say
from mmsr.tools import ToolFailure

PROMPTS = Path(__file__).parents[1] / "prompts" / "search"
SERVICES = {
    "serpapi": "https://serpapi.com",
    "serper": "https://google.serper.dev",
    "jina": "https://r.jina.ai",
    "openai": "https://api.openai.com",
}
READERS = ("jina", "openai")  # needed by every search for pages: without them the pages cannot be used
SUMMARIZER = "gpt-4o-mini"  # the model where OPENAI_MODEL is not set
UPLOAD_BYTES, UPLOAD_SIDE = 500_000, 1600
PAGE_CHARACTERS = 30_000  # of a page that are read
SUMMARY_TOKENS, SUMMARY_CHARACTERS = 400, 2_000
UPLOAD_SECONDS, SEARCH_SECONDS, PAGE_SECONDS, SUMMARY_SECONDS = 30.0, 90.0, 60.0, 90.0
MORE_SECONDS = 60.0  # after this time no further pages are started
LONGEST = UPLOAD_SECONDS + SEARCH_SECONDS + MORE_SECONDS + PAGE_SECONDS + SUMMARY_SECONDS  # of a whole search
WORKERS = 320  # five pages for each thread of a toolbox
PASSAGES, PASSAGE_CHARACTERS = 3, 500
REMOTE_CHARACTERS = 8_000  # of a remote server's document
LISTS = tuple("result results documents docs passages hits data".split())  # keys of its list of results
DOCUMENTS = tuple("contents content text passage page_content snippet body chunk paragraph".split())  # of a text
MATCHES = ("title", "url", "link", "text", "thumbnail")  # keys of an entry that an image search found, all optional
FOUND, TITLE_CHARACTERS = 20, 300  # entries of a search engine's list that are read, at most
NOTHING_FOUND = re.compile(r"(n't|not) (return|match|find|found)(ed)? any|no results|fully empty", re.IGNORECASE)
ERROR_PAGE = re.compile(r"returned error|captcha", re.IGNORECASE)  # in the reader's warning about a page


@dataclass(frozen=True)
class Service:
    name: str
    url: str  # without a slash at its end
    key: str  # "" for none

    @staticmethod
    def from_environment(name: str, environ: Mapping[str, str]) -> Service:
        """Key and address from NAME_API_KEY and NAME_BASE_URL. Raises UserError for malformed ones."""
        variable = name.upper()
        key = environment_key(f"{variable}_API_KEY", environ)
        given = environ.get(f"{variable}_BASE_URL", "").strip() or SERVICES[name]
        url = server_address(given, f"{variable}_BASE_URL=", f"{variable}_API_KEY")
        proxy_for(url)  # raises here, not only at the first search
        if name != "openai" and set("?#") & set(url):
            raise UserError(f"{variable}_BASE_URL: ends in a query, but paths are appended; give the part before it")
        return Service(name, url.rstrip("/"), key)


@dataclass(frozen=True)
class Found:
    """One entry of a search engine's list."""

    title: str
    link: str
    thumbnail: str  # the address


class Live:
    """The web as a search back-end. `form` is what an image search returns: "thumbnails", titles and pictures of the
    `results` best matches, or "summary", what their pages say about the question. `spend(provider)` is called before
    every paid request and raises ToolFailure("budget") when nothing is left. A search takes at most LONGEST seconds.
    `counts` says how many pages and thumbnails were fetched, and how many failed."""

    def __init__(
        self,
        services: Mapping[str, Service],
        client: Client,
        form: str,
        results: int,
        summarizer: ChatServer | None,
        spend: Callable[[str], None],
    ):
        self.services, self.client, self.form, self.results = services, client, form, results
        self.summarizer, self.spend = summarizer, spend
        self.engine = services["serpapi" if services["serpapi"].key else "serper"]
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="page")
        self._prompts = {name: (PROMPTS / f"{name}.txt").read_text(encoding="utf-8") for name in ("text", "image")}

    @classmethod
    def from_environment(
        cls,
        form: str = "thumbnails",
        results: int = 5,
        spend: Callable[[str], None] = lambda provider: None,
        images: bool = True,
        environ: Mapping[str, str] = os.environ,
        client: Client | None = None,
    ) -> Live:
        """With the keys of the environment. `images`: pictures without an address will be searched for. Raises
        UserError with the name of the variable where a key is missing."""
        services = {name: Service.from_environment(name, environ) for name in SERVICES}
        if not services["serpapi"].key and not services["serper"].key:
            raise UserError("--search live: neither SERPAPI_API_KEY nor SERPER_API_KEY is set; export one of them")
        if images and not services["serpapi"].key:
            what = "SERPAPI_API_KEY is not set, and Serper finds pictures by their addresses only"
            raise UserError(f"--search live: {what}; export it, or name the column of addresses: --columns address=…")
        client = client or Client()
        openai = services["openai"]
        summarizer = None
        if openai.key or environ.get("OPENAI_BASE_URL"):
            model = environ.get("OPENAI_MODEL") or SUMMARIZER
            summarizer = ChatServer(openai.url, model, openai.key, client, SUMMARY_SECONDS, spend, "openai")
        return cls(services, client, form, results, summarizer, spend)

    # ---- the two searches

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        """By the picture's address; where it has none, or it gives nothing, by an upload, which only SerpApi takes."""
        if self.form == "summary":
            self.client.check(*READERS)
        can_upload = bool(self.services["serpapi"].key)
        found: list[Found] = []
        if web_address(image_url):
            found = self._lens_address(image_url) if can_upload else _found(self.serper("/lens", {"url": image_url}))
        elif not can_upload:
            raise failure("auth", "SERPAPI_API_KEY is not set, and Serper needs an address, which this picture lacks")
        if can_upload and not found:
            found = self._lens({"image_id": self._upload(image)})
        hits = self._pages(found, question, "image") if self.form == "summary" else self._thumbnails(found)
        return Observation(hits, source=self.engine.name)

    def text_search(self, query: str) -> Observation:
        self.client.check(*READERS)
        if self.engine.name == "serpapi":
            listed = self.serpapi("organic_results", {"engine": "google", "q": query, "gl": "us", "num": "10"})
        else:
            listed = self.serper("/search", {"q": query, "gl": "us", "num": 10})
        return Observation(self._pages(_found(listed), query, "text"), source=self.engine.name)

    def read_page(self, address: str) -> Observation:
        """A page by Jina Reader, which costs what it costs in a text search. Raises ToolFailure."""
        self.client.check("jina")
        link = web_address(address)  # as those of a text search: another could reach other paths of the reader's server
        if not link:
            raise failure("blocked", f"not a plain http or https address: {address:.100}")
        title, text = self._read(link)
        return Observation((Hit(title, address, text),), source="jina")

    # ---- search engines

    def _upload(self, image: bytes) -> str:
        try:
            small = jpeg(decode(image), UPLOAD_SIDE, UPLOAD_BYTES)
        except ValueError as error:
            raise failure("format", str(error)) from None
        service = self.services["serpapi"]
        files = {"image": ("image.jpg", small, "image/jpeg")}
        form: dict[str, Any] = {"files": files, "data": {"api_key": service.key}, "seconds": UPLOAD_SECONDS, "tries": 3}
        name = self.client.request(service.name, "POST", f"{service.url}/image", **form).json().get("image_id")
        if isinstance(name, str) and name:
            return name
        raise failure("format", "serpapi: no image_id for an uploaded picture")

    def _lens(self, params: dict[str, str]) -> list[Found]:
        kind = {"engine": "google_lens", "type": "visual_matches", "country": "us"}
        return _found(self.serpapi("visual_matches", params | kind))

    def _lens_address(self, address: str) -> list[Found]:
        """Empty where the answer is not understood: an upload may still succeed."""
        try:
            return self._lens({"url": address})
        except ToolFailure as error:
            if error.kind != "format":
                raise
            return []

    def serpapi(self, name: str, params: dict[str, str]) -> list[dict]:
        """The entries of the list `name` in SerpApi's reply."""
        service = self.services["serpapi"]
        return self._list(service, name, "GET", "/search", params=params | {"hl": "en", "api_key": service.key})

    def serper(self, path: str, body: dict[str, Any], name: str = "organic") -> list[dict]:
        """The entries of the list `name` in Serper's reply."""
        service = self.services["serper"]
        body = body | {"hl": "en"}
        return self._list(service, name, "POST", path, headers={"X-API-KEY": service.key}, json=body)

    def _list(self, service: Service, name: str, method: str, path: str, **content: Any) -> list[dict]:
        """The first FOUND entries; empty where the engine says that it found nothing. Else ToolFailure("format")."""
        content |= {"seconds": SEARCH_SECONDS, "tries": 3, "spend": self.spend, "status_of": _search_status}
        reply = self.client.request(service.name, method, service.url + path, **content).json()
        listed = reply.get(name)
        if listed is None and _found_nothing(reply):
            return []
        entries = []
        if isinstance(listed, list):
            entries = [entry for entry in listed[:FOUND] if isinstance(entry, dict)]
        if listed != [] and not entries:
            raise failure("format", f"{service.name}: no {name} in the reply; {_shape(reply)}")
        return entries

    # ---- the pages and thumbnails of results

    def _thumbnails(self, found: list[Found]) -> tuple[Hit, ...]:
        found = found[: self.results]
        images = self._pool.map(self._thumbnail, found)
        return tuple(Hit(entry.title, entry.link, image=image) for entry, image in zip(found, images))

    def _thumbnail(self, entry: Found) -> bytes | None:
        try:
            image = thumbnail(self.client.fetch_public(entry.thumbnail, seconds=10).body)
        except (ToolFailure, ValueError) as error:
            image = None
            if not self.counts["thumbnails_failed"]:
                say(f"a thumbnail is missing: {str(error):.300}; such are left out", sys.stderr)
        self._count("thumbnails" if image else "thumbnails_failed")
        return image

    def _pages(self, found: list[Found], query: str, prompt: str) -> tuple[Hit, ...]:
        """Texts of the first `results` readable pages. Raises the first ToolFailure where all pages failed."""
        waiting = iter({entry.link: entry for entry in found if entry.link}.values())  # each page once
        hits: list[Hit] = []
        failures: list[ToolFailure] = []
        end = self.client.clock() + MORE_SECONDS
        while batch := list(islice(waiting, self.results - len(hits))):
            for page in self._pool.map(partial(self._page, query=query, prompt=prompt), batch):
                if isinstance(page, Hit):
                    hits.append(page)
                else:
                    failures.append(page)
            hopeless = any(error.kind in (*FATAL, "budget", "breaker") for error in failures)
            if hopeless or self.client.clock() > end:
                break
        if failures and not hits:
            raise failure(failures[0].kind, f"none of {len(failures)} pages could be read: {failures[0].message}")
        return tuple(hits)

    def _page(self, entry: Found, query: str, prompt: str) -> Hit | ToolFailure:
        try:
            title, page = self._read(entry.link)
            text = self._digest(query, title or entry.title, page, prompt)
            seen = Hit(entry.title or title, entry.link, text)
        except ToolFailure as error:
            seen = error
        self._count("pages" if isinstance(seen, Hit) else "pages_failed")
        return seen

    def _read(self, link: str) -> tuple[str, str]:
        """Title and text of a page, from Jina Reader."""
        service = self.services["jina"]
        headers = {"Accept": "application/json", "X-Retain-Images": "none"}
        if service.key:
            headers["Authorization"] = f"Bearer {service.key}"
        content: dict[str, Any] = {"headers": headers, "seconds": PAGE_SECONDS, "tries": 2, "status_of": status_in_body}
        if service.key:
            content["spend"] = self.spend
        # As part of a path, a link with these characters would change its meaning.
        if "#" in link or re.search(r"\\|%5c|%2f", urlsplit(link).path, re.IGNORECASE):
            answer = self.client.request(service.name, "POST", f"{service.url}/", data={"url": link}, **content)
        else:
            answer = self.client.request(service.name, "GET", f"{service.url}/{link}", **content)
        data = answer.json().get("data")
        if not isinstance(data, dict):
            data = {}
        text = _text(data.get("content"))
        warning = _text(data.get("warning"))
        if ERROR_PAGE.search(warning):
            raise failure("status", f"jina: {link}: {warning}")
        if not text.strip():
            raise failure("format", f"jina: no text of {link}: {error_text(answer.body)}")
        return _text(data.get("title")), text[:PAGE_CHARACTERS]

    def _digest(self, query: str, title: str, page: str, prompt: str) -> str:
        if self.summarizer is None:
            return passages(query, page)
        fields = {"query": query, "title": title, "page": page}
        content = re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], self._prompts[prompt])
        summary = self.summarizer.complete([{"role": "user", "content": content}], SUMMARY_TOKENS)
        return _text(summary[:SUMMARY_CHARACTERS])

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def passages(query: str, page: str) -> str:
    """The PASSAGES parts of a page that match the query best, in the page's order; its beginning if none matches."""
    parts = textwrap.wrap(" ".join(page.split()), PASSAGE_CHARACTERS)
    best = sorted(index for index, _ in bm25.rank(query, parts)[:PASSAGES])
    return " … ".join(parts[index] for index in best or [0])


def _search_status(reply: dict[str, Any]) -> int:
    """As `status_in_body`; SerpApi also reports whether the search was made."""
    metadata = reply.get("search_metadata")
    state = metadata.get("status") if isinstance(metadata, dict) else None
    status = status_in_body(reply)
    return 503 if status == 200 and state in ("Error", "Processing", "Queued") else status


def _found_nothing(reply: dict[str, Any]) -> bool:
    """Whether a search engine says that it has no results: in `error`, or in a value of `search_information`."""
    information = reply.get("search_information")
    messages = [reply.get("error")]
    if isinstance(information, dict):
        messages += information.values()
    return any(isinstance(message, str) and NOTHING_FOUND.search(message) for message in messages)


def _found(listed: list[dict]) -> list[Found]:
    """The usable entries of a search engine. Raises ToolFailure where there are entries, but no usable ones."""
    found = []
    for entry in listed:
        title = _text(entry.get("title"))[:TITLE_CHARACTERS]
        link = web_address(entry.get("link"))
        if title or link:
            picture = web_address(_text(entry.get("thumbnail")) or entry.get("thumbnailUrl"))
            found.append(Found(title, link, picture))
    if listed and not found:
        raise failure("format", f"results without title and link; {_shape(listed[0])}")
    return found


def _shape(value: object) -> str:
    """A value's type or keys, in words, for a message about an unexpected reply."""
    if not isinstance(value, dict):
        return f"it is a {type(value).__name__}"
    return f"it has {', '.join(list(value)[:12]) or 'no keys'}"


def _text(value: object) -> str:
    """Valid UTF-8 from a field of any type; "" where it is not text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


# ---- a search server of others


class Remote:
    """Any server of Search-R1's protocol: POST /retrieve and, where it has that, POST /image_search. Servers agree on
    little more than these paths: documents have several names, with or without scores."""

    def __init__(self, url: str, client: Client | None = None, results: int = 5):
        parts = urlsplit(server_address(url, "--search remote:"))
        self.url = parts._replace(path=parts.path.rstrip("/").removesuffix("/retrieve")).geturl()
        proxy_for(self.url)  # raises here, not only at the first search
        self.client, self.results, self.name = client or Client(), results, host_of(self.url)

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        try:
            image = without_metadata(image)
        except ValueError as error:
            raise failure("format", str(error)) from None
        body = {"image": base64.b64encode(image).decode(), "topk": self.results, "question": question}
        reply, listed = self._ask("/image_search", body)
        return self._seen(reply, listed, _remote_match)

    def text_search(self, query: str) -> Observation:
        reply, listed = self._ask("/retrieve", {"queries": [query], "topk": self.results, "return_scores": True})
        if len(listed) == 1 and isinstance(listed[0], list):
            return self._seen(reply, listed[0], _remote_document)
        if listed and all(not isinstance(entry, list) or _pair(entry) for entry in listed):  # documents, not a list
            return self._seen(reply, listed, _remote_document)
        raise failure("format", f"{self.name}: not one list of documents for one query")

    def _ask(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """The reply, and the list in it."""
        content: dict[str, Any] = {"json": body, "seconds": 120, "tries": 3, "status_of": status_in_body}
        answer = self.client.request(self.name, "POST", join_url(self.url, path), **content)
        value = json_or_none(answer.body)
        reply = {"result": value} if isinstance(value, list) else answer.json()
        for name in LISTS:
            if isinstance(reply.get(name), list):
                return reply, reply[name]
        self._check_error(reply)
        message = _text(reply.get("message")) or _text(reply.get("msg"))
        raise failure("format", f"{self.name}{path}: no list of results in the reply; {_shape(reply)} {message}")

    def _seen(self, reply: dict[str, Any], entries: list[Any], read: Callable[[Any], Hit | None]) -> Observation:
        """The hits that `read` makes of the entries. Raises ToolFailure where none of the entries is understood."""
        usable = (hit for hit in map(read, entries) if hit and (hit.title or hit.text or hit.image))
        hits = tuple(islice(usable, self.results))
        if not hits:
            self._check_error(reply)
            if entries and not any(map(read, entries)):
                raise failure("format", f"{self.name}: no document is understood; the first: {_shape(entries[0])}")
        return Observation(hits, source=self.name)

    def _check_error(self, reply: dict[str, Any]) -> None:
        if error := reply.get("error") or reply.get("errors") or reply.get("detail"):
            raise failure("format", f"{self.name}: {error_text(json.dumps({'error': error}).encode())}")


def _remote_match(entry: object) -> Hit | None:
    """A hit of an image search; None for any other value."""
    if not isinstance(entry, dict) or not any(isinstance(entry.get(name), str) for name in MATCHES):
        return None
    try:
        image = thumbnail(base64.b64decode(entry["thumbnail"], validate=True))
    except (KeyError, TypeError, ValueError):
        image = None
    title = _text(entry.get("title"))[:TITLE_CHARACTERS]
    text = _text(entry.get("text"))[:REMOTE_CHARACTERS]
    url = _text(entry.get("url")) or _text(entry.get("link"))  # our own server says both, others one of them
    return Hit(title, url, text, image, score=_number(entry.get("score")))


def _remote_document(entry: Any) -> Hit | None:
    """A document: an object or a text, alone, in a pair with its score, or under `document` beside its score. None for
    any other value. Search-R1's `contents` are a quoted title, a line end and the text."""
    score = entry.get("score") if isinstance(entry, dict) else None
    if pair := _pair(entry):
        entry, score = pair
    if isinstance(entry, dict) and isinstance(entry.get("document"), (dict, str)):
        entry = entry["document"]
    if isinstance(entry, str):
        entry = {"content": entry}
    if not isinstance(entry, dict):
        return None
    if not any(isinstance(entry.get(name), str) for name in ("title", *DOCUMENTS)):
        return None
    name = next((name for name in DOCUMENTS if _text(entry.get(name))), "")
    title = _text(entry.get("title"))
    text = _text(entry.get(name))
    head, line_end, body = text.partition("\n")
    if line_end and (name == "contents" or re.fullmatch(r'\s*".*"\s*', head)):
        title = head.strip().strip('"') or title
        text = body
    url = web_address(entry.get("url")) or web_address(entry.get("link")) or web_address(entry.get("id"))
    return Hit(title[:TITLE_CHARACTERS], url, text[:REMOTE_CHARACTERS], score=_number(score))


def _pair(entry: Any) -> tuple[Any, float] | None:
    """A document and its score, in either order."""
    if not isinstance(entry, list) or len(entry) != 2:
        return None
    first, second = _number(entry[0]), _number(entry[1])
    if (first is None) == (second is None):
        return None
    return (entry[0], second) if first is None else (entry[1], first)


def _number(value: Any) -> float | None:
    """A finite number; None for any other value (a comparison with NaN is false)."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None
