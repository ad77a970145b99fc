"""The grammar of tags: its table, recorded turns, and a second form of it."""

import json
import random
import re
import time

import pytest
from chat_helpers import TRANSCRIPTS

import mmsr.grammar
from mmsr.data.cells import answers
from mmsr.episode import Episode, Example, Turn
from mmsr.grammar import Action, Tags
from mmsr.reward import official_answer
from mmsr.tools import NoSearch, search_tools


@pytest.fixture(scope="module")
def tags():
    return Tags(search_tools(NoSearch(), max_images=1, max_texts=2))


def grammar_rows():
    rows = [line for line in mmsr.grammar.__doc__.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 29
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        turn = re.sub(r"\bR\b", "<reason>why</reason>", cells[0]).replace(r"\n", "\n")
        name, query = ("" if cell == "-" else cell for cell in cells[1:3])
        yield pytest.param(turn, name or None, query, cells[3].rstrip("| ") == "yes", id=cells[0])


@pytest.mark.parametrize("turn, name, query, well_formed", list(grammar_rows()))
def test_every_row_of_the_grammar_table_holds(tags, turn, name, query, well_formed):
    action = tags.parse(turn)
    assert (action.name, action.query) == (name, query)
    assert tags.well_formed(turn) is well_formed


def test_every_recorded_turn_of_the_released_model_parses_as_recorded(tags):
    if not TRANSCRIPTS.is_file():
        pytest.skip(f"transcripts: no {TRANSCRIPTS}")
    turns = 0
    for line in TRANSCRIPTS.read_text().splitlines():
        record = json.loads(line)
        for turn in record["turns"]:
            action = tags.parse(turn["response"])
            query = record["final_answer"] if turn["action"] == "answer" else turn["query"] or ""
            assert (action.name, action.query) == (turn["action"], query), turn["response"]
            assert tags.well_formed(turn["response"])
            turns += 1
    assert turns == 57


@pytest.mark.parametrize("words", ["<reason>", "<reason>a</answer>", "</reason>", "<answer>", "<search><img>"])
def test_a_turn_of_tags_that_open_and_never_close_takes_seconds(tags, words):
    """Where each `<reason>` looks for its end, 80 kB take 4 s; the same for `<answer>` in rewards and data files."""
    turn = words * (120_000 // len(words))
    start = time.process_time()
    assert tags.parse(turn) == Action() and not tags.well_formed(turn)
    spoken = Episode(Example("a", b"", "", ("Tagus",)), 0, 0, turns=[Turn("assistant", turn, 0, 0)])
    assert official_answer(spoken) is None and answers(turn) == [turn]
    assert time.process_time() - start < 2


# The format once more, as one expression: an oracle that shares no code with the module.
FORMAT = re.compile(
    r"\s*<reason>(?:(?!TAG).)*</reason>(?:(?!TAG).)*"
    r"(?:<answer>(?:(?!TAG).)*</answer>|<search>\s*<img>\s*</search>|"
    r"<text_search>(?=\s*[^\s<]|\s*<(?!/text_search>))(?:(?!TAG).)*</text_search>)\s*".replace(
        "TAG", "</?(?:reason|answer|search|text_search)>"
    ),
    re.DOTALL,
)


def test_parsing_random_turns_never_raises_and_the_format_agrees_with_an_oracle(tags):
    rng = random.Random(0)
    markup = [f"<{slash}{tag}>" for tag in ("reason", "answer", "search", "text_search") for slash in ("", "/")]
    actions = ["<answer>Paris</answer>", "<search><img></search>", "<text_search>q</text_search>"]
    words = [
        *markup,
        *actions,
        "<img>",
        "<",
        ">",
        "</",
        "Paris",
        " ",
        "\n",
        "\u2003",
        "\ud800",
        "\0",
        "é",
        "<|im_end|>",
    ]
    formed = 0
    for _ in range(20_000):
        reason = rng.choice(["", "<reason>why</reason>"])
        turn = reason + "".join(rng.choices(words, k=rng.randrange(12)))
        action = tags.parse(turn)
        assert isinstance(action, Action)
        assert action.name in (None, "answer", "image_search", "text_search")
        assert tags.well_formed(turn) is bool(FORMAT.fullmatch(turn)), turn
        formed += tags.well_formed(turn)
    assert formed > 200
