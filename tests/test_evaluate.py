"""Summaries against numbers worked out by hand."""

import pytest

from mmsr import evaluate
from mmsr.episode import Episode, Example, Observation, Turn
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH

FOUND, FAILED = Observation(source="web"), Observation(ok=False, error="OSError: down", source="web")
EMPTY, REFUSED = Observation(source="web"), Observation(ok=False, error="over its limit", source="limit")


def episode(category, accuracy, reward, *calls) -> Episode:
    """`calls`: pairs (tool, observation)."""
    made = Episode(Example("e", b"", "q", ("a",), category), 0, 0, reward=reward)
    made.reward_parts = {"accuracy": accuracy, "format": 1.0, "penalty": 0.0}
    for tool, seen in calls:
        made.turns.append(Turn("assistant", "", 0, 0, tool))
        made.turns.append(Turn("tool", "", 0, 0, tool, observation=seen))
    made.turns.append(Turn("assistant", "", 0, 0, "answer"))
    return made


EPISODES = [
    episode("new", 1.0, 0.91, (IMAGE_SEARCH, FOUND)),
    episode("old", 1.0, 1.0),
    episode("new", 0.0, 0.1, (IMAGE_SEARCH, FAILED), (TEXT_SEARCH, EMPTY), (TEXT_SEARCH, FAILED)),
    episode("new", 1.0, 0.9, (TEXT_SEARCH, REFUSED)),
    episode("old", 0.0, -0.09, (TEXT_SEARCH, FOUND), (TEXT_SEARCH, REFUSED)),
]


def test_summary_by_hand():
    assert evaluate.summary(EPISODES) == pytest.approx(
        {
            "n": 5,
            "accuracy": 3 / 5,
            "search_ratio": 3 / 5,  # a refused call is no search
            "search_ratio_image": 2 / 5,
            "search_ratio_text": 2 / 5,
            "reward": 2.82 / 5,
        }
    )


def test_summary_of_nothing_divides_by_nothing():
    assert set(evaluate.summary([]).values()) == {0}


def test_by_category_by_hand_in_order_of_appearance():
    found = evaluate.by_category([*EPISODES, episode("", 1.0, 1.0)])
    assert list(found) == ["new", "old", "all"]
    assert found["new"] == pytest.approx(
        dict(
            n=3, accuracy=2 / 3, search_ratio=2 / 3, search_ratio_image=2 / 3, search_ratio_text=1 / 3, reward=1.91 / 3
        )
    )
    assert found["old"] == pytest.approx(
        dict(n=2, accuracy=0.5, search_ratio=0.5, search_ratio_image=0, search_ratio_text=0.5, reward=0.455)
    )
    assert found["all"]["n"] == 1


def test_failures_count_calls_and_neither_refusals_nor_empty_results():
    assert evaluate.tool_failures(EPISODES) == 2
    assert evaluate.tool_failures(EPISODES[3:]) == 0


def test_table_by_hand():
    rows = {"before": evaluate.by_category(EPISODES), "after, greedy": evaluate.by_category(EPISODES[:2])}
    lines = evaluate.table(rows).splitlines()
    head, new, old, mean, reward = lines
    assert head.split("  ")[0] == "image/text/accuracy" and head.split()[1:] == ["before", "after,", "greedy"]
    assert new.split() == ["new", "0.67", "0.33", "0.67", "1.00", "0.00", "1.00"]
    assert old.split() == ["old", "0.00", "0.50", "0.50", "0.00", "0.00", "1.00"]
    assert mean.split() == ["mean", "0.40", "0.40", "0.60", "0.50", "0.00", "1.00"]
    assert reward.split() == ["reward", "0.564", "0.955"]
    assert all(line == line.rstrip() for line in lines)
    start = head.index("after")
    assert all(line[start] in "01" and line[start - 1] == " " for line in lines[1:]), "columns must line up"


def test_table_has_no_text_searches_where_there_were_none():
    head, new, *_ = evaluate.table({"x": evaluate.by_category(EPISODES[:2])}).splitlines()
    assert head.split() == ["image/accuracy", "x"] and new.split() == ["new", "1.00", "1.00"]


def test_table_weights_categories_by_the_mix():
    row = evaluate.by_category(EPISODES)
    *_, mean, reward = evaluate.table({"x": row}, {"new": 0.25, "old": 0.75}).splitlines()
    assert mean.split()[-1] == f"{0.25 * 2 / 3 + 0.75 * 0.5:.2f}"
    assert reward.split()[-1] == f"{0.25 * 1.91 / 3 + 0.75 * 0.455:.3f}"
    *_, mean, reward = evaluate.table({"x": row}, {"old": 0.5}).splitlines()
    assert mean.split()[-1] == "0.50" and reward.split()[-1] == "0.455", "a category outside the mix has no weight"
