"""Summaries, evaluations and their tables against numbers worked out by hand."""

import csv

import numpy as np
import pytest

from mmsr import evaluate
from mmsr.episode import Episode, Example, Observation, Turn
from mmsr.report import compare
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH
from mmsr.toy.world import SETTINGS

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
    assert evaluate.tool_errors(EPISODES).total() == 2
    assert evaluate.tool_errors(EPISODES[3:]).total() == 0


def test_table_by_hand():
    rows = {"before": evaluate.by_category(EPISODES), "after, greedy": evaluate.by_category(EPISODES[:2])}
    head, labels, new, old, mean, reward = lines = evaluate.table(rows).splitlines()
    assert head.split() == ["before", "after,", "greedy"] and labels.split() == 2 * ["img", "text", "acc"]
    assert new.split() == ["new", "0.67", "0.33", "0.67", "1.00", "0.00", "1.00"]
    assert old.split() == ["old", "0.00", "0.50", "0.50", "0.00", "0.00", "1.00"]
    assert mean.split() == ["mean", "0.40", "0.40", "0.60", "0.50", "0.00", "1.00"]
    assert reward.split() == ["reward", "0.564", "0.955"]
    assert len({len(line) for line in lines}) == 1, "the ends of the columns must line up"


def test_table_is_wider_than_a_terminal():
    """The six evaluations of the toy world took 116 columns: what does not fit goes on below, with the same lines."""
    found = {f"{name}_two_hop": numbers for name, numbers in evaluate.by_category(EPISODES).items()}
    text = evaluate.table({name: found for name in ("before, greedy", "after, greedy", "before, T = 1", "d", "e")})
    first, second = text.split("\n\n")
    assert max(map(len, text.splitlines())) <= 80 and first.count("acc") == 4 and second.count("acc") == 1
    assert [line.split()[0] for line in second.splitlines()[2:]] == ["new_two_hop", "old_two_hop", "mean", "reward"]
    long = evaluate.table({"x": {"c" * 200: found["new_two_hop"]}})
    assert max(map(len, long.splitlines())) <= 80


def test_table_has_no_text_searches_where_there_were_none():
    _, labels, new, *_ = evaluate.table({"x": evaluate.by_category(EPISODES[:2])}).splitlines()
    assert labels.split() == ["img", "acc"] and new.split() == ["new", "1.00", "1.00"]


def test_table_and_measures_leave_out_a_tool_of_ones_own():
    found = evaluate.by_category([episode("new", 1.0, 0.9, ("crop_search", FOUND)), episode("new", 0.0, 0.1)])
    assert found["new"]["search_ratio_crop"] == 0.5
    _, labels, new, *_ = evaluate.table({"x": found}).splitlines()
    assert labels.split() == ["img", "crop", "acc"] and new.split() == ["new", "0.00", "0.50", "0.50"]


def test_table_weights_categories_by_the_mix():
    row = evaluate.by_category(EPISODES)
    *_, mean, reward = evaluate.table({"x": row}, {"new": 0.25, "old": 0.75}).splitlines()
    assert mean.split()[-1] == f"{0.25 * 2 / 3 + 0.75 * 0.5:.2f}"
    assert reward.split()[-1] == f"{0.25 * 1.91 / 3 + 0.75 * 0.455:.3f}"
    *_, mean, reward = evaluate.table({"x": row}, {"old": 0.5}).splitlines()
    assert mean.split()[-1] == "0.50" and reward.split()[-1] == "0.455", "a category outside the mix has no weight"


# ---- evaluations ----------------------------------------------------------------------------------------------------


def line(category="", accuracy=0.0, searched=0.0, **more):
    numbers = {key: 0.0 for key in evaluate.more_measures(EPISODES[0], 2)}
    numbers |= {"accuracy": accuracy, "search_ratio": searched, "search_ratio_image": searched}
    judged = {"judged": more.pop("judged")} if "judged" in more else {}
    return {"category": category, "measures": numbers | more, **judged}


def test_measures_of_an_episode_by_hand():
    found = evaluate.more_measures(EPISODES[2], calls_allowed=4)
    assert found == {
        "accuracy": 0.0, "search_ratio": 1.0, "search_ratio_image": 1.0, "search_ratio_text": 1.0, "reward": 0.1,
        "accuracy_strict": 0.0, "format": 1.0, "calls_ratio": 0.75, "tool_failures": 2, "turns": 4, "tokens": 0,
        "tokens_sampled": 0,
    }  # fmt: skip
    assert evaluate.more_measures(EPISODES[3], 2)["calls_ratio"] == 0, "a refused call was not made"
    assert evaluate.more_measures(EPISODES[1], 0)["calls_ratio"] == 0, "direct: none is allowed"


def test_results_by_hand():
    lines = [
        line("search_required", 1.0, 1.0, calls_ratio=0.5, tool_failures=1),
        line("search_required", 0.0, 0.0),
        line("search_free", 1.0, 1.0, calls_ratio=1.0, tool_failures=2),
        line("search_free", 1.0, 0.0),
        line("search_free", 0.0, 0.0),
    ]
    found = evaluate.results(lines)
    assert (found["n"], found["accuracy"], found["search_ratio"], found["calls_ratio"]) == (5, 0.6, 0.4, 0.3)
    assert found["tool_failures"] == 3, "failures are counted, not averaged"
    assert (found["search_precision"], found["search_recall"]) == (0.5, 0.5)
    assert found["by_category"]["search_required"]["accuracy"] == 0.5 and found["by_category"]["search_free"]["n"] == 3
    assert found["accuracy_judge"] is None and found["judge_failures"] == 0


