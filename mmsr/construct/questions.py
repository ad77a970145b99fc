"""The stages of data construction that ask: a vision model behind a chat server, a search engine, strangers' servers.

Each is a method that gets one item and gives records (see `Factory.stage`). What a model writes is held to the rules of
its prompt; where it breaks one, it is told which and asked once more. The prompts are text files.
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
FOUND, MAX_ASPECT = 20, 3.0  # pictures of a search that are looked at, at most; of each
PAGE_CHARACTERS, ANSWER_WORDS, ALIASES = 6000, 6, 8
ASKING = ("who", "what", "when", "where", "which", "whose", "whom", "how")
REFUSAL = re.compile(r"\W*(i'?m |i am )?(sorry|i can'?t|i cannot|unable|as an ai)", re.IGNORECASE)

T = TypeVar("T")


class Shelf:
    """The folder of picture files, each under its digest. A data set is shared, so they are kept without metadata."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, data: bytes) -> str:
        with suppress(ValueError):  # what is no picture is refused later, with its reason
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


def object_in(answer: str) -> dict:
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
    ) -> T:  # fmt: skip
        """The answer that `check` lets pass. After one that it does not, the model is told why and asked once more.

        Raises LeftOut with what was wrong then.
        """
        text = re.sub(r"\{(\w+)\}", lambda place: fields[place[1]], self.prompts[prompt])
        shown = [picture_part(jpeg(decode(picture), 1024, 2**20))] if picture else []
        messages: list[dict] = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
        complaints = []
        for _ in range(2):
            answer = self.calls.complete(messages, 500)
            try:
                found = check(object_in(answer))
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
        """The paid search for pictures, by itself: what it found is recorded before anything else is done."""
        found = []
        for picture in self.finder.pictures(item["concept"])[:FOUND]:
            name = self.shelf.keep(picture.image) if picture.image else ""
            found.append(picture._asdict() | {"image": name})
        if not found:
            raise LeftOut("nothing found")
        return [item | {"found": found}]

    def pictures(self, item: dict, reasons: Counter) -> list[dict]:
        """The first `per_concept` pictures that are fit, each with a page about it."""
        about, kept, missing = {key: item[key] for key in ("concept", "count", "section")}, [], []
        for found in item["found"]:
            try:
                data = self._data(found)
            except ToolFailure as refused:
                missing.append(refused)
                continue
            try:
                shown = self._fit(item["concept"], found, data, [one["hash"] for one in kept], reasons)
                kept.append({"id": f"{item['id']}-{shown['picture'][:8]}", **about, **shown})
            except LeftOut as why:
                reasons[str(why)] += 1
            if len(kept) == self.per_concept:
                break
        if len(missing) == len(item["found"]) and missing[-1].kind in ("network", "timeout"):
            raise missing[-1]  # it is rather us: to be tried again
        reasons["picture not to be had"] += len(missing)
        return kept

    def _fit(self, concept: str, found: dict, data: bytes, others: list[str], reasons: Counter) -> dict:
        """What is kept of a picture. Raises LeftOut."""
        try:
            picture = decode(data)
        except ValueError:
            raise LeftOut("not a readable picture") from None
        (short, long), code = sorted(picture.size), difference_hash(picture)
        if short < self.min_side or long > MAX_ASPECT * short:
            raise LeftOut("too small" if short < self.min_side else "too elongated")
        if any(True for _, later in near_duplicates([*others, code]) if later == len(others)):
            raise LeftOut("much like another of its concept")
        page, fields = self._page(concept, found), {"concept": concept, "title": found["title"]}
        if not (says(found["title"], concept) or self.ask("relevant", fields, partial(flag, "shows"), reasons, data)):
            raise LeftOut("shows something else")
        size = dict(zip(("width", "height"), picture.size))
        source = {key: found[key] for key in ("title", "address", "licence")}
        return {"picture": self.shelf.keep(data), "hash": code, **size, **source, "page": page}

    def _data(self, found: dict) -> bytes:
        if found["image"]:
            return self.shelf.read(found["image"])
        return self.calls.server.client.fetch_public(found["address"]).body

    def _page(self, concept: str, found: dict) -> dict:
        """The picture's own page, where its text is known, or else the first found page that names the concept."""
        pages = [Hit(found["title"], found["url"], found["text"])] if found["text"] else []
        pages = pages or sorted(self.backend.text_search(concept).hits, key=lambda hit: hit.url != found["url"])
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
    """Questions that others wrote, in any format that formats.py reads."""
    unknown = {"concept": "", "count": None, "section": "external", "title": "", "address": "", "licence": ""}
    page = {"url": "", "title": "", "sha256": ""}
    for file in files:
        for row, example in enumerate(read_examples(file)):
            try:
                code = difference_hash(decode(example.image))
            except ValueError as error:
                raise UserError(f"{file}: row {row}: {error}; mend or remove this row") from None
            name = short_id(Path(file).name, str(row), example.id)
            gold, aliases = example.answers[0], example.answers[1:]
            asked = {"question": example.question, "answer": gold, "aliases": list(aliases), "evidence": ""}
            shown = {"picture": shelf.keep(example.image), "hash": code, "page": page}
            yield {"id": f"external-{name}", "source": Path(file).name, **unknown, **shown, **asked}
