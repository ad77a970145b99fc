"""Search by hand, make an index of your own, or serve a search engine to training code.

python search.py index --images DIR --titles FILE.jsonl --pages FILE.jsonl --out my.index
python search.py index --corpus wiki-18.jsonl.gz --out wiki.index
python search.py image photo.jpg --search local:my.index
python search.py text "who designed it" --search local:my.index
python search.py serve --search local:my.index
python search.py cache searches.sqlite

Each command has its own help: python search.py index --help, python search.py cache drop --help
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Callable, Sequence

from mmsr.config import SEARCH_OPTIONS, Options
from mmsr.episode import Hit, Observation
from mmsr.search import contents
from mmsr.search.backends import KNOWN, import_searches, open_backend
from mmsr.search.cache import NOT_RECORDED
from mmsr.search.contents import Chosen, counted
from mmsr.search.store import Store, StoreWarning
from mmsr.system.errors import UserError
from mmsr.system.options import Parser, add_options, default_notes
from mmsr.system.progress import duration
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, VISIT, Call, Toolbox, search_tools


def index(args: argparse.Namespace) -> int:
    """search.py index: add pictures and pages to an index."""
    from mmsr.search.index import build

    if args.corpus:
        return _index_corpus(args)
    if bool(args.images) != bool(args.titles):
        raise UserError("--images and --titles go together: give the folder, and the file that names what lies in it")
    if not (args.titles or args.pages):
        what = "--images DIR with --titles FILE.jsonl, or --pages FILE.jsonl, or else --corpus FILE.jsonl"
        raise UserError(f"nothing to index: give {what}")
    encoder = f"{args.encoder} --adapter {args.adapter}" if args.adapter else args.encoder
    counts = build(args.out, encoder, args.images, args.titles, args.pages)
    new = f"new: {counts['pictures']} pictures, {counts['titles']} titles, {counts['pages']} pages"
    print(f"{args.out}: {new}; lines that were there already: {counts['known']}; pictures left out: {counts['broken']}")
    if counts["replaced"]:
        print(f"earlier pages or titles replaced, as their address or file was given again: {counts['replaced']}")
    if counts["repeated"]:
        last = "the last line of a page's address counts, and of a picture's file with its address"
        print(f"lines not used: {counts['repeated']}; {last}; passages of one page need addresses such as URL#2")
    return 0


def _index_corpus(args: argparse.Namespace) -> int:
    """search.py index --corpus: add passages to a file of their own."""
    from mmsr.search.corpus import build

    if args.images or args.titles or args.pages:
        how = "index pictures and pages into another file, and search both: --search image=local:A,text=local:B"
        raise UserError(f"--corpus: passages have a file of their own; {how}")
    start = time.perf_counter()
    counts = build(args.out, args.corpus)
    seconds = duration(time.perf_counter() - start)
    size = os.path.getsize(args.out) / 1e6
    print(f"{args.out}: {counts['new']:,} new passages in {seconds}, {counts['known']:,} were there; {size:,.1f} MB")
    return 0


def image(args: argparse.Namespace) -> int:
    """search.py image FILE"""
    from mmsr.system.images import MAX_FILE_BYTES, decode

    try:
        with open(args.file, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        decode(data)
    except OSError as error:
        raise UserError(f"{args.file}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise UserError(f"{args.file}: {error}") from None
    return _search(args, IMAGE_SEARCH, Call("<img>", data, args.question))


def text(args: argparse.Namespace) -> int:
    """search.py text QUERY"""
    query = " ".join(args.query)
    if not query.strip():
        raise UserError("the query is empty: give some words")
    return _search(args, TEXT_SEARCH, Call(query, b"", query))


def serve(args: argparse.Namespace) -> int:
    """search.py serve"""
    from mmsr.search.serve import serve

    serve(open_backend(_options(args)).backend, args.search, args.host, args.port)
    return 0


def summary(args: argparse.Namespace) -> int:
    """search.py cache FILE: what a file of recorded searches holds."""
    with closing(_recording(args.file)) as store:
        if args.json:
            print(json.dumps(store.stats(), indent=2))
            return 0
        for line in contents.summary(store, list(store.entries()), store.stats()):
            print(_printable(line))
    return 0


def list_(args: argparse.Namespace) -> int:
    """search.py cache list FILE: a line a search."""
    with closing(_recording(args.file)) as store:
        entries = list(store.entries())
        chosen = list(_chosen(args, entries))
        if not chosen:
            print(f"{args.file}: none of {counted(len(entries), 'search', 'searches')}", file=sys.stderr)
        for entry in chosen:
            print(json.dumps(entry._asdict()) if args.json else _printable(contents.line(entry)))
    return 0


def show(args: argparse.Namespace) -> int:
    """search.py cache show FILE SEARCH: all that is recorded of a search."""
    with closing(_recording(args.file)) as store:
        named = contents.found(list(store.entries()), args.search)
        if not named:
            advice = f"python search.py cache list {args.file} lists what is"
            raise UserError(f"{args.search!r:.60} is not recorded in {args.file}; {advice}")
        for entry in named:
            record = store.record(entry.number)
            if args.json:
                results = [_result(hit, entry.tool) for hit in record[1].hits] if record else None
                print(json.dumps(entry._asdict() | {"results": results}))
                continue
            for line in contents.about(entry):
                print(_printable(line))
            if record:
                _show(record[1], record[1].seconds)
            else:
                print("damaged: it counts as not recorded")
    return 0


def drop(args: argparse.Namespace) -> int:
    """search.py cache drop FILE: remove searches, so that they are made again."""
    if not (args.numbers or args.damaged or _filters(args)):
        raise UserError("nothing to drop is named: give numbers of the list, or --older-than, --engine, --empty, …")
    with closing(_recording(args.file, writable=args.yes)) as store:
        entries = list(store.entries())
        chosen = list(_chosen(args, entries)) if args.numbers or _filters(args) else []
        if missing := set(args.numbers) - {entry.number for entry in entries}:
            raise UserError(f"{args.file}: no search has the number {min(missing)}; cache list FILE shows them")
        aside = store.stats()["quarantined"] if args.damaged else 0
        what = f"{len(chosen):,} of {counted(len(entries), 'search', 'searches')}"
        what += f" ({contents.kinds(chosen)})" * bool(chosen) + f" and {aside:,} damaged rows" * bool(aside)
        if not args.yes:
            print(f"{args.file}: would drop {what}; add --yes to do it")
            return 0
        store.drop([entry.number for entry in chosen], args.damaged)
        print(f"{args.file}: dropped {what}")
    return 0


def import_(args: argparse.Namespace) -> int:
    """search.py cache import SRC --out FILE"""
    _check_files(args.file, args.out)
    fresh = not os.path.lexists(args.out)
    try:
        with closing(Store(args.out)) as store:
            store.require_writable()
            examples = _examples(args.data, args.columns)
            print(f"{args.out}: {import_searches(store, args.file, examples, args.images)}")
    except UserError:
        if fresh:
            for suffix in ("", "-wal", "-shm", ".lock"):
                Path(f"{args.out}{suffix}").unlink(missing_ok=True)
        raise
    return 0


def export(args: argparse.Namespace) -> int:
    """search.py cache export FILE --out LINES.jsonl"""
    from mmsr.search.cache import export_jsonl

    _check_files(args.file, args.out)
    with closing(_recording(args.file)) as store:
        print(f"{args.out}: {counted(export_jsonl(store, args.out), 'search', 'searches')}")
    return 0


def _recording(file: str, writable: bool = False):
    """The file of recorded searches. Raises UserError for another file."""
    if file.endswith(".jsonl"):
        how = f"python search.py cache import {file} --out searches.sqlite"
        raise UserError(f"{file}: JSON lines; if they are recorded searches, import them: {how}")
    if not writable or not Path(file).is_file():
        return Store(file, readonly=True)
    Store(file, readonly=True).close()  # refuses what is no recording: opened to be written, that is moved aside
    return Store(file)


def _filters(args: argparse.Namespace) -> dict:
    """The given options of `_choice_options`."""
    values = {field.name: getattr(args, field.name) for field in fields(Chosen)}
    return {field.name: values[field.name] for field in fields(Chosen) if values[field.name] != field.default}


def _chosen(args: argparse.Namespace, entries: list):
    """The recorded searches that the options and numbers name."""
    for entry in Chosen(**_filters(args)).of(entries, time.time()):
        if not args.numbers or entry.number in args.numbers:
            yield entry


def _check_files(file: str, out: str) -> None:
    """Raises UserError unless `file` can be read and `out` is another file."""
    if Path(file).is_dir():
        raise UserError(f"{file}: a folder; name a file")
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file; check the path")
    if Path(out).exists() and Path(out).samefile(file):
        raise UserError(f"--out {out}: is the file to be read; name another")


def _examples(data: str, columns: str):
    """The questions whose pictures a recording knows by their ids."""
    if not data:
        return ()
    from mmsr.data.formats import read_examples

    return read_examples(data, columns=columns)


def _options(args: argparse.Namespace) -> Options:
    """The options of a search engine, as train.py has them."""
    if not args.search:
        raise UserError(f"--search is missing; give {KNOWN}")
    given = {name: value for name, value in vars(args).items() if name in SEARCH_OPTIONS}
    return Options(**given, max_images=int(args.run is not text))


def _search(args: argparse.Namespace, tool: str, call: Call) -> int:
    """Search as a rollout does, and show what came. Returns 1 where the back-end failed."""
    options = _options(args)
    asked = "image" if tool == IMAGE_SEARCH else "text"
    backend = open_backend(replace(options, search=options.back_ends[asked])).backend
    toolbox = Toolbox(search_tools(backend, 1, 1), inline=True)
    start = time.perf_counter()
    seen = toolbox.call(tool, call).result()
    seconds = time.perf_counter() - start
    if args.json:
        print(json.dumps(_record(seen, tool, seconds)))
    elif seen.ok:
        _show(seen, seconds)
    else:
        print(f"search.py: {args.search} failed: {_printable(seen.error or 'error')}", file=sys.stderr)
    return 0 if seen.ok else 1


def _record(seen: Observation, tool: str, seconds: float) -> dict:
    """What --json prints."""
    if not seen.ok:
        kind, _, message = (seen.error or "error").partition(": ")
        return {"ok": False, "error": {"kind": kind, "message": message or kind}}
    results = [_result(hit, tool) for hit in seen.hits]
    about = {"source": seen.source, "seconds": round(seconds, 4), "cached": seen.cached}
    return {"ok": True, **about, "results": results}


def _result(hit: Hit, tool: str) -> dict:
    """A hit as --json prints it. An image search's also has a thumbnail, and its address a second time as `link`."""
    from mmsr.search.serve import image_result

    if tool == IMAGE_SEARCH:
        return image_result(hit)
    return {"title": hit.title, "url": hit.url, "text": hit.text, "score": hit.score}


