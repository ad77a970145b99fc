"""What a page says: from the search engine that knows it, or else from its address, with the guarded client.

A search engine that knows its pages has a method `read_page(address)`, which gives an observation: one hit with title,
address and text, or none where it does not know the address. What is read from the web is a stranger's HTML. Its text
is what a reader would see, roughly: no scripts, no styles, a line for each block.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from html.parser import HTMLParser
from typing import Any

from mmsr.episode import Hit, Observation
from mmsr.net.client import Client
from mmsr.net.http import Response, failure

HIDDEN = {"script", "style", "noscript", "template", "svg", "head"}  # elements whose text nobody sees
BLOCKS = set("address article aside blockquote br dd div dl dt figure footer form header hr li main nav ol p".split())
BLOCKS |= set("pre section table td th tr ul h1 h2 h3 h4 h5 h6".split())
CHARSET = re.compile(rb"charset\s*=\s*[\"']?([\w-]+)", re.IGNORECASE)
CHARACTERS = 100_000  # of a page's text, at most


def page_reader(backend: Any) -> Callable[[str], Observation]:
    """What reads a page for a run with this search engine. It raises ToolFailure where that fails."""
    return getattr(backend, "read_page", None) or read_from_web


def has_own_pages(backend: Any) -> bool:
    """Whether an engine gives pages that it holds, not the web's."""
    return getattr(backend, "own_pages", False)


def read_from_web(address: str) -> Observation:
    """The page at a public http or https address. Raises ToolFailure; "blocked" for an address inside a network."""
    answer = _client().fetch_public(address)
    title, text = page_text(answer)
    if not text:
        raise failure("format", f"{address}: no text on the page")
    return Observation((Hit(title, address, text),), source="web")


@cache
def _client() -> Client:
    return Client()


def page_text(answer: Response) -> tuple[str, str]:
    """Title and text of a page. Raises ToolFailure("format") for a picture, a PDF, or anything else that is no text."""
    kind = answer.headers.get("content-type", "text/html").lower()
    if not kind.startswith(("text/", "application/xhtml", "application/json")):
        raise failure("format", f"{answer.url}: {kind:.60}, not a page of text")
    html = answer.body.decode(_charset(answer), "replace")
    if "html" not in kind:
        return "", html.strip()[:CHARACTERS]
    reader = _Reader()
    reader.feed(html)
    reader.close()
    lines = [" ".join(line.split()) for line in "".join(reader.text).split("\n")]
    title = " ".join("".join(reader.title).split())
    return title, "\n".join(line for line in lines if line)[:CHARACTERS]


def _charset(answer: Response) -> str:
    """The encoding that the server or the page names, if Python knows it; else UTF-8."""
    for text in (answer.headers.get("content-type", "").encode(), answer.body[:2048]):
        found = CHARSET.search(text)
        if found:
            name = found[1].decode()
            with suppress(LookupError, UnicodeError):  # not known to Python, or no encoding of texts
                answer.body.decode(name, "replace")
                return name
    return "utf-8"


class _Reader(HTMLParser):
    """Collects the title and the visible text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title: list[str] = []
        self.text: list[str] = []
        self.hidden: list[str] = []  # the hidden elements that are open, the innermost last
        self.in_title = False

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.in_title = tag == "title" and not self.title  # icons have titles, too
        if tag == "body" or tag in BLOCKS:  # a head may end without a word
            self.hidden = [other for other in self.hidden if other != "head"]
        if tag in HIDDEN:
            self.hidden.append(tag)
        if tag in BLOCKS:
            self.text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.in_title = False
        if tag in self.hidden:
            del self.hidden[self.hidden.index(tag) :]
        if tag in BLOCKS:
            self.text.append("\n")

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title.append(data)
        elif not self.hidden:
            self.text.append(data)
