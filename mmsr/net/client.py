"""HTTP calls with limits: no server, however slow or hostile, can hang or crash a run.

`Client.request` calls a service that the user configured, with a deadline for the whole call, a limit on the decoded
bytes, retries, and a circuit breaker per provider. `Client.fetch_public` reads addresses from data or from web pages,
and connects to public ones only. Every failure is a `ToolFailure` of one of the kinds timeout, network, status, rate,
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

BODY_BYTES = 8 * 2**20  # default limit of a decoded body
MAX_REDIRECTS = 5
MAX_RETRY_AFTER = 60.0  # seconds: a server may ask for a longer pause, but does not get it
BACKOFF = 16.0  # seconds: the longest pause that we choose ourselves
BREAKER_FAILURES, BREAKER_SECONDS = 8, 30.0
FATAL = ("auth", "credits")  # kinds of failures after which no call of the provider can succeed
REDIRECTS = (301, 302, 303, 307, 308)
CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
StatusOf = Callable[[dict[str, Any]], int]  # the status that a JSON body means, see `server_errors.status_in_body`


class Refusal(ToolFailure):
    """The server answered with an error. `body` is the whole reply, the message one short line of it."""

    body = b""


@dataclass
class _Provider:
    failures: int = 0  # in a row
    last: str = ""  # why the last one failed
    open_until: float = 0.0  # no calls before this time
    stopped: ToolFailure | None = None  # why it is not called any more in this process


class Client:
    """Calls servers, from any number of threads. A provider that refuses the key, or whose account is empty, is not
    called again. `clock`, `sleep`, `jitter` and `resolve` are parameters so that tests can replace them."""

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

        All tries and the pauses between them take at most `seconds`; each try gets an equal share of the time left.
        `spend(provider)` is called before every try that may cost money: the first one, and each that follows a try
        that may have been charged. `status_of` gives the status that the JSON object of a 2xx reply means: 400 and more
        are treated as if the server had sent that status. Redirects are not followed. Raises ToolFailure; Refusal where
        the server has answered.
        """

        def attempt(share: float) -> Response | ToolFailure:
            return send_request(method, url, seconds=share, limit=limit, tls=self.tls, resolve=self.resolve, **content)

        return self._retry(provider, attempt, seconds, tries, spend, status_of)

    def fetch_public(self, url: str, *, seconds: float = 20.0, tries: int = 2) -> Response:
        """The reply of an untrusted http or https address; redirects are followed. Raises ToolFailure; "blocked" for an
        address that is not public, or that redirects to one."""
        return self._retry("", lambda share: self._follow(url, share), seconds, tries, None)

    def _follow(self, url: str, seconds: float) -> Response | ToolFailure:
        end = time.monotonic() + seconds
        location = url
        for _ in range(MAX_REDIRECTS + 1):
            url = web_address(location, url)
            if not url:
                return failure("blocked", f"not a plain http or https address: {location!s:.100}")
            answer = send_request(
                "GET", url, seconds=end - time.monotonic(), limit=BODY_BYTES, tls=self.tls, resolve=self.resolve,
                check=require_public,
            )  # fmt: skip
            if not isinstance(answer, Response) or answer.status not in REDIRECTS:
                return answer
            location = answer.headers.get("location")
            if location is None:
                return answer
        return failure("blocked", f"more than {MAX_REDIRECTS} redirects")

    def _retry(
        self,
        provider: str,
        attempt: Callable[[float], Response | ToolFailure],
        seconds: float,
        tries: int,
        spend: Callable[[str], None] | None,
        status_of: StatusOf | None = None,
    ) -> Response:
        """Try until there is a good reply, a permanent failure, or no time. No breaker where `provider` is ""."""
        end = self.clock() + seconds
        paid = False  # whether the payment of the last try is still unused
        for tries_left in range(tries, 0, -1):
            self._check_breaker(provider)
            if spend and not paid:
                spend(provider)
            answer = attempt((end - self.clock()) / tries_left)
            failed, transient = _failure_of(provider, answer, status_of)
            self._count_failures(provider, failed, transient)
            if failed is None:
                return cast(Response, answer)  # a ToolFailure is never None
            pause = self.jitter() * min(BACKOFF, 2.0 ** (tries - tries_left))
            if isinstance(answer, Response):
                pause = max(pause, _retry_after(answer.headers.get("retry-after", "")))
            if not transient or tries_left == 1 or self.clock() + pause >= end:
                raise failed
            paid = isinstance(answer, (Response, Unsent))  # an error reply, or nothing was sent: not charged
            self.sleep(pause)
        raise ValueError("tries must be 1 or more")

    # ---- circuit breaker

    def check(self, *providers: str) -> None:
        """Raise the ToolFailure that stopped one of the providers, before anything is paid that needs all of them."""
        for provider in providers:
            stopped = self._providers[provider].stopped
            if stopped is not None:
                raise ToolFailure(stopped.kind, stopped.message)  # a new one: each raise adds to its traceback

    def _check_breaker(self, provider: str) -> None:
        with self._lock:
            self.check(provider)
            state = self._providers[provider]
            if state.failures >= BREAKER_FAILURES:
                if self.clock() < state.open_until:
                    why = f"{provider} failed {state.failures} times in a row and is given a rest"
                    raise failure("breaker", f"{why}; the last time: {state.last}")
                state.open_until = self.clock() + BREAKER_SECONDS  # this call is a probe; others continue to wait

    def _count_failures(self, provider: str, failed: ToolFailure | None, transient: bool) -> None:
        if not provider:
            return
        with self._lock:
            state = self._providers[provider]
            if failed is not None and failed.kind in FATAL:
                state.stopped = failure(failed.kind, f"no more calls of {provider}: {failed.message}")
            if not transient:
                state.failures = 0  # the server works, even where it refused this request
            elif failed.kind != "rate":
                state.failures += 1
                state.last = failed.message
                state.open_until = self.clock() + BREAKER_SECONDS


