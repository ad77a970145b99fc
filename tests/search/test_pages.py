"""The text of a page: what a reader would see of a stranger's HTML."""

import pytest

from mmsr.net.http import Response
from mmsr.search.pages import CHARACTERS, page_text
from mmsr.tools import ToolFailure


def page(body: str | bytes, kind: str = "text/html") -> tuple[str, str]:
    data = body if isinstance(body, bytes) else body.encode()
    return page_text(Response(200, {"content-type": kind}, data, "https://example.org"))


@pytest.mark.parametrize("html, title, text", [
    ("<title> A\n title </title><h1>One</h1><p>two <b>3</b></p>four<br>five", "A title", "One\ntwo 3\nfour\nfive"),
    ("<p>a</p><script>var x = '<p>no</p>'</script><style>p {}</style><p>b</p>", "", "a\nb"),
    ("<head><title>T</title><meta charset=utf-8><body>seen", "T", "seen"),
    ("<table><tr><td>1</td><td>2</td></tr></table>&amp; &lt;b&gt; &eacute;", "", "1\n2\n& <b> é"),
    ("<noscript>enable it</noscript><p>unclosed <i>text", "", "unclosed text"),
    ("<svg><title>icon</title><text>x</text></svg>words", "icon", "words"),
    ("<head><title>T</title><p>Opened in 1966.", "T", "Opened in 1966."),
    ("<title>The bridge</title><p>a<svg><title>menu</title></svg>b", "The bridge", "ab"),
    ("", "", ""),
])  # fmt: skip
def test_markup_is_read_or_words_are_lost(html, title, text):
    assert page(html) == (title, text)


def test_another_encoding_becomes_other_letters():
    assert page("Zürich".encode("latin-1"), "text/html; charset=ISO-8859-1")[1] == "Zürich"
    assert page('<meta charset="shift_jis">東京'.encode("shift_jis"))[1] == "東京"
    assert page("Zürich".encode(), "text/html; charset=no-such-thing")[1] == "Zürich"
    assert page(b"a\xffb")[1] == "a\ufffdb"
    for name in ("idna", "undefined", "rot13", "base64"):
        assert page("Zürich".encode(), f"text/html; charset={name}")[1] == "Zürich"


def test_plain_text_is_taken_for_html_or_anything_else_for_text():
    assert page("a < b\n\n c", "text/plain") == ("", "a < b\n\n c")
    for kind in ("image/png", "application/pdf", "application/octet-stream"):
        with pytest.raises(ToolFailure, match="not a page of text"):
            page(b"%PDF", kind)


def test_hostile_markup_takes_minutes_or_much_memory():
    for html in ("<p>" * 200_000, "<script>" * 100_000, "<" * 300_000, "<!--" + "-" * 300_000, "&" * 300_000):
        assert len(page(html)[1]) <= CHARACTERS
    assert len(page("word " * 100_000)[1]) <= CHARACTERS
