"""The numbers of one seed, or of several: `python -m examples.flags.report runs/flags/seed-0 runs/flags/seed-1`.

All but one table is about the countries that training leaves out. `sampled` is the share of right answers that the
untrained language model gave to a fact, `prompted` the probability of the right one after three examples
(`knowledge.py`). Ranges are 95 % of a bootstrap over countries: the questions about one country are not independent.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from examples.flags.countries import FACTS
from examples.flags.knowledge import Known
from examples.flags.questions import KNOWN_FROM, Row, read_known, read_rows
from mmsr.episode import ANSWERED
from mmsr.system.errors import UserError, first_line
from mmsr.system.files import json_file
from mmsr.tools import TEXT_SEARCH

CATEGORIES = ("familiar", "known_new_fact", "unfamiliar", "unfamiliar_fact")
WAYS = {  # by the names of the evaluations
    "before": "after imitation",
    "never-before": "— never searching",
    "always-before": "— always searching",
    "after": "**after GRPO**",
    "never-after": "— never searching",
    "always-after": "— always searching",
    "greedy": "— greedy",
    "unpenalised": "GRPO without the penalty",
    "informed": "imitation of right decisions",
}
ON_DEMAND = ("before", "after", "unpenalised", "informed")  # the ways whose searches say something about knowledge
BINS = (0.0, 1 / 16, 0.25, 0.5, 0.75, 1.01)  # of prior knowledge, the lower end included
BIN_NAMES = ("0", "below 1/4", "below 1/2", "below 3/4", "to 1")
DRAWS = 1000
UNFINISHED = "let python -m examples.flags finish there first"


@dataclass
class Seed:
    """What the folder of a seed says."""

    name: str  # of the folder
    answered: dict[str, list[Row]]  # by evaluation: its episodes, each with its question and what was known of the fact
    trained: list[Row]  # the rollouts of GRPO, likewise, each with its `step`
    temperature: float  # of all evaluations but the greedy one
    known: list[Known]  # of these countries, before any training
    known_after: list[Known]  # after the imitation


def read(folder: Path) -> Seed:
    """Raises UserError where an evaluation or a file is missing."""
    known = read_known(folder / "known.jsonl")
    known_after = read_known(folder / "known-after.jsonl")
    asked = questions_by_id(folder / "data" / "test.jsonl", known)
    answered = {}
    for way in WAYS:
        episodes = []
        for part in ("", "-names", "-facts"):  # always searching is in two parts
            file = folder / f"eval-{way}{part}" / "episodes.jsonl"
            if file.is_file():
                episodes += read_rows(file)
        if episodes:  # the comparisons are not always there
            answered[way] = with_questions(episodes, asked, folder)
    missing = [way for way in ("before", "after") if way not in answered]
    if missing:
        raise UserError(f"{folder} has no eval-{missing[0]}: {UNFINISHED}")
    for way, lines in answered.items():
        lacking = {line["id"] for line in answered["after"]} - {line["id"] for line in lines}
        if lacking:
            raise UserError(f"{folder}: eval-{way} lacks {len(lacking)} questions of eval-after: {UNFINISHED}")
    temperature = json_file(folder / "eval-before" / "config.json")["temperature"]
    asked = questions_by_id(folder / "data" / "train.jsonl", known)
    trained = with_questions(rollouts(folder / "grpo"), asked, folder)
    about = {fact.country for fact in known_after}
    known = [fact for fact in known if fact.country in about]
    return Seed(folder.name, answered, trained, temperature, known, known_after)


def questions_by_id(file: Path, known: Sequence[Known]) -> dict[str, Row]:
    """The questions, each with `sampled` and `prompted` of its fact; NaN where it asks for the flag's name, no fact."""
    priors = {(fact.country, fact.kind): (fact.sampled, fact.prompted) for fact in known}
    asked = {}
    for row in read_rows(file):
        sampled, prompted = priors.get((row["country"], row["kind"]), (math.nan, math.nan))
        asked[row["id"]] = {**row, "sampled": sampled, "prompted": prompted}
    return asked


