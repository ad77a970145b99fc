"""One HTTP request to a server that nobody trusts, and the keys that must not leak from it.

`send_request` has a deadline, which covers everything from the DNS look-up to the last byte, and a limit on the decoded
bytes. With `check=require_public` it connects to public addresses only, and to exactly the address that was checked: a
second look-up of the name could give another one. Every error text, log line, header and body passes `redact`.

Traps. The timeout of requests applies to each read, so a server that sends one byte now and then can block a call
without limit. The texts of its exceptions contain whole addresses, with the api_key, and so do their chained causes;
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
SHORTEST_SECRET = 8  # characters; shorter keys, such as the "EMPTY" of local servers, occur in ordinary text
TRANSPORT = (
    requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError, zlib.error,
)  # fmt: skip

# Not public, although Python 3.11 says so: ranges for special uses, a cloud's internal address, and IPv6 ranges that
# contain an IPv4 address (6to4, Teredo). Of IPv6 only 2000::/3 is public.
NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2002::/16", "2001::/23", "3fff::/20")
]
PUBLIC_V6 = ipaddress.ip_network("2000::/3")
AUTHORITIES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")  # the first one that is set

_untrusted_lookups = threading.BoundedSemaphore(64)  # at a time: the name servers of others may never answer
_secrets: tuple[str, ...] = ()  # the longest first, as one may contain another
_secrets_lock = threading.Lock()


# ---- keys


def keep_secret(key: str) -> str:
    """The key without blanks around it. From now on `redact` replaces it, in this process."""
    global _secrets
    key = key.strip()
    if len(key) >= SHORTEST_SECRET:
        with _secrets_lock:
            _secrets = tuple(sorted({*_secrets, key, quote(key, safe=""), quote_plus(key)}, key=len, reverse=True))
    return key


def environment_key(variable: str, environ: Mapping[str, str] = os.environ) -> str:
    """The key in an environment variable, "" for none; `redact` replaces it from now on. Raises UserError for one with
    characters that no header takes: the error about the header would quote the key."""
    key = keep_secret(environ.get(variable, ""))
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"{variable}: has blanks or characters that no key has; copy the key again")
    return key


def redact(text: str) -> str:
    """`text` with [key] for each secret."""
    for secret in _secrets:
        text = text.replace(secret, "[key]")
    return text


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


logging.getLogger("urllib3.connectionpool").addFilter(_redact_record)  # its DEBUG lines contain whole addresses


class Unsent(ToolFailure):
    """No connection was made: nothing can have been charged."""


def failure(kind: str, message: str, of: type[ToolFailure] = ToolFailure) -> ToolFailure:
    """A failure whose message is one printable line of limited length without keys. All failures are made here."""
    line = "".join(letter if letter.isprintable() else " " for letter in redact(message))
    return of(kind, " ".join(line.split())[:400])


# ---- proxies

UNKNOWN_TO_PROXY = "the proxy wants a user name and password (407): give its address as http://USER:PASSWORD@HOST:PORT"


@dataclass(frozen=True)
class Proxy:
    url: str  # without user name and password
    headers: Mapping[str, str] = field(repr=False)  # with them

    def __str__(self) -> str:
        return urlsplit(self.url).netloc


def proxy_for(url: str) -> Proxy | None:
    """The proxy for a service that the user configured; None: a direct connection. It is HTTPS_PROXY or HTTP_PROXY, by
    the address's scheme, else ALL_PROXY, with exceptions in NO_PROXY; the variables in lower case come first. Loopback
    never has a proxy. Raises UserError for a proxy of another kind (SOCKS) and for a value that is not an address."""
    variable, value = _proxy_variable(url)
    if not value:
        return None
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        more = parts.path.strip("/") or parts.query or parts.fragment  # perhaps of a password with a / or # in it
        sound = parts.scheme in ("http", "https") and parts.hostname and not more
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        sound = False
    if not sound:  # the value may hold a password
        advice = "give http://HOST:PORT, or except hosts by NO_PROXY"
        raise UserError(f"{variable}: not the address of an HTTP proxy; {advice}")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    headers = {}
    if user or password:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Proxy-Authorization"] = f"Basic {keep_secret(token)}"
        keep_secret(password)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Proxy(f"{parts.scheme}://{host}:{port}", headers)


def _proxy_variable(url: str) -> tuple[str, str]:
    """Name and value of the variable that gives the proxy for an address; "" and "" for a direct connection."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return "", ""  # not an address: the request itself will say so
    if _is_direct(host, port):
        return "", ""
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        variable = name if name in os.environ else name.upper()
        if value := os.environ.get(variable, "").strip():
            return variable, value
    return "", ""


