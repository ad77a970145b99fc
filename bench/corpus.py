"""The text index of a corpus: passages a second, milliseconds a query, memory, size of the file.

    python bench/corpus.py --passages 1000000

The passages are made: 100 words each, drawn so that the vocabulary grows as in Wikipedia. WikiText-2 (2.1 million
words) has 33,278 words that occur three times or more, WikiText-103 (103 million) has 267,735; these draws give 30,500
and 266,000. A query has the rarest two words of a passage and six others of it, as a question has them; whether its
passage is among the five that are found is told, too.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from mmsr.search import corpus
from mmsr.search.bm25 import COMMON
from mmsr.system.errors import UserError
from mmsr.system.progress import say

WORDS, BEND = 3_000_000, 5_000  # of the vocabulary; where its frequencies begin to fall faster
SLOPES = (0.9, 1.8)  # frequency ∝ 1 / rank^0.9 up to the bend, ∝ 1 / rank^1.8 behind it
LENGTH = 100  # words of a passage
BLOCK = 10_000  # passages that are drawn at once


def vocabulary() -> tuple[list[str], np.ndarray]:
    """The words, the most frequent first, and the sum of the probabilities up to each. The first are those that a
    search leaves out."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype="S1")
    draw = np.random.default_rng(0)
    spelled = letters[draw.integers(0, 26, (WORDS, 8))].tobytes().decode()
    words = sorted(COMMON) + [spelled[8 * i : 8 * i + 8] for i in range(len(COMMON), WORDS)]
    rank = np.arange(1, WORDS + 1)
    tail = BEND ** (SLOPES[1] - SLOPES[0]) / rank ** SLOPES[1]
    share = np.where(rank <= BEND, 1 / rank ** SLOPES[0], tail)
    return words, np.cumsum(share / share.sum())


def drawn(passages: int, sums: np.ndarray) -> Iterator[np.ndarray]:
    """Ranks of the words of all passages, in blocks (block, LENGTH). Equal for equal numbers of passages."""
    draw = np.random.default_rng(1)
    for start in range(0, passages, BLOCK):
        block = draw.random((min(BLOCK, passages - start), LENGTH))
        yield np.searchsorted(sums, block).clip(max=WORDS - 1)


def make(file: Path, passages: int, queries: int) -> list[tuple[str, str]]:
    """Write the corpus, as Search-R1 has it. Returns (query, title of its passage)."""
    words, sums = vocabulary()
    asked = set(np.random.default_rng(2).choice(passages, queries, replace=False).tolist())
    found = []
    number = 0
    with file.open("w") as out:
        for block in drawn(passages, sums):
            for ranks in block:
                text = " ".join([words[rank] for rank in ranks])
                out.write(json.dumps({"id": str(number), "contents": f'"Page {number}"\n{text}.'}) + "\n")
                if number in asked:
                    rarest = np.sort(ranks)[-2:]
                    found.append((" ".join(words[rank] for rank in [*rarest, *ranks[:6]]), f"Page {number}"))
                number += 1
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench/corpus.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=None, help="where the files stay (default: they are removed)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        source, file = folder / "corpus.jsonl", folder / "corpus.index"
        asked = make(source, options.passages, options.queries)
        before = peak()
        start = time.perf_counter()
        corpus.build(file, [source])
        seconds = time.perf_counter() - start
        helper = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        say(f"built: {options.passages / seconds:,.0f} passages a second, by {corpus.PROCESSES} processes and this one")
        say(f"memory: each of them at most {helper:.2f} GB; this one {peak():.2f} GB, of them {before:.2f} GB before")
        say("(Linux counts what its parent had as a new process's, so the makers of the passages are in both)")
        say(f"file: {file.stat().st_size / 1e6:,.0f} MB, of {source.stat().st_size / 1e6:,.0f} MB of JSON lines")
        measure(corpus.Corpus(file), asked)


def peak() -> float:
    """The most memory that this process had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(index: corpus.Corpus, asked: list[tuple[str, str]]) -> None:
    times, right = [], 0
    for query, title in asked:
        start = time.perf_counter()
        hits = index.text_search(query).hits
        times.append(1000 * (time.perf_counter() - start))
        right += title in [hit.title for hit in hits]
    say(f"memory with the index open and searched: {peak():.2f} GB")
    median, late = np.percentile(times, [50, 99])
    say(f"a query: {median:.1f} ms in the median, {late:.1f} ms at the 99th percentile")
    say(f"queries that find the passage that they are from: {right / len(asked):.1%}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        raise SystemExit(str(error)) from None
