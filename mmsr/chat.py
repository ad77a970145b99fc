r"""Turns to token ids and back: markup, prompts, image placeholders, the action grammar, untrusted text.

Token in, token out: text is cut only at control tokens. What stands between two of them, the template's words and a
stranger's alike, is encoded whole by a tokenizer with the checkpoint's BPE model but no added vocabulary. The ids then
equal those of the checkpoint's chat template, seams included, and `<|im_end|>` in a web page is harmless text.
Tool results come back in a user turn, because the template drops images from tool turns.

The wording is in text files, one folder a set (`prompts/real`, `prompts/toy`). Placeholders: `{question}`, `{results}`,
`{tool}` (the name of the tool called) and, by a tool's name, how it is called (`{text_search}`); in hit.txt `{rank}`,
`{image}`, `{title}`, `{url}`, `{text}`. A line whose placeholders are all empty is left out: a tool whose limit is 0
is not offered, a hit without a thumbnail has no line for it.

The action grammar. An action is a tag pair with no other action tag inside; the last one outside closed reasons counts.
R stands for `<reason>why</reason>`. `Chat.parse` gives action and query, `Chat.well_formed` the last column.

| the model's turn                                            | action       | query     | well-formed |
|-------------------------------------------------------------|--------------|-----------|-------------|
| R <answer>Tagus River</answer>                              | answer       | Tagus River | yes |
| R <search><img></search>                                    | image_search | -         | yes |
| R <text_search>bridge lisbon</text_search>                  | text_search  | bridge lisbon | yes |
| \n R\n<text_search>\n two\n lines </text_search> \n         | text_search  | two lines | yes |
| R <search> < img >\n</search>                               | image_search | -         | yes |
| R so: <answer>Paris</answer>                                | answer       | Paris     | yes |
| R <answer> </answer>                                        | answer       | -         | yes |
| R <search>a bridge</search>                                 | -            | -         | no  |
| R <text_search> \n</text_search>                            | -            | -         | no  |
| R <answer>Paris                                             | -            | -         | no  |
| R <answer>Paris</search>                                    | -            | -         | no  |
| R <ANSWER>Paris</ANSWER>                                    | -            | -         | no  |
| R Paris                                                     | -            | -         | no  |
| <reason>or <answer>Rome</answer></reason>                   | -            | -         | no  |
| <reason>or <answer>Rome</answer></reason><answer>Paris</answer> | answer   | Paris     | no  |
| <reason>or <answer>Rome</reason><answer>Paris</answer>      | answer       | Paris     | no  |
| <reason>why <answer>Paris</answer>                          | answer       | Paris     | no  |
| <answer>Paris</answer>                                      | answer       | Paris     | no  |
| <answer>Paris</answer> R                                    | answer       | Paris     | no  |
| Well: R <answer>Paris</answer>                              | answer       | Paris     | no  |
| R R <answer>Paris</answer>                                  | answer       | Paris     | no  |
| R <answer>Paris</answer> Yes.                               | answer       | Paris     | no  |
| R <text_search>q</text_search> <answer>Paris</answer>       | answer       | Paris     | no  |
| R <answer>Paris</answer> <search><img></search>             | image_search | -         | no  |
| R <text_search>q</text_search> <search>q</search>           | text_search  | q         | no  |
| R <answer>Rome <answer>Paris</answer>                       | answer       | Paris     | no  |
| R <answer>see <search><img></search></answer>               | image_search | -         | no  |
| R </search> <answer>Paris</answer>                          | answer       | Paris     | no  |
| R <ans<reason></reason>wer>Paris</answer>                   | -            | -         | no  |
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, dropwhile, groupby
from operator import index
from pathlib import Path
from typing import Any, Iterator, Union

import torch
from tokenizers import Tokenizer

from mmsr.episode import Hit, Observation
from mmsr.system.errors import UserError, first_line
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, Tool

PROMPTS = Path(__file__).parent / "prompts"
ANSWER = "answer"

START, STOP = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
CONTROL = (START, STOP, VISION_START, VISION_END, IMAGE_PAD)  # those that this program writes

TURN_FILES = ("user", "direct", "limit", "failed", "empty", "tool")
OWN_NAMES = (ANSWER, "system", "hit", "question", "results", *TURN_FILES)  # a tool's name is a file's and a placeholder
HIT_FIELDS = {"rank", "image", "title", "url", "text"}
PLACEHOLDER = re.compile(r"\{(\w+)\}")
REASON, REASON_END = "<reason>", "</reason>"
# Runs of each kind of character: a pattern of the tokenizer's that needs exponential time is found with it, and so is
# a vocabulary that lacks some of them, or a tokenizer that changes what it reads.
ORDINARY = "".join(character * 64 for character in "aA1 !\n\t_éй東한🙂")
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters, but for newline and tab

Part = Union[str, int, Any]  # of a turn: text, a control token's id, or an image (anything with `.tokens`)


@dataclass
class Piece:
    """A stretch of a conversation: ids, and pairs (offset of the image's first placeholder in `ids`, image)."""

    ids: list[int] = field(default_factory=list)
    images: list[tuple[int, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Action:
    """What a model turn asks for: "answer", a tool's name, or None where no action can be read."""

    name: str | None = None
    query: str = ""  # the answer's or the query's words, blanks collapsed; "" for a tool with a fixed payload
    last: bool = False  # nothing but blanks comes after it


class Chat:
    """Writes and reads the turns of one checkpoint, with one set of prompts and one list of tools.

    `folder` holds the checkpoint's tokenizer.json, `prompts` the wording: user.txt at least; an absent system.txt means
    no system turn, and any other absent file is taken from the real set. Raises UserError where either is unusable.
    """

    def __init__(self, folder: str | Path, prompts: str | Path, tools: list[Tool]):
        self._file = Path(folder) / "tokenizer.json"
        self._tokenizer, self.added = _load_tokenizer(self._file)
        self._names = {token_id: name for name, token_id in self.added.items()}
        self._pieces: dict[int, str] = {}  # what single tokens say, as far as anybody asked
        self.stop_id = self.added[STOP]
        _refuse_mistakable(tools)
        self._tools = {tool.tag: tool for tool in tools}
        self._calls: dict[str, list[Part]] = {IMAGE_SEARCH: [], TEXT_SEARCH: []}
        for tool in tools:
            call = f"<{tool.tag}>{tool.payload or 'query'}</{tool.tag}>"
            self._calls[tool.name] = [call] if tool.limit else []
        self._templates = _load_prompts(Path(prompts), self._calls)

        tags = "|".join(map(re.escape, [ANSWER, *self._tools]))
        self._tag = re.compile(f"</?(?:reason|{tags})>")
        self._pair = re.compile(rf"<({tags})>((?:(?!</?(?:{tags})>).)*)</\1>", re.DOTALL)
        payload_tags = re.findall(r"<(\w+)", " ".join(tool.payload or "" for tool in tools))
        ours = ["reason", ANSWER, "information", *self._tools, *payload_tags]
        self._refuse_tags_as_tokens(ours)
        # Wider than what `parse` reads: any case, attributes, blanks or invisible characters, closed or not.
        names = "|".join(map(re.escape, ours))
        self._foreign_tag = re.compile(rf"<([^\w<>]*)({names})\b([^<>]*)(>?)", re.IGNORECASE)

    def _refuse_tags_as_tokens(self, ours: list[str]) -> None:
        """UserError for a tokenizer that writes a tag as one token: here tags are plain text, control tokens banned."""
        tags = [f"<{slash}{name}>" for name in ours for slash in ("", "/")]
        for name in self.added:
            if any(tag in name for tag in tags):
                why = "is a token of its own, and this program reads and writes tags as plain text"
                advice = "take a checkpoint whose tokenizer has no such token"
                raise UserError(f"{self._file}: {' '.join(name.split())} {why}; {advice}")

    # ---- turns to ids

    def prompt(self, question: str, image: Any | None, direct: bool = False) -> Piece:
        """The conversation up to the model's first word. `direct` asks for an answer without any search."""
        template = self._templates["direct" if direct else "user"]
        fields = self._fields(question)
        system = self._templates["system"]
        parts = [self.added[START], f"system\n{system}", self.stop_id, "\n"] if system else []
        picture = [] if image is None else [image]
        return self._encode(parts + self._user_turn(picture + _fill(template, fields)))

    def assistant(self, text: str) -> list[int]:
        """Ids of a model turn with its stop id, for turns that are forced or imitated instead of sampled."""
        return self._encode([text, self.stop_id]).ids

    def opening(self, text: str) -> list[int]:
        """Ids of the first words of a model turn, which the model then goes on with."""
        return self._encode([text]).ids

    def observation(self, tool_name: str, observation: Observation, images: list[Any | None], question: str) -> Piece:
        """What follows the stop id of a model turn that called a tool: the result as a user turn.

        `images[i]` is the loaded thumbnail of `observation.hits[i]`, or None. Raises ValueError where they do not pair.
        """
        if len(images) != len(observation.hits):
            raise ValueError(f"{tool_name}: {len(observation.hits)} hits, but {len(images)} thumbnails")
        fields = self._fields(question, tool_name, self._results(observation.hits, images))
        template = self._templates[self._result_file(tool_name, observation)]
        return self._encode(["\n", *self._user_turn(_fill(template, fields))])

    def _user_turn(self, content: list[Part]) -> list[Part]:
        start = self.added[START]
        return [start, "user\n", *content, self.stop_id, "\n", start, "assistant\n"]

    def _result_file(self, tool_name: str, observation: Observation) -> str:
        if observation.source == "limit":
            return "limit"
        if not observation.ok:
            return "failed"  # a fixed sentence: the error itself may hold addresses, keys or a stranger's text
        if not observation.hits:
            return "empty"
        return tool_name if tool_name in self._templates else "tool"

    def _fields(self, question: str, tool: str = "", results: list[Part] = ()) -> dict[str, list[Part]]:
        return {"question": _text(self.neutralise(question)), "tool": _text(tool), "results": results, **self._calls}

    def _results(self, hits: tuple[Hit, ...], images: list[Any | None]) -> list[Part]:
        """All hits through hit.txt: each on its own lines if that has several, else side by side."""
        template = self._templates["hit"]
        separator = "\n" if "\n" in template else " "
        parts: list[Part] = []
        for rank, (hit, image) in enumerate(zip(hits, images), start=1):
            fields = {
                "rank": [str(rank)],
                "image": [] if image is None else [image],
                "title": _text(self._flat(hit.title)),
                "url": _text(self._flat(hit.url)),
                "text": _text(self.neutralise(hit.text)),
            }
            parts += [separator] * (rank > 1) + _fill(template, fields)
        return parts

    def _encode(self, parts: list[Part]) -> Piece:
        """Joins neighbouring texts and encodes them whole; lays out images as placeholders."""
        piece = Piece()
        for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
            if is_text:
                piece.ids += self._encode_text(self._joined(list(run)))
                continue
            for part in run:
                if isinstance(part, int):
                    piece.ids.append(part)
                else:
                    piece.images.append((len(piece.ids) + 1, part))
                    pads = [self.added[IMAGE_PAD]] * part.tokens
                    piece.ids += [self.added[VISION_START], *pads, self.added[VISION_END]]
        return piece

    def _joined(self, texts: list[str]) -> str:
        """Texts side by side: a prompt's words, and what fills its placeholders. No tag of ours is put together.

        Each text is harmless alone, or a prompt's own; but `<{url}>` and "/information" make a tag, as halves do that
        stand in two fields.
        """
        ends = {*accumulate(map(len, texts))}

        def kept(tag: re.Match) -> str:
            inside = ends.isdisjoint(range(tag.start() + 1, tag.end(2)))
            return tag[0] if inside else "‹" + tag[0][1:]

        return self._foreign_tag.sub(kept, "".join(texts))

    def _encode_text(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates, which the tokenizer refuses
        with _panics_told(self._file, f"a text of {len(text)} characters"):
            ids = self._tokenizer.encode(text).ids
        smuggled = self._names.keys() & set(ids)
        assert not smuggled, f"text of {len(text)} characters gave the control ids {sorted(smuggled)}"
        return ids

    # ---- untrusted text

    def neutralise(self, text: str) -> str:
        """A stranger's text with our tags made harmless: their < and > become ‹ and ›, one for one.

        Nothing is deleted from within, so no tag can be put together from the rest. Line ends become newlines.
        """
        text = UNPRINTABLE.sub(" ", "\n".join(text.splitlines())).strip()
        # A leading combining mark would compose with the template's last character: > and U+0338 make one ≯.
        text = "".join(dropwhile(unicodedata.combining, text))
        return self._foreign_tag.sub(lambda tag: f"‹{tag[1]}{tag[2]}{tag[3]}{tag[4] and '›'}", text)

    def _flat(self, text: str) -> str:
        return " ".join(self.neutralise(text).split())

    # ---- ids to turns

    def suppressed_tokens(self, vocab_size: int) -> torch.Tensor:
        """What the model may not sample (vocab_size,) bool: control ids but the stop id, and rows without a token.

        Raises UserError where the tokenizer has tokens that a model of this size has not.
        """
        allowed = [*self._tokenizer.get_vocab().values(), self.stop_id]
        most = max(*allowed, *(self.added[name] for name in CONTROL))
        if most >= vocab_size:
            raise UserError(
                f"the tokenizer's ids go up to {most}, the model's vocabulary has {vocab_size}: "
                "take tokenizer.json and config.json from the same checkpoint"
            )
        suppressed = torch.ones(vocab_size, dtype=torch.bool)
        suppressed[allowed] = False
        return suppressed

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`: broken UTF-8 replaced, control tokens by their names, ids without a token left out."""
        return "".join(
            "".join(self._names[i] for i in run) if is_control else self._tokenizer.decode(list(run))
            for is_control, run in groupby(ids, key=self._names.__contains__)
        )

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each of `ids`; joined they are `decode(ids)`.

        A token may end within a character: it gets "", and the one that completes the character all of it.
        """
        texts, start = [], 0  # ids before `start` are written
        for end in range(1, len(ids) + 1):
            text = self._piece(ids[start]) if end == start + 1 else self.decode(ids[start:end])
            whole = end == len(ids) or not text.endswith("\ufffd")
            texts.append(text if whole else "")
            start = end if whole else start
        return texts

    def _piece(self, token_id: int) -> str:
        if token_id not in self._pieces:
            self._pieces[token_id] = self.decode([token_id])
        return self._pieces[token_id]

    def parse(self, text: str) -> Action:
        """The action of a model turn (its decoded text without the stop id), after the table above. Never raises."""
        visible = _without_reasons(text)
        for pair in reversed(list(self._pair.finditer(visible))):
            found = self._read(pair[1], " ".join(pair[2].split()))
            if found is not None:
                name, query = found
                return Action(name, query, last=not text[pair.end() :].strip())
        return Action()

    def _read(self, tag: str, inside: str) -> tuple[str, str] | None:
        if tag == ANSWER:
            return ANSWER, inside
        tool = self._tools[tag]
        if tool.payload is None:
            return (tool.name, inside) if inside else None
        return (tool.name, "") if _squeeze(inside) == _squeeze(tool.payload) else None

    def well_formed(self, text: str) -> bool:
        """Whether a turn is one reason, then one action, and nothing before or after them."""
        tags = Counter(self._tag.findall(text))
        one_reason = tags.pop(REASON, 0) == tags.pop(REASON_END, 0) == 1
        # The action that `parse` found is one pair: with two tags in all there is no stray one.
        return one_reason and tags.total() == 2 and text.lstrip().startswith(REASON) and self.parse(text).last


def _refuse_mistakable(tools: list[Tool]) -> None:
    """UserError for a tool that would be taken for another, or for a word of the markup or of the prompts folder."""
    tags, names = {tag: "" for tag in (ANSWER, "reason", "information")}, {name: "" for name in OWN_NAMES}
    for tool in tools:  # one with the name and the tag of an earlier one replaces it
        for what, known, word, other in ("tag", tags, tool.tag, tool.name), ("name", names, tool.name, tool.tag):
            if known.setdefault(word, other) != other:
                raise UserError(f"tool {tool.name}: its {what} {word!r} is taken; give it another")


def _without_reasons(text: str) -> str:
    """Closed reasons blanked out, at equal length: where one was removed, two halves could join into a tag.

    Each place is looked at once. A regular expression would look for the end from every `<reason>`: seconds for a
    turn that opens thousands and closes none.
    """
    pieces, done = [], 0
    while (start := text.find(REASON, done)) >= 0 and (end := text.find(REASON_END, start)) >= 0:
        end += len(REASON_END)
        pieces += [text[done:start], " " * (end - start)]
        done = end
    return "".join([*pieces, text[done:]])


def _text(text: str) -> list[Part]:
    return [text] if text else []


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _fill(template: str, fields: dict[str, list[Part]]) -> list[Part]:
    """The template with its placeholders filled in one pass: what is filled in is never searched for placeholders."""
    template = "\n".join(_without_empty(line, fields) for line in template.split("\n") if _says_something(line, fields))
    pieces = PLACEHOLDER.split(template)  # words and names by turns
    parts: list[Part] = [pieces[0]]
    for name, words in zip(pieces[1::2], pieces[2::2]):
        parts += [*fields[name], words]
    return parts


def _says_something(line: str, fields: dict[str, list[Part]]) -> bool:
    names = PLACEHOLDER.findall(line)
    return not names or any(fields[name] for name in names)


def _without_empty(line: str, fields: dict[str, list[Part]]) -> str:
    """Empty placeholders go, and the blanks that stood between them and their neighbours."""
    kept = PLACEHOLDER.sub(lambda placeholder: placeholder[0] if fields[placeholder[1]] else "", line)
    return line if kept == line else " ".join(kept.split())


def _load_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, int]]:
    """The tokenizer of a checkpoint without its added vocabulary, and that vocabulary by name."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; --model wants a folder with the checkpoint's tokenizer.json")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        added = {token["content"]: index(token["id"]) for token in spec["added_tokens"]}
        if min(added.values(), default=0) < 0:
            raise ValueError("a token id is negative")
        for name in added:  # trained tokenizers list their control tokens in the BPE vocabulary too
            spec["model"]["vocab"].pop(name, None)
        spec |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        spec["model"]["dropout"] = None  # of BPE merges, while a tokenizer is trained: equal texts must have equal ids
        with _panics_told(path, "this file"):
            tokenizer = Tokenizer.from_str(json.dumps(spec))
        with _panics_told(path, "an ordinary text"):
            back = tokenizer.decode(tokenizer.encode(ORDINARY).ids)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: not a readable BPE tokenizer ({reason}); fetch the file again") from error
    missing, advice = [name for name in CONTROL if name not in added], "take the tokenizer of a Qwen2.5-VL checkpoint"
    if missing:
        raise UserError(f"{path}: no control token {', '.join(missing)}; {advice}")
    if back != ORDINARY:
        raise UserError(f"{path}: an ordinary text does not come back from this tokenizer as it was; {advice}")
    names = {token_id: name for name, token_id in tokenizer.get_vocab().items()}
    for name, token_id in added.items():
        if (other := names.setdefault(token_id, name)) != name:
            raise UserError(f"{path}: {name} and {other!r} have the same id {token_id}; fetch the file again")
    return tokenizer, added


@contextmanager
def _panics_told(path: Path, what: str) -> Iterator[None]:
    """A panic of the tokenizers library, which is no Exception and would pass every handler, as a UserError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a class that cannot be imported
            raise
        raise UserError(
            f"{path}: the tokenizers library gives up on {what} ({first_line(error)}); take another"
        ) from None


def _load_prompts(folder: Path, calls: dict[str, list[Part]]) -> dict[str, str]:
    """The templates by name, from `folder` or else from the real set. A tool's own file is optional."""
    if not (folder / "user.txt").is_file():
        raise UserError(f"{folder / 'user.txt'}: no such file; a prompts folder needs one, with {{question}} in it")
    templates = {"system": _read_prompt(folder / "system.txt") or ""}
    for name in [*TURN_FILES, "hit", *calls]:
        paths = [path for path in (folder / f"{name}.txt", PROMPTS / "real" / f"{name}.txt") if path.is_file()]
        if not paths:
            continue
        templates[name] = _read_prompt(paths[0])
        known = HIT_FIELDS if name == "hit" else {"question", "results", "tool", *calls}
        unknown = sorted(set(PLACEHOLDER.findall(templates[name])) - known)
        if unknown:
            raise UserError(f"{paths[0]}: unknown placeholder {{{unknown[0]}}}; known are {', '.join(sorted(known))}")
        if name in ("user", "direct") and "{question}" not in templates[name]:
            raise UserError(f"{paths[0]}: the question is missing; write {{question}} where it belongs")
    return templates


def _read_prompt(path: Path) -> str | None:
    """A prompt file's text without its last newline, or None where there is none."""
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
