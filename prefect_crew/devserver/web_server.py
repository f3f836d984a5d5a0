"""An ASGI app on a port. The dev server and the webhook receiver share this module."""

from __future__ import annotations

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
    """uvicorn without logs. In the main thread it ends at SIGINT and SIGTERM, without an exception.

    `on_started` is called once requests are answered; `options` are more options of `uvicorn.Config`.
    """

    def __init__(self, app: ASGIApp, *, on_started: Callable[[], None] = lambda: None, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, ws="none", lifespan="on", log_config=None, access_log=False, **options))
        self._on_started = on_started

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop gently at the first signal, at once at the second. At its end, uvicorn would raise the signal again."""
        self.force_exit: bool = self.should_exit
        self.should_exit: bool = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call `on_started`."""
        await super().startup(sockets)
        self._on_started()