def _show(seen: Observation, seconds: float) -> None:
    """Print the results as the model gets them, with scores and addresses; of a thumbnail, its size."""
    for rank, hit in enumerate(seen.hits, start=1):
        score = "" if hit.score is None else f"   (score {_number(hit.score)})"
        print(f"[{rank}] {_printable(hit.title)}{score}")
        if hit.image:
            print(f"    thumbnail {_size(hit.image)}")
        for line in (hit.url, hit.text):
            if line.strip():
                print("    " + _printable(line).replace("\n", "\n    "))
    found = counted(len(seen.hits), "result", "results") if seen.hits else "No results"
    recorded = "recorded, " if seen.cached else ""
    missing = ": this search is not recorded, see --on-miss" if seen.source == NOT_RECORDED and not seen.cached else ""
    print(f"{found} from {seen.source}, {recorded}in {seconds * 1000:.0f} ms{missing}")


def _number(score: float) -> str:
    return f"{score:.1e}" if 0 < abs(score) < 0.001 else f"{score:.3f}"


def _size(thumbnail: bytes) -> str:
    """Pixels and bytes of a picture file, or why it cannot be opened."""
    from mmsr.system.images import decode

    try:
        picture = decode(thumbnail)
    except ValueError as error:
        return f"that the model will not see: {error}"
    return f"{picture.width} x {picture.height}, {len(thumbnail) / 1000:.1f} kB"


