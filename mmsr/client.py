"""Guarded HTTP: what strangers' servers may do to a run, bounded here, and a chat client on top of it.

`Client.request` speaks to a configured service: a deadline for the whole call, a cap on decoded bytes, retries, a
circuit breaker per provider. `Client.fetch_public` reads addresses that came from data or from web pages, and connects
to nothing but public ones. Whatever goes wrong is a `ToolFailure` of one of the kinds timeout, network, status, rate,
auth, credits, forbidden, too-large, format, blocked, breaker, budget.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import socket
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Sequence, cast
from urllib.parse import urljoin, urlsplit

import PIL.Image

from .kept import key_of
from .pictures import FORMATS
from .tools import ToolFailure
from .wire import Answer, Unsent, exchange, failure, keep_secret, public_authorities, require_public

BODY_BYTES = 8 * 2**20  # decoded, by default
HOPS = 5  # redirects followed
RETRY_AFTER = 60.0  # seconds: what a server may ask for at most
BACKOFF = 16.0  # seconds: the longest pause of our own
BREAKER_FAILURES, BREAKER_SECONDS = 8, 30.0
FATAL = ("auth", "credits")  # no call of this provider can succeed any more
CREDITS = re.compile(
    r"run out of searches|not enough credits|insufficient.{0,3}(quota|balance|funds)|current quota", re.IGNORECASE
)
BAD_KEY = re.compile(r"api.?key|unauthori[sz]ed|invalid.{0,9}token", re.IGNORECASE)
THOUGHT = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


# ---- calls


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
        **content: Any,
    ) -> Answer:
        """The reply (2xx) of a configured service. `content` is what requests.Request takes: params, headers, json, …

        All tries and the pauses between them take at most `seconds`; each try gets an even share of what is left.
        `spend(provider)` is called before every try that may have to be paid: the first, and one after a try of which
        nobody knows whether it was charged. Redirects are not followed. Raises ToolFailure.
        """

        def attempt(share: float) -> Answer | ToolFailure:
            return exchange(method, url, seconds=share, limit=limit, tls=self.tls, resolve=self.resolve, **content)

        return self._persist(provider, attempt, seconds, tries, spend)

    def fetch_public(self, url: str, *, seconds: float = 20.0, tries: int = 2) -> Answer:
        """What is at a stranger's address (http or https), redirects followed. Raises ToolFailure, "blocked" for an
        address that is, or leads to, anything but a public one."""
        return self._persist("", lambda share: self._follow(url, share), seconds, tries, None)

    def _follow(self, url: str, seconds: float) -> Answer | ToolFailure:
        end, location = time.monotonic() + seconds, url
        for _ in range(HOPS + 1):
            url = web_address(location, url)
            if not url:
                return failure("blocked", f"not a plain http or https address: {location!s:.100}")
            answer = exchange(
                "GET", url, seconds=end - time.monotonic(), limit=BODY_BYTES, tls=self.tls, resolve=self.resolve,
                check=require_public,
            )  # fmt: skip
            if not isinstance(answer, Answer) or answer.status not in (301, 302, 303, 307, 308):
                return answer
            location = answer.headers.get("location")
            if location is None:
                return answer
        return failure("blocked", f"more than {HOPS} redirects")

    def _persist(
        self,
        provider: str,
        attempt: Callable[[float], Answer | ToolFailure],
        seconds: float,
        tries: int,
        spend: Callable[[str], None] | None,
    ) -> Answer:
        """Try until there is a good reply, a lasting failure, or no time. `provider` "" is nobody's: no breaker."""
        end, reserved = self.clock() + seconds, False
        for left in range(tries, 0, -1):
            self._admit(provider)
            if spend and not reserved:
                spend(provider)
            answer = attempt((end - self.clock()) / left)
            refused, transient = _verdict(provider, answer)
            self._note(provider, refused, transient)
            if refused is None:
                return cast(Answer, answer)  # a failure is always refused
            pause = self.jitter() * min(BACKOFF, 2.0 ** (tries - left))
            if isinstance(answer, Answer):
                pause = max(pause, _retry_after(answer.headers.get("retry-after", "")))
            if not transient or left == 1 or self.clock() + pause >= end:
                raise refused
            reserved = isinstance(answer, (Answer, Unsent))  # refused or never sent: the next try may have its money
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
    """The whole address of a link found in data or on a page; "" unless it is http or https, without a user name."""
    try:
        url = urljoin(base, link)
        parts = urlsplit(url)
        return url if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc else ""
    except (ValueError, AttributeError, TypeError):
        return ""


