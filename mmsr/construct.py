"""A FactualVQA of one's own: from a list of concepts to questions about pictures that need a search, or do not.

    python -m mmsr.construct --demo --out mine                     # a toy data set, off-line, with a scripted model
    python -m mmsr.construct --out mine --metadata metadata.json --counts entry_counts_400m.json \\
        --search live --budget 200000                              # OPENAI_API_KEY, SERPAPI_API_KEY

Concepts come from the head and the tail of MetaCLIP's metadata, pictures and pages from a search engine, questions from
a vision model behind any OpenAI-compatible server. A model's own rollouts tell what has to be searched for. Every stage
leaves a file that can be read, and the same command goes on where the last one ended (see factory.py). The published
pipeline is described in section 3 of the paper; its prompts and thresholds are not public, these are ours.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import re
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Iterable, Iterator, Mapping, NoReturn, Sequence, TypeVar

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from . import bm25
from .cache import Cached
from .client import ChatServer, picture_part
from .data import read_examples
from .episode import Hit, UserError
from .factory import Again, Calls, Factory, Idempotent, Journal, Lines, alone, write_lines, write_whole
from .finders import find_pictures, open_finder
from .pictures import decode, jpeg
from .store import Store
from .tools import IMAGE_SEARCH, TEXT_SEARCH, Toolbox, ToolFailure, search_tools
from .web import Service

PROMPTS = Path(__file__).parent / "prompts" / "construct"
FAMILIAR, UNFAMILIAR = "familiar", "unfamiliar"
FREE, REQUIRED = "search_free", "search_required"  # FVQA's categories
MAX_ASPECT, NEAR = 3.0, 8  # of pictures; bits of 128 in which near-duplicates differ at most
PAGE_CHARACTERS, ANSWER_WORDS, ALIASES = 6000, 6, 8
ASKING = ("who", "what", "when", "where", "which", "whose", "whom", "how")
REFUSAL = re.compile(r"\W*(i'?m |i am )?(sorry|i can'?t|i cannot|unable|as an ai)", re.IGNORECASE)
SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "reward_model": pa.struct(
            {"candidate_answers": pa.string(), "ground_truth": pa.string(), "style": pa.string()}
        ),
        "data_source": pa.string(), "image_urls": pa.null(), "data_id": pa.string(), "category": pa.string(),
        **dict.fromkeys(("concept", "section", "group", "need", "tries", "evidence"), pa.string()),
        **dict.fromkeys(("page_url", "page_title", "page_sha256", "image_url", "licence"), pa.string()),
    }
)  # fmt: skip

T = TypeVar("T")


def normal(text: str) -> str:
    """What two ways to write a name have in common: words without case and punctuation."""
    return " ".join(bm25.tokens(text))


def says(text: str, phrase: str) -> bool:
    return bool(normal(phrase)) and f" {normal(phrase)} " in f" {normal(text)} "


def short_id(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:12]


# ---- concepts


def draw_concepts(metadata: Any, counts: Any, n: int, familiar: float, unfamiliar: float, seed: int) -> list[dict]:
    """`n` concepts, half from the head of the distribution and half from its tail, by a hash of the seed.

    `familiar` and `unfamiliar` are the counts from and up to which a concept belongs to them, or quantiles (at most 1)
    of all counts. Entries that are written alike but for case, blanks and punctuation are one. Raises UserError.
    """
    if not isinstance(metadata, list) or not all(isinstance(entry, str) for entry in metadata):
        raise UserError("--metadata: not a JSON list of texts; give MetaCLIP's metadata.json")
    numbers = counts.values() if isinstance(counts, dict) else [None]
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        raise UserError("--counts: not a JSON object of numbers; give MetaCLIP's entry_counts_400m.json")
    best: dict[str, tuple[float, str]] = {}
    for entry in metadata:
        if (key := normal(entry)) and len(entry) <= 80:
            best[key] = max(best.get(key, (-1, "")), (counts.get(entry, 0), entry))
    seen = [count for count, _ in best.values() if count > 0]
    if not seen:
        raise UserError("--counts: none of the entries of --metadata has a count; give the two files of one release")
    low, high = (float(np.quantile(seen, limit)) if limit <= 1 else limit for limit in (unfamiliar, familiar))
    if low >= high:
        raise UserError(f"--unfamiliar reaches up to {low:g} and --familiar begins at {high:g}: leave room between")
    sections = {
        FAMILIAR: [key for key, (count, _) in best.items() if count >= high],
        UNFAMILIAR: [key for key, (count, _) in best.items() if 0 < count <= low],
    }
    return [
        {"id": short_id(key), "concept": best[key][1], "count": best[key][0], "section": section}
        for section, keys in sections.items()
        for key in sorted(keys, key=lambda key: short_id(str(seed), key))[: n // 2]
    ]


# ---- pictures


def difference_hash(picture: PIL.Image.Image) -> str:
    """32 hex digits: where a 9 x 9 thumbnail gets brighter to the right, and where downwards."""
    grey = np.asarray(picture.convert("L").resize((9, 9), PIL.Image.Resampling.LANCZOS)).astype(int)
    right, down = grey[:-1, 1:] > grey[:-1, :-1], grey[1:, :-1] > grey[:-1, :-1]
    return np.packbits([right, down]).tobytes().hex()


def near_duplicates(hashes: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of pictures that differ in at most `NEAR` bits. 50,000 take seconds."""
    bits = np.array([[int(text[:16], 16), int(text[16:], 16)] for text in hashes], dtype=np.uint64).reshape(-1, 2)
    for later in range(len(bits)):
        distance = np.bitwise_count(bits[:later] ^ bits[later]).sum(1)
        yield from ((int(earlier), later) for earlier in np.flatnonzero(distance <= NEAR))


