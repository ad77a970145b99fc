"""What the model may call: the search engine, the tools over it, and the limits of a rollout."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from mmsr.config import FVQA_SEARCH, Config, Options
from mmsr.data import fvqa
from mmsr.data.recorded import RecordedTurn, recorded_turns
from mmsr.episode import Example
from mmsr.rollout import Limits, Script, Scripts
from mmsr.search import backends
from mmsr.search.corpus import is_corpus
from mmsr.search.store import Budget
from mmsr.setup.questions import Questions, fetch
from mmsr.system.errors import UserError
from mmsr.system.parallel import Ranks
from mmsr.tools import Tool, more_tools, search_tools
from mmsr.toy import world as toy
from mmsr.vision import Processor


@dataclass
class Search:
    """What the model may call."""

    tools: list[Tool]
    spending: Budget | None  # where searches cost money
    scripts: Scripts | None  # the recorded model turns that --force-searches plays


def check_search(config: Options) -> None:
    """Raises UserError for what the name of --search shows to be wrong: another back-end, no key, no such file."""
    for name in dict.fromkeys(config.back_ends.values()):
        _check_back_end(name, config)
    image = config.back_ends["image"]
    if config.max_images and image.startswith("local:") and is_corpus(image.removeprefix("local:")):
        what = "holds passages and no pictures, so image searches would find nothing"
        raise UserError(f"--search {image}: {what}: give --search image=A,text={image}, or --max-images 0")


def _check_back_end(name: str, config: Options) -> None:
    kind, _, where = name.partition(":")
    if kind == "toy":
        if config.datasets != ("toy",):
            raise UserError("--search toy knows the toy world's pictures only: give another --search, or none")
    elif kind in ("local", "replay") and where:
        if name != FVQA_SEARCH and not Path(where).exists():
            how = "; python search.py index --out FILE … makes an index" if kind == "local" else ""
            raise UserError(f"--search {name}: no such file; check the path{how}")
    else:  # opens no file but that of the recorded searches; which keys a search by picture needs, the data decide
        backends.open_one(name, config)


def open_search(config: Options, world: toy.World | None, questions: Questions, ranks: Ranks) -> Search:
    """The search engine that --search names, and the tools of the run.

    `questions`: a recording may know a picture by a question's id alone. Raises UserError.
    """
    names = dict(config.back_ends)
    if FVQA_SEARCH in names.values():
        fetched = f"replay:{fetch(FVQA_SEARCH, fvqa.FVQA, fvqa.RESULTS, ranks)}"
        names = {tool: fetched if name == FVQA_SEARCH else name for tool, name in names.items()}
    scripts = None
    with ranks.sync_errors():
        if isinstance(config, Config) and config.force_searches:
            scripts = forced_searches(list(names.values()), config.group_size)
        if ranks.main and config.back_ends["text"] == FVQA_SEARCH and config.max_texts and config.on_miss != "error":
            _warn_of_text_searches()
        examples = chain.from_iterable(questions.by_option.values())
        ledger = Path(config.out) / "spent.sqlite"
        toy_web = world.web if world else None
        engine = backends.open_backend(config, examples, ledger, not ranks.main, toy_web, names)
    tools = search_tools(engine.backend, config.max_images, config.max_texts)
    tools += more_tools(config.tool_names, engine.backend)
    return Search(tools, engine.spending, scripts)


def _warn_of_text_searches() -> None:
    found = f"--search {FVQA_SEARCH} holds image searches only: every text search finds nothing"
    print(
        f"{found}; give --search image={FVQA_SEARCH},text=local:FILE (or text=live), or --max-texts 0", file=sys.stderr
    )


def forced_searches(names: Sequence[str], group_size: int) -> Scripts:
    """The turns that --force-searches plays, from the first recording of conversations among these back-ends.

    Raises UserError where there is none.
    """
    files = [name.removeprefix("replay:") for name in names if name.startswith("replay:")]
    file = next((file for file in files if file.endswith(".jsonl")), files[0])
    if not file.endswith(".jsonl"):
        raise UserError(f"--force-searches: {file} holds no conversations: give replay:FILE.jsonl with some")
    return partial(_recorded_script, recorded_turns(file), group_size)


def _recorded_script(
    recorded: Mapping[str, list[RecordedTurn]], group_size: int, example: Example, sample: int
) -> Script:
    """The recorded searches of an example, for the first half of its group. The other half is free."""
    if sample >= group_size // 2:
        return Script()
    return Script([turn.response for turn in recorded.get(example.id, ()) if turn.observation is not None])


def rollout_limits(config: Options, processor: Processor) -> Limits:
    """What every rollout of a run may use. `processor`: of the model's pictures."""
    return Limits(
        max_turns=config.max_turns,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        processor=processor,
        tool_seconds=config.tool_timeout,
        stop_on_tool_error=config.on_tool_error == "drop",
    )
