"""A checkpoint's `tokenizer.json`: text to ids and back, with control tokens kept apart from text.

`encode` knows the checkpoint's BPE model but none of its added tokens, so no text becomes a control token. Their ids
are in `added`, by name. Files that cannot be used are refused when they are opened.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from itertools import groupby
from operator import index
from pathlib import Path
from typing import Any, Iterator, Sequence

import tokenizers

from mmsr.system.errors import UserError, first_line

# Runs of each kind of character. This text finds a split pattern that needs exponential time, a vocabulary that lacks
# some characters, and a tokenizer that changes what it reads.
ORDINARY = "".join(character * 64 for character in "aA1 !\n\t_éй東한🙂")


class Tokenizer:
    """The tokenizer of one checkpoint.

    `control` names the added tokens that must be there. Raises UserError for a file that is missing, damaged, without
    one of them, or of a tokenizer that does not give ordinary text back.
    """

    def __init__(self, path: Path, control: Sequence[str]):
        self.path = path
        spec, self.added = _read(path)  # added tokens: id by name
        self.names = {token_id: name for name, token_id in self.added.items()}
        self._bpe = _build(path, spec)
        self._texts: dict[int, str] = {}  # of single tokens, as far as they have been asked for
        self._check(control)

    def _check(self, control: Sequence[str]) -> None:
        advice = "take the tokenizer of a Qwen2.5-VL or Qwen3-VL checkpoint"
        round_trip = _round_trip(self.path, self._bpe)
        missing = [name for name in control if name not in self.added]
        if missing:
            raise UserError(f"{self.path}: no control token {', '.join(missing)}; {advice}")
        if round_trip != ORDINARY:
            raise UserError(f"{self.path}: an ordinary text does not come back from this tokenizer as it was; {advice}")
        owners = {token_id: name for name, token_id in self._bpe.get_vocab().items()}
        for name, token_id in self.added.items():
            other = owners.setdefault(token_id, name)
            if other != name:
                raise UserError(f"{self.path}: {name} and {other!r} have the same id {token_id}; fetch the file again")

    def text_ids(self) -> list[int]:
        """The ids that text can have: all but those of added tokens."""
        return list(self._bpe.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, none of them a control token's."""
        text = text.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates, which the library refuses
        with _panic_as_user_error(self.path, f"a text of {len(text)} characters"):
            ids = self._bpe.encode(text).ids
        smuggled = self.names.keys() & set(ids)
        assert not smuggled, f"text of {len(text)} characters gave the control ids {sorted(smuggled)}"
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: broken UTF-8 replaced, control tokens by their names, ids without a token left out."""
        texts = []
        for is_control, run in groupby(ids, key=self.names.__contains__):
            if is_control:
                texts += [self.names[token_id] for token_id in run]
            else:
                texts.append(self._bpe.decode(list(run)))
        return "".join(texts)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each of `ids`; joined they are `decode(ids)`.

        A token may end within a character. Then it gets "", and the token that completes the character gets all of it.
        """
        texts = []
        start = 0  # of the ids that have no text yet
        for end in range(1, len(ids) + 1):
            text = self._text(ids[start]) if end == start + 1 else self.decode(ids[start:end])
            complete = end == len(ids) or not text.endswith("\ufffd")
            texts.append(text if complete else "")
            if complete:
                start = end
        return texts

    def _text(self, token_id: int) -> str:
        if token_id not in self._texts:
            self._texts[token_id] = self.decode([token_id])
        return self._texts[token_id]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What `tokenizer.json` says without its added tokens, and the ids of those by name."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; --model wants a folder with the checkpoint's tokenizer.json")
    with _unreadable_as_user_error(path):
        spec = json.loads(path.read_text(encoding="utf-8"))
        added = {token["content"]: index(token["id"]) for token in spec["added_tokens"]}  # `index` takes integers only
        if min(added.values(), default=0) < 0:
            raise ValueError("a token id is negative")
        for name in added:  # trained tokenizers list their control tokens in the BPE vocabulary too
            spec["model"]["vocab"].pop(name, None)
        spec["added_tokens"] = []
        spec["post_processor"] = None
        spec["truncation"] = None
        spec["padding"] = None
        spec["model"]["dropout"] = None  # of BPE merges, for training a tokenizer: equal texts must have equal ids
    return spec, added


def _build(path: Path, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    with _unreadable_as_user_error(path), _panic_as_user_error(path, "this file"):
        return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _round_trip(path: Path, bpe: tokenizers.Tokenizer) -> str:
    with _unreadable_as_user_error(path), _panic_as_user_error(path, "an ordinary text"):
        return bpe.decode(bpe.encode(ORDINARY).ids)


@contextmanager
def _unreadable_as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: not a readable BPE tokenizer ({reason}); fetch the file again") from error


@contextmanager
def _panic_as_user_error(path: Path, what: str) -> Iterator[None]:
    """The tokenizers library may panic. A panic is no Exception, and would pass every handler on its way out."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a class that cannot be imported
            raise
        raise UserError(
            f"{path}: the tokenizers library gives up on {what} ({first_line(error)}); take another"
        ) from None
