"""The transport of requests: the check of addresses, the sending, and the meaning of failures."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import os
import ssl
import time
import urllib.request
import weakref
import zlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, cast
from urllib.parse import quote, urlsplit

import anyio
import httpx
from pydantic import SecretStr

from prefect_crew._internal.httpx_connections import is_usable, open_connection
from prefect_crew._text import excerpt
from prefect_crew.client._retry_safety import POST_DEADLINE
from prefect_crew.client.redaction import Redactor, withheld
from prefect_crew.exceptions import ConfigurationError, CrewConnectionError, ResponseFormatError

MAX_BODY = 64 * 1024 * 1024
"""The most bytes of an answer, also after decompression. Results of 12 MB occur, and some servers write the result four
times into one answer: as the result, as the output, as the output of the last task, and in the list of tasks."""
MAX_ERROR_BODY = 64 * 1024
AT_ONCE = 256 * 1024
"""The most bytes that are parsed on the event loop. A larger body is parsed in a thread, to keep the loop free."""
GET_DEADLINE = 10
"""A whole GET may take this many times the request timeout. The timeout counts between two pieces of the answer:
without this limit, a server that sends a byte a second would never time out."""


# Where requests may go


def checked_token(token: str | SecretStr) -> SecretStr:
    """Return the token without surrounding blanks, which pasting adds. Raises ConfigurationError without the token."""
    value = (token.get_secret_value() if isinstance(token, SecretStr) else token).strip()
    if not value:
        raise ConfigurationError("The crew's token is empty. Copy it from the Status tab of the crew's page.")
    if not all("!" <= character <= "~" for character in value):
        raise ConfigurationError(
            "The crew's token holds blanks or letters that no HTTP header can carry. "
            "Copy it again from the Status tab of the crew's page, without the word Bearer."
        )
    return SecretStr(value)


def checked_url(url: str, *, allow_http: bool, what: str = "The crew's URL") -> str:
    """Return a base URL without a slash at its end; `what` is its name in messages.

    Raises:
        ConfigurationError: The URL is not http or https, contains credentials, a query or a fragment, or would send a
            token in plain text over a network.
    """
    url = url.strip()
    try:
        httpx.URL(url).raw_host.decode().encode("idna")  # as a look-up of the name does
        parts = urlsplit(url)  # httpx accepts an open bracket as a part of the host's name
        host = parts.hostname
    except (ValueError, httpx.InvalidURL):
        raise ConfigurationError(f"{what} is not a valid URL. Write it as https://host.example.com.") from None
    if parts.scheme not in ("http", "https") or not host:
        bare = url.partition("?")[0].rpartition("@")[2][:100]
        raise ConfigurationError(f"{what} {bare!r} does not start with https:// and a host.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigurationError(f"{what} (host {host}) carries credentials, a query or a fragment. Give the bare URL.")
    if parts.scheme == "http" and not (allow_http or is_loopback(host)):
        raise ConfigurationError(
            f"{what} http://{host} would send the token in plain text. "
            "Use https, or store the crew with allow_http=True (crews save --allow-http) if you trust the network."
        )
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine: `localhost` or a loopback address. Any other name may lead elsewhere."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def encoded_id(kickoff_id: str) -> str:
    """Return an id as one segment of a path."""
    try:
        encoded = quote(kickoff_id, safe="")
    except UnicodeEncodeError:
        encoded = ""
    if not encoded.strip():
        raise ConfigurationError(
            f"The kickoff id {kickoff_id!a} is not a valid id. Give the id that the kickoff returned."
        )
    # An id of only dots would lead to another path.
    return encoded.replace(".", "%2E") if encoded in (".", "..") else encoded


def tls_context() -> ssl.SSLContext:
    """Return the SSL context that checks a server's certificate, with the environment's CAs or the usual ones."""
    return _tls_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=8)
def _tls_context(*_: str | None) -> ssl.SSLContext:
    context = httpx.create_ssl_context()  # takes 20 ms and more; a thousand short-lived clients need it once
    context.set_alpn_protocols(["http/1.1"])
    return context


def _proxy_for(url: httpx.URL) -> str | None:
    """Return the environment's proxy for a URL; None for loopback, even if NO_PROXY does not name it."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    address = f"{url.host}:{url.port or (443 if url.scheme == 'https' else 80)}"  # NO_PROXY may name the port
    if not proxy or is_loopback(url.host) or urllib.request.proxy_bypass(address):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


