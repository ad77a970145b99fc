"""Live search against a web of our own that speaks the providers' formats, and fails in their ways."""

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import PIL.Image
import pytest
from fake_web import KEYS, FakeWeb, bomb, endless, picture, raw, redirect, reset, status
from picture_files import SECRET, exif, private, turned

from mmsr.episode import Hit, Observation
from mmsr.net.client import Client
from mmsr.net.completions import ChatServer, open_server
from mmsr.search.cache import Cached
from mmsr.search.store import Budget, Store
from mmsr.search.web import Live, Remote, Service, passages
from mmsr.system.errors import UserError
from mmsr.tools import Call, Toolbox, ToolFailure, search_tools

IMAGE = picture((640, 480), "blue")


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("MMSR_ALLOW_LOOPBACK", "1")
    with FakeWeb() as web:
        yield web


def quick() -> Client:
    """A client that does not wait between tries."""
    return Client(sleep=lambda seconds: None, jitter=lambda: 0.0)


def live(web, *names, **options) -> Live:
    return Live.from_environment(environ=web.environ(*names), client=quick(), **options)


def kind(call, *args) -> str:
    with pytest.raises(ToolFailure) as caught:
        call(*args)
    assert not any(key in f"{caught.value!r} {caught.value.__cause__!r}" for key in KEYS.values())
    return caught.value.kind


def size(data: bytes) -> tuple[int, int]:
    return PIL.Image.open(io.BytesIO(data)).size


# ---- image search


def test_picture_is_uploaded_small_and_without_its_metadata(web):
    file = io.BytesIO()
    noise = PIL.Image.effect_noise((2400, 1800), 120).convert("RGB")
    noise.save(file, "JPEG", quality=98, exif=exif(words=SECRET), comment=SECRET * 2000, icc_profile=SECRET, xmp=SECRET)
    assert len(file.getvalue()) > 2_000_000
    assert len(live(web).image_search(file.getvalue(), "?").hits) == 5
    (upload,) = web.calls("serpapi.image")
    assert len(upload.body) < 502_000 and SECRET not in upload.body and b"\xff\xd8\xff" in upload.body
    (lens,) = web.calls("serpapi.lens")
    assert lens.query == {
        "engine": "google_lens", "type": "visual_matches", "image_id": "picture-1", "hl": "en", "country": "us",
        "api_key": KEYS["serpapi"],
    }  # fmt: skip


def test_thumbnails_form_gives_the_best_titles_with_small_pictures(web):
    web.files["/thumbnails/2.jpg"] = picture((2000, 1000), "green", "PNG")
    seen = live(web, results=3).image_search(IMAGE, "what?")
    assert [hit.title for hit in seen.hits] == ["Match 1", "Match 2", "Match 3"] and seen.ok
    assert seen.source == "serpapi" and [hit.url for hit in seen.hits][0] == "https://match1.example/"
    assert size(seen.hits[1].image) == (448, 224) and all(hit.image[:3] == b"\xff\xd8\xff" for hit in seen.hits)
    assert not web.calls("jina")


def test_a_telephones_picture_or_a_thumbnail_lies_on_its_side(web):
    web.files["/thumbnails/1.jpg"] = turned(8, size=(96, 64))
    hits = live(web, results=1).image_search(turned(6, size=(480, 320)), "?").hits
    (upload,) = web.calls("serpapi.image")
    assert size(upload.body[upload.body.index(b"\xff\xd8\xff") :]) == (480, 320)
    assert size(hits[0].image) == (96, 64)


@pytest.mark.parametrize(
    "thumbnail",
    ["http://127.0.0.1:1/x.jpg", "file:///etc/passwd", "http://169.254.169.254/", "data:image/png;base64,AAAA", "",
     None, 7, ["x"], "{url}/missing.jpg", "{url}/text.jpg", "{url}/tall.png"],
)  # fmt: skip
def test_thumbnail_that_fails_leaves_its_title_and_is_counted(web, thumbnail, capsys):
    web.files["/text.jpg"] = b"no picture"
    web.files["/tall.png"] = picture((2, 4000), "red", "PNG")
    web.matches[0]["thumbnail"] = thumbnail.format(url=web.url) if isinstance(thumbnail, str) else thumbnail
    backend = live(web)
    hits = backend.image_search(IMAGE, "?").hits
    assert hits[0] == Hit("Match 1", "https://match1.example/") and hits[1].image
    assert backend.counts == {"thumbnails": 4, "thumbnails_failed": 1}
    assert capsys.readouterr().err.count("a thumbnail is missing: ") == 1


