"""One HTTP request to a server that nobody trusts, and the keys that must not leak from it.

`send_request` has a deadline, which covers everything from the DNS look-up to the last byte, and a limit on the decoded
bytes. With `check=require_public` it connects to public addresses only, and to exactly the address that was checked: a
second look-up of the name could give another one. Every error text, log line, header and body passes `redact`.

Traps. The timeout of requests applies to each read, so a server that sends one byte now and then can hold a call for
ever. The texts of its exceptions contain whole addresses, with the api_key in them, and so do their chained causes;
therefore a failure is returned here and raised by the caller, outside of any exception handler. requests prepares the
messages and urllib3 sends them; netrc files and cookies are not used.

A service that the user configured is asked through the proxy that the environment names. An untrusted address is never
asked through a proxy: the proxy would look the name up itself, inside the user's network, where we cannot check it.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import logging
import os
import re
import socket
import ssl
import threading
import time
import zlib
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, Callable, Mapping
from urllib.parse import quote, quote_plus, unquote, urlsplit

import requests
import urllib3
from urllib3.connection import HTTPConnection

from mmsr.system.errors import UserError
from mmsr.tools import ToolFailure

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

AUTHORITIES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")  # the first one that is set

_strangers = threading.BoundedSemaphore(64)  # look-ups of their names at a time: their name servers may never answer
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


def environment_key(variable: str, environ: Mapping[str, str] = os.environ) -> str:
    """The key that a variable holds, "" for none, which `redact` knows from now on.

    Raises UserError for one that no header can carry: the complaint about the header would quote it.
    """
    key = keep_secret(environ.get(variable, ""))
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"{variable}: has blanks or characters that no key has; copy the key again")
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


# ---- proxies

UNKNOWN_TO_PROXY = "the proxy wants a user name and password (407): give its address as http://USER:PASSWORD@HOST:PORT"


@dataclass(frozen=True)
class Proxy:
    url: str  # without user name and password
    headers: Mapping[str, str] = field(repr=False)  # which hold them

    def __str__(self) -> str:
        return urlsplit(self.url).netloc


def proxy_for(url: str) -> Proxy | None:
    """The proxy through which a service that the user names is asked; None: it is asked directly.

    The environment names it: HTTPS_PROXY or HTTP_PROXY by the address's scheme, or else ALL_PROXY, and the exceptions
    in NO_PROXY; lower case goes before upper case. Loopback is always asked directly. Raises UserError for a proxy of
    another kind (SOCKS), or what is no address.
    """
    variable, value = _proxy_variable(url)
    if not value:
        return None
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        more = parts.path.strip("/") or parts.query or parts.fragment  # of a password, perhaps, that has a / or # in it
        sound = parts.scheme in ("http", "https") and parts.hostname and not more
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        sound = False
    if not sound:  # the value may hold a password
        raise UserError(
            f"{variable}: not the address of an HTTP proxy; give http://HOST:PORT, or except hosts by NO_PROXY"
        )
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    headers = {}
    if user or password:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Proxy-Authorization"] = f"Basic {keep_secret(token)}"
        keep_secret(password)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Proxy(f"{parts.scheme}://{host}:{port}", headers)


def _proxy_variable(url: str) -> tuple[str, str]:
    """The variable that names the proxy for an address, and what it says; "" where none does."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return "", ""  # no address, as those will say who ask for it
    if _is_direct(host, port):
        return "", ""
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        variable = name if name in os.environ else name.upper()
        if value := os.environ.get(variable, "").strip():
            return variable, value
    return "", ""


def _is_direct(host: str, port: int) -> bool:
    """Whether a host is this machine, or excepted by NO_PROXY: names (of domains, too), networks, host:port, or 10.*"""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        address = None
    named = host == "localhost" or host.endswith(".localhost")
    if named or address and (address.is_loopback or address.is_unspecified):
        return True
    excepted = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    return any(_excepts(entry, host, address, port) for entry in re.split(r"[\s,;|]+", excepted.lower()) if entry)


def _excepts(entry: str, host: str, address: Any, port: int) -> bool:
    if entry == "*":
        return True
    with suppress(ValueError):
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
        return address is not None and address in network
    with suppress(ValueError):
        parts = urlsplit(entry if "://" in entry else f"//{entry}")
        pattern = parts.hostname or ""
        name = pattern.strip("*.")
        named = bool(name) and (host == name or host.endswith(f".{name}"))
        return parts.port in (None, port) and (named or fnmatchcase(host, pattern))  # 10.0.0.*
    return False


