"""An ASGI app on a port. The dev server and the webhook receiver share this module."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address; port 0 takes a free one.

    Raises:
        OSError: The port is taken, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off; left on, it costs each answer 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # so that a restarted server can take its port again
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL under which this machine reaches a listener."""
    host, port = str(listener.getsockname()[0]), int(listener.getsockname()[1])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - the addresses of every interface
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def print_line(line: str) -> None:
    """Print a line at once, since the process that started this one reads the line through a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class WebServer(uvicorn.Server):
    """uvicorn without logs, which stops as soon as it has answered the requests in work, without uvicorn's own pauses.

    In the main thread it ends at SIGINT and SIGTERM. `on_started` is called once requests are answered; `options` are
    more options of `uvicorn.Config`.
    """

    def __init__(self, app: ASGIApp, *, on_started: Callable[[], None] = lambda: None, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, ws="none", lifespan="on", log_config=None, access_log=False, **options))
        self._on_started = on_started
        self._stop_event = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop gently at the first signal, at once at the second. At its end, uvicorn would raise the signal again."""
        self.force_exit: bool = self.should_exit
        self.should_exit: bool = True

    def stop(self) -> None:
        """Stop; call it on the event loop. Setting `should_exit` does the same within 0.1 s."""
        self.should_exit = True
        self._stop_event.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call `on_started`, or raise a RuntimeError."""
        await super().startup(sockets)
        if not self.started:  # older uvicorns return from a start that failed
            raise RuntimeError("The application does not start. The log has the reason.")
        self._on_started()

    async def main_loop(self) -> None:
        """Return once the server is to stop. uvicorn's own loop looks only every 0.1 s."""
        for tick in itertools.count():
            if await self.on_tick(tick):
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_event.wait(), 0.1)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections, after the answer if a request is in work. uvicorn would sleep instead."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        state = self.server_state
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while (state.connections or state.tasks) and not self.force_exit:  # noqa: ASYNC110 - uvicorn has no event
                    await asyncio.sleep(0.002)
        for task in state.tasks:
            task.cancel()
        if not self.force_exit:
            await self.lifespan.shutdown()
