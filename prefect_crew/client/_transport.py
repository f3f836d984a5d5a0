"""Where requests may go, how they are sent, and what their failures mean."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import math
import os
import ssl
import time
import urllib.request
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, cast
from urllib.parse import quote, urlsplit

import anyio
import httpx
from pydantic import SecretStr

from prefect_crew.client._parsing import clean
from prefect_crew.client._retry_safety import post_deadline
from prefect_crew.client.redaction import Redactor, withheld
from prefect_crew.exceptions import ConfigurationError, CrewConnectionError, ResponseFormatError

MAX_BODY = 64 * 1024 * 1024
"""Bytes of an answer, also of a compressed one once it is decoded.

Results of 12 MB were seen, and some servers write a result four times into one answer: as the result, as the output, as
that of the last task, and in the list of tasks.
"""
MAX_ERROR_BODY = 64 * 1024
AT_ONCE = 256 * 1024
"""Bytes that are parsed on the event loop. Larger bodies are parsed in a thread, so that the loop is not blocked."""
UNPACKED_AT_ONCE = AT_ONCE // 1024
"""Bytes of a compressed body that are decoded on the event loop: gzip makes at most a thousand of one."""
GET_DEADLINE = 10
"""A GET may take this many times the request timeout in all, for results of many megabytes over a slow network.

The timeout itself counts between two pieces: without this, a server that sends a byte a second outlasts every limit.
"""


# Where requests may go


def checked_token(token: str | SecretStr) -> SecretStr:
    """Return the token without the blanks that come with pasting.

    Raises:
        ConfigurationError: It is empty, or holds what no header can carry. The message does not show it.
    """
    value = (token.get_secret_value() if isinstance(token, SecretStr) else token).strip()
    if not value:
        raise ConfigurationError("The crew's token is empty. Copy it from the Status tab of the crew's page.")
    if not all("!" <= character <= "~" for character in value):
        raise ConfigurationError(
            "The crew's token holds blanks or letters that no HTTP header can carry. "
            "Copy it again from the Status tab of the crew's page, without the word Bearer."
        )
    return SecretStr(value)


def checked_base_url(url: str, *, what: str, example: str) -> str:
    """Return a base URL without a slash at its end; `what` is what messages call it.

    Raises:
        ConfigurationError: It is not an http or https URL, or carries credentials, a query or a fragment.
    """
    try:
        parts = urlsplit(url.strip())
        httpx.URL(url.strip())
        host = parts.hostname
    except (ValueError, httpx.InvalidURL):
        raise ConfigurationError(f"{what} cannot be read. It looks like {example}.") from None
    if parts.scheme not in ("http", "https") or not host:
        bare = url.partition("?")[0].rpartition("@")[2][:100]
        raise ConfigurationError(f"{what} {bare!r} does not start with https:// and a host.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigurationError(f"{what} (host {host}) carries credentials, a query or a fragment. Give the bare URL.")
    return url.strip().rstrip("/")


def checked_url(url: str, *, allow_http: bool) -> str:
    """Return the crew's base URL without a slash at its end.

    Raises:
        ConfigurationError: As `checked_base_url`; or it would send the token in plain text over a network.
    """
    checked = checked_base_url(url, what="The crew's URL", example="https://my-crew.example.com")
    host = urlsplit(checked).hostname or ""
    if checked.lower().startswith("http:") and not (allow_http or is_loopback(host)):
        raise ConfigurationError(
            f"The crew's URL http://{host} would send the token in plain text. "
            "Use https, or allow it with allow_http=True (--allow-http) if you trust the network."
        )
    return checked


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine: `localhost` or an address. Any other name may lead elsewhere."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def segment(value: str, *, what: str) -> str:
    """Return `value` as one segment of a path.

    Raises:
        ConfigurationError: It is empty, or has no encoding.
    """
    try:
        encoded = quote(value, safe="")
    except UnicodeEncodeError:
        encoded = ""
    if not encoded.strip():
        raise ConfigurationError(
            f"The {what} {clean(value)!r} is not a valid id. Give the id that the kickoff returned."
        )
    # Dots alone would climb to another path.
    return encoded.replace(".", "%2E") if encoded in (".", "..") else encoded


def tls_context(verify: ssl.SSLContext | bool) -> ssl.SSLContext:
    """Return what checks the server's certificate: a context as it is, the environment's or usual CAs, or nothing."""
    if isinstance(verify, ssl.SSLContext):
        return verify
    return _default_context(verify, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=8)
def _default_context(verify: bool, *_environment: str | None) -> ssl.SSLContext:
    # Reading the default CAs takes 20 ms and more; a thousand short-lived clients need it once.
    return httpx.create_ssl_context(verify=verify)


def _proxy_for(url: httpx.URL) -> str | None:
    """Return the environment's proxy for a URL; none for this machine, even where NO_PROXY does not name it."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or is_loopback(url.host) or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


