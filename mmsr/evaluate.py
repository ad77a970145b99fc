"""What a set of finished episodes amounts to: the numbers that training, evaluation and their tables share.

An episode in numbers is `measures`. Training adds them up over the ranks (`summary`). eval.py writes them into its
lines and takes all else from these (`results`): a run that was interrupted or shared out gives the same numbers.

Search ratio has two definitions: the share of answers before which there was a search (`search_ratio`, the paper's),
and the share of the allowed calls that were made (`calls_ratio`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, Iterable, Mapping, Sequence

import numpy as np

from mmsr.episode import LENGTH, Episode
from mmsr.reward import RewardRule, answer_score
from mmsr.system.parallel import SINGLE, Ranks
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH

# Categories of questions that call for a search, and of those that do not; others tell nothing of the decision.
CALLS_FOR_SEARCH = {
    **dict.fromkeys(("search_required", "unfamiliar", "held_out", "known_new_fact", "unknown_two_hop"), True),
    **dict.fromkeys(("search_free", "familiar", "familiar_fact"), False),
}  # fmt: skip
OFFICIAL, STRICT = RewardRule("paper"), RewardRule("strict")
RESAMPLED = ("accuracy", "accuracy_judge", "search_ratio")
DRAWS = 1000


def summary(episodes: Sequence[Episode], ranks: Ranks = SINGLE) -> dict[str, float]:
    """Means over all ranks' scored episodes. `search_ratio`: share of episodes with at least one executed search."""
    return _means(ranks.sum(_sums(episodes)))


def by_category(episodes: Sequence[Episode], ranks: Ranks = SINGLE) -> dict[str, dict[str, float]]:
    """`summary` per category, in order of first appearance. An example without a category counts under "all"."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.example.category or "all", []).append(episode)
    sums = ranks.sum({(category, key): value for category in groups for key, value in _sums(groups[category]).items()})
    return {
        category: _means({key: value for (its, key), value in sums.items() if its == category})
        for category in dict.fromkeys(category for category, _ in sums)
    }


def measures(episode: Episode) -> dict[str, float]:
    """A scored episode in numbers whose means are those of a set."""
    return {
        "accuracy": episode.reward_parts["accuracy"],
        "search_ratio": float(episode.searches() > 0),
        "search_ratio_image": float(episode.searches(IMAGE_SEARCH) > 0),
        "search_ratio_text": float(episode.searches(TEXT_SEARCH) > 0),
        "reward": episode.reward,
    }


def more_measures(episode: Episode, calls_allowed: int) -> dict[str, float]:
    """The same, but `accuracy` by the official scorer whatever the reward's rule, and what only an evaluation has."""
    return {
        **measures(episode),
        "accuracy": answer_score(episode, OFFICIAL),
        "accuracy_strict": answer_score(episode, STRICT),
        "format": episode.reward_parts["format"],
        "calls_ratio": episode.searches() / calls_allowed if calls_allowed else 0.0,
        "tool_failures": tool_errors([episode]).total(),
        "turns": sum(turn.role == "assistant" for turn in episode.turns),
        "tokens": len(episode.input_ids),
        "tokens_sampled": sum(episode.loss_mask),
    }


def _sums(episodes: Sequence[Episode]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float, n=0)
    for episode in episodes:
        for key, value in {"n": 1, **measures(episode)}.items():
            total[key] += value
    return total


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    n = max(sums["n"], 1)
    return {key: value if key == "n" else value / n for key, value in sums.items()}


def tool_errors(episodes: Sequence[Episode]) -> Counter[str]:
    """What calls say whose infrastructure failed. A search that finds nothing, or one over its limit, is none."""
    seen = [turn.observation for e in episodes for turn in e.turns if turn.role == "tool"]
    return Counter(str(one.error) for one in seen if not one.ok and one.source != "limit")