class Shelf:
    """The folder of picture files, each under its digest."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()[:32]
        if not (self.folder / name).exists():
            write_whole(self.folder / name, [data])
        return name

    def read(self, name: str) -> bytes:
        data = (self.folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest()[:32] != name:
            raise UserError(f"{self.folder / name}: not the picture that was found; put it back or begin another --out")
        return data


# ---- the stages that ask


def json_object(answer: str) -> dict:
    """The JSON object in an answer, whatever stands around it. Raises ValueError with a short reason."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        found = json.loads(answer[start : end + 1])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("refused" if REFUSAL.match(answer) else "no JSON object")
    return found


def flag(name: str, answer: dict) -> bool:
    if not isinstance(answer.get(name), bool):
        raise ValueError(f"{name} is not true or false")
    return answer[name]


def checked_question(concept: str, page: str, answer: dict) -> dict:
    """A question as `question.txt` asks for it. Raises ValueError with the rule that it breaks."""
    question, gold, evidence = (answer.get(name) for name in ("question", "answer", "evidence"))
    aliases = answer.get("aliases", [])
    listed = isinstance(aliases, list) and all(isinstance(alias, str) for alias in aliases)
    if not listed or not all(isinstance(text, str) for text in (question, gold, evidence)):
        raise ValueError("fields are missing or of another type")
    rules = {
        "the question is not one short sentence that asks Who, What, Where or the like": len(question) <= 250
        and question.rstrip().endswith("?")
        and any(word in ASKING for word in normal(question).split()),
        "the question names the concept": not says(question, concept),
        "the answer is empty or too long": 1 <= len(normal(gold).split()) <= ANSWER_WORDS,
        "the answer stands in the question": not says(question, gold),
        "the answer is not in the page": says(page, gold),
        "the evidence is not in the page or lacks the answer": says(page, evidence) and says(evidence, gold),
    }
    for complaint, kept in rules.items():
        if not kept:
            raise ValueError(complaint)
    others = {normal(alias): alias.strip() for alias in reversed(aliases) if normal(alias)}
    others.pop(normal(gold), None)
    fields = {"question": " ".join(question.split()), "answer": gold.strip(), "evidence": " ".join(evidence.split())}
    return fields | {"aliases": list(reversed(others.values()))[:ALIASES]}