def test_summary_form_reads_the_pages_behind_the_matches_for_the_question(web):
    seen = live(web, form="summary", results=2).image_search(IMAGE, "what has this bridge crossed?")
    assert seen.hits == (
        Hit("Match 1", "https://match1.example/", "The bridge crosses the Tagus."),
        Hit("Match 2", "https://match2.example/", "The bridge crosses the Tagus."),
    )
    asked = web.calls("openai")[0].json()["messages"][0]["content"]
    assert "what has this bridge crossed?" in asked and "same picture" in asked


def test_serper_searches_by_address_only(web):
    backend = live(web, "serper", images=False, results=2)
    seen = backend.image_search(IMAGE, "?", "https://example.com/bridge.jpg")
    assert seen.source == "serper" and seen.hits[1].title == "Match 2" and seen.hits[1].image
    assert web.calls("serper.lens")[0].json()["url"] == "https://example.com/bridge.jpg"
    assert kind(backend.image_search, IMAGE, "?") == kind(backend.image_search, IMAGE, "?", "bridge.jpg") == "auth"


def test_serpapi_takes_an_address_without_an_upload(web):
    seen = live(web).image_search(b"no picture", "?", "https://example.com/bridge.jpg")
    assert seen.hits and not web.calls("serpapi.image")
    assert web.calls("serpapi.lens")[0].query["url"] == "https://example.com/bridge.jpg"


def test_a_dead_address_is_made_up_for_by_an_upload(web):
    web.matches = []
    assert live(web).image_search(IMAGE, "?", "https://example.com/gone.jpg") == Observation(source="serpapi")
    first, second = (call.query for call in web.calls("serpapi.lens"))
    assert (
        first["url"] == "https://example.com/gone.jpg" and second["image_id"] and len(web.calls("serpapi.image")) == 1
    )


def test_what_is_no_picture_is_not_uploaded(web):
    assert kind(live(web).image_search, b"%PDF-1.7", "?") == "format" and not web.seen


# ---- text search


def test_pages_are_read_and_summarised_by_the_query(web):
    web.pages = lambda url: "x" * 29_990 + " beginning and {title} end"
    seen = live(web, results=2).text_search("which river?")
    assert seen.source == "serpapi" and [hit.url for hit in seen.hits] == [
        f"https://site{n}.example/page" for n in (1, 2)
    ]
    asked = web.calls("openai")[0].json()
    prompt = asked["messages"][0]["content"]
    assert "which river?" in prompt and "Title of https://site" in prompt and asked["max_tokens"] == 400
    assert "x begin" in prompt and "beginning and" not in prompt  # the first 30,000 characters
    assert web.calls("jina")[0].headers["authorization"] == f"Bearer {KEYS['jina']}"
    assert web.calls("serpapi.google")[0].query["q"] == "which river?"


def test_further_pages_are_tried_until_enough_are_read(web):
    broken = {1, 2, 4}
    web.always("jina", lambda handler: answer_or_422(web, handler, broken))
    backend = live(web, results=3)
    assert [hit.title for hit in backend.text_search("q").hits] == ["Page 3", "Page 5", "Page 6"]
    assert backend.counts == {"pages": 3, "pages_failed": 3}


def answer_or_422(web, handler, broken):
    if any(f"site{n}." in handler.path for n in broken):
        status(422, {"data": None, "code": 422, "status": 42206, "message": "No content available"})(handler)
    else:
        status(200, {"code": 200, "data": {"title": "T", "content": "text"}})(handler)


def test_fewer_pages_than_wanted_are_still_a_result_and_none_is_a_failure(web):
    web.always("jina", lambda handler: answer_or_422(web, handler, range(2, 9)))
    assert [hit.title for hit in live(web).text_search("q").hits] == ["Page 1"]
    web.always("jina", lambda handler: answer_or_422(web, handler, range(1, 9)))
    with pytest.raises(ToolFailure, match="none of 8 pages could be read: jina: HTTP 422: No content available"):
        live(web).text_search("q")


def test_no_further_pages_are_begun_when_the_time_for_them_is_over(web):
    now = [0.0]

    def late(handler):
        now[0] = 61.0
        status(422, {"code": 422, "message": "No content available"})(handler)

    web.always("jina", late)
    client = Client(clock=lambda: now[0], sleep=lambda seconds: None)
    assert kind(Live.from_environment(environ=web.environ(), client=client, results=3).text_search, "q") == "status"
    assert len(web.calls("jina")) == 3


