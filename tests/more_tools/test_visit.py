"""The tool `visit` on the real rollout: the page of a result, from the engine that knows it or from the web."""

import json
from contextlib import closing

import pytest
from fake_web import FakeWeb as Services
from fake_web import raw
from test_rollout import ASK, REPLY, FakeWeb, home, make, question, tool_text  # noqa: F401

from mmsr import reward
from mmsr.chat import PROMPTS, Chat
from mmsr.episode import Hit, Observation
from mmsr.more_tools.visit import tools
from mmsr.search import pages
from mmsr.search.backends import PerTool
from mmsr.search.cache import Cached, Replayed
from mmsr.search.index import Local, build
from mmsr.search.store import Store
from mmsr.search.web import Live
from mmsr.tools import VISIT, Call, NoSearch, ToolFailure, search_tools

ADDRESS = "https://example.org"  # that FakeWeb's page has
LONG = "Nothing of note. " * 200 + "The bridge was opened in 1966. " + "Nothing else. " * 200


class Library(FakeWeb):
    """A search engine that knows its pages."""

    def read_page(self, address):
        self.asked.append(address)
        return Observation((Hit("A page", address, LONG),), source="library")


def open_page(text: str) -> str:
    return f"<reason>more of it</reason> <visit>{text}</visit>"


def rollout_of(home, *turns, web=None):  # noqa: F811
    web = web or Library()
    every = [*search_tools(web, 1, 2), *tools(web)]
    rollout = make(home, tools=every, turns=6, turn_tokens=200, say=lambda episode, turn: turns[turn])
    (episode,) = rollout([question()], 1)
    reward.score([episode], reward.RewardRule(), Chat(home.folder, PROMPTS / "real", every).well_formed)
    return episode


def test_a_pages_passage_is_not_read_or_earns_no_format_or_costs_nothing(home):  # noqa: F811
    episode = rollout_of(home, ASK, open_page(f"{ADDRESS} when was the bridge opened"), REPLY)
    (hit,) = episode.turns[3].observation.hits
    assert "opened in 1966" in hit.text and len(hit.text) < len(LONG) / 2 and hit.url == ADDRESS
    assert "What the page says:" in tool_text(episode) and episode.searches() == 2
    assert episode.reward_parts == {"accuracy": 1, "format": 1, "penalty": pytest.approx(0.09)}


@pytest.mark.parametrize("turns", [
    (open_page("https://example.org when"),),
    (ASK, open_page("https://example.org/other when")),
    (ASK, open_page("http://169.254.169.254/latest/meta-data")),
    (ASK, open_page("the page about the bridge")),
])  # fmt: skip
def test_an_address_is_opened_that_no_search_returned(home, turns):  # noqa: F811
    web = Library()
    episode = rollout_of(home, *turns, REPLY, web=web)
    seen = [turn.observation for turn in episode.turns if turn.action == VISIT and turn.role == "tool"]
    assert [(found.ok, found.hits, found.source) for found in seen] == [(True, (), VISIT)]
    assert not any(str(asked).startswith("http") for asked in web.asked)


def test_another_rollouts_results_may_be_opened(home):  # noqa: F811
    web = Library()
    every = [*search_tools(web, 1, 2), *tools(web)]
    said = {0: [ASK, open_page(ADDRESS), REPLY], 1: [open_page(ADDRESS), REPLY]}
    say = lambda episode, turn: said[episode.sample][turn]  # noqa: E731
    rollout = make(home, tools=every, turns=6, turn_tokens=200, say=say)
    first, second = rollout([question()], 2)
    assert first.turns[3].observation.hits and not second.turns[1].observation.hits


def test_without_words_the_question_is_not_looked_for():
    web = Library()
    (tool,) = tools(web)
    found = tool.run(Call(ADDRESS, b"", "When was the bridge opened?", found=(ADDRESS,)))
    assert "opened in 1966" in found.hits[0].text


# ---- where a page comes from


def local(folder) -> Local:
    (folder / "pages.jsonl").write_text(json.dumps({"url": ADDRESS, "title": "Bridge", "text": LONG}) + "\n")
    build(folder / "i", "builtin", None, None, folder / "pages.jsonl")
    return Local(folder / "i")


def test_an_index_does_not_give_its_page(tmp_path):
    for backend in (local(tmp_path), PerTool(NoSearch(), local(tmp_path)), PerTool(local(tmp_path), NoSearch())):
        (hit,) = pages.page_reader(backend)(ADDRESS).hits
        assert (hit.title, hit.url, hit.text) == ("Bridge", ADDRESS, LONG)
        assert pages.page_reader(backend)("https://example.org/other").hits == ()


def test_a_page_is_read_again_or_not_replayed(tmp_path):
    web = Library()
    with closing(Store(tmp_path / "s.sqlite")) as store:
        for cached in (False, True):
            seen = Cached(web, store, "form").read_page(ADDRESS)
            assert seen.cached == cached and seen.hits[0].text == LONG
        assert web.asked == [ADDRESS]
        assert Replayed(store, "error").read_page(ADDRESS).hits[0].text == LONG
        assert Replayed(store, "empty").read_page("https://example.org/other").source == "replay"


def test_a_live_run_reads_without_its_reader_or_its_budget(monkeypatch):
    monkeypatch.setenv("MMSR_ALLOW_LOOPBACK", "1")
    paid = []
    with Services() as web:
        live = Live.from_environment(environ=web.environ("serpapi", "jina"), spend=paid.append)
        seen = pages.page_reader(live)("https://site1.example/page")
    assert seen.hits[0].text.startswith("Text of https://site1.example/page") and paid == ["jina"]


def test_a_page_of_the_index_is_asked_of_the_web_first(tmp_path):
    """Where another engine answers the text searches: it would cost, or be blocked, or fail."""

    class Web(FakeWeb):
        def read_page(self, address):
            raise ToolFailure("blocked", "asked the web")

    for backend in (PerTool(local(tmp_path), Web()), PerTool(Web(), local(tmp_path))):
        assert backend.read_page(ADDRESS).hits[0].text == LONG
        with pytest.raises(ToolFailure, match="asked the web"):
            backend.read_page("https://example.org/other")


def test_an_address_reaches_another_path_of_the_readers_server():
    """One that a stranger's server gave for a result; the reader's address is put before it, with our key."""
    with Services() as web:
        live = Live.from_environment(environ=web.environ("serpapi", "jina"))
        for address in ("https://x.example/../../other", "https://x.example/%2e%2e/%2e%2e/other"):
            live.read_page(address)
        with pytest.raises(ToolFailure, match="blocked: not a plain http or https address"):
            live.read_page("file:///etc/passwd")
        assert [seen.path for seen in web.calls("jina")] == ["/jina/https://x.example/other"] * 2


def test_another_engines_page_is_not_fetched_or_one_inside_the_network_is(monkeypatch):
    with Services() as web:
        html = b"<html><head><title>The bridge</title></head><body><p>Opened in <b>1966</b>.</p></body></html>"
        web.always("file", raw(html, kind="text/html"))
        address = f"{web.url}/thumbnails/page.html"
        (tool,) = tools(FakeWeb())
        call = Call(f"{address} when", b"", "?", found=(address,))
        with pytest.raises(Exception, match="blocked"):
            tool.run(call)
        monkeypatch.setenv("MMSR_ALLOW_LOOPBACK", "1")
        (hit,) = tool.run(call).hits
    assert (hit.title, hit.text) == ("The bridge", "Opened in 1966.")