# How they are sent


@dataclass(frozen=True)
class Call:
    """One call, as its errors tell of it.

    What is sent is kept here and in no local variable: error reporters show those of every frame. `hide` masks the
    token and the webhooks of the call.
    """

    method: str
    path: str
    kickoff_id: str | None = None
    hide: Redactor = field(default_factory=Redactor, repr=False)
    content: bytes | None = field(default=None, repr=False)
    before_sending: Callable[[], None] | None = field(default=None, repr=False)

    def shown(self, text: str) -> str:
        """Return what may be shown of a text that the server has sent."""
        return withheld(self.hide(text))


@dataclass(frozen=True)
class Answer:
    """One answer, read in full. Its repr shows none of it: a server may repeat what it was sent."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        """The body as text, for an error."""
        return self.body.decode("utf-8", "replace")


_CONNECT = 10.0
"""Seconds, at most, for a free connection, and for making one: a host that is down should not cost a request's time."""
POLL_KEEPALIVE = 60.0
"""Seconds that an idle connection is kept for the next poll: longer than the longest usual interval."""
POST_KEEPALIVE = 1.0
"""Seconds that one is kept for the next kickoff or resume.

A server may close an idle connection at the very moment at which a request goes out on it. A poll is then made again; a
kickoff would be uncertain for nothing. Servers wait five seconds and more, so one second is safe, and still spares a
burst of kickoffs the handshakes.
"""
_SHARED_CONNECTIONS = 500
"""Connections to one server, at most, that all clients of an event loop share."""