class Stages:
    """What is done with one item of each stage; see `Factory.stage`."""

    def __init__(self, calls: Calls, finder: Any, backend: Cached, shelf: Shelf, min_side: int, per_concept: int):
        self.calls, self.finder, self.backend, self.shelf = calls, finder, backend, shelf
        self.min_side, self.per_concept = min_side, per_concept
        self.prompts = {path.stem: path.read_text(encoding="utf-8") for path in PROMPTS.glob("*.txt")}
        self.groups = self.prompts["groups"].split("\n")[:-1]

    def ask(
        self, prompt: str, fields: dict[str, str], check: Callable[[dict], T], reasons: Counter,
        picture: bytes | None = None,
    ) -> T | None:  # fmt: skip
        """The answer that `check` lets pass. After one that it does not, the model is told why and asked once more."""
        text = re.sub(r"\{(\w+)\}", lambda place: fields[place[1]], self.prompts[prompt])
        shown = [picture_part(jpeg(decode(picture), 1024, 2**20))] if picture else []
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
        complaints = []
        for _ in range(2):
            answer = self.calls.complete(messages, 500)
            try:
                found = check(json_object(answer))
            except ValueError as error:
                complaints.append(str(error))
                again = self.prompts["repair"].replace("{complaint}", str(error))
                messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": again}]
                continue
            reasons.update(f"{prompt}, mended: {complaint}" for complaint in complaints)
            return found
        reasons[f"{prompt}: {complaints[-1]}"] += 1
        return None

    def concept(self, item: dict, reasons: Counter) -> list[dict]:
        visual = self.ask("visual", {"concept": item["concept"]}, partial(flag, "visual"), reasons)
        reasons["not visual"] += visual is False
        return [item] if visual else []

    def search(self, item: dict, reasons: Counter) -> list[dict]:
        """The paid search for pictures, by itself: what it found is recorded before anything else is done."""
        found = []
        for picture in find_pictures(self.finder, item["concept"]):
            name = self.shelf.keep(picture.image) if picture.image else ""
            found.append(picture._asdict() | {"image": name})
        reasons["nothing found"] += not found
        return [item | {"found": found}] if found else []

    def pictures(self, item: dict, reasons: Counter) -> list[dict]:
        """The first `per_concept` pictures that are fit, each with a page about it."""
        about, kept, missing = {key: item[key] for key in ("concept", "count", "section")}, [], []
        for found in item["found"]:
            try:
                shown = self._fit(item["concept"], found, [one["hash"] for one in kept])
                kept.append({"id": f"{item['id']}-{shown['picture'][:8]}", **about, **shown})
            except Unfit as why:
                reasons[str(why)] += 1
            except Missing as why:
                missing.append(why.args[0])
            if len(kept) == self.per_concept:
                break
        if len(missing) == len(item["found"]) and missing[-1].kind in ("network", "timeout"):
            raise missing[-1]  # it is rather us: to be tried again
        reasons["picture not to be had"] += len(missing)
        return kept

    def _fit(self, concept: str, found: dict, others: list[str]) -> dict:
        """What is kept of a picture. Raises Unfit with the reason, or Missing."""
        data = self._data(found)
        try:
            picture = decode(data)
        except ValueError:
            raise Unfit("not a readable picture") from None
        (short, long), code = sorted(picture.size), difference_hash(picture)
        if short < self.min_side or long > MAX_ASPECT * short:
            raise Unfit("too small" if short < self.min_side else "too elongated")
        if any(True for _, later in near_duplicates([*others, code]) if later == len(others)):
            raise Unfit("much like another of its concept")
        page, reasons = self._page(concept, found), Counter()
        fields = {"concept": concept, "title": found["title"]}
        shows = says(found["title"], concept) or self.ask("relevant", fields, partial(flag, "shows"), reasons, data)
        if not shows:
            raise Unfit(next(iter(reasons), "shows something else"))
        size = dict(zip(("width", "height"), picture.size))
        source = {key: found[key] for key in ("title", "address", "licence")}
        return {"picture": self.shelf.keep(data), "hash": code, **size, **source, "page": page}

    def _data(self, found: dict) -> bytes:
        if found["image"]:
            return self.shelf.read(found["image"])
        try:
            return self.calls.server.client.fetch_public(found["address"]).body
        except ToolFailure as refused:
            raise Missing(refused) from None

    def _page(self, concept: str, found: dict) -> dict:
        """The picture's own page, where its text is known, or else the first found page that names the concept."""
        pages = [Hit(found["title"], found["url"], found["text"])] if found["text"] else []
        pages = pages or sorted(self.backend.text_search(concept).hits, key=lambda hit: hit.url != found["url"])
        for hit in pages:
            if hit.text and says(f"{hit.title} {hit.text}", concept):
                text = hit.text[:PAGE_CHARACTERS]
                checksum = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
                return {"url": hit.url, "title": hit.title, "text": text, "sha256": checksum}
        raise Unfit("no page about the concept")

    def question(self, item: dict, reasons: Counter) -> list[dict]:
        page = item["page"]
        fields = {"concept": item["concept"], "page": page["text"]}
        check = partial(checked_question, item["concept"], page["text"])
        written = self.ask("question", fields, check, reasons, self.shelf.read(item["picture"]))
        page = {key: page[key] for key in ("url", "title", "sha256")}
        return [{**item, "page": page, **written}] if written else []

    def group(self, item: dict, reasons: Counter) -> list[dict]:
        def check(answer: dict) -> str:
            if answer.get("group") not in self.groups:
                raise ValueError("not one of the groups")
            return answer["group"]

        fields = {key: item[key] for key in ("question", "answer", "concept")} | {"groups": "\n".join(self.groups)}
        group = self.ask("group", fields, check, reasons)
        return [item | {"group": group}] if group else []

    def record(self, item: dict, reasons: Counter) -> list[dict]:
        """An image search for a question's picture, so that training can replay it."""
        hits = self.backend.image_search(self.shelf.read(item["picture"]), item["question"]).hits
        reasons["nothing found"] += not hits
        return []


