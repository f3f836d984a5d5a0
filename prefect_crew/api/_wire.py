"""The connections to one crew, and one request over them with nothing around it that this client does not use."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib.metadata import version
from typing import Any

import httpx
from pydantic import SecretStr

from prefect_crew.api import _http
from prefect_crew.api.errors import ConfigurationError

__all__ = ["Wire", "shared_connections"]

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
        carried: dict[str, Any] = {"transport": _http.Shared(transport)} if transport else {"proxy": proxy}
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
                verify=_http.tls_context(verify),
                # httpx takes the environment's proxies for this machine too, where NO_PROXY does not name it.
                trust_env=not _http.is_loopback(base.host),
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
