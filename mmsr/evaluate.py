"""The numbers of a set of finished episodes, which training, evaluation and their tables share.

`measures` are one episode's numbers. `add_up` and `means` make those of a set from them. Training adds up over the
ranks (`summary`, `by_category`). eval.py writes each episode's measures into its line and makes everything else from
the lines (`results`), so a run that was interrupted or spread over processes gives the same numbers.

The search ratio has two definitions: the share of answers with a search before them (`search_ratio`, the paper's), and
the share of the allowed calls that were made (`calls_ratio`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Iterable, Mapping, Sequence

import numpy as np

from mmsr.episode import LENGTH, Episode
from mmsr.reward import RewardRule, answer_score
from mmsr.system.parallel import SINGLE, Ranks
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH

# Categories of questions that call for a search, and of those that do not. `decision` leaves others out.
NEEDS_SEARCH = {
    "search_required",
    "known_new_fact",
    "unfamiliar",
    "unfamiliar_fact",
    "held_out",
    "unknown_two_hop",
}
NEEDS_NO_SEARCH = {"search_free", "familiar", "familiar_fact"}

Line = Mapping[str, Any]  # of episodes.jsonl
Numbers = dict[str, float]  # by the name of a measure
OFFICIAL = RewardRule("paper")
STRICT = RewardRule("strict")
DRAWS = 1000
WIDTH = 80  # of a table, in characters
MOST_NAME = 28  # characters of a category's name in a table


def measures(episode: Episode) -> Numbers:
    """The numbers of a scored episode. Their means are those of a set. A tool of one's own has a ratio where called."""
    numbers = {
        "accuracy": episode.reward_parts["accuracy"],
        "search_ratio": float(episode.searches() > 0),
        "search_ratio_image": float(episode.searches(IMAGE_SEARCH) > 0),
        "search_ratio_text": float(episode.searches(TEXT_SEARCH) > 0),
    }
    for tool in dict.fromkeys(turn.action for turn in episode.turns if turn.role == "tool"):
        numbers[f"search_ratio_{tool.removesuffix('_search')}"] = float(episode.searches(tool) > 0)
    numbers["reward"] = episode.reward
    return numbers


def more_measures(episode: Episode, calls_allowed: int) -> Numbers:
    """`measures`, and what only an evaluation has. Here `accuracy` is by the official scorer under any reward rule."""
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


def add_up(measured: Iterable[Numbers]) -> Numbers:
    """Sums of several episodes' measures, and their number `n`."""
    sums: Numbers = {"n": 0}
    for numbers in measured:
        sums["n"] += 1
        for key, value in numbers.items():
            sums[key] = sums.get(key, 0) + value
    return sums


def means(sums: Mapping[str, float]) -> Numbers:
    """Sums over `n` episodes divided by `n`. `n` itself stays."""
    n = max(sums["n"], 1)
    divided = {key: value / n for key, value in sums.items()}
    return {**divided, "n": sums["n"]}


def summary(episodes: Sequence[Episode], ranks: Ranks = SINGLE) -> Numbers:
    """Means over all ranks' scored episodes, and `n`."""
    return means(ranks.sum(add_up(map(measures, episodes))))


def by_category(episodes: Sequence[Episode], ranks: Ranks = SINGLE) -> dict[str, Numbers]:
    """`summary` per category, in order of first appearance. An example without a category counts under "all"."""
    sums: dict[tuple[str, str], float] = {}  # by category and measure: what `Ranks.sum` takes
    for episode in episodes:
        category = episode.example.category or "all"
        for key, value in {"n": 1, **measures(episode)}.items():
            sums[category, key] = sums.get((category, key), 0) + value
    totals: dict[str, Numbers] = {}
    for (category, key), value in ranks.sum(sums).items():
        totals.setdefault(category, {})[key] = value
    return {category: means(total) for category, total in totals.items()}


def tool_errors(episodes: Sequence[Episode]) -> Counter[str]:
    """How often which error came from a tool's infrastructure.

    A search that finds nothing is no error, and neither is a call over its limit.
    """
    errors: Counter[str] = Counter()
    for episode in episodes:
        for turn in episode.turns:
            if turn.failed:
                errors[str(turn.observation.error)] += 1
    return errors


# ---- tables


def table(evaluations: Mapping[str, Mapping[str, Numbers]], mix: Numbers | None = None) -> str:
    """Text table with a column for each evaluation (its `by_category`, by name), and a line for each category.

    A cell has the shares of episodes that searched by each tool, and the accuracy. The last lines are overall means,
    the categories weighted by `mix`, or else by their number of questions. Columns that are wider than 80 characters
    together go on below.
    """
    categories: dict[str, None] = {}  # all of them, in order
    for evaluation in evaluations.values():
        categories |= dict.fromkeys(evaluation)
    keys = [*_searches(evaluations.values()), "accuracy"]
    names = ["", "", *(name[:MOST_NAME] for name in categories), "mean", "reward"]
    columns = []
    for title, evaluation in evaluations.items():
        mean = overall(evaluation, mix, [*keys, "reward"])
        rows = [*(evaluation.get(name, {}) for name in categories), mean]
        cells = [_cell(numbers, keys) for numbers in rows]
        columns.append([title, _labels(keys), *cells, f"{mean['reward']:.3f}"])
    blocks: list[list[list[str]]] = []
    room = 0
    for column in columns:
        width = 2 + max(map(len, column))
        if width > room:
            blocks.append([names])
            room = WIDTH - max(map(len, names))
        blocks[-1].append(column)
        room -= width
    return "\n\n".join(aligned(list(zip(*block))) for block in blocks)


