"""What a set of finished episodes amounts to: the numbers that training, evaluation and their tables share."""

from __future__ import annotations

from typing import Any, Sequence

from .episode import Episode
from .tools import IMAGE_SEARCH, TEXT_SEARCH


def summary(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over scored episodes. `search_ratio`: share of episodes with at least one executed search."""
    n = max(len(episodes), 1)

    def mean(values) -> float:
        return sum(values) / n

    return {
        "n": len(episodes),
        "accuracy": mean(e.reward_parts["accuracy"] for e in episodes),
        "search_ratio": mean(e.searches() > 0 for e in episodes),
        "search_ratio_image": mean(e.searches(IMAGE_SEARCH) > 0 for e in episodes),
        "search_ratio_text": mean(e.searches(TEXT_SEARCH) > 0 for e in episodes),
        "reward": mean(e.reward for e in episodes),
    }


def by_category(episodes: Sequence[Episode]) -> dict[str, dict[str, float]]:
    """`summary` per category, in order of first appearance. An example without a category counts under "all"."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.example.category or "all", []).append(episode)
    return {category: summary(members) for category, members in groups.items()}


def tool_failures(episodes: Sequence[Episode]) -> int:
    """Calls whose infrastructure failed. A search that finds nothing, or one over its limit, is none."""
    seen = [turn.observation for e in episodes for turn in e.turns if turn.role == "tool"]
    return sum(not observation.ok and observation.source != "limit" for observation in seen)


def table(title: str, rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Text table of several evaluations: `rows` maps a name to its `by_category`; columns are the categories."""
    categories = list(dict.fromkeys(category for row in rows.values() for category in row))
    head = [title, *(f"search {c}" for c in categories), *(f"accuracy {c}" for c in categories), "reward"]
    lines = [head]
    for name, row in rows.items():
        cells = [f"{row[c][key]:.3f}" for key in ("search_ratio", "accuracy") for c in categories]
        total = sum(row[c]["n"] for c in categories)
        lines.append([name, *cells, f"{sum(row[c]['reward'] * row[c]['n'] for c in categories) / total:.3f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
