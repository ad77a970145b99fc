"""What an error reply of a server means: the kind of the failure, its text, and whether another try may help.

Trap: the status alone says little. 400 and 429 may mean an empty account, 403 a wrong key, and a gateway may answer 200
with the error of the server behind it in the body. The text tells these apart, and every provider words it differently.
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
SOON = re.compile(r"retry (in|after) \d|per.?minute", re.IGNORECASE)  # a rate limit, not an empty account
BAD_KEY = re.compile(r"api.?key|unauthori[sz]ed|invalid.{0,9}token", re.IGNORECASE)  # with status 403
KEY_REFUSED = re.compile(  # with any other status
    r"(invalid|incorrect|missing|expired|\bno) api.?key|api.?key.{0,30}(invalid|incorrect|missing|expired|not valid)|"
    r"unauthori[sz]ed|authentication.?(error|failed)",
    re.IGNORECASE,
)
# The status that the words of an error mean, for errors in a 200 reply. The first match counts.
STATUS_BY_WORDS = [
    (402, CREDITS.pattern),
    (401, KEY_REFUSED.pattern),
    (429, r"rate.?limit|too many requests|throttl|resource.?exhausted|\bqps\b"),
    (503, r"overload|busy|temporar|unavailable|try again|timed?.?out|capacity|internal|server.?error|upstream"),
    (400, r"(invalid|bad).?request|un(supported|recogni[sz]ed|known)|not (supported|permitted)"),
]
CODES = ("code", "status", "status_code", "statusCode")  # keys of a body that may hold a status
MESSAGES = ("error", "message", "detail", "msg", "error_msg", "status_msg", "base_resp")  # and an error's text
ADDRESS = re.compile(r"https?://[^\s\"]+", re.IGNORECASE)


def failure_kind(status: int, complaint: str) -> str:
    """The kind of the failure that a status and the error's text mean. Addresses in the text are ignored: a reader's
    error names the page that it could not read."""
    complaint = ADDRESS.sub("", complaint)
    if status == 402 or status < 500 and CREDITS.search(complaint) and not SOON.search(complaint):
        return "credits"
    if status == 403 and BAD_KEY.search(complaint) or status == 400 and KEY_REFUSED.search(complaint):
        return "auth"
    return {401: "auth", 403: "forbidden", 429: "rate", 451: "blocked"}.get(status, "status")


def status_in_body(reply: dict[str, Any]) -> int:
    """The status of the error in the body of a 200 reply; 200 where it contains no error that is understood. Gateways
    report the failure of a server behind them as {"error": {"code": 429, "message": …}}, also beside or inside the
    choices of a chat. Codes count before words."""
    errors = [error for error in _errors(reply) if error]
    for part in [reply, *errors]:
        if not isinstance(part, dict):
            continue
        for name in CODES:
            code = part.get(name)
            if isinstance(code, (int, str)) and re.fullmatch("[45][0-9][0-9]", str(code)):
                return int(code)
    text = ADDRESS.sub("", json.dumps(errors, ensure_ascii=False))
    return next((status for status, words in STATUS_BY_WORDS if re.search(words, text, re.IGNORECASE)), 200)


def _errors(reply: dict[str, Any]) -> Iterator[Any]:
    """The values of a reply that may describe an error."""
    yield from (reply.get(name) for name in MESSAGES if name != "message")
    choices = reply.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        yield choices[0].get("error")


def error_text(body: bytes) -> str:
    """The message in an error's body, which may be nested, flat or in a list; else the first 200 bytes of the body."""
    return _words(json_or_none(body), 4) or body[:200].decode(errors="replace")


def _words(value: Any, depth: int) -> str:
    """The first text under one of MESSAGES, with the original error that a gateway quotes in `metadata.raw`."""
    if isinstance(value, list) and depth:
        return next(filter(None, (_words(part, depth - 1) for part in value[:9])), "")
    if not isinstance(value, dict) or not depth:
        return ""
    quoted = value["metadata"].get("raw") if isinstance(value.get("metadata"), dict) else None
    for name in MESSAGES:
        message = value.get(name)
        text = message.strip() if isinstance(message, str) else _words(message, depth - 1)
        if text:
            return f"{text}: {quoted}" if isinstance(quoted, str) else text
    return ""


def json_or_none(body: bytes) -> Any:
    """The JSON value of a body; None where it is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
