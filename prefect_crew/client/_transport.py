"""Where requests may go, how they are carried, and what their failures mean."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import os
import ssl
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit

import httpx
from pydantic import SecretStr

from prefect_crew.client._parsing import clean
from prefect_crew.exceptions import ConfigurationError, ResponseFormatError

MAX_BODY = 64 * 1024 * 1024
"""Bytes of an answer, also of a compressed one once it is decoded.

Results of 12 MB were seen, and some servers write a result four times into one answer: as the result, as the output, as
that of the last task, and in the list of tasks.
"""
MAX_ERROR_BODY = 64 * 1024
AT_ONCE = 256 * 1024
"""Bytes that are parsed on the event loop. Larger bodies are parsed in a thread: nothing else would go on meanwhile."""
UNPACKED_AT_ONCE = AT_ONCE // 1024
"""Bytes of a compressed body that are decoded on the event loop: gzip makes at most a thousand of one."""
GET_DEADLINE = 10
"""A GET may take this many times the request timeout in all, for results of many megabytes over a slow network.

The timeout itself counts between two pieces: without this, a server that sends a byte a second outlasts every budget.
"""


class Shared(httpx.AsyncBaseTransport):
    """A transport that someone else owns: closing a client does not close it."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Pass the request on."""
        return await self._transport.handle_async_request(request)


def checked_token(token: str | SecretStr) -> SecretStr:
    """Return the token without the blanks that come with pasting.

    Raises:
        ConfigurationError: It is empty, or holds what no header can carry. The message does not show it.
    """
    value = (token.get_secret_value() if isinstance(token, SecretStr) else token).strip()
    if not value:
        raise ConfigurationError("The crew's token is empty. It stands on the Status tab of the crew's page.")
    if not all("!" <= character <= "~" for character in value):
        raise ConfigurationError(
            "The crew's token holds blanks or letters that no HTTP header can carry. "
            "Copy it again from the Status tab of the crew's page, without the word Bearer."
        )
    return SecretStr(value)


def checked_url(url: str, *, allow_http: bool) -> str:
    """Return the crew's base URL without a slash at its end.

    Raises:
        ConfigurationError: It is no http or https URL, carries credentials, a query or a fragment, or would send the
            token in plain text over a network.
    """
    try:
        parts = urlsplit(url.strip())
        httpx.URL(url.strip())
        host = parts.hostname
    except (ValueError, httpx.InvalidURL):
        raise ConfigurationError("The crew's URL cannot be read. It looks like https://my-crew.example.com.") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(f"The crew's URL (host {host}) carries credentials. Give the token as the token.")
    if parts.scheme not in ("http", "https") or not host:
        bare = url.partition("?")[0].rpartition("@")[2][:100]
        raise ConfigurationError(f"The crew's URL {bare!r} does not start with https:// and a host.")
    if parts.query or parts.fragment:
        raise ConfigurationError(f"The crew's URL (host {host}) has a query or a fragment. Give the bare URL.")
    if parts.scheme == "http" and not (allow_http or is_loopback(host)):
        raise ConfigurationError(
            f"The crew's URL http://{host} would send the token in plain text. "
            "Use https, or allow it with allow_http=True (--allow-http) where the network is trusted."
        )
    return url.strip().rstrip("/")


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
        raise ConfigurationError(f"The {what} {clean(value)!r} names nothing. Give the id that the kickoff returned.")
    # Dots alone would climb to another path.
    return encoded.replace(".", "%2E") if encoded in (".", "..") else encoded


def tls_context(verify: ssl.SSLContext | str | bool) -> ssl.SSLContext:
    """Return what checks the server's certificate: the default CAs, none (False), or those of a file or folder.

    Raises:
        ConfigurationError: The file or folder cannot be read.
    """
    if isinstance(verify, ssl.SSLContext):
        return verify
    if isinstance(verify, str):
        try:
            folder = Path(verify).is_dir()
            return ssl.create_default_context(capath=verify if folder else None, cafile=None if folder else verify)
        except OSError as error:
            raise ConfigurationError(f"The CA certificates at {verify!r} cannot be read: {error}.") from None
    return _default_context(verify, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=8)
