"""Any back-end behind HTTP, for training code elsewhere: `POST /retrieve`, `POST /image_search`, `GET /health`.

`/retrieve` speaks Search-R1's protocol, so code written for that finds this server in its place. Every reply is JSON,
an error is {"error": …} with a status. The server trusts nobody: by default it listens on loopback only, where a web
page in a browser could still reach it, so a foreign Host or any Origin is refused; bodies, requests at a time and the
seconds that a client may take to send one are bounded. Each request has a connection of its own (HTTP/1.0).
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
MAX_HELD = 8 * MAX_BODY  # of all requests at a time; what is over is to come again
MAX_COMMAS = MAX_BODY // 64  # in a body: an array's values may take thirty times their text
MAX_QUERIES = 1024  # in a request
MAX_RUNNING, MAX_OPENED = 32, 2  # requests at a time, and those among them whose bodies are being opened
SECONDS_TO_SEND = 10.0  # for a whole request, however it drips
ROUTES = {("POST", "/retrieve"): "retrieve", ("POST", "/image_search"): "image_search", ("GET", "/health"): "health"}
# How truth is written, as Search-R1's server reads it.
YES, NO = ("true", "t", "1", "1.0", "yes", "y", "on"), ("false", "f", "0", "0.0", "no", "n", "off", "none", "")
DATA_URL = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)

LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d*)?", re.IGNORECASE)  # in a Host header


class Refused(Exception):
    """The request is answered with an error. `more` goes beside it."""

    def __init__(self, status: int, message: str, **more: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}


class Server(ThreadingHTTPServer):
    """Answers each request in a thread. `server_close` waits for those that run."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, backend: Backend, name: str, host: str = "127.0.0.1", port: int = 8000):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--host {host} --port {port}: cannot listen there ({why}); give others") from None
        self.name, self.toolbox = name, Toolbox(search_tools(backend, 1, 1), inline=False, workers=MAX_RUNNING)
        self.private = ipaddress.ip_address(str(self.server_address[0])).is_loopback
        self.room = threading.BoundedSemaphore(MAX_RUNNING)
        self.opening = threading.BoundedSemaphore(MAX_OPENED)
        self.held, self.counting = 0, threading.Lock()  # bytes of bodies

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server who we are, which may hang

    def process_request(self, request, client_address) -> None:
        if self.room.acquire(blocking=False):
            return super().process_request(request, client_address)
        with suppress(OSError):
            request.settimeout(1)
            request.sendall(b'HTTP/1.0 503 Busy\r\nRetry-After: 1\r\n\r\n{"error": "too many requests at a time"}')
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def hold(self, size: int) -> bool:
        """Count a body of `size` bytes (or, negative, take it off), unless there is no room for it."""
        with self.counting:
            fits = self.held + size <= MAX_HELD
            self.held += size if fits else 0
            return fits

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news; anything else is a bug, and the server goes on."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def search(self, tool: str, calls: list[Call]) -> list[tuple[Hit, ...]]:
        """Hits of each call, all made at once. Raises Refused where the back-end fails one."""
        futures = [self.toolbox.call(tool, call) for call in calls]
        for seen in (future.result() for future in futures):
            if not seen.ok:
                for future in futures:
                    future.cancel()  # what has not begun need not be paid for
                kind, _, message = (seen.error or "error").partition(": ")
                raise Refused(502, message or kind, kind=kind)
        return [future.result().hits for future in futures]


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "mmsr", ""
    timeout = SECONDS_TO_SEND

    def setup(self) -> None:
        super().setup()
        self.held = 0  # bytes of this request that the server counts
        self.deadline = threading.Timer(SECONDS_TO_SEND, self._cut_off)
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self) -> None:
        self.deadline.cancel()
        self.server.hold(-self.held)
        super().finish()

    def _cut_off(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)  # what waits for the client reads an end

    def do_GET(self) -> None:
        length = self.headers.get("Content-Length", "")
        self.unread = int(length) if re.fullmatch("[0-9]{1,12}", length) else None  # bytes of the body
        try:
            self._check_origin()
            method = "GET" if self.command == "HEAD" else self.command
            route = ROUTES.get((method, self.path.partition("?")[0].rstrip("/")))
            if route is None:
                raise Refused(404, f"only these are here: {', '.join(' '.join(known) for known in ROUTES)}")
            self._reply(200, getattr(self, route)())
        except Refused as refused:
            self._discard()
            self._reply(refused.status, refused.body)

    do_POST = do_HEAD = do_GET

    def _check_origin(self) -> None:
        """Pages in a browser cannot hide where they come from, nor under which name they found a loopback server."""
        host = self.headers.get("Host", "localhost").strip()
        if self.server.private and not LOOPBACK.fullmatch(host):
            raise Refused(403, "foreign Host: this server answers on loopback only")
        if "Origin" in self.headers:
            raise Refused(403, "requests from web pages are refused")

    def _body(self) -> dict[str, Any]:
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
            with self.server.opening:
                body = json.loads(data)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body is not a JSON object")
        return body

    def _discard(self) -> None:
        """Read on for a while: a client that is still sending when the connection closes never sees the answer."""
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
        most, scored = _top_k(body), _flag(body, "return_scores")
        found = self.server.search(TEXT_SEARCH, [Call(query, b"", query) for query in queries])
        return {"result": [[_document(hit, scored) for hit in hits[:most]] for hits in found]}

    def image_search(self) -> dict:
        body = self._body()
        encoded, question, most = body.pop("image", None), body.get("question") or "", _top_k(body)
        if not isinstance(encoded, str) or not isinstance(question, str):
            raise Refused(400, '"image" must be base64 text, and "question", if given, text')
        try:
            with self.server.opening:
                image = _decoded(encoded)
                decode(image)
        except ValueError as error:
            raise Refused(400, f'"image": {error}') from None
        del encoded  # a search may take minutes: it holds the picture alone
        (hits,) = self.server.search(IMAGE_SEARCH, [Call("<img>", image, question)])
        return {"results": [image_result(hit) for hit in hits[:most]]}

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: a malformed request, another method."""
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
        """A client may have put a key into its address."""
        super().log_message("%s", hidden(format % args))

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Thousands of good requests say nothing."""
        if int(code) >= 400:
            super().log_request(code, size)


