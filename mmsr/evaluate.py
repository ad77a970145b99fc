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
NEEDS_SEARCH = {"search_required", "unfamiliar", "held_out", "known_new_fact", "unknown_two_hop"}
NEEDS_NO_SEARCH = {"search_free", "familiar", "familiar_fact"}

Line = Mapping[str, Any]  # of episodes.jsonl
Numbers = dict[str, float]  # by the name of a measure
OFFICIAL = RewardRule("paper")
STRICT = RewardRule("strict")
DRAWS = 1000


def measures(episode: Episode) -> Numbers:
    """The numbers of a scored episode. Their means are those of a set."""
    return {
        "accuracy": episode.reward_parts["accuracy"],
        "search_ratio": float(episode.searches() > 0),
        "search_ratio_image": float(episode.searches(IMAGE_SEARCH) > 0),
        "search_ratio_text": float(episode.searches(TEXT_SEARCH) > 0),
        "reward": episode.reward,
    }


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
            seen = turn.observation
            if turn.role == "tool" and not seen.ok and seen.source != "limit":
                errors[str(seen.error)] += 1
    return errors


# ---- tables


def table(evaluations: dict[str, dict[str, Numbers]], mix: Numbers | None = None) -> str:
    """Text table with a column for each evaluation (its `by_category`, by name), and a line for each category.

    A cell has the shares of episodes that searched by image and by text (left out where there were none) and the
    accuracy. The last lines are overall means, the categories weighted by `mix`, or else by their number of questions.
    """
    columns = list(evaluations.values())
    categories: dict[str, None] = {}  # all of them, in order
    texts_searched = False
    for evaluation in columns:
        for name, category in evaluation.items():
            categories[name] = None
            texts_searched |= category["search_ratio_text"] > 0
    keys = ["search_ratio_image", "search_ratio_text", "accuracy"]
    if not texts_searched:
        keys.remove("search_ratio_text")
    overall = [_overall(evaluation, mix, [*keys, "reward"]) for evaluation in columns]

    header = "/".join(key.split("_")[-1] for key in keys)
    lines = [[header, *evaluations]]
    for name in categories:
        lines.append([name] + [_cell(evaluation[name], keys) for evaluation in columns])
    lines.append(["mean"] + [_cell(mean, keys) for mean in overall])
    lines.append(["reward"] + [f"{mean['reward']:.3f}" for mean in overall])
    return aligned(lines)


def _overall(evaluation: dict[str, Numbers], mix: Numbers | None, keys: Sequence[str]) -> Numbers:
    """Weighted means over an evaluation's categories. A category that the mix does not name has no weight."""
    if mix:
        weights = {name: mix.get(name, 0) for name in evaluation}
    else:
        weights = {name: category["n"] for name, category in evaluation.items()}
    total = sum(weights.values())
    overall = {}
    for key in keys:
        weighted = [category[key] * weights[name] for name, category in evaluation.items()]
        overall[key] = sum(weighted) / total
    return overall


def _cell(numbers: Numbers, keys: Sequence[str]) -> str:
    return " ".join(f"{numbers[key]:.2f}" for key in keys)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, as text."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        texts.append("  ".join(cells).rstrip())
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
