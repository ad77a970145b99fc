"""The guarded client against a server that does its worst: rows 10, 11, 12, 16 and 22 of the fault programme."""

import base64
import gzip
import json
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
import traceback
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from urllib.parse import quote

import pytest
from fake_web import FakeWeb, bomb, drip, endless, picture, raw, redirect, reset, status
from picture_files import private, saved, scene, turned

from mmsr.net import client as guarded
from mmsr.net import http as wire
from mmsr.net.client import BREAKER_FAILURES, BREAKER_SECONDS, Client, web_address
from mmsr.net.completions import ChatServer, chat_address, judge_variable, open_server, picture_part
from mmsr.net.http import keep_secret, proxy_for, redact, require_public
from mmsr.net.server_errors import status_in_body
from mmsr.search.web import Remote, Service
from mmsr.system.errors import UserError
from mmsr.system.images import decode
from mmsr.tools import ToolFailure

CANARY = "canary+key/0123456789=abcdef"
GENEROUS = 5.0  # seconds, for what is promised within half a second


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 1000.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def client(self, **options) -> Client:
        return Client(clock=lambda: self.now, sleep=self.sleep, jitter=lambda: 1.0, **options)


@pytest.fixture
def web():
    with FakeWeb() as web:
        yield web


@pytest.fixture
def time_():
    return Time()


@pytest.fixture
def loopback(monkeypatch):
    monkeypatch.setenv("MMSR_ALLOW_LOOPBACK", "1")