def _is_direct(host: str, port: int) -> bool:
    """Whether a host is this machine or in NO_PROXY, which lists names, domains, networks, host:port and patterns."""
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


# ---- one request


@dataclass(frozen=True)
class Response:
    """A server's reply of any status."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes  # decoded
    url: str
    proxy: str = ""  # host and port; a proxy may have answered instead of the server

    def json(self) -> dict[str, Any]:
        """The JSON object in the body. Raises ToolFailure("format")."""
        try:
            value, why = json.loads(self.body), "not an object"
        except RecursionError:
            value, why = None, "nested too deeply"
        except ValueError:  # also UnicodeDecodeError, and integers of more than 4,300 digits
            value, why = None, "not JSON"
        if not isinstance(value, dict):
            raise failure("format", f"{urlsplit(self.url).netloc}: {why}: {self.body[:80].decode(errors='replace')}")
        return value


def require_public(address: str) -> None:
    """Raise ToolFailure("blocked") unless an IP address is public. MMSR_ALLOW_LOOPBACK=1 allows loopback, too."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.is_loopback and os.environ.get("MMSR_ALLOW_LOOPBACK") == "1":
        return
    public = ip.is_global and not ip.is_multicast and not ip.is_reserved and (ip.version == 4 or ip in PUBLIC_V6)
    if not public or any(ip in network for network in NOT_PUBLIC):
        raise failure("blocked", f"{ip} is not a public address")


class _Dialer:
    """Makes the connections of one request, to addresses that `check` allows, and cuts them at the deadline. Another
    thread cuts them, on a duplicate of the socket, so that nothing that a server does can prevent it."""

    def __init__(self, seconds: float, resolve: Callable, check: Callable[[str], None] | None):
        self.deadline = time.monotonic() + seconds
        self.resolve, self.check = resolve, check
        self.expired = False
        self.connections: list[tuple[threading.Timer, socket.socket]] = []

    def seconds_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("out of time")
        return left

    def dial(self, connection: HTTPConnection) -> socket.socket:
        """A socket that is connected to the first address that accepts. Raises OSError where no address does."""
        found = self._look_up(connection.host, connection.port)
        if self.check:
            for *_, address in found:
                self.check(address[0])
        error = OSError(f"{connection.host} has no address")
        for i, (family, kind, protocol, _, address) in enumerate(found):
            sock = socket.socket(family, kind, protocol)
            try:
                # An equal share of the time, so that an address that never answers leaves some for the others.
                sock.settimeout(self.seconds_left() / (len(found) - i))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._cut_at_deadline(sock)
                return sock
            except OSError as refused:
                sock.close()
                error = refused
        raise error

    def _look_up(self, host: str, port: int) -> list:
        """What `resolve` gives. It runs in a thread that is abandoned at the deadline: a look-up cannot be stopped."""
        untrusted = self.check is not None  # only these are limited in number: services must not wait for them
        found: Future = Future()
        if untrusted and not _untrusted_lookups.acquire(timeout=self.seconds_left()):
            raise TimeoutError("too many names are being looked up")

        def ask() -> None:
            try:
                found.set_result(self.resolve(host, port, type=socket.SOCK_STREAM))
            except BaseException as error:
                found.set_exception(error)
            finally:
                if untrusted:
                    _untrusted_lookups.release()

        threading.Thread(target=ask, name="lookup", daemon=True).start()
        return found.result(self.seconds_left())

    def _cut_at_deadline(self, sock: socket.socket) -> None:
        seconds = self.seconds_left()
        duplicate = sock.dup()
        timer = threading.Timer(seconds, self._cut, [duplicate])
        timer.daemon = True
        self.connections.append((timer, duplicate))
        timer.start()

    def _cut(self, duplicate: socket.socket) -> None:
        self.expired = True
        with suppress(OSError):
            duplicate.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for timer, duplicate in self.connections:
            timer.cancel()
            duplicate.close()


