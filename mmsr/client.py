"""Guarded HTTP: what strangers' servers may do to a run, bounded here, and a chat client on top of it.

`Client.request` speaks to a configured service: a deadline for the whole call, a cap on decoded bytes, retries, a
circuit breaker per provider. `Client.fetch_public` reads addresses that came from data or from web pages, and connects
to nothing but public ones. Whatever goes wrong is a `ToolFailure` of one of the kinds timeout, network, status, rate,
auth, credits, forbidden, too-large, format, blocked, breaker, budget.
"""

from __future__ import annotations

import base64
import json
import random
import re
import socket
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Iterator, Sequence, cast
from urllib.parse import unquote, urljoin, urlsplit

from .config import hidden, refuse_credentials
from .kept import key_of
from .pictures import media_type, without_metadata
from .tools import ToolFailure
from .wire import (
    Answer,
    Unsent,
    environment_key,
    exchange,
    failure,
    keep_secret,
    proxy_for,
    public_authorities,
    require_public,
)

BODY_BYTES = 8 * 2**20  # decoded, by default
HOPS = 5  # redirects followed
RETRY_AFTER = 60.0  # seconds: what a server may ask for at most
BACKOFF = 16.0  # seconds: the longest pause of our own
BREAKER_FAILURES, BREAKER_SECONDS = 8, 30.0
FATAL = ("auth", "credits")  # no call of this provider can succeed any more
CREDITS = re.compile(
    r"(run )?out of (searches|credits)|current quota|billing details|in good standing|budget has been exceeded|"
    r"(insufficient|not enough).{0,3}(quota|balance|funds|credits?)|"
    r"balance.{0,9}(insufficient|not enough|too low|exhausted)|\u6b20\u8d39|\u4f59\u989d\u4e0d\u8db3",  # in Chinese
    re.IGNORECASE,
)
SOON = re.compile(r"retry (in|after) \d|per.?minute", re.IGNORECASE)  # what is spent will be there again
BAD_KEY = re.compile(r"api.?key|unauthori[sz]ed|invalid.{0,9}token", re.IGNORECASE)  # of a 403
KEY_REFUSED = re.compile(  # of anything else
    r"(invalid|incorrect|missing|expired|\bno) api.?key|api.?key.{0,30}(invalid|incorrect|missing|expired|not valid)|"
    r"unauthori[sz]ed|authentication.?(error|failed)",
    re.IGNORECASE,
)
# Words of errors that come without a fitting status, and the status that they stand for; the first to match counts.
TOLD = [
    (402, CREDITS.pattern),
    (401, KEY_REFUSED.pattern),
    (429, r"rate.?limit|too many requests|throttl|resource.?exhausted|\bqps\b"),
    (503, r"overload|busy|temporar|unavailable|try again|timed?.?out|capacity|internal|server.?error|upstream"),
    (400, r"(invalid|bad).?request|un(supported|recogni[sz]ed|known)|not (supported|permitted)"),
]
CODES = ("code", "status", "status_code", "statusCode")  # under which a body repeats its status
MESSAGES = ("error", "message", "detail", "msg", "error_msg", "status_msg", "base_resp")  # under which errors are told
ADDRESS = re.compile(r"https?://[^\s\"]+", re.IGNORECASE)
CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
THOUGHT = re.compile(r"[<◁](think(?:ing)?)[>▷].*?([<◁]/\1[>▷]|$)", re.DOTALL)
THOUGHT_ENDS = re.compile(r"[<◁]/think(?:ing)?[>▷]")

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
    ) -> Answer:
        """The reply (2xx) of a configured service. `content` is what requests.Request takes: params, headers, json, …

        All tries and the pauses between them take at most `seconds`; each try gets an even share of what is left.
        `spend(provider)` is called before every try that may have to be paid: the first, and one after a try of which
        nobody knows whether it was charged. `status_of` gives the status that the JSON object of a 2xx reply stands for
        (`told_status`): one of 400 and more is treated as if it had been sent. Redirects are not followed. Raises
        ToolFailure, Refusal where the server has answered.
        """

        def attempt(share: float) -> Answer | ToolFailure:
            return exchange(method, url, seconds=share, limit=limit, tls=self.tls, resolve=self.resolve, **content)

        return self._persist(provider, attempt, seconds, tries, spend, status_of)

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
        status_of: StatusOf | None = None,
    ) -> Answer:
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


def below(address: str, path: str) -> str:
    """The address of `path` under another, which may have a path and a query of its own."""
    parts = urlsplit(address)
    return parts._replace(path=parts.path.rstrip("/") + path, fragment="").geturl()


