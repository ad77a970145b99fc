"""BM25: what shares no word with the query is not found, and any script has words."""

import pytest

from mmsr.bm25 import rank, sqlite_query, tokens

PAGES = ["The bridge crosses the Tagus river.", "A river in Spain.", "Bread and olives.", ""]


def test_best_page_comes_first_and_strangers_are_left_out():
    assert [index for index, _ in rank("Which river does the bridge cross?", PAGES)] == [0, 1]
    assert rank("quantum", PAGES) == rank("", PAGES) == rank("?!", PAGES) == []
    assert rank("river", []) == []


def test_scores_are_those_of_the_formula():
    # idf of a word in 1 of 2 documents: ln(1 + 1.5 / 1.5); both documents have the mean length, so tf 2 gives 2·2.5/3.5
    assert rank("a", ["a a", "b b"]) == [(0, pytest.approx(0.693147 * 5 / 3.5, abs=1e-5))]


def test_rare_word_outweighs_a_frequent_one_and_a_short_page_a_long_one():
    pages = ["common rare", "common common", "common x", "rare " + "x " * 50]
    assert [index for index, _ in rank("rare", pages)] == [0, 3]
    assert rank("common rare", pages)[0][0] == 0
    assert all(score > 0 for _, score in rank("common", pages))  # a word of every page is no evidence against it


def test_equals_keep_their_order_and_a_repeated_query_word_counts_once():
    assert [index for index, _ in rank("x x x", ["x", "x", "x"])] == [0, 1, 2]
    assert rank("x x", ["x", "y"]) == rank("x", ["x", "y"])


@pytest.mark.parametrize("text, words", [
    ("Straße STRASSE", ["strasse", "strasse"]),
    ("Ｔａｇｕｓ", ["tagus"]),
    ("塔霍河 Tajo", ["塔", "霍", "河", "tajo"]),
    ("Тежу 12", ["тежу", "12"]),
    ("한강 다리", ["한강", "다리"]),
])  # fmt: skip
def test_words_of_any_script(text, words):
    assert tokens(text) == words


def test_page_in_chinese_is_found_by_part_of_a_sentence():
    assert rank("塔霍河", ["这座桥横跨塔霍河。", "这是一座山。"])[0][0] == 0


def test_a_common_word_outweighs_a_telling_one():
    assert sqlite_query("What is the capital of France?") == '"capital" OR "france"'
    assert sqlite_query("who is the") == '"who" OR "is" OR "the"'
    assert sqlite_query('a_b "c') == '"a_b" OR "c"'