class Unfit(Exception):
    """Why a picture is left out."""


class Missing(Exception):
    """A picture that could not be fetched; holds the ToolFailure."""


def distinct(pictures: Iterable[dict]) -> Iterator[dict]:
    """Without the later ones of near-duplicates. Goes through `pictures` twice."""
    gone: set[int] = set()
    for earlier, later in near_duplicates([one["hash"] for one in pictures]):
        if earlier not in gone:
            gone.add(later)
    return (one for place, one in enumerate(pictures) if place not in gone)


def external(files: Sequence[str], shelf: Shelf) -> Iterator[dict]:
    """Questions that others wrote, in any format that data.py reads."""
    unknown = {"concept": "", "count": None, "section": "external", "title": "", "address": "", "licence": ""}
    page = {"url": "", "title": "", "sha256": ""}
    for file in files:
        for row, example in enumerate(read_examples(file)):
            try:
                code = difference_hash(decode(example.image))
            except ValueError as error:
                raise UserError(f"{file}: row {row}: {error}; mend or remove this row") from None
            name, gold, aliases = short_id(Path(file).name, example.id), example.answers[0], example.answers[1:]
            asked = {"question": example.question, "answer": gold, "aliases": list(aliases), "evidence": ""}
            shown = {"picture": shelf.keep(example.image), "hash": code, "page": page}
            yield {"id": f"external-{name}", "source": Path(file).name, **unknown, **shown, **asked}


# ---- search need


def need_of(tries: dict[str, int]) -> str:
    """What a question needs, by who answered it rightly: free, image, text or both; "" where nobody did."""
    if tries["right_direct"] or tries["right_none"]:
        return "free"
    if tries["right_image"] or tries["right_text"]:
        return "image" if tries["right_image"] >= tries["right_text"] else "text"
    return "both" if tries["right_both"] else ""


class Rollouts:
    """k tries of a model with tools and k without them, for a chunk of questions at a time."""

    def __init__(self, pool: Path, backend: Any, options: argparse.Namespace):
        from .assemble import assemble
        from .config import parse

        model = ["--model", options.model] if options.model else []
        recipe = ["--recipe", options.recipe] if options.recipe else []
        config = parse([*model, *recipe, "--data", str(pool), "--search", "none", "--seed", str(options.seed)])
        self.setup, self.tries, self.seed = assemble(config), options.tries, options.seed
        tools = search_tools(backend, config.max_images, config.max_texts)
        self.setup.toolbox = Toolbox(tools, inline=config.deterministic)

    def __call__(self, item: dict, reasons: Counter) -> list[dict]:
        rows = range(item["first"], item["first"] + len(item["questions"]))
        examples = [self.setup.questions[row] for row in rows]
        found = [Counter() for _ in examples]
        for direct in (False, True):
            seed = ("need", self.seed, item["id"], direct)
            episodes, _ = self.setup.roll_out(examples, self.tries, seed, 1.0, direct=direct)
            self.setup.score(episodes)
            for episode in episodes:
                if episode.reward_parts["accuracy"] >= 1:
                    found[episode.group_id]["right_direct" if direct else f"right_{_searched(episode)}"] += 1
        names = [f"right_{way}" for way in ("direct", "none", "image", "text", "both")]
        counted = [{"tries": self.tries} | {name: right[name] for name in names} for right in found]
        records = [q | {"tries": tries, "need": need_of(tries)} for q, tries in zip(item["questions"], counted)]
        reasons["never answered"] += sum(not record["need"] for record in records)
        return [record for record in records if record["need"]]


