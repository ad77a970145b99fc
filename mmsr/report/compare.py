"""A model's results in a table, beside what the paper, its blog and later systems report for the same benchmark.

Their numbers are in `published.tsv`, in per cent: accuracy by exact match and by an LLM as judge, and the share of
answers with a search, each row with its source. They are theirs: their questions, search engine, judge and tools.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from mmsr.evaluate import MOST_NAME, aligned

PUBLISHED = Path(__file__).with_name("published.tsv")
NAMED = ("infoseek", "mmsearch", "simplevqa", "livevqa", "civqa", "fvqa")  # mmsearch_r1_infoseek… is InfoSeek
COLUMNS = {
    "exact": "accuracy",
    "strict": "accuracy_strict",
    "judge": "accuracy_judge",
    "searched": "search_ratio",
    "image": "search_ratio_image",
    "text": "search_ratio_text",
    "calls": "calls_ratio",
}


def published(name: str, layout: str) -> list[dict[str, str]]:
    """The published rows for the benchmark that a file's name, or else its layout, names."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    wanted = next((benchmark for benchmark in NAMED if benchmark in name.lower()), layout)
    return [row for row in rows if row["benchmark"] == wanted]


def report(name: str, mode: str, found: Mapping[str, Any], others: Sequence[Mapping[str, str]]) -> str:
    """A text table in per cent: this run, its interval, its categories, and published rows. Its sources are below."""
    rows = [["per cent", *COLUMNS]]
    rows.append([f"this run, {mode}", *_cells(found)])
    for end, place in (("from", 0), ("to", 1)):
        bounds = [found["interval"].get(key) for key in COLUMNS.values()]
        rows.append([f"  95 % interval {end}", *(_per_cent(bound[place]) if bound else "" for bound in bounds)])
    if len(found["by_category"]) > 1:
        for category, numbers in found["by_category"].items():
            rows.append([f"  {category[:MOST_NAME]} ({numbers['n']})", *_cells(numbers)])
    sources: dict[str, int] = {}  # a number for each
    for row in others:
        number = sources.setdefault(f"{row['source']}, {row['set']}", len(sources) + 1)
        rows.append([f"{row['system']} [{number}]"] + [row.get(column) or "" for column in COLUMNS])
    title = f"{name}: {found['n']:,} questions"
    notes = [f"[{number}] {source}" for source, number in sources.items()]
    return "\n".join([title, aligned(rows), *notes, *_remarks(found)])


def _cells(found: Mapping[str, Any]) -> list[str]:
    return [_per_cent(found[key]) for key in COLUMNS.values()]


def _per_cent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _remarks(found: Mapping[str, Any]) -> Iterable[str]:
    tokens = f"{found['tokens']:.0f} tokens ({found['tokens_sampled']:.0f} sampled)"
    yield f"a question: {found['turns']:.2f} turns, {tokens}; in all {found['tool_failures']:.0f} tool calls failed"
    if found["not_asked"]:
        yield f"WARNING: {found['not_asked']} of {found['n']} prompts do not fit --max-tokens: they count as wrong"
    if found["cut"]:
        cut = f"{found['cut']} of {found['n']} rollouts"
        yield f"WARNING: {cut} ran out of --turn-tokens or --max-tokens: they count as wrong"
    precision = found["search_precision"]
    recall = found["search_recall"]
    if precision is not None or recall is not None:
        yield f"decision to search: precision {_with_unit(precision)}, recall {_with_unit(recall)}"
    if found["accuracy_judge"] is not None:
        agreement = _with_unit(found["judge_agreement"])
        yield f"the judge agrees with exact match on {agreement} of what it judged"
    if found["judge_failures"]:
        yield f"WARNING: the judge gave no verdict on {found['judge_failures']} answers; they are not in its column"


def _with_unit(share: float | None) -> str:
    return "–" if share is None else f"{_per_cent(share)} %"
