"""Recorded conversations, turn by turn with the results of their searches; and those to be imitated (for SFT)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from mmsr.episode import Hit, Observation
from mmsr.system.errors import UserError
from mmsr.system.files import json_object, lines


@dataclass(frozen=True)
class RecordedTurn:
    """A model's turn in a recorded rollout and, where it searched, the result."""

    response: str
    action: str | None  # "answer", "image_search", "text_search", or None
    query: str | None
    observation: Observation | None


def recorded_turns(path: str | Path) -> dict[str, list[RecordedTurn]]:
    """The turns of each example id in a transcripts file such as `mmsearch_r1_7b_transcripts.jsonl`. Thumbnails are
    recorded as addresses, which are not followed, so an image search gives titles only. A page without a summary gives
    its snippet. Where an id occurs twice, the last line counts. Raises `UserError` for a missing or malformed file."""
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
            raise UserError(f"{path}: row {row}, column turns: not as recorded ({what}); correct the line") from None
    return recorded


def demonstrations(paths: Sequence[str | Path]) -> dict[str, list[list[str]]]:
    """The model's turns in each conversation about an example id; equal conversations once. The files are rollouts
    (`rollouts/*.jsonl`, `episodes.jsonl`) or transcripts as `recorded_turns` reads them. Raises `UserError` for a
    missing or malformed file."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    for path in map(Path, paths):
        for row, (_, line) in enumerate(lines(path)):
            example_id, turns = _demonstration(path, row, json_object(path, row, line))
            if turns not in found[example_id]:
                found[example_id].append(turns)
    return found


def _demonstration(path: Path, row: int, record: dict[str, Any]) -> tuple[str, list[str]]:
    try:
        if "data_id" in record:
            example_id = record["data_id"]
            texts = [turn["response"] for turn in record["turns"]]
        else:
            texts = [turn["text"] for turn in record["turns"] if turn["role"] == "assistant"]
            example_id = record["id"]
        if all(isinstance(text, str) for text in texts):
            return str(example_id), texts
    except (KeyError, TypeError):
        pass
    wanted = "a rollout (id; turns with role and text) or a recorded conversation (data_id; turns with response)"
    raise UserError(f"{path}: row {row}: no demonstration; each line must hold {wanted}")


def _recorded_turn(turn: dict[str, Any]) -> RecordedTurn:
    result = turn.get("tool_result")
    observation = None if result is None else Observation(_recorded_hits(result), source="replay", cached=True)
    action = None if turn.get("action") is None else _text(turn["action"])
    query = None if turn.get("query") is None else _text(turn["query"])
    return RecordedTurn(_text(turn["response"]), action, query, observation)


def _recorded_hits(result: dict[str, Any]) -> tuple[Hit, ...]:
    if "titles" in result:
        if not isinstance(result["titles"], list):
            raise TypeError("titles is not a list")
        return tuple(Hit(_text(title)) for title in result["titles"])
    summaries = {page["rank"]: page.get("summary") for page in result["summaries"]}
    hits = []
    for page in result["documents"]:
        text = summaries.get(page["rank"]) or page.get("snippet")
        hits.append(Hit(_text(page.get("title")), _text(page.get("url")), _text(text)))
    return tuple(hits)


def _text(value: Any) -> str:
    """Text; "" for None. TypeError for anything else."""
    if not isinstance(value, str | None):
        raise TypeError(f"{value!r:.40} is not text")
    return value or ""
