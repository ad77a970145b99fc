"""Your own FactualVQA: from a list of concepts to questions about pictures, some of which need a search.

    python -m mmsr.construct --demo --out mine                     # a toy data set, off-line, with a scripted model
    python -m mmsr.construct --out mine --metadata metadata.json --counts entry_counts_400m.json \\
        --search live --budget 200000                              # OPENAI_API_KEY, SERPAPI_API_KEY

Concepts come from the head and the tail of MetaCLIP's metadata, pictures and pages from a search engine, questions from
a vision model behind any OpenAI-compatible server. Rollouts of a model show which questions need a search. Every stage
leaves a readable file, and the same command continues where the last one ended (see factory.py). Section 3 of the paper
describes the published pipeline; its prompts and thresholds are not public, so these are our own.
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

# ---- all stages


def build(o: Construction, finder: Any = None, environ: Mapping[str, str] = os.environ) -> None:
    """Run all stages, in a folder that is new or that this command made. Raises UserError."""
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
        budget = Budget(store, "construct", o.budget)
        client = Client()
        finder = finder or open_finder(o.search, budget.spend, client)
        metadata, counts = _concept_files(o, finder)
        drawn = draw_concepts(metadata, counts, o.concepts, o.familiar, o.unfamiliar, o.seed)
        server = ChatServer(service.url, o.vision_model, service.key, client, o.seconds, budget.spend, "openai")
        calls = Calls(server, Journal(folder / "work" / "calls.jsonl"))
        backend = Cached(finder, store)
        shelf = Shelf(folder / "pictures")
        stages = Stages(calls, finder, backend, shelf, o.min_side, o.per_concept)
        check_answers(calls)
        asked = ask_all(factory, stages, write_lines(folder / "drawn.jsonl", drawn), o)
        needed = decide(factory, asked, backend, shelf, o)
        splits = choose(list(needed), {"train": o.train, "test": o.test}, o.required, o.seed)
        for split, chosen in splits.items():
            write_parquet(folder / f"{split}.parquet", chosen, shelf)
        if o.record:
            factory.stage("recorded", splits["train"] + splits["test"], stages.record)
        cost = {"answers": len(calls.journal.offsets), "paid calls": budget.spent}
        write_card(folder, splits, factory.report, cost, shelf)
    for split, chosen in splits.items():
        print(f"{folder / split}.parquet: {len(chosen)} of {getattr(o, split)} questions")
    postponed = sum(sum(done["postponed"].values()) for done in factory.report.values())
    if postponed:
        print(f"{postponed} items failed for now (see {folder}/card.md): the same command tries them again")


def own_folder(out: str) -> Path:
    """The folder `out`. Raises UserError where it holds anything that this command did not make."""
    folder = Path(out)
    if not folder.exists():
        return folder
    if folder.is_dir() and ((folder / "work").is_dir() or not any(folder.iterdir())):
        return folder
    raise UserError(f"--out {folder}: not empty, and not a folder of this command; name another")


def check_answers(calls: Calls) -> None:
    """Ask the model one question. Raises UserError where it does not answer, before hundreds of calls fail."""
    try:
        calls.complete([{"role": "user", "content": "Answer with the word ready."}], 10)
    except ToolFailure as refused:
        raise UserError(f"{calls.server.model} at {calls.server.url} does not answer: {refused}") from None


def ask_all(factory: Factory, stages: Stages, drawn: Lines, o: Construction) -> Lines:
    """From concepts to questions, each with its group."""
    model = [o.vision_model, sorted(stages.prompts.items())]
    visual = factory.stage("concepts", drawn, stages.concept, model)
    found = factory.stage("found", visual, stages.search, [o.search, getattr(stages.finder, "version", "")])
    pictures = factory.stage("pictures", found, stages.pictures, [model, o.min_side, o.per_concept])
    single = write_lines(factory.folder / "distinct.jsonl", distinct(pictures))
    questions = factory.stage("questions", single, stages.question, model)
    others = external(o.questions, stages.shelf)
    joined = write_lines(factory.folder / "work" / "joined.jsonl", chain(questions, others))
    return factory.stage("groups", joined, stages.group, model)


def decide(factory: Factory, questions: Lines, backend: Any, shelf: Shelf, o: Construction) -> Iterable[dict]:
    """Find out what each question needs. `pool.parquet` holds the questions that the model is asked."""
    if not o.rollouts:
        return write_lines(factory.folder / "needs.jsonl", map(guessed_need, questions))
    pool = factory.folder / "pool.parquet"
    write_parquet(pool, questions, shelf)
    rollouts = Rollouts(pool, backend, o)
    settings = [o.model, str(rollouts.setup.folder), o.recipe, o.tries, o.seed]
    chunked = write_lines(factory.folder / "work" / "chunked.jsonl", chunks(questions))
    return factory.stage("needs", chunked, rollouts, settings, workers=1)


def _concept_files(o: Construction, finder: Any) -> tuple[Any, Any]:
    """The contents of --metadata, or a corpus's titles; and the contents of --counts, or None."""
    titles = getattr(finder, "titles", None)
    if not o.metadata and titles is None:
        raise UserError("--metadata is missing: give MetaCLIP's metadata.json, or --search corpus:FILE.jsonl")
    metadata = json_file(Path(o.metadata)) if o.metadata else titles
    counts = json_file(Path(o.counts)) if o.counts else None
    return metadata, counts


