"""A search engine behind HTTP, for training code elsewhere: `POST /retrieve`, `POST /image_search`, `GET /health`.

`/retrieve` speaks Search-R1's protocol, so that code written for its server works with this one. Every reply is JSON,
an error is {"error": …} with a status. No client is trusted. By default the server listens on loopback only; as web
pages in a browser can reach loopback, a foreign Host and any Origin are refused. Limited are the size of bodies, the
number of requests at a time, and the time to send one. Each request has its own connection (HTTP/1.0).
"""

from __future__ import annotations

import base64
import ipaddress
import json
import math
import re
import signal
import socket
import socketserver
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mmsr.episode import Hit
from mmsr.system.credentials import hidden
from mmsr.system.errors import UserError
from mmsr.system.images import decode
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, Backend, Call, Toolbox, search_tools

MAX_BODY = 16 * 2**20  # bytes; a picture of 12 MiB
MAX_HELD = 8 * MAX_BODY  # of all requests at a time; others get status 503
MAX_COMMAS = MAX_BODY // 64  # in a body: the values of a JSON array can take thirty times the memory of their text
MAX_QUERIES = 1024  # in a request
MAX_RUNNING, MAX_OPENED = 32, 2  # requests at a time, and bodies that are decoded at a time
SECONDS_TO_SEND = 10.0  # for a whole request, however slowly its bytes arrive
ROUTES = {("POST", "/retrieve"): "retrieve", ("POST", "/image_search"): "image_search", ("GET", "/health"): "health"}
# The spellings of true and false that Search-R1's server accepts.
YES, NO = ("true", "t", "1", "1.0", "yes", "y", "on"), ("false", "f", "0", "0.0", "no", "n", "off", "none", "")
DATA_URL = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)
LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d*)?", re.IGNORECASE)  # in a Host header


class Refused(Exception):
    """The request is answered with an error; `more` are further fields of the reply."""

    def __init__(self, status: int, message: str, **more: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}


