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
import os
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

from mmsr.config import parse
from mmsr.construct.curate import FAMILIAR, choose, draw_concepts, write_card, write_parquet
from mmsr.construct.dedup import distinct
from mmsr.construct.factory import Calls, Factory, Lines, alone, write_lines
from mmsr.construct.questions import Shelf, Stages, external
from mmsr.construct.sources import open_finder
from mmsr.data.formats import read_examples
from mmsr.net.client import Client
from mmsr.net.completions import ChatServer
from mmsr.search.cache import Cached
from mmsr.search.store import Budget, Store
from mmsr.search.web import Service
from mmsr.system.errors import UserError
from mmsr.system.files import json_file
from mmsr.system.journal import Journal
from mmsr.system.options import Parser, add_options
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, ToolFailure, search_tools

# ---- the whole


def build(o: Construction, finder: Any = None, environ: Mapping[str, str] = os.environ) -> None:
    """All stages, in a folder that is new or one of this command's. Raises UserError."""
    folder = own_folder(o.out)
    service = Service.from_environment("openai", environ)
    if not service.key and not environ.get("OPENAI_BASE_URL"):
        raise UserError("OPENAI_API_KEY is not set; export it, or OPENAI_BASE_URL for a server of your own")
    if (service.key or o.search == "live") and not o.budget:
        raise UserError("paid services are to be used: give --budget N, the number of paid calls at most")
    if o.rollouts and not (o.model or o.demo):
        raise UserError("--model is missing: give one to try what needs a search, or --no-rollouts to go by counts")
    factory = Factory(folder, o.workers)
    with alone(folder), closing(Store(folder / "searches.sqlite")) as store:
        budget, client = Budget(store, "construct", o.budget), Client()
        finder = finder or open_finder(o.search, budget.spend, client)
        drawn = draw_concepts(*_concept_files(o, finder), o.concepts, o.familiar, o.unfamiliar, o.seed)
        server = ChatServer(service.url, o.vision_model, service.key, client, o.seconds, budget.spend, "openai")
        calls = Calls(server, Journal(folder / "work" / "calls.jsonl"))
        backend, shelf = Cached(finder, store), Shelf(folder / "pictures")
        stages = Stages(calls, finder, backend, shelf, o.min_side, o.per_concept)
        check_answers(calls)
        asked = ask_all(factory, stages, write_lines(folder / "drawn.jsonl", drawn), o)
        needed = decide(factory, asked, backend, shelf, o)
        splits = choose(list(needed), {"train": o.train, "test": o.test}, o.required, o.seed)
        for split, chosen in splits.items():
            write_parquet(folder / f"{split}.parquet", chosen, shelf)
        if o.record:
            factory.stage("recorded", splits["train"] + splits["test"], stages.record)
        cost = {"answers": len(calls.kept.offsets), "paid calls": budget.spent}
        write_card(folder, splits, factory.report, cost, shelf)
    for split, chosen in splits.items():
        print(f"{folder / split}.parquet: {len(chosen)} of {getattr(o, split)} questions")
    if left := sum(sum(done["postponed"].values()) for done in factory.report.values()):
        print(f"{left} items failed for now (see {folder}/card.md): the same command tries them again")


def own_folder(out: str) -> Path:
    """Raises UserError for a folder that holds something else."""
    folder = Path(out)
    if folder.exists() and not (folder.is_dir() and ((folder / "work").is_dir() or not any(folder.iterdir()))):
        raise UserError(f"--out {folder}: not empty, and not a folder of this command; name another")
    return folder


def check_answers(calls: Calls) -> None:
    """Raises UserError before hundreds of calls find out that the model does not answer."""
    try:
        calls.complete([{"role": "user", "content": "Answer with the word ready."}], 10)
    except ToolFailure as refused:
        raise UserError(f"{calls.server.model} at {calls.server.url} does not answer: {refused}") from None


