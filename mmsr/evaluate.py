"""What a set of finished episodes amounts to: the numbers that training, evaluation and their tables share."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from .episode import Episode
from .parallel import SINGLE, Ranks
from .tools import IMAGE_SEARCH, TEXT_SEARCH


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


def _sums(episodes: Sequence[Episode]) -> dict[str, float]:
    return {
        "n": len(episodes),
        "accuracy": sum(e.reward_parts["accuracy"] for e in episodes),
        "search_ratio": sum(e.searches() > 0 for e in episodes),
        "search_ratio_image": sum(e.searches(IMAGE_SEARCH) > 0 for e in episodes),
        "search_ratio_text": sum(e.searches(TEXT_SEARCH) > 0 for e in episodes),
        "reward": sum(e.reward for e in episodes),
    }


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    n = max(sums["n"], 1)
    return {key: value if key == "n" else value / n for key, value in sums.items()}


def tool_failures(episodes: Sequence[Episode]) -> int:
    """Calls whose infrastructure failed. A search that finds nothing, or one over its limit, is none."""
    seen = [turn.observation for e in episodes for turn in e.turns if turn.role == "tool"]
    return sum(not observation.ok and observation.source != "limit" for observation in seen)


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
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _overall(row: dict[str, dict[str, Any]], mix: dict[str, float] | None, keys: Sequence[str]) -> dict[str, float]:
    share = {name: (mix or {}).get(name, 0 if mix else category["n"]) for name, category in row.items()}
    return {key: sum(row[name][key] * share[name] for name in row) / sum(share.values()) for key in keys}


def _cell(numbers: Mapping[str, float], keys: Sequence[str]) -> str:
    return " ".join(f"{numbers[key]:.2f}" for key in keys)