def _verdict(provider: str, answer: Answer | ToolFailure) -> tuple[ToolFailure | None, bool]:
    """What is wrong with an answer, if anything, and whether it may pass."""
    if isinstance(answer, ToolFailure):
        return answer, answer.kind in ("timeout", "network")
    if answer.status < 300:
        return None, False
    complaint = complaint_of(answer.body)
    kind = kind_of(answer.status, complaint)
    named = f"{provider or urlsplit(answer.url).hostname}: HTTP {answer.status}: {complaint}"
    return failure(kind, named), kind == "rate" or answer.status == 408 or answer.status >= 500


def kind_of(status: int, complaint: str) -> str:
    """A failure's kind. What a provider means by a status is in its text: 400 and 429 may be an empty account."""
    if status == 402 or status < 500 and CREDITS.search(complaint):
        return "credits"
    if status == 403 and BAD_KEY.search(complaint):
        return "auth"
    return {401: "auth", 403: "forbidden", 429: "rate", 451: "blocked"}.get(status, "status")


def complaint_of(body: bytes) -> str:
    """An error's text: nested under `error`, flat, or whatever the body begins with."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        nested = value.get("error")
        places = [nested, *([nested.get("message")] if isinstance(nested, dict) else []), value.get("message")]
        for text in [*places, value.get("detail")]:
            if isinstance(text, str) and text.strip():
                return text
    return body[:200].decode(errors="replace")


def _retry_after(value: str) -> float:
    """Seconds that a server asks us to wait (a number or a date), capped."""
    try:
        seconds = float(value) if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value) else _seconds_until(value)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER)


def _seconds_until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()


# ---- chat


def picture_part(data: bytes) -> dict[str, Any]:
    """A picture file as a part of a chat message's content."""
    kind = PIL.Image.open(io.BytesIO(data), formats=FORMATS).get_format_mimetype()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def open_server(base_url: str, model: str) -> ChatServer:
    """A server named on the command line, with OPENAI_API_KEY where that is set; its answers are not counted."""
    return ChatServer(base_url, model, os.environ.get("OPENAI_API_KEY", ""), Client())


class ChatServer:
    """A model behind any OpenAI-compatible server. Safe in any number of threads.

    `base_url` may end in /v1 or not. Without a `key` none is sent and nothing is paid: `spend` is then not called.
    A request that is sent twice bears the same Idempotency-Key: servers that heed it charge once.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str,
        client: Client,
        seconds: float = 240.0,
        spend: Callable[[str], None] | None = None,
        provider: str = "",
    ):
        self.url = base_url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self.model, self.key, self.client, self.seconds = model, keep_secret(key), client, seconds
        self.spend = spend if self.key else None
        self.provider = provider or urlsplit(base_url).netloc
        self.foreign: frozenset[str] = frozenset()  # fields that this server has refused

    def complete(self, messages: Sequence[dict], max_tokens: int) -> str:
        """The answer's text, the model's thoughts taken out. Raises ToolFailure, "format" where no answer is left."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        reply = self._ask(body).json()
        try:
            text = reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise failure("format", f"{self.provider}: no answer in it: {complaint_of(json.dumps(reply).encode())}")
        answer = THOUGHT.sub("", text).rpartition("</think>")[2].strip()  # a template may have opened the thought
        if not answer:
            raise failure("format", f"{self.provider}: {self.model} gave no answer in {max_tokens} tokens")
        return answer

    def _ask(self, body: dict[str, Any]) -> Answer:
        """Post; a field that the server says it does not know is left out from then on, or renamed."""
        authorization = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        while True:
            wanted = {name: value for name, value in body.items() if name not in self.foreign}
            if "max_tokens" in self.foreign:
                wanted["max_completion_tokens"] = body["max_tokens"]
            headers = authorization | {"Idempotency-Key": key_of(self.url, wanted)}
            try:
                return self.client.request(
                    self.provider, "POST", self.url, headers=headers, json=wanted, seconds=self.seconds, tries=3,
                    spend=self.spend,
                )  # fmt: skip
            except ToolFailure as error:
                refused = error
            optional = ("chat_template_kwargs", "max_tokens", "temperature")
            unknown = re.search(r"unrecogni[sz]ed|unsupported|unknown|extra (inputs|fields)", refused.message, re.I)
            named = {name for name in optional if name in wanted and re.search(rf"\b{name}\b", refused.message)}
            if refused.kind != "status" or not unknown or not named:
                raise refused
            self.foreign |= named