def _searched(episode: Any) -> str:
    image, text = episode.searches(IMAGE_SEARCH) > 0, episode.searches(TEXT_SEARCH) > 0
    return "both" if image and text else "image" if image else "text" if text else "none"


def chunks(questions: Iterable[dict], size: int = 32) -> Iterator[dict]:
    questions, first = iter(questions), 0
    while chunk := list(islice(questions, size)):
        yield {"id": f"{first:07d}", "first": first, "questions": chunk}
        first += len(chunk)


def guessed_need(question: dict) -> dict:
    """Without rollouts: what is familiar needs no search."""
    need = "free" if question["section"] == FAMILIAR else "unknown"
    return question | {"tries": None, "need": need}


# ---- the data set


def category(question: dict) -> str:
    return FREE if question["need"] == "free" else REQUIRED


def families(questions: Sequence[dict]) -> list[int]:
    """A number for each question, the same for those that share a concept, a picture or a near-duplicate of it."""
    parent = list(range(len(questions)))

    def root(place: int) -> int:
        while parent[place] != place:
            place = parent[place] = parent[parent[place]]
        return place

    first: dict[tuple[str, str], int] = {}
    for place, question in enumerate(questions):
        for kind, value in (("concept", normal(question["concept"])), ("picture", question["picture"])):
            if value:
                parent[root(place)] = root(first.setdefault((kind, value), place))
    for earlier, later in near_duplicates([question["hash"] for question in questions]):
        parent[root(later)] = root(earlier)
    return [root(place) for place in range(len(questions))]


def part(questions: Sequence[dict], share: float, seed: int) -> dict[str, list[dict]]:
    """Whole families, about `share` of each kind of question, go to the test split and the others to training."""
    members: dict[int, list[dict]] = defaultdict(list)
    for family, question in zip(families(questions), questions):
        members[family].append(question)
    splits: dict[str, list[dict]] = {"train": [], "test": []}
    seen, tested = Counter(), Counter()
    for family in sorted(members.values(), key=lambda family: short_id(str(seed), family[0]["id"])):
        kind = category(family[0])
        seen[kind] += len(family)
        test = tested[kind] + len(family) / 2 <= share * seen[kind]
        tested[kind] += len(family) * test
        splits["test" if test else "train"] += family
    return splits


def balanced(questions: Sequence[dict], n: int, seed: int) -> list[dict]:
    """`n` questions, one from each pair of group and section in turn as long as it has any."""
    cells: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for question in sorted(questions, key=lambda question: short_id(str(seed), question["id"]), reverse=True):
        cells[question["group"], question["section"]].append(question)
    chosen: list[dict] = []
    while len(chosen) < n:
        chosen += [cells[cell].pop() for cell in sorted(cells) if cells[cell]][: n - len(chosen)]
    return chosen


