"""Search by hand, make an index of your own, or serve a search engine to training code.

python search.py index --images DIR --titles FILE.jsonl --pages FILE.jsonl --out my.index
python search.py image photo.jpg --search local:my.index
python search.py text "who designed it" --search local:my.index
python search.py serve --search local:my.index
python search.py cache import conversations.jsonl --data questions.parquet --out searches.sqlite
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path
from typing import Callable, Sequence

from mmsr.config import SEARCH_OPTIONS, Options
from mmsr.episode import Hit, Observation
from mmsr.search.backends import KNOWN, import_searches, open_backend
from mmsr.system.errors import UserError
from mmsr.system.options import Parser, add_options
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, Call, Toolbox, search_tools


def index(args: argparse.Namespace) -> int:
    """search.py index: add pictures and pages to an index."""
    from mmsr.search.index import build

    if bool(args.images) != bool(args.titles):
        raise UserError("--images and --titles go together: give the folder, and the file that names what lies in it")
    if not (args.titles or args.pages):
        raise UserError("nothing to index: give --images DIR with --titles FILE.jsonl, or --pages FILE.jsonl")
    counts = build(args.out, args.encoder, args.images, args.titles, args.pages)
    new = f"{counts['pictures']} new pictures under {counts['titles']} new titles, {counts['pages']} new pages"
    print(f"{args.out}: {new}; {counts['known']} lines were there already, {counts['broken']} pictures left out")
    if counts["replaced"]:
        print(f"{counts['replaced']} earlier pages or titles were replaced: the same address or file was given again")
    if counts["repeated"]:
        last = "the last line of a page's address counts, and of a picture's file with its address"
        print(f"{counts['repeated']} lines were not used: {last}; passages of one page need addresses such as URL#2")
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
    if not args.query.strip():
        raise UserError("the query is empty: give some words")
    return _search(args, TEXT_SEARCH, Call(args.query, b"", args.query))


def serve(args: argparse.Namespace) -> int:
    """search.py serve"""
    from mmsr.search.serve import serve

    serve(open_backend(_options(args)).backend, args.search, args.host, args.port)
    return 0


def cache(args: argparse.Namespace) -> int:
    """search.py cache FILE | import SRC --out FILE | export FILE --out LINES.jsonl"""
    from mmsr.search.cache import export_jsonl
    from mmsr.search.store import Store

    file = args.words[-1]
    verb = " ".join(args.words[:-1])
    if verb not in ("", "import", "export"):
        raise UserError(f"cache {' '.join(args.words)}: give cache FILE, cache import SRC or cache export FILE")
    if bool(verb) != bool(args.out):
        raise UserError("--out names the file that import and export write: give it with these, and with nothing else")
    if verb:
        _check_files(file, args.out)
    if verb == "import":
        with closing(Store(args.out)) as store:
            store.require_writable()
            print(f"{args.out}: {import_searches(store, file, _examples(args.data))}")
        return 0
    with closing(Store(file, readonly=True)) as store:
        if verb == "export":
            print(f"{args.out}: {export_jsonl(store, args.out)} searches")
        else:
            print(json.dumps(store.stats(), indent=2))
    return 0


def _check_files(file: str, out: str) -> None:
    """Raises UserError unless `file` can be read and `out` is another file."""
    if Path(file).is_dir():
        raise UserError(f"{file}: a folder; name a file")
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file; check the path")
    if Path(out).exists() and Path(out).samefile(file):
        raise UserError(f"--out {out}: is the file to be read; name another")


def _examples(data: str):
    """The questions whose pictures a recording knows by their ids."""
    if not data:
        return ()
    from mmsr.data.formats import read_examples

    return read_examples(data)


def _options(args: argparse.Namespace) -> Options:
    """The options of a search engine, as train.py has them."""
    if not args.search:
        raise UserError(f"--search is missing; give {KNOWN}")
    given = {name: value for name, value in vars(args).items() if name in SEARCH_OPTIONS}
    return Options(**given, max_images=int(args.run is not text))


def _search(args: argparse.Namespace, tool: str, call: Call) -> int:
    """Search as a rollout does, and show what came. Returns 1 where the back-end failed."""
    backend = open_backend(_options(args)).backend
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
    from mmsr.search.serve import image_result

    if not seen.ok:
        kind, _, message = (seen.error or "error").partition(": ")
        return {"ok": False, "error": {"kind": kind, "message": message or kind}}
    results = [image_result(hit) if tool == IMAGE_SEARCH else _page(hit) for hit in seen.hits]
    about = {"source": seen.source, "seconds": round(seconds, 4), "cached": seen.cached}
    return {"ok": True, **about, "results": results}


def _page(hit: Hit) -> dict:
    return {"title": hit.title, "url": hit.url, "text": hit.text, "score": hit.score}


def _show(seen: Observation, seconds: float) -> None:
    """Print the results as the model gets them, with scores and addresses; of a thumbnail, its size."""
    for rank, hit in enumerate(seen.hits, start=1):
        score = "" if hit.score is None else f"   (score {hit.score:.3f})"
        print(f"[{rank}] {_printable(hit.title)}{score}")
        if hit.image:
            print(f"    thumbnail {_size(hit.image)}")
        for line in (hit.url, hit.text):
            if line.strip():
                print("    " + _printable(line).replace("\n", "\n    "))
    found = f"{len(seen.hits)} results" if seen.hits else "No results"
    recorded = "recorded, " if seen.cached else ""
    print(f"{found} from {seen.source}, {recorded}in {seconds * 1000:.0f} ms")


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


def _parser() -> argparse.ArgumentParser:
    parser = Parser("search.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int], summary: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=summary, description=f"{summary} {more}", allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    again = "The file is made where there is none. Whatever ends this early, the same command goes on from there."
    _index_options(command(index, "Add pictures and pages to an index of your own.", again))
    _image_options(command(image, "Search with a picture and show what the model would see."))
    _text_options(command(text, "Search with words and show what the model would see."))
    protocol = "POST /retrieve is Search-R1's protocol; POST /image_search and GET /health stand beside it."
    _serve_options(command(serve, "Answer searches over HTTP.", protocol))
    verbs = (
        "cache FILE | cache import SRC --out FILE | cache export FILE --out LINES.jsonl. SRC: recorded conversations "
        "(.jsonl), FVQA's published results (.pkl), exported searches (.jsonl), or another such file."
    )
    _cache_options(command(cache, "Show what a file of recorded searches holds, or fill one.", verbs))
    return parser


def _index_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures: JPEG, PNG, WEBP or GIF")
    titles = 'a line each: {"file", "title", and "url" if it has a page}'
    parser.add_argument("--titles", metavar="FILE.jsonl", help=titles)
    pages = 'a line each: {"url", "text", and "title" if it has one}'
    parser.add_argument("--pages", metavar="FILE.jsonl", help=pages)
    parser.add_argument("--out", metavar="FILE", required=True, help="the index")
    encoder = (
        "what pictures are compared by: builtin (finds the same photograph again, needs no weights), "
        "hf:NAME (a Hugging Face vision model, by name or folder) or tower:FOLDER (a Qwen2.5-VL's vision tower)"
    )
    parser.add_argument("--encoder", default="builtin", metavar="NAME", help=encoder)


def _image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="JPEG, PNG, WEBP or GIF")
    parser.add_argument("--question", default="", help="what is asked about it, for back-ends that write summaries")
    _search_options(parser)


def _text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", metavar="QUERY")
    _search_options(parser)


def _serve_options(parser: argparse.ArgumentParser) -> None:
    _backend_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; anyone who reaches it can search")
    parser.add_argument("--port", default=8000, type=int, help="0 takes a free one")


def _cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", metavar="[import|export] FILE", nargs="+")
    data = "the questions whose pictures conversations and results are about"
    parser.add_argument("--data", default="", help=data)
    parser.add_argument("--out", default="", metavar="FILE", help="what import and export write")


def _search_options(parser: argparse.ArgumentParser) -> None:
    _backend_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object; exit status 1 where the back-end failed")


def _backend_options(parser: argparse.ArgumentParser) -> None:
    add_options(parser, Options, SEARCH_OPTIONS)
    parser.set_defaults(search="")


def main(argv: Sequence[str]) -> int:
    from mmsr.search.store import StoreWarning

    warnings.simplefilter("ignore")  # Pillow's, about pictures that are refused anyhow
    warnings.simplefilter("always", StoreWarning)
    warnings.showwarning = lambda message, *about: print(f"warning: {message}", file=sys.stderr)
    try:
        args = _parser().parse_args(argv)
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
