"""The search server: its protocol, what it refuses, and that it is still there afterwards."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from helpers import in_threads, picture_bytes

from mmsr.episode import Hit, Observation
from mmsr.search import serve
from mmsr.system.errors import UserError
from mmsr.tools import ToolFailure

ROOT = Path(__file__).parents[2]
ADDRESS = ("url", "link")  # as it is called, and as it was called
PICTURE = base64.b64encode(picture_bytes(60, 40)).decode()


class Engine:
    """A search engine whose query says what it does."""

    def __init__(self):
        self.release, self.running = threading.Event(), threading.Semaphore(0)

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        hits = [Hit(f"title {question}", "http://a.example", image=b"jpeg", score=0.5), Hit("bare", score=float("nan"))]
        return Observation(tuple(hits), source="engine")

    def text_search(self, query: str) -> Observation:
        if query == "wait":
            self.running.release()
            assert self.release.wait(30)
        if query == "quota":
            raise ToolFailure("budget", "no searches left")
        if query == "bug":
            raise KeyError("hits")
        if query == "value":
            return Observation(ok=False, error="timeout: too slow")
        hits = [Hit(f'"{query}"\n page {i}', f"http://a.example/{i}", f"text {i}", score=1 / (i + 1)) for i in range(3)]
        return Observation(tuple(hits) if query != "nothing" else (), source="engine")


@pytest.fixture
def server():
    engine = Engine()
    found = serve.Server(engine, "test", port=0)
    found.engine = engine
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield found
    found.engine.release.set()
    found.shutdown()
    thread.join()
    found.server_close()


def address(server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def post(server, path: str, body, **options) -> requests.Response:
    return requests.post(address(server, path), json=body, timeout=20, **options)


def alive(server) -> bool:
    return requests.get(address(server, "/health"), timeout=20).json() == {"ok": True, "search": "test"}


def raw(server, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What comes back for bytes sent as they are."""
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            return b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:
            return b""


# ---- the protocol


def test_a_search_r1_client_does_not_understand(server):
    body = {"queries": ["one", "nothing"], "topk": 2, "return_scores": True}
    documents = [{"id": f"http://a.example/{i}", "contents": f'""one" page {i}"\ntext {i}'} for i in range(2)]
    scored = [{"document": documents[0], "score": 1.0}, {"document": documents[1], "score": 0.5}]
    assert post(server, "/retrieve", body).json() == {"result": [scored, []]}
    title, _, text = scored[0]["document"]["contents"].partition("\n")  # as its clients take it apart
    assert (title, text) == ('""one" page 0"', "text 0")
    assert post(server, "/retrieve?x=1", {**body, "return_scores": False}).json() == {"result": [documents, []]}
    for said, meant in [
        ("true", [scored]),
        ("True", [scored]),
        (1, [scored]),
        ("false", [documents]),
        (0, [documents]),
        (1.0, [scored]),
        ("n", [documents]),
    ]:
        assert post(server, "/retrieve", {"query": "one", "topk": 2, "return_scores": said}).json()["result"] == meant
    assert len(post(server, "/retrieve", {"query": "one"}).json()["result"][0]) == 3
    assert post(server, "/retrieve", {"queries": [], "topk": None}).json() == {"result": []}


def test_an_image_search_loses_a_field(server):
    reply = post(server, "/image_search", {"image": PICTURE, "topk": 5, "question": "who?"})
    thumbnail = base64.b64encode(b"jpeg").decode()
    assert reply.json()["results"] == [
        {"title": "title who?", "score": 0.5, "thumbnail": thumbnail, "text": ""}
        | dict.fromkeys(ADDRESS, "http://a.example"),
        {"title": "bare", "score": None, "thumbnail": None, "text": ""} | dict.fromkeys(ADDRESS, ""),
    ]
    wrapped = base64.encodebytes(base64.b64decode(PICTURE)).decode()
    for encoded in (PICTURE, wrapped, wrapped.replace("\n", "\r\n"), f"data:image/png;base64,{PICTURE}"):
        assert len(post(server, "/image_search/", {"image": encoded, "topk": 1}).json()["results"]) == 1