def _verdict(
    provider: str, answer: Answer | ToolFailure, status_of: StatusOf | None
) -> tuple[ToolFailure | None, bool]:
    """What is wrong with an answer, if anything, and whether it may pass."""
    if isinstance(answer, ToolFailure):
        return answer, answer.kind in ("timeout", "network")
    status = answer.status
    if status < 300 and status_of and isinstance(reply := json_of(answer.body), dict):
        status = status_of(reply)
    if status < 300:
        return None, False
    complaint = complaint_of(answer.body)
    kind = kind_of(status, complaint)
    said = f"HTTP {status}" if status == answer.status else f"error {status} in a reply of HTTP {answer.status}"
    said += f", through the proxy {answer.proxy}" if answer.proxy else ""
    refused = failure(kind, f"{provider or host_of(answer.url)}: {said}: {_advice(answer)}{complaint}", Refusal)
    cast(Refusal, refused).body = answer.body
    return refused, kind == "rate" or status == 408 or status >= 500


def _advice(answer: Answer) -> str:
    """What a status alone does not tell: where a service has gone, and what was asked where nothing is."""
    if answer.status in (301, 302, 303, 307, 308) and (location := answer.headers.get("location")):
        there = hidden(urljoin(answer.url, location))
        return f"it has moved to {there}; configure that address. "
    return f"nothing at {urlsplit(answer.url).path}: " if answer.status == 404 else ""


def kind_of(status: int, complaint: str) -> str:
    """A failure's kind. What a provider means by a status is in its text: 400 and 429 may be an empty account.

    Addresses in it are none of its words: a reader names the page that it could not read.
    """
    complaint = ADDRESS.sub("", complaint)
    if status == 402 or status < 500 and CREDITS.search(complaint) and not SOON.search(complaint):
        return "credits"
    if status == 403 and BAD_KEY.search(complaint) or status == 400 and KEY_REFUSED.search(complaint):
        return "auth"
    return {401: "auth", 403: "forbidden", 429: "rate", 451: "blocked"}.get(status, "status")


def told_status(reply: dict[str, Any]) -> int:
    """The status of the error in a reply that was sent as a success; 200 where there is none that is understood.

    Gateways put the failure of a server behind them into a 200: {"error": {"code": 429, "message": …}}, also beside or
    within the choices of a chat. Codes win over words.
    """
    errors = [error for error in _errors(reply) if error]
    for place in [reply, *errors]:
        if isinstance(place, dict):
            codes = [str(place.get(name)) for name in CODES if isinstance(place.get(name), (int, str))]
            for code in codes:
                if re.fullmatch("[45][0-9][0-9]", code):
                    return int(code)
    text = ADDRESS.sub("", json.dumps(errors, ensure_ascii=False))
    return next((status for status, words in TOLD if re.search(words, text, re.IGNORECASE)), 200)


def _errors(reply: dict[str, Any]) -> Iterator[Any]:
    """Where a reply may hold an error."""
    yield from (reply.get(name) for name in MESSAGES if name != "message")
    choices = reply.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        yield choices[0].get("error")


def complaint_of(body: bytes) -> str:
    """An error's text: nested under `error`, flat, in a list, or whatever the body begins with."""
    return _words(json_of(body), 4) or body[:200].decode(errors="replace")


def _words(value: Any, depth: int) -> str:
    """The first text under one of the names that servers give to errors. A gateway quotes the server behind it."""
    if isinstance(value, list) and depth:
        return next(filter(None, (_words(part, depth - 1) for part in value[:9])), "")
    if not isinstance(value, dict) or not depth:
        return ""
    quoted = value["metadata"].get("raw") if isinstance(value.get("metadata"), dict) else None
    for name in MESSAGES:
        said = value.get(name)
        if text := said.strip() if isinstance(said, str) else _words(said, depth - 1):
            return f"{text}: {quoted}" if isinstance(quoted, str) else text
    return ""


def json_of(body: bytes) -> Any:
    """The value in a body; None where that is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


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

# What chat servers do not all take. They refuse it in ever new words, so that naming a field is enough, but for the
# number of tokens: it is also named where the conversation is too long, which no other name would mend.
RENAMED = "max_completion_tokens"  # what newer servers call max_tokens
OPTIONAL = ("chat_template_kwargs", "temperature", "max_tokens", RENAMED)
FOREIGN = (
    r"un(supported|recogni[sz]ed|known|expected)|not? (longer )?(supported|permitted|allowed)|extra|deprecated|instead"
)
SIZE = r"too (large|long|big|high|many)|context|maximum|at most|exceed|less than|between|must be"
WITHHELD = re.compile(
    "content.?(filter|policy)|sensitive|safety|prohibited|blocklist|recitation|refusal|guardrail", re.IGNORECASE
)
CUT_OFF = ("length", "max_tokens", "model_length")
BROKEN_OFF = ("error", "network_error", "insufficient_system_resource", "abort")  # reasons to finish that may pass


def picture_part(data: bytes) -> dict[str, Any]:
    """A picture file, without its metadata, as a part of a chat message's content. ValueError where it is none."""
    data = without_metadata(data)
    url = f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def open_server(address: str, model: str) -> ChatServer:
    """A server named on the command line, with OPENAI_API_KEY where that is set; its answers are not counted, and one
    that is cut off is a failure: half a turn is none, and half a judgement may say anything."""
    return ChatServer(address, model, environment_key("OPENAI_API_KEY"), Client(), whole=True)


