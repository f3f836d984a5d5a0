"""The receiver on a port of its own: uvicorn, without a log of requests, and with a time limit for heads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from starlette.applications import Starlette
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from prefect_crew._internal.web_server import WebServer, open_listener, print_line, url_of
from prefect_crew.receiver.forward import RecentWebhooks

HEAD_TIMEOUT = 10.0  # seconds for a request's head, from its first byte or from the connection
IDLE = 300
"""Connections without a request in work. Beyond these the oldest is closed: anybody can open any number of them."""
CONNECTIONS = 600
"""Connections at a time, of the 1,024 open files that are usual; a request on one more is answered with 503."""
BACKLOG = 100
"""Connections that wait in the system to be accepted, and that asyncio accepts before it looks at any of them."""


class _HeadsInTime(H11Protocol):
    """uvicorn's HTTP protocol, which alone would wait for ever for the rest of a head, on any number of connections.

    `idle` holds the connections of one server without a request in work, the oldest first.
    """

    _late: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, idle: OrderedDict[_HeadsInTime, None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle = idle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._note_idle()
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._leave()
        elif not self.transport.is_closing():
            self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # The next request on this connection may be in work already.
        if not self._is_answering() and not self.transport.is_closing():
            self._note_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._leave()

    def _note_idle(self) -> None:
        self._idle[self] = None
        if len(self._idle) > IDLE:
            oldest, _ = self._idle.popitem(last=False)
            oldest.transport.abort()

    def _wait_for_head(self) -> None:
        self._late = self._late or self.loop.call_later(HEAD_TIMEOUT, self.transport.abort)

    def _leave(self) -> None:
        self._idle.pop(self, None)
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _is_answering(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # until the first request there is none
        return cycle is not None and not cycle.response_complete


class ReceiverServer(WebServer):
    """Serves a receiver, or an ASGI app that holds one. To stop the server, set `should_exit`.

    Only their URLs protect three kinds of webhooks, so the server logs no request.
    """

    def __init__(self, app: ASGIApp, *, on_started: Callable[[], None] = lambda: None) -> None:
        forwarder = getattr(app.state, "forwarder", None) if isinstance(app, Starlette) else None
        self._recent: RecentWebhooks | None = getattr(forwarder, "recent", None)
        super().__init__(
            app,
            on_started=on_started,
            http=cast("type[asyncio.Protocol]", partial(_HeadsInTime, idle=OrderedDict())),
            backlog=BACKLOG,
            limit_concurrency=CONNECTIONS,
            server_header=False,
            proxy_headers=False,
            # Longer than clients and proxies keep theirs: else a webhook, sent once, may meet a closed connection.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        )
        # uvicorn warns of every request that is not HTTP: anybody could fill a disk with that.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the server, without a wait for the answers that it holds back."""
        if self._recent is not None:
            self._recent.close()
        await super().shutdown(sockets)


def serve_receiver(app: ASGIApp, *, host: str = "127.0.0.1", port: int = 8001) -> int:
    """Serve a receiver until Ctrl-C or SIGTERM, forward what it holds, and return 0.

    Args:
        app: The app that `create_receiver` returned.
        host: The address to listen on.
        port: 0 takes a free one.

    Raises:
        OSError: The port is taken, or the host is not this machine's.
    """
    bound = open_listener(host, port)
    where = url_of(bound)
    line = f"Listening for webhooks at {where}  State: {where}/ready  Stop: Ctrl-C"
    server = ReceiverServer(app, on_started=lambda: print_line(line))
    with contextlib.closing(bound):
        asyncio.run(server.serve(sockets=[bound]))
    return 0