@pytest.mark.parametrize(
    "query, kind, message",
    [("quota", "budget", "no searches left"), ("bug", "KeyError", "'hits'"), ("value", "timeout", "too slow")],
)
def test_a_failed_search_looks_like_no_results(server, query, kind, message):
    reply = post(server, "/retrieve", {"queries": ["one", query]})
    assert reply.status_code == 502 and reply.json() == {"error": message, "kind": kind} and alive(server)


def test_queries_of_a_request_wait_for_each_other(server):
    replies = []
    body = {"queries": ["wait"] * 8}
    asking = threading.Thread(target=lambda: replies.append(post(server, "/retrieve", body).json()))
    asking.start()
    for _ in range(8):
        assert server.engine.running.acquire(timeout=20)
    server.engine.release.set()
    asking.join(20)
    assert len(replies[0]["result"]) == 8


def test_a_clients_key_is_logged(server, capsys):
    assert raw(server, b"GET /search?api_key=canary-0123456789 HTTP/1.0\r\n\r\n").split()[1] == b"404"
    told = capsys.readouterr().err
    assert "/search?[key]" in told and "canary" not in told


def test_a_probe_by_head_is_answered_with_a_body_or_an_error(server):
    for path, status in [("/health", 200), ("/nothing", 404)]:
        answer = raw(server, f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
        assert int(answer.split()[1]) == status and answer.endswith(b"\r\n\r\n")


# ---- what is refused


BAD_BODIES = {
    "no json": ("/retrieve", b"hello", 400),
    "not utf-8": ("/retrieve", b"\xff\xfe\x00", 400),
    "nested": ("/retrieve", b"[" * 100_000, 400),
    "a list": ("/retrieve", b"[]", 400),
    "empty": ("/retrieve", b"", 400),
    "no queries": ("/retrieve", b"{}", 400),
    "a number as queries": ("/retrieve", b'{"queries": 5}', 400),
    "a number among queries": ("/retrieve", b'{"queries": ["a", 5]}', 400),
    "too many queries": ("/retrieve", json.dumps({"queries": ["a"] * 1025}).encode(), 400),
    "topk zero": ("/retrieve", b'{"query": "a", "topk": 0}', 400),
    "topk true": ("/retrieve", b'{"query": "a", "topk": true}', 400),
    "topk infinite": ("/retrieve", b'{"query": "a", "topk": Infinity}', 400),
    "scores perhaps": ("/retrieve", b'{"query": "a", "return_scores": "perhaps"}', 400),
    "lists in lists": ("/retrieve", b'{"queries": [' + b"[]," * 300_000 + b"[]]}", 413),
    "topk text": ("/retrieve", b'{"query": "a", "topk": "3"}', 400),
    "no image": ("/image_search", b"{}", 400),
    "image a list": ("/image_search", b'{"image": []}', 400),
    "no base64": ("/image_search", b'{"image": "%%%"}', 400),
    "no ascii": ("/image_search", '{"image": "é"}'.encode(), 400),
    "a pdf": ("/image_search", json.dumps({"image": base64.b64encode(b"%PDF-1.7").decode()}).encode(), 400),
    "an elongated one": (
        "/image_search",
        json.dumps({"image": base64.b64encode(picture_bytes(1000, 1)).decode()}).encode(),
        400,
    ),
    "question a number": ("/image_search", json.dumps({"image": PICTURE, "question": 5}).encode(), 400),
    "unknown path": ("/search", b"{}", 404),
    "up": ("/../retrieve", b"{}", 404),
    "up, encoded": ("/%2e%2e/etc/passwd", b"{}", 404),
    "up inside": ("/retrieve/../retrieve", b"{}", 404),
    "unknown path, long body": ("/search", b" " * 5_000_000, 404),
    "post health": ("/health", b"{}", 404),
}


@pytest.mark.parametrize("what", BAD_BODIES)
def test_a_wrong_request_is_answered_or_kills_the_server(server, what):
    path, body, status = BAD_BODIES[what]
    client = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    client.request("POST", path, body)  # the path as it is; requests would tidy it up
    reply = client.getresponse()
    said = json.loads(reply.read())
    assert reply.status == status and said["error"] and "\n" not in said["error"] and alive(server)


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1:99", 200), ("[::1]:8000", 200), ("127.1.2.3", 200),
        ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil", 403),
        ("169.254.169.254", 403), ("", 403), ("0.0.0.0", 403), ("localhost:80@evil.example", 403), ("[::1]x", 403),
    ],
)  # fmt: skip
def test_dns_rebinding_reaches_a_loopback_server(server, host, status):
    reply = requests.get(address(server, "/health"), headers={"Host": host}, timeout=20)
    assert reply.status_code == status and ("error" in reply.json()) == (status == 403)


