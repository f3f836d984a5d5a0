"""Private API of httpx: a transport with one connection instead of a pool, and whether that one can be used again."""

from __future__ import annotations

import ssl
from typing import Any, cast

import httpcore
import httpx


def open_connection(origin: httpx.URL, context: ssl.SSLContext, proxy: str | None) -> httpx.AsyncHTTPTransport:
    """Return a transport for one connection to a server. Raises ValueError, ImportError: the proxy cannot be used."""
    transport = httpx.AsyncHTTPTransport(verify=context, limits=httpx.Limits(max_connections=1), proxy=proxy)
    if proxy is None:  # a pool of one connection takes a third of a request's CPU time
        own: Any = httpcore.AsyncHTTPConnection(httpcore.URL(str(origin)).origin, context)
        cast("Any", transport)._pool = own  # noqa: SLF001
    return transport


def is_usable(transport: httpx.AsyncHTTPTransport) -> bool:
    """Return whether the server has left the connection open after the last answer, and has sent no more than that.

    A broken server or proxy sends two answers at once: the next request would read the second one as its own. httpcore
    (1.0) looks only at the socket, and h11 keeps the bytes that came together with the answer.
    """
    pool = cast("Any", transport)._pool  # noqa: SLF001
    for connection in getattr(pool, "connections", (pool,)):
        if not connection.is_available() or connection.has_expired():
            return False
        inner = connection
        while not hasattr(inner, "_h11_state"):  # behind a proxy it is one or two levels deeper
            inner = inner._connection  # noqa: SLF001
        if inner._h11_state.trailing_data != (b"", False):  # noqa: SLF001
            return False
    return True