# Sending


@dataclass(frozen=True)
class Call:
    """One call to a server.

    The call keeps the body, and no local variable does, because error reporters show the local variables of all frames.
    `hide` masks the token and the webhooks of the call. The client calls `before_sending` right before the first byte.
    """

    method: str
    path: str
    kickoff_id: str | None = None
    hide: Redactor = field(default_factory=Redactor, repr=False)
    content: bytes | None = field(default=None, repr=False)
    before_sending: Callable[[], None] | None = field(default=None, repr=False)

    def shown(self, text: str) -> str:
        """Mask a text of the server, for errors."""
        return withheld(self.hide(text))

    async def trace(self, event: str, _: Any) -> None:
        """Call `before_sending` right before httpx sends. httpx calls this method at each step of a request."""
        if self.before_sending is not None and event.endswith("send_request_headers.started"):
            self.before_sending()


@dataclass(frozen=True)
class Answer:
    """One answer, read in full. Its repr shows only the status, since a server may repeat secrets of the request."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """The body as text, for an error."""
        return self.body.decode("utf-8", "replace")


_USER_AGENT = f"prefect-crew/{version('prefect-crew')}"
_CONNECT = 10.0
"""The most seconds to get a free connection, and to connect: less than a request's timeout, for a host that is down."""
POLL_KEEPALIVE = 60.0
"""Seconds for which an idle connection is kept for the next poll: longer than the longest usual interval."""
POST_KEEPALIVE = 1.0
"""Seconds for which an idle connection is used for the next kickoff or resume.

A server may close an idle connection at the moment at which a request goes out on it. A poll is then repeated; a
kickoff would be uncertain. Servers close connections after five seconds or later, so one second is safe, and it still
saves handshakes in a burst of kickoffs.
"""
KEPT = 256
"""The most idle connections to one server: as many as a batch has polls at a time."""


class _Server:
    """The connections to one server, each in an httpx transport of its own. The one used last is used next.

    So it is known how long a connection was idle, and a request costs the same however many there are: a pool of httpx
    looks at all its connections for each request. All open clients of an event loop share them, so hundreds of runs
    that wait in one process need few connections and few handshakes. Each request has its own token, so clients with
    different tokens share as well.
    """

    def __init__(self, origin: httpx.URL) -> None:
        self.users = 0
        self._origin, self._proxy = origin, _proxy_for(origin)
        self._open()  # a proxy that cannot be used is an error of the client, not of its first request
        # The one used last at the end, each with the time at which its last answer was read.
        self._idle = deque[tuple[float, httpx.AsyncHTTPTransport]]()

    def _open(self) -> httpx.AsyncHTTPTransport:
        try:
            return open_connection(self._origin, tls_context(), self._proxy)
        except (ValueError, ImportError) as error:  # an unknown scheme, or SOCKS without its package
            raise ConfigurationError(f"The proxy cannot be used: {type(error).__name__}. Check its URL.") from None
        except OSError as error:  # the files of SSL_CERT_FILE or SSL_CERT_DIR
            raise ConfigurationError(f"The certificates cannot be read: {error}. Nothing was sent.") from None

    @contextlib.asynccontextmanager
    async def connection(self, keepalive: float) -> AsyncGenerator[httpx.AsyncHTTPTransport]:
        """Lend the connection used last, or a new one if that one was idle for longer than `keepalive` seconds."""
        connection = None
        if self._idle and time.monotonic() - self._idle[-1][0] < keepalive:
            connection = self._idle.pop()[1]
            if not is_usable(connection):
                await _close(connection)
                connection = None
        connection = connection or self._open()
        try:
            yield connection
        except BaseException:
            await _close(connection)
            raise
        self._idle.append((time.monotonic(), connection))
        while self._idle and (len(self._idle) > KEPT or time.monotonic() - self._idle[0][0] > POLL_KEEPALIVE):
            await _close(self._idle.popleft()[1])
        if not self.users:  # all clients were closed while the request was under way
            await self.aclose()

    async def aclose(self) -> None:
        """Close the idle connections, one after the other: a cancellation would end tasks before they begin."""
        while self._idle:
            await _close(self._idle.pop()[1])


