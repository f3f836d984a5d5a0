"""A transport for the polls of a batch: a poll takes a third of the CPU time that it takes over httpx's pool.

A pool of httpx looks at each of its connections for every request. Here the connection used last is used next. Kickoffs
stay with httpx: a poll that fails is sent again, and a kickoff is not.
"""

from __future__ import annotations

import asyncio
import select
import ssl
import time
from collections import deque

import anyio
import h11
import httpx
from anyio.abc import ByteStream, SocketAttribute

MAX_HEAD = 100 * 1024
"""The most bytes of the headers of an answer, as for httpx."""


class PollTransport(httpx.AsyncBaseTransport):
    """GET requests to one server over HTTP/1.1, each on a connection of its own. It raises httpx's errors.

    Args:
        origin: The URL whose scheme, host and port the connections lead to.
        tls: The context that checks the server's certificate.
        keepalive: Seconds for which an idle connection is used again.
        most: The most bytes that it reads of the body of an answer, and of an error's body; a piece more, since it
            reads pieces.
    """

    def __init__(self, origin: httpx.URL, *, tls: ssl.SSLContext, keepalive: float, most: tuple[int, int]) -> None:
        self._origin, self._keepalive, self._most = origin, keepalive, most
        self._tls = tls if origin.scheme == "https" else None
        self._idle: deque[_Connection] = deque()
        self._is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return its answer with the whole body."""
        timeouts: dict[str, float | None] = request.extensions["timeout"]
        connection = await self._idle_connection() or await self._connect(timeouts["connect"])
        try:
            return await connection.exchange(request, timeouts["read"], self._most)
        except TimeoutError:
            raise httpx.ReadTimeout("") from None
        except h11.ProtocolError as error:
            raise httpx.RemoteProtocolError(str(error)) from error
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpx.ReadError(str(error)) from error
        finally:
            if connection.is_done and not self._is_closed:
                connection.used_at = time.monotonic()
                self._idle.append(connection)
                if not self._idle[0].is_usable(self._keepalive):
                    await self._idle.popleft().aclose()
            else:
                await connection.aclose()

    async def _idle_connection(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable(self._keepalive):
                return connection
            await connection.aclose()
        return None

    async def _connect(self, timeout: float | None) -> _Connection:
        host, port = self._origin.host, self._origin.port or (443 if self._tls else 80)
        try:
            async with asyncio.timeout(timeout):
                if self._tls is None:
                    return _Connection(await anyio.connect_tcp(host, port))
                stream = await anyio.connect_tcp(host, port, ssl_context=self._tls, tls_standard_compatible=False)
                return _Connection(stream)
        except TimeoutError:
            raise httpx.ConnectTimeout("") from None
        except (OSError, ValueError, anyio.BrokenResourceError, anyio.EndOfStream) as error:  # ValueError: of a name
            raise httpx.ConnectError(str(error)) from error

    async def aclose(self) -> None:
        """Close the idle connections. A request under way closes its own."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().aclose()


class _Connection:
    """One connection, for one request at a time."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self.used_at = 0.0

    @property
    def is_done(self) -> bool:
        """Whether the last answer was read to its end, and nothing follows it."""
        return self._http.our_state is h11.IDLE and self._http.trailing_data == (b"", False)

    def is_usable(self, keepalive: float) -> bool:
        """Return whether the next request may use the connection: not if the socket is readable, because the server has
        closed it or sent more."""
        if time.monotonic() - self.used_at > keepalive:
            return False
        socket = self._stream.extra(SocketAttribute.raw_socket)  # noqa: S610  this is no model of Django
        if socket.fileno() < 0:  # asyncio has closed it
            return False
        if not hasattr(select, "poll"):  # Windows
            return not select.select([socket], [], [], 0)[0]
        readable = select.poll()
        readable.register(socket, select.POLLIN)
        return not readable.poll(0)

    async def exchange(self, request: httpx.Request, timeout: float | None, most: tuple[int, int]) -> httpx.Response:
        """Send a request, and return its answer. `timeout`: seconds until the next piece of the answer."""
        http, body, room = self._http, bytearray(), 0
        status, headers = 0, list[tuple[bytes, bytes]]()
        async with asyncio.timeout(timeout):
            await self._stream.send(self._encoded(request))
        while not isinstance(event := http.next_event(), h11.EndOfMessage) and len(body) <= room:
            if event is h11.NEED_DATA:
                async with asyncio.timeout(timeout):
                    http.receive_data(await self._piece())
            elif event is h11.PAUSED:
                raise h11.RemoteProtocolError("the server switched to another protocol")
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, list(event.headers)
                room = most[0] if 200 <= status < 300 else most[1]
            elif isinstance(event, h11.Data):
                body += event.data
        if http.our_state is h11.DONE and http.their_state is h11.DONE:
            http.start_next_cycle()
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(bytes(body)))

    def _encoded(self, request: httpx.Request) -> bytes:
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        return (self._http.send(head) or b"") + (self._http.send(h11.EndOfMessage()) or b"")

    async def _piece(self) -> bytes:
        try:
            return await self._stream.receive()
        except anyio.EndOfStream:
            return b""

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._stream.aclose()
