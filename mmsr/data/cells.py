"""Reads a cell of a data file by its form: a question, accepted answers, or a picture.

Data sets write the same thing in many forms. Each reader here understands all of them. It raises `Unclear` (one line,
to which the caller adds file, row and column) for a cell that is not clearly a question, a list of answers, a picture.
"""

from __future__ import annotations

import ast
import datetime
import json
import re
import warnings
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

USER, MODEL, SYSTEM = ("user", "human"), ("assistant", "gpt", "model", "bot"), ("system", "developer")
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURE_PARTS = ("image", "image_url", "input_image")
PICTURE_KEYS = ("bytes", "image", "image_url", "url", "data", "base64", "path", "source")  # the first with a value
ANSWER_KEYS = ("target", "wikidata", "answer", "text", "value")  # Search-R1, InfoSeek's numbers, VQAv2, SQuAD, TriviaQA
# The marks for a picture in the text of some exports: <image>, <Image 1>, <|image_1|>, <image-placeholder>.
MARKER = re.compile(
    r"<\|?image(?:[ _-]?(?:\d+|placeholder|here))?\|?>"
    r"|(?:<\|vision_start\|>)?(?:<\|image_pad\|>)++(?:<\|vision_end\|>)?",
    re.IGNORECASE,
)
OTHER_MARKER = re.compile(r"<\|?(?:video|audio)(?:_pad|[ _-]?\d+)?\|?>", re.IGNORECASE)
WHOLE_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
NUMPY = re.compile(r"array\((\[.*\])(?:,\s*dtype=[^()]*)?\)", re.DOTALL)
# An item of a list as Python or NumPy prints it, followed by a comma or only by blanks.
ITEM = re.compile(r"""\s*('(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[^\s,'"]++)(?:\s*+,|\s++|$)""", re.DOTALL)


class Unclear(ValueError):
    """One line about a cell: what is wrong with it, and how to correct it."""


class Turn(NamedTuple):
    role: str
    content: Any


# ---- conversations


def conversation(value: Any) -> list[Turn] | None:
    """The turns of chat messages, {role, content} or ShareGPT's {from, value}; None for another value."""
    value = parsed(value)
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        return None
    turns = []
    for message in filter(None, messages):
        if not isinstance(message, dict) or not {"role", "from"} & {*message}:
            return None
        content = message.get("content") if "content" in message else message.get("value")
        turns.append(Turn(str(message.get("role") or message.get("from")).lower(), content))
    return turns