def test_recorded_searches_are_not_paid_for_again_and_failures_not_recorded(web, tmp_path):
    """Rows 12 and 13 as the pieces are put together in a run."""
    with closing(Store(tmp_path / "cache.db")) as store:
        budget = Budget(store, "run", 2)
        environ = web.environ("serpapi")
        engine = Cached(
            Live.from_environment(environ=environ, client=quick(), spend=budget.spend), store, "thumbnails/5"
        )
        web.then("serpapi.google", raw(b"<html>busy</html>"))
        assert kind(engine.text_search, "q") == "format"
        seen = engine.text_search("q")
        assert engine.text_search("Q ").hits == seen.hits and budget.spent == {"serpapi": 2}
        assert kind(engine.image_search, IMAGE, "?") == "budget" and not web.calls("serpapi.lens")
        assert not any(key.encode() in path.read_bytes() for key in KEYS.values() for path in tmp_path.iterdir())


def test_pages_are_read_at_the_same_time(web):
    together = threading.Barrier(5)

    def wait(handler):
        together.wait(20)
        status(200, {"code": 200, "data": {"content": "text"}})(handler)

    web.always("jina", wait)
    assert len(live(web).text_search("q").hits) == 5


def test_each_page_is_read_once_and_strange_links_never(web):
    web.results[1]["link"] = web.results[0]["link"]
    web.results[2]["link"] = "javascript:alert(1)"
    web.results[3]["link"] = "file:///etc/passwd"
    sites = [f"https://site{n}.example/page" for n in (1, 5, 6, 7, 8)]
    assert [hit.url for hit in live(web).text_search("q").hits] == sites
    assert len(web.calls("jina")) == 5


def test_address_reaches_the_reader_whole(web):
    for link in (
        "https://a.example/p?q=1&r=ä b",
        "https://a.example/p#part",
        "https://a.example/a%20b//c/?u=http://x/",
    ):
        web.seen.clear()
        web.results = [{"title": "t", "link": link}]
        live(web, "serpapi").text_search("q")
        (read,) = web.calls("jina")
        if "#" in link:
            assert read.method == "POST" and b"https%3A%2F%2Fa.example%2Fp%23part" in read.body
        else:
            assert read.path.removeprefix("/jina/") == link.replace("ä b", "%C3%A4%20b")


@pytest.mark.parametrize(
    "link, asked",
    [
        ("http://host/a/../../../x?y=/../..", "http://host/x?y=/../.."),
        ("http://host/%2e%2e/%2E./%2e%2e", "http://host/"),
        ("http://host/a/%252e%252e/x?u=%2F..", "http://host/a/%252e%252e/x?u=%2F.."),
        *[(link, None) for link in ("http://host/a/../../x#../..", "http://host/x/..\\..", "http://host/x/..%2f..")],
    ],
)
def test_link_with_dots_does_not_lead_the_reader_to_another_address(web, link, asked):
    web.results = [{"title": "t", "link": link}]
    live(web, "serpapi", "jina").text_search("q")
    (read,) = [seen for seen in web.seen if "authorization" in seen.headers]
    assert read.service == "jina" and read.path.removeprefix("/jina/") == (asked or "")
    assert asked or b"url=http%3A%2F%2Fhost%2Fx" in read.body  # a POST


@pytest.mark.parametrize(
    "link", ["http://../../../search", "http://%2e%2e/x", "http://me:pass@host/", "http://h/\n/../x"]
)
def test_link_that_is_none_is_never_read(web, link):
    web.results = [{"title": "t", "link": link}]
    assert live(web, "serpapi", "jina").text_search("q").hits == () and not web.calls("jina")


def test_error_page_is_no_page(web):
    """The reader sends what a site says to robots with a 200 and a warning; other warnings are of pages."""
    refused = ["Target URL returned error 403: Forbidden", "Target URL returned error 404: Not Found",
               "This page maybe not yet fully loaded\nThis page maybe requiring CAPTCHA, please make sure"]  # fmt: skip
    fine = ["This page contains shadow DOM that are currently hidden", "This is a cached snapshot", None, 7, ["x"]]
    said = iter([*refused, *fine])
    page = {"title": "Just a moment...", "content": "Verifying you are human."}
    web.always("jina", lambda handler: status(200, {"code": 200, "data": {**page, "warning": next(said)}})(handler))
    backend = live(web, "serpapi", results=1)
    assert backend.text_search("q").hits[0].title == "Page 4" and len(web.calls("jina")) == 4
    assert all(backend.text_search("q").hits[0].title == "Page 1" for _ in fine[1:])
    web.always("jina", status(200, {"code": 200, "data": {**page, "warning": refused[0]}}))
    with pytest.raises(ToolFailure, match="https://site1.example/page: Target URL returned error 403: Forbidden"):
        backend.text_search("q")