def test_decision_without_searches_or_without_known_categories_is_no_number():
    assert evaluate.decision([line("search_required"), line("news", searched=1.0)]) == {
        "search_precision": None, "search_recall": 0.0,
    }  # fmt: skip
    assert set(evaluate.decision([line("news", searched=1.0)]).values()) == {None}


@pytest.mark.parametrize("world", SETTINGS.values(), ids=SETTINGS)
def test_a_category_of_the_toy_world_is_left_out_of_the_decision(world):
    for category in world.categories:
        known = min(map(world.facts, category.pools))
        needed = max(category.questions) >= known
        found = evaluate.decision([line(category.name, searched=1.0)])
        assert found["search_precision"] == needed, category.name


def test_a_missing_verdict_is_neither_right_nor_wrong():
    lines = [line(accuracy=1.0, judged=True), line(judged=True), line(judged=False), line(accuracy=1.0, judged=None)]
    found = evaluate.results(lines)
    assert found["accuracy_judge"] == pytest.approx(2 / 3) and found["judge_agreement"] == pytest.approx(2 / 3)
    assert found["judge_failures"] == 1 and found["accuracy"] == 0.5
    assert "gave no verdict on 1 answers" in compare.report("x", "search", found, [])


def test_no_verdict_at_all_is_no_accuracy_of_nought():
    found = evaluate.results([line(judged=None), line(judged=None)])
    assert (
        found["accuracy_judge"] is None and found["judge_failures"] == 2 and "accuracy_judge" not in found["interval"]
    )


def test_interval_is_seeded_and_as_wide_as_theory_says():
    values = [1.0] * 300 + [0.0] * 700
    low, high = evaluate.interval(values)
    assert [low, high] == evaluate.interval(values)
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - spread, abs=0.004) and high == pytest.approx(0.3 + spread, abs=0.004)
    assert evaluate.interval([1.0] * 9) == [1.0, 1.0]


def test_interval_holds_the_truth_in_about_nineteen_of_twenty_samples():
    dice = np.random.default_rng(5)
    held = sum(low <= 0.4 <= high for low, high in (evaluate.interval(dice.random(200) < 0.4) for _ in range(100)))
    assert 88 <= held <= 100


@pytest.mark.parametrize(
    "name, layout, sets",
    [
        ("fvqa_test.parquet", "fvqa", {"FVQA-test", "FactualVQA"}),  # the later systems name the paper's set
        ("test-00000.parquet", "fvqa", {"FVQA-test", "FactualVQA"}),
        ("mmsearch_r1_infoseek_sub_2k.parquet", "fvqa", {"InfoSeek-2k", "InfoSeek-val-sub", "InfoSeek"}),
        ("end2end.parquet", "mmsearch", {"MMSearch-171", "MMSearch-image", "MMSearch"}),
        ("qa.json", "livevqa", {"LiveVQA-3602", "LiveVQA"}),
        ("Gimmick-CIVQA.jsonl", "plain", {"Gimmick-CIVQA"}),
        ("my_own.jsonl", "plain", set()),
        ("toy", "", set()),
    ],
)
def test_published_rows_of_a_benchmark(name, layout, sets):
    assert {row["set"] for row in compare.published(name, layout)} == sets


def test_published_numbers_are_whole_and_average_as_the_paper_says():
    with compare.PUBLISHED.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 6 * 5 + 6 * 4 + 51 and all(None not in row and None not in row.values() for row in rows)
    averages = {"GPT-4o, direct": 36.0, "GPT-4o, RAG": 62.1, "Qwen2.5-VL-7B, direct": 21.9, "Qwen2.5-VL-7B, RAG": 51.6}
    averages |= {"Qwen2.5-VL-32B, RAG": 55.1, "MMSearch-R1-7B, search": 54.6}
    paper = [row for row in rows if row["source"] == "paper"]
    for system, average in averages.items():
        mine = [float(row["judge"]) for row in paper if row["system"] == system]
        assert sum(mine) / len(mine) == pytest.approx(average, abs=0.1)  # the paper cuts off
    searched = [float(row["searched"]) for row in paper if row["system"] == "MMSearch-R1-7B, search"]
    assert sum(searched) / 5 == pytest.approx(67.1, abs=0.06)
    later = [row for row in rows if row["source"] not in ("paper", "blog")]
    mars = [float(row["judge"]) for row in later if row["system"] == "SenseNova-MARS-8B"]
    assert sum(mars) == pytest.approx(7 * 64.20 - 41.64 - 84.67, abs=0.1)  # its average of seven benchmarks
    gap = [float(row["judge"]) for row in later if row["system"] == "Gemini-3-Pro, search"]
    assert sum(gap) == pytest.approx(7 * 69.06 - 48.52 - 86.00, abs=0.1)
    assert all(0 <= float(row[key] or 0) <= 100 for row in rows for key in ("exact", "judge", "searched"))
