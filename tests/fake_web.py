"""A web on loopback that speaks the formats of SerpApi, Serper, Jina Reader, OpenAI and Search-R1, and fails on demand.

    with FakeWeb() as web:
        web.then("jina", status(503, {"message": "busy"}), reset())  # the next two requests, then it works again
        web.always("serpapi.google", drip())
        live = Live.from_environment(environ=web.environ())
        ...
        assert len(web.calls("jina")) == 3

Services: serpapi.google, serpapi.lens, serpapi.image (the upload), serper.search, serper.lens, jina, openai,
remote.text, remote.image, and file for every other address. It is a proxy, too: asked for another host's address it
answers itself, and connect is the tunnel, which leads to `behind` whatever host is asked for. What they say by default
is in `results`, `matches`, `pages`, `answer` and `files`. A fault is a function of the request's handler; `status`,
`raw`, `reset`, `drip`, `endless`, `bomb` and `redirect` make the usual ones.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable
from urllib.parse import parse_qs, urlsplit

import PIL.Image

KEYS = {name: f"{name}-canary-0123456789abcdef" for name in ("serpapi", "serper", "jina", "openai")}
UPLOADED = "picture-1"


def picture(size=(64, 48), colour="red", kind="JPEG") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


THUMBNAILS = {f"/thumbnails/{n}.jpg": picture(colour=(25 * n, 0, 0)) for n in range(1, 9)}


@dataclass
class Seen:
    """A request, as it came."""

    service: str
    method: str
    path: str  # with the query
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def json(self) -> Any:
        return json.loads(self.body)


class FakeWeb:
    def __init__(self):
        self.seen: list[Seen] = []
        self.scripts: dict[str, deque[Fault]] = defaultdict(deque)
        self.standing: dict[str, Fault] = {}
        self.delay = 0.0  # seconds before every answer
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.web = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.results = [
            {"position": n, "title": f"Page {n}", "link": f"https://site{n}.example/page", "snippet": f"snippet {n}"}
            for n in range(1, 9)
        ]
        self.matches = [
            {"position": n, "title": f"Match {n}", "link": f"https://match{n}.example/", "source": "match",
             "thumbnail": f"{self.url}/thumbnails/{n}.jpg", "image": f"{self.url}/images/{n}.jpg"}
            for n in range(1, 9)
        ]  # fmt: skip
        self.pages: Callable[[str], str] = lambda url: f"Text of {url}. The bridge crosses the Tagus."
        self.answer: Callable[[dict], str] = lambda body: "<think>\nhm\n</think>\n\nThe bridge crosses the Tagus."
        self.files: dict[str, bytes] = dict(THUMBNAILS)
        self.behind = self.server.server_address  # where tunnels lead

    def __enter__(self) -> FakeWeb:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def then(self, service: str, *faults: Fault) -> None:
        self.scripts[service].extend(faults)

    def always(self, service: str, fault: Fault) -> None:
        self.standing[service] = fault

    def calls(self, service: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.service == service]

    def environ(self, *names: str) -> dict[str, str]:
        """The variables of `names`, of all services without any; base addresses always."""
        keys = {f"{name.upper()}_API_KEY": KEYS[name] for name in names or KEYS}
        bases = {f"{name.upper()}_BASE_URL": self.url for name in KEYS} | {"JINA_BASE_URL": f"{self.url}/jina"}
        if names and "openai" not in names:
            del bases["OPENAI_BASE_URL"]
        return keys | bases


# ---- faults


def status(code: int, body: Any = None, **headers: str) -> Fault:
    """An answer with this JSON; `Retry_After="3"` makes a header."""
    return raw(json.dumps(body).encode(), code, **headers)


def raw(body: bytes, code: int = 200, kind: str = "application/json", **headers: str) -> Fault:
    def answer(handler: _Handler) -> None:
        handler.send_response(code)
        for name, value in {"Content_Type": kind, "Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def reset() -> Fault:
    """The connection breaks off (RST)."""

    def answer(handler: _Handler) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return answer


def drip(where: str = "body", every: float = 0.02) -> Fault:
    """A byte at a time, for ever: in the "status" line, the "headers" or the "body"."""
    starts = {"status": b"", "headers": b"HTTP/1.0 200 OK\r\nX-Long: ", "body": b"HTTP/1.0 200 OK\r\n\r\n"}

    def answer(handler: _Handler) -> None:
        handler.connection.sendall(starts[where])
        while True:
            handler.connection.sendall(b"H")
            time.sleep(every)

    return answer


def endless() -> Fault:
    def answer(handler: _Handler) -> None:
        handler.connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            handler.connection.sendall(b" " * 65536)

    return answer


def bomb(size: int) -> Fault:
    """`size` decoded bytes of JSON text, a thousandth of them on the wire."""
    packer, blanks = zlib.compressobj(wbits=zlib.MAX_WBITS | 16), b" " * 2**20
    pieces = [packer.compress(b'"')]
    pieces += [packer.compress(blanks[: size - 2 - start]) for start in range(0, size - 2, len(blanks))]
    return raw(b"".join([*pieces, packer.compress(b'"'), packer.flush()]), Content_Encoding="gzip")


def redirect(location: str, code: int = 302) -> Fault:
    return raw(b"", code, Location=location)


# ---- the services


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server who we are


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        service = self._service()
        seen = Seen(service, self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        web = self.server.web
        web.seen.append(seen)
        time.sleep(web.delay)
        with suppress(IndexError, OSError):
            web.scripts[service].popleft()(self)
            return
        with suppress(OSError):
            fault = web.standing.get(service) or globals()[f"_{service.replace('.', '_')}"](web, seen)
            fault(self)

    do_POST = do_HEAD = do_CONNECT = do_GET

    def _service(self) -> str:
        if self.command == "CONNECT":
            return "connect"
        path = urlsplit(self.path).path
        posted = {
            "/image": "serpapi.image", "/search": "serper.search", "/lens": "serper.lens", "/retrieve": "remote.text",
            "/image_search": "remote.image",
        }  # fmt: skip
        if self.path.startswith("/jina/"):
            return "jina"
        if path.endswith("/chat/completions"):
            return "openai"
        if self.command == "POST":
            return posted.get(path, "file")
        lens = "engine=google_lens" in self.path
        return ("serpapi.lens" if lens else "serpapi.google") if path == "/search" else "file"

    def log_message(self, *_: object) -> None:
        pass


Fault = Callable[[_Handler], None]
BAD_KEY = {"error": "Invalid API key. Your API key should be here: https://serpapi.com/manage-api-key"}


def _serpapi_google(web: FakeWeb, seen: Seen) -> Fault:
    if seen.query.get("api_key") != KEYS["serpapi"]:
        return status(401, BAD_KEY)
    if not web.results:
        return status(200, {"error": "Google hasn't returned any results for this query."})
    return status(200, {"search_metadata": {"status": "Success"}, "organic_results": web.results})


def _serpapi_lens(web: FakeWeb, seen: Seen) -> Fault:
    if seen.query.get("api_key") != KEYS["serpapi"]:
        return status(401, BAD_KEY)
    if seen.query.get("image_id") != UPLOADED and not seen.query.get("url", "").startswith("http"):
        return status(400, {"error": "Missing query `url` or `image_id` parameter."})
    if not web.matches:
        return status(200, {"error": "Google Lens hasn't returned any results for this query."})
    return status(200, {"search_metadata": {"status": "Success"}, "visual_matches": web.matches})


def _serpapi_image(web: FakeWeb, seen: Seen) -> Fault:
    if KEYS["serpapi"].encode() not in seen.body:
        return status(401, BAD_KEY)
    start, end = seen.body.find(b"\xff\xd8\xff"), seen.body.rfind(b"\xff\xd9")
    if start < 0 or end - start > 500_000:
        return status(400, {"error": "The image must be a file of 500 KB at most."})
    return status(200, {"message": "Image uploaded.", "image_id": UPLOADED})


def _serper(entries: list[dict], seen: Seen) -> Fault:
    if seen.headers.get("x-api-key") != KEYS["serper"]:
        return status(403, {"message": "Unauthorized.", "statusCode": 403})
    return status(200, {"searchParameters": seen.json(), "organic": entries, "credits": 1})


def _serper_search(web: FakeWeb, seen: Seen) -> Fault:
    return _serper(web.results, seen)


def _serper_lens(web: FakeWeb, seen: Seen) -> Fault:
    names = {"thumbnail": "thumbnailUrl", "image": "imageUrl"}
    return _serper([{names.get(name, name): value for name, value in match.items()} for match in web.matches], seen)


def _jina(web: FakeWeb, seen: Seen) -> Fault:
    if seen.headers.get("accept") != "application/json":
        return raw(b"Title: a page\n\nMarkdown Content: ...", kind="text/plain")
    link = seen.path.removeprefix("/jina/") or parse_qs(seen.body.decode())["url"][0]
    page = {"title": f"Title of {link}", "url": link, "content": web.pages(link), "usage": {"tokens": 7}}
    return status(200, {"code": 200, "status": 20000, "data": page})


def _openai(web: FakeWeb, seen: Seen) -> Fault:
    message = {"role": "assistant", "content": web.answer(seen.json())}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return status(200, {"id": "chat-1", "object": "chat.completion", "choices": [choice], "usage": {}})


def _remote_text(web: FakeWeb, seen: Seen) -> Fault:
    documents = [
        {"document": {"id": entry["link"], "contents": f'"{entry["title"]}"\n{entry["snippet"]}'}, "score": 0.5}
        for entry in web.results[: seen.json()["topk"]]
    ]
    return status(200, {"result": [documents for _ in seen.json()["queries"]]})


def _remote_image(web: FakeWeb, seen: Seen) -> Fault:
    thumbnail = base64.b64encode(picture()).decode()
    results = [
        {"title": match["title"], "link": match["link"], "score": 0.9, "thumbnail": thumbnail}
        for match in web.matches[: seen.json()["topk"]]
    ]
    return status(200, {"results": results})


def _connect(web: FakeWeb, seen: Seen) -> Fault:
    def tunnel(handler: _Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with socket.create_connection(web.behind) as far:
            threading.Thread(target=_pump, args=(far, handler.connection), daemon=True).start()
            _pump(handler.connection, far)

    return tunnel


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def _file(web: FakeWeb, seen: Seen) -> Fault:
    path = urlsplit(seen.path).path
    return (
        raw(web.files[path], kind="image/jpeg") if path in web.files else raw(b"<h1>Not Found</h1>", 404, "text/html")
    )