def public_authorities() -> ssl.SSLContext:
    """TLS that trusts the certificate authorities in AUTHORITIES or, where no variable is set, those of requests.
    Raises UserError where a named file contains no certificates."""
    variable = next((name for name in AUTHORITIES if os.environ.get(name)), "")
    return _load_authorities(variable, os.environ.get(variable) or requests.certs.where())  # type: ignore[attr-defined]


@cache  # reading the certificates takes longer than many calls
def _load_authorities(variable: str, path: str) -> ssl.SSLContext:
    try:
        folder = all(map(os.path.isdir, path.split(os.pathsep)))  # SSL_CERT_DIR may name several
        return ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{variable} {path}: no certificates can be read ({why}); name a PEM file") from None


def _connection(kind: type[HTTPConnection], dialer: _Dialer, **options: Any) -> HTTPConnection:
    connection = kind(**options)
    connection._new_conn = partial(dialer.dial, connection)  # type: ignore[method-assign]
    return connection


def _pool(url: str, dialer: _Dialer, tls: ssl.SSLContext, proxy: Proxy | None) -> urllib3.HTTPConnectionPool:
    """A pool for one request. TLS compares the certificate with the host's name, not with the address."""
    parts = urllib3.util.parse_url(url)
    secure: dict[str, Any] = {"ssl_context": tls, "cert_reqs": "CERT_REQUIRED"}
    if proxy:
        manager = urllib3.ProxyManager(proxy.url, proxy_headers=proxy.headers, proxy_ssl_context=tls, **secure)
    else:
        manager = urllib3.PoolManager(**secure)
    pool = manager.connection_from_host(parts.host, parts.port, parts.scheme)
    pool.ConnectionCls = partial(_connection, pool.ConnectionCls, dialer)  # type: ignore[assignment,arg-type]
    return pool


def _body(reply: urllib3.BaseHTTPResponse, limit: int, dialer: _Dialer) -> bytes:
    """The decoded body. ToolFailure("too-large") as soon as it has more than `limit` bytes, however few were sent."""
    codings = [coding.strip().lower() for coding in reply.headers.get("Content-Encoding", "").split(",")]
    coding = ",".join(name for name in codings if name not in ("", "identity"))
    if coding not in ("", "gzip", "x-gzip", "deflate"):
        raise failure("format", f"content encoding {coding} was not asked for")
    unzip = _Unzip() if coding else None
    body = bytearray()
    sent = 0  # compressed bytes
    while piece := reply.read(2**16, decode_content=False):
        dialer.seconds_left()  # raises after the deadline: decompression takes time, too
        sent += len(piece)
        body += unzip(piece, limit + 1 - len(body)) if unzip else piece
        if len(body) > limit or sent > 2 * limit + 2**16:  # compressed bytes may give no output
            raise failure("too-large", f"the reply is over the limit of {limit:,} bytes")
        if unzip and unzip.over:
            break
    if sent and unzip and not unzip.complete:
        raise failure("format", "the compressed reply is cut short")
    return bytes(body)