def _top_k(body: dict[str, Any]) -> int | None:
    most = body.get("topk")
    if most is not None and (type(most) is not int or most < 1):
        raise Refused(400, '"topk" must be a whole number, 1 or more')
    return most


def _flag(body: dict[str, Any], name: str) -> bool:
    said = str(body.get(name)).strip().lower()
    if said not in (*YES, *NO):
        raise Refused(400, f'"{name}" must be true or false')
    return said in YES


def _decoded(encoded: str) -> bytes:
    """The bytes behind base64, which may be wrapped into lines or stand in a data URL. ValueError where it is none."""
    prefix = DATA_URL.match(encoded)
    text = encoded[prefix.end() :] if prefix else encoded
    return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n"), validate=True)


def _document(hit: Hit, scored: bool) -> dict:
    title = " ".join(hit.title.split())
    document = {"id": hit.url, "contents": f'"{title}"\n{hit.text}'}
    return {"document": document, "score": _finite(hit.score) or 0.0} if scored else document


def image_result(hit: Hit) -> dict:
    thumbnail = base64.b64encode(hit.image).decode() if hit.image else None
    score = _finite(hit.score)
    return {"title": hit.title, "link": hit.url, "score": score, "thumbnail": thumbnail, "text": hit.text}


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def serve(backend: Backend, name: str, host: str, port: int) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what runs. A second signal ends the program at once."""
    server, stop = Server(backend, name, host, port), threading.Event()

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