def _searches(evaluations: Iterable[Mapping[str, Numbers]]) -> list[str]:
    """The measures of searches by a tool: that of image searches, and those that are not 0 everywhere."""
    found = {"search_ratio_image": None}
    for evaluation in evaluations:
        for numbers in evaluation.values():
            for key, value in numbers.items():
                if key.startswith("search_ratio_") and value:
                    found[key] = None
    return list(found)


def overall(evaluation: Mapping[str, Numbers], mix: Numbers | None, keys: Sequence[str]) -> Numbers:
    """Weighted means over an evaluation's categories. A category that the mix does not name has no weight."""
    if mix:
        weights = {name: mix.get(name, 0) for name in evaluation}
    else:
        weights = {name: category["n"] for name, category in evaluation.items()}
    total = sum(weights.values())
    means = {}
    for key in keys:
        weighted = [category.get(key, 0.0) * weights[name] for name, category in evaluation.items()]
        means[key] = sum(weighted) / total
    return means


def _labels(keys: Sequence[str]) -> str:
    """What is above a column of `_cell`."""
    short = {"search_ratio_image": "img", "accuracy": "acc"}
    names = [short.get(key, key.removeprefix("search_ratio_")) for key in keys]
    return " ".join(name[:4].rjust(4) for name in names)


def _cell(numbers: Numbers, keys: Sequence[str]) -> str:
    if not numbers:
        return ""
    return " ".join(f"{numbers.get(key, 0.0):.2f}" for key in keys)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, as text: names on the left, then numbers, whose ends are below each other."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for name, *numbers in lines:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:])]
        texts.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(texts)


# ---- evaluations


def results(lines: Sequence[Line]) -> dict[str, Any]:
    """The numbers of an evaluation's lines: {"category", "measures", "status", "judged" if there is a judge}.

    A "judged" of None means that the judge gave no verdict. All numbers are means over the questions, except that `n`,
    `tool_failures`, `judge_failures`, `not_asked` and `cut` count. What was not asked (its prompt does not fit) and
    what was cut (it ran out of tokens) counts as wrong in all means. `interval`: 95 % intervals.
    """
    groups: dict[str, list[Line]] = {}
    for line in lines:
        category = line["category"] or "all"
        groups.setdefault(category, []).append(line)
    numbers = _means_and_counts(lines)
    numbers |= decision(lines)
    resampled = {
        "accuracy": [line["measures"]["accuracy"] for line in lines],
        "accuracy_judge": _verdicts(lines),
        "search_ratio": [line["measures"]["search_ratio"] for line in lines],
    }
    numbers["interval"] = {key: interval(values) for key, values in resampled.items() if values}
    numbers["by_category"] = {category: _means_and_counts(groups[category]) for category in sorted(groups)}
    return numbers


def _means_and_counts(lines: Sequence[Line]) -> dict[str, Any]:
    sums = add_up(line["measures"] for line in lines)
    numbers: dict[str, Any] = means(sums)
    numbers["tool_failures"] = sums.get("tool_failures", 0)
    out_of_tokens = [line for line in lines if line.get("status") == LENGTH]
    numbers["not_asked"] = sum(line["measures"]["turns"] == 0 for line in out_of_tokens)
    numbers["cut"] = len(out_of_tokens) - numbers["not_asked"]
    judged = [line for line in lines if line.get("judged") is not None]
    agreed = []
    for line in judged:
        exact_match = line["measures"]["accuracy"] == 1
        agreed.append(line["judged"] == exact_match)
    numbers["accuracy_judge"] = _mean(_verdicts(lines))
    numbers["judge_agreement"] = _mean(agreed)
    numbers["judge_failures"] = sum("judged" in line for line in lines) - len(judged)
    return numbers


def _verdicts(lines: Iterable[Line]) -> list[float]:
    """The judge's verdicts, 1.0 for a right answer, without those that it failed to give."""
    return [float(line["judged"]) for line in lines if line.get("judged") is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def decision(lines: Iterable[Line]) -> dict[str, float | None]:
    """How well the model decides when to search.

    `search_precision`: of the answers with a search, the share whose question called for one. `search_recall`: of the
    questions that called for a search, the share that was answered with one.
    """
    needed_where_searched = []
    searched_where_needed = []
    for line in lines:
        needed = line["category"] in NEEDS_SEARCH
        if not needed and line["category"] not in NEEDS_NO_SEARCH:
            continue
        searched = line["measures"]["search_ratio"] > 0
        if searched:
            needed_where_searched.append(needed)
        if needed:
            searched_where_needed.append(searched)
    return {"search_precision": _mean(needed_where_searched), "search_recall": _mean(searched_where_needed)}


def interval(values: Sequence[float]) -> list[float]:
    """Bounds of the middle 95 % of the means of `DRAWS` resamplings (bootstrap over questions)."""
    sample = np.asarray(values, dtype=float)  # (n,)
    n = len(sample)
    generator = np.random.default_rng(0)
    resampled = []
    for _ in range(DRAWS):
        drawn = generator.integers(0, n, n)  # (n,) with replacement
        resampled.append(sample[drawn].mean())
    bounds = np.quantile(resampled, [0.025, 0.975])
    return bounds.round(6).tolist()
