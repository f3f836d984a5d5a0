"""Private API of httpx and of httpcore, its transport: whether a server has sent more than the answer that was read."""

from __future__ import annotations

from typing import Any, cast

import httpx


def has_unread_bytes(transport: httpx.AsyncHTTPTransport) -> bool:
    """Return whether bytes follow the last answer on a connection, which the next request would read as its own answer.

    A broken server or proxy sends two answers at once. httpcore (1.0) looks only at the socket, and h11 keeps the bytes
    that came together with the answer. To ask for upstream: httpcore closes such a connection itself.
    """
    for connection in cast("Any", transport)._pool.connections:  # noqa: SLF001
        # Behind a proxy, the connection is one or two levels deeper. It is None where none is open.
        while connection is not None and not hasattr(connection, "_h11_state"):
            connection = connection._connection  # noqa: SLF001
        if connection is not None and connection._h11_state.trailing_data != (b"", False):  # noqa: SLF001
            return True
    return False