def test_without_a_summarizer_the_best_passages_stand(web):
    filler = "Nothing to see here, move along please. " * 30
    web.pages = lambda url: f"{filler} The bridge spans the Tagus at Lisbon. {filler}"
    backend = live(web, "serpapi")
    assert backend.summarizer is None
    text = backend.text_search("bridge Tagus").hits[0].text
    assert "spans the Tagus" in text and len(text) < 1700 and not web.calls("openai")
    assert "authorization" not in web.calls("jina")[0].headers
    assert passages("nothing in common", "The page begins here. " * 100).startswith("The page begins here.")


def test_prompt_fields_are_filled_in_once(web):
    web.pages = lambda url: "{query} {title} {page}"
    live(web, results=1).text_search("{page} \\1")
    assert "<page>\n{query} {title} {page}\n</page>" in web.calls("openai")[0].json()["messages"][0]["content"]


def test_serper_is_used_where_it_has_the_only_key(web):
    seen = live(web, "serper", images=False, results=1).text_search("q")
    assert seen.source == "serper" and seen.hits[0].title == "Page 1" and not web.calls("serpapi.google")
    live(web, images=False).text_search("q")
    assert len(web.calls("serpapi.google")) == 1


def test_endless_texts_are_cut_to_what_a_turn_can_hold(web):
    web.results[0]["title"] = web.matches[0]["title"] = "t" * 100_000
    web.pages = web.answer = lambda _: "w " * 100_000
    for backend in (live(web), live(web, "serpapi"), live(web, form="summary")):
        for seen in (backend.text_search("w"), backend.image_search(IMAGE, "w")):
            assert all(len(hit.title) <= 300 and len(hit.text) <= 2_000 for hit in seen.hits)
    web.results[0]["snippet"] = "s" * 100_000
    assert [len(hit.text) for hit in Remote(web.url, results=1).text_search("q").hits] == [8_000]


# ---- answers that are none (row 12)


@pytest.mark.parametrize("names", [("serpapi",), ("serper",)])
def test_no_results_are_an_answer(web, names):
    web.results = web.matches = []
    backend = live(web, *names, images=False)
    assert backend.text_search("q") == Observation(source=names[0])
    assert backend.image_search(IMAGE, "?", "https://x.example/") == Observation(source=names[0])


@pytest.mark.parametrize(
    "reply",
    [
        {"search_metadata": {"status": "Success"}, "error": "Google Lens hasn't returned any results for this query."},
        {"error": "Google hasn't returned any results for this query."},
        {"search_metadata": {"status": "Success"}, "search_information": {"organic_results_state": "Fully empty"}},
        {"visual_matches": [], "organic_results": []},
    ],
)
def test_an_engine_that_says_so_has_found_nothing(web, reply):
    for service in ("serpapi.google", "serpapi.lens"):
        web.always(service, status(200, reply))
    assert live(web).text_search("q") == live(web).image_search(IMAGE, "?") == Observation(source="serpapi")


SUCCESS = {"search_metadata": {"status": "Success"}, "search_parameters": {"engine": "google_lens"}}


@pytest.mark.parametrize(
    "reply, expected, asked",
    [
        *[(reply, "format", 1) for reply in ({}, {"{}": "x"}, {"{}": {"0": {}}}, {"{}": 7}, {"{}": [1, "x"]},
                                             {"{}": [{"position": 1}]}, {"error": {"a": 1}}, SUCCESS,
                                             SUCCESS | {"search_information": {"time": 1.2}}, SUCCESS | {"{}": None},
                                             SUCCESS | {"related_content": [{"query": "q"}]},
                                             {"error": "We could not read the picture."})],
        *[({"search_metadata": {"status": state}}, "status", 3) for state in ("Error", "Processing", "Queued")],
        (SUCCESS | {"error": "We couldn't get valid results for this search. Please try again later."}, "status", 3),
        ({"error": "Your account has run out of searches."}, "credits", 1),
        ({"error": "Invalid API key."}, "auth", 1),
    ],
)  # fmt: skip
def test_what_is_not_said_to_be_nothing_is_not_recorded_as_nothing_for_good(web, tmp_path, reply, expected, asked):
    for service, search, name in (
        ("serpapi.google", lambda engine: engine.text_search("q"), "organic_results"),
        ("serpapi.lens", lambda engine: engine.image_search(IMAGE, "?"), "visual_matches"),
    ):
        web.always(service, status(200, {name if key == "{}" else key: value for key, value in reply.items()}))
        with closing(Store(tmp_path / f"{service}.db")) as store:
            engine = Cached(live(web), store)
            assert kind(search, engine) == expected and len(web.calls(service)) == asked
            del web.standing[service]
            engine.backend = live(web)
            assert search(engine).hits, "asked again another time, and found"