def ask_all(factory: Factory, stages: Stages, drawn: Lines, o: Construction) -> Lines:
    """Concepts to sorted questions."""
    told = [o.vision_model, sorted(stages.prompts.items())]
    visual = factory.stage("concepts", drawn, stages.concept, told)
    found = factory.stage("found", visual, stages.search, [o.search, getattr(stages.finder, "version", "")])
    pictures = factory.stage("pictures", found, stages.pictures, [told, o.min_side, o.per_concept])
    single = write_lines(factory.folder / "distinct.jsonl", distinct(pictures))
    questions = factory.stage("questions", single, stages.question, told)
    others = external(o.questions, stages.shelf)
    joined = write_lines(factory.folder / "work" / "joined.jsonl", chain(questions, others))
    return factory.stage("groups", joined, stages.group, told)


def decide(factory: Factory, questions: Lines, backend: Any, shelf: Shelf, o: Construction) -> Iterable[dict]:
    """What each question needs. `pool.parquet` holds the questions that the model is asked."""
    if not o.rollouts:
        return write_lines(factory.folder / "needs.jsonl", map(guessed_need, questions))
    pool = factory.folder / "pool.parquet"
    write_parquet(pool, questions, shelf)
    rollouts = Rollouts(pool, backend, o)
    settings = [o.model, str(rollouts.setup.folder), o.recipe, o.tries, o.seed]
    chunked = write_lines(factory.folder / "work" / "chunked.jsonl", chunks(questions))
    return factory.stage("needs", chunked, rollouts, settings, workers=1)


def _concept_files(o: Construction, finder: Any) -> tuple[Any, Any]:
    """Contents of --metadata, or a corpus's titles, and of --counts, or None."""
    titles = getattr(finder, "titles", None)
    if not o.metadata and titles is None:
        raise UserError("--metadata is missing: give MetaCLIP's metadata.json, or --search corpus:FILE.jsonl")
    metadata = json_file(Path(o.metadata)) if o.metadata else titles
    return metadata, json_file(Path(o.counts)) if o.counts else None


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

    def __init__(self, pool: Path, backend: Any, options: Construction):
        from mmsr.assemble import Setup
        from mmsr.setup.policy import open_policy
        from mmsr.setup.questions import fetch_files, open_questions, open_world
        from mmsr.setup.search import Search
        from mmsr.system.parallel import SINGLE

        model = ["--model", options.model] if options.model else []
        recipe = ["--recipe", options.recipe] if options.recipe else []
        recipe += ["--toy", "basic"] if options.recipe == "toy" else []  # the demo's world
        given = [*model, *recipe, "--data", str(pool), "--search", "none", "--seed", str(options.seed)]
        config = parse(given, program="mmsr.construct")
        world = open_world(config)
        files = fetch_files([config.data, config.eval_data], SINGLE)
        questions = open_questions(config, files, world, SINGLE)
        tools = search_tools(backend, config.max_images, config.max_texts)
        search = Search(tools, spending=None, scripts=None)
        policy = open_policy(config, tools, questions, world, SINGLE)
        self.setup = Setup(config, SINGLE, world, questions, search, policy)
        self.questions = read_examples(pool)
        self.tries = options.tries
        self.seed = options.seed

    def __call__(self, item: dict, reasons: Counter) -> list[dict]:
        rows = range(item["first"], item["first"] + len(item["questions"]))
        examples = [self.questions[row] for row in rows]
        found = [Counter() for _ in examples]
        for direct in (False, True):
            seed = ("need", self.seed, item["id"], direct)
            episodes, _ = self.setup.roll_out(examples, self.tries, seed, 1.0, direct=direct)
            _refuse_failures(episodes)
            self.setup.score(episodes)
            for episode in episodes:
                if episode.reward_parts["accuracy"] >= 1:
                    found[episode.group_id]["right_direct" if direct else f"right_{_searched(episode)}"] += 1
        names = [f"right_{way}" for way in ("direct", "none", "image", "text", "both")]
        counted = [{"tries": self.tries} | {name: right[name] for name in names} for right in found]
        records = [q | {"tries": tries, "need": need_of(tries)} for q, tries in zip(item["questions"], counted)]
        reasons["never answered"] += sum(not record["need"] for record in records)
        return [record for record in records if record["need"]]


def _refuse_failures(episodes: Sequence[Any]) -> None:
    """Raises ToolFailure where a search failed: what a model could have found is then not known."""
    seen = (turn.observation for episode in episodes for turn in episode.turns if turn.role == "tool")
    for error in (one.error for one in seen if not one.ok and one.source != "limit"):
        kind, _, message = error.partition(": ")
        raise ToolFailure(kind, message)


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