def choose(questions: Sequence[dict], sizes: dict[str, int], required: float, seed: int) -> dict[str, list[dict]]:
    """Splits of the sizes asked for, `required` of each needing a search; where there is too little, smaller ones.

    The ratio is kept, for it is what keeps a model from searching always. Raises UserError where nothing is left.
    """
    pools = part(questions, sizes["test"] / max(sum(sizes.values()), 1), seed)
    have = {split: Counter(map(category, pool)) for split, pool in pools.items()}
    wish = {s: {REQUIRED: round(n * required), FREE: n - round(n * required)} for s, n in sizes.items()}
    scale = min([1.0, *(have[s][kind] / n for s, kinds in wish.items() for kind, n in kinds.items() if n)])
    if not scale:
        raise UserError(
            f"of {len(questions)} questions {dict(have['train'])} could go to training and {dict(have['test'])} to "
            f"testing: not one of each kind that is asked for; give more --concepts, or another --required or --test"
        )
    chosen = {}
    for split, kinds in wish.items():
        of = {kind: [q for q in pools[split] if category(q) == kind] for kind in kinds}
        drawn = [q for kind, n in kinds.items() for q in balanced(of[kind], int(n * scale), seed)]
        chosen[split] = sorted(drawn, key=lambda question: short_id(str(seed), "order", question["id"]))
    return chosen


def write_parquet(path: Path, questions: Iterable[dict], shelf: Shelf) -> None:
    """FVQA's columns and our own, read by data.py; whole or not at all."""
    side, questions = path.with_name(f".{path.name}.tmp"), iter(questions)
    with pq.ParquetWriter(side, SCHEMA) as writer:
        while rows := [_row(question, shelf) for question in islice(questions, 64)]:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    side.replace(path)


def _row(question: dict, shelf: Shelf) -> dict:
    page, aliases = question["page"], json.dumps(question["aliases"], ensure_ascii=False)
    return {
        "prompt": [{"content": question["question"], "role": "user"}],
        "images": [{"bytes": shelf.read(question["picture"]), "path": question["picture"]}],
        "reward_model": {"candidate_answers": aliases, "ground_truth": question["answer"], "style": "rule"},
        "data_source": question.get("source", "mmsr/construct"), "image_urls": None, "data_id": question["id"],
        "category": category(question) if question.get("need") else "", "need": question.get("need", ""),
        "tries": json.dumps(question.get("tries")),
        **{key: question[key] for key in ("concept", "section", "group", "evidence", "licence")},
        **{f"page_{key}": page[key] for key in ("url", "title", "sha256")}, "image_url": question["address"],
    }  # fmt: skip


def write_card(folder: Path, splits: dict[str, list[dict]], report: dict, cost: dict, shelf: Shelf) -> None:
    """card.json, card.md and a few small pictures."""
    counted = {
        split: {"questions": len(chosen), "concepts": len({q["concept"] for q in chosen if q["concept"]})}
        | {name: dict(sorted(Counter(map(of, chosen)).items())) for name, of in COUNTED.items()}
        for split, chosen in splits.items()
    }
    card = {"splits": counted, "stages": report, "cost": cost}
    write_whole(folder / "card.json", [json.dumps(card, indent=2, ensure_ascii=False).encode()])
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    shown = []
    for question in splits["train"][:12]:
        small = jpeg(decode(shelf.read(question["picture"])), 224, 32 * 1024)
        write_whole(samples / f"{question['picture']}.jpg", [small])
        asked, answer, about = (plain(question[key]) for key in ("question", "answer", "concept"))
        shown.append(f"| ![](samples/{question['picture']}.jpg) | {asked} | {answer} | {about} | {question['need']} |")
    stages = [
        f"| {name} | {done['items']} | {done['records']} | "
        f"{'; '.join(f'{plain(reason)} {n}' for reason, n in done['reasons'].items())} | "
        f"{'; '.join(f'{kind} {n}' for kind, n in done['postponed'].items())} |"
        for name, done in report.items()
    ]
    sizes = [f"- **{split}**: {json.dumps(about, ensure_ascii=False)}" for split, about in counted.items()]
    text = (PROMPTS / "card.md").read_text(encoding="utf-8")
    fields = {"splits": sizes, "stages": stages, "cost": [json.dumps(cost)], "samples": shown}
    filled = re.sub(r"\{(\w+)\}", lambda place: "\n".join(fields[place[1]]), text)
    write_whole(folder / "card.md", [filled.encode()])


COUNTED = {
    "category": category,
    "need": lambda question: question["need"],
    "group": lambda question: question["group"],
    "section": lambda question: question["section"],
}


