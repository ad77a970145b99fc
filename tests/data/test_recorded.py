"""Recorded conversations and the back-end that replays them: real ones where they are at hand, and made ones."""

import json
from pathlib import Path

import pytest
from helpers import TRANSCRIPTS, real_files, refused

from mmsr.data.recorded import recorded_turns
from mmsr.episode import Hit


@real_files
def test_the_real_transcripts_lose_a_search_or_its_result():
    for turn in (turn for turns in recorded_turns(TRANSCRIPTS).values() for turn in turns):
        if turn.action in ("image_search", "text_search"):
            assert turn.observation.hits
        else:
            assert turn.action == "answer" and turn.observation is None and turn.response.endswith("</answer>")


@real_files
def test_a_page_without_a_summary_gives_its_snippet():
    hits = recorded_turns(TRANSCRIPTS)["fvqa_train_4724"][1].observation.hits
    assert hits[0].title == "The Hershey Company (HSY)" and hits[0].text.startswith("The Hershey Company (HSY) ; Oct 8")
    assert hits[1].text.startswith("The webpage does not contain")
    assert hits[3].url == "https://www.wsj.com/market-data/quotes/HSY" and "August 13, 2026" in hits[3].text


def transcripts(folder, turns):
    path = folder / "transcripts.jsonl"
    path.write_text(json.dumps({"data_id": "made_0", "turns": turns}) + "\n\n")
    return path


SEARCHES = [
    {
        "response": "<search><img></search>",
        "action": "image_search",
        "query": None,
        "tool_result": {"titles": ["A bridge", None], "thumbnail_urls": ["https://example.invalid/1"]},
    },
    {
        "response": "<text_search>Which  River?</text_search>",
        "action": "text_search",
        "query": "Which  River?",
        "tool_result": {
            "documents": [
                {"rank": 2, "title": "River", "url": "https://r", "snippet": "cut"},
                {"rank": 5, "snippet": "S"},
            ],
            "summaries": [{"rank": 5, "summary": ""}, {"rank": 2, "summary": "The Tagus."}],
        },
    },
    {"response": "<answer>Tagus</answer>", "action": "answer", "query": None, "tool_result": None},
]


def test_recorded_turns_join_summaries_by_rank(tmp_path):
    (turns,) = recorded_turns(transcripts(tmp_path, SEARCHES)).values()
    assert turns[0].observation.hits == (Hit("A bridge"), Hit())
    assert turns[1].observation.hits == (Hit("River", "https://r", "The Tagus."), Hit(text="S"))
    assert all(turn.observation.source == "replay" and turn.observation.cached for turn in turns[:2])
    assert (turns[2].response, turns[2].action, turns[2].observation) == ("<answer>Tagus</answer>", "answer", None)


@pytest.mark.parametrize(
    "turns, complaint",
    [
        (3, "TypeError"),
        ([{"action": "answer"}], "KeyError: 'response'"),
        ([SEARCHES[0] | {"tool_result": "none"}], "TypeError"),
        *(([SEARCHES[1] | {name: 5}], "TypeError: 5 is not text") for name in ("response", "action", "query")),
        *(([SEARCHES[0] | {"tool_result": {"titles": titles}}], "TypeError") for titles in (5, "two", [5], {"a": 1})),
        ([SEARCHES[1] | {"tool_result": {"documents": [{"rank": 1, "title": []}], "summaries": []}}], "TypeError"),
    ],
)
def test_an_ill_formed_transcript(tmp_path, turns, complaint):
    path = transcripts(tmp_path, turns)
    refused(lambda: recorded_turns(path), f"{path}: row 0, column turns: not as recorded ({complaint}")


def test_a_transcripts_file_that_is_missing_or_something_else(tmp_path):
    refused(lambda: recorded_turns(tmp_path / "absent.jsonl"), "absent.jsonl", "no such file")
    (tmp_path / "some.jsonl").write_text('{"id": 1}\n')
    refused(lambda: recorded_turns(tmp_path / "some.jsonl"), "some.jsonl", "row 0, column data_id: missing")


@real_files
def test_recorded_verdicts_are_ours_where_only_the_ground_truth_counts():
    """The record ignores the accepted aliases; each verdict that changes with them is one alias more."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    import recorded_answers

    rows = [recorded_answers.verdicts(json.loads(line)) for line in TRANSCRIPTS.read_text().splitlines()]
    assert all(row["ground truth alone"] == row["recorded"] for row in rows)
    assert all(row["strict"] == row["paper"] >= row["recorded"] for row in rows)
    assert {row["id"]: row["answer"] for row in rows if row["reason"]} == {
        "fvqa_train_2791": "Muhammad Ali Jinnah",
        "fvqa_train_3112": "September 26, 2003",
    }