def test_serper_that_sends_no_list_has_not_found_nothing(web):
    web.always("serper.lens", status(200, {"searchParameters": {"url": "u"}, "credits": 3}))
    with pytest.raises(ToolFailure, match="serper: no organic in the reply; it has searchParameters, credits"):
        live(web, "serper", images=False).image_search(IMAGE, "?", "https://x.example/")


def test_address_whose_answer_is_not_understood_is_made_up_for_by_an_upload(web):
    web.then("serpapi.lens", status(200, SUCCESS))
    assert live(web).image_search(IMAGE, "?", "https://x.example/a.jpg").hits and web.calls("serpapi.image")


BAD_BODIES = [raw(b"<html>sign in</html>", kind="text/html"), raw(b'{"organic_results": [{"ti'), raw(b"[1]"), raw(b"")]
FAULTS = [*[(fault, "format") for fault in BAD_BODIES], (reset(), "network"), (endless(), "too-large"),
          (bomb(50_000_000), "too-large"), (status(503, {}), "status"), (status(429, {"error": "slow"}), "rate"),
          (status(401, {"error": "Invalid API key"}), "auth"), (redirect("http://127.0.0.1:1/"), "status"),
          (status(429, {"error": "Your account has run out of searches."}), "credits")]  # fmt: skip
SERVICES = ["serpapi.google", "serpapi.lens", "serpapi.image", "jina", "openai"]


@pytest.mark.parametrize("service", SERVICES)
def test_every_fault_of_every_service_is_a_failure_of_its_kind(web, service):
    for fault, expected in FAULTS:
        web.always(service, fault)
        backend = live(web, results=1)
        search = (backend.image_search, IMAGE, "?") if service in ("serpapi.lens", "serpapi.image") else None
        assert kind(*search or (backend.text_search, "q")) == expected, (service, expected)


ODD = [None, 7, 10**400, 1.5, True, [], {}, "x", [[]], {"a": {"b": []}}, "\ud800", "9" * 5000, -1]


@pytest.mark.first_is_quick
@pytest.mark.parametrize("service", SERVICES)
def test_field_of_any_type_is_no_attribute_error(web, service):
    """Each field of each real answer by turns replaced by each odd value: a result or a ToolFailure, nothing else."""
    answers = {
        "serpapi.google": {"organic_results": [{"title": "t", "link": "https://a.example/"}], "error": "e"},
        "serpapi.lens": {"visual_matches": [{"title": "t", "link": "https://a/", "thumbnail": f"{web.url}/x.jpg"}]},
        "serpapi.image": {"message": "m", "image_id": "picture-1"},
        "jina": {"code": 200, "status": 20000, "data": {"title": "t", "url": "u", "content": "c"}, "message": "m"},
        "openai": {"choices": [{"message": {"content": "c"}}], "error": "e"},
    }  # fmt: skip
    tried = 0
    for path in paths(answers[service]):
        for odd in ODD:
            web.always(service, status(200, replaced(answers[service], path, odd)))
            backend = live(web, results=1)
            try:
                backend.image_search(IMAGE, "?") if service in ("serpapi.lens", "serpapi.image") else None
                json.dumps([hit.title for hit in backend.text_search("q").hits]).encode()
            except ToolFailure:
                pass
            tried += 1
    assert tried >= 24


def paths(value, here=()):
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*here, key))


def replaced(value, path, odd):
    if not path:
        return odd
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], odd)
    return copy


@pytest.mark.parametrize(
    "code, name, expected",
    [(402, "InsufficientBalanceError", "credits"), (401, "AuthenticationFailedError", "auth"), (422, "x", "status"),
     (409, "BudgetExceededError", "status"), (451, "SecurityCompromiseError", "blocked"), (403, "x", "forbidden")],
)  # fmt: skip
@pytest.mark.parametrize("http", [True, False])
def test_jinas_errors_are_understood_by_status_and_within_a_200(web, code, name, expected, http):
    error = {"data": None, "code": code, "name": name, "status": code * 100 + 1, "message": "sorry"}
    web.always("jina", status(code if http else 200, error))
    assert kind(live(web).text_search, "q") == expected


def test_refused_reader_is_not_asked_page_after_page(web):
    web.always("jina", status(401, {"code": 401, "message": "Invalid API key"}))
    backend = live(web)
    assert kind(backend.text_search, "q") == "auth" and kind(backend.text_search, "q") == "auth"
    assert len(web.calls("jina")) <= 5  # those that were on their way


# ---- money


def test_search_is_not_paid_for_when_its_pages_can_no_longer_be_read(web):
    web.always("openai", status(401, {"error": {"message": "Incorrect API key provided"}}))
    spent = []
    backend = live(web, spend=spent.append)
    assert [kind(backend.text_search, "q") for _ in range(3)] == ["auth"] * 3
    assert spent.count("serpapi") == 1 and len(web.calls("serpapi.google")) == 1
    assert backend.image_search(IMAGE, "?").hits  # thumbnails need no reader


