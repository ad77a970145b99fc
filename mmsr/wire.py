"""One HTTP exchange with a server that nobody vouches for, and the keys that must not come out of it.

`exchange` has a deadline from the name's look-up to the last byte, and a cap on decoded bytes. With `require_public` as
its check it connects to nothing but public addresses, and to the very address that was checked: a name may resolve
differently the second time. Every error text, log line, header and body passes `redact`.

Traps learnt: the time-out of requests is per read, so a server that drips its handshake, headers or body holds a call
for ever; the texts of its exceptions hold whole addresses with the api_key in them, and so do the chained causes, which
is why a failure is returned here and raised by the caller, where no other exception is being handled. requests prepares
the messages, urllib3 carries them; no proxy, netrc or cookie of the environment is used.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import os
import socket
import ssl
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Callable, Mapping
from urllib.parse import quote, quote_plus, urlsplit

import requests
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from .tools import ToolFailure

HEADERS = {"User-Agent": "mmsr (research on web search)", "Accept": "*/*", "Accept-Encoding": "gzip"}
SHORTEST_SECRET = 8  # characters: "EMPTY", which local servers take as a key, must not be cut out of every page
TRANSPORT = (
    requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError, zlib.error,
)  # fmt: skip

# Neither routed on the public internet nor what they seem: special uses that Python 3.11 takes for global, a cloud's
# internal address, and ranges with an IPv4 address inside (6to4, Teredo). Of IPv6 only 2000::/3 is public at all.
NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2002::/16", "2001::/23", "3fff::/20")
]
PUBLIC_V6 = ipaddress.ip_network("2000::/3")

_lookups = ThreadPoolExecutor(32, thread_name_prefix="lookup")
_secrets: tuple[str, ...] = ()
_keeping = threading.Lock()


# ---- keys


def keep_secret(key: str) -> str:
    """The key without blanks around it; from now on `redact` knows it, in this process."""
    global _secrets
    key = key.strip()
    if len(key) >= SHORTEST_SECRET:
        with _keeping:
            _secrets = tuple(sorted({*_secrets, key, quote(key, safe=""), quote_plus(key)}, key=len, reverse=True))
    return key


def redact(text: str) -> str:
    for secret in _secrets:
        text = text.replace(secret, "[key]")
    return text


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


logging.getLogger("urllib3.connectionpool").addFilter(_Redacting())  # its DEBUG lines hold whole addresses


class Unsent(ToolFailure):
    """No connection was made: nothing can have been charged."""


def failure(kind: str, message: str, of: type[ToolFailure] = ToolFailure) -> ToolFailure:
    """The one way to a failure: one printable line of limited length, without a key in it."""
    line = "".join(letter if letter.isprintable() else " " for letter in redact(message))
    return of(kind, " ".join(line.split())[:400])


# ---- one exchange


@dataclass(frozen=True)
class Answer:
    """A server's reply, whatever its status."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes  # decoded
    url: str

    def json(self) -> dict[str, Any]:
        """The JSON object in the body. Raises ToolFailure("format")."""
        try:
            value, why = json.loads(self.body), "not an object"
        except RecursionError:
            value, why = None, "nested too deeply"
        except ValueError:  # UnicodeDecodeError and integers of 5,000 digits too
            value, why = None, "not JSON"
        if not isinstance(value, dict):
            raise failure("format", f"{urlsplit(self.url).netloc}: {why}: {self.body[:80].decode(errors='replace')}")
        return value


