"""Turns to token ids and back: markup, prompts, image placeholders, untrusted text.

A conversation is text between control tokens such as `<|im_end|>`. The text between two of them, the template's words
and a web page's alike, is encoded as one piece, by a tokenizer with the checkpoint's BPE model but without its control
tokens (system/tokenizer.py). The ids then equal those of the checkpoint's chat template, also where two texts meet, and
`<|im_end|>` in a web page is harmless text. Tool results come back in a user turn, because the checkpoint's template
drops images from tool turns.

The wording is in text files, one folder a set (`prompts/real`, `prompts/toy`). Placeholders: `{question}`, `{results}`,
`{tool}` (the name of the tool called) and, by a tool's name, how it is called (`{text_search}`); in hit.txt `{rank}`,
`{image}`, `{title}`, `{url}`, `{text}`. A line whose placeholders are all empty is left out: so a tool whose limit is 0
is not offered, and a hit without a thumbnail has no line for it.

How the model asks for a tool, and what its turns have to look like, is a grammar's affair: `Tags` (grammar.py) or, with
tool calls in JSON, `Hermes` (hermes.py). A checkpoint that thinks begins each turn with `<think>`, which its template
writes for it; what counts of the turn is what comes after `</think>`. Thoughts stay in the conversation as they are.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from itertools import accumulate, dropwhile
from pathlib import Path
from typing import Any, Collection, Mapping, Sequence, Union

import torch

from mmsr.episode import Hit, Observation
from mmsr.grammar import ANSWER, Action, Grammar, Tags
from mmsr.hermes import Hermes
from mmsr.system.errors import UserError
from mmsr.system.tokenizer import Tokenizer
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, VISIT, Tool

PROMPTS = Path(__file__).parent / "prompts"

# Control tokens.
START = "<|im_start|>"
STOP = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
CONTROL = (START, STOP, VISION_START, VISION_END, IMAGE_PAD)  # the control tokens that every checkpoint has
THINK = "<think>"
THINK_END = "</think>"
# The beginning of a model's turn where it is not empty: thoughts that the model continues, or empty ones (--thinking).
OPENED = f"{THINK}\n"
UNTHOUGHT = f"{THINK}\n\n{THINK_END}\n\n"

WORDING = {"tags": "real", "hermes": "hermes"}  # the prompts folder that has words for every tool, by grammar

TURN_FILES = ("user", "direct", "limit", "failed", "empty", "tool")
OWN_NAMES = (ANSWER, "system", "hit", "question", "results", *TURN_FILES)  # a tool's name is a file's and a placeholder
SEARCHES = (IMAGE_SEARCH, TEXT_SEARCH)
OFFERED = (*SEARCHES, "crop_search", "zoom", VISIT)  # the tools that our prompts for real models have words for
HIT_FIELDS = {"rank", "image", "title", "url", "text"}
PLACEHOLDER = re.compile(r"\{(\w+)\}")
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters except newline and tab

Part = Union[str, int, Any]  # of a turn: text, a control token's id, or an image (anything with `.tokens`)
Fields = dict[str, Sequence[Part]]  # what replaces a template's placeholders, by their names


@dataclass
class Piece:
    """A stretch of a conversation: ids, and pairs (offset of the image's first placeholder in `ids`, image)."""

    ids: list[int] = field(default_factory=list)
    images: list[tuple[int, Any]] = field(default_factory=list)


class Chat:
    """Writes and reads the turns of one checkpoint, with one set of prompts and one list of tools.

    `folder` holds the checkpoint's tokenizer.json, `prompts` the wording: user.txt at least; an absent system.txt means
    no system turn, and any other absent file is taken from the set of the grammar ("tags" or "hermes").
    `turn_start`: what the template writes at the beginning of a model's turn: OPENED, UNTHOUGHT or nothing.
    Raises UserError where folder or prompts are unusable.
    """

    def __init__(
        self,
        folder: str | Path,
        prompts: str | Path,
        tools: list[Tool],
        grammar: str = "tags",
        turn_start: str = "",
    ):
        self.tokenizer = Tokenizer(Path(folder) / "tokenizer.json", CONTROL)
        self.added = self.tokenizer.added  # ids of control tokens by name
        self.stop_id = self.added[STOP]
        _refuse_ambiguous(tools)
        self.grammar = grammar
        usual = PROMPTS / WORDING[grammar]
        self._grammar: Grammar = Tags(tools)
        if grammar == "hermes":
            self._grammar = Hermes(tools, _read_words(Path(prompts), usual))
        self.turn_start = turn_start
        self.thinks = turn_start == OPENED
        offered = [tool for tool in tools if tool.limit]
        self._calls: dict[str, list[Part]] = {name: [] for name in OFFERED}  # how to call a tool, by its name
        for tool in tools:
            self._calls[tool.name] = [self._grammar.call(tool)] if tool.limit else []
        self._offer = self._grammar.offer(offered)
        self._templates = _load_prompts(Path(prompts), self._calls, usual)

        # What is a control token in text of our own, and in the model's: there only what it may sample.
        self._markup = [*self._grammar.markup, *([THINK, THINK_END] if turn_start else [])]
        self._sampled = [*self._grammar.sampled, *([THINK_END] if self.thinks else [])]

        # What `neutralise` changes. It is wider: any case, attributes, blanks or invisible characters, closed or not.
        ours = [*self._grammar.names, *(["think"] if turn_start else [])]
        self._refuse_tags_as_tokens([name for name in ours if f"<{name}>" not in self._markup])
        names = "|".join(map(re.escape, ours))
        self._foreign_tag = re.compile(rf"<(?P<inside>[^\w<>]*(?P<name>{names})\b[^<>]*)(?P<end>>?)", re.IGNORECASE)

    def _refuse_tags_as_tokens(self, names: list[str]) -> None:
        """UserError for a tokenizer that writes a tag as one control token: the model may not sample those."""
        tags = [f"<{name}>" for name in names]
        tags += [f"</{name}>" for name in names]
        for token in self.added:
            if any(tag in token for tag in tags):
                why = "is a token of its own, and this program reads and writes tags as plain text"
                advice = "take a checkpoint whose tokenizer has no such token"
                raise UserError(f"{self.tokenizer.path}: {' '.join(token.split())} {why}; {advice}")

    # ---- turns to ids

    def prompt(self, question: str, image: Any | None, direct: bool = False) -> Piece:
        """The conversation up to the model's first word. `direct` asks for an answer without any search."""
        template = self._templates["direct" if direct else "user"]
        system = "\n\n".join(filter(None, [self._templates["system"], "" if direct else self._offer]))
        parts: list[Part] = []
        if system:
            parts += [self.added[START], *self._marked(f"system\n{system}", self._markup), self.stop_id, "\n"]
        content = _unless_none(image)
        content += _fill(template, self._fields(question))
        return self._encode(parts + self._user_turn(content))

    def assistant(self, text: str) -> list[int]:
        """Ids of a model turn with its stop id, for turns that are forced or imitated instead of sampled."""
        return self._encode([*self._marked(text, self._sampled), self.stop_id]).ids

    def opening(self, text: str) -> list[int]:
        """Ids of the first words of a model turn, after which the model continues."""
        return self._encode(self._marked(text, self._sampled)).ids

    def whole_turn(self, text: str) -> str:
        """A turn by another writer as this model would write it, behind what its template has opened.

        One without thoughts closes them at once, and one with thoughts does not open them again.
        """
        if not self.thinks:
            return text
        if THINK_END in text:
            return text.removeprefix(OPENED).removeprefix(THINK)
        return f"\n{THINK_END}\n\n{text}"

    def _marked(self, text: str, markup: Collection[str]) -> list[Part]:
        """Text of our own or the model's, with `markup` as control tokens, where the tokenizer has them."""
        known = [name for name in markup if name in self.added]
        if not known:
            return [text]
        pieces = re.split(f"({'|'.join(map(re.escape, known))})", text)
        return [self.added[piece] if piece in known else piece for piece in pieces if piece]

    def observation(
        self,
        tool_name: str,
        observation: Observation,
        images: list[Any | None],
        question: str,
    ) -> Piece:
        """What follows the stop id of a model turn that called a tool: the result as a user turn.

        `images[i]` is the loaded thumbnail of `observation.hits[i]`, or None. Raises ValueError where they do not pair.
        """
        if len(images) != len(observation.hits):
            raise ValueError(f"{tool_name}: {len(observation.hits)} hits, but {len(images)} thumbnails")
        results = self._results(observation.hits, images)
        template = self._templates[self._result_file(tool_name, observation)]
        content = _fill(template, self._fields(question, tool_name, results))
        before, after = self._grammar.framed()
        framed = [*self._marked(before, self._markup), *content, *self._marked(after, self._markup)]
        return self._encode(["\n", *self._user_turn(framed)])

    def _user_turn(self, content: list[Part]) -> list[Part]:
        start = self.added[START]
        begin = self._marked(f"assistant\n{self.turn_start}", self._markup)
        return [start, "user\n", *content, self.stop_id, "\n", start, *begin]

    def _result_file(self, tool_name: str, observation: Observation) -> str:
        if observation.source == "limit":
            return "limit"
        if not observation.ok:
            return "failed"  # a fixed sentence: the error itself may hold addresses, keys or untrusted text
        if not observation.hits:
            return "empty"
        return tool_name if tool_name in self._templates else "tool"

    def _fields(self, question: str, tool: str = "", results: Sequence[Part] = ()) -> Fields:
        """What fills the placeholders of a turn's template."""
        return {
            "question": _unless_empty(self.neutralise(question)),
            "tool": _unless_empty(tool),
            "results": results,
            **self._calls,
        }

    def _results(self, hits: tuple[Hit, ...], images: list[Any | None]) -> list[Part]:
        """All hits through hit.txt: each on its own lines if the file has several, else side by side."""
        template = self._templates["hit"]
        separator = "\n" if "\n" in template else " "
        parts: list[Part] = []
        for rank, (hit, image) in enumerate(zip(hits, images), start=1):
            fields = {
                "rank": [str(rank)],
                "image": _unless_none(image),
                "title": _unless_empty(self._one_line(hit.title)),
                "url": _unless_empty(self._one_line(hit.url)),
                "text": _unless_empty(self.neutralise(hit.text)),
            }
            if rank > 1:
                parts.append(separator)
            parts += _fill(template, fields)
        return parts

    def _encode(self, parts: Sequence[Part]) -> Piece:
        """Ids of a turn's parts. Neighbouring texts are encoded as one, images become placeholders."""
        piece = Piece()
        texts: list[str] = []  # neighbours that are not encoded yet
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
                continue
            piece.ids += self._encode_texts(texts)
            texts = []
            if isinstance(part, int):
                piece.ids.append(part)
                continue
            piece.ids.append(self.added[VISION_START])
            piece.images.append((len(piece.ids), part))
            piece.ids += [self.added[IMAGE_PAD]] * part.tokens
            piece.ids.append(self.added[VISION_END])
        piece.ids += self._encode_texts(texts)
        return piece

    def _encode_texts(self, texts: list[str]) -> list[int]:
        """Ids of texts side by side: a prompt's words, and what fills its placeholders.

        Each text is harmless alone, or the prompt's own. But `<{url}>` with "/information" in it makes a tag of ours,
        and so do the halves of a tag in two fields. A tag that spans two texts begins with ‹ instead.
        """
        seams = set(accumulate(map(len, texts)))  # offsets in the joined text at which one text ends

        def harmless(tag: re.Match) -> str:
            inside = range(tag.start() + 1, tag.end("name"))
            spans_two = not seams.isdisjoint(inside)
            return "‹" + tag[0][1:] if spans_two else tag[0]

        text = self._foreign_tag.sub(harmless, "".join(texts))
        return self.tokenizer.encode(text)

    # ---- untrusted text

    def neutralise(self, text: str) -> str:
        """Untrusted text with our tags made harmless: their < and > become ‹ and ›, one for one.

        Nothing is deleted from within, so that no tag can be put together from the rest. Line ends become newlines.
        """
        text = "\n".join(text.splitlines())
        text = UNPRINTABLE.sub(" ", text).strip()
        # A leading combining mark would compose with the template's last character: > and U+0338 make one ≯.
        text = "".join(dropwhile(unicodedata.combining, text))

        def harmless(tag: re.Match) -> str:
            end = "›" if tag["end"] else ""
            return f"‹{tag['inside']}{end}"

        return self._foreign_tag.sub(harmless, text)

    def _one_line(self, text: str) -> str:
        return " ".join(self.neutralise(text).split())

    # ---- ids to turns

    def suppressed_tokens(self, vocab_size: int) -> torch.Tensor:
        """What the model may not sample: control ids except the stop id and its own markup, and rows without a token.

        Returns (vocab_size,) bool. Raises UserError where the tokenizer has tokens that a model of this size has not.
        """
        allowed = [*self.tokenizer.text_ids(), self.stop_id]
        allowed += [self.added[name] for name in self._sampled if name in self.added]
        control = [self.added[name] for name in CONTROL]
        largest = max(*allowed, *control)
        if largest >= vocab_size:
            raise UserError(
                f"the tokenizer's ids go up to {largest}, the model's vocabulary has {vocab_size}: "
                "take tokenizer.json and config.json from the same checkpoint"
            )
        suppressed = torch.ones(vocab_size, dtype=torch.bool)
        suppressed[allowed] = False
        return suppressed

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`: broken UTF-8 replaced, control tokens by their names, ids without a token left out."""
        return self.tokenizer.decode(ids)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each of `ids`; joined they are `decode(ids)`. A character is with the token that completes it."""
        return self.tokenizer.pieces(ids)

    def parse(self, text: str) -> Action:
        """The action of a model turn, given as its text without the stop token. Never raises."""
        return self._grammar.parse(self.said(text))

    def well_formed(self, text: str) -> bool:
        """Whether a turn has the form that earns the format reward: that of the grammar, behind closed thoughts."""
        said = self.said(text)
        if self.thinks and (THINK in said or THINK_END in said):
            return False
        thoughts = text.removesuffix(said).replace(THINK_END, "").strip()
        return self._grammar.well_formed(said, thought=bool(thoughts))

    def said(self, text: str) -> str:
        """What counts of a turn: all of it, or what comes after its thoughts. Nothing while these are open."""
        return text.partition(THINK_END)[2] if self.thinks else text


def _refuse_ambiguous(tools: list[Tool]) -> None:
    """UserError for a tool that would be taken for another, or for a word of the markup or of the prompts folder.

    A tool with both the name and the tag of an earlier one replaces it. `setdefault` gives what was there before.
    """
    name_of_tag = {ANSWER: "", "reason": "", "information": ""}
    tag_of_name = dict.fromkeys(OWN_NAMES, "")
    for tool in tools:
        if name_of_tag.setdefault(tool.tag, tool.name) != tool.name:
            raise UserError(f"tool {tool.name}: its tag {tool.tag!r} is taken; give it another")
        if tag_of_name.setdefault(tool.name, tool.tag) != tool.tag:
            raise UserError(f"tool {tool.name}: its name {tool.name!r} is taken; give it another")


def _unless_empty(text: str) -> list[Part]:
    return [text] if text else []


def _unless_none(image: Any | None) -> list[Part]:
    return [] if image is None else [image]


# ---- prompts


def _fill(template: str, fields: Fields) -> list[Part]:
    """The template with its placeholders filled in one pass: what is filled in is never searched for placeholders."""
    lines = []
    for line in template.split("\n"):
        if _says_something(line, fields):
            lines.append(_without_empty(line, fields))
    words, *rest = PLACEHOLDER.split("\n".join(lines))  # text, then names of placeholders and text in turn
    parts: list[Part] = [words]
    for name, words in zip(rest[::2], rest[1::2]):
        parts += fields[name]
        parts.append(words)
    return parts


def _says_something(line: str, fields: Fields) -> bool:
    names = PLACEHOLDER.findall(line)
    return not names or any(fields[name] for name in names)


def _without_empty(line: str, fields: Fields) -> str:
    """The line without empty placeholders, and without the blanks between them and their neighbours."""
    kept = line
    for name in PLACEHOLDER.findall(line):
        if not fields[name]:
            kept = kept.replace(f"{{{name}}}", "")
    return line if kept == line else " ".join(kept.split())


def _load_prompts(folder: Path, calls: dict[str, list[Part]], usual: Path) -> dict[str, str]:
    """The templates by name, from `folder` or else from the set `usual`. A tool's own file is optional."""
    if not (folder / "user.txt").is_file():
        raise UserError(f"{folder / 'user.txt'}: no such file; a prompts folder needs one, with {{question}} in it")
    templates = {"system": ""}
    if (folder / "system.txt").is_file():
        templates["system"] = _read_prompt(folder / "system.txt")
    for name in [*TURN_FILES, "hit", *calls]:
        path = folder / f"{name}.txt"
        if not path.is_file():
            if name not in SEARCHES and name in calls and (folder / "tool.txt").is_file():
                continue  # this folder words the results of all further tools
            path = usual / f"{name}.txt"
        if not path.is_file():
            continue
        templates[name] = _read_prompt(path)
        known = HIT_FIELDS if name == "hit" else {"question", "results", "tool", *calls}
        unknown = sorted(set(PLACEHOLDER.findall(templates[name])) - known)
        if unknown:
            raise UserError(f"{path}: unknown placeholder {{{unknown[0]}}}; known are {', '.join(sorted(known))}")
        if name in ("user", "direct") and "{question}" not in templates[name]:
            raise UserError(f"{path}: the question is missing; write {{question}} where it belongs")
    return templates


def _read_words(folder: Path, usual: Path) -> Mapping[str, Mapping[str, str]]:
    """tools.json of a prompts folder, or of the set `usual`: what calls in JSON say of each tool, see `Hermes`."""
    path = folder / "tools.json"
    if not path.is_file():
        path = usual / "tools.json"
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        fits = all(isinstance(said, str) for tool in words.values() for said in tool.values())
    except (ValueError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: not an object of tools with texts `description` and `query`; see {usual / path.name}")
    return words


def _read_prompt(path: Path) -> str:
    """A prompt file's text without its last newline."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