def with_questions(episodes: Sequence[Row], asked: dict[str, Row], folder: Path) -> list[Row]:
    """Raises UserError where the questions are not those that were asked."""
    unknown = [episode["id"] for episode in episodes if episode["id"] not in asked]
    if unknown:
        raise UserError(f"{folder}: question {unknown[0]} is not in its data any more: start again with another --out")
    return [{**episode, **asked[episode["id"]]} for episode in episodes]


def rollouts(run: Path) -> list[Row]:
    """Those of all steps of a training run. Each gets its step."""
    found = []
    for file in sorted((run / "rollouts").glob("step-*.jsonl")):
        step = int(file.stem.removeprefix("step-"))
        found += [{**rollout, "step": step} for rollout in read_rows(file)]
    return found


def write(folder: Path) -> str:
    """Write report.md and curve.png of one seed. Returns the text. Raises UserError."""
    seeds = [read(folder)]
    text = tables(seeds)
    (folder / "report.md").write_text(text, encoding="utf-8")
    draw(seeds, folder / "curve.png")
    return text


def tables(seeds: Sequence[Seed]) -> str:
    """All tables. The first has a number for each seed; in the others the questions of all seeds are taken together."""
    names = " · ".join(seed.name for seed in seeds)
    counts = " · ".join(str(len(seed.answered["before"])) for seed in seeds)
    distinct = sorted({seed.temperature for seed in seeds})
    temperatures = " · ".join(f"{temperature:g}" for temperature in distinct)
    about = f"{names}: {counts} questions about countries that training leaves out; T = {temperatures}, or greedy."
    parts = [about, overall(seeds), gain(seeds, "GRPO adds", "before")]
    if ways(seeds, ["always-after"]):
        parts.append(gain(seeds, "Searching on demand instead of always adds", "always-after"))
    parts += [by_category(seeds), familiarity(seeds), by_kind(seeds)]
    if all(seed.trained for seed in seeds):
        parts.append(in_training(seeds))
    parts.append(kept(seeds))
    return "\n\n".join(parts) + "\n"


def ways(seeds: Sequence[Seed], wanted: Sequence[str] = tuple(WAYS)) -> list[str]:
    """Those that every seed has."""
    common = set(wanted)
    for seed in seeds:
        common &= set(seed.answered)
    return [way for way in wanted if way in common]


def together(seeds: Sequence[Seed], way: str) -> list[Row]:
    lines = []
    for seed in seeds:
        lines += seed.answered[way]
    return lines


def overall(seeds: Sequence[Seed]) -> str:
    """Accuracy, reward, and searches a question."""
    rows = [["", "accuracy", "reward", "searches"]]
    for way in ways(seeds):
        lines = [seed.answered[way] for seed in seeds]
        accuracy = " · ".join(f"{mean(each, 'accuracy'):.3f}" for each in lines)
        if len(seeds) == 1:
            accuracy += between(*interval(lines[0], lambda some: mean(some, "accuracy")))
        reward = " · ".join(f"{mean(each, 'reward'):.3f}" for each in lines)
        searches = " · ".join(
            number(mean(each, "search_ratio_image") + mean(each, "search_ratio_text")) for each in lines
        )
        rows.append([WAYS[way], accuracy, reward, searches])
    return markdown(rows)


def gain(seeds: Sequence[Seed], what: str, base: str) -> str:
    """What the way "after" adds to the way `base`, question by question: both have answered the same ones."""
    differences = []
    for place, seed in enumerate(seeds):
        compared = {line["id"]: line["measures"] for line in seed.answered[base]}
        for line in seed.answered["after"]:
            other = compared[line["id"]]
            added = {measure: line["measures"][measure] - other[measure] for measure in ("accuracy", "reward")}
            country = f"{place} {line['country']}"  # each seed has trained on other ones
            differences.append({"country": country, "measures": added})
    found = []
    for measure in ("accuracy", "reward"):
        low, high = interval(differences, partial(mean, measure=measure))
        found.append(f"{measure} {mean(differences, measure):+.3f} ({low:+.3f} to {high:+.3f})")
    return f"{what}: {', '.join(found)}."


