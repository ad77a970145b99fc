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
    """Text table of several evaluations: `rows` maps a name to its `by_category`.

    The last columns are overall means, the categories weighted by `mix`, or else by their number of questions.
    """
    categories = list(dict.fromkeys(category for row in rows.values() for category in row))
    keys = ("search_ratio", "accuracy")
    lines = [["", *(f"{key.split('_')[0]} {c}" for key in keys for c in categories), "accuracy", "reward"]]
    for name, row in rows.items():
        share = {c: (mix or {}).get(c, 0 if mix else row[c]["n"]) for c in categories}
        overall = [sum(row[c][k] * share[c] for c in categories) / sum(share.values()) for k in ("accuracy", "reward")]
        cells = [*(row[c][key] for key in keys for c in categories), *overall]
        lines.append([name, *(f"{cell:.3f}" for cell in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