# ---- search need


def need_of(tries: dict[str, int]) -> str:
    """What a question needs, by which rollouts answered it: free, image, text or both; "" where no rollout did."""
    if tries["right_direct"] or tries["right_none"]:
        return "free"
    if tries["right_image"] or tries["right_text"]:
        return "image" if tries["right_image"] >= tries["right_text"] else "text"
    return "both" if tries["right_both"] else ""


class Rollouts:
    """k rollouts of a model with tools and k without, for each question of a chunk."""

    def __init__(self, pool: Path, backend: Any, options: Construction):
        from mmsr.assemble import Setup
        from mmsr.setup.policy import open_policy
        from mmsr.setup.questions import open_questions, open_world
        from mmsr.setup.search import Search
        from mmsr.system.parallel import SINGLE

        model = ["--model", options.model] if options.model else []
        recipe = ["--recipe", options.recipe] if options.recipe else []
        recipe += ["--toy", "basic"] if options.recipe == "toy" else []  # the demo's world
        given = [*model, *recipe, "--data", str(pool), "--search", "none", "--seed", str(options.seed)]
        config = parse(given, program="mmsr.construct")
        world = open_world(config)
        questions = open_questions(config, world, SINGLE)
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
                    way = "direct" if direct else _searched(episode)
                    found[episode.group_id][way] += 1
        records = []
        for question, right in zip(item["questions"], found):
            ways = ("direct", "none", "image", "text", "both")
            tries = {"tries": self.tries, **{f"right_{way}": right[way] for way in ways}}
            need = need_of(tries)
            reasons["never answered"] += not need
            if need:
                records.append(question | {"tries": tries, "need": need})
        return records


def _refuse_failures(episodes: Sequence[Any]) -> None:
    """Raises ToolFailure where a search failed, because then it is not known what the model could have found."""
    for episode in episodes:
        for turn in episode.turns:
            seen = turn.observation
            if turn.role == "tool" and not seen.ok and seen.source != "limit":
                kind, _, message = seen.error.partition(": ")
                raise ToolFailure(kind, message)


def _searched(episode: Any) -> str:
    """Which searches an episode made: none, image, text or both."""
    image = episode.searches(IMAGE_SEARCH) > 0
    text = episode.searches(TEXT_SEARCH) > 0
    if image and text:
        return "both"
    if image:
        return "image"
    return "text" if text else "none"