def _default_context(verify: bool, *_environment: str | None) -> ssl.SSLContext:
    # Reading the default CAs takes 20 ms and more; a thousand short-lived clients need it once.
    return httpx.create_ssl_context(verify=verify)


@dataclass(frozen=True)
class Answer:
    """One answer, read in full. Its repr shows none of it: a server may say back what it was sent."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """The body as text, for an error."""
        return self.body.decode("utf-8", "replace")


async def read_answer(response: httpx.Response, *, kickoff_id: str | None) -> Answer:
    """Read a streamed response, up to its cap; of an error's body only a start.

    Raises:
        ResponseFormatError: A 2xx whose body is too large or is not encoded as it says.
        httpx.HTTPError: The connection broke or fell silent.
    """
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
        return b"", "a body that is encoded in a way that was not asked for"
    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        plain = decoder.decompress(body, limit + 1)
    except zlib.error:
        return b"", "a body that is not the gzip that it says it is"
    whole = decoder.eof or len(plain) > limit
    return plain, None if whole else "a compressed body that was cut short"


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
    httpx.RemoteProtocolError: "the connection was closed, or what came is not HTTP",
}


def told(error: Exception) -> tuple[str, bool]:
    """Return what an error of httpx or of the system says: the reason, and whether the request may have been sent."""
    said, reason = str(error), _REASONS.get(type(error), type(error).__name__)
    return f"{reason} ({said})" if said else reason, not isinstance(error, _NOT_SENT)


def quiet(error: Exception, redact: Callable[[str], str]) -> Exception:
    """Return `error` fit to be a cause: its text redacted, without frames, request or causes of its own.

    Those hold the request with its headers, and whatever prints local variables would print the token with them. What
    they say beyond the text is the inside of httpx.
    """
    if isinstance(error, httpx.RequestError):
        with contextlib.suppress(RuntimeError):  # raised where no request was set
            error.request = httpx.Request(error.request.method, error.request.url)
    error.args = tuple(redact(part) if isinstance(part, str) else part for part in error.args)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


_CONNECT = 10.0
"""Seconds, at most, for a free connection, and for making one: a host that is down should not cost a request's time."""
_SHARED_CONNECTIONS = 500
"""Connections to one server, at most, that all clients of an event loop share."""