async def _close(connection: httpx.AsyncHTTPTransport) -> None:
    with anyio.CancelScope(shield=True):
        await connection.aclose()


_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, bytes], _Server]] = (
    weakref.WeakKeyDictionary()
)
"""By scheme and host. Module-level state, since clients that do not know each other share connections."""


class Connections:
    """The connections of one client to its server.

    Requests go straight to httpx's transport: `httpx.AsyncClient` would add cookies, redirects and a log of URLs, and a
    quarter of a request's CPU time. Errors show `label` instead of the URL. `transport` carries requests instead of the
    network, and this class does not close it.

    Raises:
        ConfigurationError: The environment's proxy cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        label: str | None = None,
        token: SecretStr | None = None,
        timeout: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base = httpx.URL(url)
        self._url = url
        self._label = url if label is None else label
        self._timeout = timeout
        connect = min(_CONNECT, timeout / 2)
        self._timeouts = httpx.Timeout(timeout, connect=connect, pool=connect).as_dict()
        # Made once. Its repr hides the token.
        self._headers = httpx.Headers(
            {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": _USER_AGENT}
        )
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token.get_secret_value()}"
        self._transport = transport
        if transport is None:
            here, key = _shared.setdefault(asyncio.get_running_loop(), {}), (self._base.scheme, self._base.netloc)
            self._server = here.get(key) or here.setdefault(key, _Server(self._base))
            self._server.users += 1

    def __repr__(self) -> str:
        return f"Connections({self._label!r})"

    async def exchange(self, call: Call) -> Answer:
        """Send a request and read its answer. Raises the errors that `CrewClient` lists."""
        try:
            if self._transport is not None:
                return await self._send(call, self._transport)
            async with self._server.connection(
                POLL_KEEPALIVE if call.method == "GET" else POST_KEEPALIVE
            ) as connection:
                return await self._send(call, connection)
        except httpx.InvalidURL:
            raise ConfigurationError(f"{call.method} {call.path[:100]}… makes no URL. Check the id.") from None
        except (httpx.HTTPError, OSError) as error:
            cause = self._without_secrets(error, call)
            is_sent, reason = _FAILURES.get(type(cause), (True, type(cause).__name__))
            reason = f"{reason} ({cause})" if str(cause) else reason
            raise CrewConnectionError(
                f"{call.method} {self._label}{call.path} got no answer{of_run(call.kickoff_id)}: {reason.rstrip('.')}. "
                "To check that the crew's server can be reached from here, run: prefect-crew doctor CREW.",
                reason=reason,
                sent=is_sent,
                kickoff_id=call.kickoff_id,
            ) from cause

    async def _send(self, call: Call, transport: httpx.AsyncBaseTransport) -> Answer:
        request = httpx.Request(
            call.method,
            self._url + call.path,
            headers=self._headers,
            content=call.content,
            extensions={"timeout": self._timeouts, **({"trace": call.trace} if call.before_sending else {})},
        )
        if call.content is not None:
            request.headers["Content-Type"] = "application/json"
        seconds = self._timeout * (POST_DEADLINE if call.method == "POST" else GET_DEADLINE)
        if call.before_sending is not None and not isinstance(transport, httpx.AsyncHTTPTransport):
            call.before_sending()  # a user's transport may not support httpx's trace
        with anyio.move_on_after(seconds):
            response = await transport.handle_async_request(request)
            del request  # its repr shows the whole URL
            try:
                body = cast("AsyncIterable[bytes]", response.stream)
                return await _read(response.status_code, response.headers, body, call.kickoff_id)
            finally:
                await response.aclose()
        raise httpx.ReadTimeout(f"the answer was not complete after {seconds:g} s")

    def _without_secrets(self, error: Exception, call: Call) -> Exception:
        """Prepare `error` to be a cause: mask its text, and remove the request, the frames and the causes.

        A tool that prints the local variables of frames would print the token.
        """
        if isinstance(error, httpx.RequestError):
            error.request = httpx.Request(call.method, f"{self._base.scheme}://{self._base.netloc.decode()}")
        # An answer that is not HTTP is a text of the server, so mask it as such.
        redact = call.shown if isinstance(error, httpx.RemoteProtocolError) else call.hide
        error.args = tuple(redact(part) if isinstance(part, str) else part for part in error.args)
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)

    async def aclose(self) -> None:
        """Close all connections, unless other clients use them too. Call this once: the calls are counted."""
        if self._transport is None:
            self._server.users -= 1
            if not self._server.users:
                del _shared[asyncio.get_running_loop()][self._base.scheme, self._base.netloc]
                await self._server.aclose()


# Answers and failures


_FAILURES: dict[type[Exception], tuple[bool, str]] = {
    httpx.ConnectError: (False, "no connection was made"),  # refused, unreachable, DNS, TLS
    httpx.ConnectTimeout: (False, "no connection was made in time"),
    httpx.PoolTimeout: (False, "no connection of this client became free in time"),
    httpx.ProxyError: (False, "the proxy made no connection"),
    httpx.UnsupportedProtocol: (False, "the URL is not http"),
    httpx.ReadTimeout: (True, "no answer came in time"),
    httpx.WriteTimeout: (True, "the request could not be sent in time"),
    httpx.ReadError: (True, "the connection broke before the answer was read"),
    httpx.WriteError: (True, "the connection broke while the request was sent"),
    httpx.RemoteProtocolError: (True, "the connection was closed, or the answer is not HTTP"),
}
"""For each error: whether the request may have reached the server, and the reason for the message. After any other
error the request may have reached it."""


def of_run(kickoff_id: str | None) -> str:
    """Return the words of a message that name the run of a request."""
    return f" (run {kickoff_id})" if kickoff_id else ""


def unreadable(
    expected: str, body: str, status: int | None = None, kickoff_id: str | None = None
) -> ResponseFormatError:
    """Return the error about an answer in no known format."""
    body = excerpt(body)
    return ResponseFormatError(
        f"Expected {expected}{of_run(kickoff_id)}, got: {body or 'an empty body'}. Check that the URL is the crew's "
        "own, not the URL of a web page or a proxy.",
        body=body,
        status_code=status,
        kickoff_id=kickoff_id,
    )


async def _read(status: int, headers: httpx.Headers, stream: AsyncIterable[bytes], kickoff_id: str | None) -> Answer:
    """Read a streamed response, up to its limit; of an error's body only the start."""
    good = httpx.codes.is_success(status)
    limit = MAX_BODY if good else MAX_ERROR_BODY
    chunks: list[bytes] = []
    size = 0
    # The raw bytes, not httpx's decoders: those have no limit.
    async for chunk in stream:
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            break
    body, problem = b"".join(chunks), None
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):  # the request does not allow compression, but some proxies compress
        try:
            body = await asyncio.to_thread(_unpacked, body, coding, limit)
        except (LookupError, zlib.error):
            body, problem = b"", f"an encoding that cannot be read ({coding[:20]!r})"
    if len(body) > limit:
        problem = f"more than {limit // 1024**2} MiB"
    if good and problem:
        raise unreadable("an answer that can be read", problem, status, kickoff_id)
    return Answer(status, headers, body[:limit])


def _unpacked(body: bytes, coding: str, limit: int) -> bytes:
    """Return the decompressed body, at most one byte more than `limit`. A cut body is no JSON."""
    windows = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
    return zlib.decompressobj(windows[coding]).decompress(body, limit + 1)
