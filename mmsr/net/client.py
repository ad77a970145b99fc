"""Guarded HTTP: what strangers' servers may do to a run, bounded here.

`Client.request` speaks to a configured service: a deadline for the whole call, a cap on decoded bytes, retries, a
circuit breaker per provider. `Client.fetch_public` reads addresses that came from data or from web pages, and connects
to nothing but public ones. Whatever goes wrong is a `ToolFailure` of one of the kinds timeout, network, status, rate,
auth, credits, forbidden, too-large, format, blocked, breaker, budget.
"""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Callable, cast
from urllib.parse import unquote, urljoin, urlsplit

from mmsr.net.http import Response, Unsent, failure, public_authorities, require_public, send_request
from mmsr.net.server_errors import error_text, failure_kind, json_or_none
from mmsr.system.credentials import hidden
from mmsr.tools import ToolFailure

BODY_BYTES = 8 * 2**20  # decoded, by default
HOPS = 5  # redirects followed
RETRY_AFTER = 60.0  # seconds: what a server may ask for at most
BACKOFF = 16.0  # seconds: the longest pause of our own
BREAKER_FAILURES, BREAKER_SECONDS = 8, 30.0
FATAL = ("auth", "credits")  # no call of this provider can succeed any more
CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
StatusOf = Callable[[dict[str, Any]], int]  # the status that a reply stands for, whatever it was sent with


# ---- calls


class Refusal(ToolFailure):
    """A server's refusal. `body` is all that it said: the message is one short line of that."""

    body = b""


@dataclass
class _Provider:
    failures: int = 0  # in a row
    open_until: float = 0.0
    stopped: ToolFailure | None = None  # for the rest of the process


class Client:
    """Calls in any number of threads; a provider that refuses the key or is out of credits is called no more.

    `clock`, `sleep`, `jitter` and `resolve` are there to be replaced by tests.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
        resolve: Callable = socket.getaddrinfo,
    ):
        self.clock, self.sleep, self.jitter, self.resolve = clock, sleep, jitter, resolve
        self.tls = public_authorities()
        self._providers: dict[str, _Provider] = defaultdict(_Provider)
        self._lock = threading.Lock()

    def request(
        self,
        provider: str,
        method: str,
        url: str,
        *,
        seconds: float = 90.0,
        tries: int = 4,
        limit: int = BODY_BYTES,
        spend: Callable[[str], None] | None = None,
        status_of: StatusOf | None = None,
        **content: Any,
    ) -> Response:
        """The reply (2xx) of a configured service. `content` is what requests.Request takes: params, headers, json, …

        All tries and the pauses between them take at most `seconds`; each try gets an even share of what is left.
        `spend(provider)` is called before every try that may have to be paid: the first, and one after a try of which
        nobody knows whether it was charged. `status_of` gives the status that the JSON object of a 2xx reply stands for
        (`status_in_body`): one of 400 and more is treated as if it had been sent. Redirects are not followed. Raises
        ToolFailure, Refusal where the server has answered.
        """

        def attempt(share: float) -> Response | ToolFailure:
            return send_request(method, url, seconds=share, limit=limit, tls=self.tls, resolve=self.resolve, **content)

        return self._persist(provider, attempt, seconds, tries, spend, status_of)

    def fetch_public(self, url: str, *, seconds: float = 20.0, tries: int = 2) -> Response:
        """What is at a stranger's address (http or https), redirects followed. Raises ToolFailure, "blocked" for an
        address that is, or leads to, anything but a public one."""
        return self._persist("", lambda share: self._follow(url, share), seconds, tries, None)

    def _follow(self, url: str, seconds: float) -> Response | ToolFailure:
        end, location = time.monotonic() + seconds, url
        for _ in range(HOPS + 1):
            url = web_address(location, url)
            if not url:
                return failure("blocked", f"not a plain http or https address: {location!s:.100}")
            answer = send_request(
                "GET", url, seconds=end - time.monotonic(), limit=BODY_BYTES, tls=self.tls, resolve=self.resolve,
                check=require_public,
            )  # fmt: skip
            if not isinstance(answer, Response) or answer.status not in (301, 302, 303, 307, 308):
                return answer
            location = answer.headers.get("location")
            if location is None:
                return answer
        return failure("blocked", f"more than {HOPS} redirects")

    def _persist(
        self,
        provider: str,
        attempt: Callable[[float], Response | ToolFailure],
        seconds: float,
        tries: int,
        spend: Callable[[str], None] | None,
        status_of: StatusOf | None = None,
    ) -> Response:
        """Try until there is a good reply, a lasting failure, or no time. `provider` "" is nobody's: no breaker."""
        end, reserved = self.clock() + seconds, False
        for left in range(tries, 0, -1):
            self._admit(provider)
            if spend and not reserved:
                spend(provider)
            answer = attempt((end - self.clock()) / left)
            refused, transient = _verdict(provider, answer, status_of)
            self._note(provider, refused, transient)
            if refused is None:
                return cast(Response, answer)  # a failure is always refused
            pause = self.jitter() * min(BACKOFF, 2.0 ** (tries - left))
            if isinstance(answer, Response):
                pause = max(pause, _retry_after(answer.headers.get("retry-after", "")))
            if not transient or left == 1 or self.clock() + pause >= end:
                raise refused
            reserved = isinstance(answer, (Response, Unsent))  # refused or never sent: the next try may have its money
            self.sleep(pause)
        raise ValueError("tries must be 1 or more")

    # ---- the breaker

    def check(self, *providers: str) -> None:
        """Raise the ToolFailure that stopped one of them: what is of no use without them need not be paid for."""
        for provider in providers:
            stopped = self._providers[provider].stopped
            if stopped is not None:
                raise ToolFailure(stopped.kind, stopped.message)  # a fresh one: tracebacks would pile up

    def _admit(self, provider: str) -> None:
        with self._lock:
            self.check(provider)
            state = self._providers[provider]
            if state.failures >= BREAKER_FAILURES:
                if self.clock() < state.open_until:
                    raise failure("breaker", f"{provider} failed {state.failures} times in a row and is given a rest")
                state.open_until = self.clock() + BREAKER_SECONDS  # this call is the probe, the others still wait

    def _note(self, provider: str, refused: ToolFailure | None, transient: bool) -> None:
        if not provider:
            return
        with self._lock:
            state = self._providers[provider]
            if refused is not None and refused.kind in FATAL:
                state.stopped = failure(refused.kind, f"no more calls of {provider}: {refused.message}")
            if not transient:
                state.failures = 0  # it is alive, whatever it said
            elif refused.kind != "rate":
                state.failures += 1
                state.open_until = self.clock() + BREAKER_SECONDS