class Wire:
    """Connections to the server of one base URL, with the timeouts, proxies and CAs of httpx.

    A request goes straight to the transport that httpx has chosen. `httpx.AsyncClient.send` would keep cookies, build
    what redirects and authentication need, and log each URL: a quarter of the CPU of a request, of which a batch makes
    tens of thousands, for things that a client of one API with a bearer token does not want.

    Args:
        url: The base URL.
        token: The bearer token of every request.
        timeout: Seconds that the server may be silent.
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
        token: SecretStr,
        *,
        timeout: float,
        keepalive: float,
        verify: ssl.SSLContext | str | bool,
        proxy: str | httpx.Proxy | None,
        transport: httpx.AsyncBaseTransport | None,
        allow_http: bool,
    ) -> None:
        base = httpx.URL(url)
        if proxy is not None and base.scheme == "http" and not allow_http:
            raise ConfigurationError(
                "A proxy would be sent the token in plain text, since the crew's URL is http. "
                "Use https, or allow it with allow_http=True where the network up to the proxy is trusted."
            )
        # httpx ignores proxies beside a transport, and says so only by not using them.
        carried: dict[str, Any] = {"transport": Shared(transport)} if transport else {"proxy": proxy}
        shared = _shared.get(asyncio.get_running_loop()) if _shared and not transport else None
        key = (base.scheme, base.netloc, keepalive, verify, str(proxy))
        self._owns_client = shared is None
        self._client = (shared or {}).get(key) or self._connections(base, keepalive, verify, carried)
        if shared is not None:
            shared[key] = self._client
        self._url = url
        connect = min(_CONNECT, timeout / 2)
        self._extensions = {"timeout": httpx.Timeout(timeout, connect=connect, pool=connect).as_dict()}
        # Made once, whole: httpx builds a request from its parts for a third of what it costs to send. Their repr hides
        # the token.
        self._headers = httpx.Headers([(b"Host", base.netloc), *self._client.headers.raw])
        self._headers["Authorization"] = f"Bearer {token.get_secret_value()}"
        # The one thing that httpx keeps to itself: which of its transports, by the environment's proxies, is for a URL.
        self._transport = self._client._transport_for_url(base)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]

    @staticmethod
    def _connections(
        base: httpx.URL, keepalive: float, verify: ssl.SSLContext | str | bool, carried: dict[str, Any]
    ) -> httpx.AsyncClient:
        most, idle = (_SHARED_CONNECTIONS, _SHARED_CONNECTIONS) if _shared else (100, 20)
        try:
            return httpx.AsyncClient(
                headers={
                    "User-Agent": f"prefect-crew/{_version()}",
                    "Accept": "application/json",
                    "Accept-Encoding": "gzip",
                },
                limits=httpx.Limits(max_connections=most, max_keepalive_connections=idle, keepalive_expiry=keepalive),
                verify=tls_context(verify),
                # httpx takes the environment's proxies for this machine too, where NO_PROXY does not name it.
                trust_env=not is_loopback(base.host),
                **carried,
            )
        except (ValueError, ImportError) as error:  # an unknown scheme, or SOCKS without its package
            raise ConfigurationError(f"The proxy cannot be used: {type(error).__name__}. Check its URL.") from None

    def __repr__(self) -> str:
        return f"Wire({self._url!r})"

    async def send(
        self, method: str, path: str, content: bytes | None = None, before_sending: Callable[[], None] | None = None
    ) -> httpx.Response:
        """Send a request with a JSON body, or with none, and return the response with its body unread: close it.

        `before_sending` is called right before the first byte; where it raises, nothing is sent.

        Raises:
            httpx.InvalidURL: URL and path make no URL.
            httpx.HTTPError, OSError: There is no answer.
        """
        request = httpx.Request(
            method,
            httpx.URL(self._url + path),
            headers=self._headers,
            stream=httpx.ByteStream(content or b""),
            extensions=self._extensions
            if before_sending is None
            else {**self._extensions, "trace": _trace(before_sending)},
        )
        if content is not None:
            request.headers["Content-Type"] = "application/json"
        if content is not None or method == "POST":
            request.headers["Content-Length"] = str(len(content or b""))
        response = await self._transport.handle_async_request(request)
        response.request = request
        return response

    async def aclose(self) -> None:
        """Close all connections, unless others use them too."""
        if self._owns_client:
            await self._client.aclose()


_shared: dict[asyncio.AbstractEventLoop, dict[Any, httpx.AsyncClient]] = {}
"""Connections that all clients of an event loop share, by where they lead. Of the process, since a client is made far
below whoever knows that there will be many."""


@contextlib.asynccontextmanager
async def shared_connections() -> AsyncGenerator[None]:
    """Let all clients that this event loop makes meanwhile share connections: those to one server, with equal options.

    Hundreds of runs that wait in one process then need a few connections, and few handshakes. A request carries its
    token itself, so clients with different tokens share as well.
    """
    loop = asyncio.get_running_loop()
    clients = _shared[loop] = {}
    try:
        yield
    finally:
        del _shared[loop]
        for client in clients.values():
            await client.aclose()


def _trace(before_sending: Callable[[], None]) -> Callable[[str, Any], Awaitable[None]]:
    """Return what httpx calls at each step of a request."""

    async def trace(event: str, _: Any) -> None:
        if event.endswith("send_request_headers.started"):
            before_sending()

    return trace


@functools.lru_cache(maxsize=1)
def _version() -> str:
    return version("prefect-crew")