# ---- the command


@dataclass
class Construction:
    """The options."""

    out: str = ""
    """Folder of the data set; the same command goes on in it."""
    metadata: str = ""
    """MetaCLIP's metadata.json, a list of entries; left out: the titles of a corpus."""
    counts: str = ""
    """MetaCLIP's entry_counts_400m.json, entry to count."""
    search: str = "live"
    """Where pictures and pages come from: corpus:FILE.jsonl or live."""
    vision_model: str = os.environ.get("OPENAI_MODEL", "gpt-4o")
    """The model that judges and writes, by OPENAI_API_KEY; otherwise OPENAI_MODEL, or gpt-4o."""
    budget: int = 0
    """Paid calls at most, searches and answers together; needed where any is paid."""
    concepts: int = 1000
    """Concepts to begin with, half of them familiar (1000)."""
    familiar: float = 0.95
    """Count from which an entry is familiar; up to 1 a quantile of all counts (0.95)."""
    unfamiliar: float = 0.5
    """Count up to which an entry is unfamiliar; up to 1 a quantile (0.5)."""
    per_concept: int = 1
    """Pictures of a concept at most (1)."""
    min_side: int = 224
    """Pixels along the shorter side of a picture at least (224)."""
    questions: tuple[str, ...] = ()
    """Files of questions of others that join."""
    rollouts: bool = True
    """Try what needs a search; without, what is familiar counts as known."""
    model: str = ""
    """Whose rollouts tell what needs a search, as for train.py."""
    recipe: str = ""
    """Whose limits the rollouts have, as for train.py."""
    tries: int = 8
    """Rollouts of a question with tools, and as many without (8)."""
    train: int = 5000
    """Training questions (5000)."""
    test: int = 1800
    """Test questions (1800)."""
    required: float = 0.68
    """Share of the questions that need a search (0.68)."""
    record: bool = False
    """Search every picture once, so that training can replay it."""
    workers: int = 256
    """Calls in flight (256)."""
    seconds: float = 240.0
    """For an answer, all tries together (240)."""
    seed: int = 0
    """Seeds every choice."""
    demo: bool = False
    """A toy data set, off-line, by a scripted model; its defaults are others."""


DEMO = dict(
    search="toy", concepts=600, familiar=4000, unfamiliar=1000, per_concept=8, min_side=56, vision_model="scripted",
    train=400, test=100, required=0.5, recipe="toy", tries=4, workers=32, seconds=6.0, record=True,
)  # fmt: skip
LEAST = {"workers": 1, "concepts": 2, "per_concept": 1, "tries": 1, "train": 1, "test": 0, "budget": 0, "min_side": 0}


def options(argv: Sequence[str]) -> Construction:
    """Exits with status 2 and one line where the command line is wrong."""
    parser = Parser("mmsr.construct", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [field.name for field in fields(Construction)]
    add_options(parser, Construction, names)  # type: ignore[arg-type]  # it asks for fields alone
    given = vars(parser.parse_args(argv))
    o = Construction(**((DEMO if given.get("demo") else {}) | given))  # type: ignore[arg-type]
    for name, least in LEAST.items():
        if getattr(o, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(o, name)}: give at least {least}")
    if not o.out or not 0 <= o.required <= 1:
        parser.error("--out DIR is missing" if not o.out else f"--required {o.required}: give a share from 0 to 1")
    return o


def main(argv: Sequence[str]) -> int:
    try:
        o = options(argv)
        if not o.demo:
            build(o)
            return 0
        from mmsr.construct.demo import ScriptedModel, ToyFinder, prepare
        from mmsr.toy.world import World

        own_folder(o.out)
        world = World(o.seed)
        with ScriptedModel() as model:
            o.metadata, o.counts = prepare(Path(o.out) / "work", world)
            build(o, ToyFinder(world), {"OPENAI_BASE_URL": model.url})
        files = f"--data {o.out}/train.parquet --eval-data {o.out}/test.parquet --search replay:{o.out}/searches.sqlite"
        print(f"python train.py --toy basic --seed {o.seed} {files}")
        return 0
    except UserError as error:
        print(f"mmsr.construct: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