def _printable(text: str) -> str:
    """The text without what could control a terminal, or what it cannot show: results are strangers' text."""
    shown = "".join(char if char.isprintable() or char == "\n" else " " for char in text)
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "replace").decode(encoding).strip()


# ---- the command line

VERBS = {
    "summary": "how many searches of which tool and engine, how old they are, the size of the file",
    "list": "a line for each search",
    "show": "all that is recorded of one search",
    "drop": "remove searches, so that they are made again",
    "import": "record the searches of another file",
    "export": "write all searches as JSON lines",
}
DEFAULTS = default_notes(Options, {"": {}}) | {"search": " (required)"}


def _parser() -> argparse.ArgumentParser:
    parser = Parser("search.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    again = "The file is made where there is none. Whatever ends this early, the same command goes on from there."
    _index_options(_command(commands, index, "Add pictures and pages to an index of your own.", again))
    _image_options(_command(commands, image, "Search with a picture and show what the model would see."))
    _text_options(_command(commands, text, "Search with words and show what the model would see."))
    protocol = "POST /retrieve is Search-R1's protocol; POST /image_search and GET /health stand beside it."
    _serve_options(_command(commands, serve, "Answer searches over HTTP.", protocol))
    recorded = "Without a verb, cache FILE is cache summary FILE. Each verb has its own help: cache drop --help."
    _cache_commands(_command(commands, None, "Show and change a file of recorded searches.", recorded, "cache"))
    return parser


def _command(
    commands: Any, run: Callable[[argparse.Namespace], int] | None, summary: str, more: str = "", name: str = ""
) -> argparse.ArgumentParser:
    name = name or run.__name__.strip("_")
    added = commands.add_parser(name, help=summary, description=f"{summary} {more}", allow_abbrev=False)
    added.set_defaults(run=run)
    return added


def _index_options(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("pictures, by their files: a file that is given again replaces what was there")
    pictures.add_argument(
        "--images", metavar="DIR", help="folder of the pictures: JPEG, PNG, WEBP or GIF (default: no pictures)"
    )
    titles = 'a line each: {"file", "title", and "url" if it has a page} (with --images)'
    pictures.add_argument("--titles", metavar="FILE.jsonl", help=titles)
    encoder = (
        "what pictures are compared by: builtin (finds the same photograph again, needs no weights), "
        "hf:NAME (a Hugging Face vision model, by name or folder) or tower:FOLDER (of a Qwen model) (default: builtin)"
    )
    pictures.add_argument("--encoder", default="builtin", metavar="NAME", help=encoder)
    adapter = "LoRA adapter for tower:FOLDER, a folder or a hub id, with layers of the tower (default: none)"
    pictures.add_argument("--adapter", default="", metavar="DIR", help=adapter)
    texts = parser.add_argument_group(
        "pages, by their addresses: an address that is given again replaces what was there"
    )
    pages = 'a line each: {"url", "text", and "title" if it has one} (default: no pages)'
    texts.add_argument("--pages", metavar="FILE.jsonl", help=pages)
    many = parser.add_argument_group("passages, by the million, in a file of their own")
    corpus = (
        'JSON lines, perhaps compressed (.gz): {"id", "contents"} as Search-R1 has them, or {"text"} with "title" and '
        '"url" if there are; several files may follow (default: no passages)'
    )
    many.add_argument("--corpus", metavar="FILE", nargs="+", default=[], help=corpus)
    parser.add_argument("--out", metavar="FILE", required=True, help="the index (required)")


def _image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="JPEG, PNG, WEBP or GIF")
    parser.add_argument("--question", default="", help="what is asked about it, for summaries (default: nothing)")
    _search_options(parser)


def _text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", nargs="+", metavar="QUERY", help="the words")
    _search_options(parser)


def _serve_options(parser: argparse.ArgumentParser) -> None:
    _backend_options(parser)
    listening = parser.add_argument_group("where it listens")
    host = "address to listen on; anyone who reaches it can search (default: 127.0.0.1, this machine alone)"
    listening.add_argument("--host", default="127.0.0.1", help=host)
    listening.add_argument("--port", default=8000, type=int, help="0 takes a free one (default: 8000)")


def _cache_commands(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, run in zip(VERBS, (summary, list_, show, drop, import_, export)):
        added = _command(verbs, run, f"{VERBS[name][0].upper()}{VERBS[name][1:]}.", name=name)
        added.add_argument("file", metavar="FILE", help=SOURCES if name == "import" else "the recorded searches")
        if name in ("list", "drop"):
            added.add_argument(
                "numbers", nargs="*", default=[], metavar="NUMBER", type=int, help="only these of the list"
            )
            _choice_options(added.add_argument_group("which searches: those that all given options describe"))
        if name in ("summary", "list", "show"):
            added.add_argument("--json", action="store_true", help="for programs, with all fields")
    verbs.choices["show"].add_argument(
        "search", metavar="SEARCH", help="a number of the list, a query, or a picture file"
    )
    aside = "rows that were set aside because they cannot be read"
    verbs.choices["drop"].add_argument("--damaged", action="store_true", help=aside)
    verbs.choices["drop"].add_argument("--yes", action="store_true", help="do it; without this, only say how many")
    data = "the questions whose pictures the conversations or results are about (default: none)"
    verbs.choices["import"].add_argument("--data", default="", metavar="FILE", help=data)
    columns = "other columns of --data, as in train.py: id=extra_info.data_id (default: those of its layout)"
    verbs.choices["import"].add_argument("--columns", default="", metavar="PLACE=COLUMN,...", help=columns)
    images = "folder, zip or tar with the pictures of published results (default: the folder of the imported file)"
    verbs.choices["import"].add_argument("--images", default="", metavar="WHERE", help=images)
    verbs.choices["import"].add_argument(
        "--out", required=True, metavar="FILE", help="where they are recorded (required)"
    )
    verbs.choices["export"].add_argument(
        "--out", required=True, metavar="LINES.jsonl", help="what is written (required)"
    )


SOURCES = (
    "recorded conversations (.jsonl), published image-search results of FVQA (.pkl), DeepEyesV2 (.json) or "
    "MM-DeepResearch (.jsonl), exported searches (.jsonl), or another file of recorded searches; of two answers to a "
    "search the newer one is kept"
)


def _choice_options(parser: Any) -> None:
    kinds = [IMAGE_SEARCH, TEXT_SEARCH, VISIT]
    parser.add_argument("--tool", default="", choices=kinds, help="of this kind (default: all)")
    parser.add_argument("--engine", default="", metavar="NAME", help="whose engine's name contains this (default: any)")
    parser.add_argument("--words", default="", metavar="TEXT", help="whose query contains this (default: any)")
    parser.add_argument(
        "--older-than", default=None, metavar="DAYS", type=float, help="recorded before that (default: any)"
    )
    parser.add_argument("--empty", action="store_true", help="that found nothing")
    superseded = "that a replay never gives, because a newer answer to the same query or picture is recorded"
    parser.add_argument("--superseded", action="store_true", help=superseded)


def _search_options(parser: argparse.ArgumentParser) -> None:
    _backend_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object; exit status 1 where the back-end failed")


def _backend_options(parser: argparse.ArgumentParser) -> None:
    add_options(parser, Options, SEARCH_OPTIONS, DEFAULTS)
    parser.set_defaults(search="")


def _with_verb(argv: Sequence[str]) -> list[str]:
    """`cache FILE` is `cache summary FILE`."""
    argv = list(argv)
    several = any(not word.startswith("-") for word in argv[2:])  # then the first is a misspelt verb
    if argv[:1] == ["cache"] and not several and not {*argv[1:2]} & {*VERBS, "-h", "--help"}:
        argv.insert(1, "summary")
    return argv


def main(argv: Sequence[str]) -> int:
    warnings.simplefilter("ignore")  # Pillow's, about pictures that are refused anyhow
    warnings.simplefilter("always", StoreWarning)
    warnings.showwarning = lambda message, *about: print(f"warning: {message}", file=sys.stderr)
    try:
        args = _parser().parse_args(_with_verb(argv))
        return args.run(args)
    except UserError as error:
        print(f"search.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # … | head
        sys.stdout = None
        return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
