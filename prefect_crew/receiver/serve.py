"""The receiver on a port of its own: uvicorn with limits, and without a log of requests.

uvicorn waits without limit for the rest of a head. On the Internet, a proxy has to stand in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from starlette.types import ASGIApp

from prefect_crew.devserver.web_server import WebServer, open_listener, print_line, url_of

CONNECTIONS = 600
"""Connections at a time, of the 1,024 open files that are usual; a request on one more is answered with 503."""
MAX_HEAD = 16 * 1024
"""Bytes of a request's head."""


class ReceiverServer(WebServer):
    """Serves a receiver, or an ASGI app that holds one. To stop the server, set `should_exit`.

    Only their URLs protect three kinds of webhooks, so the server logs no request.
    """

    def __init__(self, app: ASGIApp, *, on_started: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            app,
            on_started=on_started,
            http="h11",  # httptools, the other one, takes a head of any size
            h11_max_incomplete_event_size=MAX_HEAD,
            limit_concurrency=CONNECTIONS,
            server_header=False,
            proxy_headers=False,
            # Longer than clients and proxies keep theirs: else a webhook, sent once, may meet a closed connection.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        )
        # uvicorn warns of every request that is not HTTP: anybody could fill a disk with that.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def serve_receiver(app: ASGIApp, *, host: str = "127.0.0.1", port: int = 8001) -> int:
    """Serve a receiver until Ctrl-C or SIGTERM, and return 0.

    Args:
        app: The app that `create_receiver` returned.
        host: The address to listen on.
        port: 0 takes a free one.

    Raises:
        OSError: The port is taken, or the host is not this machine's.
    """
    bound = open_listener(host, port)
    where = url_of(bound)
    line = f"Listening for webhooks at {where}  State: {where}/health  Stop: Ctrl-C"
    server = ReceiverServer(app, on_started=lambda: print_line(line))
    with contextlib.closing(bound):
        asyncio.run(server.serve(sockets=[bound]))
    return 0
