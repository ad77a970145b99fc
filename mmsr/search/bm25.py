"""The words of pages and of queries, and BM25 over a few documents in memory (Robertson and Zaragoza, 2009).

A word is a run of letters, digits and their marks, folded: without case, ligatures, accents and the optional points of
Arabic and Hebrew, but with the vowel signs of Indian scripts. Scripts without blanks between words have no such words,
nor has Korean, whose particles are written at the ends of words: of their runs, every character is a token, and every
pair of neighbours. A query asks for the pairs, or for a character that is alone.

Trap: SQLite's own tokenizers fold differently and have no pairs. So FTS5 gets the text as `searchable` returns it, and
a tokenizer that only splits at blanks.
"""

from __future__ import annotations

import math
import re
import sqlite3
import unicodedata
from collections import Counter
from contextlib import closing
from itertools import chain, pairwise
from typing import Sequence

K1, B = 1.5, 0.75  # k1: saturation of the term frequency; b: normalisation by the document's length
QUERY_WORDS = 64
COMMON = frozenset("a an and are as at by did do does for from how in is of on or the to was were what who".split())

# Scripts without blanks: kana (without ・ and ゠), ideographs; Thai, Lao, Burmese, Khmer; emoji.
UNSPACED = (
    "\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
    "\u0e01-\u0e2f\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"
    "\u1000-\u102a\u103f\u1050-\u1055\u1780-\u17b3\u17d7\u2600-\u27bf\U0001f1e6-\U0001faff"
)
HANGUL = "\u1100-\u11ff\uac00-\ud7a3"
# Accents, points and invisible characters; not the marks that distinguish words in their script.
DROPPED = re.compile(
    "[\u00ad\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u065f"
    "\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u0711\u0730-\u074a\u1ab0-\u1aff\u1dc0-\u1dff\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f\ufeff]"
)
KEPT = chain(range(0x07A6, 0x1AB0), range(0x1B00, 0x1D00), range(0xA800, 0xAC00))
MARKS = "".join(chr(code) for code in KEPT if unicodedata.category(chr(code))[0] == "M")
PLAIN_LETTERS = str.maketrans(
    {"æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i"}
    | {"ی": "ي", "ى": "ي", "ک": "ك"}  # Persian letters to Arabic ones
    | {chr(code): str(int(chr(code))) for code in range(0x660, 0x1E960) if chr(code).isdecimal()}
)
CHARACTER = re.compile(rf"[{UNSPACED}{HANGUL}][{MARKS}]*")
BLANKLESS = re.compile(f"[{UNSPACED}]")
LETTER = rf"[^\W_{UNSPACED}{HANGUL}]"
RUN = re.compile(rf"(?:[{UNSPACED}][{MARKS}]*)+|[{HANGUL}]+|{LETTER}+(?:[{MARKS}]+{LETTER}*)*")


def fold(text: str) -> str:
    """A form that is equal for all spellings of a word: Straße and STRASSE, İzmir and izmir, Kraków and Krakow."""
    if text.isascii():
        return text.lower()
    bare = DROPPED.sub("", unicodedata.normalize("NFKD", text)).casefold().translate(PLAIN_LETTERS)
    return unicodedata.normalize("NFC", bare)


def words(text: str) -> list[str]:
    """The words of a text in order; of a script without blanks, its characters."""
    found = []
    for run in RUN.findall(fold(text)):
        found += CHARACTER.findall(run) if BLANKLESS.match(run) else [run]
    return found


def tokens(text: str) -> list[str]:
    """The tokens by which a page is found."""
    found = []
    for run in RUN.findall(fold(text)):
        if run.isascii():  # most are
            found.append(run)
            continue
        characters = CHARACTER.findall(run)
        found += [*characters, *_pairs(characters)] or [run]
    return found


def query_tokens(query: str) -> list[str]:
    """The tokens that a query asks for, each once."""
    found = []
    for run in RUN.findall(fold(query)):
        characters = CHARACTER.findall(run)
        found += _pairs(characters) or characters or [run]
    return list(dict.fromkeys(found))


def informative(query: str) -> list[str]:
    """The tokens of a query that say what is searched: without the most frequent words, unless it has no others."""
    found = query_tokens(query)
    return ([token for token in found if token not in COMMON] or found)[:QUERY_WORDS]


def _pairs(characters: Sequence[str]) -> list[str]:
    return [first + second for first, second in pairwise(characters)]


def rank(query: str, documents: Sequence[str]) -> list[tuple[int, float]]:
    """(index, BM25 score) of the documents that share a token with the query, the best first, equals in their order.
    BM25 = Σ over tokens of idf · tf · (k1 + 1) / (tf + k1 · (1 - b + b · length / mean length))."""
    counts = [Counter(tokens(document)) for document in documents]
    lengths = [count.total() for count in counts]
    mean = sum(lengths) / max(len(lengths), 1) or 1.0
    scores = [0.0] * len(documents)
    for token in query_tokens(query):
        matching = [index for index, count in enumerate(counts) if token in count]
        idf = math.log(1 + (len(documents) - len(matching) + 0.5) / (len(matching) + 0.5))
        for index in matching:
            tf = counts[index][token]
            scores[index] += idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * lengths[index] / mean))
    found = [(index, score) for index, score in enumerate(scores) if score > 0]
    return sorted(found, key=lambda pair: -pair[1])


# ---- SQLite's FTS5, for columns of `searchable` texts

TOKENIZE = "tokenize = 'ascii'"
STEMMED = "tokenize = 'porter ascii'"  # without English endings


def searchable(text: str) -> str:
    """A text's tokens, with blanks between them."""
    return text if text.isascii() else " ".join(tokens(text))


def sqlite_query(text: str) -> str:
    """An FTS5 query for any of a text's tokens, "" for none. All are quoted: no text can use FTS5's query language."""
    return " OR ".join(f'"{token}"' for token in informative(text))


def stems(tokens: Sequence[str]) -> list[str]:
    """The tokens without English endings, as FTS5 has them: its tokenizer has to tell, for Python has none."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"CREATE VIRTUAL TABLE words USING fts5 (word, content = '', detail = none, {STEMMED})")
        db.executemany("INSERT INTO words (rowid, word) VALUES (?, ?)", enumerate(tokens))
        db.execute("CREATE VIRTUAL TABLE stems USING fts5vocab (words, 'instance')")
        found = dict(db.execute("SELECT doc, term FROM stems"))
    return [found.get(number, token) for number, token in enumerate(tokens)]
