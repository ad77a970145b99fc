"""Which concepts a data set starts with, which questions it ends with, and its files.

The ratio of questions that need a search to those that do not is kept even where there are too few of one kind: trained
on another ratio, a model learns to search always, or never. No concept, picture or near-duplicate of a picture is in
two splits.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmsr.construct.dedup import near_duplicates, normal, short_id
from mmsr.construct.questions import PROMPTS, Shelf
from mmsr.system.errors import UserError
from mmsr.system.files import beside, write_whole
from mmsr.system.images import decode, jpeg

FAMILIAR = "familiar"
UNFAMILIAR = "unfamiliar"
LONGEST = 80  # characters of a concept
FREE = "search_free"  # FVQA's categories
REQUIRED = "search_required"
SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "reward_model": pa.struct(
            {"candidate_answers": pa.string(), "ground_truth": pa.string(), "style": pa.string()}
        ),
        "data_source": pa.string(),
        "image_urls": pa.null(),
        "data_id": pa.string(),
        **dict.fromkeys(["category", "concept", "section", "group", "need", "tries", "evidence"], pa.string()),
        **dict.fromkeys(["page_url", "page_title", "page_sha256", "image_url", "licence"], pa.string()),
    }
)


def draw_concepts(metadata: Any, counts: Any, n: int, familiar: float, unfamiliar: float, seed: int) -> list[dict]:
    """`n` concepts, half from the head of the distribution and half from its tail, chosen by a hash of the seed.

    A concept with a count of at least `familiar` is familiar, one with a count of at most `unfamiliar` is unfamiliar;
    limits up to 1 are quantiles of all counts. Entries that differ only in case, blanks and punctuation are one
    concept. Without `counts` there is one section, "". Raises UserError.
    """
    best = _distinct_entries(metadata, counts)
    sections = {"": list(best)} if counts is None else _sections(best, familiar, unfamiliar)
    concepts = []
    for section, keys in sections.items():
        shuffled = sorted(keys, key=lambda key: short_id(str(seed), key))
        for key in shuffled[: n // len(sections)]:
            count, spelling = best[key]
            concepts.append({"id": short_id(key), "concept": spelling, "count": count, "section": section})
    return concepts


def _sections(best: dict[str, tuple[float, str]], familiar: float, unfamiliar: float) -> dict[str, list[str]]:
    """The keys of `best` that are familiar, and those that are unfamiliar."""
    seen = [count for count, _ in best.values() if count > 0]
    if not seen:
        raise UserError("--counts: no entry of --metadata has a count; give the two files of one release")
    low = float(np.quantile(seen, unfamiliar)) if unfamiliar <= 1 else unfamiliar
    high = float(np.quantile(seen, familiar)) if familiar <= 1 else familiar
    if low >= high:
        raise UserError(f"--unfamiliar reaches up to {low:g} and --familiar begins at {high:g}: leave room between")
    return {
        FAMILIAR: [key for key, (count, _) in best.items() if count >= high],
        UNFAMILIAR: [key for key, (count, _) in best.items() if 0 < count <= low],
    }


def _distinct_entries(metadata: Any, counts: Any) -> dict[str, tuple[float, str]]:
    """The highest count, and its spelling, of each normal form."""
    if not isinstance(metadata, list) or not all(isinstance(entry, str) for entry in metadata):
        raise UserError("--metadata: not a JSON list of texts; give MetaCLIP's metadata.json")
    numbers = counts.values() if isinstance(counts, dict) else [0 if counts is None else "none"]
    if not all(type(number) in (int, float) for number in numbers):
        raise UserError("--counts: not a JSON object of numbers; give MetaCLIP's entry_counts_400m.json")
    best: dict[str, tuple[float, str]] = {}
    for entry in metadata:
        key = normal(entry)
        if key and len(entry) <= LONGEST:
            count = counts.get(entry, 0) if counts else 0
            best[key] = max(best.get(key, (-1, "")), (count, entry))
    return best


def category(question: dict) -> str:
    return FREE if question["need"] == "free" else REQUIRED


def families(questions: Sequence[dict]) -> list[int]:
    """A number for each question; equal for questions that share a concept, a picture or a near-duplicate of it."""
    parent = list(range(len(questions)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[tuple[str, str], int] = {}
    for place, question in enumerate(questions):
        concept = normal(question["concept"])
        if concept:
            parent[root(place)] = root(first.setdefault(("concept", concept), place))
        if question["picture"]:
            parent[root(place)] = root(first.setdefault(("picture", question["picture"]), place))
    for earlier, later in near_duplicates([question["hash"] for question in questions]):
        parent[root(later)] = root(earlier)
    return [root(place) for place in range(len(questions))]


def part(questions: Sequence[dict], share: float, seed: int) -> dict[str, list[dict]]:
    """Divide the questions by whole families: about `share` of each category is for testing, the rest for training."""
    members: dict[int, list[dict]] = defaultdict(list)
    for family, question in zip(families(questions), questions):
        members[family].append(question)
    splits: dict[str, list[dict]] = {"train": [], "test": []}
    seen: Counter = Counter()
    tested: Counter = Counter()
    for family in sorted(members.values(), key=lambda family: short_id(str(seed), family[0]["id"])):
        kind = category(family[0])
        seen[kind] += len(family)
        test = tested[kind] + len(family) / 2 <= share * seen[kind]
        tested[kind] += len(family) * test
        splits["test" if test else "train"] += family
    return splits


def balanced(questions: Sequence[dict], n: int, seed: int) -> list[dict]:
    """`n` questions, taken in turn from each pair of group and section that still has one."""
    cells: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for question in sorted(questions, key=lambda question: short_id(str(seed), question["id"]), reverse=True):
        cells[question["group"], question["section"]].append(question)
    chosen: list[dict] = []
    while len(chosen) < n:
        for cell in sorted(cells):
            if cells[cell] and len(chosen) < n:
                chosen.append(cells[cell].pop())
    return chosen


def choose(questions: Sequence[dict], sizes: dict[str, int], required: float, seed: int) -> dict[str, list[dict]]:
    """Splits of these sizes, where a share `required` of each needs a search; smaller ones where questions are missing.

    The ratio is kept, because it keeps a model from searching always. Raises UserError where a split would be empty.
    """
    pools = part(questions, sizes["test"] / max(sum(sizes.values()), 1), seed)
    have = {split: Counter(map(category, pool)) for split, pool in pools.items()}
    wanted = {}
    scale = 1.0
    for split, size in sizes.items():
        n_required = round(size * required)
        wanted[split] = {REQUIRED: n_required, FREE: size - n_required}
        for kind, n in wanted[split].items():
            if n:
                scale = min(scale, have[split][kind] / n)
    if not scale:
        raise UserError(
            f"of {len(questions)} questions {dict(have['train'])} could go to training and {dict(have['test'])} to "
            f"testing: not one of each kind that is asked for; give more --concepts, or another --required or --test"
        )
    chosen = {}
    for split, kinds in wanted.items():
        drawn = []
        for kind, n in kinds.items():
            of_kind = [question for question in pools[split] if category(question) == kind]
            drawn += balanced(of_kind, int(n * scale), seed)
        chosen[split] = sorted(drawn, key=lambda question: short_id(str(seed), "order", question["id"]))
    return chosen


def write_parquet(path: Path, questions: Iterable[dict], shelf: Shelf) -> None:
    """Write FVQA's columns and our own, which formats.py reads; the whole file or nothing."""
    questions = iter(questions)
    with beside(path) as side, pq.ParquetWriter(side, SCHEMA) as writer:
        while rows := [_row(question, shelf) for question in islice(questions, 64)]:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


