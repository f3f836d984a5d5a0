"""What a server can do to a connection besides answering: close it, or reset it.

ASGI has no word for either. The server that runs the app puts a `Connection` into the request's `state`, and the
faults take it from there: over TCP it is the real socket, without a port it is an error in the client's transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import MutableMapping
from typing import Any, Protocol

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Connection", "ConnectionProtocol", "connection_of", "reset", "with_connection"]

_KEY = "prefect_crew.connection"


class Connection(Protocol):
    """The connection that a request came over."""

    def drop(self) -> None:
        """Close it. The client sees that the server disconnected without (the rest of) an answer."""
        ...

    def reset(self) -> None:
        """Reset it (TCP RST). The client sees a read error."""
        ...


def connection_of(scope: MutableMapping[str, Any]) -> Connection:
    """Return the connection of a request.

    Raises:
        RuntimeError: The app runs under a server that tells nothing of its connections.
    """
    try:
        return scope["state"][_KEY]
    except KeyError:
        raise RuntimeError(
            "Faults of the connection need this package's own server: use serve(), CrewServer or InProcessCrewServer."
        ) from None


def with_connection(state: MutableMapping[str, Any], connection: Connection) -> dict[str, Any]:
    """Return a copy of an ASGI state that carries the connection."""
    return {**state, _KEY: connection}


def reset(transport: asyncio.Transport) -> None:
    """Close a connection so that the other side sees it reset."""
    peer = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):  # the other side was faster
        # A linger time of zero makes the kernel send RST instead of FIN.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class _Socket:
    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def drop(self) -> None:
        self._transport.abort()  # close() would wait for an answer that never comes

    def reset(self) -> None:
        reset(self._transport)


class ConnectionProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with the connection in the state of each request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, and tell its requests of it."""
        super().connection_made(transport)
        self.app_state = with_connection(self.app_state, _Socket(transport))
