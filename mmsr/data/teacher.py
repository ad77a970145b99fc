"""A teacher: a model behind an OpenAI-compatible server that shows how questions are answered, in our markup.

It gets the same prompts as our model, as chat messages, with pictures upright and without metadata. The same grammar
reads its turns, and the same tools run its searches. The rollout then plays its turns as a script, so that limits,
masks and reward are those of any other episode; the second time, a search comes from the cache. Every answer is on disk
before it is used.
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable

from mmsr.chat import CONTROL, IMAGE_PAD, START, STOP, Chat, Piece
from mmsr.episode import Example, Observation
from mmsr.net.client import FATAL
from mmsr.net.completions import picture_part
from mmsr.rollout import OVER_LIMIT, Limits, Script
from mmsr.system.errors import UserError
from mmsr.system.images import decode
from mmsr.system.journal import Journal, key_of
from mmsr.system.progress import say
from mmsr.tools import Call, Toolbox, ToolFailure

AT_ONCE = 16  # conversations
ANSWER_TOKENS = 4096  # of a turn, thinking included
FAILED = Script([""])  # where the teacher failed: a turn that says nothing ends the episode, and teaches nothing
PICTURE = SimpleNamespace(tokens=1)  # takes any picture's place in a prompt; its placeholder becomes a message part

Complete = Callable[[list[dict]], str]  # chat messages → the answer's text


class Teacher:
    """Scripts (`rollout.Scripts`) made by asking a teacher: each is the Future of a conversation about an example.

    `complete` answers chat messages and raises ToolFailure. `journal` is the file with all answers; `name` tells this
    teacher's from those of other models.
    """

    def __init__(self, complete: Complete, name: str, journal: Path, chat: Chat, toolbox: Toolbox, limits: Limits):
        self.complete = complete
        self.name = name
        self.journal = Journal(journal)
        self.chat = chat
        self.toolbox = toolbox
        self.limits = limits
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="teacher")
        self.failed = 0  # conversations

    def __call__(self, example: Example, sample: int) -> Future[Script]:
        return self.pool.submit(self._show, example)

    def drop(self) -> None:
        """Cancel the conversations that have not started."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _show(self, example: Example) -> Script:
        """The teacher's conversation, or FAILED. Raises UserError where every other one would fail too."""
        try:
            return Script(self._converse(example))
        except (ToolFailure, TimeoutError) as error:
            if getattr(error, "kind", "") in FATAL:
                raise UserError(f"--teacher: {error}; mend that and go on with --resume") from None
            self.failed += 1
            if self.failed == 1:
                said = f"{type(error).__name__}: {error}"
                say(f"the teacher failed on {example.id}: {said:.300}; such are left out", sys.stderr)
            return FAILED

    def _converse(self, example: Example) -> list[str]:
        """The teacher's turns, up to one that ends the conversation or to the limit of turns."""
        turns: list[str] = []
        calls: Counter[str] = Counter()  # by tool
        found: list[str] = []  # addresses of all results
        prompt = self.chat.prompt(example.question, PICTURE)
        messages = chat_messages(self.chat, prompt, [picture_part(example.image)])
        while True:
            turn = self._ask(messages)
            turns.append(turn)
            action = self.chat.parse(self.chat.whole_turn(turn))
            tool = self.toolbox.tools.get(action.name)
            if tool is None or len(turns) >= self.limits.max_turns:
                return turns
            calls[tool.name] += 1
            if calls[tool.name] > tool.limit:
                observation = OVER_LIMIT
            else:
                call = Call(action.query, example.image, example.question, example.image_url, tuple(found))
                observation = self.toolbox.call(tool.name, call).result(self.limits.tool_seconds)
                found += [hit.url for hit in observation.hits if hit.url]
            messages.append({"role": "assistant", "content": turn})
            messages += self._result(tool.name, observation, example.question)

    def _ask(self, messages: list[dict]) -> str:
        """The teacher's next turn, from the file if the same was asked before."""
        key = key_of(self.name, messages)
        answer = self.journal.once(key, lambda: {"reply": self.complete(messages)})
        return answer["reply"]

    def _result(self, tool: str, observation: Observation, question: str) -> list[dict]:
        """A tool's result as chat messages."""
        thumbnails = [_thumbnail(hit.image) for hit in observation.hits]
        placeholders = [None if part is None else PICTURE for part in thumbnails]
        piece = self.chat.observation(tool, observation, placeholders, question)
        return chat_messages(self.chat, piece, [part for part in thumbnails if part is not None])


def chat_messages(chat: Chat, piece: Piece, pictures: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The complete turns of `piece` as chat messages, its placeholders replaced by `pictures` (parts of a message).

    A grammar's own control tokens, such as `<tool_response>`, are text to a server.
    """
    control = {chat.added[name] for name in CONTROL}
    pictures = iter(pictures)
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []  # of the present turn
    for token, run in groupby(piece.ids, key=lambda token: token if token in control else None):
        if token == chat.added[START]:
            parts = []
        elif token == chat.added[IMAGE_PAD]:
            parts.append(next(pictures))
        elif token == chat.added[STOP]:
            messages.append(_message(parts))
        elif token is None:  # text between two control tokens
            parts.append({"type": "text", "text": chat.decode(list(run))})
    return messages


def _message(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A turn as a message. Its role is what comes before the first line break.

    Text alone is given as a string, because not every server takes a list of parts.
    """
    role, _, words = parts[0]["text"].partition("\n")
    if len(parts) == 1:
        return {"role": role, "content": words}
    first = [{"type": "text", "text": words}] if words else []
    return {"role": role, "content": first + parts[1:]}


def _thumbnail(image: bytes | None) -> dict[str, Any] | None:
    """A thumbnail as a part of a message. None where there is none or it is broken: then the hit's title remains."""
    try:
        return picture_part(image) if image and decode(image) else None
    except ValueError:
        return None