class Connections:
    """Connections to one server.

    Requests go straight to httpx's transport: no cookies, no redirects, and no log of URLs, which `httpx.AsyncClient`
    would bring with it, at a quarter of a request's CPU time.

    Args:
        url: The base URL.
        label: What errors call it, in place of the URL.
        token: The bearer token of every request, if any.
        timeout: Seconds for which the server may send nothing.
        keepalive: Seconds for which an idle connection is kept.
        verify: What checks the server's certificate.
        proxy: The URL of a proxy, in place of the environment's.
        transport: How requests are carried, in place of the network. Not closed.
        allow_http: Allow plain http beyond this machine, and so through a proxy.

    Raises:
        ConfigurationError: The proxy cannot be used, or would be sent the token in plain text.
    """

    def __init__(
        self,
        url: str,
        *,
        label: str | None = None,
        token: SecretStr | None = None,
        timeout: float,
        keepalive: float = 0.0,
        verify: ssl.SSLContext | bool = True,
        proxy: str | httpx.Proxy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        allow_http: bool = False,
    ) -> None:
        base = httpx.URL(url)
        if proxy is not None and base.scheme == "http" and not allow_http:
            raise ConfigurationError(
                "A proxy would be sent the token in plain text, since the crew's URL is http. "
                "Use https, or allow it with allow_http=True where the network up to the proxy is trusted."
            )
        self._url = url
        self._last_path, self._last_url = "", base
        self._origin = f"{base.scheme}://{base.host}"
        self._label = url if label is None else label
        self._timeout = timeout
        connect = min(_CONNECT, timeout / 2)
        self._extensions = {"timeout": httpx.Timeout(timeout, connect=connect, pool=connect).as_dict()}
        # Made once. Its repr hides the token.
        self._headers = httpx.Headers(
            {"Accept": "application/json", "Accept-Encoding": "gzip", "User-Agent": f"prefect-crew/{_version()}"}
        )
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token.get_secret_value()}"
        shared = None if transport else _shared.get(asyncio.get_running_loop())
        self._is_owned = transport is None and shared is None
        key = (base.scheme, base.netloc, keepalive, verify, str(proxy))
        if shared is not None:
            transport = shared.get(key)
        if transport is None:
            most, idle = (_SHARED_CONNECTIONS, _SHARED_CONNECTIONS) if shared is not None else (100, 20)
            limits = httpx.Limits(max_connections=most, max_keepalive_connections=idle, keepalive_expiry=keepalive)
            transport = _connect(base, limits, verify, proxy)
        if shared is not None:
            shared[key] = transport
        self._transport = transport
        self._under_way, self._is_single, self._used_at = 0, True, -math.inf

    def __repr__(self) -> str:
        return f"Connections({self._label!r})"

    @property
    def is_fresh(self) -> bool:
        """Whether the next request surely takes no connection that was idle for longer than `POST_KEEPALIVE`.

        That is known where there is one connection at most: it is nobody else's, and requests came one by one.
        """
        is_single = self._is_owned and self._is_single and not self._under_way
        return is_single and time.monotonic() - self._used_at < POST_KEEPALIVE

    async def exchange(self, call: Call) -> Answer:
        """Send a request and read its answer.

        Raises:
            CrewConnectionError: There is no answer.
            ConfigurationError: The path makes no URL.
            ResponseFormatError: A 2xx whose body is too large or is not encoded as it says.
        """
        self._under_way += 1
        self._is_single, self._used_at = self._is_single and self._under_way == 1, -math.inf
        try:
            answer = await self._exchange(call)
        except httpx.InvalidURL:
            raise ConfigurationError(f"{call.method} {call.path[:100]}… makes no URL. Check the id.") from None
        except (httpx.HTTPError, OSError) as error:
            # What came in place of HTTP is the server's own text.
            redact = call.shown if isinstance(error, httpx.RemoteProtocolError) else call.hide
            cause = _without_secrets(error, redact, httpx.Request(call.method, self._origin))
            said, reason = str(cause), _REASONS.get(type(cause), type(cause).__name__)
            raise CrewConnectionError(
                method=call.method,
                url=f"{self._label}{call.path}",
                reason=f"{reason} ({said})" if said else reason,
                sent=not isinstance(cause, _NOT_SENT),
                kickoff_id=call.kickoff_id,
            ) from cause
        finally:
            self._under_way -= 1
        self._used_at = time.monotonic()  # not where it failed: who knows which connection that has left idle
        return answer

    async def _exchange(self, call: Call) -> Answer:
        request = httpx.Request(
            call.method,
            self._url_of(call.path),
            headers=self._headers,
            content=call.content,
            extensions=self._extensions
            if call.before_sending is None
            else {**self._extensions, "trace": _trace(call.before_sending)},
        )
        if call.content is not None:
            request.headers["Content-Type"] = "application/json"
        seconds = post_deadline(self._timeout) if call.method == "POST" else GET_DEADLINE * self._timeout
        # httpx's timeouts count between two pieces; a head, 1xx answers and a body may come in any number of pieces.
        with anyio.move_on_after(seconds):
            response = await self._transport.handle_async_request(request)
            try:
                return await _read(response, call.kickoff_id)
            finally:
                await response.aclose()
        raise httpx.ReadTimeout(f"the answer was not complete after {seconds:g} s")

    def _url_of(self, path: str) -> httpx.URL:
        if path != self._last_path:  # kickoffs have one
            self._last_path, self._last_url = path, httpx.URL(self._url + path)
        return self._last_url

    async def aclose(self) -> None:
        """Close all connections, unless others use them too."""
        if self._is_owned:
            await self._transport.aclose()


def _trace(before_sending: Callable[[], None]) -> Callable[[str, Any], Awaitable[None]]:
    """Return what httpx calls at each step of a request."""

    async def trace(event: str, _: Any) -> None:
        if event.endswith("send_request_headers.started"):
            before_sending()

    return trace