def plain(text: str) -> str:
    """A stranger's text in a Markdown table."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("[", "&#91;")


# ---- the whole


def build(o: argparse.Namespace, finder: Any = None, environ: Mapping[str, str] = os.environ) -> None:
    """All stages, in a folder that is new or one of this command's. Raises UserError."""
    folder = Path(o.out)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "work").is_dir():
        raise UserError(f"--out {folder}: not empty, and not a folder of this command; name another")
    service = Service.from_environment("openai", environ)
    if not service.key and not environ.get("OPENAI_BASE_URL"):
        raise UserError("OPENAI_API_KEY is not set; export it, or OPENAI_BASE_URL for a server of your own")
    if (service.key or o.search == "live") and not o.budget:
        raise UserError("paid services are to be used: give --budget N, the number of paid calls at most")
    factory = Factory(folder, o.workers)
    with alone(folder), ExitStack() as stack:
        store = Store(folder / "searches.sqlite")
        stack.callback(store.close)
        budget = store.budget("construct", o.budget)
        client = Idempotent()
        finder = finder or open_finder(o.search, budget.spend, client)
        metadata, counts = _concept_files(o, finder)
        paid = budget.spend if service.key else None
        server = ChatServer(service.url, o.vision_model, service.key, client, o.seconds, paid, "openai")
        calls = Calls(server, Journal(folder / "work" / "calls.jsonl"))
        stack.callback(calls.journal.close)
        backend, shelf = Cached(finder, store), Shelf(folder / "pictures")
        stages = Stages(calls, finder, backend, shelf, o.min_side, o.per_concept)
        drawn = draw_concepts(metadata, counts, o.concepts, o.familiar, o.unfamiliar, o.seed)
        asked = ask_all(factory, stages, write_lines(folder / "drawn.jsonl", drawn), o)
        needed = decide(factory, asked, backend, shelf, o)
        splits = choose(list(needed), {"train": o.train, "test": o.test}, o.required, o.seed)
        for split, chosen in splits.items():
            write_parquet(folder / f"{split}.parquet", chosen, shelf)
        if o.record:
            factory.stage("recorded", splits["train"] + splits["test"], stages.record)
        cost = {"answers": len(calls.journal), "paid calls": budget.spent}
        write_card(folder, splits, factory.report, cost, shelf)
    for split, chosen in splits.items():
        print(f"{folder / split}.parquet: {len(chosen)} of {getattr(o, split)} questions")


def ask_all(factory: Factory, stages: Stages, drawn: Lines, o: argparse.Namespace) -> Lines:
    """Concepts to sorted questions."""
    told = [o.vision_model, stages.prompts]
    visual = factory.stage("concepts", drawn, stages.concept, told)
    found = factory.stage("found", visual, stages.search, o.search)
    pictures = factory.stage("pictures", found, stages.pictures, [told, o.min_side, o.per_concept])
    single = write_lines(factory.folder / "distinct.jsonl", distinct(pictures))
    questions = factory.stage("questions", single, stages.question, told)
    others = write_lines(factory.folder / "external.jsonl", external(o.questions, stages.shelf))
    return factory.stage("groups", Again(lambda: chain(questions, others)), stages.group, told)


def decide(factory: Factory, questions: Lines, backend: Any, shelf: Shelf, o: argparse.Namespace) -> Iterable[dict]:
    """What each question needs. `pool.parquet` holds the questions that the model is asked."""
    if not o.rollouts:
        return write_lines(factory.folder / "needs.jsonl", map(guessed_need, questions))
    pool = factory.folder / "pool.parquet"
    write_parquet(pool, questions, shelf)
    rollouts = Rollouts(pool, backend, o)
    settings = [o.model, str(rollouts.setup.folder), o.recipe, o.tries, o.seed]
    return factory.stage("needs", Again(lambda: chunks(questions)), rollouts, settings, workers=1)


def _concept_files(o: argparse.Namespace, finder: Any) -> tuple[Any, Any]:
    """Contents of --metadata and --counts; of a corpus, its titles, each seen as often as it has pictures."""
    titles = getattr(finder, "titles", None)
    if not o.metadata and titles is None:
        raise UserError("--metadata is missing: give MetaCLIP's metadata.json, or --search corpus:FILE.jsonl")
    metadata = _json(o.metadata, "--metadata") if o.metadata else titles
    return metadata, _json(o.counts, "--counts") if o.counts else Counter(titles or ())