def test_a_web_page_can_spend_our_searches(server):
    reply = post(server, "/retrieve", {"query": "a"}, headers={"Origin": "http://localhost:3000"})
    assert reply.status_code == 403 and "result" not in reply.json()


def test_a_server_for_others_refuses_their_name_for_it():
    server = serve.Server(Engine(), "test", host="0.0.0.0", port=0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    try:
        reply = requests.get(address(server, "/health"), headers={"Host": "gpu-7.example"}, timeout=20)
        assert reply.status_code == 200
    finally:
        server.shutdown()
        server.server_close()


def test_it_listens_to_others_by_default():
    server = serve.Server(Engine(), "test", port=0)
    server.server_close()
    assert server.server_address[0] == "127.0.0.1" and server.loopback


def test_a_huge_body_is_read_into_memory(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_BODY", 1000)
    reply = post(server, "/retrieve", {"query": "a" * 3000})
    assert reply.status_code == 413 and "1,000 bytes" in reply.json()["error"]
    for length in ("99999999999999", "-1", "+5", "1e3", "٣", "0" * 5000, "", "5, 5"):
        head = f"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
        with socket.create_connection(server.server_address[:2], timeout=20) as connection:
            connection.sendall(head)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100).split()[1] in (b"411", b"413"), length
    chunked = b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    assert raw(server, chunked).split()[1] == b"411" and alive(server)


def test_large_bodies_at_a_time_add_up(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_HELD", 3000)
    body, replies = {"query": "wait", "more": "x" * 2000}, []
    asking = threading.Thread(target=lambda: replies.append(post(server, "/retrieve", body).status_code))
    asking.start()
    assert server.engine.running.acquire(timeout=20)
    busy = post(server, "/retrieve", body)
    assert busy.status_code == 503 and int(busy.headers["Retry-After"]) > 0 and "\n" not in busy.json()["error"]
    assert post(server, "/retrieve", {"query": "small"}).status_code == 200
    server.engine.release.set()
    asking.join(20)
    assert replies == [200] and post(server, "/retrieve", body).status_code == 200
    monkeypatch.setattr(serve, "SECONDS_TO_SEND", 0.3)
    assert raw(server, b"POST /retrieve HTTP/1.0\r\nContent-Length: 2500\r\n\r\n{").split()[1:2] in ([], [b"408"])
    for _ in range(100):
        if server.held == 0:
            break
        time.sleep(0.05)
    assert server.held == 0, "a body whose client left is counted for good"


def test_pictures_are_opened_all_at_once(server, monkeypatch):
    at_once, most, decode = threading.BoundedSemaphore(serve.MAX_OPENED), [], serve.decode

    def slow(image):
        most.append(at_once.acquire(blocking=False))
        time.sleep(0.05)
        at_once.release()
        return decode(image)

    monkeypatch.setattr(serve, "decode", slow)
    in_threads(*[lambda: post(server, "/image_search", {"image": PICTURE})] * 6)
    assert most == [True] * 6


def test_malformed_requests_end_the_server_or_are_answered_in_html(server):
    draw = random.Random(0)
    lines = [b"", b"GET", b"GET /health HTTP/9.9", b"PUT / HTTP/1.1", b"G" * 70_000, b"\x16\x03\x01"]
    lines += [b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200, b"GET /health HTTP/1.1\r\na"]
    for line in lines:
        assert b"<html" not in raw(server, line + b"\r\n\r\n").lower()
    for _ in range(60):
        raw(server, draw.randbytes(draw.randrange(1, 200)) + b"\r\n\r\n")
    assert alive(server)


def test_a_dripping_client_holds_a_thread_for_good(server, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS_TO_SEND", 0.5)
    heads = [
        b"GET /health HTTP/1.1\r\nx: ",
        b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n",
    ]
    for head in heads:
        start = time.monotonic()
        answer = raw(server, head, *[b"x"] * 200, pause=0.05)  # 10 s if nobody stops it
        assert time.monotonic() - start < 11 and answer[:30].split()[1:2] in ([], [b"408"], [b"400"])
    for _ in range(100):
        if server.running._value == serve.MAX_RUNNING:
            break
        time.sleep(0.05)
    assert server.running._value == serve.MAX_RUNNING and alive(server)


def test_a_search_is_cut_off_with_the_clients_time(server, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS_TO_SEND", 0.3)
    threading.Timer(0.8, server.engine.release.set).start()
    assert post(server, "/retrieve", {"query": "wait"}).status_code == 200


def test_requests_without_number_run_at_once(server, monkeypatch):
    replies = []
    threads = [
        threading.Thread(target=lambda: replies.append(post(server, "/retrieve", {"query": "wait"}).status_code))
        for _ in range(serve.MAX_RUNNING)
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert server.engine.running.acquire(timeout=20)
    busy = raw(server, b"GET /health HTTP/1.0\r\n\r\n")
    assert busy.split()[1] == b"503" and b"Retry-After" in busy
    server.engine.release.set()
    for thread in threads:
        thread.join()
    assert replies == [200] * serve.MAX_RUNNING and alive(server)


def test_a_client_that_leaves_prints_a_traceback(server, capfd):
    for _ in range(5):
        with socket.create_connection(server.server_address[:2]) as connection:
            connection.sendall(b"POST /retrieve HTTP/1.0\r\nContent-Length: 17\r\n\r\n" + b'{"query": "wait"}')
            assert server.engine.running.acquire(timeout=20)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
    server.engine.release.set()
    assert alive(server)
    time.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err


# ---- starting and stopping


def test_a_port_in_use_is_a_traceback(server):
    for host, port in [("127.0.0.1", server.server_address[1]), ("127.0.0.1", 70_000), ("300.1.1.1", 0)]:
        with pytest.raises(UserError, match="cannot listen") as caught:
            serve.Server(Engine(), "test", host, port)
        assert "\n" not in str(caught.value)


SLOW_SERVER = """
import time
from mmsr.search import serve
from mmsr.episode import Observation
class Slow:
    def text_search(self, query):
        print("searching", flush=True)
        time.sleep(1)
        return Observation()
serve.serve(Slow(), "slow", "127.0.0.1", 0)
print("ended", flush=True)
"""


@pytest.mark.first_is_quick
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_drops_what_it_is_doing(number):
    child = subprocess.Popen([sys.executable, "-c", SLOW_SERVER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        where = child.stdout.readline().split()[2].rstrip(",")
        replies = []
        asking = threading.Thread(
            target=lambda: replies.append(requests.post(f"{where}/retrieve", json={"query": "a"}))
        )
        asking.start()
        assert child.stdout.readline() == "searching\n"
        os.kill(child.pid, number)
        asking.join(20)
        assert replies[0].json() == {"result": [[]]}
        assert child.wait(20) == 0 and child.stdout.read() == "ended\n"
    finally:
        child.kill()
        child.stdout.close()