def parsed(value: Any) -> Any:
    """A list or object that is written as text, in JSON or as Python prints it; any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return _literal(value.strip())
    except ValueError:
        return value


def _literal(text: str) -> Any:
    """A value as Python prints it. ValueError for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes, which Python itself does not print
            return ast.literal_eval(text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from None


def _parts(content: Any) -> tuple[list[str], list[Any]]:
    """The texts of a message's content and its pictures, with None for a picture that is stored elsewhere."""
    texts, pictures = [], []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            kind = part.get("type") or ("text" if part.get("text") else "image")
            if kind in TEXT_PARTS:
                texts.append(str(part.get("text") or part.get("content") or ""))
            elif kind in PICTURE_PARTS:
                pictures.append(next((part[key] for key in PICTURE_KEYS if part.get(key)), None))
            else:
                raise Unclear(f"a part of the type {kind!r:.40}; a question is text about one picture, drop the row")
        elif part is not None:
            raise Unclear(f"{part!r:.60} is not a part of a message; write text")
    return texts, pictures


# ---- questions


def question(value: Any) -> str:
    """The question in a text, or in the one user message of a conversation, without the marker for its picture."""
    turns = conversation(value)
    if turns is None:
        if not isinstance(value, str | None):
            raise Unclear(f"{value!r:.60} is neither text nor chat messages; write the question")
        texts, pictures = [value or ""], []
    else:
        messages = [turn.content for turn in turns if turn.role in USER]
        if len(messages) > 1:
            raise Unclear(f"{len(messages)} messages of the user; give one question a row, without what went before")
        texts, pictures = _parts(messages[0] if messages else None)
    text = "\n".join(filter(None, map(str.strip, texts)))
    if other := OTHER_MARKER.search(text):
        raise Unclear(f"{other[0]} in the question; a question is text about one picture, drop the row")
    places = max(len(MARKER.findall(text)), len(pictures))
    if places > 1:
        raise Unclear(f"{places} places for pictures; a question has one picture, drop the row")
    text = MARKER.sub("", text).strip()
    if not text:
        raise Unclear("the question is empty; fill it in or drop the row")
    return text


def instructs(value: Any) -> bool:
    """Whether a conversation has a system message."""
    return any(turn.role in SYSTEM and turn.content for turn in conversation(value) or ())


# ---- answers


def answers(value: Any, listed: bool = False) -> list[str]:
    """The accepted answers, without empty ones: a value, the items of a list, or the model's last turn in a chat. Text
    is one answer, unless it is a list of quoted texts or an object with a key of ANSWER_KEYS. With `listed`, text must
    be a list."""
    turns = conversation(value)
    if turns is not None:
        replies = [turn.content for turn in turns if turn.role in MODEL]
        value = "\n".join(_parts(replies[-1])[0]) if replies else None
    if isinstance(value, str) and not listed:
        value = _list_or_object(value)
    elif isinstance(value, str):
        text, value = value, _list_in(value or "[]")
        if value is None:
            raise Unclear(f'{text!r:.60} is not a JSON list; write one such as ["Tagus"]')
    value = _unwrapped(value)
    found: list[str] = []
    for item in value if isinstance(value, list) else [value]:
        found += _texts(_unwrapped(item))
    return [text for text in found if text.strip()]


def _list_or_object(text: str) -> Any:
    """The list or object that a text clearly represents, or the text itself: "[1, 2]" may be the answer."""
    found = _list_in(text)
    if found and all(isinstance(item, str | None) for item in found):
        return found
    value = parsed(text)
    return value if isinstance(value, dict) and any(key in value for key in ANSWER_KEYS) else text


def _list_in(text: str) -> list[Any] | None:
    """The list that a text contains, in JSON or as Python or NumPy prints texts and numbers; None for other text."""
    try:
        found = json.loads(text)
        return found if isinstance(found, list) else None
    except (ValueError, RecursionError):
        pass
    array = NUMPY.fullmatch(text.strip())
    text = array[1] if array else text.strip()
    if text[:1] + text[-1:] not in ("[]", "()"):
        return None
    inside = text[1:-1].rstrip()
    items = []
    position = 0
    while position < len(inside):
        item = ITEM.match(inside, position)
        if item is None:
            return None
        try:
            items.append(_literal("None" if item[1] == "nan" else item[1]))
        except ValueError:
            return None
        position = item.end()
    return items


def _unwrapped(value: Any) -> Any:
    """The answer in an object, with TriviaQA's aliases; any other value unchanged."""
    key = next((key for key in ANSWER_KEYS if key in value), None) if isinstance(value, dict) else None
    if key is None:
        return value
    aliases = value.get("aliases")
    return [value[key], *aliases] if isinstance(aliases, list) and not isinstance(value[key], list) else value[key]


def _texts(value: Any) -> list[str]:
    """An answer as text, in all its accepted forms: for True, "yes" and "true"; no form for None and NaN."""
    match value:
        case None:
            return []
        case bool():
            return ["yes", "true"] if value else ["no", "false"]
        case str():
            # Cut behind the last end tag, the pattern takes linear time.
            whole = WHOLE_ANSWER.findall("".join(value.rpartition("</answer>")[:2]))
            return [whole[0].strip() if len(whole) == 1 else value]
        case int():
            return [str(value)]
        case float() | Decimal() if value != value:
            return []
        case float() if value.is_integer():
            return [str(int(value))]
        case float() if abs(value) != float("inf"):
            with np.errstate(over="ignore", under="ignore"):
                single = np.float32(value)  # 1.7 that was stored in 32 bits reads as 1.7000000476837158
            return [np.format_float_positional(single if float(single) == value else value, trim="-")]
        case Decimal() if value.is_finite():
            text = f"{value:f}"
            return [text.rstrip("0").rstrip(".") if "." in text else text]
        case datetime.datetime() if value.time() == datetime.time():
            return [value.date().isoformat()]
        case datetime.datetime():
            return [value.isoformat(" ")]
        case datetime.date() | datetime.time():
            return [value.isoformat()]
        case bytes():
            return [value.decode("utf-8", "replace")]
    raise Unclear(f"{value!r:.60} is neither text nor a list of texts; write it as one")


# ---- pictures


def picture(value: Any) -> bytes | str | None:
    """A picture's bytes, or the text that represents it: base64, a file name or an address. None for no picture."""
    for _ in range(6):  # lists and objects around the picture, at most
        turns = conversation(value) if isinstance(value, list | str) else None
        if turns is not None:
            value = []
            for turn in turns:
                if turn.role in USER:
                    value += _parts(turn.content)[1]
        if isinstance(value, str):
            value = _list_in(value) or value.strip() if value.startswith("[") else value.strip()
        if isinstance(value, list) and value and all(type(byte) is int and 0 <= byte < 256 for byte in value):
            value = bytes(value)  # JSON and pandas write a file's bytes as numbers
        if isinstance(value, list):
            filled = [item for item in value if item]
            if len(filled) > 1:
                raise Unclear(f"{len(filled)} pictures; a question has one, drop the others")
            value = filled[0] if filled else None
        elif isinstance(value, dict):
            value = next((value[key] for key in PICTURE_KEYS if value.get(key)), None)
        else:
            break
    if value and not isinstance(value, bytes | str):
        raise Unclear("no image bytes; embed the picture itself, or name its file")
    return value or None