def test_every_paid_request_is_announced_and_nothing_free(web):
    spent = []
    live(web, results=2, spend=spent.append).image_search(IMAGE, "?")
    assert spent == ["serpapi"] and len(web.calls("serpapi.image")) == 1
    spent.clear()
    live(web, results=2, spend=spent.append).text_search("q")
    assert sorted(spent) == ["jina", "jina", "openai", "openai", "serpapi"]
    spent.clear()
    live(web, "serpapi", results=2, spend=spent.append).text_search("q")
    assert spent == ["serpapi"]


def test_no_call_is_made_when_nothing_is_left(web):
    def spend(provider):
        raise ToolFailure("budget", "all 7 calls are spent")

    backend = live(web, spend=spend)
    assert kind(backend.text_search, "q") == kind(backend.image_search, IMAGE, "?", "https://x.example/") == "budget"
    assert web.seen == []


def test_budget_that_ends_among_the_pages_leaves_those_that_were_read(web):
    lock, left = threading.Lock(), [6]  # a search, then pages and summaries by turns as they come

    def spend(provider):
        with lock:
            if left[0] == 0:
                raise ToolFailure("budget", "spent")
            left[0] -= 1

    try:
        hits = live(web, spend=spend).text_search("q").hits
    except ToolFailure as error:
        hits = error.kind
    paid = [seen for seen in web.seen if seen.service in ("serpapi.google", "jina", "openai")]
    assert len(paid) == 6 and (hits == "budget" or 0 < len(hits) < 5)


# ---- opening


def test_missing_key_is_named(web):
    with pytest.raises(UserError, match="SERPAPI_API_KEY nor SERPER_API_KEY"):
        Live.from_environment(environ={})
    with pytest.raises(
        UserError, match="SERPAPI_API_KEY is not set, and Serper finds pictures by their addresses only"
    ):
        Live.from_environment(environ=web.environ("serper"))


@pytest.mark.parametrize(
    "variable, value",
    [("SERPAPI_API_KEY", "two words"), ("SERPAPI_API_KEY", "sécret-secret"), ("JINA_BASE_URL", "localhost:8000"),
     ("OPENAI_BASE_URL", "file:///x"), ("SERPER_BASE_URL", "http://"), ("SERPAPI_BASE_URL", "http://x y\n/"),
     ("JINA_BASE_URL", "http://x/?tenant=1"), ("SERPER_BASE_URL", "http://x:y/")],
)  # fmt: skip
def test_senseless_variable_is_named_and_a_key_not_shown(web, variable, value):
    with pytest.raises(UserError) as caught:
        Live.from_environment(environ=web.environ() | {variable: value})
    assert str(caught.value).startswith(variable) and "\n" not in str(caught.value)
    assert "BASE_URL" in variable or value not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-0123\n456789", "sk-0123–456789", "Bearer sk-0123456789", "\ufeffsk-0123456789"])
def test_a_key_that_no_header_can_carry_is_quoted_by_the_complaint_about_it(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="^OPENAI_API_KEY: has blanks or char.*copy the key again$"):
        open_server("http://127.0.0.1:1", "m")


def test_summarizer_without_a_key_is_a_server_of_ones_own(web):
    environ = web.environ("serpapi") | {"OPENAI_BASE_URL": f"{web.url}/v1", "OPENAI_MODEL": "Qwen3-32B"}
    spent = []
    Live.from_environment(environ=environ, results=1, spend=spent.append).text_search("q")
    (asked,) = web.calls("openai")
    assert asked.json()["model"] == "Qwen3-32B" and "authorization" not in asked.headers and spent == ["serpapi"]


def test_wrong_key_is_a_failed_observation_without_the_key(web):
    environ = web.environ() | {"SERPAPI_API_KEY": "wrong-key-0123456789"}
    backend = Live.from_environment(environ=environ, client=quick())
    seen = Toolbox(search_tools(backend, 1, 1), inline=True).call("text_search", Call("q", b"", "")).result()
    assert not seen.ok and seen.error.startswith("auth: serpapi: HTTP 401: Invalid API key")
    assert "wrong-key" not in seen.error


def test_many_searches_at_once(web):
    backend = live(web)
    with ThreadPoolExecutor(32) as pool:
        seen = list(pool.map(backend.text_search, [f"q{n}" for n in range(32)]))
    assert all(len(one.hits) == 5 for one in seen) and backend.counts == {"pages": 160}


# ---- a server elsewhere