def table(rows: dict[str, dict[str, dict[str, Any]]], mix: dict[str, float] | None = None) -> str:
    """Text table of several evaluations, a column each: `rows` maps a name to its `by_category`.

    A cell has the shares of episodes that searched by image and by text (left out where nobody did) and the accuracy.
    The last lines are overall means, the categories weighted by `mix`, or else by their number of questions.
    """
    keys = ["search_ratio_image", "search_ratio_text", "accuracy"]
    if not any(category["search_ratio_text"] for row in rows.values() for category in row.values()):
        keys.remove("search_ratio_text")
    means = [_overall(row, mix, [*keys, "reward"]) for row in rows.values()]
    lines = [["/".join(key.split("_")[-1] for key in keys), *rows]]
    for name in dict.fromkeys(name for row in rows.values() for name in row):
        lines.append([name, *(_cell(row[name], keys) for row in rows.values())])
    lines.append(["mean", *(_cell(mean, keys) for mean in means)])
    lines.append(["reward", *(f"{mean['reward']:.3f}" for mean in means)])
    return aligned(lines)


def _overall(row: dict[str, dict[str, Any]], mix: dict[str, float] | None, keys: Sequence[str]) -> dict[str, float]:
    share = {name: (mix or {}).get(name, 0 if mix else category["n"]) for name, category in row.items()}
    return {key: sum(row[name][key] * share[name] for name in row) / sum(share.values()) for key in keys}


def _cell(numbers: Mapping[str, float], keys: Sequence[str]) -> str:
    return " ".join(f"{numbers[key]:.2f}" for key in keys)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


# ---- evaluations


def results(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an evaluation's lines amount to: {"category", "measures", "status", "judged" if there is a judge}.

    A verdict of None is none. Means over the questions, but `n`, `tool_failures`, `judge_failures`, `not_asked` and
    `cut` count. What was not asked (its prompt does not fit) and what was cut (it ran out of tokens) is wrong in all
    means. `interval`: 95 % intervals.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["category"] or "all", []).append(line)
    return {
        **_result(lines),
        **decision(lines),
        "interval": {key: interval(_values(lines, key)) for key in RESAMPLED if _values(lines, key)},
        "by_category": {category: _result(groups[category]) for category in sorted(groups)},
    }


def _result(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = lines[0]["measures"] if lines else ()
    found: dict[str, Any] = {"n": len(lines), **{key: _mean(_values(lines, key)) for key in keys}}
    found["tool_failures"] = sum(_values(lines, "tool_failures"))
    out_of_tokens = [line for line in lines if line.get("status") == LENGTH]
    found["not_asked"] = sum(not line["measures"]["turns"] for line in out_of_tokens)
    found["cut"] = len(out_of_tokens) - found["not_asked"]
    judged = [line for line in lines if line.get("judged") is not None]
    agreed = [line["judged"] == (line["measures"]["accuracy"] == 1) for line in judged]
    found |= {"accuracy_judge": _mean(_values(judged, "accuracy_judge")), "judge_agreement": _mean(agreed)}
    return found | {"judge_failures": sum("judged" in line for line in lines) - len(judged)}


def _values(lines: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    if key == "accuracy_judge":
        return [float(line["judged"]) for line in lines if line.get("judged") is not None]
    return [line["measures"][key] for line in lines]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def decision(lines: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of the answers with a search, the share that called for one; of those that called for one, the share with it."""
    pairs = [
        (CALLS_FOR_SEARCH[line["category"]], line["measures"]["search_ratio"] > 0)
        for line in lines
        if line["category"] in CALLS_FOR_SEARCH
    ]
    return {
        "search_precision": _mean([needed for needed, searched in pairs if searched]),
        "search_recall": _mean([searched for needed, searched in pairs if needed]),
    }


def interval(values: Sequence[float]) -> list[float]:
    """Bounds of the middle 95 % of the means of `DRAWS` resamplings (bootstrap over questions)."""
    sample, dice = np.asarray(values, dtype=float), np.random.default_rng(0)
    means = [sample[dice.integers(0, len(sample), len(sample))].mean() for _ in range(DRAWS)]
    return np.quantile(means, [0.025, 0.975]).round(6).tolist()