@pytest.fixture
def connects(monkeypatch):
    """Every address that a socket is told to connect to. Nothing outside this machine is really dialled."""
    seen, connect = [], socket.socket.connect

    def recorded(self, address):
        seen.append(address)
        if not (address[0].startswith("127.") or address[0] in ("::1", "0.0.0.0", "::ffff:127.0.0.1")):
            raise ConnectionRefusedError(f"not dialled in a test: {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    return seen


def get(client, web, path="/x", **options):
    return client.request("probe", "GET", web.url + path, **options)


def kind(call, *args, **options) -> str:
    with pytest.raises(ToolFailure) as caught:
        call(*args, **options)
    return caught.value.kind


# ---- retries (row 10)


def test_throttled_call_waits_as_long_as_it_is_told(web, time_):
    web.then("file", status(429, {"error": "too fast"}, Retry_After="7"), status(200, {"done": 1}))
    assert get(time_.client(), web).json() == {"done": 1} and time_.slept == [7.0]


def test_retry_after_may_be_a_date(web, time_):
    web.then("file", status(503, {}, Retry_After=formatdate(time.time() + 30, usegmt=True)), status(200, {}))
    get(time_.client(), web)
    assert 20 < time_.slept[0] <= 30


def test_server_cannot_make_us_wait_longer_than_the_cap_or_the_deadline(web, time_):
    web.always("file", status(429, {"error": "too fast"}, Retry_After="86400"))
    assert kind(get, time_.client(), web, seconds=600, tries=2) == "rate" and time_.slept == [60.0]
    assert kind(get, time_.client(), web, seconds=30) == "rate" and time_.slept == [60.0]


@pytest.mark.parametrize("value", ["-5", "soon", "", "nan", "9" * 400, "Mon, 99 Foo 2026"])
def test_senseless_retry_after_is_none(web, time_, value):
    web.then("file", status(503, {}, Retry_After=value), status(200, {}))
    get(time_.client(), web)
    assert 0 <= time_.slept[0] <= 60


def test_pauses_grow_and_are_spread_over_all_of_their_length(web):
    clock, draws = Time(), iter([1.0, 0.0, 0.5])
    web.always("file", status(500, {}))
    client = Client(clock=lambda: clock.now, sleep=clock.sleep, jitter=lambda: next(draws, 0.25))
    assert kind(get, client, web) == "status"
    assert clock.slept == [1.0, 0.0, 2.0] and len(web.seen) == 4


@pytest.mark.parametrize("code", [400, 403, 404, 409, 410, 422, 451, 301])
def test_refusal_that_will_not_change_is_not_asked_for_again(web, time_, code):
    web.always("file", status(code, {"message": "no"}, Location="/elsewhere"))
    expected = {403: "forbidden", 451: "blocked"}.get(code, "status")
    assert kind(get, time_.client(), web) == expected and len(web.seen) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_service_that_has_moved_does_not_keep_its_new_address_to_itself(web, time_, canary, code):
    where = f"http://user:password@127.0.0.1/new?api_key={CANARY}"
    web.then("file", redirect("/v2/x", code), redirect(where, code))
    for moved in (f"{web.url}/v2/x", "http://[key]@127.0.0.1/new?[key]"):
        with pytest.raises(ToolFailure) as caught:
            time_.client().request("probe", "POST", web.url + "/x", json={})
        assert f"HTTP {code}: it has moved to {moved}; configure that address" in str(caught.value)
    assert len(web.seen) == 2, "the body of a POST is not sent elsewhere"


FATAL = [
    (401, {"error": "Invalid API key."}, "auth"),
    (403, {"message": "Unauthorized.", "statusCode": 403}, "auth"),
    (429, {"error": "Your account has run out of searches."}, "credits"),
    (400, {"message": "Not enough credits", "statusCode": 400}, "credits"),
    (402, {"data": None, "code": 402, "status": 40203, "message": "Account balance"}, "credits"),
    (429, {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota"}}, "credits"),
    (400, [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}], "auth"),
    (400, {"error": {"message": "Your credit balance is too low to access the API."}}, "credits"),
    (400, {"error": {"code": "Arrearage", "message": "please make sure your account is in good standing"}}, "credits"),
    (429, {"error": {"code": "1113", "message": "您的账户已欠费，请充值后重试"}}, "credits"),
    (403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}, "credits"),
]


@pytest.mark.parametrize(
    "code, message, expected",
    [
        (429, "You exceeded your current quota, please check your billing details. Please retry in 20s.", "rate"),
        (422, "Failed to goto https://films.example/insufficient-funds", "status"),
        (403, "https://a.example/no-api-key blocks us", "forbidden"),
    ],
)  # fmt: skip
def test_what_will_pass_or_the_name_of_a_page_stops_a_provider_for_good(web, time_, code, message, expected):
    web.always("file", status(code, {"error": {"message": message}}))
    assert kind(get, time_.client(), web) == expected
    assert status_in_body({"error": "could not open https://a.example/insufficient-balance"}) == 200


@pytest.mark.parametrize("code, body, expected", FATAL)
def test_refused_key_or_empty_account_stops_the_provider_at_once_and_no_other(web, time_, code, body, expected):
    web.then("file", status(code, body))
    client = time_.client()
    assert kind(get, client, web) == expected
    time_.now += 1e6
    assert kind(get, client, web) == expected and len(web.seen) == 1
    web.files["/x"] = b"{}"
    assert client.request("another", "GET", web.url + "/x").status == 200


def test_breaker_opens_after_failures_in_a_row_and_lets_one_probe_through(web, time_):
    client = time_.client()
    web.always("file", status(500, {}))
    for _ in range(BREAKER_FAILURES):
        kind(get, client, web, tries=1)
    assert kind(get, client, web, tries=1) == "breaker" and len(web.seen) == BREAKER_FAILURES
    time_.now += BREAKER_SECONDS
    assert kind(get, client, web, tries=1) == "status"  # the probe
    assert kind(get, client, web, tries=1) == "breaker"
    time_.now += BREAKER_SECONDS
    web.always("file", status(200, {}))
    assert [get(client, web).status for _ in range(3)] == [200] * 3


def test_while_the_probe_is_on_its_way_the_others_wait(web, time_):
    client, arrived, release = time_.client(), threading.Event(), threading.Event()
    web.always("file", status(500, {}))
    for _ in range(BREAKER_FAILURES):
        kind(get, client, web, tries=1)
    time_.now += BREAKER_SECONDS

    def hold(handler):
        arrived.set()
        release.wait(GENEROUS)
        status(200, {})(handler)

    web.always("file", hold)
    with ThreadPoolExecutor(1) as pool:
        probe = pool.submit(get, client, web, tries=1)
        assert arrived.wait(GENEROUS)
        assert kind(get, client, web, tries=1) == "breaker"
        release.set()
        assert probe.result().status == 200
    assert get(client, web).status == 200


def test_throttling_does_not_open_the_breaker(web, time_):
    client = time_.client()
    web.always("file", status(429, {"error": "slow down"}))
    assert [kind(get, client, web, tries=1) for _ in range(2 * BREAKER_FAILURES)] == ["rate"] * 2 * BREAKER_FAILURES


def test_each_try_that_may_be_charged_is_paid_for_before_it_is_made(web, time_):
    def left(*script, calls=99):
        spent = []

        def spend(provider):
            if len(spent) == calls:
                raise ToolFailure("budget", "nothing left")
            spent.append((provider, len(web.seen)))

        web.then("file", *script)
        try:
            get(time_.client(), web, spend=spend)
        except ToolFailure as failed:
            return len(spent), failed.kind
        assert all(provider == "probe" for provider, _ in spent)
        return len(spent), "ok"

    good = status(200, {})
    assert left(good) == (1, "ok")
    assert left(status(503, {}), status(429, {}), good) == (1, "ok")  # refused: nothing was charged
    assert left(reset(), good) == (2, "ok")  # nobody knows
    before = len(web.seen)
    assert left(reset(), calls=1) == (1, "budget") and len(web.seen) == before + 1
    assert left(calls=0) == (0, "budget") and len(web.seen) == before + 1


def test_nothing_is_paid_twice_where_no_connection_was_made(time_):
    spent = []
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/"
        assert kind(time_.client().request, "probe", "GET", url, spend=spent.append) == "network"
    assert spent == ["probe"] and len(time_.slept) == 3


# ---- deadlines and caps (row 11)


@pytest.mark.parametrize("fault", [drip("status"), drip("headers"), drip("body")], ids=["status", "headers", "body"])
def test_server_that_drips_holds_no_call_beyond_its_deadline(web, fault):
    web.always("file", fault)
    start = time.monotonic()
    assert kind(get, Client(), web, seconds=0.4, tries=1) == "timeout"
    assert time.monotonic() - start < GENEROUS


def test_all_tries_together_keep_the_deadline(web):
    web.always("file", drip())
    start = time.monotonic()
    assert kind(get, Client(jitter=lambda: 0.0), web, seconds=0.8, tries=4) == "timeout"
    assert len(web.seen) == 4 and time.monotonic() - start < GENEROUS


def test_server_that_accepts_and_says_nothing_or_never_shakes_hands(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for scheme in ("http", "https"):
            start = time.monotonic()
            assert kind(Client().request, "p", "GET", f"{scheme}://{address}/", seconds=0.3, tries=1) == "timeout"
            assert time.monotonic() - start < GENEROUS


def test_name_server_that_never_answers_holds_no_call():
    release = threading.Event()
    client = Client(resolve=lambda *args, **options: release.wait(60) and [])
    start = time.monotonic()
    assert kind(client.request, "p", "GET", "http://slow.example/", seconds=0.3, tries=1) == "timeout"
    assert time.monotonic() - start < GENEROUS
    release.set()


def test_silent_name_servers_of_strangers_leave_a_service_no_look_up(web):
    release, asked = threading.Event(), threading.Semaphore(0)

    def resolve(host, port, *args, **options):
        if host != "service.example":
            asked.release()
            release.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    client, url = Client(resolve=resolve), web.url.replace("127.0.0.1", "service.example")
    web.files["/x"] = b"here"
    with ThreadPoolExecutor(80) as pool:
        thumbnails = [
            pool.submit(kind, client.fetch_public, f"http://silent{n}.example/", seconds=4) for n in range(80)
        ]
        for _ in range(40):
            assert asked.acquire(timeout=GENEROUS)
        assert client.request("probe", "GET", f"{url}/x", seconds=GENEROUS, tries=1).body == b"here"
        release.set()
        assert {thumbnail.result() for thumbnail in thumbnails} <= {"blocked", "timeout"}
    assert client.request("probe", "GET", f"{url}/x").status == 200
    assert kind(client.fetch_public, "http://silent.example/") == "blocked"  # looked up: all have made room again


@pytest.mark.parametrize("fault", [endless(), bomb(100_000_000)], ids=["endless", "bomb"])
def test_no_more_is_decoded_than_the_cap(web, fault):
    web.always("file", fault)
    start = time.monotonic()
    tracemalloc.start()
    try:
        assert kind(get, Client(), web, limit=2**20) == "too-large"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < GENEROUS and len(web.seen) == 1 and peak < 8 * 2**20


def test_without_the_guard_a_bomb_goes_off_and_a_drip_holds(web):
    """What requests does by itself, for scale: it shows that the two tests above can fail."""
    import requests

    web.then("file", bomb(20_000_000))
    assert len(requests.get(web.url, timeout=5).content) == 20_000_000
    web.then("file", drip(every=0.1))
    start, reply = time.monotonic(), requests.get(web.url, timeout=0.3, stream=True)
    assert len([byte for byte, _ in zip(reply.iter_content(1), range(10))]) == 10
    assert time.monotonic() - start > 0.6  # twice its "time-out"
    reply.close()


def test_body_of_exactly_the_cap_is_read_plain_and_compressed(web):
    web.then("file", raw(b"x" * 1000), bomb(1000))
    assert len(get(Client(), web, limit=1000).body) == len(get(Client(), web, limit=1000).body) == 1000


def bare(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def tail(piece: bytes):
    """A whole gzip file of "ab", then `piece` for ever."""

    def answer(handler):
        handler.connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"ab"))
        while True:
            handler.connection.sendall(piece * 1000)

    return answer


MEMBERS = gzip.compress(b"ab") + gzip.compress(b"") + gzip.compress(b"cd" * 40_000)


@pytest.mark.parametrize(
    "fault, body",
    [
        (raw(MEMBERS, Content_Encoding="gzip"), b"ab" + b"cd" * 40_000),
        (raw(MEMBERS + b"\0" * 600, Content_Encoding="X-GZIP"), b"ab" + b"cd" * 40_000),
        (raw(gzip.compress(b"ab") + b"<!-- 3 ms -->", Content_Encoding="identity, gzip"), b"ab"),
        (tail(b"\0 tail"), b"ab"),
        (raw(zlib.compress(b"ab"), Content_Encoding="deflate"), b"ab"),
        (raw(bare(b"ab" * 9), Content_Encoding="deflate"), b"ab" * 9),
        (raw(b"", Content_Encoding="gzip"), b""),
    ],
)
def test_compressed_reply_loses_its_second_part_or_its_tail_is_kept(web, fault, body):
    web.always("file", fault)
    tracemalloc.start()
    try:
        assert get(Client(), web, seconds=GENEROUS, tries=1).body == body and tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("piece", [gzip.compress(b""), gzip.compress(b"x" * 100_000)], ids=["empty", "full"])
def test_gzip_members_without_end_pass_the_cap(web, piece):
    web.always("file", tail(piece))
    assert kind(get, Client(), web, limit=500_000, seconds=GENEROUS, tries=1) == "too-large"


@pytest.mark.parametrize(
    "fault, expected",
    [
        (raw(MEMBERS[:-9], Content_Encoding="gzip"), "format"),
        (reset(), "network"),
        (raw(b"{", Content_Length="1000"), "network"),  # promised more than it sent
        (raw(b"\x1f\x8b\x08", Content_Encoding="gzip"), "format"),
        (raw(b"no gzip", Content_Encoding="gzip"), "format"),
        (raw(b"{}", Content_Encoding="br"), "format"),
        (raw(b"", code=200, Transfer_Encoding="chunked", Content_Length="0"), "network"),
    ],
)
def test_broken_reply_is_a_failure_not_a_shorter_body(web, time_, fault, expected):
    web.always("file", fault)
    assert kind(get, time_.client(), web) == expected
    assert len(web.seen) == (4 if expected == "network" else 1)


# ---- bodies (row 12)


@pytest.mark.parametrize(
    "body",
    [b"<html><body>Just a moment...</body></html>", b'{"results": [', b"[]", b"null", b'"x"', b"7", b"", b"\xff\xfe",
     b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"],
    ids=["html", "truncated", "list", "null", "string", "number", "empty", "not utf-8", "deep", "digits"],
)  # fmt: skip
def test_what_is_no_json_object_is_a_format_failure(web, body):
    web.always("file", raw(body))
    assert kind(get(Client(), web).json) == "format"


@pytest.mark.parametrize(
    "body, text",
    [
        ({"error": "flat text"}, "flat text"),
        ({"error": {"message": "nested text", "type": "x"}}, "nested text"),
        ({"message": "of serper", "statusCode": 400}, "of serper"),
        ({"detail": "of fastapi"}, "of fastapi"),
        ({"error": None, "message": 7}, "null"),
        (["odd"], "odd"),
        ([{"error": {"message": "in a list"}}], ": in a list"),
        ({"detail": [{"loc": ["body", "topk"], "msg": "of pydantic"}]}, ": of pydantic"),
        ({"error": {"message": "Provider returned error", "metadata": {"raw": "of its own"}}}, "error: of its own"),
        ({"base_resp": {"status_code": 1004, "status_msg": "of another"}}, ": of another"),
    ],
)
def test_error_text_is_found_wherever_the_server_puts_it(web, body, text):
    web.always("file", status(400, body))
    with pytest.raises(ToolFailure, match=text):
        get(Client(), web)


def test_hostile_error_text_becomes_one_short_printable_line(web):
    web.always("file", status(400, {"error": "a\n\x1b[2Jb\u202e" + "x" * 10_000}))
    with pytest.raises(ToolFailure) as caught:
        get(Client(), web)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500


# ---- proxies


@pytest.fixture
def behind(monkeypatch, web):
    """Makes `web` the proxy that the environment names; no other host can be reached, or looked up."""

    def set_(variable="HTTP_PROXY", url="http://{}", **more):
        for name, value in {variable: url.format(web.url.removeprefix("http://")), **more}.items():
            monkeypatch.setenv(name, value)
        return Client(resolve=only_loopback, sleep=lambda seconds: None)

    return set_


def only_loopback(host, port, *args, **options):
    address = "93.184.216.34" if host == "stranger.example" else "127.0.0.1" if host.startswith("proxy") else host
    return socket.getaddrinfo(address, port, *args, **options | {"flags": socket.AI_NUMERICHOST})


def test_environment_diverts_what_is_on_this_machine_or_authenticates(web, behind, monkeypatch, tmp_path):
    client = behind("ALL_PROXY", "http://127.0.0.1:9", HTTP_PROXY="socks5://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    web.files["/x"] = b"here"
    assert get(client, web).body == b"here" and "authorization" not in web.seen[0].headers


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("url", ["http://{}", "{}", "http://me:s%40cret%2Fword@{}/"])
def test_service_is_asked_past_the_proxy(web, behind, variable, url):
    client, web.files["/x"] = behind(variable, url), b"here"
    answer = client.request("p", "GET", "http://service.example:81/x#top", params={"q": "1"}, headers={"X-Key": "k"})
    (seen,) = web.seen
    assert answer.body == b"here" and seen.path == "http://service.example:81/x?q=1"
    assert seen.headers["host"] == "service.example:81" and seen.headers["x-key"] == "k"
    word = "Basic " + base64.b64encode(b"me:s@cret/word").decode() if "@" in url else None
    assert seen.headers.get("proxy-authorization") == word


EXCEPTED = [
    ("*", True), ("service.example", True), (".service.example", True), ("*.service.example", True), ("example", True),
    ("a.example, SERVICE.EXAMPLE.", True), ("a.example,SERVICE.example", True), ("a b service.example", True),
    ("ervice.example", False), ("deep.service.example", False), ("service.example:80", True), ("", False),
    ("service.example:81", False), ("10.0.0.0/8", False), ("http://service.example", True), (",,", False),
    ("a.example;service.example", True), ("a.example|service.example", True), ("*.*", True), ("serv*", True),
]  # fmt: skip


@pytest.mark.parametrize("listed, direct", EXCEPTED)
def test_exception_from_the_proxy_is_read_otherwise(behind, listed, direct):
    behind(NO_PROXY=listed)
    assert (proxy_for("http://service.example/") is None) == direct


def test_network_or_loopback_is_not_excepted(behind, monkeypatch):
    excepted = "10.0.0.0/8 192.168.1.7,172.16.*,fd00::/8,[2001:db8::7]:443"
    behind("https_proxy", HTTP_PROXY="http://127.0.0.1:9", no_proxy=excepted)
    for host in (
        "10.1.2.3",
        "192.168.1.7",
        "172.16.3.4",
        "[fd00::1]",
        "[2001:db8::7]",
        "127.0.0.1:8000",
        "localhost",
        "[::1]",
        "a.LocalHost",
    ):
        assert proxy_for(f"https://{host}/") is None, host
    for host in ("11.1.2.3", "192.168.1.8", "[fe00::1]", "[2001:db8::7]:80", "localhost.example"):
        assert proxy_for(f"https://{host}/") is not None, host
    monkeypatch.setenv("https_proxy", "")  # none, as curl has it, whatever HTTPS_PROXY says
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert proxy_for("https://service.example/") is None


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_tls_is_not_held_to_the_name_through_a_proxy_or_the_key_is_shown_to_it(web, certificate, behind, scheme):
    client = behind(
        "HTTPS_PROXY", f"{scheme}://me:word-0123456789@proxy.right.example:{{}}".replace("{}", web.url[17:])
    )
    client.tls = ssl.create_default_context(cafile=certificate[0])
    with FakeWeb() as inner:
        if scheme == "https":
            speak_tls(web, certificate)
        speak_tls(inner, certificate)
        web.behind, inner.files["/x"] = inner.server.server_address, b"secure"
        answer = client.request("p", "GET", "https://right.example/x", headers={"X-Key": "k-0123456789"})
        (outside,), (inside,) = web.seen, inner.seen
        assert answer.body == b"secure" and outside.path == "right.example:443" and inside.path == "/x"
        assert "proxy-authorization" in outside.headers and "x-key" not in outside.headers
        assert "proxy-authorization" not in inside.headers and inside.headers["x-key"] == "k-0123456789"
        with pytest.raises(ToolFailure, match="certificate verify failed|CERTIFICATE_VERIFY_FAILED"):
            client.request("p", "GET", "https://wrong.example/x", tries=1)
        assert len(inner.seen) == 1


def test_stranger_is_asked_through_the_proxy(web, behind, connects):
    client = behind(HTTPS_PROXY=web.url)
    for scheme in ("http", "https"):
        with pytest.raises(ToolFailure, match=f"not asked through the proxy of {scheme.upper()}_PROXY") as caught:
            client.fetch_public(f"{scheme}://stranger.example/picture.jpg", tries=1)
        assert caught.value.kind == "network"
    assert kind(client.fetch_public, "http://10.0.0.1/") == "blocked"
    assert web.seen == [] and {address[0] for address in connects} == {"93.184.216.34"}


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "fault, expected",
    [(drip("status"), "timeout"), (drip("headers"), "timeout"), (drip("body"), "timeout"), (endless(), "too-large")],
)
def test_proxy_holds_a_call_or_sends_without_end(web, behind, scheme, fault, expected):
    client, start = behind("ALL_PROXY"), time.monotonic()
    web.always("file", fault), web.always("connect", fault)
    found = kind(client.request, "p", "GET", f"{scheme}://service.example/x", seconds=0.4, tries=1, limit=2**20)
    assert time.monotonic() - start < GENEROUS
    assert found == expected or scheme == "https" and found in ("network", "timeout")  # no TLS in what it sends


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_wants_a_password_is_asked_again_and_again(web, behind, scheme):
    web.always("file", status(407, {}, Proxy_Authenticate="Basic")), web.always("connect", status(407, {}))
    client = behind("ALL_PROXY", "http://me:wrong-password@{}")
    for _ in range(2):
        with pytest.raises(ToolFailure, match="wants a user name and password") as caught:
            client.request("probe", "GET", f"{scheme}://service.example/x")
        assert caught.value.kind == "auth" and "wrong-password" not in str(caught.value)
    assert len(web.seen) == 1


def test_what_the_proxy_does_not_pass_on_is_paid_for(web, behind):
    spent = []
    web.always("connect", status(502, {}))
    client = behind("HTTPS_PROXY")
    with pytest.raises(ToolFailure, match="service.example, through the proxy 127.0.0.1:.*502"):
        client.request("probe", "GET", "https://service.example/x", spend=spent.append)
    assert spent == ["probe"] and len(web.seen) == 4


def test_a_proxys_own_answer_seems_to_be_the_services(web, behind):
    client = behind("HTTP_PROXY")  # nothing is at /x, as the proxy itself says
    with pytest.raises(ToolFailure, match="probe: HTTP 404, through the proxy 127.0.0.1:[0-9]+: nothing at /x"):
        client.request("probe", "GET", "http://service.example/x")


@pytest.mark.parametrize(
    "value",
    ["socks5://{}@proxy:1080", "socks5h://proxy:1080", "http://", "http://me:{}@proxy:port", "http://me:1#{}@p"],
)
def test_proxy_that_cannot_be_used_is_told_at_the_first_search(behind, value):
    behind("ALL_PROXY", value.replace("{}", CANARY.replace("/", "#")))
    environ = {"SERPAPI_BASE_URL": "https://service.example"}
    for opened in (
        lambda: ChatServer("http://service.example", "m", "", Client()),
        lambda: Remote("http://service.example"),
        lambda: Service.from_environment("serpapi", environ),
        lambda: open_server("http://service.example", "m"),
    ):
        with pytest.raises(UserError, match="^ALL_PROXY: .*NO_PROXY") as caught:
            opened()
        assert leaks(everything_about(caught.value)) == []
    ChatServer("http://127.0.0.1:8000", "m", "", Client())


# ---- errors in a 200

TOLD = [  # what came with a 200, the kind of failure that it is, and how often it is asked
    ({"error": {"code": 429, "message": "Provider returned error"}}, "rate", 3),
    ({"error": {"code": "503", "message": "sorry"}}, "status", 3),
    ({"choices": [{"message": {"content": None}, "error": {"code": 502, "message": "sorry"}}]}, "status", 3),
    ({"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]}, "status", 3),
    ({"choices": [{"message": {"content": "half"}, "finish_reason": "network_error"}]}, "status", 3),
    ({"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]}, "status", 3),
    ({"choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, "rate", 3),
    ({"error": {"type": "overloaded_error", "message": "Overloaded"}}, "status", 3),
    ({"error_code": 18, "error_msg": "Open api qps request limit reached"}, "rate", 3),
    ({"error": "the model is loading, try again later"}, "status", 3),
    ({"object": "error", "message": "sorry", "code": 500}, "status", 3),
    ({"error": {"code": 400, "message": "no such model"}}, "status", 1),
    ({"error": {"code": 401, "message": "No auth credentials found"}}, "auth", 1),
    ({"error": {"message": "Incorrect API key provided"}}, "auth", 1),
    ({"error": {"message": "insufficient balance"}}, "credits", 1),
    ({"error": {"type": "invalid_request_error", "message": "sorry"}}, "status", 1),
]


@pytest.mark.parametrize("reply, expected, asked", TOLD)
def test_an_error_in_a_reply_of_200_is_no_reply_and_asked_again_where_it_may_pass(web, reply, expected, asked):
    web.always("openai", status(200, reply))
    assert kind(chat(web).complete, USER, 50) == expected and len(web.seen) == asked


def test_what_is_beside_a_good_reply_and_says_nothing_is_no_error(web):
    choices = [{"message": {"content": "Lisbon"}, "finish_reason": "stop", "error": None}]
    for more in ({"error": None}, {"error": ""}, {"code": 200}, {"base_resp": {"status_code": 0}}, {"detail": {}}):
        web.always("openai", status(200, {"choices": choices, **more}))
        assert chat(web).complete(USER, 50) == "Lisbon"


# ---- addresses (row 16)

LOOPBACK_FORMS = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0x7f.1", "0177.0.0.1", "017700000001",
    "127.0.0.1.", "127.8.9.10", "localhost", "LOCALHOST", "localhost.", "0.0.0.0", "0", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:127.0.0.1]",
]  # fmt: skip
FORBIDDEN_HOSTS = LOOPBACK_FORMS + [
    "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.254", "192.168.0.1", "192.168.1.1", "0xc0a80001",
    "3232235521", "0300.0250.0.1", "169.254.169.254", "169.254.170.2", "0xa9fea9fe", "2852039166",
    "0251.0376.0251.0376", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1", "192.88.99.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "0.1.2.3",
    "[::1]", "[::]", "[fe80::1]", "[fe80::1%25lo]", "[fc00::1]", "[fd00:ec2::254]", "[fec0::1]", "[ff02::1]",
    "[::ffff:10.0.0.1]", "[::ffff:169.254.169.254]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::1]", "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
    "[2001:db8::1]", "[100::1]", "[3fff::1]", "[::ffff:0:127.0.0.1]",
]  # fmt: skip
FORBIDDEN = [f"http://{host}:{{port}}/secret" for host in FORBIDDEN_HOSTS] + [
    "https://127.0.0.1:{port}/", "http://user:pass@127.0.0.1:{port}/", "http://example.com@127.0.0.1:{port}/",
    "http://example.com:80@127.0.0.1:{port}/", "http://127.0.0.1:{port}#@example.com/",
    "http://127.0.0.1:{port}\\@example.com/", "http://example.com\\@127.0.0.1:{port}/", "http:///127.0.0.1:{port}/",
    "http:127.0.0.1:{port}", "//127.0.0.1:{port}/", "file:///etc/passwd", "FILE:///etc/passwd", "gopher://127.0.0.1:{port}/_x",
    "ftp://127.0.0.1:{port}/", "dict://127.0.0.1:{port}/", "data:text/plain,x", "javascript:alert(1)", "http://", "",
    "http://[::1", "http://127.0.0.1:{port}\r\nX: y/", " http://127.0.0.1:{port}/", "http://①②⑦.⓪.⓪.①:{port}/",
    "http://127。0。0。1:{port}/", "http://%31%32%37.0.0.1:{port}/", "http://" + "a" * 300 + "/",
]  # fmt: skip
LITERAL = {"example.com": "127.0.0.1"}  # a backslash may hide where a host ends; whatever is looked up is not public


@pytest.fixture
def no_names(monkeypatch):
    real = socket.getaddrinfo

    def local(host, port, *args, **options):
        try:
            return real(LITERAL.get(host, host), port, *args, **options | {"flags": socket.AI_NUMERICHOST})
        except OSError:
            if host.lower().rstrip(".") == "localhost":
                return real("127.0.0.1", port, *args, **options)
            raise

    return local


def test_there_are_enough_forbidden_addresses():
    assert len(set(FORBIDDEN)) > 90


def test_forbidden_address_is_never_connected_to(web, connects, no_names):
    web.files["/secret"] = web.files["/"] = b"internal"
    client, kinds = Client(resolve=no_names), {}
    for url in FORBIDDEN:
        kinds[url] = kind(client.fetch_public, url.format(port=web.url.rpartition(":")[2]), tries=1)
    assert connects == [] and web.seen == []
    assert set(kinds.values()) <= {"blocked", "network", "format"}
    assert sum(found == "blocked" for found in kinds.values()) > 80, kinds


def test_without_the_guard_the_same_addresses_reach_the_inside(web, connects, no_names, monkeypatch):
    monkeypatch.setattr(guarded, "require_public", lambda address: None)
    web.files["/secret"] = b"internal"
    client, port = Client(resolve=no_names), web.url.rpartition(":")[2]
    reached = []
    for host in LOOPBACK_FORMS:
        try:
            reached.append(client.fetch_public(f"http://{host}:{port}/secret", tries=1).body)
        except ToolFailure:
            pass
    assert reached.count(b"internal") >= 12 and len(connects) >= 12


@pytest.mark.parametrize(
    "link, address",
    [
        ("http://host/a/../../x", "http://host/x"),
        ("http://host/../../..", "http://host/"),
        ("http://host/a/%2e%2E/.%2e/b/./c?q=../x#../y", "http://host/b/c?q=../x#../y"),
        ("http://host/a/b/..", "http://host/a/"),
        (" http://host/..b/.well-known/... ", "http://host/..b/.well-known/..."),
        *[(link, "") for link in ("http://../x", "http://%2e%2e/x", "http://./x", "http://user:pass@host/", "http://:80/",
                                  "http://a%2f..%2fb/", "http://host\\..\\x", "http://host/\n../x", "http://ho\tst/",
                                  "//host/x", "javascript:x", "http://host:x/", "", None, 7, b"http://host/")],
    ],
)  # fmt: skip
def test_a_link_is_asked_for_as_a_browser_would_or_not_at_all(link, address):
    assert web_address(link) == address


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "1.1.1.1"])
def test_public_address_is_let_pass(address):
    require_public(address)


def test_loopback_is_added_for_tests_and_nothing_else(web, connects, no_names, loopback):
    web.files["/secret"] = b"internal"
    client, port = Client(resolve=no_names), web.url.rpartition(":")[2]
    assert client.fetch_public(f"http://127.0.0.1:{port}/secret").body == b"internal"
    connects.clear()
    for host in set(FORBIDDEN_HOSTS) - set(LOOPBACK_FORMS) - {"[::1]"}:
        kind(client.fetch_public, f"http://{host}:{port}/secret", tries=1)
    assert connects == []


def test_redirect_to_a_forbidden_address_is_not_followed(web, connects, no_names, loopback):
    """The first hop is loopback, allowed here; the second is what the server would have us read."""
    client, port = Client(resolve=no_names), web.url.rpartition(":")[2]
    forbidden = [f"http://{host}/" for host in set(FORBIDDEN_HOSTS) - set(LOOPBACK_FORMS) - {"[::1]"}]
    for url in forbidden + [
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://a:b@127.0.0.1/",
        "http://[::1",
        "data:,",
    ]:
        web.then("file", redirect(url.replace("%25lo", "")))
        assert kind(client.fetch_public, f"{web.url}/start", tries=1) in ("blocked", "network", "format"), url
    assert {address[0] for address in connects} == {"127.0.0.1"} and len(connects) == len(forbidden) + 5
    assert len(web.seen) == len(connects)  # nothing but the first hops, and port is ours
    assert all(address[1] == int(port) for address in connects)


def test_redirects_are_followed_five_times_and_may_be_relative(web, loopback):
    web.files["/end"] = b"there"
    web.then("file", *[redirect("/next", code) for code in (301, 302, 303, 307)], redirect("end"))
    answer = Client().fetch_public(f"{web.url}/start")
    assert answer.body == b"there" and answer.url == f"{web.url}/end"
    web.always("file", redirect("/again"))
    web.seen.clear()
    assert kind(Client().fetch_public, f"{web.url}/start") == "blocked" and len(web.seen) == 6


def rebinding():
    """A name server that gives a public address first, and the loopback address from then on."""
    answers = iter(["93.184.216.34"])

    def resolve(host, port, *args, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers, "127.0.0.1"), port))]

    return resolve


def test_name_that_changes_its_address_after_the_check_leads_nowhere_else(web, connects):
    client = Client(resolve=rebinding())
    url = f"http://rebind.example:{web.url.rpartition(':')[2]}/secret"
    assert kind(client.fetch_public, url, tries=1) == "network"
    assert kind(client.fetch_public, url, tries=1) == "blocked"
    assert [address[0] for address in connects] == ["93.184.216.34"] and web.seen == []


def test_check_then_connect_by_name_falls_for_rebinding(web, connects):
    """The attack works against the usual guard, which looks the name up twice."""
    web.files["/secret"], resolve, port = b"internal", rebinding(), int(web.url.rpartition(":")[2])
    require_public(resolve("rebind.example", port)[0][4][0])
    answer = Client(resolve=resolve).request("p", "GET", f"http://rebind.example:{port}/secret")
    assert answer.body == b"internal"


def test_one_private_address_among_public_ones_is_enough_to_refuse(connects):
    def resolve(host, port, *args, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("93.184.216.34", "10.0.0.1")]

    assert kind(Client(resolve=resolve).fetch_public, "http://both.example/") == "blocked" and connects == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=right.example",
         "-addext", "subjectAltName=DNS:right.example,DNS:proxy.right.example", "-keyout", "key.pem",
         "-out", "cert.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


def speak_tls(web, certificate) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    web.server.socket = context.wrap_socket(web.server.socket, server_side=True)


@pytest.mark.parametrize(
    "host, trusted, works", [("right", True, True), ("wrong", True, False), ("right", False, False)]
)
def test_tls_holds_the_certificate_to_the_name_though_an_address_is_dialled(
    web, certificate, loopback, host, trusted, works
):
    cert = certificate[0]
    speak_tls(web, certificate)
    web.files["/x"] = b"secure"
    port = int(web.url.rpartition(":")[2])
    client = Client(resolve=lambda *args, **options: socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM))
    client.tls = ssl.create_default_context(cafile=cert if trusted else None)
    url = f"https://{host}.example:{port}/x"
    if works:
        assert client.fetch_public(url).body == b"secure"
    else:
        with pytest.raises(ToolFailure, match="CERTIFICATE_VERIFY_FAILED|certificate verify failed|mismatch"):
            client.fetch_public(url, tries=1)


