"""Opens the search engine that `--search` names, for every program.

Results that would cost money or time again (live, remote, local) are recorded in one file and answered from there. The
modules of a back-end are imported when it is opened, so that a search of a local index does not wait for torch.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Iterable, Iterator, Mapping

from mmsr.config import Options
from mmsr.episode import Example, Observation
from mmsr.search.cache import Cached, Replayed, import_jsonl, import_results, import_transcripts, merge
from mmsr.search.contents import counted
from mmsr.search.pages import has_own_pages, page_reader
from mmsr.search.store import Budget, Store
from mmsr.system.errors import UserError
from mmsr.system.files import cache_folder
from mmsr.tools import Backend, NoSearch, ToolFailure

KNOWN = "toy, local:FILE, live, replay:FILE, replay:fvqa, remote:URL or none, or image=A,text=B with two of them"
PATIENCE = 360.0  # seconds that a search waits for the same search of another process: more than `web.LONGEST`


@dataclass
class SearchEngine:
    """An opened search engine, and its budget where its searches cost money."""

    backend: Backend
    spending: Budget | None = None


@dataclass
class PerTool:
    """Two search engines as one: each answers one of the searches."""

    image: Backend
    text: Backend

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        return self.image.image_search(image, question, image_url)

    def text_search(self, query: str) -> Observation:
        return self.text.text_search(query)

    def read_page(self, address: str) -> Observation:
        """From the side that knows the page. One with pages of its own is asked before one that reads the web."""
        failures = []
        for side in sorted((self.text, self.image), key=has_own_pages, reverse=True):
            try:
                page = page_reader(side)(address)
                if page.hits:
                    return page
            except ToolFailure as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return page


def open_backend(
    options: Options,
    examples: Iterable[Example] = (),
    ledger: Path | None = None,
    quiet: bool = False,
    toy_web: Backend | None = None,
    names: Mapping[str, str] | None = None,
) -> SearchEngine:
    """The search engine that `options.search` names. `ledger` is the file that counts the run's paid calls. Some
    recordings know image searches only by a question's id; `examples` give the pictures. Whether the first example has
    an address decides which keys a live search needs. `toy_web`: that of the run's toy world. `names`: of the back-ends
    for "image" and "text", in place of those that the option names. Raises UserError."""
    names = names or options.back_ends
    pictures = options.max_images > 0
    image = open_one(names["image"], options, examples, pictures, ledger, quiet, toy_web)
    if names["text"] == names["image"]:
        return image
    text = open_one(names["text"], options, (), False, ledger, quiet, toy_web)
    return SearchEngine(PerTool(image.backend, text.backend), image.spending or text.spending)


def open_one(
    name: str,
    options: Options,
    examples: Iterable[Example] = (),
    pictures: bool = False,
    ledger: Path | None = None,
    quiet: bool = False,
    toy_web: Backend | None = None,
) -> SearchEngine:
    """The back-end `name`, as `open_backend` opens those of `options.search`. `pictures`: it will search for some."""
    kind, colon, where = name.partition(":")
    if kind in ("none", "toy", "live") and colon or kind in ("local", "replay", "remote") and not where:
        raise UserError(f"--search {name}: not complete; give {KNOWN}")
    if kind == "none":
        return SearchEngine(NoSearch())
    if kind == "toy":
        return SearchEngine(toy_web or _toy())
    if kind == "replay":
        return SearchEngine(_replay(options, where, examples, quiet))
    if kind == "local":
        return SearchEngine(_local(options, where))
    if kind == "remote":
        from mmsr.search.web import Remote

        remote = Remote(where, results=options.results)
        form = f"remote:{where}/{options.results}"
        thumbnails = options.image_results == "thumbnails"
        return SearchEngine(_recorded(remote, options, form, by_question=True, imported=thumbnails))
    if kind == "live":
        addressed = any(example.image_url for example in islice(examples, 1))
        return _live(options, ledger, uploads=pictures and not addressed)
    raise UserError(f"--search {name}: unknown back-end; give {KNOWN}")


def _toy() -> Backend:
    from mmsr.toy.world import FULL, World

    world = World(0, FULL)
    _ = world.train  # draws the pictures: the toy web knows only pictures that have been drawn
    return world.web


def _local(options: Options, file: str) -> Backend:
    from mmsr.search.corpus import Corpus, is_corpus
    from mmsr.search.index import Local

    local = (Corpus if is_corpus(file) else Local)(file, options.results)
    made = os.stat(file).st_mtime_ns  # after an addition to the index, old recordings are no longer right
    return _recorded(local, options, f"local:{os.path.abspath(file)}/{made}/{options.results}")


def _live(options: Options, ledger: Path | None, uploads: bool) -> SearchEngine:
    from mmsr.search.web import Live

    if not options.budget:
        raise UserError("--search live: every search costs money; give --budget N, the paid calls that it may make")
    spending = Budget(ledger, "run", options.budget, options.step_budget)
    live = Live.from_environment(options.image_results, options.results, spending.spend, uploads)
    form = f"live/{options.image_results}/{options.results}"
    summary = options.image_results == "summary"
    return SearchEngine(_recorded(live, options, form, by_question=summary, imported=not summary), spending)


def _recorded(
    backend: Backend, options: Options, form: str, by_question: bool = False, imported: bool = True
) -> Backend:
    """`imported`: image results that were imported into the file are used, too."""
    path = Path(options.search_cache or cache_folder() / "search.sqlite")
    path.parent.mkdir(parents=True, exist_ok=True)
    return Cached(backend, Store(path), form, by_question, PATIENCE, imported, options.results)


def _replay(options: Options, file: str, examples: Iterable[Example], quiet: bool) -> Backend:
    if file == "fvqa":
        how = "python search.py cache import FILE.pkl --data FILE.parquet --out FILE"
        raise UserError(f"--search replay:fvqa knows a data set's pictures only; to search by hand: {how}")
    if not file.endswith((".jsonl", ".json", ".pkl")):
        return Replayed(Store(file, readonly=True), options.on_miss, options.results)
    store = Store(None)
    found = import_searches(store, file, examples)
    if not quiet:
        print(f"{file}: {found}", file=sys.stderr)
    return Replayed(store, options.on_miss, options.results)


def import_searches(store: Store, file: str | Path, examples: Iterable[Example], pictures: str | Path = "") -> str:
    """Record the searches in a file; returns a sentence about what it contained. Raises UserError.

    .pkl              FVQA's published image searches          joined by id to the pictures of `examples`
    .json, .jsonl     those of others (`image_caches.py`)      the same; thumbnails from `pictures`, a folder with
                                                               all below it or an archive (empty: the file's folder)
    .jsonl            recorded conversations                   the same
    .jsonl            exported searches
    any other         another file of recorded searches
    """
    from mmsr.data.image_caches import image_cache, is_image_cache

    path = Path(file)
    if path.suffix == ".pkl":
        from mmsr.data import fvqa

        return _import_published(store, path, fvqa.search_results(path), examples, "addresses are not followed")
    if path.suffix == ".json" or (path.suffix == ".jsonl" and is_image_cache(path)):
        source = Path(pictures or path.parent)
        return _import_published(store, path, image_cache(path, source), examples, f"there is none in {source}")
    if path.suffix != ".jsonl":
        new = merge(store, file)
    elif _exported(file):
        new = import_jsonl(store, file)
    else:
        new = import_transcripts(store, file, examples)
    return counted(new, "new search", "new searches")


def _import_published(
    store: Store, path: Path, results: Mapping[str, Observation], examples: Iterable[Example], why: str
) -> str:
    """Record published results for the pictures of the questions with their ids. `why` a hit may lack its thumbnail."""
    ids = []

    def noted() -> Iterator[Example]:
        for example in examples:
            ids.append(example.id)
            yield example

    if not results:
        raise UserError(f"{path}: has no searches; give another file")
    new = import_results(store, results, noted())
    if not ids:
        how = "python search.py cache import FILE --data FILE.parquet --out searches.sqlite"
        raise UserError(f"published image searches are known by the ids of questions, and none was given: {how}")
    about = len(results.keys() & set(ids))
    if not about:
        others = f"about others (as {next(iter(results))!r:.60}) than the data (as {ids[0]!r:.60})"
        raise UserError(f"{path}: is {others}; name other data, or the column of their ids: --columns id=…")
    hits = [hit for result in results.values() for hit in result.hits]
    without = sum(hit.image is None for hit in hits)
    found = f"image searches of {len(results)} questions, {about} of them in the data, {new} new here"
    return f"{found}; {without} of their {len(hits)} hits have no thumbnail ({why})"


def _exported(file: str | Path) -> bool:
    """Whether the first line is an exported search. False for a damaged line, which the reader then reports."""
    try:
        with open(file, "rb") as lines:
            return "tool" in json.loads(lines.readline())
    except (OSError, ValueError, TypeError, RecursionError):
        return False
