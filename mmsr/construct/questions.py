"""The stages of data construction that use a vision model behind a chat server, a search engine, or the web.

Each is a method that maps one item to records (see `Factory.stage`). An answer of the model must follow the rules of
its prompt. Where it breaks one, the model is told which and asked once more. The prompts are text files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence, TypeVar

from mmsr.construct.dedup import difference_hash, near_duplicates, normal, says, short_id
from mmsr.construct.factory import Calls, LeftOut
from mmsr.data.formats import read_examples
from mmsr.episode import Hit
from mmsr.net.completions import picture_part
from mmsr.search.cache import Cached
from mmsr.search.store import sha256
from mmsr.system.errors import UserError
from mmsr.system.files import write_whole
from mmsr.system.images import decode, jpeg, without_metadata
from mmsr.tools import ToolFailure

PROMPTS = Path(__file__).parents[1] / "prompts" / "construct"
FOUND = 20  # pictures of a search that are used, at most
MAX_ASPECT = 3.0  # longer side of a picture by its shorter side, at most
PAGE_CHARACTERS = 6000
ANSWER_WORDS = 6
ALIASES = 8
ASKING = ("who", "what", "when", "where", "which", "whose", "whom", "how")
REFUSAL = re.compile(r"\W*(i'?m |i am )?(sorry|i can'?t|i cannot|unable|as an ai)", re.IGNORECASE)

T = TypeVar("T")


class Shelf:
    """The folder of picture files, each named by its digest. Data sets are shared, so metadata is removed."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, data: bytes) -> str:
        with suppress(ValueError):  # a file that is not a picture is refused later, with its reason
            data = without_metadata(data)
        name = sha256(data)[:32]
        if not (self.folder / name).exists():
            write_whole(self.folder / name, [data])
        return name

    def read(self, name: str) -> bytes:
        data = (self.folder / name).read_bytes()
        if sha256(data)[:32] != name:
            raise UserError(f"{self.folder / name}: not the picture that was found; put it back or begin another --out")
        return data


def parsed_answer(answer: str) -> dict:
    """The JSON object in an answer, without the text around it. Raises ValueError with a short reason."""
    start = answer.find("{")
    end = answer.rfind("}")
    try:
        found = json.loads(answer[start : end + 1])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("refused" if REFUSAL.match(answer) else "no JSON object")
    return found


def flag(name: str, answer: dict) -> bool:
    """The field `name` of an answer. Raises ValueError where it is not true or false."""
    if not isinstance(answer.get(name), bool):
        raise ValueError(f"{name} is not true or false")
    return answer[name]


def checked_question(concept: str, page: str, answer: dict) -> dict:
    """A question in the form that `question.txt` asks for. Raises ValueError with the rule that it breaks."""
    question = answer.get("question")
    gold = answer.get("answer")
    evidence = answer.get("evidence")
    aliases = answer.get("aliases", [])
    texts = [question, gold, evidence]
    if not isinstance(aliases, list) or not all(isinstance(text, str) for text in texts + aliases):
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
    return {
        "question": " ".join(question.split()),
        "answer": gold.strip(),
        "evidence": " ".join(evidence.split()),
        "aliases": list(reversed(others.values()))[:ALIASES],
    }