@pytest.mark.parametrize("variable", wire.AUTHORITIES)
def test_certificates_that_the_environment_names_are_not_read(web, certificate, monkeypatch, tmp_path, variable):
    speak_tls(web, certificate)
    port = int(web.url.rpartition(":")[2])
    address = socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)

    def ask():
        client = Client(resolve=lambda *args, **options: address)
        return client.request("p", "GET", f"https://right.example:{port}/", tries=1)

    with pytest.raises(ToolFailure, match="VERIFY_FAILED.*REQUESTS_CA_BUNDLE names"):
        ask()
    monkeypatch.setenv(variable, str(certificate[0]))
    with pytest.raises(ToolFailure, match="HTTP 404"):
        ask()
    for folders in (f"{tmp_path}", f"{tmp_path}:{tmp_path}"):  # of certificates, without any
        monkeypatch.setenv(variable, folders)
        assert kind(ask) == "network"
    (tmp_path / "empty.pem").touch()
    for wrong in ("empty.pem", "absent.pem"):
        monkeypatch.setenv(variable, str(tmp_path / wrong))
        with pytest.raises(UserError, match=f"^{variable} .*{wrong}: no certificates") as caught:
            Client()
        assert "\n" not in str(caught.value)


# ---- keys (row 22)


@pytest.fixture
def canary(monkeypatch):
    monkeypatch.setattr(wire, "_secrets", ())
    return keep_secret(f" {CANARY}\n")