def _row(question: dict, shelf: Shelf) -> dict:
    aliases = json.dumps(question["aliases"], ensure_ascii=False)
    return {
        "prompt": [{"content": question["question"], "role": "user"}],
        "images": [{"bytes": shelf.read(question["picture"]), "path": question["picture"]}],
        "reward_model": {"candidate_answers": aliases, "ground_truth": question["answer"], "style": "rule"},
        "data_source": question.get("source", "mmsr/construct"),
        "image_urls": None,
        "data_id": question["id"],
        "category": category(question) if question.get("need") else "",
        "concept": question["concept"],
        "section": question["section"],
        "group": question["group"],
        "need": question.get("need", ""),
        "tries": json.dumps(question.get("tries")),
        "evidence": question["evidence"],
        "page_url": question["page"]["url"],
        "page_title": question["page"]["title"],
        "page_sha256": question["page"]["sha256"],
        "image_url": question["address"],
        "licence": question["licence"],
    }


def write_card(folder: Path, splits: dict[str, list[dict]], report: dict, cost: dict, shelf: Shelf) -> None:
    """Write card.json, card.md and up to 12 small pictures."""
    counted = {split: _counted(chosen) for split, chosen in splits.items()}
    card = {"splits": counted, "stages": report, "cost": cost}
    write_whole(folder / "card.json", [json.dumps(card, indent=2, ensure_ascii=False).encode()])
    fields = {
        "splits": [f"- **{split}**: {json.dumps(about, ensure_ascii=False)}" for split, about in counted.items()],
        "stages": [_stage_row(name, done) for name, done in report.items()],
        "cost": [json.dumps(cost)],
        "samples": _samples(folder / "samples", splits["train"][:12], shelf),
    }
    text = (PROMPTS / "card.md").read_text(encoding="utf-8")
    filled = re.sub(r"\{(\w+)\}", lambda place: "\n".join(fields[place[1]]), text)
    write_whole(folder / "card.md", [filled.encode()])


def _counted(questions: list[dict]) -> dict[str, Any]:
    """How many questions and concepts a split has, and how many questions by each property."""
    concepts = {question["concept"] for question in questions if question["concept"]}
    counted: dict[str, Any] = {"questions": len(questions), "concepts": len(concepts)}
    counted["category"] = dict(sorted(Counter(map(category, questions)).items()))
    for name in ("need", "group", "section"):
        counted[name] = dict(sorted(Counter(question[name] for question in questions).items()))
    return counted


def _stage_row(name: str, done: dict) -> str:
    reasons = "; ".join(f"{table_text(reason)} {n}" for reason, n in done["reasons"].items())
    postponed = "; ".join(f"{kind} {n}" for kind, n in done["postponed"].items())
    return f"| {name} | {done['items']} | {done['records']} | {reasons} | {postponed} |"


def _samples(folder: Path, questions: list[dict], shelf: Shelf) -> list[str]:
    """Write small pictures of these questions. Returns the rows of the table that shows them."""
    folder.mkdir(exist_ok=True)
    rows = []
    for question in questions:
        small = jpeg(decode(shelf.read(question["picture"])), 224, 32 * 1024)
        write_whole(folder / f"{question['picture']}.jpg", [small])
        asked = table_text(question["question"])
        answer = table_text(question["answer"])
        concept = table_text(question["concept"])
        picture = f"![](samples/{question['picture']}.jpg)"
        rows.append(f"| {picture} | {asked} | {answer} | {concept} | {question['need']} |")
    return rows


def table_text(text: str) -> str:
    """Text from a model or the web, made safe for a Markdown table."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("[", "&#91;")
