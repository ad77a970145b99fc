"""BM25: what shares no word with the query is not found, and any script has words."""

import pytest
from helpers import SEARCHES

from mmsr.search.bm25 import query_tokens, rank, sqlite_query, tokens, words

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


@pytest.mark.parametrize("text, expected", [
    ("Straße STRASSE \ufb01n", ["strasse", "strasse", "fin"]),
    ("İzmir ISPARTA ısparta", ["izmir", "isparta", "isparta"]),
    ("Ｔａｇｕｓ e\u0301 é Đà", ["tagus", "e", "e", "da"]),
    ("塔霍河 Tajo", ["塔", "霍", "河", "tajo"]),
    ("iPhone手机 2024年", ["iphone", "手", "机", "2024", "年"]),
    ("ジョン・レノン ｹﾞ ゲ ケ", ["ジ", "ョ", "ン", "レ", "ノ", "ン", "ゲ", "ゲ", "ケ"]),
    ("Тежу 12 ёж", ["тежу", "12", "еж"]),
    ("한강 ᄒ\u1161ᆫ강", ["한강", "한강"]),
    ("กรุงเทพ", ["ก", "รุ", "ง", "เ", "ท", "พ"]),
    ("हिन्दी कि की", ["हिन्दी", "कि", "की"]),
    ("العَرَبِيَّة أحمد شَـــعر", ["العربية", "احمد", "شعر"]),
    ("کتاب ۲۰۲۴ یک", ["كتاب", "2024", "يك"]),
    ("२०२४ 👨\u200d👩 ☕\ufe0f", ["2024", "👨", "👩", "☕"]),
    ("co\u00adop \u200bParis\ufeff 1\ufe0f\u20e3", ["coop", "paris", "1"]),
])  # fmt: skip
def test_words_of_any_script(text, expected):
    assert words(text) == expected


def test_a_run_without_blanks_is_one_word():
    assert tokens("塔霍河 Tajo") == ["塔", "霍", "河", "塔霍", "霍河", "tajo"]
    assert query_tokens("塔霍河 Tajo 塔霍") == ["塔霍", "霍河", "tajo"], "the characters alone would find every page"
    assert query_tokens("塔") == ["塔"], "but one that stands alone is asked for"
    assert query_tokens("한강은") == ["한강", "강은"], "as a page may say 한강의"


@pytest.mark.parametrize("query, page", SEARCHES, ids=[page[:8] for _, page in SEARCHES])
def test_a_page_is_not_ranked_first_for_a_query_in_its_language(query, page):
    pages = [page for _, page in SEARCHES]
    assert pages[rank(query, pages)[0][0]] == page


def test_a_character_that_stands_alone_finds_no_page():
    assert rank("塔", ["这座桥横跨塔霍河。", "这是一座山。"])[0][0] == 0


def test_a_common_word_outweighs_a_telling_one():
    assert sqlite_query("What is the capital of France?") == '"capital" OR "france"'
    assert sqlite_query("who is the") == '"who" OR "is" OR "the"'
    assert sqlite_query('x_y "z') == '"x" OR "y" OR "z"'
