"""`--search BACKEND` to a search engine, for every entry point.

Whatever can be asked again for money or time (live, remote, local) is recorded in one file and answered from there.
What a back-end needs is imported when it is opened: a search of a local index must not wait for torch.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Iterable

from mmsr.config import Options
from mmsr.episode import Example
from mmsr.search.cache import Cached, Replayed, import_jsonl, import_results, import_transcripts, merge
from mmsr.search.store import Budget, Store
from mmsr.system.errors import UserError
from mmsr.system.files import cache_folder
from mmsr.tools import Backend, NoSearch

KNOWN = "toy, local:FILE, live, replay:FILE, replay:fvqa, remote:URL or none"

PATIENCE = 360.0  # seconds that a search waits for the same one under way: more than `web.LONGEST`


@dataclass
class Search:
    """An opened search engine, and what it may spend where it can spend anything."""

    backend: Backend
    spending: Budget | None = None


def open_backend(
    options: Options, examples: Iterable[Example] = (), ledger: Path | None = None, quiet: bool = False
) -> Search:
    """The search engine that `options.search` names. `ledger`: the file of the run's spending.

    `examples` give the pictures to recordings that know image searches by a question's id only; the first one tells
    whether pictures have addresses. Raises UserError.
    """
    kind, colon, where = options.search.partition(":")
    if kind in ("none", "toy", "live") and colon or kind in ("local", "replay", "remote") and not where:
        raise UserError(f"--search {options.search}: not complete; give {KNOWN}")
    if kind == "none":
        return Search(NoSearch())
    if kind == "toy":
        return Search(_toy())
    if kind == "replay":
        return Search(_replay(options, where, examples, quiet))
    if kind == "local":
        return Search(_local(options, where))
    if kind == "remote":
        from mmsr.search.web import Remote

        remote = Remote(where, results=options.results)
        return Search(_recorded(remote, options, f"remote:{where}/{options.results}", by_question=True))
    if kind == "live":
        return _live(options, ledger, addressed=any(example.image_url for example in islice(examples, 1)))
    raise UserError(f"--search {options.search}: unknown back-end; give {KNOWN}")


def _toy() -> Backend:
    from mmsr.toy.world import FULL, World

    world = World(0, FULL)
    _ = world.train  # the toy web knows a picture once it has been drawn
    return world.web


def _local(options: Options, file: str) -> Backend:
    from mmsr.search.index import Local

    local = Local(file, options.results)
    made = os.stat(file).st_mtime_ns  # an index that has grown answers otherwise
    return _recorded(local, options, f"local:{os.path.abspath(file)}/{made}/{options.results}")


def _live(options: Options, ledger: Path | None, addressed: bool) -> Search:
    from mmsr.search.web import Live

    if not options.budget:
        raise UserError("--search live: every search costs money; give --budget N, the paid calls that it may make")
    spending, form = Budget(ledger, "run", options.budget, options.step_budget), options.image_results
    pictures = options.max_images > 0 and not addressed
    live = Live.from_environment(form, options.results, spending.spend, pictures)
    form, summary = f"live/{form}/{options.results}", form == "summary"
    return Search(_recorded(live, options, form, by_question=summary, imported=not summary), spending)


def _recorded(
    backend: Backend, options: Options, form: str, by_question: bool = False, imported: bool = False
) -> Backend:
    path = Path(options.search_cache or cache_folder() / "search.sqlite")
    path.parent.mkdir(parents=True, exist_ok=True)
    return Cached(backend, Store(path), form, by_question, PATIENCE, imported)


def _replay(options: Options, file: str, examples: Iterable[Example], quiet: bool) -> Backend:
    if file == "fvqa":
        how = "python search.py cache import FILE.pkl --data FILE.parquet --out FILE"
        raise UserError(f"--search replay:fvqa knows a data set's pictures only; to search by hand: {how}")
    if not file.endswith((".jsonl", ".pkl")):
        return Replayed(Store(file, readonly=True), options.on_miss)
    store = Store(None)
    found = import_searches(store, file, examples)
    if not quiet:
        print(f"{file}: {found}", file=sys.stderr)
    return Replayed(store, options.on_miss)


def import_searches(store: Store, file: str | Path, examples: Iterable[Example]) -> str:
    """Record the searches of any file that has some, and say what was in it. Raises UserError.

    A .pkl is FVQA's published image-search results, a .jsonl recorded conversations or exported searches, and anything
    else another store. Conversations and published results are joined by id to the pictures of `examples`.
    """
    if str(file).endswith(".pkl"):
        from mmsr.data import fvqa as hub

        results = hub.search_results(file)
        hits = [hit for seen in results.values() for hit in seen.hits]
        new = import_results(store, results, examples)
        bare = sum(hit.image is None for hit in hits)
        thumbnails = f"{bare} of their {len(hits)} hits have no thumbnail (addresses are not followed)"
        return f"image searches of {len(results)} questions, {new} of them new here; {thumbnails}"
    if not str(file).endswith(".jsonl"):
        new = merge(store, file)
    elif _exported(file):
        new = import_jsonl(store, file)
    else:
        new = import_transcripts(store, file, examples)
    return f"{new} new searches"


def _exported(file: str | Path) -> bool:
    """Whether the first line is an exported search. What is no line at all is left to the reader to refuse."""
    try:
        with open(file, "rb") as lines:
            return "tool" in json.loads(lines.readline())
    except (OSError, ValueError, TypeError, RecursionError):
        return False