# ---- one exchange


@dataclass(frozen=True)
class Response:
    """A server's reply, whatever its status."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes  # decoded
    url: str
    proxy: str = ""  # host and port of the one that was asked, who may have answered itself

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
        found = self._look_up(connection.host, connection.port)
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

    def _look_up(self, host: str, port: int) -> list:
        """In a thread that the deadline leaves behind: nothing else ends a look-up. No service waits for strangers'."""
        stranger, found = self.check is not None, Future()  # type: ignore[var-annotated]
        if stranger and not _strangers.acquire(timeout=self.left()):
            raise TimeoutError("too many names are being looked up")

        def ask() -> None:
            try:
                found.set_result(self.resolve(host, port, type=socket.SOCK_STREAM))
            except BaseException as error:
                found.set_exception(error)
            finally:
                if stranger:
                    _strangers.release()

        threading.Thread(target=ask, name="lookup", daemon=True).start()
        return found.result(self.left())

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


def public_authorities() -> ssl.SSLContext:
    """TLS that trusts whom the environment names (AUTHORITIES) or, where it names nobody, whom requests trusts.

    Raises UserError where a named file holds no certificates.
    """
    named = next((name for name in AUTHORITIES if os.environ.get(name)), "")
    return _trusting(named, os.environ[named] if named else requests.certs.where())  # type: ignore[attr-defined]


@cache  # reading them takes longer than many a call
def _trusting(named: str, path: str) -> ssl.SSLContext:
    try:
        folder = all(map(os.path.isdir, path.split(os.pathsep)))  # SSL_CERT_DIR may name several
        return ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
    except OSError as error:
        raise UserError(
            f"{named} {path}: no certificates can be read ({error.strerror or error}); name a PEM file"
        ) from None


def _connection(kind: type[HTTPConnection], wire: _Wire, **options: Any) -> HTTPConnection:
    connection = kind(**options)
    connection._new_conn = partial(wire.dial, connection)  # type: ignore[method-assign]
    return connection


def _pool(url: str, wire: _Wire, tls: ssl.SSLContext, proxy: Proxy | None) -> urllib3.HTTPConnectionPool:
    """For one request. TLS holds the certificate to the host's name, whatever address was dialled."""
    parts = urllib3.util.parse_url(url)
    secure: dict[str, Any] = {"ssl_context": tls, "cert_reqs": "CERT_REQUIRED"}
    if proxy:
        manager = urllib3.ProxyManager(proxy.url, proxy_headers=proxy.headers, proxy_ssl_context=tls, **secure)
    else:
        manager = urllib3.PoolManager(**secure)
    pool = manager.connection_from_host(parts.host, parts.port, parts.scheme)
    pool.ConnectionCls = partial(_connection, pool.ConnectionCls, wire)  # type: ignore[assignment,arg-type]
    return pool


def _body(reply: urllib3.BaseHTTPResponse, limit: int, wire: _Wire) -> bytes:
    """The decoded body; never more than `limit` bytes of it are made, however small they were sent."""
    codings = [coding.strip().lower() for coding in reply.headers.get("Content-Encoding", "").split(",")]
    coding = ",".join(name for name in codings if name not in ("", "identity"))
    if coding not in ("", "gzip", "x-gzip", "deflate"):
        raise failure("format", f"content encoding {coding} was not asked for")
    unzip = _Unzip() if coding else None
    body, sent = bytearray(), 0
    while piece := reply.read(2**16, decode_content=False):
        wire.left()  # unpacking takes time, too
        sent += len(piece)
        body += unzip(piece, limit + 1 - len(body)) if unzip else piece
        if len(body) > limit or sent > 2 * limit + 2**16:  # compressed emptiness has no end either
            raise failure("too-large", f"the reply is over the limit of {limit:,} bytes")
        if unzip and unzip.over:
            break
    if sent and unzip and not unzip.complete:
        raise failure("format", "the compressed reply is cut short")
    return bytes(body)