def _json(path: str, option: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} {path}: not JSON ({error}); get it again") from None


OPTIONS: dict[str, tuple[Any, str]] = {  # default, whose type is the option's, and help
    "out": ("", "folder of the data set; the same command goes on in it"),
    "metadata": ("", "MetaCLIP's metadata.json, a list of entries; left out: the titles of a corpus"),
    "counts": ("", "MetaCLIP's entry_counts_400m.json, entry to count"),
    "search": ("live", "where pictures and pages come from: corpus:FILE.jsonl, live, local:FILE, remote:URL"),
    "vision-model": (os.environ.get("OPENAI_MODEL", "gpt-4o"), "the model that judges and writes, by OPENAI_API_KEY"),
    "budget": (0, "paid calls at most, searches and answers together; needed where any is paid"),
    "concepts": (1000, "concepts to begin with, half of them familiar"),
    "familiar": (0.95, "count from which an entry is familiar; up to 1 a quantile of all counts"),
    "unfamiliar": (0.5, "count up to which an entry is unfamiliar; up to 1 a quantile"),
    "per-concept": (1, "pictures of a concept at most"),
    "min-side": (224, "pixels along the shorter side of a picture at least"),
    "model": ("", "whose rollouts tell what needs a search, as for train.py; empty: the toy base model"),
    "recipe": ("", "whose limits the rollouts have, as for train.py"),
    "tries": (8, "rollouts of a question with tools, and as many without"),
    "train": (5000, "training questions"),
    "test": (1800, "test questions"),
    "required": (0.68, "share of the questions that need a search"),
    "workers": (256, "calls in flight"),
    "seconds": (240.0, "for an answer, all tries together"),
    "seed": (0, "seeds every choice"),
}


def options(argv: Sequence[str], defaults: Mapping[str, Any] = MappingProxyType({})) -> argparse.Namespace:
    parser = _Parser("mmsr.construct", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in OPTIONS.items():
        default = defaults.get(name, default)
        said = f"{text} ({default})" if default not in ("", 0) else text
        metavar = type(default).__name__.upper()
        parser.add_argument(f"--{name}", default=default, type=type(default), metavar=metavar, help=said)
    parser.add_argument("--questions", nargs="*", default=[], metavar="FILE", help="questions of others that join")
    switch = partial(parser.add_argument, action=argparse.BooleanOptionalAction)
    switch("--rollouts", default=True, help="without: what is familiar counts as known")
    switch("--record", default="record" in defaults, help="search every picture once, so that training can replay it")
    parser.add_argument("--demo", action="store_true", help="a toy data set, off-line, by a scripted model")
    o = parser.parse_args(argv)
    least = {"workers": 1, "concepts": 2, "per_concept": 1, "tries": 1, "train": 1}
    for name in ("workers", "concepts", "per_concept", "tries", "train", "test", "budget", "min_side"):
        if getattr(o, name) < least.get(name, 0):
            parser.error(f"--{name.replace('_', '-')} {getattr(o, name)}: give at least {least.get(name, 0)}")
    if not o.out or not 0 <= o.required <= 1:
        parser.error("--out DIR is missing" if not o.out else f"--required {o.required}: give a share from 0 to 1")
    return o


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; --help lists the options", file=sys.stderr)
        raise SystemExit(2)


DEMO = {
    "search": "toy", "concepts": 600, "familiar": 4000, "unfamiliar": 1000, "per-concept": 8, "min-side": 56,
    "vision-model": "scripted", "train": 400, "test": 100, "required": 0.5, "recipe": "toy", "tries": 4, "workers": 32,
    "seconds": 6.0, "record": True,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    try:
        if "--demo" not in argv:
            build(options(argv))
            return 0
        from .construct_demo import ScriptedModel, ToyFinder, prepare
        from .toy import World

        o = options(argv, DEMO)
        world = World(o.seed)
        with ScriptedModel() as model:
            prepare(o, world)
            build(o, ToyFinder(world), {"OPENAI_BASE_URL": model.url})
        searches = Path(o.out) / "searches.sqlite"
        print(f"python train.py --recipe toy --seed {o.seed} --data {o.out}/train.parquet --search replay:{searches}")
        return 0
    except UserError as error:
        print(f"mmsr.construct: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
