"""BM25 over a handful of documents in memory (Robertson and Zaragoza, 2009), and the words to ask SQLite's for.

A token is a word of any script, case-folded; of scripts that are written without blanks, a character.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from typing import Sequence

K1, B = 1.5, 0.75  # how soon repetition stops counting, how much length is held against a document
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and ideographs
QUERY_WORDS = 64
COMMON = frozenset("a an and are as at by did do does for from how in is of on or the to was were what who".split())
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def tokens(text: str) -> list[str]:
    return TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def rank(query: str, documents: Sequence[str]) -> list[tuple[int, float]]:
    """(index, score) of the documents that share a word with the query, the best first; equals keep their order."""
    counts = [Counter(tokens(document)) for document in documents]
    lengths = [count.total() for count in counts]
    mean = sum(lengths) / max(len(lengths), 1) or 1.0
    scores = [0.0] * len(documents)
    for word in dict.fromkeys(tokens(query)):
        holders = [index for index, count in enumerate(counts) if word in count]
        rarity = math.log(1 + (len(documents) - len(holders) + 0.5) / (len(holders) + 0.5))
        for index in holders:
            times = counts[index][word]
            scores[index] += rarity * times * (K1 + 1) / (times + K1 * (1 - B + B * lengths[index] / mean))
    found = [(index, score) for index, score in enumerate(scores) if score > 0]
    return sorted(found, key=lambda pair: -pair[1])


def sqlite_query(text: str) -> str:
    """An FTS5 query for any of the words of a text; empty where it has none. Whatever the text, it is only words."""
    words = list(dict.fromkeys(re.findall(r"\w+", text.casefold())))
    telling = [word for word in words if word not in COMMON] or words
    return " OR ".join(f'"{word}"' for word in telling[:QUERY_WORDS])