def chunks(questions: Iterable[dict]) -> Iterator[dict]:
    """Items of up to 32 questions, each with the number of its first question."""
    questions = iter(questions)
    first = 0
    while chunk := list(islice(questions, 32)):
        yield {"id": f"{first:07d}", "first": first, "questions": chunk}
        first += len(chunk)


def guessed_need(question: dict) -> dict:
    """The need of a question without rollouts: familiar concepts need no search."""
    need = "free" if question["section"] == FAMILIAR else "unknown"
    return question | {"tries": None, "need": need}


# ---- the command


@dataclass
class Construction:
    """The options."""

    out: str = ""
    """Folder of the data set; the same command continues in it."""
    metadata: str = ""
    """MetaCLIP's metadata.json, a list of entries; without it, the titles of a corpus."""
    counts: str = ""
    """MetaCLIP's entry_counts_400m.json, entry to count."""
    search: str = "live"
    """Where pictures and pages come from: corpus:FILE.jsonl or live."""
    vision_model: str = os.environ.get("OPENAI_MODEL", "gpt-4o")
    """The model that judges and writes, by OPENAI_API_KEY; otherwise OPENAI_MODEL, or gpt-4o."""
    budget: int = 0
    """Paid calls at most, searches and answers together; required for paid services."""
    concepts: int = 1000
    """Concepts at the start, half of them familiar (1000)."""
    familiar: float = 0.95
    """Count from which an entry is familiar; up to 1 a quantile of all counts (0.95)."""
    unfamiliar: float = 0.5
    """Count up to which an entry is unfamiliar; up to 1 a quantile (0.5)."""
    per_concept: int = 1
    """Pictures of a concept at most (1)."""
    min_side: int = 224
    """Pixels along the shorter side of a picture at least (224)."""
    questions: tuple[str, ...] = ()
    """Files of other questions to add."""
    rollouts: bool = True
    """Find out by rollouts what needs a search; without them, familiar concepts count as known."""
    model: str = ""
    """The model of these rollouts, as for train.py."""
    recipe: str = ""
    """The recipe that limits them, as for train.py."""
    tries: int = 8
    """Rollouts of a question with tools, and the same number without (8)."""
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
    """Time limit for an answer, with all its retries (240)."""
    seed: int = 0
    """Seeds every choice."""
    demo: bool = False
    """A toy data set, off-line, by a scripted model; it has other defaults."""


DEMO = dict(
    search="toy",
    concepts=600,
    familiar=4000,
    unfamiliar=1000,
    per_concept=8,
    min_side=56,
    vision_model="scripted",
    train=400,
    test=100,
    required=0.5,
    recipe="toy",
    tries=4,
    workers=32,
    seconds=6.0,
    record=True,
)
LEAST = {"workers": 1, "concepts": 2, "per_concept": 1, "tries": 1, "train": 1, "test": 0, "budget": 0, "min_side": 0}


def options(argv: Sequence[str]) -> Construction:
    """The options of a command line. Exits with status 2 and one line where it is wrong."""
    parser = Parser("mmsr.construct", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [field.name for field in fields(Construction)]
    add_options(parser, Construction, names)  # type: ignore[arg-type]  # it uses only the fields
    given = vars(parser.parse_args(argv))
    defaults = DEMO if given.get("demo") else {}
    o = Construction(**(defaults | given))  # type: ignore[arg-type]
    for name, least in LEAST.items():
        if getattr(o, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(o, name)}: give at least {least}")
    if not o.out:
        parser.error("--out DIR is missing")
    if not 0 <= o.required <= 1:
        parser.error(f"--required {o.required}: give a share from 0 to 1")
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
        data = f"--data {o.out}/train.parquet --eval-data {o.out}/test.parquet"
        print(f"python train.py --toy basic --seed {o.seed} {data} --search replay:{o.out}/searches.sqlite")
        return 0
    except UserError as error:
        print(f"mmsr.construct: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
