"""The way into the simulated crew server, which has no port: an httpx transport that calls its app."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from typing import Any
from urllib.parse import unquote

import httpx
from starlette.types import ASGIApp, Message

from prefect_crew.devserver._server import Connection

__all__ = ["InProcessTransport"]

logger = logging.getLogger(__name__)


class InProcessTransport(httpx.AsyncBaseTransport):
    """Sends requests to an app on another thread's event loop; usable from any event loop, and from several.

    What breaks a connection over TCP raises here what httpx raises there: ConnectError when the server is down,
    RemoteProtocolError for a dropped connection, ReadError for a reset one, ReadTimeout when no answer comes in time.
    """

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: set[_Call] = set()

    def open(self, app: ASGIApp) -> None:
        """Answer requests with this app, on the event loop that calls this."""
        self._app, self._loop = app, asyncio.get_running_loop()

    def close(self) -> None:
        """Answer no more; requests in flight are dropped. On the server's event loop."""
        self._app = None
        for call in list(self._calls):
            call.drop()

    def crash(self) -> None:
        """Answer no more; requests in flight are reset, and the app is at work on none. On the server's event loop."""
        self._app = None
        for call in list(self._calls):
            call.die()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request and return its answer."""
        content = await request.aread()
        app, loop = self._app, self._loop
        if app is None or loop is None:
            raise httpx.ConnectError("Connection refused: the server is not running", request=request)
        call = _Call(app, request, content, self._calls)
        if (trace := request.extensions.get("trace")) is not None:
            # As httpcore calls it right before the first byte; what it raises is raised, and nothing was sent.
            await trace("http11.send_request_headers.started", {"request": request})
        try:
            loop.call_soon_threadsafe(call.start)
        except RuntimeError:  # the loop was closed in between
            raise httpx.ConnectError("Connection refused: the server has stopped", request=request) from None
        read_timeout = request.extensions.get("timeout", {}).get("read")
        answer = asyncio.wrap_future(call.answer)
        try:
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the answer.
            done, _ = await asyncio.wait({answer}, timeout=read_timeout)
            if not done:
                raise httpx.ReadTimeout("The read operation timed out", request=request)
            status, headers, body = answer.result()
        except httpx.RequestError as error:
            error.request = request
            raise
        finally:
            answer.cancel()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(call.leave)
        return httpx.Response(status, headers=headers, content=body, request=request)


class _Call(Connection):
    """One request on the server's side; it is also the connection that faults break."""

    def __init__(self, app: ASGIApp, request: httpx.Request, content: bytes, calls: set[_Call]) -> None:
        self.answer: concurrent.futures.Future[tuple[int, list[tuple[bytes, bytes]], bytes]]
        self.answer = concurrent.futures.Future()
        self._app = app
        self._calls = calls
        self._content = content
        self._given = False
        self._gone = asyncio.Event()
        self._status: int | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        raw_path, _, query = request.url.raw_path.partition(b"?")
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "scheme": request.url.scheme,
            "path": unquote(raw_path.decode("ascii")),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "server": (request.url.host, request.url.port),
            "client": ("in-process", 0),
            "state": {"connection": self},
        }

    def start(self) -> None:
        self._calls.add(self)
        # As a server would, the app goes on when the client hangs up; only the answer reaches nobody.
        self._task = asyncio.get_running_loop().create_task(self._run())

    def leave(self) -> None:
        self._gone.set()

    def drop(self) -> None:
        started = self._status is not None
        said = "without sending complete message body" if started else "without sending a response"
        self._break(httpx.RemoteProtocolError(f"Server disconnected {said}."))

    def reset(self) -> None:
        self._break(httpx.ReadError("Connection reset by peer"))

    def die(self) -> None:
        self.reset()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def _break(self, error: httpx.TransportError) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.answer.set_exception(error)
        self._gone.set()

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception:
            logger.exception("The crew server's app failed")
        finally:
            self._calls.discard(self)
            self.drop()  # does nothing to an answer that was given

    async def _receive(self) -> Message:
        if not self._given:
            self._given = True
            return {"type": "http.request", "body": self._content, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], list(message.get("headers", []))
            return
        self._body.append(message.get("body", b""))
        if not message.get("more_body") and self._status is not None:
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # the client has left
                self.answer.set_result((self._status, self._headers, b"".join(self._body)))
