"""The pages of the toy web as a corpus, so that a toy run can search an index of files: `python -m mmsr.toy.passages`.

    python -m mmsr.toy.passages --toy full --out toy-pages.jsonl
    python search.py index --corpus toy-pages.jsonl --out toy.index
    python train.py --toy full --search image=toy,text=local:toy.index

There are three pages about each concept, as many as the base model was shown by a search. They say the truth: the toy
web's own text search misleads in .07 of the names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mmsr.system.errors import UserError, first_line
from mmsr.system.files import write_whole
from mmsr.system.options import Parser
from mmsr.toy.world import PAGES, SETTINGS, World


def lines(world: World) -> list[bytes]:
    """A passage of each form about each concept."""
    texts = [form.format(name=concept.name, town=concept.town) for concept in world.concepts for form in PAGES]
    return [json.dumps({"id": str(number), "text": text}).encode() + b"\n" for number, text in enumerate(texts)]


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m mmsr.toy.passages", description=__doc__.split("\n\n")[0])
    parser.add_argument("--toy", choices=list(SETTINGS), default="full", help="setting of the toy world")
    parser.add_argument("--seed", type=int, default=0, help="of the toy world: that of the run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="what is written (required)")
    options = parser.parse_args(argv)
    try:
        pages = lines(World(options.seed, SETTINGS[options.toy]))
        write_whole(options.out, pages)
    except (UserError, OSError) as error:
        print(f"python -m mmsr.toy.passages: {first_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{options.out}: {len(pages)} pages")


if __name__ == "__main__":
    main(sys.argv[1:])