def by_category(seeds: Sequence[Seed]) -> str:
    rows = [["accuracy · image · text searches", *CATEGORIES]]
    for way in ways(seeds):
        row = [WAYS[way]]
        for category in CATEGORIES:
            some = [line for line in together(seeds, way) if line["category"] == category]
            measures = ("accuracy", "search_ratio_image", "search_ratio_text")
            row.append(" · ".join(number(mean(some, measure)) for measure in measures))
        rows.append(row)
    return markdown(rows)


def mean(lines: Sequence[Row], measure: str) -> float:
    """NaN of nothing."""
    return ratio(sum(line["measures"][measure] for line in lines), len(lines))


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def between(low: float, high: float) -> str:
    return f" ({number(low)} to {number(high)})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; its first row is the head."""
    lines = [*rows[:1], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(lines: Sequence[Row], measure: Callable[[Sequence[Row]], float]) -> tuple[float, float]:
    """The middle 95 % of a measure when countries are drawn with replacement."""
    by_country: dict[str, list[Row]] = defaultdict(list)
    for line in lines:
        by_country[line["country"]].append(line)
    groups = list(by_country.values())
    generator = np.random.default_rng(0)
    measured = []
    for _ in range(DRAWS):
        drawn: list[Row] = []
        for place in generator.integers(0, len(groups), len(groups)):
            drawn += groups[place]
        measured.append(measure(drawn))
    low, high = np.nanquantile(measured, [0.025, 0.975])
    return float(low), float(high)


# ---- searching against prior knowledge


def familiarity(seeds: Sequence[Seed]) -> str:
    """Text searches by prior knowledge, and their rank correlation, over all facts and within kinds.

    A model that searches for capitals and never for continents has a correlation over all facts and none within kinds.
    """
    heads = ["rank correlation", "within kinds", "with `prompted`"]
    rows = [["text searches, by prior knowledge", *BIN_NAMES, *heads]]
    for way in ways(seeds, ON_DEMAND):
        row = [WAYS[way]]
        for share, count in by_bin(facts(together(seeds, way))):
            row.append(f"{number(share)} of {count}")
        for correlation in (over_all, within_kinds):
            cell = " · ".join(number(correlation(facts(seed.answered[way]))) for seed in seeds)
            if len(seeds) == 1:
                cell += between(*interval(facts(seeds[0].answered[way]), correlation))
            row.append(cell)
        row.append(" · ".join(number(over_all(facts(seed.answered[way]), "prompted")) for seed in seeds))
        rows.append(row)
    return markdown(rows)


def by_kind(seeds: Sequence[Seed]) -> str:
    """Text searches for each kind of fact, where the untrained model did not know it and where it did."""
    rows = [["text searches, not known · known", *FACTS]]
    for way in ways(seeds, ON_DEMAND):
        lines = facts(together(seeds, way))
        row = [WAYS[way]]
        for kind in FACTS:
            parts = by_knowledge([line for line in lines if line["kind"] == kind])
            row.append(" · ".join(number(mean(part, "search_ratio_text")) for part in parts))
        rows.append(row)
    return markdown(rows)


def facts(lines: Sequence[Row]) -> list[Row]:
    """The lines whose question is about a fact."""
    return [line for line in lines if not math.isnan(line["sampled"])]


def by_knowledge(lines: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The lines about facts that the untrained model did not know, and about facts that it knew."""
    about = facts(lines)
    is_not = [line for line in about if line["sampled"] < KNOWN_FROM]
    is_known = [line for line in about if line["sampled"] >= KNOWN_FROM]
    return is_not, is_known


def by_bin(lines: Sequence[Row]) -> list[tuple[float, int]]:
    """The share of text searches, and the number of questions, in each bin of prior knowledge."""
    found = []
    for low, high in zip(BINS, BINS[1:]):
        inside = [line for line in lines if low <= line["sampled"] < high]
        found.append((mean(inside, "search_ratio_text"), len(inside)))
    return found


def over_all(lines: Sequence[Row], prior: str = "sampled") -> float:
    """The rank correlation between prior knowledge and text searches."""
    searched = [line["measures"]["search_ratio_text"] for line in lines]
    return rank_correlation([line[prior] for line in lines], searched)


def within_kinds(lines: Sequence[Row]) -> float:
    """The mean of `over_all` over the kinds of facts."""
    found = []
    for kind in FACTS:
        found.append(over_all([line for line in lines if line["kind"] == kind]))
    defined = [value for value in found if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values with the mean of their ranks. NaN where all are equal."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the rank of each distinct value's last occurrence
    return (last - (counts - 1) / 2)[place]


def in_training(seeds: Sequence[Seed]) -> str:
    """Rollouts of GRPO by quarters of its steps: the reward; of facts, text searches, and answers without one."""
    trained = []
    for seed in seeds:
        trained += seed.trained
    last = max(line["step"] for line in trained)
    ends = sorted({round(last * quarter / 4) for quarter in range(5)})  # fewer than four quarters of a few steps
    heads = ["in training, steps"]
    rewards = ["reward"]
    searched = ["text searches, not known · known"]
    right = ["right without one, not known · known"]
    for begin, end in zip(ends, ends[1:]):
        heads.append(f"{begin + 1} to {end}")
        lines = [line for line in trained if begin < line["step"] <= end]
        rewards.append(number(ratio(sum(line["reward"] for line in lines), len(lines))))
        searched.append(" · ".join(number(share_searched(part)) for part in by_knowledge(lines)))
        right.append(" · ".join(number(share_right_from_memory(part)) for part in by_knowledge(lines)))
    return markdown([heads, rewards, searched, right])


def share_searched(rollouts: Sequence[Row]) -> float:
    return ratio(sum(map(asked_for_pages, rollouts)), len(rollouts))


def share_right_from_memory(rollouts: Sequence[Row]) -> float:
    """Of the rollouts that answer a question about a fact without a text search."""
    answered = [line for line in rollouts if line["status"] == ANSWERED and not asked_for_pages(line)]
    return ratio(sum(line["reward_parts"]["accuracy"] for line in answered), len(answered))


def asked_for_pages(rollout: Row) -> bool:
    return any(turn["role"] == "tool" and turn["action"] == TEXT_SEARCH for turn in rollout["turns"])


def kept(seeds: Sequence[Seed]) -> str:
    """Whether imitation cost knowledge: right answers before and after it, among those that are no refusal."""
    rows = [["right when asked in words, of what is not refused · refused", *FACTS]]
    for name, when in (("untrained", "known"), ("after imitation", "known_after")):
        measured: list[Known] = []
        for seed in seeds:
            measured += getattr(seed, when)
        row = [name]
        for kind in FACTS:
            some = [fact for fact in measured if fact.kind == kind]
            right = sum(fact.sampled for fact in some)
            refused = sum(fact.refused for fact in some)
            row.append(f"{number(ratio(right, len(some) - refused))} · {number(ratio(refused, len(some)))}")
        rows.append(row)
    return markdown(rows)


def draw(seeds: Sequence[Seed], file: Path) -> None:
    """The shares of `familiarity` as a curve, of all seeds together."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    middles = [(low + min(high, 1)) / 2 for low, high in zip(BINS, BINS[1:])]
    for way, colour in (("before", "#9a9a9a"), ("after", "#1f77b4")):
        shares = [share for share, _ in by_bin(facts(together(seeds, way)))]
        axes.plot(middles, shares, marker="o", color=colour, label=WAYS[way].strip("*"))
    axes.set_xlabel("right answers of the untrained model, share of its samples")
    axes.set_ylabel("share of text searches")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.flags.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a seed that is finished")
    parser.add_argument("--figure", type=Path, help="draw the curve into this file (.svg, .png)")
    options = parser.parse_args(argv)
    if options.figure and options.figure.suffix not in (".svg", ".png"):
        parser.error(f"--figure {options.figure}: give a name that ends in .svg or .png")
    try:
        seeds = [read(folder) for folder in options.folders]
        print(tables(seeds), end="")
        if options.figure:
            draw(seeds, options.figure)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {first_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