class Server(ThreadingHTTPServer):
    """Answers each request in a thread. `server_close` waits for the running ones."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, backend: Backend, name: str, host: str = "127.0.0.1", port: int = 8000):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--host {host} --port {port}: cannot listen there ({why}); give others") from None
        self.name = name
        self.toolbox = Toolbox(search_tools(backend, 1, 1), inline=False, workers=MAX_RUNNING)
        self.loopback = ipaddress.ip_address(str(self.server_address[0])).is_loopback
        self.running = threading.BoundedSemaphore(MAX_RUNNING)
        self.decoding = threading.BoundedSemaphore(MAX_OPENED)
        self.held = 0  # bytes of bodies in memory
        self.held_lock = threading.Lock()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up our own name in DNS, which may hang

    def process_request(self, request, client_address) -> None:
        if self.running.acquire(blocking=False):
            return super().process_request(request, client_address)
        with suppress(OSError):
            request.settimeout(1)
            request.sendall(b'HTTP/1.0 503 Busy\r\nRetry-After: 1\r\n\r\n{"error": "too many requests at a time"}')
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.running.release()

    def hold(self, size: int) -> bool:
        """Reserve `size` bytes for a body; negative ones release them. False where that would exceed MAX_HELD."""
        with self.held_lock:
            fits = self.held + size <= MAX_HELD
            self.held += size if fits else 0
            return fits

    def handle_error(self, request, client_address) -> None:
        """A closed connection is not reported; another exception is a bug: it is printed, and the server continues."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def search(self, tool: str, calls: list[Call]) -> list[tuple[Hit, ...]]:
        """The hits of each call; the calls run in parallel. Raises Refused where one of them fails."""
        futures = [self.toolbox.call(tool, call) for call in calls]
        results = []
        for future in futures:
            seen = future.result()
            if not seen.ok:
                for other in futures:
                    other.cancel()  # calls that have not started need not be paid for
                kind, _, message = (seen.error or "error").partition(": ")
                raise Refused(502, message or kind, kind=kind)
            results.append(seen.hits)
        return results


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "mmsr", ""
    timeout = SECONDS_TO_SEND

    def setup(self) -> None:
        super().setup()
        self.held = 0  # bytes that the server has reserved for this request
        self.unread: int | None = None  # bytes of the body that have not arrived; None: its length is not known
        self.deadline = threading.Timer(SECONDS_TO_SEND, self._cut_off)
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self) -> None:
        self.deadline.cancel()
        self.server.hold(-self.held)
        super().finish()

    def _cut_off(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)  # a pending read then returns the end of the stream

    def do_GET(self) -> None:
        length = self.headers.get("Content-Length", "")
        self.unread = int(length) if re.fullmatch("[0-9]{1,12}", length) else None
        try:
            self._check_origin()
            method = "GET" if self.command == "HEAD" else self.command
            route = ROUTES.get((method, self.path.partition("?")[0].rstrip("/")))
            if route is None:
                raise Refused(404, f"only these are here: {', '.join(map(' '.join, ROUTES))}")
            self._reply(200, getattr(self, route)())
        except Refused as refused:
            self._discard()
            self._reply(refused.status, refused.body)

    do_POST = do_HEAD = do_GET

    def _check_origin(self) -> None:
        """Refuse web pages: a browser always sends their Origin, and the Host by which they reached this server."""
        host = self.headers.get("Host", "localhost").strip()
        if self.server.loopback and not LOOPBACK.fullmatch(host):
            raise Refused(403, "foreign Host: this server answers on loopback only")
        if "Origin" in self.headers:
            raise Refused(403, "requests from web pages are refused")

    def _body(self) -> dict[str, Any]:
        """The JSON object in the request's body."""
        if self.unread is None:
            raise Refused(411, "Content-Length is missing or no number")
        if self.unread > MAX_BODY:
            raise Refused(413, f"the body is over the limit of {MAX_BODY:,} bytes")
        if not self.server.hold(self.unread):
            raise Refused(503, "too many large bodies at a time: send it again")
        self.held = self.unread
        data = self.rfile.read(self.unread)
        self.deadline.cancel()
        self.unread -= len(data)
        if self.unread:
            raise Refused(408, "the body did not arrive in time")
        if data.count(b",") > MAX_COMMAS:
            raise Refused(413, f"the body has more than {MAX_COMMAS:,} commas: send fewer or shorter queries")
        try:
            with self.server.decoding:
                body = json.loads(data)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body is not a JSON object")
        return body

    def _discard(self) -> None:
        """Read the rest of the body: a client that is still sending when the connection closes misses the reply."""
        left = min(self.unread or 0, 4 * MAX_BODY)
        while left > 0 and (piece := self.rfile.read1(min(left, 1 << 16))):
            left -= len(piece)

    def health(self) -> dict:
        return {"ok": True, "search": self.server.name}

    def retrieve(self) -> dict:
        body = self._body()
        queries = body.get("queries", body.get("query"))
        queries = [queries] if isinstance(queries, str) else queries
        if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
            raise Refused(400, '"queries" must be a list of texts')
        if len(queries) > MAX_QUERIES:
            raise Refused(400, f"{len(queries):,} queries are over the limit of {MAX_QUERIES:,}")
        top_k = _top_k(body)
        scored = _flag(body, "return_scores")
        result = []
        for hits in self.server.search(TEXT_SEARCH, [Call(query, b"", query) for query in queries]):
            result.append([_document(hit, scored) for hit in hits[:top_k]])
        return {"result": result}

    def image_search(self) -> dict:
        body = self._body()
        encoded = body.pop("image", None)
        question = body.get("question") or ""
        top_k = _top_k(body)
        if not isinstance(encoded, str) or not isinstance(question, str):
            raise Refused(400, '"image" must be base64 text, and "question", if given, text')
        try:
            with self.server.decoding:
                image = _decoded(encoded)
                decode(image)
        except ValueError as error:
            raise Refused(400, f'"image": {error}') from None
        del encoded  # frees it: a search may take minutes
        (hits,) = self.server.search(IMAGE_SEARCH, [Call("<img>", image, question)])
        return {"results": [image_result(hit) for hit in hits[:top_k]]}

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """For requests that http.server itself refuses: malformed ones, or another method."""
        self._reply(code, {"error": message or self.responses.get(code, ("error",))[0]})

    def _reply(self, status: int, body: dict) -> None:
        data = json.dumps(body, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log without keys, which a client may have put into the address."""
        super().log_message("%s", hidden(format % args))

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log errors only."""
        if int(code) >= 400:
            super().log_request(code, size)


def _top_k(body: dict[str, Any]) -> int | None:
    top_k = body.get("topk")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise Refused(400, '"topk" must be a whole number, 1 or more')
    return top_k


def _flag(body: dict[str, Any], name: str) -> bool:
    value = str(body.get(name)).strip().lower()
    if value not in (*YES, *NO):
        raise Refused(400, f'"{name}" must be true or false')
    return value in YES


def _decoded(encoded: str) -> bytes:
    """The bytes of base64 text, which may be wrapped into lines or be a data URL. ValueError for other text."""
    prefix = DATA_URL.match(encoded)
    text = encoded[prefix.end() :] if prefix else encoded
    try:
        return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n"), validate=True)
    except ValueError as error:
        raise ValueError(f"not base64 text: {error}") from None


def _document(hit: Hit, scored: bool) -> dict:
    title = " ".join(hit.title.split())
    document = {"id": hit.url, "contents": f'"{title}"\n{hit.text}'}
    return {"document": document, "score": _finite(hit.score) or 0.0} if scored else document


def image_result(hit: Hit) -> dict:
    """A hit of an image search. `link` is the address, too, as earlier versions called it."""
    thumbnail = base64.b64encode(hit.image).decode() if hit.image else None
    found = {"title": hit.title, "url": hit.url, "score": _finite(hit.score), "thumbnail": thumbnail, "text": hit.text}
    return found | {"link": hit.url}


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def serve(backend: Backend, name: str, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the running requests. A second signal ends the program at once."""
    server = Server(backend, name, host, port)
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    bound, port = str(server.server_address[0]), server.server_address[1]
    address = f"[{bound}]" if ":" in host else bound
    print(f"{name} on http://{address}:{port}, until Ctrl-C", flush=True)
    accepting = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    accepting.start()
    stop.wait()
    server.shutdown()
    accepting.join()
    server.server_close()