class _Unzip:
    """Unpacks gzip, zlib's format and, as some servers understand `deflate`, the bare stream, piece by piece.

    Members of gzip may follow each other. What follows the last one is ignored, as browsers do; then it is `over`.
    """

    def __init__(self) -> None:
        self.stream: Any = None
        self.over = False

    @property
    def complete(self) -> bool:
        return self.stream.eof

    def __call__(self, data: bytes, most: int) -> bytes:
        """At most `most` bytes; where it is as many, there may be more, and no further call makes sense."""
        found = bytearray()
        while data and len(found) < most:
            if self.stream is None:
                bare = data[0] & 15 != 8 and data[0] != 0x1F  # the first byte of zlib's format, and of gzip
                self.stream = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
            elif self.stream.eof:
                if data[0] != 0x1F:
                    self.over = True
                    break
                self.stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
            found += self.stream.decompress(data, most - len(found))
            data = self.stream.unused_data
        return bytes(found)


def send_request(
    method: str,
    url: str,
    *,
    seconds: float,
    limit: int,
    tls: ssl.SSLContext,
    resolve: Callable = socket.getaddrinfo,
    check: Callable[[str], None] | None = None,
    **content: Any,
) -> Response | ToolFailure:
    """What the server answered, or why there is no whole answer. `content` is what requests.Request takes.

    `check(address)` raises ToolFailure for an address that may not be connected to; with it no proxy is used. Raises
    UserError as `proxy_for` does.
    """
    wire, where = _Wire(seconds, resolve, check), "the address"
    try:
        headers = HEADERS | content.pop("headers", {})
        sent = requests.Request(method, url, headers=headers, **content).prepare()
        where = str(urlsplit(sent.url).hostname)
        proxy = None if check else proxy_for(sent.url)
        if proxy:
            where += f", through the proxy {proxy}"
        with _pool(sent.url, wire, tls, proxy) as pool:
            reply = pool.urlopen(
                sent.method, _target(sent, proxy), sent.body, sent.headers, retries=False, redirect=False,
                assert_same_host=False, preload_content=False, decode_content=False, timeout=wire.left(),
            )  # fmt: skip
            with closing(reply):
                body = _body(reply, limit, wire)
        if proxy and reply.status == 407:
            return failure("auth", f"{where}: {UNKNOWN_TO_PROXY}", Unsent)
        if not wire.expired:  # a body of unknown length seems to end where the wire was cut
            headers = {name.lower(): redact(value) for name, value in reply.headers.items()}
            return Response(reply.status, headers, _redacted(body), redact(sent.url), str(proxy or ""))
        kind, why = "timeout", ""
    except ToolFailure as failed:
        return failed
    except TRANSPORT as error:
        cause = next((part for part in error.args if isinstance(part, Exception)), error)  # urllib3 wraps
        kind = _kind(cause, wire)
        why = "" if kind == "timeout" else getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}"
    finally:
        wire.close()
    refused = "Tunnel connection failed" in why  # http.client's words: the proxy did not pass us on
    if refused and "failed: 407" in why:
        kind, why = "auth", UNKNOWN_TO_PROXY
    why = why or f"no whole reply within {seconds:.1f} s"
    if "CERTIFICATE_VERIFY_FAILED" in why and not check:
        why += " (REQUESTS_CA_BUNDLE names a file of certificates that are to be trusted)"
    if check and kind in ("timeout", "network") and (variable := _proxy_variable(url)[0]):
        why += f" (addresses that others gave are not asked through the proxy of {variable})"
    return failure(kind, f"{where}: {why}", Unsent if refused or not wire.guards else ToolFailure)


def _target(sent: requests.PreparedRequest, proxy: Proxy | None) -> str:
    """What the request line names: a path, to a proxy the whole address. Through the tunnel of https a path, too."""
    forwarded = proxy and sent.url.startswith("http:")
    return requests.utils.urldefragauth(sent.url) if forwarded else sent.path_url  # type: ignore[attr-defined]


def _kind(cause: Exception, wire: _Wire) -> str:
    if wire.expired or isinstance(cause, (TimeoutError, urllib3.exceptions.TimeoutError)):
        return "timeout"
    lasting = isinstance(cause, (ValueError, zlib.error)) and not isinstance(cause, OSError)
    return "format" if lasting else "network"


def _redacted(body: bytes) -> bytes:
    for secret in _secrets:  # a server may echo what it was sent
        body = body.replace(secret.encode(), b"[key]")
    return body