class _Unzip:
    """Decompresses, piece by piece, gzip, zlib's format and the raw deflate stream that some servers send. A gzip
    stream may have several members. Bytes after the last member are ignored, as in browsers; then it is `over`."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.over = False

    @property
    def complete(self) -> bool:
        return self.stream.eof

    def __call__(self, data: bytes, most: int) -> bytes:
        """At most `most` bytes of output. Where it is exactly as many, input may be lost: do not call it again."""
        found = bytearray()
        while data and len(found) < most:
            if self.stream is None:
                raw = data[0] & 15 != 8 and data[0] != 0x1F  # neither the first byte of zlib's format nor of gzip
                self.stream = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
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
    """The server's reply, or the failure where there is no whole reply. `content` is what requests.Request takes.
    `check(address)` raises ToolFailure for an address that must not be connected to; with it no proxy is used. Raises
    UserError as `proxy_for` does."""
    dialer = _Dialer(seconds, resolve, check)
    server = "the address"
    try:
        headers = HEADERS | content.pop("headers", {})
        message = requests.Request(method, url, headers=headers, **content).prepare()
        server = str(urlsplit(message.url).hostname)
        proxy = None if check else proxy_for(message.url)
        if proxy:
            server += f", through the proxy {proxy}"
        reply, body = _transfer(message, dialer, tls, proxy, limit)
        if proxy and reply.status == 407:
            return failure("auth", f"{server}: {UNKNOWN_TO_PROXY}", Unsent)
        if not dialer.expired:  # a body of unknown length looks complete where the deadline cut the connection
            headers = {name.lower(): redact(value) for name, value in reply.headers.items()}
            return Response(reply.status, headers, _redacted(body), redact(message.url), str(proxy or ""))
        kind, why = "timeout", ""
    except ToolFailure as failed:
        return failed
    except TRANSPORT as error:
        kind, why = _explain(error, dialer)
    finally:
        dialer.close()
    return _no_reply(server, kind, why or f"no whole reply within {seconds:.1f} s", url, dialer)


def _transfer(
    message: requests.PreparedRequest, dialer: _Dialer, tls: ssl.SSLContext, proxy: Proxy | None, limit: int
) -> tuple[urllib3.BaseHTTPResponse, bytes]:
    """Send a message; the reply and its decoded body."""
    target = message.path_url
    if proxy and message.url.startswith("http:"):  # an https request goes through a tunnel
        target = requests.utils.urldefragauth(message.url)  # type: ignore[attr-defined]
    with _pool(message.url, dialer, tls, proxy) as pool:
        reply = pool.urlopen(
            message.method, target, message.body, message.headers, retries=False, redirect=False,
            assert_same_host=False, preload_content=False, decode_content=False, timeout=dialer.seconds_left(),
        )  # fmt: skip
        with closing(reply):
            return reply, _body(reply, limit, dialer)


def _explain(error: Exception, dialer: _Dialer) -> tuple[str, str]:
    """Kind and text of what a transfer raised; no text for a timeout."""
    cause = next((part for part in error.args if isinstance(part, Exception)), error)  # urllib3 wraps the cause
    if dialer.expired or isinstance(cause, (TimeoutError, urllib3.exceptions.TimeoutError)):
        return "timeout", ""
    permanent = isinstance(cause, (ValueError, zlib.error)) and not isinstance(cause, OSError)
    why = getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}"
    return "format" if permanent else "network", why


def _no_reply(server: str, kind: str, why: str, url: str, dialer: _Dialer) -> ToolFailure:
    """The failure of a request without a whole reply, with advice."""
    refused_by_proxy = "Tunnel connection failed" in why  # the words of http.client
    if refused_by_proxy and "failed: 407" in why:
        kind, why = "auth", UNKNOWN_TO_PROXY
    if "CERTIFICATE_VERIFY_FAILED" in why and not dialer.check:
        why += " (REQUESTS_CA_BUNDLE names a file of certificates that are to be trusted)"
    if dialer.check and kind in ("timeout", "network") and (variable := _proxy_variable(url)[0]):
        why += f" (addresses that others gave are not asked through the proxy of {variable})"
    return failure(kind, f"{server}: {why}", Unsent if refused_by_proxy or not dialer.connections else ToolFailure)


def _redacted(body: bytes) -> bytes:
    for secret in _secrets:  # a server may repeat what it was sent
        body = body.replace(secret.encode(), b"[key]")
    return body