def _connect(
    base: httpx.URL, limits: httpx.Limits, verify: ssl.SSLContext | bool, proxy: str | httpx.Proxy | None
) -> httpx.AsyncHTTPTransport:
    context = tls_context(verify)
    try:
        return httpx.AsyncHTTPTransport(verify=context, limits=limits, proxy=proxy or _proxy_for(base))
    except (ValueError, ImportError) as error:  # an unknown scheme, or SOCKS without its package
        raise ConfigurationError(f"The proxy cannot be used: {type(error).__name__}. Check its URL.") from None


_shared: dict[asyncio.AbstractEventLoop, dict[Any, httpx.AsyncBaseTransport]] = {}
"""Connections that all clients of an event loop share, by where they lead. A module-level state, since a client is made
far below the worker that knows that there will be many."""


@contextlib.asynccontextmanager
async def shared_connections() -> AsyncGenerator[None]:
    """Let all clients that are made on this event loop in this block share connections: those to one server.

    Hundreds of runs that wait in one process then need a few connections, and few handshakes. A request carries its
    token itself, so clients with different tokens share as well.
    """
    loop = asyncio.get_running_loop()
    transports = _shared[loop] = {}
    try:
        yield
    finally:
        del _shared[loop]
        for transport in transports.values():
            await transport.aclose()


@functools.lru_cache(maxsize=1)
def _version() -> str:
    return version("prefect-crew")


# What comes back


def _without_secrets(error: Exception, redact: Callable[[str], str], request: httpx.Request) -> Exception:
    """Return `error` fit to be a cause: its text redacted, without frames and causes of its own.

    Those hold the request with its headers, and whatever prints local variables would print the token with them. What
    they say beyond the text is the inside of httpx.
    """
    if isinstance(error, httpx.RequestError):
        error.request = request
    error.args = tuple(redact(part) if isinstance(part, str) else part for part in error.args)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


_NOT_SENT = (
    httpx.ConnectError,  # refused, unreachable, DNS, TLS
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,  # the proxy did not connect to the server
    httpx.UnsupportedProtocol,
)
_REASONS: dict[type[Exception], str] = {
    httpx.ConnectTimeout: "no connection was made in time",
    httpx.PoolTimeout: "no connection of this client became free in time",
    httpx.ConnectError: "no connection was made",
    httpx.ProxyError: "the proxy made no connection",
    httpx.ReadTimeout: "no answer came in time",
    httpx.WriteTimeout: "the request could not be sent in time",
    httpx.ReadError: "the connection broke before the answer was read",
    httpx.WriteError: "the connection broke while the request was sent",
    httpx.RemoteProtocolError: "the connection was closed, or the answer is not HTTP",
}


async def _read(response: httpx.Response, kickoff_id: str | None) -> Answer:
    """Read a streamed response, up to its cap; of an error's body only a start."""
    good = 200 <= response.status_code < 300
    limit = MAX_BODY if good else MAX_ERROR_BODY
    chunks: list[bytes] = []
    size = 0
    # What comes, not what httpx's decoders make of it: those know no limit.
    async for chunk in cast("AsyncIterable[bytes]", response.stream):
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            break
    body = b"".join(chunks)
    coding = response.headers.get("content-encoding", "").strip().lower()
    problem = None
    if coding not in ("", "identity"):
        if len(body) > UNPACKED_AT_ONCE:
            body, problem = await asyncio.to_thread(_unpacked, body, coding, limit)
        else:
            body, problem = _unpacked(body, coding, limit)
    if len(body) > limit:
        problem = f"an answer of more than {limit // 1024**2} MiB"
    if problem and good:
        raise ResponseFormatError(
            expected="an answer that can be read",
            body=problem,
            status_code=response.status_code,
            kickoff_id=kickoff_id,
        )
    return Answer(response.status_code, response.headers, body[:limit])


def _unpacked(body: bytes, coding: str, limit: int) -> tuple[bytes, str | None]:
    """Return a body decoded, a little more than `limit` bytes of it at most, and what is wrong with it, if anything."""
    if coding not in ("gzip", "x-gzip"):
        return b"", "a body with an encoding that was not requested"
    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        plain = decoder.decompress(body, limit + 1)
    except zlib.error:
        return b"", "a body that is not the gzip that it says it is"
    is_whole = decoder.eof or len(plain) > limit
    return plain, None if is_whole else "a compressed body that was cut short"