class Stages:
    """The work of each stage on one item; see `Factory.stage`."""

    def __init__(self, calls: Calls, finder: Any, backend: Cached, shelf: Shelf, min_side: int, per_concept: int):
        self.calls = calls
        self.finder = finder
        self.backend = backend
        self.shelf = shelf
        self.min_side = min_side
        self.per_concept = per_concept
        self.prompts = {path.stem: path.read_text(encoding="utf-8") for path in PROMPTS.glob("*.txt")}
        self.groups = self.prompts["groups"].split("\n")[:-1]

    def ask(
        self,
        prompt: str,
        fields: dict[str, str],
        check: Callable[[dict], T],
        reasons: Counter,
        picture: bytes | None = None,
    ) -> T:
        """What `check` makes of the answer. Where `check` refuses it, the model is told why and asked once more.

        Raises LeftOut with the second complaint.
        """
        text = re.sub(r"\{(\w+)\}", lambda place: fields[place[1]], self.prompts[prompt])
        shown = [picture_part(jpeg(decode(picture), 1024, 2**20))] if picture else []
        messages: list[dict] = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
        complaints = []
        for _ in range(2):
            answer = self.calls.complete(messages, 500)
            try:
                found = check(parsed_answer(answer))
            except ValueError as error:
                complaints.append(str(error))
                again = self.prompts["repair"].replace("{complaint}", str(error))
                messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": again}]
                continue
            reasons.update(f"{prompt}, mended: {complaint}" for complaint in complaints)
            return found
        raise LeftOut(f"{prompt}: {complaints[-1]}")

    def concept(self, item: dict, reasons: Counter) -> list[dict]:
        if not self.ask("visual", {"concept": item["concept"]}, partial(flag, "visual"), reasons):
            raise LeftOut("not visual")
        return [item]

    def search(self, item: dict, reasons: Counter) -> list[dict]:
        """The paid search for pictures. It is a stage by itself, so that its results are saved before they are used."""
        found = []
        for picture in self.finder.pictures(item["concept"])[:FOUND]:
            name = self.shelf.keep(picture.image) if picture.image else ""
            found.append(picture._asdict() | {"image": name})
        if not found:
            raise LeftOut("nothing found")
        return [item | {"found": found}]

    def pictures(self, item: dict, reasons: Counter) -> list[dict]:
        """The first `per_concept` usable pictures, each with a page about it."""
        about = {key: item[key] for key in ("concept", "count", "section")}
        kept = []
        missing = []
        for found in item["found"]:
            try:
                data = self._data(found)
            except ToolFailure as refused:
                missing.append(refused)
                continue
            others = [record["hash"] for record in kept]
            try:
                shown = self._fit(item["concept"], found, data, others, reasons)
                kept.append({"id": f"{item['id']}-{shown['picture'][:8]}", **about, **shown})
            except LeftOut as why:
                reasons[str(why)] += 1
            if len(kept) == self.per_concept:
                break
        if len(missing) == len(item["found"]) and missing[-1].kind in ("network", "timeout"):
            raise missing[-1]  # probably our own network: to be tried again
        reasons["picture not to be had"] += len(missing)
        return kept

    def _fit(self, concept: str, found: dict, data: bytes, others: list[str], reasons: Counter) -> dict:
        """The record of a picture. Raises LeftOut where it is not usable."""
        try:
            picture = decode(data)
        except ValueError:
            raise LeftOut("not a readable picture") from None
        short, long = sorted(picture.size)
        if short < self.min_side:
            raise LeftOut("too small")
        if long > MAX_ASPECT * short:
            raise LeftOut("too elongated")
        code = difference_hash(picture)
        if any(later == len(others) for _, later in near_duplicates([*others, code])):
            raise LeftOut("much like another of its concept")
        page = self._page(concept, found)
        if not says(found["title"], concept):
            fields = {"concept": concept, "title": found["title"]}
            if not self.ask("relevant", fields, partial(flag, "shows"), reasons, data):
                raise LeftOut("shows something else")
        source = {key: found[key] for key in ("title", "address", "licence")}
        size = {"width": picture.width, "height": picture.height}
        return {"picture": self.shelf.keep(data), "hash": code, **size, **source, "page": page}

    def _data(self, found: dict) -> bytes:
        if found["image"]:
            return self.shelf.read(found["image"])
        return self.calls.server.client.fetch_public(found["address"]).body

    def _page(self, concept: str, found: dict) -> dict:
        """The picture's own page if its text is known, otherwise the first page of a search that names the concept."""
        if found["text"]:
            pages = [Hit(found["title"], found["url"], found["text"])]
        else:
            pages = sorted(self.backend.text_search(concept).hits, key=lambda hit: hit.url != found["url"])
        for hit in pages:
            if hit.text and says(f"{hit.title} {hit.text}", concept):
                text = hit.text[:PAGE_CHARACTERS]
                checksum = sha256(text.encode("utf-8", "replace"))
                return {"url": hit.url, "title": hit.title, "text": text, "sha256": checksum}
        raise LeftOut("no page about the concept")

    def question(self, item: dict, reasons: Counter) -> list[dict]:
        page = item["page"]
        fields = {"concept": item["concept"], "page": page["text"]}
        check = partial(checked_question, item["concept"], page["text"])
        written = self.ask("question", fields, check, reasons, self.shelf.read(item["picture"]))
        page = {key: page[key] for key in ("url", "title", "sha256")}
        return [{**item, "page": page, **written}]

    def group(self, item: dict, reasons: Counter) -> list[dict]:
        def check(answer: dict) -> str:
            if answer.get("group") not in self.groups:
                raise ValueError("not one of the groups")
            return answer["group"]

        fields = {key: item[key] for key in ("question", "answer", "concept")} | {"groups": "\n".join(self.groups)}
        return [item | {"group": self.ask("group", fields, check, reasons)}]

    def record(self, item: dict, reasons: Counter) -> list[dict]:
        """An image search for a question's picture, so that training can replay it."""
        if not self.backend.image_search(self.shelf.read(item["picture"]), item["question"]).hits:
            raise LeftOut("nothing found")
        return []


def external(files: Sequence[str], shelf: Shelf) -> Iterator[dict]:
    """Questions from other files, in any format that formats.py reads."""
    unknown = {"concept": "", "count": None, "section": "external", "title": "", "address": "", "licence": ""}
    for file in files:
        for row, example in enumerate(read_examples(file)):
            try:
                code = difference_hash(decode(example.image))
            except ValueError as error:
                raise UserError(f"{file}: row {row}: {error}; mend or remove this row") from None
            name = short_id(Path(file).name, str(row), example.id)
            yield {
                "id": f"external-{name}",
                "source": Path(file).name,
                **unknown,
                "picture": shelf.keep(example.image),
                "hash": code,
                "page": {"url": "", "title": "", "sha256": ""},
                "question": example.question,
                "answer": example.answers[0],
                "aliases": list(example.answers[1:]),
                "evidence": "",
            }
