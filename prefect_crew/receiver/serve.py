"""The receiver on a port of its own: uvicorn, without a log of requests, and with no patience for slow heads."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import socket
from collections import OrderedDict
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from prefect_crew.devserver.server import listener, to_stdout, until_signalled

logger = logging.getLogger("prefect_crew.receiver")

HEAD_TIMEOUT = 10.0
"""Seconds for a request's head, from its first byte or from the connection."""
IDLE = 400
"""Connections without a request in work. Beyond these the oldest is closed: anybody can open any number of them."""
BACKLOG = 200
"""Connections that wait in the system to be accepted, and that asyncio accepts before it looks at any of them."""
FILES = 8192
"""Open files that are asked of the system: each connection is one."""
NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
SAY_EVERY = 60.0
"""Seconds between two log lines about connections that could not be accepted."""


class _Idle:
    """The connections of one server that have no request in work, those first that have had none for longest."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._connections: OrderedDict[_HeadsInTime, None] = OrderedDict()

    def add(self, connection: _HeadsInTime) -> None:
        self._connections[connection] = None
        self._connections.move_to_end(connection)
        if len(self._connections) > self._limit:
            oldest, _ = self._connections.popitem(last=False)
            oldest.transport.abort()

    def remove(self, connection: _HeadsInTime) -> None:
        self._connections.pop(connection, None)


class _HeadsInTime(H11Protocol):
    """uvicorn's HTTP protocol, which by itself waits for the rest of a head for ever, on any number of connections."""

    _late: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, idle: _Idle, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle = idle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle.add(self)
        self._late = self.loop.call_later(HEAD_TIMEOUT, self._too_late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answering = self._answering()
        if answering:
            self._idle.remove(self)
        if answering and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not answering and self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEAD_TIMEOUT, self._too_late)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # The next request on this connection may be in work already.
        if not self._answering() and not self.transport.is_closing():
            self._idle.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._idle.remove(self)
        if self._late is not None:
            self._late.cancel()

    def _too_late(self) -> None:
        self._late = None
        if not self._answering():
            self.transport.abort()

    def _answering(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # until the first request there is none
        return cycle is not None and not cycle.response_complete


class ReceiverServer(uvicorn.Server):
    """Serves a receiver, or any ASGI app that holds one; stop it by setting `should_exit`.

    URLs are all that protects three of its webhooks, so no request is logged.
    """

    def __init__(self, app: ASGIApp, *, on_started: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=cast("type[asyncio.Protocol]", partial(_HeadsInTime, idle=_Idle(IDLE))),
                backlog=BACKLOG,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # Longer than clients and proxies keep theirs: one that we close meets a webhook that is sent once.
                timeout_keep_alive=75,
                timeout_graceful_shutdown=2,
            )
        )
        # uvicorn warns of every request that is no HTTP: anybody could fill a disk with that.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self._on_started = on_started
        self._said_at = float("-inf")

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals to the caller."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        asyncio.get_running_loop().set_exception_handler(self._on_trouble)
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def _on_trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Say once in a while that there is no room for more connections; asyncio says it thousands of times."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in NO_ROOM):
            loop.default_exception_handler(context)
        elif loop.time() - self._said_at > SAY_EVERY:
            self._said_at = loop.time()
            logger.error("Connections cannot be accepted: %s. Let fewer through, or allow more open files.", error)


def _allow_more_files() -> None:
    """Ask the system for more open files than the 1,024 that are usual; what it does not give is gone without."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits on Windows; or not allowed
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve_receiver(
    app: ASGIApp,
    *,
    host: str = "127.0.0.1",
    port: int = 8001,
    announce: Callable[[str], None] | None = None,
) -> int:
    """Serve a receiver until Ctrl-C or SIGTERM, hand on what it holds, and return 0.

    Args:
        app: What `create_receiver` returned.
        host, port: Where; port 0 takes a free one.
        announce: Gets the line that says where it listens, once it does; by default it goes to standard output.

    Raises:
        OSError: The port is taken, or the host is not this machine's.
    """
    _allow_more_files()
    bound = listener(host, port)
    name, number = str(bound.getsockname()[0]), int(bound.getsockname()[1])
    where = f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}"
    line = f"Taking webhooks at {where}  Look: {where}/ready  Stop: Ctrl-C"

    def started() -> None:
        # What Prefect's modules hold need never be looked through again: it would stop every answer for 0.05 to 0.2 s.
        gc.collect()
        gc.freeze()
        (announce or to_stdout)(line)

    server = ReceiverServer(app, on_started=started)
    try:
        with contextlib.closing(bound), until_signalled(server):
            asyncio.run(server.serve(sockets=[bound]))
    finally:
        gc.unfreeze()
    return 0