def web_address(link: Any, base: str = "") -> str:
    """The whole address of a link found in data or on a page, as a browser would ask for it: without dots in its path.

    "" unless it is http or https, has a host and no user name, and holds no control characters.
    """
    try:
        url = urljoin(base, link.strip())
        parts = urlsplit(url)
        host = unquote(parts.hostname or "")
        sound = parts.scheme in ("http", "https") and host.strip(".") and parts.port != 0
        if not sound or re.search(r"[@\\]", parts.netloc) or re.search(r"[/\\?#]", host) or CONTROLS.search(url):
            return ""
        path = _without_dots(parts.path)
        return url if path == parts.path else parts._replace(path=path).geturl()
    except (ValueError, AttributeError, TypeError):
        return ""


def _without_dots(path: str) -> str:
    """A path with its steps "." and ".." taken, also where their dots are written %2e.

    Below the address of a reader they would lead out of it: to another page of the reader, asked with its key.
    """
    if not re.search(r"(^|/)(\.|%2e){1,2}(/|$)", path, re.IGNORECASE):
        return path
    kept: list[str] = []
    for step in path.split("/")[1:]:
        dots = re.sub("%2e", ".", step, flags=re.IGNORECASE)
        if dots == "..":
            kept = kept[:-1]
        elif dots != ".":
            kept.append(step)
    ends = [""] * (dots in (".", ".."))  # what is left is a folder
    return "/" + "/".join(kept + ends)


def host_of(address: str) -> str:
    """Host and port."""
    return urlsplit(address).netloc.rpartition("@")[2]


def join_url(address: str, path: str) -> str:
    """The address of `path` under another, which may have a path and a query of its own."""
    parts = urlsplit(address)
    return parts._replace(path=parts.path.rstrip("/") + path, fragment="").geturl()


def _verdict(
    provider: str, answer: Response | ToolFailure, status_of: StatusOf | None
) -> tuple[ToolFailure | None, bool]:
    """What is wrong with an answer, if anything, and whether it may pass."""
    if isinstance(answer, ToolFailure):
        return answer, answer.kind in ("timeout", "network")
    status = answer.status
    if status < 300 and status_of and isinstance(reply := json_or_none(answer.body), dict):
        status = status_of(reply)
    if status < 300:
        return None, False
    complaint = error_text(answer.body)
    kind = failure_kind(status, complaint)
    said = f"HTTP {status}" if status == answer.status else f"error {status} in a reply of HTTP {answer.status}"
    said += f", through the proxy {answer.proxy}" if answer.proxy else ""
    refused = failure(kind, f"{provider or host_of(answer.url)}: {said}: {_advice(answer)}{complaint}", Refusal)
    cast(Refusal, refused).body = answer.body
    return refused, kind == "rate" or status == 408 or status >= 500


def _advice(answer: Response) -> str:
    """What a status alone does not tell: where a service has gone, and what was asked where nothing is."""
    if answer.status in (301, 302, 303, 307, 308) and (location := answer.headers.get("location")):
        there = hidden(urljoin(answer.url, location))
        return f"it has moved to {there}; configure that address. "
    return f"nothing at {urlsplit(answer.url).path}: " if answer.status == 404 else ""


def _retry_after(value: str) -> float:
    """Seconds that a server asks us to wait (a number or a date), capped."""
    try:
        seconds = float(value) if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value) else _seconds_until(value)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER)


def _seconds_until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()