def everything_about(error: BaseException) -> str:
    """All texts of an exception and of what it was raised from."""
    texts = ["".join(traceback.format_exception(error))]
    while error is not None:
        texts += [str(error), repr(error), repr(error.args), repr(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


TOKEN = base64.b64encode(f"me:{CANARY}".encode()).decode()  # as a proxy gets it


def leaks(text: str) -> list[str]:
    return [form for form in (CANARY, "canary%2Bkey", "canary+key", "0123456789", TOKEN) if form in text]


PATHS = {
    "refused": status(401, {"error": f"Invalid API key: {CANARY}"}),
    "throttled": status(429, {"error": f"{CANARY} is too fast"}),
    "echo": lambda handler: status(500, {"error": str(handler.headers)})(handler),
    "down": status(500, {"error": {"message": f"down for {CANARY}"}}),
    "html": raw(f"<html>{CANARY}</html>".encode(), kind="text/html"),
    "html 404": raw(f"<html>{CANARY}</html>".encode(), 404, kind="text/html"),
    "list": status(200, [CANARY]),
    "redirect": redirect(f"http://127.0.0.1:1/?api_key={CANARY}"),
    "reset": reset(),
    "short": raw(CANARY.encode(), Content_Length="9999"),
    "no gzip": raw(CANARY.encode(), Content_Encoding=CANARY),
    "status line": lambda handler: handler.connection.sendall(f"{CANARY} {handler.path}\r\n\r\n".encode()),
    "header": lambda handler: handler.connection.sendall(f"HTTP/1.0 200 OK\r\nX: {CANARY}\r\n".encode() * 200),
    "drip": drip("headers"),
    "large": endless(),
}


def leaked(web, caplog, url=None, **content) -> dict[str, list[str]]:
    found = {}
    for name, fault in PATHS.items():
        caplog.clear()
        web.always("file", fault), web.always("connect", fault)
        client = Client(sleep=lambda seconds: None, jitter=lambda: 0.0)
        with pytest.raises(ToolFailure) as caught, caplog.at_level(logging.DEBUG):
            client.request("probe", "GET", url or web.url, seconds=0.6, tries=2, limit=10_000, **content).json()
        if forms := leaks(everything_about(caught.value) + caplog.text + repr(client._providers)):
            found[name] = forms
    return found


SENDINGS = [
    {"params": {"q": "x", "api_key": CANARY}},
    {"headers": {"Authorization": f"Bearer {CANARY}"}},
    {"data": {"api_key": CANARY}, "files": {"image": b"x"}},
    {"json": {"key": CANARY}},
]


@pytest.mark.first_is_quick
@pytest.mark.parametrize("content", SENDINGS, ids=["address", "header", "form", "json"])
def test_no_error_path_tells_the_key(web, caplog, canary, content):
    assert leaked(web, caplog, **content) == {}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_error_path_tells_the_proxys_password(web, caplog, behind, monkeypatch, scheme):
    monkeypatch.setattr(wire, "_secrets", ())
    behind("ALL_PROXY", f"http://me:{quote(CANARY, safe='')}@{{}}")
    assert leaked(web, caplog, f"{scheme}://service.example/") == {} and TOKEN in str(web.seen[0].headers)
    assert leaks(repr(proxy_for("http://service.example/"))) == []


def test_without_redaction_most_error_paths_tell_the_key(web, caplog, monkeypatch):
    monkeypatch.setattr(wire, "_secrets", ())
    found = leaked(web, caplog, params={"api_key": CANARY})
    assert len(found) >= len(PATHS) - 3  # by the log line of the request, if by nothing else


@pytest.mark.parametrize(
    "url", ["http://no such host/", "http://[::1/", "nonsense", "ftp://x/", "http://127.0.0.1:1/", "http://x.invalid/"]
)
def test_address_that_cannot_be_asked_does_not_tell_the_key(caplog, canary, url):
    def nowhere(*args, **options):
        raise socket.gaierror(-2, f"unknown name, asked with {CANARY}")

    client = Client(resolve=nowhere, sleep=lambda seconds: None)
    with pytest.raises(ToolFailure) as caught, caplog.at_level(logging.DEBUG):
        client.request("probe", "GET", url, params={"api_key": canary}, seconds=1)
    assert leaks(everything_about(caught.value) + caplog.text) == []


@pytest.mark.slow
@pytest.mark.parametrize("value", [CANARY + "\nX: y", CANARY + "\u2026"])
def test_key_that_no_header_can_hold_is_not_told(web, canary, value):
    with pytest.raises(ToolFailure) as caught:
        Client().request("probe", "GET", web.url, headers={"X-API-KEY": value})
    assert leaks(everything_about(caught.value)) == []


def test_echoed_key_does_not_come_back_in_a_body(web, canary):
    web.always("file", status(200, {"title": f"your key is {CANARY}"}, X_Key=CANARY))
    answer = get(Client(), web, params={"api_key": CANARY})
    assert leaks(repr(answer)) == [] and answer.json() == {"title": "your key is [key]"}


def test_short_placeholder_keys_are_not_cut_out_of_pages(canary):
    keep_secret("EMPTY")
    assert redact("EMPTY words") == "EMPTY words"


# ---- chat


def chat(web, client=None, **options) -> ChatServer:
    return ChatServer(web.url, "qwen", "chat-key-0123456789", client or Time().client(), **options)


USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "said, heard",
    [
        ("Lisbon", "Lisbon"),
        ("<think>\nLisbon? No.\n</think>\n\nPorto", "Porto"),
        ("Lisbon? No.</think> Porto", "Porto"),
        ("◁think▷Lisbon?◁/think▷Porto", "Porto"),
        ("<thinking>Lisbon?</thinking>Porto", "Porto"),
        ("<think></think>Porto <think>sure?</think>", "Porto"),
        (
            [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Porto"}],
            "Porto",
        ),
        ([{"type": "text", "text": "Por"}, {"type": "output_text", "text": "to"}, {"type": "image_url"}], "Porto"),
    ],
)
def test_thoughts_are_no_part_of_an_answer(web, said, heard):
    web.answer = lambda body: said
    assert chat(web).complete(USER, 50) == heard


@pytest.mark.parametrize("said", ["<think>still thinking when the tokens ran out", "", " ", None, ["x"], {"a": 1}, 7])
def test_answer_that_is_none_is_a_failure_not_an_empty_text(web, said):
    web.answer = lambda body: said
    assert kind(chat(web).complete, USER, 50) == "format"


@pytest.mark.parametrize(
    "reply",
    [{}, {"choices": []}, {"choices": [None]}, {"choices": [{"message": "x"}]}, {"choices": "x"}, {"error": "e"}],
)
def test_wrongly_typed_chat_reply_is_a_format_failure(web, reply):
    web.always("openai", status(200, reply))
    assert kind(chat(web).complete, USER, 50) == "format"


@pytest.mark.parametrize(
    "choice, expected, words",
    [
        ({"finish_reason": "content_filter", "message": {"content": "Lis"}}, "blocked", "withheld .*: content_filter"),
        ({"finish_reason": "content_filter: SAFETY", "message": {"content": ""}}, "blocked", "SAFETY"),
        ({"finish_reason": "sensitive"}, "blocked", "sensitive"),
        ({"finish_reason": "IMAGE_SAFETY", "message": {"content": ""}}, "blocked", "IMAGE_SAFETY"),
        ({"finish_reason": "guardrail_intervened", "message": {"content": "No."}}, "blocked", "guardrail"),
        ({"finish_reason": "MAX_TOKENS", "message": {"content": ""}}, "format", "no answer in 50 tokens"),
        ({"message": {"content": None, "refusal": "I cannot help"}}, "blocked", "withheld its answer: I cannot help"),
        ({"message": {"content": None, "reasoning_content": "Lisbon?"}}, "format", "thoughts and no answer"),
        ({"message": {"content": "", "reasoning": "Lisbon?"}}, "format", "thoughts and no answer"),
        ({"finish_reason": "length", "message": {"content": None}}, "format", "no answer in 50 tokens"),
        ({"finish_reason": "length", "message": {"content": "<think>Lis"}}, "format", "no answer in 50 tokens"),
        ({"finish_reason": "stop", "message": {"content": [{"type": "text", "text": 7}]}}, "format", "no answer in it"),
    ],
)
def test_what_was_kept_back_is_not_an_empty_answer_and_not_asked_for_again(web, choice, expected, words):
    web.always("openai", status(200, {"choices": [choice]}))
    with pytest.raises(ToolFailure, match=words) as caught:
        chat(web).complete(USER, 50)
    assert caught.value.kind == expected and len(web.seen) == 1


def test_half_an_answer_is_no_turn_of_a_teacher_and_no_judgement(web):
    web.always("openai", status(200, {"choices": [{"finish_reason": "length", "message": {"content": "CORRECT is"}}]}))
    assert chat(web).complete(USER, 9) == "CORRECT is", "a summary may be cut"
    with pytest.raises(ToolFailure, match="no whole answer in 9 tokens"):
        open_server(web.url, "judge").complete(USER, 9)


def test_openais_key_goes_to_a_judge_of_ones_own(web, monkeypatch):
    web.always("openai", status(200, {"choices": [{"message": {"content": "Verdict: CORRECT"}}]}))
    monkeypatch.setenv("OPENAI_API_KEY", "key-0123456789abcdef")
    for own, sent in (
        (None, "Bearer key-0123456789abcdef"),
        ("key-of-the-judge", "Bearer key-of-the-judge"),
        ("", None),
    ):
        if own is not None:
            monkeypatch.setenv("JUDGE_API_KEY", own)
        open_server(web.url, "m", judge_variable()).complete(USER, 9)
        assert web.seen[-1].headers.get("authorization") == sent


@pytest.mark.parametrize(
    "named, asked",
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h/", "http://h/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1/chat/completions"),
        ("https://g.example/v1beta/openai/", "https://g.example/v1beta/openai/chat/completions"),
        ("https://z.example/api/paas/v4", "https://z.example/api/paas/v4/chat/completions"),
        ("https://v.example/api/v3/chat/completions/", "https://v.example/api/v3/chat/completions"),
        ("https://a.example/openai/deployments/d?api-version=1", "https://a.example/openai/deployments/d/chat/completions?api-version=1"),
        ("https://a.example?tenant=1", "https://a.example/v1/chat/completions?tenant=1"),
        ("https://a.example/d/chat/completions?api-version=1", "https://a.example/d/chat/completions?api-version=1"),
    ],
)  # fmt: skip
def test_v1_is_put_under_no_path_that_a_server_has_of_its_own(named, asked):
    assert chat_address(named) == asked


def test_azure_finds_version_and_key_where_it_looks(web):
    server = ChatServer(f"{web.url}/openai/deployments/d?api-version=2024-10-21", "d", "azure-key-0123456789", Client())
    server.complete(USER, 9)
    (seen,) = web.calls("openai")
    assert seen.path == "/openai/deployments/d/chat/completions?api-version=2024-10-21"
    assert seen.headers["api-key"] == "azure-key-0123456789"


def test_chat_request_has_the_standard_fields(web):
    ChatServer(web.url, "qwen", "", Client()).complete([{"role": "user", "content": [picture_part(picture())]}], 9)
    assert {seen.path for seen in web.seen} == {"/v1/chat/completions"}
    body = web.seen[0].json()
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    del body["messages"]
    thoughts = {"enable_thinking": False}
    assert body == {"model": "qwen", "max_tokens": 9, "temperature": 0.0, "chat_template_kwargs": thoughts}
    assert "authorization" not in web.seen[0].headers


def test_a_pictures_private_words_or_an_odd_media_type_go_to_a_model():
    def sent(data: bytes) -> tuple[str, bytes]:
        kind, _, text = picture_part(data)["image_url"]["url"].partition(";base64,")
        return kind, base64.b64decode(text)

    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        full, bare = private(kind)
        assert sent(full) == (f"data:image/{kind.lower()}", bare)
    several = saved(scene(), "MPO", save_all=True, append_images=[scene()])
    assert sent(several)[0] == "data:image/jpeg"  # not image/mpo, which no server knows
    kind, upright = sent(turned(6, "PNG"))
    assert kind == "data:image/jpeg" and decode(upright).size == decode(upright, upright=False).size == (48, 32)


def test_what_is_sent_again_bears_the_same_key_and_another_call_does_not(web):
    server = ChatServer(web.url, "m", "", Client(sleep=lambda seconds: None))
    web.then("openai", status(503, {"error": "busy"}))
    for text in ("a", "a", "b"):
        server.complete([{"role": "user", "content": text}], 9)
    keys = [seen.headers["idempotency-key"] for seen in web.calls("openai")]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_field_that_a_server_does_not_know_is_left_out_from_then_on(web):
    def answer(handler):
        body = web.seen[-1].json()
        if refused := [name for name in ("chat_template_kwargs", "max_tokens") if name in body]:
            fault = status(400, {"error": {"message": f"Unsupported parameter: '{refused[0]}' is not supported"}})
        else:
            fault = status(200, {"choices": [{"message": {"content": "yes"}}]})
        fault(handler)

    web.always("openai", answer)
    server = chat(web)
    assert [server.complete(USER, 5) for _ in range(3)] == ["yes"] * 3
    assert len(web.seen) == 5 and web.seen[-1].json()["max_completion_tokens"] == 5


REFUSALS = [  # of a field, in the words of many servers
    "Unrecognized request argument supplied: FIELD",
    "`FIELD` is deprecated for this model.",
    "Unsupported value: 'FIELD' does not support 0 with this model. Only the default (1) value is supported.",
    'Invalid JSON payload received. Unknown name "FIELD": Cannot find field.',
    "property 'FIELD' is unsupported",
    "FIELD and top_p cannot both be specified for this model. Please use only one.",
    "invalid FIELD: only 1 is allowed for this model",
    "Additional properties are not allowed ('FIELD' was unexpected)",
    "FIELD is no longer available: use another",
    "Validation: \\u0027FIELD\\u0027 not permitted",
    {"message": "Unsupported parameter", "param": "FIELD", "code": "unsupported_parameter"},
    {"message": "Provider returned error", "metadata": {"raw": '{"message":"bad \\"FIELD\\""}'}},
]


@pytest.mark.parametrize("field", ["temperature", "chat_template_kwargs", "max_tokens"])
@pytest.mark.parametrize("words", REFUSALS)
def test_a_field_is_left_out_in_whatever_words_it_is_refused(web, words, field):
    error = json.loads(json.dumps(words).replace("FIELD", field))
    codes = iter([400, 422])

    def answer(handler):
        known = field not in web.seen[-1].json()
        (status(200, GOOD) if known else status(next(codes), {"error": error}))(handler)

    web.always("openai", answer)
    server = chat(web)
    assert [server.complete(USER, 5) for _ in range(2)] == ["yes"] * 2 and len(web.seen) == 3
    others = {"temperature", "chat_template_kwargs", "max_tokens", "max_completion_tokens"} & web.seen[-1].json().keys()
    left = {"temperature", "chat_template_kwargs", "max_tokens"} - {field}
    assert others == (left | {"max_completion_tokens"} if field == "max_tokens" else left)


GOOD = {"choices": [{"message": {"content": "yes"}}]}


def test_a_field_is_kept_that_is_refused_by_what_it_holds(web):
    web.then("openai", status(400, {"error": {"message": "enable_thinking is not supported by this model"}}))
    assert chat(web).complete(USER, 5) and "chat_template_kwargs" not in web.seen[-1].json()


def test_fields_are_refused_all_at_once_in_a_list_and_within_a_200(web):
    said = [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
            for name in ("temperature", "chat_template_kwargs")]  # fmt: skip
    web.then("openai", status(422, {"detail": said}), status(200, {"error": {"message": "unsupported: max_tokens"}}))
    web.then("openai", status(400, {"message": "max_completion_tokens: unknown field"}))
    assert chat(web).complete(USER, 5) == "The bridge crosses the Tagus." and len(web.seen) == 4
    assert web.seen[-1].json().keys() == {"model", "messages"}


@pytest.mark.parametrize(
    "code, words, asked",
    [
        (400, "max_tokens is too large: the context has 4096 tokens", 1),
        (400, "'max_tokens' or 'max_completion_tokens' is too large: 9000. This model supports at most 4096", 1),
        (400, "maximum context length is 4096 tokens; reduce the messages or max_tokens", 1),
        (400, "the messages are empty", 1),
        (403, "temperature is not for you", 1),
        (400, "the question about temperature is bad", 2),  # tried without, in vain
    ],
)
def test_refusal_that_only_mentions_a_field_is_final_and_not_remembered(web, code, words, asked):
    web.always("openai", status(code, {"error": {"message": words}}))
    server = chat(web)
    assert kind(server.complete, USER, 9000) in ("status", "forbidden") and len(web.seen) == asked
    assert not server.refused_fields


def test_hundreds_of_calls_in_flight_get_each_its_own_answer(web):
    web.delay, web.answer = 0.05, lambda body: body["messages"][0]["content"].upper()
    server = chat(web, Client())
    with ThreadPoolExecutor(200) as pool:
        said = list(pool.map(lambda n: server.complete([{"role": "user", "content": f"call {n}"}], 9), range(400)))
    assert said == [f"CALL {n}" for n in range(400)]
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
