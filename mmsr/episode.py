"""The three records that all other modules share.

`Example` is what data gives, `Observation` what a tool gives, `Episode` what a rollout is. To replace the data, the
tools or the trainer, keep these records and change one file.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Callable


@dataclass(frozen=True)
class Example:
    """One question about one image."""

    id: str
    image: bytes  # an encoded picture file (JPEG, PNG, ...)
    question: str
    answers: tuple[str, ...]  # the ground truth first, then accepted aliases
    category: str = ""
    image_url: str = ""  # where the picture is on the web, if that is known


@dataclass(frozen=True)
class Hit:
    """One search result. Every field is optional, as on the web any may be missing. All text is untrusted."""

    title: str = ""
    url: str = ""
    text: str = ""  # a page's summary or passage
    image: bytes | None = None  # an encoded thumbnail
    score: float | None = None


@dataclass(frozen=True)
class Observation:
    """What a tool gave. A failed tool is a value (`ok` false, `error` says why), never an exception."""

    hits: tuple[Hit, ...] = ()
    ok: bool = True
    error: str | None = None
    source: str = ""  # which back-end answered; "limit" where the call was refused, as the tool's limit was reached
    seconds: float = 0.0
    cached: bool = False


@dataclass
class Turn:
    """A stretch of an episode's tokens: what the model said, or what a tool gave."""

    role: str  # "assistant" or "tool"
    text: str
    start: int  # token span [start, end) within Episode.input_ids
    end: int
    action: str | None = None  # assistant: "answer", a tool's name, or None where no action could be read
    query: str | None = None  # the words of the search; where the action is "answer", those of the answer
    forced: bool = False  # given, not sampled: its tokens are not trained, unless they are to be imitated
    observation: Observation | None = None  # tool turns only
    is_search: bool = True  # tool turns only: False where the tool only looks at the picture
    said: str | None = None  # of a model that thinks: the text behind its thoughts; None where all of it counts

    @property
    def failed(self) -> bool:
        """Whether this is a tool turn, and the tool's infrastructure failed. A call over its limit did not."""
        return self.role == "tool" and not self.observation.ok and self.observation.source != "limit"


# How a rollout ended.
ANSWERED = "answered"
LENGTH = "length"  # out of tokens, or a prompt or result that does not fit
TURNS = "turns"  # a search in the last turn
TOOL_ERROR = "tool-error"  # a tool's infrastructure failed and the run is told to stop such episodes
INVALID = "invalid"  # a turn without a readable action

# What a judge in the reward says of an answer that exact match rejects.
JUDGED_RIGHT = "right"
JUDGED_WRONG = "wrong"
UNJUDGED = "failed"  # the judge gave no verdict: the rollout takes no part in the update
NOT_ASKED = "not-asked"  # an answer that talks to the judge: it stays wrong


@dataclass
class Episode:
    """One rollout, token for token as it was sampled: N tokens, in `input_ids`, `loss_mask` and `logps` alike."""

    example: Example
    group_id: int  # the question's place in the step's batch; not its id, as a batch may ask a question twice
    sample: int  # 0 .. G-1 within the group
    input_ids: list[int] = field(default_factory=list)  # the group's prompt, then everything after it
    loss_mask: list[int] = field(default_factory=list)  # 1 where the model sampled the token, else 0
    logps: list[float] = field(default_factory=list)  # log π of each token when it was sampled; 0 where mask is 0
    images: list[tuple[int, Any]] = field(default_factory=list)  # (first placeholder in `input_ids`, `vision.Image`)
    prompt_length: int = 0  # tokens that the group shares
    turns: list[Turn] = field(default_factory=list)
    status: str = ""
    answer: str | None = None
    judged: str = ""  # by a judge in the reward, if there is one and exact match says no
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    advantage: float = 0.0
    trained: bool = True  # takes part in the update

    def imitate(self) -> None:
        """Train the forced turns as if the model had said them itself. Their `logps` stay 0 and mean nothing."""
        for turn in self.turns:
            if turn.forced:
                self.loss_mask[turn.start : turn.end] = [1] * (turn.end - turn.start)

    def searches(self, tool: str | None = None) -> int:
        """Number of executed calls of one tool, or of all tools that search. One refused over its limit was not."""
        calls = [turn for turn in self.turns if turn.role == "tool" and turn.observation.source != "limit"]
        if tool is not None:
            return sum(call.action == tool for call in calls)
        return sum(call.is_search for call in calls)

    def pictures(self) -> list[bytes]:
        """The question's picture and the thumbnails that came back, as encoded files."""
        found = [self.example.image]
        for turn in self.turns:
            if turn.observation is not None:
                found += [hit.image for hit in turn.observation.hits]
        return [picture for picture in found if picture]

    def record(self, pieces: Callable[[list[int]], list[str]] | None = None) -> dict[str, Any]:
        """The JSON form: one line of `rollouts/*.jsonl` and `episodes.jsonl`.

        `pieces` splits ids into the text of each (`Chat.pieces`): with it, model turns get `"pieces"`, a list of
        `[text, mask, probability when sampled]` per token.
        """
        turns = []
        for turn in self.turns:
            line = _turn_record(turn)
            if pieces is not None and turn.role == "assistant":
                line["pieces"] = self._tokens(turn, pieces)
            turns.append(line)
        judged = {"judged": self.judged} if self.judged else {}
        return {
            "id": self.example.id,
            "group": self.group_id,
            "sample": self.sample,
            "question": self.example.question,
            "image": digest(self.example.image),
            "answers": list(self.example.answers),
            "category": self.example.category,
            "status": self.status,
            "turns": turns,
            "answer": self.answer,
            **judged,
            "reward": self.reward,
            "reward_parts": self.reward_parts,
            "advantage": self.advantage,
            "trained": self.trained,
            "tokens": {"prompt": self.prompt_length, "total": len(self.input_ids), "sampled": sum(self.loss_mask)},
        }

    def _tokens(self, turn: Turn, pieces: Callable[[list[int]], list[str]]) -> list[tuple[str, int, float | None]]:
        """Text, mask and probability of each token of a model turn. A token that was not sampled has no probability."""
        texts = pieces(self.input_ids[turn.start : turn.end])
        tokens = []
        for text, at in zip(texts, range(turn.start, turn.end)):
            sampled = self.loss_mask[at] and not turn.forced
            probability = round(math.exp(self.logps[at]), 4) if sampled else None
            tokens.append((text, self.loss_mask[at], probability))
        return tokens


def digest(picture: bytes) -> str:
    """Names a picture file, in rollout lines and under OUT/images/."""
    return hashlib.sha256(picture).hexdigest()[:16]


def _turn_record(turn: Turn) -> dict[str, Any]:
    record: dict[str, Any] = {
        "role": turn.role,
        "text": turn.text,
        "action": turn.action,
        "query": turn.query,
    }
    if turn.forced:
        record["forced"] = True
    found = turn.observation
    if not turn.is_search:
        record["is_search"] = False
    if found is not None:
        record["observation"] = {
            "ok": found.ok,
            "error": found.error,
            "source": found.source,
            "titles": [hit.title for hit in found.hits],
            "urls": [hit.url for hit in found.hits],
            "thumbnails": [digest(hit.image) if hit.image else None for hit in found.hits],
            "text": "\n".join(hit.text for hit in found.hits if hit.text),
            "images": sum(hit.image is not None for hit in found.hits),
            "seconds": round(found.seconds, 4),
            "cached": found.cached,
        }
    return record
