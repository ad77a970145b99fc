"""A teacher: a model behind an OpenAI-compatible server that shows how questions are answered, in our markup.

It is asked what our model is asked, in chat messages, with pictures upright and without metadata; its turns are read by
the same grammar, its searches are run by the same tools. The rollout then plays its turns as a script, so that limits,
masks and reward are those of any other episode, and a search made twice comes from the recording. Every answer is on
disk before it is used.
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable

from tqdm import tqdm

from mmsr.chat import IMAGE_PAD, START, STOP, Chat, Piece
from mmsr.episode import Example, Observation
from mmsr.net.client import FATAL
from mmsr.net.completions import picture_part
from mmsr.rollout import OVER_LIMIT, Limits, Script
from mmsr.system.errors import UserError
from mmsr.system.images import decode
from mmsr.system.kept import Kept, key_of
from mmsr.tools import Call, Toolbox, ToolFailure

AT_ONCE = 16  # conversations
ANSWER_TOKENS = 4096  # of a turn, thoughts included
FAILED = Script([""])  # where the teacher failed: a turn that says nothing ends the episode, and teaches nothing
PICTURE = SimpleNamespace(tokens=1)  # stands for any picture while turns are laid out


class Teacher:
    """Scripts (`rollout.Scripts`) made by asking: the conversation about an example, in the future.

    `complete` answers chat messages and raises ToolFailure; `name` tells its model from others in `kept`.
    """

    def __init__(
        self, complete: Callable[[list[dict]], str], name: str, kept: Path, chat: Chat, toolbox: Toolbox, limits: Limits
    ):
        self.complete, self.name, self.kept = complete, name, Kept(kept)
        self.chat, self.toolbox, self.limits = chat, toolbox, limits
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="teacher")
        self.failed = 0

    def __call__(self, example: Example, sample: int) -> Future[Script]:
        return self.pool.submit(self._show, example)

    def drop(self) -> None:
        """Give up what has not begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _show(self, example: Example) -> Script:
        try:
            return Script(self._converse(example))
        except (ToolFailure, TimeoutError) as error:
            if getattr(error, "kind", "") in FATAL:
                raise UserError(f"--teacher: {error}; mend that and go on with --resume") from None
            self.failed += 1
            if self.failed == 1:
                said = f"{type(error).__name__}: {error}"
                tqdm.write(f"the teacher failed on {example.id}: {said:.300}; such are left out", file=sys.stderr)
            return FAILED

    def _converse(self, example: Example) -> list[str]:
        """The teacher's turns, up to one that ends the conversation or to the limit of turns."""
        said: list[str] = []
        calls: Counter = Counter()
        messages = chat_messages(self.chat, self.chat.prompt(example.question, PICTURE), [picture_part(example.image)])
        while True:
            said.append(self._ask(messages))
            action = self.chat.parse(said[-1])
            tool = self.toolbox.tools.get(action.name)
            if tool is None or len(said) >= self.limits.max_turns:
                return said
            calls[tool.name] += 1
            seen = OVER_LIMIT
            if calls[tool.name] <= tool.limit:
                call = Call(action.query, example.image, example.question, example.image_url)
                seen = self.toolbox.call(tool.name, call).result(self.limits.tool_seconds)
            messages.append({"role": "assistant", "content": said[-1]})
            messages += self._result(tool.name, seen, example.question)

    def _ask(self, messages: list[dict]) -> str:
        return self.kept.once(key_of(self.name, messages), lambda: {"reply": self.complete(messages)})["reply"]

    def _result(self, tool: str, seen: Observation, question: str) -> list[dict]:
        parts = [_thumbnail(hit.image) for hit in seen.hits]
        piece = self.chat.observation(tool, seen, [PICTURE if part else None for part in parts], question)
        return chat_messages(self.chat, piece, filter(None, parts))


def chat_messages(chat: Chat, piece: Piece, pictures: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The whole turns of `piece` as chat messages, its placeholders replaced by `pictures` (parts of a message)."""
    start, stop, pad = (chat.added[name] for name in (START, STOP, IMAGE_PAD))
    control, pictures = set(chat.added.values()), iter(pictures)
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for token, run in groupby(piece.ids, key=lambda i: i if i in control else None):
        if token == start:
            parts = []
        elif token == pad:
            parts.append(next(pictures))
        elif token == stop:
            messages.append(_message(parts))
        elif token is None:
            parts.append({"type": "text", "text": chat.decode(list(run))})
    return messages


def _message(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A turn's role stands before its first line break. Text alone is given as it is: not every server takes parts."""
    role, _, words = parts[0]["text"].partition("\n")
    content = [{"type": "text", "text": words}] * bool(words) + parts[1:]
    return {"role": role, "content": words if len(parts) == 1 else content}


def _thumbnail(image: bytes | None) -> dict[str, Any] | None:
    try:
        return picture_part(image) if image and decode(image) else None
    except ValueError:  # a broken thumbnail leaves its title
        return None
