"""What a server means when it refuses: the kind of the failure, its text, and whether asking again may help.

Trap: the status says little. 400 and 429 may be an empty account, 403 a wrong key, and gateways put the error of a
server behind them into a 200. What providers mean is in their words, and each has its own.
"""

from __future__ import annotations

import json
import re
from typing import Any, Iterator

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


def failure_kind(status: int, complaint: str) -> str:
    """A failure's kind. What a provider means by a status is in its text: 400 and 429 may be an empty account.

    Addresses in it are none of its words: a reader names the page that it could not read.
    """
    complaint = ADDRESS.sub("", complaint)
    if status == 402 or status < 500 and CREDITS.search(complaint) and not SOON.search(complaint):
        return "credits"
    if status == 403 and BAD_KEY.search(complaint) or status == 400 and KEY_REFUSED.search(complaint):
        return "auth"
    return {401: "auth", 403: "forbidden", 429: "rate", 451: "blocked"}.get(status, "status")


def status_in_body(reply: dict[str, Any]) -> int:
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


def error_text(body: bytes) -> str:
    """An error's text: nested under `error`, flat, in a list, or whatever the body begins with."""
    return _words(json_or_none(body), 4) or body[:200].decode(errors="replace")


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


def json_or_none(body: bytes) -> Any:
    """The value in a body; None where that is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