def test_remote_speaks_search_r1(web):
    seen = Remote(f"{web.url}/retrieve", results=2).text_search("which river?")
    assert web.seen[0].json() == {"queries": ["which river?"], "topk": 2, "return_scores": True}
    assert seen.hits == tuple(
        Hit(f"Page {n}", f"https://site{n}.example/page", f"snippet {n}", score=0.5) for n in (1, 2)
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_pictures_private_words_go_to_a_server_elsewhere(web, kind):
    full, bare = private(kind)
    Remote(web.url).image_search(full, "")
    assert base64.b64decode(web.seen[0].json()["image"]) == bare


def test_what_is_no_picture_is_sent_to_a_server_elsewhere(web):
    assert kind(Remote(web.url).image_search, b"<svg/>", "") == "format" and not web.seen


def test_remote_image_search_sends_other_bytes_than_a_plain_picture_has(web):
    seen = Remote(web.url, results=1).image_search(IMAGE, "what?")
    body = web.seen[0].json()
    assert base64.b64decode(body.pop("image")) == IMAGE and body == {"topk": 1, "question": "what?"}
    (hit,) = seen.hits
    assert (hit.title, hit.url, hit.score, size(hit.image)) == ("Match 1", "https://match1.example/", 0.9, (64, 48))


@pytest.mark.parametrize(
    "document, hit",
    [
        ({"id": "12", "contents": '"Tagus"\nA river.\nIn Iberia.'}, Hit("Tagus", "", "A river.\nIn Iberia.")),
        ({"contents": "only a text"}, Hit("", "", "only a text")),
        ({"title": "T", "text": "x", "url": "https://a.example/"}, Hit("T", "https://a.example/", "x")),
        *[({"document": {"contents": '"T"\nx'}, "score": score}, Hit("T", "", "x"))
          for score in ("high", True, 10**400, float("nan"), float("inf"), None)],
        ({"document": {"content": '"T"\nx'}, "score": 0.5}, Hit("T", "", "x", score=0.5)),
        ({"title": "T", "content": "Two\nlines", "score": 1}, Hit("T", "", "Two\nlines", score=1.0)),
        ({"document": "a text", "score": 0.5}, Hit("", "", "a text", score=0.5)),
        ("a text alone", Hit("", "", "a text alone")),
        ('"T"\nx', Hit("T", "", "x")),
        ([{"id": "1", "contents": '"T"\nx'}, 0.5], Hit("T", "", "x", score=0.5)),
        ([0.5, {"passage": "x"}], Hit("", "", "x", score=0.5)),
        (["a text", 0.5], Hit("", "", "a text", score=0.5)),
        ({"page_content": "x", "metadata": {}}, Hit("", "", "x")),
        ({"title": "T"}, Hit("T")),
        ({"title": "T", "link": "https://a.example/", "snippet": "x"}, Hit("T", "https://a.example/", "x")),
        ({"contents": "", "content": None, "text": "x"}, Hit("", "", "x")),
    ],
)  # fmt: skip
def test_documents_of_foreign_servers_are_read_in_any_form(web, document, hit):
    web.always("remote.text", status(200, {"result": [[document, None, 7, {}, {"document": 3}, {"contents": 5}]]}))
    assert Remote(web.url).text_search("q").hits == (hit,)


@pytest.mark.parametrize(
    "reply, words",
    [
        *[(reply, "format") for reply in ({}, {"result": 1}, {"result": []}, {"result": [{}]}, {"result": [[], []]})],
        ({"data": {"docs": []}, "took": 3}, "no list of results in the reply; it has data, took"),
        ({"result": [[{"doc": "x", "sim": 1}]]}, "no document is understood; the first: it has doc, sim"),
        ({"result": [[7, None]]}, "the first: it is a int"),
        ({"error": "index not loaded"}, "index not loaded"),
        ({"detail": [{"loc": ["body", "topk"], "msg": "field required"}]}, "field required"),
        ({"result": [[]], "error": {"message": "no such corpus"}}, "no such corpus"),
        ({"error": "boom", "result": None}, "boom"),
        ({"success": False, "message": "no such corpus"}, "no such corpus"),
        ({"errors": ["no such corpus"], "data": None}, "no such corpus"),
    ],
)
def test_a_remote_reply_that_is_not_understood_has_not_found_nothing(web, reply, words):
    web.always("remote.text", status(200, reply))
    with pytest.raises(ToolFailure, match=words) as caught:
        Remote(web.url).text_search("q")
    assert caught.value.kind == "format" and len(web.seen) == 1


def test_remote_search_that_found_nothing_says_so(web):
    for reply in ({"result": [[]]}, {"result": [[]], "error": None}, {"result": [[{"contents": ""}]], "detail": ""}):
        web.always("remote.text", status(200, reply))
        assert Remote(web.url).text_search("q") == Observation(source=web.url.removeprefix("http://"))
    web.always("remote.image", status(200, {"results": []}))
    assert Remote(web.url).image_search(IMAGE, "").hits == ()
    web.always("remote.image", status(200, {"results": [["a", 1], {"name": "x"}]}))
    assert kind(Remote(web.url).image_search, IMAGE, "") == "format"


def test_remote_documents_may_come_without_a_list_for_each_query(web):
    two = (Hit("", "", "a"), Hit("", "", "b"))
    for listed in (["a", "b"], [{"text": "a"}, {"content": "b"}]):
        web.always("remote.text", status(200, {"results": listed}))
        assert Remote(web.url).text_search("q").hits == two
    for reply in ([["a", "b"]], ["a", "b"], {"hits": [["a", "b"]]}, {"data": [{"chunk": "a"}, {"paragraph": "b"}]}):
        web.always("remote.text", status(200, reply))
        assert Remote(web.url).text_search("q").hits == two
    web.always("remote.text", status(200, {"documents": [["a", 0.5], ["b", 0.25]]}))
    assert [hit.score for hit in Remote(web.url).text_search("q").hits] == [0.5, 0.25]


def test_overloaded_remote_server_that_says_it_with_a_200_is_asked_again(web):
    web.then("remote.text", status(200, {"error": "too many requests"}), status(200, {"status": 503, "error": "x"}))
    assert Remote(web.url, quick()).text_search("q").hits and len(web.seen) == 3


def test_remote_thumbnails_are_strangers_pictures(web):
    results = [{"title": "a", "thumbnail": odd} for odd in ("!!", "AAAA", 7, None, "é")] + [None, "x", {"title": 3}]
    web.always("remote.image", status(200, {"results": results}))
    assert Remote(web.url, results=9).image_search(IMAGE, "").hits == (Hit("a"),) * 5


@pytest.mark.parametrize("name", ["url", "link"])
def test_an_address_is_lost_that_another_server_calls_otherwise(web, name):
    web.always("remote.image", status(200, {"results": [{"title": "a", name: "https://a.example/"}]}))
    assert Remote(web.url).image_search(IMAGE, "").hits == (Hit("a", "https://a.example/"),)


def test_server_without_image_search_says_so(web):
    web.always("remote.image", status(404, {"detail": "Not Found"}))
    assert kind(Remote(web.url, quick()).image_search, IMAGE, "") == "status"


def test_remote_understands_our_own_server(web):
    from mmsr.search.serve import Server

    class Engine:
        def image_search(self, image, question, image_url=""):
            return Observation((Hit(question, "https://a.example/", "text", picture(), 0.25),))

        def text_search(self, query):
            if query == "fail":
                raise ToolFailure("budget", "all calls are spent")
            return Observation((Hit(query, "https://b.example/", "a\nb", None, 0.5),))

    with Server(Engine(), "engine", port=0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        remote = Remote(f"http://127.0.0.1:{server.server_address[1]}", quick())
        assert remote.text_search("who?").hits == (Hit("who?", "https://b.example/", "a\nb", None, 0.5),)
        (hit,) = remote.image_search(IMAGE, "what?").hits
        assert (hit.title, hit.url, hit.text, hit.score) == ("what?", "https://a.example/", "text", 0.25) and hit.image
        with pytest.raises(ToolFailure, match="all calls are spent"):
            remote.text_search("fail")
        server.shutdown()


def test_remote_wants_an_address():
    with pytest.raises(UserError, match="remote:nowhere"):
        Remote("nowhere")


def test_remote_address_keeps_its_path_and_query(web):
    remote = Remote(f"{web.url}/retrieve/?tenant=7", quick())
    assert remote.text_search("q").hits and web.seen[-1].path == "/retrieve?tenant=7"
    web.always("remote.text", status(404, {"detail": "Not Found"}))
    with pytest.raises(ToolFailure, match="HTTP 404: nothing at /retrieve: Not Found"):
        remote.text_search("q")


@pytest.mark.parametrize(
    "url", ["https://me:word-0123@s.example", "me:word-0123@s.example", "https://s.example?key=word-0123"]
)
def test_address_of_a_service_tells_its_password(url):
    for opened, where in [
        (lambda: Service.from_environment("jina", {"JINA_BASE_URL": url}), "JINA_BASE_URL: .* export JINA_API_KEY"),
        (lambda: ChatServer(url, "m", "", Client()), "the chat server: .* export OPENAI_API_KEY"),
        (lambda: Remote(url), "--search remote: .* leave it out"),
    ]:
        with pytest.raises(UserError, match=where) as caught:
            opened()
        assert "word" not in str(caught.value).replace("password", "")