def require_public(address: str) -> None:
    """Raise ToolFailure("blocked") unless a resolved address is a public one. MMSR_ALLOW_LOOPBACK=1 adds loopback."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.is_loopback and os.environ.get("MMSR_ALLOW_LOOPBACK") == "1":
        return
    public = ip.is_global and not ip.is_multicast and not ip.is_reserved and (ip.version == 4 or ip in PUBLIC_V6)
    if not public or any(ip in network for network in NOT_PUBLIC):
        raise failure("blocked", f"{ip} is not a public address")


class _Wire:
    """Makes the connections of one exchange, each to an address that `check` has let pass, and cuts them in time.

    The cut is made by another thread, on a duplicate of the socket: nothing that a server does can put it off.
    """

    def __init__(self, seconds: float, resolve: Callable, check: Callable[[str], None] | None):
        self.deadline = time.monotonic() + seconds
        self.resolve, self.check = resolve, check
        self.expired = False
        self.guards: list[tuple[threading.Timer, socket.socket]] = []

    def left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("out of time")
        return left

    def dial(self, connection: HTTPConnection) -> socket.socket:
        look_up = _lookups.submit(self.resolve, connection.host, connection.port, type=socket.SOCK_STREAM)
        found = look_up.result(self.left())
        if self.check:
            for *_, address in found:
                self.check(address[0])
        error = OSError(f"{connection.host} has no address")
        for rest, (family, kind, protocol, _, address) in zip(range(len(found), 0, -1), found):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self.left() / rest)  # an address that says nothing leaves time for the others
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._guard(sock)
                return sock
            except OSError as refused:
                sock.close()
                error = refused
        raise error

    def _guard(self, sock: socket.socket) -> None:
        timer = threading.Timer(self.left(), self._cut, [twin := sock.dup()])
        timer.daemon = True
        self.guards.append((timer, twin))
        timer.start()

    def _cut(self, twin: socket.socket) -> None:
        self.expired = True
        with suppress(OSError):
            twin.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for timer, twin in self.guards:
            timer.cancel()
            twin.close()


@cache
def public_authorities() -> ssl.SSLContext:
    """TLS with the certificates that requests brings, read once: that takes longer than many a call."""
    return ssl.create_default_context(cafile=requests.certs.where())  # type: ignore[attr-defined]


def _connection(kind: type[HTTPConnection], wire: _Wire, **options: Any) -> HTTPConnection:
    connection = kind(**options)
    connection._new_conn = partial(wire.dial, connection)  # type: ignore[method-assign]
    return connection


def _pool(url: str, wire: _Wire, tls: ssl.SSLContext) -> urllib3.HTTPConnectionPool:
    """For one request. TLS holds the certificate to the host's name, whatever address was dialled."""
    parts = urllib3.util.parse_url(url)
    if parts.scheme == "https":
        pool = urllib3.HTTPSConnectionPool(parts.host, parts.port or 443, ssl_context=tls, cert_reqs="CERT_REQUIRED")
        pool.ConnectionCls = partial(_connection, HTTPSConnection, wire)  # type: ignore[assignment]
    else:
        pool = urllib3.HTTPConnectionPool(parts.host, parts.port or 80)
        pool.ConnectionCls = partial(_connection, HTTPConnection, wire)  # type: ignore[assignment]
    return pool


def _body(reply: urllib3.BaseHTTPResponse, limit: int) -> bytes:
    """The decoded body; never more than `limit` bytes of it are made, however small they were sent."""
    coding = reply.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "x-gzip", "deflate", ""):
        raise failure("format", f"content encoding {coding} was not asked for")
    unzip = None if coding in ("identity", "") else zlib.decompressobj(zlib.MAX_WBITS | 32)
    body, sent = bytearray(), False
    while piece := reply.read(2**16, decode_content=False):
        sent = True
        body += unzip.decompress(piece, limit + 1 - len(body)) if unzip else piece
        if len(body) > limit:
            raise failure("too-large", f"the reply is over the limit of {limit:,} bytes")
    if sent and unzip and not unzip.eof:
        raise failure("format", "the compressed reply is cut short")
    return bytes(body)


def exchange(
    method: str,
    url: str,
    *,
    seconds: float,
    limit: int,
    tls: ssl.SSLContext,
    resolve: Callable = socket.getaddrinfo,
    check: Callable[[str], None] | None = None,
    **content: Any,
) -> Answer | ToolFailure:
    """What the server answered, or why there is no whole answer. `content` is what requests.Request takes.

    `check(address)` raises ToolFailure for an address that may not be connected to.
    """
    wire, where = _Wire(seconds, resolve, check), "the address"
    try:
        headers = HEADERS | content.pop("headers", {})
        sent = requests.Request(method, url, headers=headers, **content).prepare()
        where = urlsplit(sent.url).hostname
        with _pool(sent.url, wire, tls) as pool:
            reply = pool.urlopen(
                sent.method, sent.path_url, sent.body, sent.headers, retries=False, redirect=False,
                assert_same_host=False, preload_content=False, decode_content=False, timeout=wire.left(),
            )  # fmt: skip
            with closing(reply):
                body = _body(reply, limit)
        if not wire.expired:  # a body of unknown length seems to end where the wire was cut
            headers = {name.lower(): redact(value) for name, value in reply.headers.items()}
            return Answer(reply.status, headers, _redacted(body), redact(sent.url))
        kind, why = "timeout", ""
    except ToolFailure as refused:
        return refused
    except TRANSPORT as error:
        cause = next((part for part in error.args if isinstance(part, Exception)), error)  # urllib3 wraps
        kind = _kind(cause, wire)
        why = "" if kind == "timeout" else getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}"
    finally:
        wire.close()
    why = why or f"no whole reply within {seconds:.1f} s"
    return failure(kind, f"{where}: {why}", ToolFailure if wire.guards else Unsent)


def _kind(cause: Exception, wire: _Wire) -> str:
    if wire.expired or isinstance(cause, (TimeoutError, urllib3.exceptions.TimeoutError)):
        return "timeout"
    lasting = isinstance(cause, (ValueError, zlib.error)) and not isinstance(cause, OSError)
    return "format" if lasting else "network"


def _redacted(body: bytes) -> bytes:
    for secret in _secrets:  # a server may echo what it was sent
        body = body.replace(secret.encode(), b"[key]")
    return body