def chat_address(address: str) -> str:
    """Where an OpenAI-compatible server takes chats: what is named may be its host alone, its API, or the very place.

    Only a bare host gets /v1: https://open.bigmodel.cn/api/paas/v4 has its version elsewhere. A query stays.
    """
    path = urlsplit(address).path.rstrip("/")
    if path.endswith("/chat/completions"):
        return below(address, "")
    return below(address, "/chat/completions" if path else "/v1/chat/completions")


class ChatServer:
    """A model behind any OpenAI-compatible server. Safe in any number of threads.

    `base_url` is the server's, its API's, or the very place for chats. Without a `key` none is sent and nothing is
    paid: `spend` is then not called. A request that is sent twice bears the same Idempotency-Key: servers that heed it
    charge once. `whole`: an answer that was cut off after its last token is a failure. Raises UserError for an address
    with a password in it, and for a proxy that cannot be used.
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
        whole: bool = False,
    ):
        refuse_credentials("the chat server", base_url, "OPENAI_API_KEY")
        proxy_for(base_url)  # refused now, and not at the first call
        self.url, self.whole = chat_address(base_url.strip()), whole
        self.model, self.key, self.client, self.seconds = model, keep_secret(key), client, seconds
        self.spend = spend if self.key else None
        self.provider = provider or host_of(self.url)
        self.foreign: frozenset[str] = frozenset()  # fields that this server has refused
        self.headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if self.key and "api-version=" in urlsplit(self.url).query:  # Azure's deployments want the key there
            self.headers["api-key"] = self.key

    def complete(self, messages: Sequence[dict], max_tokens: int) -> str:
        """The answer's text, the model's thoughts taken out.

        Raises ToolFailure: "format" where no answer is left, "blocked" where a filter or the model itself withheld it.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        return self._answer(self._ask(body).json(), max_tokens)

    def _answer(self, reply: dict[str, Any], max_tokens: int) -> str:
        message, finish = _choice(reply)
        text, who = _text(message.get("content")), f"{self.provider}: {self.model}"
        if WITHHELD.search(finish) or not text and message.get("refusal"):
            raise failure("blocked", f"{who} withheld its answer: {message.get('refusal') or finish}")
        answer = THOUGHT_ENDS.split(THOUGHT.sub("", text or ""))[-1].strip()  # a template may have opened the thought
        if finish.lower() in CUT_OFF and (self.whole or not answer):
            raise failure("format", f"{who} gave no {'whole ' * bool(answer)}answer in {max_tokens} tokens")
        if answer:
            return answer
        if any(message.get(name) for name in ("reasoning_content", "reasoning")):
            raise failure("format", f"{who} gave thoughts and no answer")
        if text is None:
            raise failure("format", f"{self.provider}: no answer in it: {complaint_of(json.dumps(reply).encode())}")
        raise failure("format", f"{who} gave no answer")

    def _ask(self, body: dict[str, Any]) -> Answer:
        """Post. A field that the server refuses is renamed or left out; what has helped is left out from then on."""
        foreign = self.foreign
        while True:
            wanted = {name: value for name, value in body.items() if name not in foreign}
            if "max_tokens" in foreign and RENAMED not in foreign:
                wanted[RENAMED] = body["max_tokens"]
            headers = self.headers | {"Idempotency-Key": key_of(self.url, wanted)}
            try:
                answer = self.client.request(
                    self.provider, "POST", self.url, headers=headers, json=wanted, seconds=self.seconds, tries=3,
                    spend=self.spend, status_of=_chat_status,
                )  # fmt: skip
            except Refusal as refused:
                named = _refused_fields(refused, wanted)
                if not named:
                    raise
                foreign |= named
            else:
                self.foreign |= foreign
                return answer


def _refused_fields(refused: Refusal, sent: dict[str, Any]) -> set[str]:
    """The optional fields of a request that its refusal names, and that it may do without."""
    if refused.kind != "status":
        return set()
    text = json.dumps(json_of(refused.body), ensure_ascii=False) + refused.message  # its escapes are read
    text = text.replace("enable_thinking", "chat_template_kwargs")  # which holds nothing else
    named = {name for name in OPTIONAL if name in sent and re.search(rf"(?<![a-z_]){name}(?![a-z_])", text)}
    if re.search(SIZE, text, re.IGNORECASE) and not re.search(FOREIGN, text, re.IGNORECASE):
        named -= {"max_tokens", RENAMED}
    return named


def _chat_status(reply: dict[str, Any]) -> int:
    told = told_status(reply)
    return 503 if told == 200 and _choice(reply)[1] in BROKEN_OFF else told


def _choice(reply: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Message and finish_reason of the first choice; {} and "" where it has none."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return {}, ""
    message = choice.get("message")
    return message if isinstance(message, dict) else {}, str(choice.get("finish_reason") or "")


def _text(content: Any) -> str | None:
    """A message's content, a text or parts of which some are texts (others are thoughts); None where it is neither."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part for part in content if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "".join(texts) if texts else None