def web_address(link: Any, base: str = "") -> str:
    """The absolute address of a link in data or on a page, as a browser requests it: "." and ".." resolved in its path.
    "" unless it is http or https, has a host and no user name, and contains no control characters."""
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
    """A path with its segments "." and ".." resolved, also where a dot is written %2e. Page addresses are appended to
    the address of a reader (Jina): there, ".." would lead to another address of the reader's server, which would be
    requested with our key."""
    if not re.search(r"(^|/)(\.|%2e){1,2}(/|$)", path, re.IGNORECASE):
        return path
    resolved: list[str] = []
    for segment in path.split("/")[1:]:
        dots = re.sub("%2e", ".", segment, flags=re.IGNORECASE)
        if dots == "..":
            resolved = resolved[:-1]
        elif dots != ".":
            resolved.append(segment)
    if dots in (".", ".."):  # the result is a folder: it ends in a slash
        resolved.append("")
    return "/" + "/".join(resolved)


def host_of(address: str) -> str:
    """Host and port of an address."""
    return urlsplit(address).netloc.rpartition("@")[2]


def join_url(address: str, path: str) -> str:
    """`address` with `path` appended to its path; its query stays."""
    parts = urlsplit(address)
    return parts._replace(path=parts.path.rstrip("/") + path, fragment="").geturl()


def _failure_of(
    provider: str, answer: Response | ToolFailure, status_of: StatusOf | None
) -> tuple[ToolFailure | None, bool]:
    """The failure that an answer is (None: it is a good reply), and whether another try may succeed."""
    if isinstance(answer, ToolFailure):
        return answer, answer.kind in ("timeout", "network")
    status = answer.status
    if status < 300 and status_of and isinstance(reply := json_or_none(answer.body), dict):
        status = status_of(reply)
    if status < 300:
        return None, False
    complaint = error_text(answer.body)
    kind = failure_kind(status, complaint)
    what = f"HTTP {status}" if status == answer.status else f"error {status} in a reply of HTTP {answer.status}"
    if answer.proxy:
        what += f", through the proxy {answer.proxy}"
    refusal = failure(kind, f"{provider or host_of(answer.url)}: {what}: {_advice(answer)}{complaint}", Refusal)
    cast(Refusal, refusal).body = answer.body
    return refusal, kind == "rate" or status == 408 or status >= 500


def _advice(answer: Response) -> str:
    """More than the status: the new address after a redirect, and the path that was not found."""
    location = answer.headers.get("location")
    if answer.status in REDIRECTS and location:
        return f"it has moved to {hidden(urljoin(answer.url, location))}; configure that address. "
    return f"nothing at {urlsplit(answer.url).path}: " if answer.status == 404 else ""


def _retry_after(value: str) -> float:
    """The pause in seconds that a Retry-After header asks for, as a number or a date; at most MAX_RETRY_AFTER."""
    try:
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            seconds = float(value)
        else:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)
