"""Recorded answers of another program through our scorers, compared with the recorded verdicts.

    python bench/recorded_answers.py transcripts.jsonl

A line of the file has `data_id, turns[].response, ground_truth, candidate_answers, final_answer, exact_match`. The
recorded verdict uses only the ground truth. `paper` is used in the same way, which must give the same verdicts; then
with the accepted aliases, and `strict` with them. Every difference from the record is listed with its reason.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmsr.episode import ANSWERED, INVALID, TURNS, Episode, Example, Turn
from mmsr.reward import RewardRule, answer_score, exact_match, official_answer
from mmsr.system.errors import UserError
from mmsr.system.files import json_object, lines

STATUS = {"answer": ANSWERED, "image_search": TURNS, "text_search": TURNS}


def verdicts(record: dict[str, Any]) -> dict[str, Any]:
    """The record's verdict and ours on one transcript, with the reason where they differ."""
    gold, aliases = record["ground_truth"], record["candidate_answers"]
    turns = [Turn("assistant", turn["response"], 0, 0, turn["action"]) for turn in record["turns"]]
    status = STATUS.get(turns[-1].action if turns else None, INVALID)

    def score(rule: str, *answers: str) -> bool:
        example = Example(record["data_id"], b"", record["question"], answers)
        return answer_score(Episode(example, 0, 0, turns=turns, status=status), RewardRule(rule)) == 1

    found = {
        "id": record["data_id"],
        "recorded": record["exact_match"],
        "ground truth alone": score("paper", gold),
        "paper": score("paper", gold, *aliases),
        "strict": score("strict", gold, *aliases),
        "answer": official_answer(Episode(Example("", b"", "", ()), 0, 0, turns=turns)),
    }
    return found | {"reason": _reason(found, record)}


def _reason(found: dict[str, Any], record: dict[str, Any]) -> str:
    if found["ground truth alone"] != found["recorded"]:
        return "UNEXPLAINED: the same question to the official scorer gives another verdict"
    if found["paper"] != found["recorded"]:
        alias = next(alias for alias in record["candidate_answers"] if exact_match(found["answer"], [alias]))
        return f"{found['answer']!r} equals the alias {alias!r}, not the ground truth {record['ground_truth']!r}"
    return "" if found["strict"] == found["paper"] else "strict refuses what the official scorer accepts"


def main(path: str) -> None:
    rows = [verdicts(json_object(Path(path), row, line)) for row, (_, line) in enumerate(lines(Path(path)))]
    for name in ("recorded", "ground truth alone", "paper", "strict"):
        print(f"{name:20} {sum(row[name] for row in rows):3} of {len(rows)} right")
    for row in rows:
        if row["reason"]:
            shown = ", ".join(f"{name} {row[name]}" for name in ("recorded", "paper", "strict"))
            print(f"{row['id']}: {shown}: {row['reason']}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2] or ["transcripts.jsonl"])
    except UserError as error:
        print(f"recorded_answers.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
