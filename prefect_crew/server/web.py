"""uvicorn, set up for the crew server: quiet, able to break connections, and able to die."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Generator

import uvicorn
from starlette.applications import Starlette

from prefect_crew.server.app import runtime_of
from prefect_crew.server.connection import ConnectionProtocol, reset

__all__ = ["WebServer", "listener"]


def listener(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address; port 0 takes a free one.

    Raises:
        OSError: The port is taken, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off; left on, it costs each answer 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # so that a server which comes back can take its port again
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


class WebServer(uvicorn.Server):
    """Serves an app that `create_app` made; stop it by setting `should_exit`. Signals are its caller's concern."""

    def __init__(self, app: Starlette, *, on_started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=ConnectionProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=2,
            )
        )
        self._runtime = runtime_of(app)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:  # older uvicorns return from a start that failed
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let go of requests that never answer, then shut down."""
        await self._runtime.close()
        await super().shutdown(sockets)

    def crash(self) -> None:
        """Break all connections, refuse new ones and end. On the event loop."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            reset(connection.transport)
        self.should_exit = self.force_exit = True
