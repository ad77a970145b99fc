"""Recorded conversations: what a model said turn by turn, what its searches brought back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .episode import Hit, Observation, UserError
from .tables import json_object, lines


@dataclass(frozen=True)
class RecordedTurn:
    """What a model said in a recorded rollout and, where it searched, what came back."""

    response: str
    action: str | None  # "answer", "image_search", "text_search", or None
    query: str | None
    observation: Observation | None


def recorded_turns(path: str | Path) -> dict[str, list[RecordedTurn]]:
    """The turns of each example id in a transcripts file such as `mmsearch_r1_7b_transcripts.jsonl`.

    Thumbnails are recorded as addresses, which are not followed: an image search gives titles only. A page without a
    summary gives its snippet. Of an id that recurs the last line counts. Raises `UserError` for a missing or ill-formed
    file.
    """
    path, recorded = Path(path), {}
    for row, (_, line) in enumerate(lines(path)):
        transcript = json_object(path, row, line)
        for column in ("data_id", "turns"):
            if column not in transcript:
                raise UserError(f"{path}: row {row}, column {column}: missing; give a transcripts file")
        try:
            recorded[str(transcript["data_id"])] = [_recorded_turn(turn) for turn in transcript["turns"]]
        except (KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: row {row}, column turns: not as recorded ({what}); mend the line") from None
    return recorded


def _recorded_turn(turn: dict[str, Any]) -> RecordedTurn:
    result = turn.get("tool_result")
    observation = None if result is None else Observation(_recorded_hits(result), source="replay", cached=True)
    return RecordedTurn(turn["response"], turn.get("action"), turn.get("query"), observation)


def _recorded_hits(result: dict[str, Any]) -> tuple[Hit, ...]:
    if "titles" in result:
        return tuple(Hit(title or "") for title in result["titles"])
    summaries = {page["rank"]: page.get("summary") for page in result["summaries"]}
    return tuple(
        Hit(page.get("title") or "", page.get("url") or "", summaries.get(page["rank"]) or page.get("snippet") or "")
        for page in result["documents"]
    )
